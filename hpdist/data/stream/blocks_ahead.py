"""Blocks of rows read ahead, in a thread, up to the place that was asked for."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Generator
from typing import Any

from hpdist.data.stream.blocks import Block, Point

_KEPT_BATCHES = 256  # how far behind the newest batch one can still ask where to resume
_JOIN_SECONDS = 2.0  # a thread that hangs in a network read must not hold up who closes


class BlocksAhead:
    """The blocks in memory, which a thread reads up to the place that was asked for.

    The thread must hold no reference to the reader, or the reader is never collected.
    """

    def __init__(self, source: Generator[Block, None, None], resume: dict[str, Any] | None) -> None:
        self._source = source
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._blocks: list[Block] = []
        self._points = [Point(**resume)] if resume else []
        self._floor = 0  # what lies before is not needed
        self._resumed = 0  # the last position asked for
        self._oldest = 0  # where to resume before it is not needed
        self._wanted = -1  # the place to read up to
        self._error: BaseException | None = None
        self._closed = False

    def reach(self, floor: int, place: int) -> list[Block]:
        """The blocks from the one that holds `floor` to the one that holds `place`."""
        with self._changed:
            self._drop(floor, place)
            self._want(place)
            self._changed.wait_for(lambda: self._holds(place) or self._error or self._closed)
            if self._blocks and self._blocks[-1].stop >= place:  # an error may come behind
                return [block for block in self._blocks if block.start <= place]
            raise self._error or RuntimeError("the reader is closed")

    def begin(self, place: int) -> None:
        """Have the thread read up to `place`."""
        with self._changed:
            self._want(place)

    def point(self, position: int) -> dict[str, Any] | None:
        """Where to begin to get the row at a position."""
        with self._changed:
            self._resumed = max(self._resumed, position)
            if position == 0 or not self._points:
                return None
            if position < self._points[0].start:
                raise ValueError(f"position {position} was passed long ago")
            return self._points[self._at(position)].saved()

    def close(self) -> None:
        """End the thread, which closes the source."""
        with self._changed:
            self._closed = True
            self._blocks = []
            self._changed.notify_all()
        if self._thread is None:
            self._source.close()
        elif self._thread is not threading.current_thread():  # the collector may run in any
            self._thread.join(_JOIN_SECONDS)

    def _want(self, place: int) -> None:
        self._wanted = max(self._wanted, place)
        self._changed.notify_all()
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="hpdist-blocks", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._holds(self._wanted))
                if self._closed:
                    break
            try:
                block = next(self._source)
            except BaseException as error:  # `reach` raises it where the rows are asked for
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._keep(block)
                self._changed.notify_all()
            del block
        self._source.close()

    def _keep(self, block: Block) -> None:
        if block.stop > self._floor and not self._closed:
            self._blocks.append(block)
        if block.stop <= self._oldest:
            self._points.clear()
        self._points.append(block.point)

    def _at(self, position: int) -> int:
        """The last point that is not behind a position; -1 where there is none."""
        return bisect_right([point.start for point in self._points], position) - 1

    def _holds(self, place: int) -> bool:
        return bool(self._blocks) and self._blocks[-1].stop > place

    def _drop(self, floor: int, place: int) -> None:
        """Forget what lies before the batch from `floor` to `place`."""
        if floor < self._floor or (self._points and floor < self._points[0].start):
            raise ValueError(f"position {floor} was passed; positions must not decrease")
        self._floor = floor
        self._blocks = [block for block in self._blocks if block.stop > floor]
        self._oldest = max(self._resumed, floor - _KEPT_BATCHES * (place - floor))
        self._points = self._points[max(0, self._at(self._oldest)) :]
