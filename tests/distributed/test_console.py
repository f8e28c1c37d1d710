"""What a launched run of two ranks shows: a bar on a terminal, plain lines in a file, once each."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
import threading
from pathlib import Path

import pytest

from tests.support.slow_run import SlowRun

STEPS = 6
ROWS = """
import os, warnings

def slowly(row):
    if os.environ["RANK"] == "1":
        warnings.warn("this row is odd")
    return row
"""


def read_terminal(master: int, into: list[str]) -> None:
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the last process that had it has ended
            return
        if not data:
            return
        into.append(data.decode(errors="replace"))


def shown(folder: Path, columns: int | None = None) -> str:
    """What a run prints, to a terminal of so many columns or else to a file."""
    run = SlowRun(folder, [[300], [300]], row=ROWS)
    if columns is None:
        assert run.launch(2, STEPS, "--log.every", 2).wait(timeout=240) == 0, run.output
        return run.output
    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    parts: list[str] = []
    reader = threading.Thread(target=read_terminal, args=(master, parts))
    reader.start()
    process = run.fork(2, STEPS, "--log.every", 2, terminal=os.ttyname(terminal))
    status = process.wait(timeout=240)
    os.close(terminal)  # which the ranks have left by now
    reader.join(timeout=60)
    os.close(master)
    assert status == 0, "".join(parts)
    return "".join(parts)


@pytest.mark.slow
def test_a_file_has_plain_lines_of_the_main_process(tmp_path: Path) -> None:
    text = shown(tmp_path)
    assert "\r" not in text
    assert "%|" not in text
    steps = re.findall(
        r"^step (\d+)/6: loss [\d.]+, mask rate [\d.]+, [\d.]+ s left$", text, re.MULTILINE
    )
    assert steps == ["2", "4", "6"]
    for line in (
        r"batch:      36 rows a step \(12 labelled, 24 unlabelled\), 18 on each of 2 ranks",
        r"devices:    2 ranks on 1 host: .+",
        r"model:      mlp, [\d,]+ parameters, all trained",
    ):
        assert len(re.findall(f"^{line}$", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^steps +6$", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^run folder +\S+/run$", text, re.MULTILINE)) == 1
    odd = [line for line in text.splitlines() if "UserWarning: this row is odd" in line]
    assert len(odd) == 1
    assert odd[0].startswith("rank 1: ")


@pytest.mark.parametrize("columns", [120, 0], ids=["120 columns", "width unknown"])
def test_a_terminal_has_a_bar_of_the_main_process(tmp_path: Path, columns: int) -> None:
    text = shown(tmp_path, columns)
    assert "step 2/6:" not in text
    bars = [part for part in re.split(r"[\r\n]", text) if "%|" in part]
    assert "6/6" in bars[-1]
    assert "loss=" in bars[-1]
    assert "mask rate=" in bars[-1]
    assert not re.search(r"(?<![\d.])0step", text)  # the bar of a rank that shows none
    assert sum("  0%|" in bar for bar in bars) == 1  # not one of each rank
    assert len(re.findall(r"^steps +6\r?$", text, re.MULTILINE)) == 1
    assert (
        len(re.findall(r"\r\x1b\[Krank 1: .*UserWarning: this row is odd\r?$", text, re.MULTILINE))
        == 1
    )
