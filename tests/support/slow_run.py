"""A real run, slow enough to be interrupted where a test wants it.

`launch` starts it under `accelerate launch`, whose own doing is then tested, too. `fork` starts its
ranks alone, from the server of warm ranks: as real, without the seconds of imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.fault_table import rows_cost, steps_repeated
from tests.support.parquet_files import write_numbers
from tests.support.ranks import free_port
from tests.support.warm_ranks import RANKS, start_server

BATCH = 24  # unlabelled
ROOT = Path(__file__).parents[2]
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


class SlowRun:
    """A config, its data, and the processes that run it.

    Args:
        folder: Where everything goes.
        groups: Row groups of each Parquet file.
        row: Python source of a function `slowly(row)` that every unlabelled row goes through.
    """

    def __init__(self, folder: Path, groups: Sequence[Sequence[int]], row: str = SLOWLY) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.files = write_numbers(folder / "data", groups)
        (folder / "slowly.py").write_text(row)
        files = json.dumps([str(path) for path in self.files])
        (folder / "config.yaml").write_text(CONFIG.replace("DATA", files))

    def launch(
        self,
        ranks: int,
        steps: int,
        *settings: Any,
        launcher: Sequence[Any] = (),
    ) -> subprocess.Popen[str]:
        """Start it, or let it go on; what it prints goes to a file."""
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", ROOT / "configs/accelerate/cpu_bf16.yaml"),
            *("--num_processes", ranks, "--main_process_port", 0, *launcher),
            *("-m", "hpdist", "train", self.folder / "config.yaml", "--steps", steps),
            *("--run.dir", self.folder, "--run.name", "run", *settings),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{self.folder}:{ROOT}"}
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=self.folder,
            env=environment,
            stdout=(self.folder / "output").open("a"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    def fork(
        self, ranks: int, steps: int, *settings: Any, terminal: str | None = None
    ) -> ForkedRanks:
        """Start its ranks, or let it go on, without a launcher; they print as `launch` says.

        `terminal` is the path of one that they print to.
        """
        command = ["train", self.folder / "config.yaml", "--steps", steps]
        command += ["--run.dir", self.folder, "--run.name", "run", *settings]
        output = self.folder / "output" if terminal is None else Path(terminal)
        return ForkedRanks(self.folder, ranks, [str(part) for part in command], output)

    @property
    def output(self) -> str:
        """What all starts have printed."""
        return (self.folder / "output").read_text()

    def records(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def cost(self, steps: int) -> dict[str, int]:
        """What its interruptions have cost, of rows and of steps."""
        return {
            **rows_cost(self.audit(), expected=steps * BATCH),
            "steps_repeated": steps_repeated(self.output),
        }

    def await_step(
        self, process: subprocess.Popen[str] | ForkedRanks, step: int, seconds: float = 240
    ) -> None:
        """Wait until a step is on record, of a process that is still running."""
        deadline = time.monotonic() + seconds
        while not any(record["step"] >= step for record in self.records()):
            assert process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def audit(self) -> list[dict[str, Any]]:
        """Every row that a step consumed."""
        parts = sorted((self.run / "audit").glob("rank-*.parquet"))
        rows: list[dict[str, Any]] = pa.concat_tables(map(pq.read_table, parts)).to_pylist()
        return rows


class ForkedRanks:
    """Ranks of `hpdist ...`, each a process of its own, in bf16 as those of `cpu_bf16.yaml`."""

    def __init__(self, folder: Path, ranks: int, command: list[str], output: Path) -> None:
        start_server()
        context = multiprocessing.get_context("forkserver")
        port = free_port()
        environment = {
            **os.environ,
            **RANKS,
            "ACCELERATE_MIXED_PRECISION": "bf16",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        self.processes = [
            context.Process(target=_rank, args=(rank, folder, environment, command, output))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def poll(self) -> int | None:
        """Return None while all are running; else the status of one that failed, or 0."""
        statuses = [process.exitcode for process in self.processes]
        failed = [status for status in statuses if status]
        return failed[0] if failed else (None if None in statuses else 0)

    def wait(self, timeout: float) -> int:
        """Wait until all have ended, and return 0 where all have succeeded."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        status = self.poll()
        if status is None:
            self.kill()
            raise TimeoutError(f"{len(self.processes)} ranks did not end within {timeout:g} s")
        return status

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
            assert process.exitcode is not None


def _rank(
    rank: int, folder: Path, environment: dict[str, str], command: list[str], output: Path
) -> None:
    with output.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    from hpdist import cli

    sys.exit(cli.main(command))


def everyone(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher and its ranks, which are in sessions of their own."""
    launcher = psutil.Process(process.pid)
    return [launcher, *launcher.children(recursive=True)]


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks alone, in order."""
    found = {}
    for child in everyone(process)[1:]:
        rank = child.environ().get("RANK")
        if rank is not None and "hpdist" in child.cmdline():
            found[int(rank)] = child
    return [found[rank] for rank in sorted(found)]
