"""Trains for real, and dies by SIGKILL at the n-th step of writing a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hpdist.checkpoint import writer as checkpoint_writer
from hpdist.train.trainer import Trainer
from tests.support.fault_table import rows_cost, steps_repeated
from tests.support.forked import run_forked
from tests.support.parquet_files import write_numbers
from tests.support.picture_runs import audit_of
from tests.support.run_records import TIMED

STEPS, EVERY, UNLABELED = 9, 3, 24
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "zero1_fp16": {"precision": "fp16", "zero": {"stage": 1}},
    "zero2_fp16": {"precision": "fp16", "zero": {"stage": 2}},
    "zero3_fp16": {"precision": "fp16", "zero": {"stage": 3}},
    "fsdp2": {"shard": {"engine": "fsdp2", "min_parameters": 0}},
    "fsdp2_fp16": {"precision": "fp16", "shard": {"engine": "fsdp2", "min_parameters": 0}},
}
_POINTS = {  # every call by which writing touches the disk
    checkpoint_writer: ["save_file", "_write_bytes", "_sync_folder", "hash_of"],
    checkpoint_writer.os: ["replace", "rename"],
    checkpoint_writer.shutil: ["rmtree"],
    Path: ["mkdir", "unlink"],
}


def arm(victim: int, point: int, count_in: Path | None = None) -> None:
    """Have rank `victim` killed before its `point`-th call, counted from the second checkpoint."""
    passed = [0]

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if writing[0] >= 2 and os.environ["RANK"] == str(victim):
                passed[0] += 1
                if count_in is not None:
                    count_in.write_bytes(str(passed[0]).encode())
                if passed[0] == point:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    writing = [0]
    write = checkpoint_writer.CheckpointWriter._write

    def counting(self: Any, *args: Any) -> None:
        writing[0] += 1  # here the write before is over, which at the time of `save` it may not be
        write(self, *args)

    checkpoint_writer.CheckpointWriter._write = counting  # type: ignore[method-assign]
    for module, names in _POINTS.items():
        for name in names:
            setattr(module, name, wrapped(getattr(module, name)))


def train(
    folder: Path,
    name: str,
    kind: str,
    kill: tuple[int, int] | None = None,
    **settings: Any,
) -> None:
    """Train on this rank, to the end unless it is killed."""
    torch.set_num_threads(1)
    if kill is not None:
        count = folder / "points" if kill[1] == 0 else None
        arm(*kill, count)
    files = {"path": "parquet", "data_files": str(folder / "data/*.parquet"), "input": "x"}
    trainer = Trainer(
        {"name": "mlp", "hidden": [8]},
        {"name": "freematch", "fairness_weight": 0.1},
        labeled={**files, "rows": 12},
        unlabeled={**files, "streaming": True, "audit": True},
        views={"name": "identity"},
        batch={"labeled": 12, "unlabeled": UNLABELED},
        optim={"name": "adamw", "lr": 1e-3},
        loss_scale={"initial": 1024.0, "growth_interval": 4},
        run={"dir": str(folder), "name": name},
        log={"every": 1},
        checkpoint={"every": EVERY, "background": True},
        tracker={"name": "none"},
        **{"steps": STEPS, **KINDS[kind], **settings},
    )
    trainer.fit()


def state_of(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All that a run leaves and must not depend on how often it was killed."""
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    tensors = {
        f"{file.name}/{key}": value
        for file in sorted(last.glob("*.safetensors"))
        for key, value in load_file(file).items()
    }
    manifest = json.loads((last / "manifest.json").read_text())
    kept = ("streams", "data", "loss_scale", "attempts", "overflows", "optimizer", "files")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]
    audits = sorted((run / "audit").glob("rank-*.parquet/*.parquet"))
    facts = {
        "manifest": {key: manifest[key] for key in kept},
        "records": records,
        "audit": {f"{file.parent.name}/{file.name}": file.read_bytes() for file in audits},
    }
    return tensors, facts


def same(one: Path, other: Path) -> str | None:
    """What differs between two runs, bit for bit; None if nothing does."""
    (tensors, facts), (others, other_facts) = state_of(one), state_of(other)
    if tensors.keys() != others.keys():
        return f"tensors: {tensors.keys() ^ others.keys()}"
    for key, value in tensors.items():
        if not torch.equal(value, others[key]):
            return key
    return next((key for key, value in facts.items() if value != other_facts[key]), None)


def kill_everywhere(folder: Path, kind: str, every: int) -> list[dict[str, Any]]:
    """Kill at every so many-th point, on either rank, let the run go on, and say what came of it.

    Call this in a process of its own, since a process that has trained is no good to fork.
    """
    write_numbers(folder / "data", [[17, 9], [14, 31], [50]])
    log = folder / "log"
    found: list[dict[str, Any]] = []
    assert run_forked(2, log, train, folder, "whole", kind, None) == [0, 0], log.read_text()[-5000:]
    for victim in (0, 1):
        name = f"count-{victim}"
        assert run_forked(2, log, train, folder, name, kind, (victim, 0)) == [0, 0]
        points = int((folder / "points").read_text())
        for point in range(1 + victim, points + 1, every):
            name = f"killed-{victim}-{point}"
            told = len(log.read_text())
            ended = run_forked(2, log, train, folder, name, kind, (victim, point))
            resumed = run_forked(2, log, train, folder, name, kind, None)
            differs = same(folder / "whole", folder / name) if resumed == [0, 0] else "no end"
            leftovers = [p.name for p in (folder / name / "checkpoints").glob(".*")]
            audit = audit_of(folder / name)
            found.append(
                {
                    "victim": victim,
                    "point": point,
                    "of": points,
                    "killed": ended[victim] == -signal.SIGKILL,
                    "resumed": resumed,
                    "differs": differs,
                    "leftovers": leftovers,
                    **rows_cost(audit, expected=STEPS * UNLABELED),
                    "steps_repeated": steps_repeated(log.read_text()[told:]),
                }
            )
            shutil.rmtree(folder / name)
    return found
