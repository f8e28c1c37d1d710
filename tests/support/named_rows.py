"""A spec of rows that are three arrays by name, of odd sizes and different dtypes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hpdist.data.decode.arrays import ArrayLayout
from hpdist.data.decode.spec import InputSpec


@dataclass(frozen=True)
class NamedSpec(InputSpec):
    """Stored values are whole numbers, which every array repeats; negative ones are refused."""

    kind: ClassVar[str] = "named"
    worth_processes: ClassVar[bool] = True
    slow: bool = False

    @property
    def layout(self) -> dict[str, ArrayLayout]:
        return {
            "bytes": ArrayLayout((3,), np.dtype("uint8")),
            "wide": ArrayLayout((2, 5), np.dtype("float64")),
            "one": ArrayLayout((), np.dtype("int16")),
        }

    def threads_pay(self, values: Sequence[Any]) -> bool:
        return self.slow

    def decode_row(self, value: Any, out: Any) -> None:
        if self.slow:
            time.sleep(0.001)
        for array in out.values():
            array[...] = abs(value)
        if value < 0:
            raise ValueError(f"{value} is negative")
