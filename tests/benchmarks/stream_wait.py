"""The share of a training step that is spent waiting for data, as the run's own metrics say."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LABELED, MU = 8, 7
EVERY = 5  # steps per record


def measure(folder: Path, cifar10: Path, steps: int) -> None:
    """Print a table of a table's rows and of streamed ones."""
    print(
        f"FixMatch, WRN-28-2 on CIFAR-10, {LABELED} + {LABELED * MU} rows a step, 2 ranks, fp32: "
        f"share of a step that waits for data, over {steps} steps without the first {EVERY}.\n"
    )
    print("| unlabelled rows | median share | largest | examples/s |")
    print("|---|---|---|---|")
    for streaming in (True, False):
        records = _train(folder / f"runs-{streaming}", cifar10.resolve(), steps, streaming)[1:]
        shares = [record["data_wait"] for record in records]
        rate = statistics.median(record["examples_per_second"] for record in records)
        name = "streamed from Parquet" if streaming else "a table"
        print(f"| {name} | {statistics.median(shares):.2%} | {max(shares):.2%} | {rate:.0f} |")
    print()


def _train(folder: Path, cifar10: Path, steps: int, streaming: bool) -> list[dict[str, float]]:
    train = f"{cifar10}/train-*.parquet"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", ROOT / "configs/accelerate/cpu_bf16.yaml", "--main_process_port", "0"),
        *(
            "--mixed_precision",
            "no",
        ),  # bf16 is slow on a CPU without AVX-512: no data is waited for
        *("-m", "hpdist", "train", ROOT / "configs/cifar10_fixmatch.yaml"),
        *("--data.labeled.data_files.train", train, "--data.unlabeled.data_files.train", train),
        *("--data.test", "null"),
        *("--data.unlabeled.streaming", str(streaming).lower()),
        *("--batch.labeled", LABELED, "--batch.unlabeled", LABELED * MU),
        *(
            "--steps",
            steps,
            "--log.every",
            EVERY,
            "--eval.every",
            "null",
            "--checkpoint.every",
            "null",
        ),
        *("--run.dir", folder, "--run.name", "wait"),
    ]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    lines = (folder / "wait/metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "data_wait" in (record := json.loads(line))]
