"""Ends a run that hangs: every rank prints its stacks, and where each was last heard from.

A rank that deadlocks, waits for a dead one, or is stuck in a read leaves all others waiting in
their next collective. Each rank reports its state to a key-value store; one that sees no progress
for too long raises an alarm, and all print and exit, so that a launcher can restart them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple

import torch.distributed as dist

from hpdist.distributed.collectives import world_size
from hpdist.errors import DistributedError

_PREFIX = "hpdist/watchdog"  # among the names of the process group, which are per attempt
_TICK = 1.0  # seconds
_GRACE_TICKS = 4  # for the others to see the alarm and print, before the launcher ends them
_BLOCKED = 1.5  # times the limit, after which a process with a stuck interpreter ends


class Watchdog:
    """Watches the main thread's progress from another one, between `start` and `stop`.

    Args:
        rank: This rank.
        seconds: How long a step may take; `None` disables the watchdog.
    """

    def __init__(self, rank: int, seconds: float | None) -> None:
        self._rank = rank
        self._seconds = seconds
        self._state = _State(time.monotonic(), 0, 0, "starting")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start watching."""
        if self._seconds is None:
            return
        self.heartbeat(0, "starting")
        self._store = _store()
        self._thread = threading.Thread(target=self._watch, name="hpdist-watchdog", daemon=True)
        self._thread.start()

    def heartbeat(self, step: int, doing: str) -> None:
        """Report progress: the step in progress, and what comes next."""
        if self._seconds is None:
            return
        self._state = _State(time.monotonic(), self._state.beats + 1, step, doing)
        # For a stuck interpreter, which runs no other thread.
        faulthandler.dump_traceback_later(_BLOCKED * self._seconds + 60, exit=True, file=_errors())

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * _TICK)
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seconds = self._seconds or 0.0
        tick = min(_TICK, seconds / 4)
        while not self._stop.wait(tick):
            state = self._state
            age = time.monotonic() - state.when
            reported = [state.beats, state.step, state.doing, age, time.time()]
            self._publish(f"beat-{self._rank}", json.dumps(reported))
            alarm = age > seconds or self._lookup("alarm") is not None
            if alarm and not self._stop.is_set():
                self._publish("alarm", str(self._rank))
                self._report(state, age)
                time.sleep(_GRACE_TICKS * tick)
                os._exit(DistributedError.exit_status)

    def _report(self, state: _State, age: float) -> None:
        lines = [f"no progress for {age:.0f} s in step {state.step} ({state.doing})"]
        heard = {rank: self._heard(rank) for rank in range(world_size())}
        # All ranks beat equally often, so the rank with the fewest beats is behind, even in a step.
        beats = [found.beats for found in heard.values() if found is not None]
        for rank, found in heard.items():
            if found is None:
                lines.append(f"  rank {rank} was never heard from")
                continue
            silent = time.time() - found.reported
            gone = f"; last heard from {silent:.0f} s ago" if silent > 5 * _TICK else ""
            behind = " <- behind" if found.beats < max(beats) else ""
            lines.append(
                f"  rank {rank}: step {found.step}, {found.doing}, for {found.age:.0f} s"
                f"{gone}{behind}"
            )
        lines += ["the stacks of this rank's threads:", *_stacks()]
        # In one piece, since every rank writes at the same time.
        text = "".join(f"hpdist: rank {self._rank}: {line}\n" for line in lines)
        errors = _errors()
        os.write(errors if isinstance(errors, int) else errors.fileno(), text.encode())

    def _heard(self, rank: int) -> _Heard | None:
        reported = self._lookup(f"beat-{rank}")
        return None if reported is None else _Heard(*json.loads(reported))

    def _publish(self, key: str, value: str) -> None:
        try:
            if self._store is not None:
                self._store.set(f"{_PREFIX}/{key}", value)
        except RuntimeError:  # the store's process has ended, and this one will soon
            self._store = None

    def _lookup(self, key: str) -> bytes | None:
        try:
            name = f"{_PREFIX}/{key}"
            if self._store is not None and self._store.check([name]):
                return bytes(self._store.get(name))
        except RuntimeError:
            self._store = None
        return None


class _State(NamedTuple):
    """The state of the main thread."""

    when: float  # on the monotonic clock
    beats: int
    step: int
    doing: str


class _Heard(NamedTuple):
    """The latest report of a rank."""

    beats: int
    step: int
    doing: str
    age: float  # seconds since its latest beat
    reported: float  # time of the report


def _stacks() -> list[str]:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read().splitlines()


def _store() -> Any:
    """The ranks' own key-value store, over a connection of its own, which no other call blocks."""
    if world_size() == 1 or dist.get_backend() == "fake":  # a rehearsal's backend has no others
        return None
    store = dist.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def _errors() -> Any:
    """Where stacks are printed: the real stderr, even if it was replaced."""
    return sys.__stderr__ or 2
