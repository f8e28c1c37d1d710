"""SIGKILL at the steps of writing a checkpoint: the resumed run is the same, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def kill_everywhere(folder: Path, kind: str, every: int) -> list[dict[str, Any]]:
    """Kill at every so many-th point, on either rank."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_points", str(folder), kind, str(every)],
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


def check(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["killed"], result
        assert result["resumed"] == [0, 0], result
        assert result["differs"] is None, result
        assert result["leftovers"] == [], result


def test_killed_while_writing(tmp_path: Path) -> None:
    results = kill_everywhere(tmp_path, "fp32", every=6)
    assert {result["victim"] for result in results} == {0, 1}
    check(results)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "zero2_fp16"])
def test_killed_at_every_point_of_writing(tmp_path: Path, kind: str) -> None:
    results = kill_everywhere(tmp_path, kind, every=1)
    print(f"\n{kind}: {len(results)} kills, all resumed, rows lost 0, repeated 0")
    assert len(results) > 20
    check(results)
