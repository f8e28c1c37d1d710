"""The data of a run: read batch by batch, and tracked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.sources.held_out import evaluation_batches
from hpdist.data.sources.labeled import LabeledRows
from hpdist.data.stream import BatchStream
from hpdist.distributed.collectives import call_on_all_ranks
from hpdist.errors import DataError, HpdistError
from hpdist.messages.progress import working
from hpdist.tracking.audit import Audit
from hpdist.tracking.run_folder import RunFolder
from hpdist.train.bad_rows import BadRows
from hpdist.train.sets import RunSets


class RunData:
    """This rank's batches of the sets for training and evaluation.

    Args:
        sets: The sets of the run, opened.
        folder: The folder of the run.
        rank: This rank.
        world_size: The number of ranks.
        files: Whether the audit of unlabelled rows is written, if the settings ask for one.
    """

    def __init__(
        self, sets: RunSets, folder: RunFolder, rank: int, world_size: int, *, files: bool
    ) -> None:
        self.sets = sets
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self.config = sets.config
        """The run's settings, with those that views took from the rows and the model."""
        self.spec = sets.spec
        self.unlabeled_spec = sets.unlabeled_spec
        self.labeled = sets.labeled
        self.unlabeled = sets.unlabeled
        self.test = sets.test
        self.validation = sets.validation
        self.duplicates = sets.duplicates
        self.task = sets.task
        self.views = sets.views
        self.num_classes = sets.num_classes
        self.unlabeled_rows = sets.unlabeled_rows
        """The number of unlabelled rows, if it is known."""
        source, batch = self.config.data.unlabeled_rows, self.config.batch
        self._bad = BadRows(rank, None if source is None else source.max_bad_rows)
        for name, ids in sets.unreadable.items():
            self._bad.note_named(name, ids)
        self.labeled_stream: BatchStream[LabeledBatch] = self._stream(
            sets.labeled, batch.labeled, processes=0
        )
        self.streams: dict[str, BatchStream[Any]] = {"labeled": self.labeled_stream}
        self.unlabeled_stream: BatchStream[UnlabeledBatch] | None = None
        self._audit: Audit | None = None
        if sets.unlabeled is not None and source is not None:
            self.unlabeled_stream = self._unlabeled_stream()
            self.streams["unlabeled"] = self.unlabeled_stream
            if files and source.audit:
                self._audit = Audit(folder.path / "audit", rank)

    def _unlabeled_stream(self) -> BatchStream[UnlabeledBatch]:
        stored = self.sets.stored
        return self._stream(
            self.sets.unlabeled,
            self.config.batch.unlabeled,
            spec=self.unlabeled_spec,
            stored=None if stored is None else stored.take,
        )

    def _stream(self, rows: Any, batch: int, **options: Any) -> BatchStream[Any]:
        """Open this rank's stream of global batches of a set."""
        loading = self.config.data.loading
        settled: dict[str, Any] = {
            "spec": self.spec,
            "threads": loading.threads,
            "processes": loading.processes,
        }
        seed = self.config.run.seed
        return BatchStream(
            rows, batch, rank=self.rank, world_size=self.world_size, seed=seed, **settled | options
        )

    @property
    def fitted(self) -> dict[str, Tensor]:
        """Numbers that views and targets measured, for the checkpoint."""
        return self.sets.fitted

    def next(self) -> tuple[LabeledBatch, UnlabeledBatch | None]:
        """Return this rank's slices of the next global batches."""
        labeled = next(self.labeled_stream)
        return labeled, next(self.unlabeled_stream) if self.unlabeled_stream else None

    def following(self) -> tuple[LabeledBatch, UnlabeledBatch | None] | None:
        """Return what `next` will return, if it is at hand; nothing is taken."""
        labeled = self.labeled_stream.following
        unlabeled = None if self.unlabeled_stream is None else self.unlabeled_stream.following
        if labeled is None or (unlabeled is None and self.unlabeled_stream is not None):
            return None
        return labeled, unlabeled

    def iterate_once(self) -> Iterator[UnlabeledBatch]:
        """Iterate once over all unlabelled rows: this rank's slices, from the start of an epoch.

        Rows of the last batch that are not of epoch 0 only pad it. Collective: every rank must
        iterate over all of them; raises the same DataError on all ranks.
        """
        rows, batch = self.unlabeled_rows, self.config.batch.unlabeled
        if rows is None:
            raise DataError("data.unlabeled: the number of rows is not known")
        stream = self._unlabeled_stream()
        try:
            with working("going through the unlabelled rows", rows, "rows") as work:
                for _ in range(-(-rows // batch)):
                    call_on_all_ranks(stream.prefetch)
                    yield next(stream)
                    work.add(batch)
        finally:
            stream.close()

    def prefetch(self, should_stop: Callable[[], bool] = lambda: False) -> HpdistError | None:
        """Wait for the batches that `next` will return; return the error if there is one."""
        try:
            for stream in self.streams.values():
                stream.prefetch(should_stop)
        except HpdistError as error:
            return error
        return None

    @property
    def epoch(self) -> int:
        """The number of passes over the unlabelled rows, or without those the labelled ones."""
        return (self.unlabeled_stream or self.labeled_stream).epoch

    @property
    def waited(self) -> float:
        """Seconds that this rank has waited for rows."""
        return sum(stream.waited for stream in self.streams.values())

    def record_consumed(
        self, batch: UnlabeledBatch | None, attempt: int, applied: bool, bad_rows: int
    ) -> DataError | None:
        """Record what a step consumed; `bad_rows` are those of all ranks.

        Returns an error, the same on all ranks, if an epoch has had too many.
        """
        if batch is None:
            return None
        if self._audit is not None:
            self._audit.add(attempt, applied, batch)
        return self._bad.add(batch.bad, bad_rows, self.epoch)

    @property
    def bad_rows(self) -> int:
        """Rows of the whole run, on all ranks, that could not be used."""
        return self._bad.count

    def take_audit(self) -> Callable[[], None]:
        """Return a call that writes the audit up to now, for the checkpoint that includes it."""
        return self._audit.take() if self._audit is not None else lambda: None

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, besides the streams' positions."""
        return self._bad.state()

    def load_state(self, state: Mapping[str, Any], attempts: int) -> None:
        """Continue from a checkpoint; later audit records are dropped."""
        self._bad.load_state(state)
        self.drop_audit_after(attempts)

    def drop_audit_after(self, attempts: int) -> None:
        """Remove what an earlier process recorded about later attempts."""
        if self._audit is not None and self.folder.main:
            self._audit.drop_after(attempts)

    def evaluation_batches(self, rows: LabeledRows) -> Iterator[tuple[LabeledBatch, Tensor]]:
        """All rows of a measured set once, over all ranks."""
        batch, report = self.config.eval.batch, partial(self._bad.name_held_out, rows.name)
        return evaluation_batches(rows, self.spec, batch, self.rank, self.world_size, report)

    def close(self) -> None:
        """Stop the reading threads."""
        for stream in self.streams.values():
            stream.close()
