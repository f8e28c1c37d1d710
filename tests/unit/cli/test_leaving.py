"""However a command ends, threads of C++ code that are still at work do not abort the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Arrow reads ahead in a thread of its own, from a file that is in Python and never gives an answer.
BUSY = """
import io, sys, threading, time
import pyarrow as pa, pyarrow.dataset, pyarrow.parquet

class Slow(io.BytesIO):
    started = threading.Event()
    slow = False
    def read(self, *size):
        while Slow.slow:
            Slow.started.set()
            time.sleep(0.001)
        return super().read(*size)

out = Slow()
pa.parquet.write_table(pa.table({"row": range(10_000)}), out, row_group_size=100)
fragment = pa.dataset.ParquetFileFormat().make_fragment(pa.PythonFile(out, "r"))
fragment.ensure_complete_metadata()
Slow.slow = True
threading.Thread(target=lambda: list(fragment.to_batches()), daemon=True).start()
assert Slow.started.wait(60)
"""
PROGRAM = """
import atexit
from hpdist import __main__
from hpdist.cli import program
run, sys.argv[0] = program._run, "hpdist"

def run_and_open_something(arguments):
    atexit.register(print, "tidied up")
    return run(arguments)

program._run = run_and_open_something
__main__.program()
"""


def end(script: str, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", BUSY + script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 lets such threads hang")
def test_python_itself_aborts() -> None:
    assert end("sys.exit(3)")[0] == -6


@pytest.mark.parametrize(
    ("arguments", "status"), [(["algorithms"], 0), (["train", "lost.yaml"], 2), (["nonsense"], 2)]
)
def test_a_command_ends_with_its_status(arguments: list[str], status: int) -> None:
    found, out, err = end(PROGRAM, *arguments)
    assert found == status, err
    assert out.endswith("tidied up\n")  # whoever wants to tidy up still does
    assert ("fixmatch" in out) == (status == 0)
    assert bool(err) == (status != 0)
    assert "Traceback" not in err


def test_rank_0_is_heard_though_it_comes_to_an_error_last(tmp_path: Path) -> None:
    """A launcher ends it once another rank has ended, which says nothing of what all know."""
    script = tmp_path / "late.py"
    script.write_text(
        "import os, time\n"
        "from hpdist.__main__ import program\n"
        "time.sleep(3 if os.environ['RANK'] == '0' else 0)\n"
        "program()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, script, "train", "lost.yaml"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hpdist: ")]
    assert "ConfigError" in line
    assert "lost.yaml" in line


def test_an_unexpected_exception_is_shown_and_is_status_1() -> None:
    script = (
        "from hpdist import __main__\n"
        "from hpdist.cli import program\n"
        "program._run = lambda _: 1 / 0\n"
        "__main__.program()"
    )
    found, out, err = end(script)
    assert (found, out) == (1, "")
    assert err.splitlines()[-1].startswith("ZeroDivisionError")
