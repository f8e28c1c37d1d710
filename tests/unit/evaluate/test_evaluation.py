"""Scores from one confusion matrix, against scikit-learn and torchmetrics."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor, nn

from hpdist.evaluate.scoring import Evaluation
from hpdist.tasks.classification import Scores
from tests.support.evaluated import evaluated
from tests.support.ranks import run_ranks

CLASSES = 5


def predictions(rows: int = 103, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Logits that are the inputs, and labels: uneven, and with a class that is never there."""
    generator = np.random.default_rng(0)
    shares = [0.5, 0.3, 0.15, 0.05, 0.0][:classes]
    labels = torch.from_numpy(generator.choice(classes, rows, p=shares))
    logits = torch.from_numpy(generator.normal(size=(rows, classes))).float()
    logits[torch.arange(rows), labels] += 1
    return logits, labels


def scores_of(logits: Tensor, labels: Tensor, size: int, rank: int = 0, ranks: int = 1) -> Scores:
    return cast(Scores, evaluated(logits, labels, size, rank, ranks))


def on_rank(size: int) -> tuple[dict[str, float], list[list[int]]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    logits, labels = predictions()
    scores = scores_of(logits, labels, size, dist.get_rank(), dist.get_world_size())
    return scores.values, scores.confusion.tolist()


@pytest.mark.parametrize("size", [1, 8, 200])
def test_scores_are_scikit_learns(size: int) -> None:
    logits, labels = predictions()
    scores = scores_of(logits, labels, size)
    guessed = logits.argmax(dim=1)
    assert 4 in guessed
    assert 4 not in labels
    expected = metrics.confusion_matrix(labels, guessed, labels=range(CLASSES))
    assert scores.confusion.tolist() == expected.tolist()
    with pytest.warns(UserWarning, match="not in y_true"):
        balanced = metrics.balanced_accuracy_score(labels, guessed)
    assert scores.values == {
        "accuracy": pytest.approx(metrics.accuracy_score(labels, guessed), abs=1e-12),
        "loss": pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6),
        "macro_f1": pytest.approx(metrics.f1_score(labels, guessed, average="macro"), abs=1e-12),
        "balanced_accuracy": pytest.approx(balanced, abs=1e-12),
    }
    assert len({round(v, 4) for k, v in scores.values.items() if k != "loss"}) == 3


def test_scores_are_torchmetrics() -> None:
    """On classes that are all there; of one that is not, it counts a recall of 0."""
    classification = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = predictions(classes=4)
    scores = scores_of(logits, labels, 8)
    for name, function in (
        ("macro_f1", classification.multiclass_f1_score),
        ("balanced_accuracy", classification.multiclass_accuracy),
    ):
        expected = float(function(logits, labels, num_classes=4, average="macro"))
        assert scores.values[name] == pytest.approx(expected, abs=1e-6)
    matrix = classification.multiclass_confusion_matrix(logits, labels, num_classes=4)
    assert torch.equal(scores.confusion, matrix)


def test_ranks_do_not_matter() -> None:
    logits, labels = predictions()
    one = scores_of(logits, labels, 8)
    for values, confusion in run_ranks(3, on_rank, 8):
        assert confusion == one.confusion.tolist()
        assert values == pytest.approx(one.values, rel=1e-12)


def test_the_summary_has_the_teachers_scores_and_json_has_both() -> None:
    good = Scores(torch.tensor([[3, 1], [0, 4]]), 0.5)
    poor = Scores(torch.tensor([[2, 2], [2, 2]]), 1.0)
    both = Evaluation(good, poor)
    assert both.summary("test") == {
        "test/accuracy": 7 / 8,
        "test/accuracy_student": 0.5,
        "test/macro_f1": pytest.approx((6 / 7 + 8 / 9) / 2),
        "test/balanced_accuracy": 7 / 8,
    }
    assert both.values["macro_f1_student"] == 0.5
    assert both.confusion(["cat", "dog"]) == {
        "classes": ["cat", "dog"],
        "teacher": [[3, 1], [0, 4]],
        "student": [[2, 2], [2, 2]],
    }
