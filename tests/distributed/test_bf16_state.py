"""Master weights and optimizer state in bf16: what ranks hold, the teacher, other stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.support.odd_models import Small, differing, saved, train
from tests.support.ranks import run_ranks

BF16 = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
ADAMW = {"precision": "bf16", "optim": {"name": "adamw", "lr": 1e-2}}


def begin(folder: Path, name: str, steps: int, **zero: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(Small, folder, name, steps, zero=zero, **ADAMW)


def dtypes_of(trainer: Any) -> dict[str, list[torch.dtype]]:
    engine = trainer.step.engine
    states = engine.optimizer_fragments()
    return {
        "master": sorted({part.dtype for part in engine.master_parts()}, key=str),
        "state": sorted({f.values.dtype for each in states.values() for f in each}, key=str),
        "teacher": sorted({f.values.dtype for f in trainer.step.teacher.fragments}, key=str),
    }


def go_on(folder: Path, stage: int) -> dict[str, list[torch.dtype]]:
    """A whole run, the same in two legs, and one that goes on in fp32 at another stage."""
    whole = begin(folder, "whole", 4, stage=stage, **BF16)
    begin(folder, "legs", 2, stage=stage, **BF16)
    begin(folder, "legs", 4, stage=stage, **BF16)
    begin(folder, "elastic", 2, stage=stage, **BF16)
    begin(folder, "elastic", 3, stage=stage % 3 + 1)
    begin(folder, "elastic", 4, stage=(stage + 1) % 3 + 1, **BF16)
    return dtypes_of(whole)


@pytest.mark.parametrize("stage", [2, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 3))])
def test_a_run_with_bf16_state(tmp_path: Path, stage: int) -> None:
    half, full = [torch.bfloat16], [torch.float32]
    for found in run_ranks(2, go_on, tmp_path, stage):
        assert found == {"master": half, "state": half, "teacher": full}
    assert differing(tmp_path, "whole", "legs", 4) == []
    tensors = saved(tmp_path, "whole", 4)
    assert {t.dtype for key, t in tensors.items() if "/master/" in key} == {torch.float32}
    weights = [t for key, t in tensors.items() if "/master/" in key]
    assert all(torch.equal(t, t.bfloat16().float()) for t in weights)  # exact in the file
    teachers = [t for key, t in tensors.items() if "/teacher/" in key]
    assert any(not torch.equal(t, t.bfloat16().float()) for t in teachers)
    ends = [whole_weights(tmp_path, name, 4) for name in ("whole", "elastic")]
    start = whole_weights(tmp_path, "whole", 1)
    for name, weight in ends[0].items():
        assert (weight - ends[1][name]).norm() < 0.2 * (weight - start[name]).norm(), name


def whole_weights(folder: Path, run: str, step: int) -> dict[str, torch.Tensor]:
    """The master weights of a checkpoint, from all ranks' fragments."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for key, values in saved(folder, run, step).items():
        _, kind, rest = key.split("/", 2)
        if kind == "master":
            name, _, start = rest.rpartition("@")
            parts.setdefault(name, []).append((int(start or 0), values.flatten()))
    return {name: torch.cat([v for _, v in sorted(own)]) for name, own in parts.items()}
