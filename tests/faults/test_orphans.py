"""Whoever starts processes may be killed: none of them stays behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.fault_table import Fault
from tests.support.predictions import contents, make_run, predict
from tests.support.slow_run import SlowRun, ranks_of

ROOT = Path(__file__).parents[2]
RANK = """
import os, sys, time
from hpdist.distributed.launcher_watch import LauncherWatch
LauncherWatch(0, grace=0.5)
print(os.getpid(), flush=True)
time.sleep(300)
"""
JOINED = """
import os, time
from hpdist.distributed.joined import joined_ranks
with joined_ranks():  # as every command on several processes that does not train
    print(os.getpid(), flush=True)
    time.sleep(300)
"""
LAUNCHER = """
import os, subprocess, sys, time
environment = os.environ | {"TORCHELASTIC_RUN_ID": "none", "RANK": "0"}
command = [sys.executable, "-c", sys.argv[1]]
wrapped = ["sh", "-c", '"$@"; true', "wrapper", *command]
for each in (command, wrapped):
    subprocess.Popen(each, env=environment, start_new_session=True)
time.sleep(300)
"""
SHELL = '"$@" & sleep 300'  # ends without a word to what it has started
REHEARSAL = """
import json, os, subprocess, sys, time
wanted, found = sys.argv[1:]
told = {"parent": os.getpid(), "settings": CONFIG, "ranks": 1, "deepspeed": None}
json.dump(told, open(wanted, "w"))
command = [sys.executable, "-m", "hpdist.plan.rehearsal", wanted, found]
print(subprocess.Popen(command).pid, flush=True)
time.sleep(300)
"""


def start(command: list[str], count: int) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start something, and wait for so many processes to say who they are."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    starter = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert starter.stdout is not None
    return starter, [psutil.Process(int(starter.stdout.readline())) for _ in range(count)]


def kill_starter(starter: subprocess.Popen[str]) -> None:
    starter.kill()
    starter.wait()


def test_ranks_end_with_a_launcher_that_is_killed_and_others_stay(
    inject: Callable[..., Fault],
) -> None:
    fault = inject("a launcher killed, of ranks that hang", 2)
    launcher, ranks = start([sys.executable, "-c", LAUNCHER, RANK], 2)
    shell, (alone,) = start(["sh", "-c", SHELL, "shell", sys.executable, "-c", RANK], 1)
    try:
        assert all(rank.is_running() for rank in ranks)
        kill_starter(launcher)
        kill_starter(shell)
        _, alive = psutil.wait_procs(ranks, timeout=30)
        assert not alive
        time.sleep(1.5)  # as long as the ranks took to look, and their grace
        assert alone.is_running()
    finally:
        for process in (*ranks, alone):
            if process.is_running():
                process.kill()
    fault.survived()


def test_a_command_ends_with_its_launcher(inject: Callable[..., Fault]) -> None:
    fault = inject("a launcher killed, of ranks that predict or measure", 2)
    launcher, ranks = start([sys.executable, "-c", LAUNCHER, JOINED], 2)
    try:
        kill_starter(launcher)
        assert not psutil.wait_procs(ranks, timeout=30)[1]
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
    fault.survived()


@pytest.mark.slow
def test_predicting_ends_with_its_launcher_and_goes_on(
    tmp_path: Path, inject: Callable[..., Fault]
) -> None:
    fault = inject("the launcher of 2 ranks that predict killed")
    make_run(tmp_path)
    whole = predict(tmp_path, "whole", batch=1, part_rows=1)
    assert whole is not None
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python"]
    command = [
        *(sys.executable, "-m", "hpdist", "predict", str(tmp_path / "run"), str(tmp_path / "data")),
        *("--out", str(tmp_path / "killed"), "--probabilities", "--batch", "1"),
        *("--rows-per-file", "1"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*launcher, *command], env=environment, cwd=tmp_path, text=True)
    while not (tmp_path / "killed/part-00000000.parquet").exists():
        assert process.poll() is None
        time.sleep(0.001)
    ranks = ranks_of(process)
    for rank in ranks:
        rank.suspend()  # they are quick
    kill_starter(process)
    time.sleep(1.5)  # it is time for them to look
    for rank in ranks:
        rank.resume()
    assert not psutil.wait_procs(ranks, timeout=20)[1]
    assert len(contents(tmp_path / "killed")) < len(contents(tmp_path / "whole"))
    predict(tmp_path, "killed", batch=1, part_rows=1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    fault.survived()


def test_a_rehearsal_ends_with_the_plan_that_is_killed(tmp_path: Path) -> None:
    found = tmp_path / "found"
    code = REHEARSAL.replace("CONFIG", "{}")  # of which it would soon say what is missing
    plan, (rehearsal,) = start(
        [sys.executable, "-c", code, str(tmp_path / "wanted"), str(found)], 1
    )
    rehearsal.suspend()  # it may be quicker than this
    kill_starter(plan)
    rehearsal.resume()
    assert not psutil.wait_procs([rehearsal], timeout=60)[1]
    assert not found.exists()


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_is_saved_when_its_launcher_is_killed_and_its_folder_is_its_own(
    tmp_path: Path, ranks: int, inject: Callable[..., Fault]
) -> None:
    run = SlowRun(tmp_path, [[200], [184]])
    second = inject("a second start of a run that is at work")
    fault = inject(f"the launcher of {ranks} rank{'s' * (ranks > 1)} killed")
    process = run.launch(ranks, 400, "--checkpoint.every", 1000)  # none but the one of the end
    run.await_step(process, 2)
    trained = ranks_of(process)
    refused = subprocess.run(
        [
            *(sys.executable, "-m", "hpdist", "train", tmp_path / "config.yaml"),
            *("--steps", "400", "--run.dir", tmp_path, "--run.name", "run"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert refused.returncode == 2, refused.stderr
    assert f"is in use by process {trained[0].pid} on " in refused.stderr
    assert "Traceback" not in refused.stderr
    process.kill()
    process.wait()
    began = time.monotonic()
    assert not psutil.wait_procs(trained, timeout=40)[1]
    assert time.monotonic() - began < 30
    records = run.records()
    steps = [record["step"] for record in records]
    assert steps == list(range(1, len(steps) + 1)), "nobody else has written"
    manifest = run.run / f"checkpoints/step-{steps[-1]:08d}/manifest.json"
    assert json.loads(manifest.read_text())["step"] == steps[-1]
    last = steps[-1] + 3
    assert run.fork(ranks, last).wait(timeout=200) == 0, run.output
    assert [record["step"] for record in run.records()] == list(range(1, last + 1))
    cost = run.cost(last)
    assert cost == dict.fromkeys(cost, 0)
    second.survived()
    fault.survived(**cost)
