"""What algorithms with banks and histograms hold where there are many classes, or many rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpdist.algorithms import Algorithm, CoMatch, FreeMatch, SimMatch, comatch, simmatch
from hpdist.data.structures import tensors_of
from hpdist.testing.imitation import Ran, global_batch, run_step

CLASSES, ROWS = 5, 256


class Largest(TorchDispatchMode):
    """Remembers the most elements of a tensor that any operation gives, in either pass."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // 4)
        return found


def ran(algorithm: Algorithm, steps: int = 3, rows: int = ROWS) -> Ran:
    for step in range(steps):
        found = run_step([algorithm], global_batch(algorithm, step, unlabeled=rows))
    return found


def same(one: Ran, other: Ran) -> None:
    assert other.losses == pytest.approx(one.losses, rel=1e-5)
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    for wanted, found in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def _tensors(found: Ran) -> Iterator[Tensor]:
    yield from found.gradients
    for parts in found.head_gradients.values():
        yield from (part for each in parts for part in tensors_of(each))


def test_comatchs_graph_is_held_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss and gradients are those of the whole, of rows by rows numbers."""
    options: dict[str, Any] = {"threshold": 0.4, "graph_threshold": 0.3, "bank": 64, "width": 4}
    whole = ran(CoMatch(CLASSES, **options))
    assert whole.losses["contrastive_loss"] > 0
    monkeypatch.setattr(comatch, "_AT_ONCE", 16)
    with Largest() as largest:
        parts = ran(CoMatch(CLASSES, **options))
    same(whole, parts)
    assert largest.elements <= ROWS * 64  # the similarities to the bank
    assert largest.elements < ROWS * ROWS


def test_comatch_sends_a_number_for_a_label() -> None:
    algorithm = CoMatch(CLASSES)
    sent: dict[str, Any] = {}
    observe = algorithm.observe

    def observed(sums: Any, rows: Tensor) -> None:
        sent.update({name: tuple(value.shape) for name, value in sums.items()})
        observe(sums, rows)

    algorithm.observe = observed  # type: ignore[method-assign]
    ran(algorithm, steps=1)
    assert sent["labels"] == (8,)
    assert sent["probabilities"] == (ROWS, CLASSES)


def test_simmatchs_labels_are_written_out_for_some_classes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"threshold": 0.4, "bank": 64, "width": 4}
    whole = ran(SimMatch(CLASSES, **options), rows=16)
    monkeypatch.setattr(simmatch, "_AT_ONCE", 2)
    same(whole, ran(SimMatch(CLASSES, **options), rows=16))
    ids = torch.tensor([5, 3, 5, 9, 3, 5, 0])
    wanted = [True, True, True, False, False, False, False]
    assert simmatch._occurs_again(ids).tolist() == wanted
    assert simmatch._occurs_again(ids[:1]).tolist() == [False]


def test_a_histogram_of_many_classes_takes_numbers_of_classes() -> None:
    """And not of rows by classes."""
    algorithm, classes = FreeMatch(21_000), torch.randint(21_000, (512,))
    mask = (torch.arange(512) % 3 > 0).float()
    with Largest() as largest:
        counts = algorithm._count(classes, mask)
    assert largest.elements <= 2 * 21_000
    assert counts.tolist() == classes[mask > 0].bincount(minlength=21_000).tolist()
