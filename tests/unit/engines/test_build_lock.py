"""Locks around compiling, with real files, real processes and a real, small extension."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.file_baton import FileBaton

from hpdist.cli.output import report_error
from hpdist.engines import build_lock as locks
from hpdist.engines import operators
from hpdist.engines.build_lock import build_lock, in_use, left_lock, working_in
from hpdist.engines.operators import prepare_operators
from hpdist.errors import ConfigError
from hpdist.preflight.facts import _left_builds
from hpdist.preflight.machines import check_builds

SOURCE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME", 0, -1, 0};
PyMODINIT_FUNC PyInit_NAME(void) { return PyModule_Create(&module); }
"""
linux = pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux who has a file open")


class Builder:
    """Compiles by PyTorch as DeepSpeed's builders do, under PyTorch's lock."""

    def __init__(self, name: str, source: Path, flags: list[str]) -> None:
        self.name, self._source, self._flags = name, source, flags

    def load(self, verbose: bool = False) -> Any:
        from torch.utils.cpp_extension import load

        return load(self.name, [str(self._source)], extra_cflags=self._flags, verbose=verbose)


@pytest.fixture
def python(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python with some code, and waits for its first line."""
    started = []

    def start(code: str, *arguments: object, wait: bool = True) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        started.append(process)
        if wait:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


HOLDS_PYTORCHS = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("ready", flush=True)
time.sleep(600)
"""
HOLDS_OURS = """
import sys, time
from pathlib import Path
from hpdist.distributed.build_lock import build_lock
with build_lock(Path(sys.argv[1]), "an_operator", print):
    print("ready", flush=True)
    time.sleep(600)
"""
SLEEPS_THERE = """
import os, sys, time
os.chdir(sys.argv[1])
open("/proc/self/comm", "w").write("ninja")
print("ready", flush=True)
time.sleep(600)
"""


@linux
def test_pytorchs_lock_is_its_holders_until_that_is_killed(tmp_path: Path, python: Any) -> None:
    lock = tmp_path / "lock"
    holder = python(HOLDS_PYTORCHS, lock)
    assert re.fullmatch(rf"process {holder.pid} \(.+\) has it open", str(in_use(lock)))
    assert left_lock(lock) is None
    holder.kill()
    holder.wait()
    assert lock.exists()
    said: list[str] = []
    with build_lock(tmp_path, "an_operator", said.append):
        assert FileBaton(lock).try_acquire()
    (line,) = said
    assert line.startswith(f"removed {lock}, which a start that was killed had left")


@linux
def test_a_compiler_that_outlives_its_starter_keeps_the_lock(tmp_path: Path, python: Any) -> None:
    (tmp_path / "lock").touch()
    compiler = python(SLEEPS_THERE, tmp_path)
    assert [process.pid for process in working_in(tmp_path)] == [compiler.pid]
    assert f"process {compiler.pid} " in str(in_use(tmp_path / "lock"))
    assert left_lock(tmp_path / "lock") is None
    compiler.kill()
    compiler.wait()
    assert left_lock(tmp_path / "lock") is not None


def test_where_the_kernel_cannot_tell_the_folder_must_be_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that other machines write to as well."""
    monkeypatch.setattr(locks, "_is_shared", lambda folder: True)
    lock = tmp_path / "lock"
    lock.touch()
    assert "changed 0 s ago" in str(in_use(lock))
    for path in (lock, tmp_path / "part.o"):
        path.touch()
        os.utime(path, (0, time.time() - locks.QUIET - 1))
    assert left_lock(lock) is not None
    os.utime(tmp_path / "part.o")
    assert left_lock(lock) is None


def test_who_waits_says_for_whom_and_goes_on_when_that_dies(
    tmp_path: Path, python: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_FIRST_WORD", 0.2)
    holder = python(HOLDS_OURS, tmp_path)
    said: list[str] = []
    held = threading.Event()

    def wait() -> None:
        with build_lock(tmp_path, "an_operator", said.append):
            held.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    while not said:
        time.sleep(0.02)
    assert not held.is_set()
    holder.kill()
    waiter.join(30)
    assert held.is_set()
    text = rf"waiting for process {holder.pid} on \S+, which has been compiling an_op"
    assert re.match(text, said[0])
    assert len(said) == 1


def test_a_lock_that_the_file_system_has_not_is_this_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    flock = fcntl.flock
    home = (tmp_path / "ext" / "hpdist.lock").resolve()

    def refuse(descriptor: int, operation: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve() == home:
            raise OSError(errno.ENOSYS, "Function not implemented")
        flock(descriptor, operation)

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    with build_lock(tmp_path / "ext", "an_operator", print):
        (stand_in,) = tmp_path.glob("hpdist-build-*.lock")
        assert '"an_operator"' in stand_in.read_text()


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Builder]:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))

    def make(name: str, source: str = SOURCE) -> Builder:
        path = tmp_path / f"{name}.c"
        path.write_text(source.replace("NAME", name))
        return Builder(name, path, [])

    return make


def test_an_operator_is_compiled_once_and_says_so(tmp_path: Path, builder: Any) -> None:
    said: list[str] = []
    prepare_operators([builder("hpdist_small")], said.append, patience=60)
    folder = tmp_path / "extensions" / "hpdist_small"
    assert said[0].startswith(f"compiling DeepSpeed's operator hpdist_small into {folder}")
    assert re.fullmatch(r"compiled hpdist_small in \d+ s", said[1])
    (folder / "lock").touch()  # as a start leaves it that is killed
    said.clear()
    prepare_operators([builder("hpdist_small")], said.append, patience=60)
    assert len(said) == 1
    assert "which a start that was killed had left" in said[0]
    assert not (folder / "lock").exists()


def test_an_operator_that_does_not_compile_is_one_clear_line(builder: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"operator hpdist_broken cannot be compiled .*error: "
    ) as e:
        prepare_operators([builder("hpdist_broken", "nonsense")], print, patience=None)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("local", "text"), [("0", "hpdist: rank 8: ConfigError: "), ("1", "")])
def test_of_a_machine_that_cannot_compile_one_rank_says_so(
    local: str, text: str, builder: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ranks = {"WORLD_SIZE": "16", "RANK": str(8 + int(local)), "LOCAL_RANK": local}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        prepare_operators([builder("hpdist_broken", "nonsense")], print, patience=None)
    capsys.readouterr()
    assert report_error(caught.value) is bool(text)
    assert capsys.readouterr().err.startswith(text)


def test_the_ninja_of_the_environment_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another version that comes first in PATH would compile everything anew."""
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found: list[str | None] = []

    class Looks:
        name = "hpdist_looks"

        def load(self, verbose: bool) -> None:
            found.append(shutil.which("ninja"))

    prepare_operators([Looks()], lambda line: None, patience=None)
    assert found[0] is not None
    assert Path(found[0]).parent == Path(sysconfig.get_path("scripts"))
    assert shutil.which("ninja") == str(other)


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = builder("hpdist_nowhere")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"hpdist_nowhere cannot .* set TORCH_EXTENSIONS_DIR to"):
        prepare_operators([operator], print, patience=None)


WAITS = """
import time
from hpdist.distributed.operators import prepare_operators
class Builder:
    name = "hpdist_waits"
    def load(self, verbose=False):
        time.sleep(600)
print("ready", flush=True)
prepare_operators([Builder()], print, patience=1.0)
"""


@linux
def test_a_start_that_waits_for_ever_is_ended(
    python: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """A compilation that hangs, without a compiler at work: the watchdog's patience ends it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    process = python(WAITS)
    assert process.wait(60) == 3


@linux
def test_preflight_reports_a_lock_that_was_left(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert _left_builds() == []
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    finding = check_builds([{"host": "n0", "builds": _left_builds()}, {"host": "n1", "builds": []}])
    assert finding.verdict == "note"
    assert finding.text.startswith(f"n0: {lock} was left by a start that was killed")
    assert lock.exists()
    assert check_builds([{"host": "n1", "builds": []}]).verdict == "ok"


def test_an_environment_in_a_folder_with_a_space_can_be_linked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch quotes the folders of headers, and not that of its libraries."""
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", "/my [own] $et/lib")
    with operators._quoted_libraries():
        flags = cpp_extension._prepare_ldflags([], False, False, False, False)
    assert flags[0] == "-L'/my [own] $$et/lib'"
    assert cpp_extension.TORCH_LIB_PATH == "/my [own] $et/lib"
