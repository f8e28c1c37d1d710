"""SIGKILL at the steps of writing a checkpoint: the resumed run is the same, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_table import COSTS, Fault

ROOT = Path(__file__).parents[2]
NAMES = {"fp32": "DDP in fp32", "zero2_fp16": "ZeRO-2 in fp16"}


def kill_everywhere(folder: Path, kind: str, every: int) -> list[dict[str, Any]]:
    """Kill at every so many-th point, on either rank."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kill_points", str(folder), kind, str(every)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HPDIST_ALLOW_CPU_FP16": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    log = folder / "log"
    assert done.returncode == 0, done.stderr + (log.read_text()[-5000:] if log.exists() else "")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    results: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))
    return results


def check(results: list[dict[str, Any]], kind: str, inject: Callable[..., Fault]) -> None:
    for result in results:
        which = "the first rank" if result["victim"] == 0 else "another rank"
        fault = inject(f"{which} killed while writing a checkpoint, {NAMES[kind]}")
        assert result["killed"], result
        assert result["resumed"] == [0, 0], result
        assert result["differs"] is None, result
        assert result["leftovers"] == [], result
        costs = {name: result[name] for name in COSTS}
        assert (costs["rows_lost"], costs["rows_repeated"]) == (0, 0), result
        fault.survived(**costs)


def test_killed_while_writing(tmp_path: Path, inject: Callable[..., Fault]) -> None:
    results = kill_everywhere(tmp_path, "fp32", every=6)
    assert {result["victim"] for result in results} == {0, 1}
    check(results, "fp32", inject)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_killed_at_every_point_of_writing(
    tmp_path: Path, kind: str, inject: Callable[..., Fault]
) -> None:
    results = kill_everywhere(tmp_path, kind, every=1)
    assert len(results) > 20
    check(results, kind, inject)
