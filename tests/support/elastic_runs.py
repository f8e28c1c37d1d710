"""Runs that stop and go on elsewhere: other numbers of ranks, ZeRO stages and engines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.fault_table import rows_cost, steps_repeated
from tests.support.forked import run_forked
from tests.support.kill_points import UNLABELED, train
from tests.support.parquet_files import write_numbers

GROUPS = [[17, 9], [14, 31], [50]]
STEPS = 12
Legs = list[tuple[int, str, int]]  # ranks, kind, and the step to train to
RUNS: dict[str, Legs] = {
    "whole": [(2, "fp32", STEPS)],
    "ranks": [(2, "fp32", 4), (3, "fp32", 7), (1, "fp32", 9), (4, "fp32", STEPS)],
    "whole_fp16": [(2, "zero2_fp16", STEPS)],
    "stages": [(2, "zero2_fp16", 4), (2, "zero3_fp16", 8), (2, "zero1_fp16", STEPS)],
    "both": [(2, "zero3_fp16", 5), (1, "zero2_fp16", 8), (3, "zero3_fp16", STEPS)],
    "engines": [(2, "fp32", 4), (3, "fsdp2", 8), (2, "fp32", STEPS)],
    "engines_fp16": [(2, "zero2_fp16", 4), (3, "fsdp2_fp16", 8), (2, "zero3_fp16", STEPS)],
}


def outcome_of(run: Path, output: str) -> dict[str, Any]:
    """The curve, the scale, and how often each row was used in each epoch."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    parts = sorted((run / "audit").glob("rank-*.parquet"))
    rows = pa.concat_tables(map(pq.read_table, parts)).to_pylist()
    used = Counter((row["epoch"], row["id"]) for row in rows)
    manifest = json.loads((run / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    return {
        "records": [json.loads(line) for line in lines],
        "most": max(used.values()),
        "used": len(used),
        "rows": len(rows),
        "loss_scale": manifest["loss_scale"],
        "optimizer": manifest["optimizer"],
        "teacher_updates": manifest["teacher_updates"],
        "resumes": len(RUNS[run.name]) - 1,
        "cost": {
            **rows_cost(rows, expected=STEPS * UNLABELED),
            "steps_repeated": steps_repeated(output),
        },
    }


def train_all(folder: Path, names: set[str]) -> dict[str, Any]:
    """Train the runs of these names, leg by leg, and return what came of them.

    Call this in a process of its own, since a process that has trained is no good to fork.
    """
    write_numbers(folder / "data", GROUPS)
    outcomes = {}
    for name, legs in RUNS.items():
        if name not in names:
            continue
        log = folder / f"log-{name}"
        for ranks, kind, steps in legs:
            schedule = {"name": "constant"}
            ended = run_forked(
                ranks, log, train, folder, name, kind, steps=steps, schedule=schedule
            )
            assert ended == [0] * ranks, log.read_text()[-5000:]
        outcomes[name] = outcome_of(folder / name, log.read_text())
    return outcomes
