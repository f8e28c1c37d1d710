"""What takes long shows that it is alive, and what does not shows nothing."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpdist.messages import progress
from hpdist.messages.progress import working
from tests.support.small_runs import held_out, trainer

Read = Callable[[], str]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show signs of life at once, and often."""
    for name in ("_QUIET", "_EVERY", "_REFRESH"):
        monkeypatch.setattr(progress, name, 0.01)


def until(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not seen() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert seen()


def shown(work: progress.Work) -> None:
    until(lambda: work._announced or work._bar is not None)


@pytest.mark.usefixtures("impatient")
def test_a_log_has_counts_and_how_long_it_took(capfd: pytest.CaptureFixture[str]) -> None:
    with working("reading footers", 2000, "files") as work:
        work.add(1200)
        shown(work)
    with working("opening data.test") as work:
        shown(work)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("reading footers: 1,200 of 2,000 files, 0")
    assert lines[0].endswith(" s so far")
    ends = [line for line in lines if ": done in 0" in line]
    assert [line.split(":")[0] for line in ends] == ["reading footers", "opening data.test"]
    assert any(line.startswith("opening data.test: 0") for line in lines)


def test_what_is_quick_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with working("reading footers", 2000, "files") as work:
        work.add(2000)
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("impatient")
def test_other_ranks_show_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with working("reading footers") as work:
        assert work._thread is None
        time.sleep(0.05)
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("impatient")
def test_the_innermost_shows_itself_and_a_failure_is_not_done(
    capfd: pytest.CaptureFixture[str],
) -> None:
    @working("outer")
    def outer() -> None:
        with working("inner") as work:
            shown(work)
            assert len(progress._live) == 2
            raise ValueError("of the work")

    for _ in range(2):  # decorated once, shown at each call
        with pytest.raises(ValueError, match="of the work"):
            outer()
        told = capfd.readouterr().err
        assert "inner: " in told
        assert "done" not in told
        assert not progress._live


@pytest.mark.usefixtures("impatient")
def test_a_terminal_has_a_bar_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with working("evaluating data.test", 500, "rows") as work:
            work.add(250)
            shown(work)
            progress.print_line("a line above")
        stream.flush()
        text = os.read(master, 65536).decode()
    os.close(master)
    bars = [part for part in text.split("\r") if "evaluating data.test" in part]
    assert any("250/500" in bar for bar in bars[:2])  # on a busy machine the second
    assert max(map(len, bars)) <= 80
    assert "a line above" in text
    assert text.rsplit("\r", 2)[-2].strip() == ""  # nothing stays of the bar
    assert "done" not in text


@pytest.mark.usefixtures("impatient")
def test_a_run_shows_what_it_opens_and_evaluates(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    begin = progress.Work.begin

    def noted(work: progress.Work) -> None:
        begin(work)
        started.append(work._what)
        if work._what.startswith("evaluating"):
            shown(work)

    monkeypatch.setattr(progress.Work, "begin", noted)
    trainer(tmp_path, 1, test=held_out(1, 2, 3)).fit()
    evaluating = [line for line in capfd.readouterr().err.splitlines() if "evaluating" in line]
    assert " of 6 rows, " in evaluating[0]  # of the student and of the teacher
    assert "done in" in evaluating[-1]
    for what in (
        "setting up the process group",
        "opening data.labeled",
        "opening data.unlabeled",
        "opening data.test",
        "looking for duplicates in data.unlabeled",
        "preparing the model and the optimizer for training",
        "reading the first rows",
        "writing the checkpoint",
    ):
        assert any(name.startswith(what) for name in started), (what, started)
