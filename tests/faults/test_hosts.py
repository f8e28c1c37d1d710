"""`launch/hosts.sh` on two hosts of two processes each: as on one host, and through a cut line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpdist.data.samples.digits import write_digits
from tests.support.two_hosts import LINE, MISSING, TwoHosts, two_hosts

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STEPS = 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts("hphost") as found:
        yield found
        found.kill()  # what a test that failed has left


def settings(digits: Path, folder: Path, steps: int = STEPS) -> list[str]:
    values = {
        "run.dir": folder,
        "run.name": "run",
        "model.width": 4,
        "data.labeled.data_files.train": f"{digits}/train-*.parquet",
        "data.unlabeled.data_files.train": f"{digits}/train-*.parquet",
        "data.test": "null",
        "batch.labeled": 8,
        "batch.unlabeled": 24,
        "algorithm.name": "freematch",
        "steps": steps,
        "eval.every": "null",
        "log.every": 1,
        "tracker.name": "none",
        "watchdog.seconds": 60,
        "data.loading.patience": 30,
    }
    pairs = (f"--{key}={value}" for key, value in values.items())
    return [str(ROOT / "configs/digits.yaml"), *pairs]


def environment(config: str, **more: str) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CONFIG_FILE": str(ROOT / "configs/accelerate" / config),
        "OMP_NUM_THREADS": "1",
        "HPDIST_ALLOW_CPU_FP16": "1",
        "DS_ACCELERATOR": "cpu",
        **more,
    }


def start(
    hosts: TwoHosts, host: int, arguments: list[str], config: str, log: Path, **more: str
) -> subprocess.Popen[bytes]:
    variables = environment(
        config,
        MACHINES="2",
        MACHINE_RANK=str(host),
        MAIN_IP=hosts.addresses[0],
        PER_MACHINE="2",
        INTERFACE=LINE,
        **more,
    )
    with log.open("ab") as file:
        return subprocess.Popen(
            [*hosts.on(host), ROOT / "launch/hosts.sh", *arguments],
            env=variables,
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )


def losses(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def test_fp16_zero_2_on_two_hosts_has_the_curve_of_one(
    tmp_path: Path, digits: Path, hosts: TwoHosts
) -> None:
    log = tmp_path / "two.log"
    arguments = settings(digits, tmp_path / "two")
    started = [start(hosts, host, arguments, "zero2_fp16.yaml", log) for host in (0, 1)]
    assert [process.wait(timeout=400) for process in started] == [0, 0], log.read_text()
    assert "processes       2 on 2 hosts" in log.read_text()  # the table of the preflight
    one = subprocess.run(
        [ROOT / "launch/local.sh", *settings(digits, tmp_path / "one")],
        env=environment("zero2_fp16.yaml", PROCESSES="4"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert one.returncode == 0, one.stderr
    expected = losses(tmp_path / "one" / "run")
    assert expected.keys() == set(range(1, STEPS + 1))
    assert losses(tmp_path / "two" / "run") == pytest.approx(expected, rel=1e-3)
    summary = json.loads((tmp_path / "two" / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["precision"], summary["zero_stage"]) == (4, "fp16", 2)


def test_a_line_that_is_cut_is_noticed_and_the_run_goes_on_when_it_is_back(
    tmp_path: Path, digits: Path, hosts: TwoHosts
) -> None:
    log, steps = tmp_path / "cut.log", 400
    arguments = [*settings(digits, tmp_path, steps), "--checkpoint.every=20"]
    more = {"RESTARTS": "3"}
    started = [start(hosts, host, arguments, "cpu_bf16.yaml", log, **more) for host in (0, 1)]
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 45):
        assert time.monotonic() < deadline, log.read_text()
        assert all(process.poll() is None for process in started), log.read_text()
        time.sleep(0.1)
    hosts.cut()
    time.sleep(100)  # longer than the watchdog waits
    hosts.mend()
    if not all(process.wait(timeout=500) == 0 for process in started):
        # A launcher that has lost the other one ends; the same commands go on from the checkpoint.
        started = [start(hosts, host, arguments, "cpu_bf16.yaml", log, **more) for host in (0, 1)]
        assert [process.wait(timeout=500) for process in started] == [0, 0], log.read_text()
    text = log.read_text()
    assert "continuing from" in text
    assert losses(tmp_path / "run").keys() == set(range(1, steps + 1))
