"""One run at a time in a run folder: on this machine by a lock, among machines by beats."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpdist.tracking import run_lock
from hpdist.tracking.run_lock import OWNER, RunLock


def child(act: Callable[[], None]) -> int:
    """A process that acts and then stays until it is killed; it has acted when this returns."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        act()
        os.write(writing, b"!")
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"!"
    os.close(reading)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.6)


def elsewhere(folder: Path) -> None:
    """Have the folder's owner be one of another machine."""
    path = folder / OWNER
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot": "another", "token": "x"}))


def test_a_folder_is_another_process_until_that_is_killed(tmp_path: Path) -> None:
    pid = child(lambda: RunLock(tmp_path).acquire(0) or os._exit(1))
    lock = RunLock(tmp_path)
    try:
        assert not lock.acquire(0)
        assert f"is in use by process {pid} on " in str(lock.refusal())
    finally:
        kill(pid)
    assert lock.acquire(0)
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("hurried")
def test_who_waits_gets_it_when_it_is_free(tmp_path: Path) -> None:
    pid = child(lambda: RunLock(tmp_path).acquire(0) or os._exit(1))
    threading.Timer(0.2, kill, [pid]).start()
    lock = RunLock(tmp_path)
    assert lock.acquire(30)
    lock.release()


@pytest.mark.usefixtures("hurried")
def test_a_file_system_without_locks_goes_by_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_lock", lambda file: None)
    pid = child(lambda: RunLock(tmp_path).acquire(0) or os._exit(1))
    said: list[str] = []
    lock = RunLock(tmp_path, said.append)
    assert not lock.acquire(0)
    kill(pid)
    assert lock.acquire(0)
    assert [f"process {pid} on" in line for line in said] == [True]
    lock.release()


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("local", [True, False])
def test_an_owner_on_another_machine_that_beats_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    """Where the lock can be had: of a file system of one machine that says enough."""
    monkeypatch.setattr(run_lock, "_is_local", lambda path: local)
    left = RunLock(tmp_path)
    assert left.acquire(0)
    elsewhere(tmp_path)
    left.release()
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.05):
            os.utime(tmp_path / OWNER)

    if not local:
        beating = threading.Thread(target=beat)
        beating.start()
        assert not RunLock(tmp_path).acquire(0)
        end.set()
        beating.join()
    lock = RunLock(tmp_path)
    assert lock.acquire(0)
    lock.release()


@pytest.mark.usefixtures("hurried")
def test_an_owner_that_was_taken_for_dead_notices(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    assert lock.acquire(0)
    assert lock.lost is None
    elsewhere(tmp_path)
    deadline = time.monotonic() + 30
    while lock.lost is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.lost is not None
    lock.release()
    assert (tmp_path / OWNER).exists(), "it is the other's"


def test_a_later_trainer_of_this_process_takes_it_unless_the_first_is_at_work(
    tmp_path: Path,
) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.acquire(0)
    first.busy = True
    assert not second.acquire(0)
    first.busy = False
    assert second.acquire(0)
    assert first.lost is not None
    first.release()
    assert second.lost is None
    assert (tmp_path / OWNER).exists()
    second.release()


def test_the_file_system_of_this_machine_is_found() -> None:
    if not Path("/proc/self/mountinfo").exists():
        pytest.skip("no Linux")
    assert not run_lock._is_local(Path("/proc/self"))
