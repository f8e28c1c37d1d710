"""The protocol between an algorithm and an optimizer step: its only implementation.

Statistics of the weak views are reduced over the global batch and observed; the student runs; its
own statistics, if any, are reduced; the loss is computed; and what the algorithm remembers is
committed, or discarded with a skipped step. Before the student runs, the algorithm may perturb
and mix its inputs.

No engine, optimizer or process group is involved: the caller gives the micro-batches, a `Model`
and a reduction, and differentiates the terms of the loss.

    attempt = Attempt(algorithm, micros, model, reduce, parts=ranks * len(micros))
    attempt.begin()
    for number in range(len(micros)):
        attempt.judge(number).total(attempt.parts).backward()
    attempt.close(applied=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import HeadOutputs, StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.saved_state import Shards
from hpdist.algorithms.view_places import attach, attach_all, placed
from hpdist.data.structures import (
    Outputs,
    Structure,
    finite_mark,
    row_count,
    sent,
    split,
    tensors_of,
)
from hpdist.models.outputs import LOGITS

# No algorithm's own sums have names like these.
_EXTRA, _ROWS, _FINITE = "(caller) {}", "(step) rows", "(step) not finite"
_LABELS = "(step) labels"

TAKEN = 1 << 24
"""Added to the ids of a global batch that are given to `Algorithm.recall`, encoded by
`encode_ids`: so the first number of a position is 0 only where it has no row."""


class PendingSums(Protocol):
    """A reduction in flight."""

    def wait(self) -> dict[str, Tensor]:
        """Give the sums over the global batch, fp32, under their names."""
        ...


Reduce = Callable[[Mapping[str, Tensor]], PendingSums]
"""Begins to sum tensors over the ranks: the same names and shapes in the same order on each."""


class OwnSums:
    """The reduction on a single rank: its sums are those of the global batch."""

    def __init__(self, sums: Mapping[str, Tensor]) -> None:
        self._sums = {name: value.detach().float() for name, value in sums.items()}

    def wait(self) -> dict[str, Tensor]:
        """Give the sums, fp32, under their names."""
        return dict(self._sums)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of this rank, with its views."""

    inputs: StudentInputs[Any, Any]
    ids: Tensor | None  # [unlabeled], int64
    labeled_ids: Tensor | None  # [labeled], int64
    unlabeled_rows: int

    @property
    def uses_unlabeled(self) -> bool:
        """Whether there is any view of unlabelled rows."""
        inputs = self.inputs
        return bool(inputs.weak or inputs.student_weak or inputs.strong)


class Model(Protocol):
    """The model as the protocol uses it: its outputs for rows, fp32, including heads.

    If there are only logits, they are one tensor; else tensors by name, [rows, *] each.
    """

    def targets(self, micros: Sequence[MicroBatch]) -> Sequence[Structure | None] | None:
        """Give student's or teacher's outputs for each micro-batch's weak views, without gradient.

        The rows of all weak views are concatenated; with `Views.labeled_targets`, the labelled ones
        follow. None stands for a micro-batch without weak views; None in place of the list means
        that `student` gives them, which only works in a step of one micro-batch.
        """
        ...

    def student(self, micro: MicroBatch) -> tuple[Structure, Structure | None]:
        """Give the student's outputs for `StudentInputs.parts`, concatenated, with gradient.

        The second value holds the targets if `targets` left them to this pass.
        """
        ...

    def preview(self, micro: MicroBatch) -> Structure:
        """Give the outputs that `student` will give for the same rows, without gradient."""
        ...

    def probe(self, inputs: Tensor) -> Structure:
        """Give the student's outputs for other inputs, with a gradient towards these."""
        ...


class Attempt:
    """One optimizer step of an algorithm, which is applied or skipped in the end.

    Args:
        algorithm: Already bound to its rank.
        micros: This rank's micro-batches; every rank has the same number.
        model: Is called in the order of the protocol.
        reduce: Called equally often, with the same names, on every rank.
        parts: Ranks times micro-batches: how many contributions make the global loss.
        extra: The caller's own sums, which travel with the first reduction.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        micros: Sequence[MicroBatch],
        model: Model,
        reduce: Reduce = OwnSums,
        parts: int = 1,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.micros = list(micros)
        """The micro-batches; after `begin`, as the student sees them."""
        self.model = model
        self.parts = parts
        self.weak: list[WeakOutputs | None] = [None] * len(self.micros)
        """The outputs of each micro-batch's weak views, as far as they have been computed."""
        self.extra: dict[str, Tensor] = {}
        """The caller's own sums over all ranks, once `judge` has been called."""
        self._own = dict(extra or {})
        self._reduce = reduce
        self._reduction: PendingSums | None = None
        self._rows: tuple[Tensor, Tensor] | None = None
        self._label_count: Tensor | None = None
        self._ahead: dict[str, Tensor] | None = None
        self._totals: dict[int, dict[str, Tensor]] = {}

    def begin(self) -> None:
        """Compute the targets, begin to reduce their statistics, and make the student's inputs.

        The reduction is in flight until the first `judge` needs it.
        """
        if self.algorithm.recalls:
            self._recall()
        self.collect()
        pairs = zip(self.micros, self.weak, strict=True)
        self.micros = [self._changed(micro, weak) for micro, weak in pairs]
        several = len(self.micros) > 1 and self.algorithm.uses_student_statistics
        if several and self._reduction is not None:
            # A micro-batch's loss depends on the student's outputs for the later ones.
            self.observe()
            self._ahead = self._sums_ahead()

    def collect(self) -> None:
        """Compute the targets and begin to reduce their statistics.

        Does nothing if the student's pass gives them.
        """
        outputs = self.model.targets(self.micros)
        if outputs is None:
            return
        pairs = zip(outputs, self.micros, strict=True)
        self.weak = [None if out is None else self._targets(out, micro) for out, micro in pairs]
        self._reduction = self._begin_reduction()

    def judge(self, number: int) -> LossTerms:
        """Run the student on a micro-batch, and return its contributions to the loss."""
        outputs, targets = self.model.student(self.micros[number])
        if targets is not None:
            self.weak[number] = self._targets(targets, self.micros[number])
        if self._rows is None:
            self.observe()
        return self.terms(number, outputs)

    def terms(self, number: int, outputs: Structure) -> LossTerms:
        """Return the contributions of a micro-batch for which the student gives `outputs`.

        A second call for the same micro-batch communicates nothing: it uses the same sums over the
        global batch.
        """
        student = self.student_outputs(number, outputs)
        local = self.algorithm.student_statistics(student)
        if number not in self._totals:
            self._totals[number] = self._student_total(local)
        return self.algorithm.loss(student, self._attach(local, self._totals[number]))

    def weighted_terms(self, number: int, outputs: Structure) -> dict[str, Tensor]:
        """Return those that depend on rows, by name; each weighted as in the loss."""
        terms = self.terms(number, outputs)
        weighted = {"supervised": terms.supervised}
        if self.micros[number].uses_unlabeled:
            weighted["unsupervised"] = terms.unsupervised_weight * terms.unsupervised
        shared = {name: term / self.parts for name, term in terms.global_extras.items()}
        return weighted | dict(terms.extras) | shared

    def close(self, applied: bool) -> None:
        """Commit what the algorithm remembers of this step, or discard it."""
        self.algorithm.commit() if applied else self.algorithm.discard()

    def observe(self) -> dict[str, Tensor]:
        """Wait for the sums, pass them to the algorithm, and return them.

        A NaN in any weak view of any rank leaves every statistic as it was, and so does a global
        batch without a valid row.
        """
        algorithm = self.algorithm
        sums = (self._reduction or self._begin_reduction()).wait()
        self.extra = {name: sums.pop(_EXTRA.format(name)) for name in self._own}
        labeled, unlabeled = sums.pop(_ROWS).unbind()
        if algorithm.task.counts_labels:
            self._label_count = sums.pop(_LABELS).clamp(min=1)
        is_finite = unlabeled > 0
        if _FINITE in sums:
            is_finite = is_finite & (sums.pop(_FINITE) == 0)
        unlabeled = unlabeled.clamp(min=1)  # sums over no rows are 0, and so are their means
        algorithm.observe(sums, unlabeled)
        algorithm.is_finite = is_finite
        algorithm.pending = {
            name: torch.where(is_finite, value, algorithm.state[name])
            for name, value in algorithm.pending.items()
        }
        self._rows = labeled, unlabeled
        return sums

    def student_outputs(self, number: int, outputs: Structure) -> StudentOutputs:
        """Return the algorithm's view of the student's outputs for a micro-batch."""
        assert self._rows is not None, "the sums over the global batch have not been observed"
        micro = self.micros[number]
        logits, heads = self._divided(outputs)
        views = placed(split_views(logits, micro.inputs), micro.inputs.view_places)
        return StudentOutputs(
            labeled=views.labeled,
            labels=micro.inputs.labels,
            strong=views.strong,
            weak=self.weak[number],
            labeled_rows=self._rows[0],
            unlabeled_rows=self._rows[1],
            student_weak=views.student_weak,
            strong_labeled=views.strong_labeled,
            context=micro.inputs.context,
            extra_inputs=views.extra_inputs,
            heads={name: split_views(head, micro.inputs) for name, head in heads.items()},
            label_count=self._label_count,
        )

    @torch.no_grad()
    def _begin_reduction(self) -> PendingSums:
        """Begin the one reduction of a step: the caller's sums, rows, and the algorithm's sums."""
        labeled = sum(micro.inputs.labeled_rows for micro in self.micros)
        rows = [labeled, sum(micro.unlabeled_rows for micro in self.micros)]
        device = next(tensors_of(self.micros[0].inputs.labels)).device
        sums = {_EXTRA.format(name): value for name, value in self._own.items()}
        sums[_ROWS] = sent(torch.tensor(rows), device)
        if self.algorithm.task.counts_labels:
            labels = [micro.inputs.labels for micro in self.micros]
            sums[_LABELS] = add(self.algorithm.task.label_counts(part).sum() for part in labels)
        weak = [outputs for outputs in self.weak if outputs is not None]
        if weak:
            sums[_FINITE] = add(finite_mark(part) for each in weak for part in each.everything)
            parts = [self.algorithm.statistics(outputs) for outputs in weak]
            sums |= {name: add(part[name] for part in parts) for name in parts[0]}
        return self._reduce(sums | self.algorithm.rank_statistics())

    @torch.no_grad()
    def _recall(self) -> None:
        """Have the ranks that remember this global batch's rows tell the others."""
        ids = add(_global_ids(micro) for micro in self.micros)
        everyone = self._reduce({"ids": ids}).wait()["ids"]
        self.algorithm.take_recalled(self._reduce(self.algorithm.recall(everyone)).wait())

    @torch.no_grad()
    def _changed(self, micro: MicroBatch, weak: WeakOutputs | None) -> MicroBatch:
        """Return the micro-batch as the algorithm has the student see it."""
        views, inputs = self.algorithm.views, micro.inputs
        if views.needs_gradient_probe and weak is not None:
            with torch.enable_grad():
                inputs = self.algorithm.perturb(inputs, weak, self._probe)
        targets = weak if views.inputs_need_targets else None
        return replace(micro, inputs=self.algorithm.mix(inputs, targets))

    def _probe(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self._divided(self.model.probe(inputs))[0]
        return logits

    def _divided(self, outputs: Structure) -> tuple[Any, dict[str, Tensor]]:
        return outputs_and_heads(outputs, self.algorithm.task.outputs, self.algorithm.head_names)

    def _targets(self, outputs: Structure, micro: MicroBatch) -> WeakOutputs:
        """Split the outputs of all weak views, and of the labelled rows if they follow."""
        inputs = micro.inputs
        logits, heads = self._divided(outputs)
        sizes = [row_count(part) for part in inputs.weak]
        sizes.append(row_count(logits) - sum(sizes))
        first, *others, labeled = split(logits, sizes)
        if inputs.view_places is not None:
            first, *others = attach_all([first, *others], inputs.view_places.weak)
            labeled = attach(labeled, inputs.view_places.labeled)
        kept = len(sizes) if sizes[-1] else len(sizes) - 1
        return WeakOutputs(
            first,
            micro.ids,
            tuple(others),
            labeled if sizes[-1] else None,
            inputs.labels,
            inputs.positions,
            {name: tuple(split(head, sizes)[:kept]) for name, head in heads.items()},
            micro.labeled_ids,
        )

    @torch.no_grad()
    def _sums_ahead(self) -> dict[str, Tensor]:
        """Reduce the student's global sums before its first backward."""
        parts = []
        for number, micro in enumerate(self.micros):
            outputs = self.student_outputs(number, self.model.preview(micro))
            parts.append(self.algorithm.student_statistics(outputs))
        return self._reduce({name: add(part[name] for part in parts) for name in parts[0]}).wait()

    def _student_total(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._ahead is not None:
            return self._ahead
        return self._reduce(local).wait() if local else {}

    def _attach(self, local: Mapping[str, Tensor], total: Mapping[str, Tensor]) -> Sums:
        """Attach to the student's global sums the gradient of this micro-batch's part of them.

        Every part computes the same function f of the sums and contributes f / parts, so the
        gradient of a part is scaled up by the number of parts.
        """
        return {
            name: total[name] + self.parts * (value - value.detach())
            for name, value in local.items()
        }


def outputs_and_heads(
    outputs: Structure, names: Sequence[str], heads: Sequence[str]
) -> tuple[Any, dict[str, Tensor]]:
    """Split a model's output into the outputs that the task names, and those of heads.

    The former are one tensor if the task names only `logits`, else tensors by name.
    """
    if isinstance(outputs, Tensor):
        return outputs, {}
    own = outputs["logits"] if tuple(names) == LOGITS else {name: outputs[name] for name in names}
    return own, {name: outputs[name] for name in heads}


def split_views(rows: Outputs, inputs: StudentInputs[Any, Any]) -> HeadOutputs[Outputs]:
    """Split the rows of the student's pass into its views."""
    views = iter(split(rows, [row_count(part) for part in inputs.parts]))
    return HeadOutputs(
        next(views),
        *(
            tuple(next(views) for _ in part)
            for part in (
                inputs.student_weak,
                inputs.strong,
                inputs.strong_labeled,
                inputs.extra_inputs,
            )
        ),
    )


def join_shards(state: Mapping[str, Tensor], ranks: Sequence[Shards]) -> dict[str, Tensor]:
    """Return an algorithm's whole state, from one rank's `state_dict` and every rank's `shards`."""
    whole = dict(state)
    for name in ranks[0]:
        parts = sorted((part for rank in ranks for part in rank[name]), key=lambda part: part[0])
        whole[name] = torch.cat([values for _, values in parts]) if parts else torch.empty(0)
    return whole


def _global_ids(micro: MicroBatch) -> Tensor:
    """Encode a micro-batch's ids at their positions in the global batch, fp32 [global batch, 2]."""
    ids = micro.inputs.known_ids + TAKEN
    positions = micro.inputs.positions
    rows = torch.stack((ids >> 24, ids & (TAKEN - 1)), dim=1).float()
    whole = rows.new_zeros(positions.unlabeled_rows, 2)
    return whole.index_copy(0, sent(positions.unlabeled, rows.device), rows)


def add(values: Iterable[Tensor]) -> Tensor:
    """Return the sum of one or more tensors."""
    first, *rest = values
    for value in rest:
        first = first + value
    return first
