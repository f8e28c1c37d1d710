"""On one process: parameters that are trained never or now and then, or have no dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpdist.engines.optimizer_state import SavedOptimizer, scalars_of
from tests.support.odd_models import Complex, Odd, differing, train

pytestmark = pytest.mark.filterwarnings("ignore:model.* does not reach")


@pytest.mark.parametrize(
    "settings",
    [{}, {"optim": {"name": "adamw"}}, {"optim": {"momentum": 0.0}}],
    ids=["sgd", "adamw", "no momentum"],
)
@pytest.mark.parametrize("kind", [Odd, Complex])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, kind: Any, settings: dict[str, Any]
) -> None:
    train(kind, tmp_path, "whole", 5, **settings)
    for steps in (1, 2, 5):
        made = train(kind, tmp_path, "parts", steps, **settings)
    assert differing(tmp_path, "whole", "parts", 5) == []
    if kind is Odd and settings.get("optim", {}).get("name") == "adamw":
        engine = made.step.engine
        assert engine.optimizer_scalars() == {"step": 5.0}
        apart = {"now_and_then.weight": 2.0, "now_and_then.bias": 2.0}
        assert engine.optimizer_scalars_by_parameter() == {"step": apart}


def test_adams_step_is_no_momentum_though_it_has_the_shape_of_one() -> None:
    scalar, line = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([scalar, line])
    (scalar * line.sum()).backward()
    optimizer.step()
    states = list(optimizer.state.items())
    assert scalars_of(states) == scalars_of(states[:1]) == {"step": 1.0}
    assert scalars_of([(scalar, {})]) == {}


def test_of_what_was_not_saved_the_state_is_zero() -> None:
    from hpdist.distributed.fragments import Fragment

    saved = SavedOptimizer(["exp_avg"], {"step": 4.0}, {"step": {"b": 2.0}})
    assert torch.equal(saved.read("exp_avg", Fragment("a", 3, torch.ones(2))), torch.zeros(2))
    assert saved.numbers_of("a") == {"step": 4.0}
    assert saved.numbers_of("b") == {"step": 2.0}
