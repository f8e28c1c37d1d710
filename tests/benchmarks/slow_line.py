"""A step on two hosts, by the rate of the line between them, against the bytes that they send.

    python -m tests.benchmarks.slow_line [--rates unlimited 1gbit 100mbit]

Needs root: the hosts are two network namespaces joined by a line of that rate, a process on each,
started with `launch/hosts.sh`. FixMatch on digits, the gradients of an MLP all-reduced by DDP.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hpdist.data.samples.digits import write_digits
from tests.support.two_hosts import LINE, TwoHosts, two_hosts

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ROWS, STEPS, SKIPPED = (16, 48), 40, 10  # the first steps are not counted
BITS = {"1gbit": 1e9, "100mbit": 1e8}


def train(hosts: TwoHosts, data: Path, folder: Path, steps: int) -> list[float]:
    """Seconds of each step but the first ones."""
    values = {
        "run.dir": folder,
        "run.name": f"steps-{steps}",
        "model": json.dumps({"name": "mlp", "hidden": [1024, 1024]}),
        "data.labeled.data_files.train": f"{data}/train-*.parquet",
        "data.unlabeled.data_files.train": f"{data}/train-*.parquet",
        "data.test": "null",
        "batch.labeled": ROWS[0],
        "batch.unlabeled": ROWS[1],
        "steps": steps,
        "eval.every": "null",
        "checkpoint.every": "null",
        "log.every": 1,
        "tracker.name": "none",
    }
    settings = [f"--{key}={value}" for key, value in values.items()]
    started = []
    for host in (0, 1):
        own = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "CONFIG_FILE": str(ROOT / "configs/accelerate/cpu_bf16.yaml"),
            "OMP_NUM_THREADS": "1",
            "MACHINES": "2",
            "MACHINE_RANK": str(host),
            "MAIN_IP": hosts.addresses[0],
            "PER_MACHINE": "1",
            "INTERFACE": LINE,
        }
        command = [*hosts.on(host), ROOT / "launch/hosts.sh", ROOT / "configs/digits.yaml"]
        started.append(
            subprocess.Popen(
                [*command, *settings],
                env=os.environ | own,
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
    ended = [process.wait(timeout=600) for process in started]
    if any(ended):
        raise RuntimeError("the training failed")
    lines = (folder / f"steps-{steps}" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["examples_per_second"] for line in lines]
    return [sum(ROWS) / rate for rate in rates[SKIPPED:]]


def measure(hosts: TwoHosts, data: Path, folder: Path) -> tuple[float, float]:
    """Median seconds of a step, and bytes that a host sends in one: a long run less a short one."""
    sent = []
    for steps in (STEPS, 2 * STEPS):
        before = hosts.sent(1)
        seconds = statistics.median(train(hosts, data, folder, steps))
        sent.append(hosts.sent(1) - before)
    return seconds, (sent[1] - sent[0]) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", nargs="+", default=["unlimited", *BITS])
    rates = parser.parse_args().rates
    print("| line | step | bytes sent by a host in a step | these alone at that rate | ratio |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, two_hosts("hpslow") as hosts:
        data = write_digits(Path(folder) / "digits")
        for rate in rates:
            if rate in BITS:
                hosts.limit(rate)
            seconds, sent = measure(hosts, data, Path(folder) / rate)
            line = f"| {rate} | {1e3 * seconds:.0f} ms | {sent / 1e6:.2f} MB |"
            if rate in BITS:
                alone = 8 * sent / BITS[rate]
                line += f" {1e3 * alone:.0f} ms | {seconds / alone:.2f} |"
            else:
                line += " | |"
            print(line, flush=True)


if __name__ == "__main__":
    main()
