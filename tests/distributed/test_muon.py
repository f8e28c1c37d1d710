"""Muon under DDP: the weights of one process, and a resume that leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tests.support.odd_models import Small, differing, saved, train
from tests.support.ranks import run_ranks

SETTINGS: dict[str, Any] = {"optim": {"name": "muon", "lr": 1e-2, "adamw_lr_factor": 0.5}}


class Deep(Small):
    """One hidden matrix more than `Small`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 8)

    def features(self, inputs: Tensor) -> Tensor:
        return self.hidden(super().features(inputs)).tanh()


def legs(folder: Path, *runs: tuple[str, int]) -> list[str]:
    """Train runs to a step each; what the optimizer says of itself."""
    described = []
    for name, steps in runs:
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = train(Deep, folder, name, steps, **SETTINGS)
        described.append(trainer.step.engine.optimizer.describe())
    return described


def weights(folder: Path, name: str, step: int) -> Tensor:
    parts = saved(folder, name, step)
    masters = {}
    for key, values in parts.items():
        _, kind, rest = key.split("/", 2)
        if kind == "master":
            parameter, _, start = rest.rpartition("@")
            masters[parameter, int(start)] = values.flatten()
    return torch.cat([masters[key] for key in sorted(masters)])


def test_ranks_do_what_one_process_does_and_go_on_where_they_were(tmp_path: Path) -> None:
    described = run_ranks(2, legs, tmp_path, ("whole", 4), ("legs", 2), ("legs", 4), ("less", 2))
    assert described[0][0].startswith("Muon for 2 hidden matrices (96 parameters)")
    assert differing(tmp_path, "whole", "legs", 4) == []
    run_ranks(
        1, legs, tmp_path, ("alone", 4), ("less", 4)
    )  # one process, the second from where two were
    keys = {key.split("/")[1] for key in saved(tmp_path, "whole", 4)}
    assert {"optimizer.momentum_buffer", "optimizer.exp_avg", "optimizer.exp_avg_sq"} <= keys
    whole, first = weights(tmp_path, "whole", 4), weights(tmp_path, "whole", 1)
    for name in ("alone", "less"):
        other = weights(tmp_path, name, 4)
        assert (whole - other).norm() < 0.05 * (whole - first).norm(), name  # bf16 iterations
