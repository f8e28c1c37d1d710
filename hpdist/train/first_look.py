"""Checks before training which labelled rows of a run cannot be decoded."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from hpdist.data.decode.spec import InputSpec
from hpdist.data.sources.held_out import (
    MOST_LABELED,
    Look,
    look_through,
    refuse_unreadable,
    summarize_looks,
)
from hpdist.data.sources.labeled import LabeledRows
from hpdist.distributed.collectives import call_on_all_ranks, reports, sums, world_size


def look_at_labeled(rows: LabeledRows, spec: InputSpec) -> str | None:
    """Decode the labelled rows, or many of them; report which were not checked. Collective.

    Raises DataError, on all ranks, if some cannot be decoded.
    """
    looks = _everyones(look_through(rows, spec, _rank(), world_size(), most=MOST_LABELED))
    return call_on_all_ranks(lambda: refuse_unreadable(rows, looks))


def look_at_held_out(rows: LabeledRows, spec: InputSpec) -> tuple[str | None, set[int]]:
    """Report which held-out rows cannot be read, as far as time allows. Collective.

    Returns the ids of the rows in the message too.
    """
    looks = _everyones(look_through(rows, spec, _rank(), world_size()))
    named = [row.id for look in looks for row in look.bad][:1]
    return summarize_looks(rows.name, len(rows), looks), set(named)


def _everyones(own: Look) -> list[Look]:
    """What all ranks have found out, as that of one and then of those that found bad rows.

    Collective: only these send more than a number.
    """
    (looked_at,) = sums([own.looked_at])
    return [
        Look(looked_at, (), 0),
        *reports(replace(own, looked_at=0) if own.bad else None).values(),
    ]


def _rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0
