"""What a folder of predictions is made of: parts of equal numbers of rows, and a record of them.

Every part is a Parquet file of its own, written whole or not at all, and holds the same bytes
whoever writes it. So what is missing says where to go on, on any number of ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpdist.data.sources.label_files import RECORD
from hpdist.errors import CheckpointError, DataError, why_not_written

_VERSION = 2  # of how a part is divided into batches, which its last digits depend on


@dataclass(frozen=True)
class Plan:
    """The parts of a folder of predictions."""

    folder: Path
    rows: int
    """Rows to predict."""
    part_rows: int
    """Rows of each part but the last."""

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.rows // self.part_rows)

    def path(self, part: int) -> Path:
        """Name the file of a part."""
        return self.folder / f"part-{part:08d}.parquet"

    def span(self, part: int) -> tuple[int, int]:
        """Give the positions of a part's rows, from and to."""
        start = part * self.part_rows
        return start, min(start + self.part_rows, self.rows)

    def missing(self) -> list[int]:
        """List the parts that are not written yet."""
        there = {path.name for path in self.folder.glob("part-*.parquet")}
        return [part for part in range(self.parts) if self.path(part).name not in there]

    def share(self, missing: list[int], rank: int, world_size: int) -> list[int]:
        """Give a rank's parts of those that are missing: neighbours, which share row groups."""
        count = len(missing)
        return missing[rank * count // world_size : (rank + 1) * count // world_size]


def begin(plan: Plan, facts: Mapping[str, Any]) -> None:
    """Make the folder and record what is predicted there; or check that it is the same.

    Raises DataError where the folder holds other predictions, or something else, and
    CheckpointError where nothing can be written.
    """
    record = {"version": _VERSION, "parts": plan.parts, "part_rows": plan.part_rows, **facts}
    record = json.loads(json.dumps(record))
    path = plan.folder / RECORD
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_same(path, record)
        elif any(not found.name.startswith(".") for found in plan.folder.iterdir()):
            raise DataError(
                f"--out {plan.folder}: the folder is not empty, and holds no predictions to go on "
                "with; name another one"
            )
        _remove_unfinished(plan.folder)
        if not path.exists():
            write_whole(path, (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        raise CheckpointError(
            f"--out {plan.folder}: cannot be written: {why_not_written(error, plan.folder)}"
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file through a temporary one, so that no reader sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of whoever was killed while writing the record or a part."""
    for name in (RECORD, "part-*"):
        for left in folder.glob(f".{name}.*.tmp"):
            left.unlink(missing_ok=True)


def _check_same(path: Path, record: Mapping[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in record if found.get(key) != record[key]]
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: is damaged: {error}; name another folder") from error
    if differing:
        shown = [
            f"{key} was {_short(found.get(key))}, now {_short(record[key])}" for key in differing
        ]
        raise DataError(
            f"--out {path.parent}: holds other predictions: {'; '.join(shown[:3])}; restore these, "
            "or name another folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
