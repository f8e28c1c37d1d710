"""The next step's views are made during this one, and nothing else comes out of it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.train import ahead
from hpdist.train.ahead import Generators, kept_generators
from hpdist.train.data import RunData
from hpdist.train.micro_batch import MicroBatcher
from tests.benchmarks.dispatch_count import DispatchCounter
from tests.support.catalogue import make
from tests.support.drawing_views import Dropping
from tests.support.odd_models import trainer
from tests.support.recipes import global_batches

STEPS = 4
VIEWS = "python:tests.support.drawing_views:DrawingConfig"
Batches = tuple[LabeledBatch, UnlabeledBatch]


def weights(folder: Path) -> Tensor:
    module = Dropping()
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    made = trainer(module, folder, "run", STEPS, views={"name": VIEWS}, optim={"lr": 0.1})
    made.fit()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_a_run_is_the_same_with_views_that_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    take = ahead.ViewsAhead.take

    def counted(self: Any, *given: Any) -> Any:
        found = take(self, *given)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(ahead.ViewsAhead, "take", counted)
    found = weights(tmp_path / "ahead")
    assert taken == [False] + [True] * (STEPS - 1)
    monkeypatch.setattr(RunData, "following", lambda _: None)
    taken.clear()
    assert torch.equal(weights(tmp_path / "without"), found)
    assert taken == [False] * STEPS


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The attempts whose views have been made."""
    made: list[int] = []
    split = MicroBatcher.split

    def counted(self: MicroBatcher, labeled: Any, unlabeled: Any, step: int) -> Any:
        made.append(step)
        return split(self, labeled, unlabeled, step)

    monkeypatch.setattr(MicroBatcher, "split", counted)
    return made


@pytest.mark.parametrize("changed", [False, True])
def test_views_are_made_again_for_other_rows_only(cuts: list[int], changed: bool) -> None:
    first, second, other = (global_batches(number) for number in range(3))
    plain = make("fixmatch", smooth=True)
    plain(*first)
    expected = plain(*(other if changed else second), measure=True)
    cuts.clear()
    step = make("fixmatch", smooth=True)
    step(*first, following=lambda: second)
    assert cuts == [0, 1]
    found = step(*(other if changed else second), measure=True)
    assert cuts == ([0, 1, 1] if changed else [0, 1])
    assert found.metrics == expected.metrics


def test_rows_that_are_not_at_hand_and_errors_wait_for_their_step(cuts: list[int]) -> None:
    first, second = global_batches(0), global_batches(1)
    step = make("fixmatch", smooth=True)
    assert step(*first, following=lambda: None).applied
    cut = LabeledBatch(second[0].inputs, second[0].labels, second[0].ids), None
    assert step(*second, following=lambda: cut).applied  # type: ignore[arg-type,return-value]
    with pytest.raises(Exception, match="needs unlabelled rows"):
        step(*cut)  # type: ignore[arg-type]


def test_generators_are_left_as_they_are() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    kept = Generators.now()
    expected = draw()
    kept.restore()
    with kept_generators():
        draw()
    assert draw() == expected


def test_little_is_left_between_the_wait_and_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dispatched from the wait for the gradient's norm to the next forward."""
    step = make("fixmatch", smooth=True)
    batches = [global_batches(number) for number in range(3)]
    step(*batches[0], following=lambda: batches[1])
    counted = DispatchCounter()
    apply = step.engine.optimizer.step
    for group in step.engine.optimizer.param_groups:
        group["foreach"] = True  # as on a GPU

    def after_the_wait(*given: Any) -> Any:
        counted.operations.clear()
        return apply(*given)

    monkeypatch.setattr(step.engine.optimizer, "step", after_the_wait)
    seen: list[Counter[str]] = []
    step.engine.module.register_forward_pre_hook(lambda *_: seen.append(counted.operations.copy()))
    with counted:
        step(*batches[1], following=lambda: batches[2])
        seen.clear()
        step(*batches[2])
    assert seen[0].total() <= 26, seen[0]
