"""Forks of a process: a few at once, with what it holds, and how each of them ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, sys, time
from functools import partial
from pathlib import Path

from hpdist.plan.forks import Forks

HELD = []

def work(number):
    Path(sys.argv[1], f"began-{number}").touch()
    time.sleep(0.1)
    folder = Path(sys.argv[1])
    others = len(list(folder.glob("began-*"))) - len(list(folder.glob("end-*")))
    Path(folder, f"end-{number}").write_text(f"{others} {HELD}")
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3:
        raise ValueError
    os._exit(0)

HELD.append("imported once")
forks = Forks(2)
pids = [forks.start(partial(work, number)) for number in range(5)]
forks.wait_all()
print(forks.most, [forks.ended[pid] for pid in pids])
"""


def test_no_more_than_some_at_once_and_each_status_is_known(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.getcwd(), timeout=60)
    assert done.stdout == f"2 [0, 0, {-signal.SIGKILL}, 1, 0]\n", done.stderr
    found = [(tmp_path / f"end-{number}").read_text() for number in range(5)]
    assert all(text.endswith("['imported once']") for text in found)
    assert all(int(text.split()[0]) <= 2 for text in found)
