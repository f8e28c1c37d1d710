"""Scores of thousands of classes: what a confusion matrix would give, from O(classes) numbers."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hpdist.evaluate.scoring import Evaluation
from hpdist.tasks import DEFAULT_TASK
from hpdist.tasks.confusion import ClassSums, ConfusedPairs, Confusion, ManyClassScores, Scores
from hpdist.tracking.metrics import confusion_rows
from tests.support.evaluated import evaluated
from tests.support.ranks import run_ranks

CLASSES = 1_200
ROWS = 400


def predictions(classes: int = CLASSES, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Logits and labels: few classes are there, so that some pairs are confused repeatedly."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 40, (rows,), generator=generator) * (classes // 40)
    logits = torch.zeros(rows, classes)
    columns = (torch.arange(60) * (classes // 60))[None].expand(rows, -1)
    noise = 2 * torch.randn(rows, 60, generator=generator)
    logits.scatter_(1, columns, noise)
    logits[torch.arange(rows), labels] += 2
    return logits, labels


def off_diagonal(matrix: Tensor) -> list[tuple[int, int, int]]:
    wrong = matrix.clone().fill_diagonal_(0).nonzero().tolist()
    return sorted((true, said, int(matrix[true, said])) for true, said in wrong)


def on_rank() -> tuple[dict[str, float], list[list[int]], bool]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = evaluated(*predictions(), 64, dist.get_rank(), dist.get_world_size())
    return found.values, found.pairs.tolist(), found.complete


def test_scores_and_pairs_are_those_of_the_matrix_on_any_ranks() -> None:
    logits, labels = predictions()
    matrix = Confusion(DEFAULT_TASK, CLASSES, "cpu")
    matrix.add(logits, labels, torch.ones(ROWS, dtype=torch.bool))
    expected = matrix.result()
    one = cast(ManyClassScores, evaluated(logits, labels, 64, 0, 1))
    assert one.values == expected.values
    assert one.counts is None
    pairs = one.pairs.tolist()
    assert sorted(map(tuple, pairs)) == off_diagonal(expected.confusion)
    rows = [count for _, _, count in pairs]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > 1
    top = logits.topk(5, dim=1).indices
    share = sum(int(label in best) for label, best in zip(labels, top, strict=True)) / ROWS
    assert one.values["top_5_accuracy"] == share != one.values["accuracy"]
    for values, theirs, complete in run_ranks(3, on_rank):
        assert values == pytest.approx(one.values, rel=1e-12)
        assert theirs == pairs
        assert complete


def held(meter: ClassSums) -> int:
    """Numbers in a meter."""
    pairs = meter._pairs
    tensors = [meter._sums._flat, pairs._codes, pairs._counts, *pairs._waiting]
    return sum(t.numel() for t in tensors)


def test_twenty_one_thousand_classes_take_numbers_and_no_lists() -> None:
    """However many rows: a matrix would have 441 million cells, and lists of as many objects."""
    classes, rows = 21_000, 512
    meter = ClassSums(DEFAULT_TASK, classes, "cpu")
    generator = torch.Generator().manual_seed(0)
    keep = torch.ones(rows, dtype=torch.bool)
    most = 0
    for _ in range(8):
        labels = torch.randint(classes, (rows,), generator=generator)
        meter.add(torch.randn(rows, classes, generator=generator), labels, keep)
        most = max(most, held(meter))
    assert most < 10 * classes
    tracemalloc.start()
    scores = meter.result()
    both = Evaluation(scores, scores)
    assert 0 < both.values["loss"] < 20
    both.summary("test")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    written: Any = both.confusion(list(map(str, range(classes))))
    assert 0 < len(written["most_confused"]["teacher"]["pairs"]) <= 10_000


def test_pairs_beyond_the_room_are_left_out_and_that_is_said() -> None:
    pairs = ConfusedPairs(100, room=4)
    keep = torch.ones(3, dtype=torch.bool)
    for said in range(1, 9):
        labels, predicted = torch.tensor([0, 0, 0]), torch.tensor([50, 50, said])
        pairs.add(labels, predicted, keep)
        assert len(pairs._codes) <= 4
        assert sum(map(len, pairs._waiting)) < 4
    found, complete = pairs.result()
    assert found[0].tolist() == [0, 50, 16]
    assert len(found) == 4
    assert not complete


def test_what_is_written_names_the_pairs() -> None:
    scores = evaluated(*predictions(), 64, 0, 1)
    names = [f"class {number}" for number in range(CLASSES)]
    written: Any = json.loads(json.dumps(Evaluation(scores, scores).confusion(names)))
    assert written["most_confused"]["student"]["complete"] is True
    true, said, rows = written["most_confused"]["teacher"]["pairs"][0]
    assert confusion_rows(written)[0] == [names[true], names[said], rows]
    assert "teacher" not in written


def test_few_classes_keep_their_matrix_and_their_scores() -> None:
    logits = torch.eye(10)
    few = cast(Scores, evaluated(logits, torch.arange(10), 4, 0, 1))
    assert few.confusion.tolist() == torch.eye(10).long().tolist()
    assert "top_5_accuracy" not in few.values
    hundred = cast(Scores, evaluated(torch.eye(100), torch.arange(100), 64, 0, 1))
    assert hundred.values["top_5_accuracy"] == 1
    assert isinstance(DEFAULT_TASK.meter(torch.zeros(2, 1_001)), ClassSums)
