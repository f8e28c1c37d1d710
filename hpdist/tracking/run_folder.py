"""The run folder: config.yaml, metrics.jsonl, summary.json and the checkpoints."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from hpdist.errors import CheckpointError, why_not_written
from hpdist.tracking.run_lock import OWNER

CHANGES = "config_changes.jsonl"
"""Changed settings of a continued run, and from which step on."""

TASK = "task.json"
"""What a report must know of the run's task: `hpdist.tasks.base.Task.display`."""

PRIVACY = "privacy.json"
"""What the privately voted labels of a run have cost."""

LAUNCH = ".launch.json"
"""The launcher of a run without a name: its restarts continue that run."""


_BLOCK = 1 << 16  # bytes of metrics.jsonl that are read at once


def _are_rows(found: Any) -> bool:
    """Whether it is a list of row numbers."""
    return isinstance(found, list) and all(type(row) is int and row >= 0 for row in found)


class RunFolder:
    """The files of one run. Only the main process writes; every write is whole or not at all."""

    def __init__(self, path: Path, main: bool = True) -> None:
        self.path = path
        self.main = main
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.labeled_rows = path / "labeled_rows.json"
        self._unwritten: list[str] = []  # lines of metrics.jsonl
        self._warned = False

    def create(self) -> None:
        """Make the folder; raises CheckpointError if that fails."""
        if not self.main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._unwritable(error) from error

    def is_empty(self) -> bool:
        """Whether the folder is empty, except for the marks of its owner."""
        if not self.path.exists():
            return True
        return self.path.is_dir() and all(
            found.name in (OWNER, LAUNCH) for found in self.path.iterdir()
        )

    def remove_empty(self) -> None:
        """Remove the folder of a run that has left nothing in it."""
        if self.main:
            with suppress(OSError):  # it is not empty
                self.path.rmdir()

    def refuse_unless_empty(self) -> None:
        """Raise CheckpointError if a run has left something."""
        if not self.is_empty():
            raise CheckpointError(
                f"checkpoint.resume: never, but the run folder {str(self.path)!r} is not empty; "
                "choose another run.name or remove it"
            )

    def write_text(self, name: str, text: str) -> None:
        """Write a file through a temporary one, so that no reader sees half of it.

        Raises CheckpointError if that fails.
        """
        if not self.main:
            return
        file = self.path / name
        temporary = file.with_name(f".{file.name}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._unwritable(error) from error

    def write_json(self, name: str, values: Any, indent: int | None = 2) -> None:
        """Write a JSON file."""
        self.write_text(name, json.dumps(values, indent=indent) + "\n")

    def read_labeled_rows(self) -> list[int] | None:
        """The labelled rows that this run chose, if it has done so."""
        rows: list[int] | None = self.read_json(self.labeled_rows.name, _are_rows)
        return rows

    def read_json(self, name: str, fits: Callable[[Any], bool]) -> Any:
        """Read a JSON file; None if there is none.

        Raises CheckpointError if it is damaged, or its content does not fit `fits`.
        """
        path = self.path / name
        if not path.exists():
            return None
        try:
            if not path.is_file():
                raise OSError("it is no regular file")
            found = json.loads(path.read_text(encoding="utf-8"))
            if not fits(found):
                raise ValueError("it does not hold what a run writes there")
        except (OSError, ValueError, RecursionError) as error:  # also text that is not UTF-8
            raise CheckpointError(
                f"{path}: what the run recorded cannot be read: {error}; restore the file from a "
                "copy, or choose another run.name"
            ) from error
        return found

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a run that has ended; else None."""
        try:
            found: dict[str, Any] | None = self.read_json(
                "summary.json", lambda found: isinstance(found, dict)
            )
        except CheckpointError:
            return None
        return found

    def record_of(self, step: int) -> dict[str, Any] | None:
        """The record of a step in metrics.jsonl, if there is one; it is read from the end."""
        if not self.metrics.exists():
            return None
        with self.metrics.open("rb") as file:
            for _, record in latest_records(file):
                if record["step"] <= step:
                    return record if record["step"] == step else None
        return None

    def append_metrics(self, record: Mapping[str, object]) -> None:
        """Append a line to metrics.jsonl; on a full disk it is kept for later."""
        if not self.main:
            return
        self._unwritten.append(json.dumps(record) + "\n")
        try:
            with self.metrics.open("ab", buffering=0) as file:
                whole = file.tell()
                rest = memoryview("".join(self._unwritten).encode())
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(whole)  # no line rather than half of one
                    raise
        except OSError as error:
            if not self._warned:
                warnings.warn(
                    f"{self.metrics} cannot be written: {error}; the records are kept and written "
                    "when there is room",
                    stacklevel=2,
                )
            self._warned = True
            return
        self._unwritten, self._warned = [], False

    def drop_metrics_after(self, step: int) -> None:
        """Remove whatever follows the record of a step, so that the file is that of a single run.

        It is read from the end, and cut off there. Raises CheckpointError if that fails.
        """
        if not self.main or not self.metrics.exists():
            return
        try:
            with self.metrics.open("r+b") as file:
                kept = (end for end, record in latest_records(file) if record["step"] <= step)
                end = next(kept, 0)
                if end:
                    file.seek(end)
                    file.write(b"\n")  # a line that was cut off there may have none
                file.truncate(end + 1 if end else 0)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        why = why_not_written(error, self.path)
        return CheckpointError(f"run.dir: cannot write to the run folder {str(self.path)!r}: {why}")


def read_records(metrics: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl that are records, objects with a step, with their content.

    Other lines are left out: one that a killed process has left half-written, and anything from
    elsewhere.
    """
    for line in metrics.read_text(encoding="utf-8", errors="replace").split("\n"):
        record = _record_in(line)
        if record is not None:
            yield line, record


def latest_records(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of metrics.jsonl from the last one on, each with the byte where its line ends.

    The file is read in blocks from its end, as far as records are asked for.
    """
    begin = end = file.seek(0, os.SEEK_END)
    rest = b""  # of a line that begins before `begin`
    while begin:
        size = min(begin, _BLOCK)
        begin -= size
        file.seek(begin)
        rest, *lines = (file.read(size) + rest).split(b"\n")
        if not begin:
            lines = [rest, *lines]
        for line in reversed(lines):
            record = _record_in(line.decode("utf-8", "replace"))
            if record is not None:
                yield end, record
            end -= len(line) + 1


def _record_in(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int
    return record if is_record else None
