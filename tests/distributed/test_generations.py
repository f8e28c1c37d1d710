"""Self-training: generations are the same on any number of ranks, and survive a kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from hpdist.data.samples.digits import write_digits
from tests.support.ranks import run_ranks
from tests.support.run_records import records

STEPS, GENERATIONS = 9, 3
KINDS: dict[str, dict[str, Any]] = {
    "noisy_student": {
        "algorithm": {"name": "noisy_student", "generations": GENERATIONS, "threshold": 0.12}
    },
    "crest": {
        "algorithm": {"name": "fixmatch", "threshold": 0.13},
        "addons": [{"name": "crest", "generations": GENERATIONS}],
    },
}


BY_SPEED = ["noisy_student", pytest.param("crest", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def train(
    data: Path, runs: Path, name: str, kind: str, killed_at: int | None = None, **settings: Any
) -> dict[str, float]:
    """Train on this rank; how far the student is from its first weights as a generation begins."""
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    from hpdist.train.trainer import Trainer

    files = {"path": "parquet", "data_files": {"train": f"{data}/train-*.parquet"}}
    trainer = Trainer(
        {"name": "cnn", "width": 4},
        labeled=files | {"labels_per_class": 4},
        unlabeled=files | {"streaming": True},
        batch={"labeled": 8, "unlabeled": 48},
        views={"weak": {"flip": False}},
        steps=STEPS,
        teacher={"decay": 0.5},
        optim={"name": "adamw", "lr": 0.01},
        run={"dir": str(runs), "name": name},
        log={"every": 1},
        checkpoint={"every": 2},
        tracker={"name": "none"},
        **KINDS[kind],
        **settings,
    )
    first = _whole(trainer.step.engine)
    distances = {}
    train_step, begin = trainer._train_step, trainer._begin_generation

    def step() -> Any:
        if trainer.step.applied_steps == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step()

    def begin_generation() -> None:
        before = _distance(first, _whole(trainer.step.engine))
        begin()
        at = trainer.step.applied_steps
        distances[f"before {at}"] = before
        distances[f"after {at}"] = _distance(first, _whole(trainer.step.engine))
        moments = [f for part in trainer.step.engine.optimizer_fragments().values() for f in part]
        distances[f"optimizer {at}"] = sum(float(f.values.abs().sum()) for f in moments)

    trainer._train_step, trainer._begin_generation = step, begin_generation  # type: ignore[method-assign]
    trainer.fit()
    return distances


def _whole(engine: Any) -> dict[str, torch.Tensor]:
    gathered = engine.layout.gather(engine.master_fragments())
    return {name: value.clone() for name, value in gathered.items()}


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] - other[name]).abs().sum()) for name in one)


@pytest.mark.parametrize("kind", BY_SPEED)
def test_ranks_do_not_matter(tmp_path: Path, data: Path, kind: str) -> None:
    curves = {}
    for ranks in (1, 2):
        run_ranks(ranks, train, data, tmp_path, f"on-{ranks}", kind)
        curves[ranks] = records(tmp_path / f"on-{ranks}")
    rates = [record.get("joined_rate", record["mask_rate"]) for record in curves[1]]
    assert rates[:3] == [0, 0, 0]  # nothing is labelled yet
    assert all(rate > 0 for rate in rates[3:])
    for found, wanted in zip(curves[2], curves[1], strict=True):
        assert found == pytest.approx(wanted, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "fp16", "zero": {"stage": 2}, "loss_scale": {"initial": 256}}],
    ids=["ddp", "zero2"],
)
def test_a_student_begins_with_the_first_weights(
    tmp_path: Path, data: Path, settings: dict[str, Any]
) -> None:
    (found, *_) = run_ranks(2, _train_with, data, tmp_path, "run", "noisy_student", settings)
    for at in (3, 6):
        assert found[f"before {at}"] > 1
        # Half-precision weights are rounded where the first students' come from.
        assert found[f"after {at}"] <= (0.1 if settings else 0)
        assert found[f"optimizer {at}"] == 0
    rates = [record["lr"] for record in records(tmp_path / "run")]
    assert rates[:3] == rates[3:6] == rates[6:]
    assert len(set(rates)) == 3


def _train_with(
    data: Path, runs: Path, name: str, kind: str, settings: dict[str, Any]
) -> dict[str, float]:
    return train(data, runs, name, kind, **settings)


@pytest.mark.parametrize(
    ("kind", "killed_at"),
    [("noisy_student", 7), pytest.param("crest", 5, marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on_in_its_generation(
    tmp_path: Path, data: Path, kind: str, killed_at: int
) -> None:
    run_ranks(1, train, data, tmp_path, "whole", kind)
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(1, train, data, tmp_path, "killed", kind, killed_at)
    run_ranks(1, train, data, tmp_path, "killed", kind)
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
