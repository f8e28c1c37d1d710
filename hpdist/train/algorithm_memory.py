"""What an algorithm holds beside the model: said before the start, refused where it cannot fit.

Two things can outgrow a rank: what is remembered of every unlabelled row, and what is held of the
whole global batch at once, which grows with the classes too. So do the sums of some algorithms.
"""

from __future__ import annotations

import os

import psutil
import torch

from hpdist.algorithms.addons.base import AddOn
from hpdist.algorithms.base import Algorithm
from hpdist.errors import ConfigError
from hpdist.train.config import Batch

_GIB = 2**30
_MORE_RANKS = "more ranks, each of which holds its share"
_SUMS_LOGGED_FROM = 16 << 20  # bytes, which take some milliseconds between machines
_LOGGED_FROM = 1.0  # GiB from which on it is worth a line


def check_memory(algorithm: Algorithm, device: torch.device, batch: Batch) -> list[str]:
    """Give lines for a person on what the algorithm takes of this rank's memory, if that is much.

    The algorithm is already bound to its rank. Rows that nobody has counted are left out. Raises
    ConfigError where it is more than there is: a bound from below, as the model needs some too.
    """
    name, room = type(algorithm).__name__, _room(device)
    rows, lines = algorithm.rows, []
    tables = 0 if rows is None else algorithm.remembered_bytes(rows)
    unlabeled = (batch.unlabeled or 0) if algorithm.views.uses_unlabeled else 0
    at_once = algorithm.batch_bytes(batch.labeled, unlabeled)
    if tables > room:
        raise ConfigError(
            f"algorithm: {name} remembers {rows:,} unlabelled rows, which needs "
            f"{tables / _GIB:,.1f} GiB on each rank, and there are {room / _GIB:,.1f}; use "
            f"{_ways(algorithm)}"
        )
    if tables + at_once > room:
        raise ConfigError(
            f"algorithm: {name} holds about {at_once / _GIB:,.1f} GiB of the global batch, "
            f"{unlabeled:,} unlabelled rows of every class, on each rank, and there are "
            f"{(room - tables) / _GIB:,.1f}; use a smaller batch.unlabeled, or another algorithm"
        )
    if tables > _LOGGED_FROM * _GIB:
        lines.append(f"{name} remembers {rows:,} rows: {tables / _GIB:,.1f} GiB on each rank")
    if at_once > _LOGGED_FROM * _GIB:
        lines.append(
            f"{name} holds about {at_once / _GIB:,.1f} GiB of the global batch on each rank; it "
            "grows with batch.unlabeled and the classes"
        )
    return lines


def describe_sums(algorithm: Algorithm, batch: Batch, world_size: int) -> list[str]:
    """Give a line for a person on the predictions that every step sums over ranks, if it is much.

    The algorithm is already bound to its rank.
    """
    unlabeled = (batch.unlabeled or 0) if algorithm.views.uses_unlabeled else 0
    size = algorithm.summed_bytes(batch.labeled, unlabeled)
    if world_size == 1 or size < _SUMS_LOGGED_FROM:
        return []
    return [
        f"{type(algorithm).__name__} sums {size / 2**20:,.0f} MiB over the ranks in every step: "
        f"numbers of every class for {unlabeled:,} unlabelled rows"
    ]


def _room(device: torch.device) -> int:
    """Bytes of a rank: its GPU's, or its share of this machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _ways(algorithm: Algorithm) -> str:
    ways = ["fewer unlabelled rows", "another algorithm or add-on"]
    inner: Algorithm | None = algorithm
    while inner is not None:
        if getattr(inner, "remembered", None) and ways[0] != _MORE_RANKS:
            ways = [_MORE_RANKS, *ways]
        if getattr(inner, "top", 0) is None:
            setting = f"addons: {inner.name}" if isinstance(inner, AddOn) else "algorithm"
            ways = [f"{setting}.top: 16, which keeps so many classes of a row", *ways]
        inner = inner.base if isinstance(inner, AddOn) else None
    return ", or ".join(ways)
