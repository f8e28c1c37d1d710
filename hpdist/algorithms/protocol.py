"""The protocol between an algorithm and an optimizer step: its one implementation.

Statistics of the weak views are reduced over the global batch and observed; the student is asked;
its own statistics, where there are any, are reduced; the loss is computed; and what the algorithm
remembers is committed, or discarded with a skipped step. Before, the algorithm may perturb and mix
what the student sees.

There is no engine, optimizer or process group in it: whoever does a step gives the micro-batches,
a `Model` to ask and a reduction, and differentiates the terms of the loss.

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
from hpdist.data.structures import Outputs, Structure, finite_mark, row_count, split, tensors_of
from hpdist.models.outputs import LOGITS

# No algorithm's own sums have such names.
_EXTRA, _ROWS, _FINITE = "(caller) {}", "(step) rows", "(step) not finite"


class PendingSums(Protocol):
    """A reduction that has begun."""

    def wait(self) -> dict[str, Tensor]:
        """Give the sums over the global batch, fp32, under their names."""
        ...


Reduce = Callable[[Mapping[str, Tensor]], PendingSums]
"""Begins to add up what every rank gives: tensors of the same names and shapes, in one order."""


class OwnSums:
    """The reduction where there is only one rank: its sums are those of the global batch."""

    def __init__(self, sums: Mapping[str, Tensor]) -> None:
        self._sums = {name: value.detach().float() for name, value in sums.items()}

    def wait(self) -> dict[str, Tensor]:
        """Give the sums, fp32, under their names."""
        return dict(self._sums)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of this rank, its views made."""

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
    """What the protocol asks of the model: its outputs for rows, fp32, heads among them.

    Where there is nothing but logits, they are one tensor; else tensors by name, [rows, *] each.
    """

    def targets(self, micros: Sequence[MicroBatch]) -> Sequence[Structure | None] | None:
        """Give what student or teacher says of each micro-batch's weak views, without gradient.

        The rows of all weak views lie end to end; with `Views.labeled_targets`, the labelled ones
        behind them. None stands for a micro-batch without weak views; None in place of the list
        says that `student` gives them, which only a step of one micro-batch can do.
        """
        ...

    def student(self, micro: MicroBatch) -> tuple[Structure, Structure | None]:
        """Give what the student says of `StudentInputs.parts`, end to end, with gradient.

        Behind it stands what `targets` left to this pass, if it did.
        """
        ...

    def preview(self, micro: MicroBatch) -> Structure:
        """Give what `student` will say of the same rows, without gradient."""
        ...

    def probe(self, inputs: Tensor) -> Structure:
        """Give what the student says of other inputs, with a gradient towards them."""
        ...


class Attempt:
    """One optimizer step of an algorithm, which is applied or skipped in the end.

    Args:
        algorithm: Bound to its rank already.
        micros: This rank's micro-batches; every rank has equally many.
        model: Is asked in the order that the protocol has.
        reduce: Called equally often, with the same names, on every rank.
        parts: Ranks times micro-batches: how many contributions make the global loss.
        extra: Sums of the caller's own that travel with the first reduction.
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
        """As they came; after `begin`, as the student sees them."""
        self.model = model
        self.parts = parts
        self.weak: list[WeakOutputs | None] = [None] * len(self.micros)
        """What was said of each micro-batch's weak views, as far as it has been asked."""
        self.extra: dict[str, Tensor] = {}
        """The caller's own sums over all ranks, once `judge` has been called."""
        self._own = dict(extra or {})
        self._reduce = reduce
        self._reduction: PendingSums | None = None
        self._rows: tuple[Tensor, Tensor] | None = None
        self._ahead: dict[str, Tensor] | None = None
        self._totals: dict[int, dict[str, Tensor]] = {}

    def begin(self) -> None:
        """Ask for the targets, begin to reduce their statistics, and make the student's inputs.

        The reduction is in flight until the first `judge` needs it.
        """
        self.collect()
        pairs = zip(self.micros, self.weak, strict=True)
        self.micros = [self._changed(micro, weak) for micro, weak in pairs]
        several = len(self.micros) > 1 and self.algorithm.uses_student_statistics
        if several and self._reduction is not None:
            # A micro-batch's loss depends on what the student says of the later ones.
            self.observe()
            self._ahead = self._sums_ahead()

    def collect(self) -> None:
        """Ask for the targets and begin to reduce their statistics.

        Nothing is done where the student's pass gives them.
        """
        outputs = self.model.targets(self.micros)
        if outputs is None:
            return
        pairs = zip(outputs, self.micros, strict=True)
        self.weak = [None if out is None else self._targets(out, micro) for out, micro in pairs]
        self._reduction = self._begin_reduction()

    def judge(self, number: int) -> LossTerms:
        """Ask the student about a micro-batch, and give its contributions to the loss."""
        outputs, targets = self.model.student(self.micros[number])
        if targets is not None:
            self.weak[number] = self._targets(targets, self.micros[number])
        if self._rows is None:
            self.observe()
        return self.terms(number, outputs)

    def terms(self, number: int, outputs: Structure) -> LossTerms:
        """Give the contributions of a micro-batch of which the student says `outputs`.

        A second call for the same micro-batch communicates nothing: it goes by the same sums over
        the global batch.
        """
        student = self.student_outputs(number, outputs)
        local = self.algorithm.student_statistics(student)
        if number not in self._totals:
            self._totals[number] = self._student_total(local)
        return self.algorithm.loss(student, self._attach(local, self._totals[number]))

    def weighted_terms(self, number: int, outputs: Structure) -> dict[str, Tensor]:
        """Give the same by name, as far as they depend on rows; each weighted as in the loss."""
        terms = self.terms(number, outputs)
        weighted = {"supervised": terms.supervised}
        if self.micros[number].uses_unlabeled:
            weighted["unsupervised"] = terms.unsupervised_weight * terms.unsupervised
        shared = {name: term / self.parts for name, term in terms.global_extras.items()}
        return weighted | dict(terms.extras) | shared

    def close(self, applied: bool) -> None:
        """Make what the algorithm remembers of this step final, or have it forget the step."""
        self.algorithm.commit() if applied else self.algorithm.discard()

    def observe(self) -> dict[str, Tensor]:
        """Wait for the sums, show them to the algorithm, and give what it was shown.

        A NaN in any weak view of any rank leaves every statistic as it was, and so does a global
        batch without a valid row.
        """
        algorithm = self.algorithm
        sums = (self._reduction or self._begin_reduction()).wait()
        self.extra = {name: sums.pop(_EXTRA.format(name)) for name in self._own}
        labeled, unlabeled = sums.pop(_ROWS).unbind()
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
        """Give the algorithm's view of what the student says of a micro-batch's rows."""
        assert self._rows is not None, "the sums over the global batch have not been observed"
        micro = self.micros[number]
        logits, heads = self._divided(outputs)
        views = split_views(logits, micro.inputs)
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
        )

    @torch.no_grad()
    def _begin_reduction(self) -> PendingSums:
        """Begin the one reduction of a step: the caller's sums, rows, and the algorithm's sums."""
        labeled = sum(micro.inputs.labeled_rows for micro in self.micros)
        rows = [labeled, sum(micro.unlabeled_rows for micro in self.micros)]
        device = next(tensors_of(self.micros[0].inputs.labels)).device
        sums = {_EXTRA.format(name): value for name, value in self._own.items()}
        sums[_ROWS] = torch.tensor(rows, device=device)
        weak = [outputs for outputs in self.weak if outputs is not None]
        if weak:
            sums[_FINITE] = add(finite_mark(part) for each in weak for part in each.everything)
            parts = [self.algorithm.statistics(outputs) for outputs in weak]
            sums |= {name: add(part[name] for part in parts) for name in parts[0]}
        return self._reduce(sums | self.algorithm.rank_statistics())

    @torch.no_grad()
    def _changed(self, micro: MicroBatch, weak: WeakOutputs | None) -> MicroBatch:
        """Give the micro-batch as the algorithm wants the student to see it."""
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
        """Cut what was said of all weak views, and of the labelled rows if they are behind them."""
        inputs = micro.inputs
        logits, heads = self._divided(outputs)
        sizes = [row_count(part) for part in inputs.weak]
        sizes.append(row_count(logits) - sum(sizes))
        first, *others, labeled = split(logits, sizes)
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
        """Give the student's global sums before its first backward."""
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
        """Give the student's global sums the gradient of this micro-batch's part of them.

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
    """Divide what a model said into the outputs that the task names, and its heads'.

    The outputs are one tensor where the task names nothing but `logits`, else tensors by name.
    """
    if isinstance(outputs, Tensor):
        return outputs, {}
    own = outputs["logits"] if tuple(names) == LOGITS else {name: outputs[name] for name in names}
    return own, {name: outputs[name] for name in heads}


def split_views(rows: Outputs, inputs: StudentInputs[Any, Any]) -> HeadOutputs[Outputs]:
    """Cut the rows of the student's pass into its views."""
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
    """Give an algorithm's state whole, from one rank's `state_dict` and every rank's `shards`."""
    whole = dict(state)
    for name in ranks[0]:
        parts = sorted((part for rank in ranks for part in rank[name]), key=lambda part: part[0])
        whole[name] = torch.cat([values for _, values in parts]) if parts else torch.empty(0)
    return whole


def add(values: Iterable[Tensor]) -> Tensor:
    """Give the sum of one or more tensors."""
    first, *rest = values
    for value in rest:
        first = first + value
    return first
