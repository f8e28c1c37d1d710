"""The norm that is logged and clipped by is of the unscaled, global gradient; LayerNorm trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from hpdist.algorithms import FixMatch
from hpdist.data.views import ImageViewsConfig
from hpdist.engines import launch
from hpdist.engines.config import LossScale
from hpdist.engines.prepare import prepare
from hpdist.train.step import SemiSupervisedStep
from tests.support.ranks import run_ranks
from tests.support.recipes import (
    LABELED,
    UNLABELED,
    global_batches,
    make_step,
    sharded_by,
    slice_of,
    train,
)

STAGES = [None, 0, 1, 2, 3, "fsdp2"]
LR, CLIP = 0.1, 0.25
UPDATE = 1.9 * LR  # Nesterov's first step, momentum 0.9, per unit of gradient
Found = dict[tuple[int | str | None, str, float | None], tuple[float, float]]


def norms(stages: list[int | str | None], precisions: list[str]) -> Found:
    """What the first step logs as the gradient's norm, and the norm of the update."""
    found: Found = {}
    for stage in stages:
        for precision in precisions:
            for clip in (None, CLIP):
                step = make_step(
                    "fixmatch",
                    precision=precision,
                    stage=stage,
                    lr=LR,
                    grad_clip=clip,
                    loss_scale=LossScale(initial=2.0**9),
                )
                engine = step.engine
                before = engine.layout.gather(engine.master_fragments())
                before = {name: values.clone() for name, values in before.items()}
                batches = [slice_of(b, engine.rank, engine.world_size) for b in global_batches(0)]
                outcome = step(*batches)
                after = engine.layout.gather(engine.master_fragments())
                moved = torch.cat([(after[name] - before[name]).view(-1) for name in after])
                assert outcome.grad_norm is not None
                found[stage, precision, clip] = (outcome.grad_norm, float(moved.norm()))
    return found


@pytest.fixture(scope="module")
def reference() -> float:
    norm, moved = run_ranks(1, norms, [None], ["fp32"])[0][None, "fp32", None]
    assert moved == pytest.approx(UPDATE * norm, rel=1e-4)
    assert norm > 2 * CLIP, "there is something to clip"
    return norm


@pytest.fixture(scope="module")
def two_ranks() -> list[Found]:
    return run_ranks(2, norms, STAGES, ["fp32", "fp16"], timeout=900)


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_norm_and_clipping(
    two_ranks: list[Found],
    reference: float,
    stage: int | str | None,
    precision: str,
    clip: float | None,
) -> None:
    tolerance = {"fp32": 1e-4, "fp16": 0.01}[precision]
    for found in two_ranks:
        norm, moved = found[stage, precision, clip]
        assert norm == pytest.approx(reference, rel=tolerance)
        expected = UPDATE * (reference if clip is None else clip)
        assert moved == pytest.approx(expected, rel=tolerance)


def layer_norms(stages: list[int | str | None], precisions: list[str]) -> dict[Any, list[float]]:
    found = {}
    for stage in stages:
        for precision in precisions:
            AcceleratorState._reset_state(reset_partial_state=True)
            scale = LossScale(initial=2.0**9)
            plan = launch.ExecutionPlan(
                precision=precision,  # type: ignore[arg-type]
                **sharded_by(stage),
                micro_batch=(LABELED + UNLABELED) // 2,
                loss_scale=scale,
            )
            accelerator = launch.make_accelerator(plan)
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 10)
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
            model, optimizer = prepare(accelerator, model, optimizer, plan)
            step = SemiSupervisedStep(
                accelerator,
                model,
                optimizer,
                FixMatch(threshold=0.15),
                ImageViewsConfig().build(0),
                precision=precision,  # type: ignore[arg-type]
                loss_scale=scale,
            )
            found[stage, precision] = [entry["loss"] for entry in train(step, 6)]
    return found


def test_layer_norm_trains_in_every_stage() -> None:
    curves = run_ranks(2, layer_norms, STAGES, ["fp32", "fp16"], timeout=900)[0]
    expected = curves[None, "fp32"]
    assert expected[-1] < expected[0]
    for (stage, precision), losses in curves.items():
        tolerance = {"fp32": 1e-4, "fp16": 0.02}[precision]
        assert losses == pytest.approx(expected, rel=tolerance), (stage, precision)
