"""Ends a run that hangs: every rank prints its stacks, and who was last heard from where.

A rank that deadlocks, waits for one that died, or is stuck in a read leaves all others waiting in
their next collective. Each rank tells a key-value store what it is at; whoever has seen no progress
for too long says so, and all of them print and exit, so that a launcher can start them again.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from hpdist.distributed.reduce import world_size
from hpdist.errors import DistributedError

_ALARM = "hpdist/hung"
_TICK = 1.0  # seconds
_GRACE_TICKS = 4  # for the others to see the alarm and print, before the launcher ends them
_BLOCKED = 1.5  # times the patience, after which a process whose interpreter is stuck ends


class Watchdog:
    """Watches the main thread's progress from another one, between `start` and `stop`.

    Args:
        rank: This one.
        seconds: How long a step may take; `None` watches nothing.
    """

    def __init__(self, rank: int, seconds: float | None) -> None:
        self._rank = rank
        self._seconds = seconds
        self._state: tuple[float, int, str] = (time.monotonic(), 0, "starting")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        if self._seconds is None:
            return
        self.beat(0, "starting")
        self._store = _store()
        self._thread = threading.Thread(target=self._watch, name="hpdist-watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, doing: str) -> None:
        """Tell of progress: the step that is worked at, and what comes next."""
        if self._seconds is None:
            return
        self._state = (time.monotonic(), step, doing)
        # For a stuck interpreter, which runs no other thread.
        faulthandler.dump_traceback_later(_BLOCKED * self._seconds + 60, exit=True, file=_errors())

    def stop(self) -> None:
        """Watch no longer."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * _TICK)
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seconds = self._seconds or 0.0
        tick = min(_TICK, seconds / 4)
        while not self._stop.wait(tick):
            beat, step, doing = self._state
            age = time.monotonic() - beat
            self._tell(f"hpdist/beat/{self._rank}", json.dumps([step, doing, age, time.time()]))
            alarm = age > seconds or self._ask(_ALARM) is not None
            if alarm and not self._stop.is_set():
                self._tell(_ALARM, str(self._rank))
                self._report(age, step, doing)
                time.sleep(_GRACE_TICKS * tick)
                os._exit(DistributedError.exit_status)

    def _report(self, age: float, step: int, doing: str) -> None:
        lines = [f"hpdist: rank {self._rank}: no progress for {age:.0f} s in step {step} ({doing})"]
        states = {rank: self._heard(rank) for rank in range(world_size())}
        known = {rank: state for rank, state in states.items() if state is not None}
        for rank, state in states.items():
            if state is None:
                lines.append(f"  rank {rank} was never heard from")
        least = min((state[0] for state in known.values()), default=0)
        for rank, (at, what, stuck, told) in known.items():
            silent = time.time() - told
            last = "; last heard from" if silent > 5 * _TICK else ""
            gone = f"{last} {silent:.0f} s ago" if last else ""
            behind = " <- the furthest behind" if at == least and len(known) > 1 else ""
            lines.append(f"  rank {rank}: step {at}, {what}, for {stuck:.0f} s{gone}{behind}")
        lines.append("the stacks of this rank's threads:")
        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=_errors(), all_threads=True)

    def _heard(self, rank: int) -> tuple[int, str, float, float] | None:
        told = self._ask(f"hpdist/beat/{rank}")
        if told is None:
            return None
        step, doing, age, when = json.loads(told)
        return int(step), str(doing), float(age), float(when)

    def _tell(self, key: str, value: str) -> None:
        try:
            if self._store is not None:
                self._store.set(key, value)
        except RuntimeError:  # the store's process is gone, which ends this one soon
            self._store = None

    def _ask(self, key: str) -> bytes | None:
        try:
            if self._store is not None and self._store.check([key]):
                return bytes(self._store.get(key))
        except RuntimeError:
            self._store = None
        return None


def _store() -> Any:
    """The ranks' own key-value store, over a connection that no waiting call of theirs blocks."""
    if world_size() == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def _errors() -> Any:
    """Where stacks go: the real stderr, whatever stands in for it."""
    return sys.__stderr__ or 2
