"""A run that stopped and went on equals one that never stopped, on DDP and on ZeRO."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hpdist.data.samples.digits import write_digits
from tests.support.ranks import run_ranks
from tests.support.run_records import records


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def train(data: Path, runs: Path, name: str, steps: int, settings: dict[str, Any]) -> None:
    """Train on this rank; the same settings continue the run of that name."""
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    from hpdist.train.trainer import Trainer

    files = {"path": "parquet", "data_files": {"train": f"{data}/train-*.parquet"}}
    trainer = Trainer(
        {"name": "cnn", "width": 4},
        {"name": "freematch", "fairness_weight": 0.1},
        labeled=files | {"labels_per_class": 4},
        unlabeled=files | {"streaming": settings.get("streaming", False)},
        batch={"labeled": 8, "unlabeled": 24},
        views={"weak": {"flip": False}},
        steps=steps,
        schedule={"name": "constant"},
        optim=settings.get("optim", {"name": "sgd", "lr": 0.05}),
        precision=settings.get("precision", "fp32"),
        zero={"stage": settings.get("stage")},
        shard=settings.get("shard", {}),
        run={"dir": str(runs), "name": name},
        log={"every": 1},
        checkpoint={"every": 4},
        tracker={"name": "none"},
    )
    trainer.fit()


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    files = (folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {f"{file.name}/{k}": v for file in files for k, v in load_file(file).items()}


DDP = {"streaming": True}
ADAMW = {"optim": {"name": "adamw", "lr": 1e-3}, "precision": "bf16"}
ZERO = {"precision": "fp16", "stage": 2, "optim": {"name": "adamw", "lr": 1e-3}}
ZERO3 = {"precision": "fp16", "stage": 3}
FSDP2 = {
    "precision": "fp16",
    "shard": {"engine": "fsdp2", "min_parameters": 0},
    "optim": {"name": "adamw", "lr": 1e-3},
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(DDP, id="ddp"),
        pytest.param(ADAMW, id="adamw", marks=pytest.mark.slow),
        pytest.param(ZERO, id="zero2"),
        pytest.param(ZERO3, id="zero3", marks=pytest.mark.slow),
        pytest.param(FSDP2, id="fsdp2", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, data: Path, settings: dict[str, Any]
) -> None:
    run_ranks(2, train, data, tmp_path, "whole", 8, settings)
    run_ranks(2, train, data, tmp_path, "halves", 4, settings)
    run_ranks(2, train, data, tmp_path, "halves", 8, settings)
    assert records(tmp_path / "whole") == records(tmp_path / "halves")
    whole, halves = tensors(tmp_path / "whole", 8), tensors(tmp_path / "halves", 8)
    assert whole.keys() == halves.keys()
    kinds = {key.split("/")[1].split("@")[0] for key in whole}
    assert {"master", "teacher", "algorithm", "buffer"} <= kinds
    assert any(kind.startswith("optimizer.") for kind in kinds)
    for key, value in whole.items():
        assert torch.equal(value, halves[key]), key


def test_a_run_continues_on_another_number_of_ranks(tmp_path: Path, data: Path) -> None:
    slow = {"optim": {"name": "sgd", "lr": 0.001}}  # steps that amplify rounding little
    run_ranks(2, train, data, tmp_path, "two", 8, slow)
    run_ranks(2, train, data, tmp_path, "fewer", 4, slow)
    run_ranks(1, train, data, tmp_path, "fewer", 8, slow)
    for one, other in zip(records(tmp_path / "two"), records(tmp_path / "fewer"), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
