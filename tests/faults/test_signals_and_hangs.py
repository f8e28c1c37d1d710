"""Signals save and stop all ranks; a hang is told by all of them and ends the run."""

from __future__ import annotations

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.fault_table import Fault
from tests.support.slow_run import SlowRun, ranks_of

GROUPS = [[200], [184]]
STEPS = 40


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_rank_saves_and_stops_all(
    tmp_path: Path, number: signal.Signals, inject: Callable[..., Fault]
) -> None:
    run = SlowRun(tmp_path, GROUPS)
    fault = inject(f"{number.name} to one rank")
    process = run.launch(2, STEPS, "--checkpoint.every", 100)  # none but the one of the signal
    run.await_step(process, 3)
    other, hit = ranks_of(process)
    hit.send_signal(number)
    process.wait(timeout=120)
    assert not other.is_running()
    told = re.findall(
        rf"stopped by {number.name} on rank 1 after step (\d+), which is saved", run.output
    )
    assert len(told) == 1, run.output
    assert "Traceback" not in run.output.split("stopped by")[0]
    assert re.findall(r"exitcode\s*: (\d+)", run.output)[:1] == ["4"], run.output
    saved = [path.name for path in (run.run / "checkpoints").iterdir()]
    assert saved == [f"step-{int(told[0]):08d}"]
    assert run.fork(2, STEPS).wait(timeout=200) == 0, run.output
    assert f"continuing from {run.run}/checkpoints/{saved[0]} at step {told[0]}" in run.output
    assert [record["step"] for record in run.records()] == list(range(1, STEPS + 1))
    cost = run.cost(STEPS)
    assert cost == dict.fromkeys(cost, 0)
    fault.survived(**cost)


@pytest.mark.slow
def test_ctrl_c_to_the_launcher_saves_and_stops_all(
    tmp_path: Path, inject: Callable[..., Fault]
) -> None:
    run = SlowRun(tmp_path, GROUPS)
    fault = inject("Ctrl-C to the launcher")
    process = run.launch(2, STEPS, "--checkpoint.every", 100)
    run.await_step(process, 3)
    ranks = ranks_of(process)
    process.send_signal(signal.SIGINT)  # which a terminal sends to the launcher's session alone
    process.wait(timeout=120)
    assert not any(rank.is_running() for rank in ranks)
    told = re.findall(r"stopped by SIGINT on rank 0, SIGINT on rank 1 after step (\d+)", run.output)
    assert len(told) == 1, run.output
    assert [path.name for path in (run.run / "checkpoints").iterdir()] == [
        f"step-{int(told[0]):08d}"
    ]
    assert run.fork(2, STEPS).wait(timeout=200) == 0, run.output
    assert [record["step"] for record in run.records()] == list(range(1, STEPS + 1))
    cost = run.cost(STEPS)
    assert cost == dict.fromkeys(cost, 0)
    fault.survived(**cost)


HELD = """
import time
from pathlib import Path

from torch import nn

forward = nn.Linear.forward


def held(layer, inputs):
    while Path("hold").exists():
        time.sleep(0.1)
    return forward(layer, inputs)


nn.Linear.forward = held


def slowly(row):
    time.sleep(0.01)
    return row
"""


@pytest.mark.slow
def test_a_second_ctrl_c_to_the_launcher_ends_all_at_once(tmp_path: Path) -> None:
    run = SlowRun(tmp_path, GROUPS, HELD)
    process = run.launch(2, STEPS, "--checkpoint.every", 100)
    run.await_step(process, 3)
    ranks = ranks_of(process)
    (tmp_path / "hold").touch()
    time.sleep(2)  # into a step that does not end, so nothing can be saved
    process.send_signal(signal.SIGINT)
    told = "interrupted; the run is saved and stops (again: at once)"
    deadline = time.monotonic() + 60
    while told not in run.output:
        assert time.monotonic() < deadline, run.output
        time.sleep(0.05)
    time.sleep(2)  # the other rank has heard of it too
    assert all(rank.is_running() for rank in ranks)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert time.monotonic() - began < 15, run.output  # the launcher itself would wait for 30 s
    assert not any(rank.is_running() for rank in ranks)
    assert not list(run.run.glob("checkpoints/step-*"))


@pytest.mark.parametrize("stage", ["null", pytest.param("2", marks=pytest.mark.slow)])
def test_a_launcher_that_restarts_goes_on_from_the_checkpoint(
    tmp_path: Path, stage: str, inject: Callable[..., Fault]
) -> None:
    run = SlowRun(tmp_path, GROUPS)
    fault = inject("a rank killed, and started again by the launcher")
    process = run.launch(2, STEPS, "--zero.stage", stage, launcher=["--max_restarts", 2])
    run.await_step(process, 5)
    ranks_of(process)[1].kill()
    assert process.wait(timeout=240) == 0, run.output
    assert "continuing from" in run.output
    assert [record["step"] for record in run.records()] == list(range(1, STEPS + 1))
    used = Counter((row["epoch"], row["id"]) for row in run.audit())
    assert max(used.values()) == 1
    assert len(used) == STEPS * 24
    fault.survived(**run.cost(STEPS))


def test_the_same_tracker_run_goes_on(tmp_path: Path) -> None:
    run = SlowRun(tmp_path, GROUPS)
    ids = []
    for steps in (4, 8):
        tracker = ["--tracker.name", "wandb"]
        assert run.fork(1, steps, *tracker).wait(timeout=120) == 0, run.output
        manifest = run.run / f"checkpoints/step-{steps:08d}/manifest.json"
        ids.append(json.loads(manifest.read_text())["tracker_run_id"])
    assert ids[0] == ids[1]
    assert len(list(run.run.glob(f"wandb/offline-run-*/run-{ids[0]}.wandb"))) == 2


HANGS = """
import os
import time
from pathlib import Path


def slowly(row):
    time.sleep(0.01)
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    while first and os.environ["RANK"] == "1" and Path("hang").exists():
        time.sleep(0.1)
    return row
"""


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_by_all_and_the_run_goes_on(
    tmp_path: Path, launched: bool, inject: Callable[..., Fault]
) -> None:
    """Started again by the launcher, or by whoever has started it; it sees no alarm of before."""
    run = SlowRun(tmp_path, GROUPS, HANGS)
    fault = inject("a rank hangs, and is started again")
    patience = ["--watchdog.seconds", 6, "--data.loading.patience", 3]
    if launched:
        process = run.launch(2, STEPS, *patience, launcher=["--max_restarts", 1])
        run.await_step(process, 4)
        (tmp_path / "hang").touch()
        assert process.wait(timeout=240) == 0, run.output
    else:
        ranks = run.fork(2, STEPS, *patience)
        run.await_step(ranks, 4)
        (tmp_path / "hang").touch()
        assert ranks.wait(timeout=240) != 0, run.output
        (tmp_path / "hang").unlink()
        assert run.fork(2, STEPS, *patience).wait(timeout=240) == 0, run.output
    assert len(re.findall(r"hpdist: rank [01]: no progress for", run.output)) == 2, run.output
    told = r"hpdist: rank 0:   rank 1: step \d+, reading rows, for \d+ s <- behind$"
    assert re.search(told, run.output, re.MULTILINE), run.output
    assert re.search(r"rank 0: step \d+, training, for \d+ s$", run.output, re.MULTILINE), (
        run.output
    )
    hung = r'^hpdist: rank 1:   File "\S+slowly\.py", line \d+ in slowly$'  # its stack, whole
    assert re.search(hung, run.output, re.MULTILINE), run.output
    assert "continuing from" in run.output
    assert [record["step"] for record in run.records()] == list(range(1, STEPS + 1))
    cost = run.cost(STEPS)
    assert (cost["rows_lost"], cost["rows_repeated"]) == (0, 0)
    fault.survived(**cost)
