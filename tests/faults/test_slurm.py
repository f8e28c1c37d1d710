"""A job that SLURM signals saves, is queued again, and goes on by itself; on a real SLURM."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fault_table import Fault, rows_cost
from tests.support.slow_run import BATCH, ROOT, SlowRun
from tests.support.slurm import Slurm, missing

STEPS = 60
GOING = {"PENDING", "CONFIGURING", "RUNNING"}
ENDED = {"COMPLETED", "FAILED", "CANCELLED"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=missing() or "SLURM is here"),
]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    (tmp_path / "slurm").mkdir()
    started = Slurm(tmp_path / "slurm")
    yield started
    started.stop()


def await_state(slurm: Slurm, job: str, states: set[str], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while (state := slurm.state(job)) not in states:
        text = log.read_text() if log.exists() else ""
        ended = state in ENDED or time.monotonic() >= deadline
        assert not ended, f"{text}\n{slurm.told(job)}"
        time.sleep(0.3)


def test_signalled_requeued_and_finished(
    tmp_path: Path, slurm: Slurm, inject: Callable[..., Fault]
) -> None:
    run = SlowRun(tmp_path, [[300], [300]])
    fault = inject("a SLURM job out of time, queued again")
    log = tmp_path / "job.log"
    slurm.environment |= {
        "ACCELERATE": f"{Path(sys.executable).parent}/accelerate",
        "HPDIST": f"{Path(sys.executable).parent}/hpdist",
        "CONFIG_FILE": str(ROOT / "configs/accelerate/cpu_bf16.yaml"),
        "PER_NODE": "1",
        "MAIN_IP": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    settings = ["--steps", STEPS, "--run.dir", tmp_path, "--run.name", "run"]
    job = slurm.run(
        *("sbatch", "--parsable", f"--output={log}", "--begin=now", f"--chdir={tmp_path}"),
        *(ROOT / "launch/slurm.sbatch", run.folder / "config.yaml", *settings),
    ).strip()
    deadline = time.monotonic() + 240
    while not any(record["step"] >= 4 for record in run.records()):
        text = log.read_text() if log.exists() else ""
        assert slurm.state(job) in GOING, f"{text}\n{slurm.told(job)}"
        assert time.monotonic() < deadline, f"{text}\n{slurm.told(job)}"
        time.sleep(0.3)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time is up
    await_state(slurm, job, {"PENDING"}, log)
    assert "stopped by SIGUSR1" in log.read_text()
    # SLURM lets a requeued job wait for two minutes: within the second in which it ended, a node
    # takes its new credential for the revoked one, and the job fails without having been started.
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    await_state(slurm, job, ENDED, log)
    text = log.read_text()
    assert slurm.state(job) == "COMPLETED", f"{text}\n{slurm.told(job)}"
    assert "continuing from" in text
    assert [record["step"] for record in run.records()] == list(range(1, STEPS + 1))
    used = Counter((row["epoch"], row["id"]) for row in run.audit())
    assert max(used.values()) == 1
    assert len(used) == STEPS * BATCH
    fault.survived(**rows_cost(run.audit(), STEPS * BATCH))
