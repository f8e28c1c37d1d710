"""What is to be opened of files of this machine: their builder, splits and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from hpdist.data.sources.builders import build, listed
from hpdist.data.sources.held import HELD
from hpdist.errors import DataError


@dataclass(frozen=True)
class Opening:
    """What is to be opened, and how messages call it."""

    builder: str
    base: str
    splits: Mapping[str, Sequence[str]]
    split: str
    options: Mapping[str, Any]
    streaming: bool
    needed: Sequence[str]
    """Columns that every file must have."""
    name: str
    where: str
    copied: Callable[[], Any] | None = None
    """Opens the same as a `datasets.Dataset`, if Parquet is to be read where it lies instead."""

    @property
    def paths(self) -> list[str]:
        """All files, split by split."""
        return [path for of_split in self.splits.values() for path in of_split]

    def load(self, **options: Any) -> Any:
        """Open the files with the builder of `datasets`, or what is used in its place."""
        if self.builder in HELD:
            return self.build(HELD[self.builder], **options)
        return datasets.load_dataset(
            self.builder,
            data_files=listed(self.splits),
            split=self.split,
            streaming=self.streaming,
            **{**self.options, **options},
        )

    def build(self, builder: type, **options: Any) -> Any:
        """Open the files with a builder of one's own."""
        return build(
            builder,
            self.builder,
            self.splits,
            self.split,
            self.streaming,
            **{**self.options, **options},
        )

    def no_rows(self) -> DataError:
        """Say that all files are empty."""
        count = len(self.paths)
        empty = f"its {count} files are all" if count > 1 else "its file is"
        return DataError(f"{self.name}: holds no rows; {empty} empty")
