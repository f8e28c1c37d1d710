"""The L1 penalty moves every weight by the same, whatever shards it; ZeRO-3 refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpdist.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.recipes import make_step, train

L1, LR = 0.01, 0.05


def penalised(settings: dict[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
    """The weights after a step with the penalty and after one without, and the three losses."""
    moved, losses = {}, []
    for l1 in (0.0, L1):
        step = make_step("fixmatch", lr=LR, l1=l1, **settings)
        engine = step.engine
        first = engine.layout.gather(engine.master_fragments())
        (curve,) = train(step, 1)
        after = engine.layout.gather(engine.master_fragments())
        shapes = engine.parameter_shapes()
        moved[l1] = {name: after[name].clone().view(shapes[name]) for name in shapes}
        losses += [curve["loss"], curve.get("l1_loss", 0.0)]
    names = {name: first[name].view(shape) for name, shape in shapes.items()}
    return {
        name: torch.stack([moved[L1][name] - moved[0.0][name], names[name]]) for name in shapes
    }, losses


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {}),
        (2, {"micro_batches": 2}),
        (2, {"stage": 1, "precision": "bf16"}),
        (2, {"stage": 2, "micro_batches": 2}),
    ],
)
def test_every_weight_is_pulled_to_zero_by_the_same(ranks: int, settings: dict[str, Any]) -> None:
    rounding = 3e-4 if settings.get("precision") == "bf16" else 2e-5  # of a gradient, times LR
    for found, losses in run_ranks(ranks, penalised, settings):
        total = 0.0
        for change, first in found.values():
            pull = 1.9 * LR * L1 * first.sign() if first.dim() >= 2 else torch.zeros(first.shape)
            torch.testing.assert_close(change, -pull, rtol=0.02, atol=rounding)
            total += float(first.abs().sum()) if first.dim() >= 2 else 0.0
        plain, none, loss, penalty = losses
        assert none == 0
        assert penalty == pytest.approx(L1 * total, rel=0.01)
        assert loss == pytest.approx(plain + penalty, rel=1e-4)


def refused() -> str:
    with pytest.raises(ConfigError) as caught:
        make_step("fixmatch", l1=L1, stage=3)
    return str(caught.value)


def test_zero_3_refuses_it() -> None:
    assert "optim.l1: ZeRO-3 and FSDP2 shard the weights" in run_ranks(1, refused)[0]
