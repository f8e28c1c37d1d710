"""Splits a step's batches into micro-batches, with the views that an algorithm needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import StudentInputs, ViewPlaces
from hpdist.algorithms.parts.mixing import check_group_sizes
from hpdist.algorithms.positions import BatchPositions
from hpdist.algorithms.protocol import MicroBatch
from hpdist.data.batch import STORED, LabeledBatch, UnlabeledBatch
from hpdist.data.structures import Rows, map_tensors
from hpdist.data.views.base import GradedViews, MappedViews, Views, unmixable
from hpdist.data.views.places import Place, place_of
from hpdist.errors import ConfigError
from hpdist.tasks.base import Task

_log = logging.getLogger("hpdist.train.step")


@dataclass(frozen=True)
class MicroBatcher:
    """Splits a rank's slices of the global batches.

    Args:
        algorithm: Gives the views to make.
        views: Makes them.
        parts: Micro-batches per step.
        rank: This process.
        ranks: The number of ranks that share a global batch.
        device: The device of the views.
        seed: Of the algorithm's own noise.
    """

    algorithm: Algorithm
    views: Views
    parts: int
    rank: int
    ranks: int
    device: torch.device
    seed: int

    @torch.no_grad()
    def split(
        self, labeled: LabeledBatch[Any, Any], unlabeled: UnlabeledBatch[Any] | None, step: int
    ) -> Iterator[MicroBatch]:
        """Return the micro-batches of a step.

        Raises ConfigError if rows are missing or left over, if a group of rows to mix has too few,
        or if the algorithm changes inputs that cannot be added.
        """
        unlabeled = self._check(labeled, unlabeled)
        part = len(labeled) // self.parts
        u_part = 0 if unlabeled is None else len(unlabeled) // self.parts
        for number in range(self.parts):
            index = self.rank * self.parts + number
            x = labeled.narrow(number * part, part)
            u = None if unlabeled is None else unlabeled.narrow(number * u_part, u_part)
            yield self._make(x, u, index * part, index * u_part, step)

    def _check(
        self, labeled: LabeledBatch[Any, Any], unlabeled: UnlabeledBatch[Any] | None
    ) -> UnlabeledBatch[Any] | None:
        algorithm = self.algorithm
        name = type(algorithm).__name__
        self._check_mixable(unmixable(self.views))
        if not algorithm.views.uses_unlabeled:
            unlabeled = None
        elif unlabeled is None:
            raise ConfigError(f"{name} needs unlabelled rows; give a batch of them")
        sizes = {"labeled": len(labeled)} | ({"unlabeled": len(unlabeled)} if unlabeled else {})
        for setting, size in sizes.items():
            what = setting.replace("labeled", "labelled")
            if size % self.parts:
                raise ConfigError(
                    f"{size} {what} rows per rank do not divide into {self.parts} micro-batches"
                )
        if algorithm.groups is not None and unlabeled is not None:
            whole = {setting: size * self.ranks for setting, size in sizes.items()}
            slices = self.ranks * self.parts
            note = check_group_sizes(name, algorithm.groups, whole, slices, algorithm.mixed)
            if note is not None and self.rank == 0:
                _warn_once(note)
        return unlabeled

    def _check_mixable(self, what: str | None) -> None:
        """Raise ConfigError if the algorithm cannot change such inputs."""
        if what is not None and self.algorithm.changes_inputs:
            raise ConfigError(
                f"{type(self.algorithm).__name__} mixes inputs, adds to them or reconstructs them, "
                f"which {what} do not allow; choose an algorithm that does not, such as FixMatch"
            )

    def _make(
        self,
        labeled: LabeledBatch[Any, Any],
        unlabeled: UnlabeledBatch[Any] | None,
        at: int,
        u_at: int,
        step: int,
    ) -> MicroBatch:
        labeled = labeled.to(self.device, non_blocking=True)
        inputs = self._labeled_inputs(labeled, at, step)
        if unlabeled is None:
            none = torch.empty(0, dtype=torch.int64)
            return MicroBatch(inputs, none.to(self.device), labeled.ids, 0)
        whole = len(unlabeled) * self.parts * self.ranks
        unlabeled, lines = unlabeled.only_valid()
        unlabeled = unlabeled.to(self.device, non_blocking=True)
        inputs = self._with_unlabeled(inputs, unlabeled, u_at + lines, whole)
        return MicroBatch(inputs, unlabeled.ids, labeled.ids, len(unlabeled))

    def _labeled_inputs(
        self, labeled: LabeledBatch[Any, Any], at: int, step: int
    ) -> StudentInputs[Any, Any]:
        """Make the views of labelled rows, the first of which is at `at` of the global batch."""
        positions = torch.arange(at, at + len(labeled))
        weak, strong = (
            partial(make, labeled.inputs, stream="labeled", step=step, positions=positions)
            for make in (self._viewed("weak"), self._viewed("strong"))
        )
        rows, place = weak()
        if not isinstance(rows, Tensor):
            self._check_mixable("inputs of several tensors")
        elif not rows.is_floating_point():
            self._check_mixable(f"{str(rows.dtype).removeprefix('torch.')} values")
        views, places = _parted(
            strong(copy=copy) for copy in range(self.algorithm.views.strong_labeled)
        )
        none = torch.empty(0, dtype=torch.int64)
        whole = len(labeled) * self.parts * self.ranks
        return StudentInputs(
            labeled=rows,
            labels=labeled.labels,
            student_weak=(),
            strong=(),
            strong_labeled=views,
            weak=(),
            positions=BatchPositions(positions, none, whole, 0, self.seed, step),
            view_places=None if place is None else ViewPlaces(place, strong_labeled=places),
        )

    def _with_unlabeled(
        self,
        inputs: StudentInputs[Any, Any],
        unlabeled: UnlabeledBatch[Any],
        positions: Tensor,
        whole: int,
    ) -> StudentInputs[Any, Any]:
        """Add the views of unlabelled rows; `whole` is how many the global batch has."""
        wanted, step = self.algorithm.views, inputs.positions.step
        weak, strong = (
            partial(make, unlabeled.inputs, stream="unlabeled", step=step, positions=positions)
            for make in (self._viewed("weak"), self._strong)
        )
        student_weak, student_places = _parted(
            weak(copy=wanted.weak + copy) for copy in range(wanted.student_weak)
        )
        strong_rows, strong_places = _parted(strong(copy=copy) for copy in range(wanted.strong))
        weak_rows, weak_places = _parted(weak(copy=copy) for copy in range(wanted.weak))
        places = inputs.view_places
        if places is not None:
            places = replace(
                places, student_weak=student_places, strong=strong_places, weak=weak_places
            )
        return replace(
            inputs,
            student_weak=student_weak,
            strong=strong_rows,
            weak=weak_rows,
            positions=replace(inputs.positions, unlabeled=positions, unlabeled_rows=whole),
            ids=unlabeled.ids,
            context=self._stored(unlabeled),
            view_places=places,
        )

    def _stored(self, unlabeled: UnlabeledBatch[Any]) -> dict[str, Tensor]:
        """Return what is stored of the rows, for the loss, if the algorithm uses it.

        Raises ConfigError if nothing is.
        """
        if not self.algorithm.views.stored_labels:
            return {}
        if unlabeled.stored is None:
            raise ConfigError(
                f"{type(self.algorithm).__name__} learns from stored labels, and the batch has "
                "none; set data.unlabeled.pseudo_labels, or give hpdist.UnlabeledBatch(…, stored=…)"
            )
        return {STORED + name: cast(Tensor, kept) for name, kept in unlabeled.stored.items()}

    def _strong(self, x: Any, *, stream: str, step: int, positions: Tensor, copy: int = 0) -> Any:
        """Make a strong view, with the algorithm's number of operations if views can be graded."""
        wanted, views = self.algorithm.views.operations, self.views
        make = self._viewed("strong")
        if copy < len(wanted) and isinstance(views, GradedViews):
            make = partial(self._viewed("graded"), operations=wanted[copy])
        return make(x, stream=stream, step=step, positions=positions, copy=copy)

    def _viewed(self, kind: str) -> Callable[..., tuple[Any, Place | None]]:
        """Make views of a kind, each with the place of its pixels if the task's labels have one."""
        if not self.algorithm.task.labels_have_places:
            make = getattr(self.views, kind)
            return lambda x, **where: (make(x, **where), None)
        mapped = getattr(self.views, f"{kind}_with_maps")

        def viewed(x: Tensor, **where: Any) -> tuple[Any, Place]:
            found = mapped(x, **where)
            return found.rows, place_of(found, x)

        return viewed


def _parted(views: Iterable[tuple[Any, Any]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Part views from their places."""
    pairs = list(views)
    return tuple(rows for rows, _ in pairs), tuple(place for _, place in pairs)


def require_maps(task: Task, views: Views) -> None:
    """Raise ConfigError if the task's labels have places and the views do not say where they go."""
    if task.labels_have_places and not isinstance(views, MappedViews):
        raise ConfigError(
            f"views.name: labels of task {task.name} have a place in the picture, and "
            f"{type(views).__name__} do not say where pixels go; use image or identity, or views "
            "of your own with the methods of hpdist.data.views.MappedViews"
        )


@cache
def _warn_once(text: str) -> None:
    _log.warning(text)


def channels_last(inputs: Rows) -> Rows:
    """Images as channels-last, which suits half-precision convolutions; others unchanged."""
    return map_tensors(_channels_last, inputs)


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4 or not tensor.is_floating_point():
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)
