"""Compares an exported file with the model that it was made of, on real rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpdist.data.sources.held_out import evaluation_batches
from hpdist.data.sources.labeled import LabeledRows
from hpdist.data.structures import Structure, index, tensors_of
from hpdist.errors import ConfigError, describe
from hpdist.evaluate.loaded import LoadedModel
from hpdist.evaluate.measure import Measured, measure
from hpdist.messages.human import counted

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.25}
"""The largest difference of an output that passes, as a share of the largest output."""

_BATCHES = (1, 2, 3)


@dataclass(frozen=True)
class Verified:
    """What the comparison has found."""

    original: Measured
    exported: Measured
    relative: float
    """The largest difference of an output, as a share of the model's largest output."""
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON."""
        return {
            "rows": self.exported.rows,
            "relative_difference": self.relative,
            "tolerance": self.tolerance,
            "original": self.original.to_json(),
            "exported": self.exported.to_json(),
        }


def verify(
    original: LoadedModel, exported: LoadedModel, rows: LabeledRows, tolerance: float
) -> Verified:
    """Compare the outputs of batches of 1, 2 and 3 rows, and the scores of all rows.

    Raises ConfigError where the file cannot run such a batch, its outputs differ by more than the
    tolerance, or are not finite where the model's are.
    """
    inputs, valid = _some(original, rows)
    largest = worst = 0.0
    for start, size in zip((0, 1, 3), _BATCHES, strict=True):
        part = index(inputs, torch.arange(start, start + size) % len(valid))
        expected = original.outputs(part)
        try:
            found = exported.outputs(part)
        except Exception as error:  # the backend's own, of many kinds
            why = describe(error).splitlines()[0]
            raise ConfigError(
                f"--format: the exported file fails on {counted(size, 'row')}: {why}"
            ) from error
        largest, worst = _worse(expected, found, largest, worst)
    before, after = measure([original, exported], rows)
    worst = max(worst, after.largest_difference)
    found_here = Verified(before, after, worst / max(largest, 1e-12), tolerance)
    _require(found_here)
    return found_here


def _some(original: LoadedModel, rows: LabeledRows) -> tuple[Structure, torch.Tensor]:
    """Decode the first rows of the set that can be decoded."""
    size = sum(_BATCHES)
    for batch, valid in evaluation_batches(rows, original.spec, size, 0, 1):
        if bool(valid.any()):
            return index(batch.inputs, valid), valid[valid]
    raise ConfigError(f"{rows.name}: not one row can be decoded; name other rows to verify on")


def _worse(
    expected: Structure, found: Structure, largest: float, worst: float
) -> tuple[float, float]:
    """Give the largest output and the largest difference so far."""
    for one, other in zip(tensors_of(expected), tensors_of(found), strict=True):
        if one.shape != other.shape:
            raise ConfigError(
                f"--format: the exported file gives {list(other.shape)}, the model "
                f"{list(one.shape)}"
            )
        if one.is_floating_point() and bool(one.isfinite().all()):
            largest = max(largest, float(one.abs().max()))
            difference = (one.double() - other.double()).abs().max()
            worst = max(worst, float(torch.nan_to_num(difference, nan=torch.inf)))
    return largest, worst


def _require(found: Verified) -> None:
    broken = found.exported.not_finite - found.original.not_finite
    precision = found.exported.precision
    if broken > 0:
        raise ConfigError(
            f"--precision {precision}: outputs of {counted(broken, 'row')} are NaN or infinite in "
            "the exported file, which was not kept; choose fp32"
        )
    if not found.relative <= found.tolerance:
        raise ConfigError(
            f"--precision {precision}: outputs differ by {found.relative:.1e} of the largest one, "
            f"more than {found.tolerance:.1e}; {_agreement(found)}the file was not kept. Set "
            "--tolerance if that is good enough, or choose another precision"
        )


def _agreement(found: Verified) -> str:
    agreement = found.exported.agreement
    if agreement is None:
        return ""
    return f"{100 * agreement:.2f} % of {counted(found.exported.rows, 'row')} have the same label; "


def lines(found: Verified, in_percent: Sequence[str] | frozenset[str]) -> list[str]:
    """Say what was found, for people."""
    shown = []
    for name, before in found.original.scores.values.items():
        after = found.exported.scores.values[name]
        pair = f"{before:.4f} -> {after:.4f}"
        if name in in_percent:
            pair = f"{100 * before:.2f} % -> {100 * after:.2f} %"
        shown.append(f"{name} {pair}")
    return [
        f"verified on {counted(found.exported.rows, 'row')}, in batches of 1, 2, 3 and all: "
        f"{_agreement(found)}outputs differ by at most {found.relative:.1e} of the largest one "
        f"(tolerance {found.tolerance:.1e})",
        "; ".join(shown),
    ]
