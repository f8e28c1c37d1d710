"""Scores of several labels and of numbers, against scikit-learn, on one rank and on two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor

from hpdist.algorithms import Multilabel, Regression, Task
from hpdist.evaluate.scoring import Evaluation
from tests.support.evaluated import evaluated
from tests.support.ranks import run_ranks

SPREAD = (2.0, 0.5, 300.0)


def several(rows: int = 103, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Logits and 0/1 labels: classes of unequal frequency, one without any row, equal logits."""
    generator = np.random.default_rng(0)
    shares = np.array([0.6, 0.4, 0.3, 0.1, 0.05, 0.0])[:classes]
    labels = (generator.random((rows, classes)) < shares).astype(np.float32)
    logits = np.round(generator.normal(size=(rows, classes)) + labels - 0.5, 1)
    return torch.from_numpy(logits.astype(np.float32)), torch.from_numpy(labels)


def numbers(rows: int = 103) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(1)
    targets = generator.normal(size=(rows, 3)).astype(np.float32)
    guessed = targets + generator.normal(size=(rows, 3)).astype(np.float32) * [0.1, 0.5, 1]
    return torch.from_numpy(guessed.astype(np.float32)), torch.from_numpy(targets)


def values_of(
    task: Task, logits: Tensor, labels: Tensor, size: int, rank: int = 0, ranks: int = 1
) -> dict[str, float]:
    found: dict[str, float] = evaluated(logits, labels, size, rank, ranks, task).values
    return found


def all_values(rank: int = 0, ranks: int = 1) -> list[dict[str, float]]:
    """Of sets so small, too, that the second rank has no row that counts."""
    return [
        values_of(task, *rows, 5, rank, ranks)
        for count in (103, 3, 1)
        for task, rows in (
            (Multilabel(0.4), several(count)),
            (Regression(SPREAD), numbers(count)),
        )
    ]


def on_rank() -> list[dict[str, float]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return all_values(dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize("size", [1, 8, 200])
def test_scores_of_several_labels_are_scikit_learns(size: int) -> None:
    logits, labels = several()
    found = values_of(Multilabel(0.4), logits, labels, size)
    p, y = logits.double().sigmoid().numpy(), labels.numpy().astype(int)
    guessed = (p > 0.4).astype(int)
    assert not y[:, 5].any()
    expected = {
        "mean_average_precision": metrics.average_precision_score(y[:, :5], p[:, :5]),
        "micro_f1": metrics.f1_score(y, guessed, average="micro"),
        "macro_f1": metrics.f1_score(y, guessed, average="macro", zero_division=0),
        "exact_match": metrics.accuracy_score(y, guessed),
        "loss": np.mean([metrics.log_loss(y[:, c], p[:, c], labels=[0, 1]) for c in range(6)]),
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert 0 < found["exact_match"] < found["micro_f1"] < 1


@pytest.mark.parametrize("size", [1, 8, 200])
def test_scores_of_numbers_are_scikit_learns_in_their_own_units(size: int) -> None:
    guessed, targets = numbers()
    found = values_of(Regression(SPREAD), guessed, targets, size)
    z, y = (part.double().numpy() * SPREAD + 7 for part in (guessed, targets))
    expected = {
        "mae": metrics.mean_absolute_error(y, z),
        "rmse": metrics.root_mean_squared_error(y, z),
        "r2": metrics.r2_score(y, z),
        "loss": ((guessed.double() - targets) ** 2).mean().item(),
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_scores_are_the_same_on_two_ranks() -> None:
    one = all_values()
    for rank in run_ranks(2, on_rank):
        for found, expected in zip(rank, one, strict=True):
            assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)
    assert [np.isnan(found["r2"]) for found in one[1::2]] == [False, False, True]


def test_no_row_of_any_class_and_every_row_of_all() -> None:
    logits, labels = several()
    none = values_of(Multilabel(), logits, torch.zeros_like(labels), 8)
    assert np.isnan(none["mean_average_precision"])
    assert none["micro_f1"] == none["macro_f1"] == 0
    every = values_of(Multilabel(), logits.abs() + 1, torch.ones_like(labels), 8)
    names = ("mean_average_precision", "micro_f1", "macro_f1", "exact_match")
    assert [every[name] for name in names] == pytest.approx([1] * 4, rel=1e-7)


def test_the_summary_has_the_scores_without_the_loss() -> None:
    class Measured:
        values = {"rmse": 2.0, "mae": 1.0, "r2": 0.5, "loss": 3.0}  # noqa: RUF012
        summarized = ("rmse", "mae", "r2")
        counts = None

    both = Evaluation(Measured(), Measured())
    assert both.summary("test") == {
        "test/rmse": 2.0,
        "test/rmse_student": 2.0,
        "test/mae": 1.0,
        "test/r2": 0.5,
    }
    assert both.confusion(["price"]) == {}
