"""A start that is killed while it compiles an operator holds up none of those that come after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpdist.engines.build_lock import working_in
from hpdist.engines.operators import extensions_folder
from tests.support.fault_table import Fault

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sees compilers by /proc")

START = """
import sys
from torch.utils.cpp_extension import load
from hpdist.distributed.operators import prepare_operators
class Builder:
    name = "hpdist_killed"
    def load(self, verbose=False):
        self.loaded = load(self.name, [sys.argv[1]], verbose=verbose)
builder = Builder()
prepare_operators([builder], lambda line: print(line, flush=True), patience=60)
print(f"loaded {builder.loaded.__file__}")
"""
SOURCE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "hpdist_killed", 0, -1, 0};
PyMODINIT_FUNC PyInit_hpdist_killed(void) { return PyModule_Create(&module); }
"""


def test_a_killed_compilation_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inject: Callable[..., Fault]
) -> None:
    """One process compiles, another waits for it; the first is killed, its compiler lives on."""
    fault = inject("a start killed while it compiles an operator, one that waits for it")
    source, compiler = tmp_path / "operator.cpp", tmp_path / "c++"
    source.write_text(SOURCE)
    compiler.write_text('#!/bin/sh\n[ "$1" = "-MMD" ] && sleep 3\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    folder = tmp_path / "extensions" / "hpdist_killed"

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", START, str(source)]
        return subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    first = start()
    while not working_in(folder):
        assert first.poll() is None
        time.sleep(0.02)
    second = start()
    first.kill()
    said = first.communicate()[0]
    assert "compiling DeepSpeed's operator hpdist_killed" in said
    assert (folder / "lock").exists()
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    assert f"removed {folder / 'lock'}, which a start that was killed had left" in output
    assert f"loaded {folder}" in output
    assert not (folder / "lock").exists()
    fault.survived()


@pytest.mark.slow
def test_a_first_start_that_is_killed_holds_up_no_later_one(
    tmp_path: Path, inject: Callable[..., Fault]
) -> None:
    """With DeepSpeed's own operator, which takes minutes."""
    fault = inject("a start killed while it compiles DeepSpeed's operator")
    environment = dict(os.environ, TORCH_EXTENSIONS_DIR=str(tmp_path), DS_ACCELERATOR="cpu")
    code = (
        "from hpdist.engines.operators import needed_builders, prepare_operators\n"
        "prepare_operators(needed_builders({}), lambda line: print(line, flush=True), 30)"
    )
    command = [sys.executable, "-c", code]
    assert extensions_folder() != tmp_path
    folder = tmp_path / "deepspeed_shm_comm"
    first = subprocess.Popen(command, cwd=ROOT, env=environment)
    while not (folder / "lock").exists():
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"removed {folder / 'lock'}" in done.stdout
    assert "compiled deepspeed_shm_comm in" in done.stdout
    assert list(folder.glob("*.so"))
    fault.survived()
