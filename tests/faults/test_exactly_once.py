"""Killed and resumed on other numbers of ranks, a run uses every row exactly once an epoch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from hpdist.data.stream.parquet import ParquetReader
from tests.parquet_files import index_of, write_numbers

ROOT = Path(__file__).parents[2]
GROUPS = [[37, 20], [64, 1, 30], [], [50, 43], [55]]
ROWS, BATCH, EPOCHS = 300, 24, 2
STEPS = EPOCHS * ROWS // BATCH
KILLS = [(2, 6), (3, 12), (1, 17)]  # ranks, and the step after which all of them are killed
LAST = 4

CONFIG = """
model: {name: mlp, hidden: [8]}
data:
  labeled: {path: parquet, data_files: DATA, input: x, rows: 24}
  unlabeled:
    path: parquet
    data_files: DATA
    input: x
    streaming: true
    audit: true
    map: python:slowly:slowly
views: {name: identity}
batch: {labeled: 12, unlabeled: 24}
algorithm: {name: fixmatch, threshold: 0.2}
optim: {lr: 0.0001}
log: {every: 1}
checkpoint: {every: 3}
tracker: {name: none}
"""
SLOWLY = """
import time


def slowly(row):
    time.sleep(0.01)  # so that a kill comes in the middle
    return row
"""


def launch(folder: Path, ranks: int) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", ROOT / "configs/accelerate/cpu_bf16.yaml"),
        *("--num_processes", ranks, "--main_process_port", 0),
        *("-m", "hpdist", "train", folder / "config.yaml", "--steps", STEPS),
        *("--run.dir", folder, "--run.name", "run"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{ROOT}"}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=(folder / "output").open("a"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def last_step(folder: Path) -> int:
    """The latest whole record."""
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def kill_after(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """SIGKILL to the launcher and every rank, once that step is on record."""
    deadline = time.monotonic() + 240
    while last_step(folder) < step:
        assert process.poll() is None, (folder / "output").read_text()
        assert time.monotonic() < deadline, (folder / "output").read_text()
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)  # its ranks are in sessions of their own
    everyone = [launcher, *launcher.children(recursive=True)]
    for one in everyone:
        one.kill()
    assert process.wait() == -signal.SIGKILL
    assert not psutil.wait_procs(everyone, timeout=10)[1]


def audit_of(folder: Path) -> pa.Table:
    parts = sorted((folder / "run" / "audit").glob("rank-*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts])


def test_every_row_once_an_epoch_whatever_is_killed(tmp_path: Path) -> None:
    paths = write_numbers(tmp_path / "data", GROUPS)
    assert sum(map(sum, GROUPS)) == ROWS
    (tmp_path / "slowly.py").write_text(SLOWLY)
    files = json.dumps([str(path) for path in paths])
    (tmp_path / "config.yaml").write_text(CONFIG.replace("DATA", files))
    for ranks, step in KILLS:
        kill_after(launch(tmp_path, ranks), tmp_path, step)
        assert last_step(tmp_path) < STEPS, "the kill came too late to say anything"
    done = launch(tmp_path, LAST)
    assert done.wait(timeout=300) == 0, (tmp_path / "output").read_text()

    output = (tmp_path / "output").read_text()
    assert output.count("continuing from") == len(KILLS)
    audit = audit_of(tmp_path).to_pylist()
    used = {epoch: Counter[int]() for epoch in range(EPOCHS)}
    for row in audit:
        assert row["valid"]
        used[row["epoch"]][row["id"]] += 1
    for epoch, counts in used.items():
        assert counts == dict.fromkeys(range(ROWS), 1), f"epoch {epoch}"

    reader = ParquetReader(index_of(paths), ["x"], "data", 0, BATCH)  # one that nothing disturbed
    for step in range(STEPS):
        wanted = reader.read(step * BATCH, BATCH, 0, BATCH).ids.tolist()
        found = [row["id"] for row in audit if row["attempt"] == step + 1]
        assert sorted(found) == sorted(wanted), f"step {step + 1}"
    reader.close()
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == list(range(1, STEPS + 1))
