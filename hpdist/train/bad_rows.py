"""Rows that a run cannot use: counted over all ranks, and named by the rank that read them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hpdist.data.batch import BadRow
from hpdist.distributed.collectives import gathered
from hpdist.errors import DataError

_NAMED = 20  # rows of an epoch that each rank writes to the log

_log = logging.getLogger("hpdist.data")


class BadRows:
    """The number of unlabelled rows that could not be used, and the names of some of them.

    Args:
        rank: This rank.
        most: The allowed number of bad rows per epoch; None without a set of unlabelled rows.
    """

    def __init__(self, rank: int, most: int | None) -> None:
        self._rank = rank
        self.count = 0
        """Bad rows of the whole run, of all ranks."""
        self._most = most
        self._in_epoch = (0, 0)  # epoch, rows
        self._recent: list[BadRow] = []  # of this rank, in this epoch
        self._held_out: dict[str, set[int]] = {}

    def add(self, rows: tuple[BadRow, ...], count: int, now: int) -> DataError | None:
        """Record a step's bad rows: this rank's, the number on all ranks, and the epoch.

        Returns an error, the same on all ranks, if the epoch has had too many.
        """
        epoch, before = self._in_epoch
        if now != epoch:
            epoch, before, self._recent = now, 0, []
        self._in_epoch = (epoch, before + count)
        self.count += count
        for row in rows:
            self._name(row)
        if not count or self._most is None or before + count <= self._most:
            return None
        named = [row for rank in gathered(self._recent[-3:]) for row in rank]
        return DataError(
            f"data.unlabeled.max_bad_rows: {before + count} rows of epoch {epoch} could not be "
            f"used, and {self._most} are allowed; among them: {'; '.join(map(str, named[:3]))}; "
            "fix or remove them, or raise the limit, and start again: the run continues from here"
        )

    def _name(self, row: BadRow) -> None:
        self._recent.append(row)
        if len(self._recent) <= _NAMED:
            _log.warning("rank %d: an unlabelled row is left out: %s", self._rank, row)
        if len(self._recent) == _NAMED:
            _log.warning(
                "rank %d: further rows of this epoch are counted but not named; "
                "data.unlabeled.audit: true records each of them",
                self._rank,
            )

    def note_named(self, name: str, ids: set[int]) -> None:
        """Record rows of a held-out set that were already named."""
        self._held_out.setdefault(name, set()).update(ids)

    def name_held_out(self, name: str, row: BadRow) -> None:
        """Name, once, a row of a measured set that is left out of the scores."""
        named = self._held_out.setdefault(name, set())
        if row.id in named or len(named) == _NAMED:
            return
        named.add(row.id)
        _log.warning("rank %d: %s: a row is left out of the scores: %s", self._rank, name, row)
        if len(named) == _NAMED:
            _log.warning("rank %d: %s: further ones are only counted", self._rank, name)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"bad_rows": self.count, "bad_in_epoch": self._in_epoch}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.count = state["bad_rows"]
        self._in_epoch = tuple(state["bad_in_epoch"])
