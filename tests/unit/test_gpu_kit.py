"""What of the GPU kit can be held to without a GPU, quickly; `make gpu-dry-run` does the rest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

import psutil
import pytest
import torch

from tests.benchmarks import gpu
from tests.benchmarks.gpu_speed import covered
from tests.benchmarks.gpu_training import idle
from tests.gpu.device import DRY_RUN, WHY_SKIPPED
from tests.gpu.timed import run_within
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]
SPEED = "| model | a |\n|---|---|\n| WRN | 1 |"
MEMORY = "| model | b |\n|---|---|\n| WRN | 2 |"


def run_tests(output: Path) -> int:
    """Run the tests of the kit in this process, without a GPU; the exit status."""
    os.environ.pop(DRY_RUN, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(ROOT)
    with output.open("w") as file, redirect_stdout(file):
        options = ["-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
        return int(pytest.main(["tests/gpu", *options]))


def test_without_a_gpu_all_is_skipped_and_says_why(tmp_path: Path) -> None:
    """The reason is a sentence, and no test of the folder escapes the marker."""
    (status,) = run_ranks(1, run_tests, tmp_path / "output")
    text = (tmp_path / "output").read_text(encoding="utf-8")
    assert status == 0, text
    *_, last = text.strip().splitlines()
    assert re.fullmatch(r"\d\d+ skipped(, \d+ warnings)? in .*", last), text
    assert WHY_SKIPPED in text


@pytest.mark.slow
def test_a_dry_run_does_every_test_and_every_measurement() -> None:
    before = gpu.RESULTS.read_bytes() if gpu.RESULTS.exists() else None
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert re.search(r"^\d\d+ passed(, \d+ warnings)? in ", done.stdout, re.MULTILINE), done.stdout
    assert "Device: cpu (dry run); torch" in done.stdout
    for title in gpu.PARTS.values():
        assert f"## {title}\n\n| " in done.stdout
    assert not re.search("Not |no time|out of memory", done.stdout), done.stdout
    after = gpu.RESULTS.read_bytes() if gpu.RESULTS.exists() else None
    assert after == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "needs a CUDA device, and none is visible; --dry-run" in capsys.readouterr().err


def test_a_dry_run_writes_no_results(tmp_path: Path) -> None:
    results = tmp_path / "gpu.md"
    text = gpu.write({"memory": MEMORY, "speed": SPEED}, dry_run=True, results=results)
    assert not results.exists()
    assert "Device: cpu (dry run); torch" in text
    assert text.index(SPEED) < text.index(MEMORY)


def test_a_part_measured_anew_leaves_the_others_of_the_same_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "gpu.md"
    monkeypatch.setattr(gpu, "device_name", lambda dry_run: "NVIDIA H100")
    first = gpu.write({"speed": SPEED, "memory": MEMORY}, dry_run=False, results=results)
    assert first == results.read_text(encoding="utf-8")
    gpu.write({"memory": MEMORY.replace("2", "3")}, dry_run=False, results=results)
    assert results.read_text(encoding="utf-8") == first.replace("| WRN | 2 |", "| WRN | 3 |")
    monkeypatch.setattr(gpu, "device_name", lambda dry_run: "NVIDIA H200")
    other = gpu.write({"memory": MEMORY}, dry_run=False, results=results)
    assert SPEED not in other


@pytest.mark.parametrize("parts", [["speed", "memory", "training"], ["training"], ["speed"]])
@pytest.mark.parametrize("minutes", [1, 5, 9, 60])
def test_the_parts_share_the_time(parts: list[str], minutes: float) -> None:
    found = gpu.seconds_of(parts, minutes)
    assert list(found) == parts
    assert all(seconds > 0 for seconds in found.values())
    assert found.get("training", 0) <= gpu.MOST["training"]
    around = gpu.AROUND_TRAINING if "training" in parts else 0
    assert sum(found.values()) + around <= max(60 * minutes, around + 60)


def test_a_part_that_fails_is_named() -> None:
    text, well = gpu.run_part("nowhere", 1, [])  # there is no such program
    assert not well
    assert text.strip() == "Not complete: it ended with status 1."


def test_what_takes_too_long_ends_with_all_that_it_started() -> None:
    child = "import time; time.sleep(600)"
    parent = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, "
        f"flush=True); {child}"
    )
    out, problem = run_within(1.0, [sys.executable, "-c", parent], captured=True)
    assert problem == "it was not done after 1 s"
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(out)).wait(10) is None


def test_a_device_is_busy_where_any_event_covers_the_time() -> None:
    assert covered([]) is None
    assert covered([(0, 10), (5, 20), (30, 40), (31, 32)]) == pytest.approx(30 / 40)


def test_the_longest_gaps_are_no_idling() -> None:
    """A gap in which the run evaluated; one of a hundred is left out, as is its step."""
    assert idle([0.1] * 99 + [50.0], [0.9] * 100) == pytest.approx(0.1)
    assert idle([0.0, 0.0], [1.0, 1.0]) == 0
