"""One optimizer step of semi-supervised training: the plug-in for a loop of one's own.

accelerator = Accelerator()
model, optimizer = accelerator.prepare(hpdist.global_batch_norm(model), optimizer)
step = SemiSupervisedStep(accelerator, model, optimizer, FixMatch(), views)
for labeled, unlabeled in batches:      # this rank's slices of the global batches
    outcome = step(labeled, unlabeled)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpdist.algorithms.base import (
    Algorithm,
    LossTerms,
    StudentOutputs,
    Sums,
    WeakOutputs,
)
from hpdist.algorithms.parts.mixing import check_groups
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.structures import Structure, cat, detach, narrow, row_count, split
from hpdist.data.views.base import Views
from hpdist.distributed.collectives import FusedSum, apart
from hpdist.distributed.stragglers import OwnTime
from hpdist.engines.base import Engine, EngineStep
from hpdist.engines.config import LossScale, Precision
from hpdist.engines.overflow import Culprit, OverflowHistory, find_culprit
from hpdist.engines.prepare import make_engine
from hpdist.engines.teacher import ShardedTeacher
from hpdist.errors import ConfigError
from hpdist.evaluate.scoring import evaluating
from hpdist.models.outputs import LOGITS
from hpdist.models.with_heads import head_names_of, require_heads
from hpdist.train import pseudo_label_metrics as pseudo_labels
from hpdist.train.micro_batch import Cutter, MicroBatch, by_view, channels_last
from hpdist.train.optim import l1_norm
from hpdist.train.outcome import StepOutcome
from hpdist.train.step_state import join_save_state

__all__ = ["SemiSupervisedStep", "StepOutcome"]


@dataclass(frozen=True)
class _Pass:
    """What a micro-batch's pass leaves: for the log, and to go through again after an overflow."""

    micro: MicroBatch
    weak: WeakOutputs | None
    rows: tuple[Tensor, Tensor]  # labelled and unlabelled rows of the global batch
    total: Mapping[str, Tensor]  # the student's global sums
    contributions: Mapping[str, Tensor]


class SemiSupervisedStep:
    """Views, weak pass, one reduction, student pass, loss, backward, optimizer, teacher, commit.

    The batches given to it are this rank's slices, in rank order, of the global batches; every
    rank must give slices of the same size. Collective: every rank must call it equally often.
    `accelerator.save_state` and `load_state` save and load all that it remembers.

    Args:
        accelerator: What prepared `model` and `optimizer`.
        model: Prepared; maps inputs, as batches have them, to logits [rows, classes], or to an
            output with `.logits`, or to all the outputs that the algorithm's task names.
        optimizer: Prepared with the model.
        algorithm: What the loss is; its state must live on the accelerator's device.
        views: Makes weak and strong views of the inputs.
        micro_batches: Forwards and backwards that a step is cut into. Under DeepSpeed it must equal
            `gradient_accumulation_steps`.
        decay: The teacher's; `None` keeps no teacher.
        teacher_warmup: Whether the teacher's decay starts small.
        grad_clip: Largest global gradient norm. Under DeepSpeed its own config decides.
        precision: Only for fp16 on a CPU, where Accelerate does not know it.
        loss_scale: Of fp16 without DeepSpeed, whose own config decides otherwise.
        teacher_model: A second, unprepared model like the first: needed under ZeRO-3 by an
            algorithm whose targets come from the teacher.
        seed: Of what the algorithm draws, such as how it mixes rows.
        l1: Weight of the L1 norm of the weights, a term of the loss.

    Raises ConfigError where `l1` is given and ZeRO-3 shards the weights, or where the algorithm
    wants a teacher that there is none of, or heads that the model has not (`hpdist.with_heads` adds
    them), or mixes rows within groups that ranks and micro-batches cut apart.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: Algorithm,
        views: Views,
        *,
        micro_batches: int = 1,
        decay: float | None = 0.999,
        teacher_warmup: bool = True,
        grad_clip: float | None = None,
        precision: Precision | None = None,
        loss_scale: LossScale | None = None,
        teacher_model: nn.Module | None = None,
        seed: int = 0,
        l1: float = 0.0,
    ) -> None:
        self.engine: Engine = make_engine(accelerator, model, optimizer, precision, loss_scale)
        self.algorithm = algorithm
        algorithm.take_place(self.engine.rank, self.engine.world_size)
        self.views = views
        self.micro_batches = micro_batches
        self.grad_clip = grad_clip
        self.l1 = l1
        if l1 and not self.engine.whole_parameters():
            raise ConfigError("optim.l1: ZeRO-3 shards the weights; use zero.stage 0, 1 or 2")
        self.teacher = None if decay is None else ShardedTeacher(self.engine, decay, teacher_warmup)
        self.history = OverflowHistory()
        self.own_time = OwnTime(self.engine.device)
        """Begins with a step, or before it where one begins it to count the reading of rows."""
        self.applied_steps = 0
        self.attempts = 0
        """Steps begun, skipped ones included; the views' noise is keyed by it."""
        views_wanted = algorithm.views
        if views_wanted.teacher and self.teacher is None:
            raise ConfigError(f"{type(algorithm).__name__} needs a teacher; give its decay")
        if self.teacher is not None and views_wanted.teacher:
            self.teacher.prepare_forward(teacher_model)
        if algorithm.groups is not None:
            check_groups(algorithm.groups, self._parts)
        require_heads(algorithm, head_names_of(self.engine.module))
        self.engine.want(algorithm.task.outputs, algorithm.head_names)
        self._noted = torch.zeros(4)
        alone = views_wanted.teacher or views_wanted.inputs_need_targets or views_wanted.probed
        one_pass = micro_batches == 1 and not alone
        self._fused = self.engine.fuses_weak_pass and one_pass
        self._seed = seed
        join_save_state(self)

    def evaluating(self, *, teacher: bool = True) -> AbstractContextManager[Callable[[Any], Any]]:
        """Have the model in evaluation mode for a while, with the teacher's weights if there are.

        with step.evaluating() as predict:
            logits = predict(inputs)        # inputs as in batches; logits fp32 [rows, classes]

        Of a task that goes by more than logits, `predict` gives its outputs by name.
        Collective: every rank must enter, and under ZeRO-3 call `predict` equally often.
        """
        return evaluating(self.engine, self.teacher if teacher else None, self.views)

    def __call__(
        self,
        labeled: LabeledBatch[Any, Any],
        unlabeled: UnlabeledBatch[Any] | None = None,
        *,
        lr: float | None = None,
        measure: bool = False,
        tell: Mapping[str, float] | None = None,
        stop: bool = False,
        save: bool = False,
    ) -> StepOutcome:
        """Do one optimizer step.

        Args:
            labeled: This rank's slice of the labelled global batch.
            unlabeled: The same of the unlabelled one; ignored by an algorithm that wants no views.
            lr: Learning rate of this step; by default the optimizer keeps its own.
            measure: Also say what the step did, at the cost of a wait for the device.
            tell: Numbers of this rank that every rank's outcome holds then, under the same names
                on all.
            stop: Whether this rank wants the run to stop after this step, as when it cannot read
                its next rows. Every rank's outcome says so then, at no further communication.
            save: Whether it wants a checkpoint after this step; likewise.

        Raises ConfigError where rows are missing or do not divide into micro-batches, and
        PrecisionError where overflow has no end.
        """
        if not self.engine.module.training:  # setting it walks over all modules
            self.engine.module.train()
        self.own_time.begin()
        notes = self._notes(unlabeled, stop, save)
        engine = self.engine
        cutter = Cutter(
            self.algorithm,
            self.views,
            self.micro_batches,
            engine.rank,
            engine.world_size,
            engine.device,
            self._seed,
        )
        micros = list(cutter.cut(labeled, unlabeled, self.attempts))
        if engine.forward_communicates or self.algorithm.views.teacher:
            self.own_time.end()
        weak: list[WeakOutputs | None] = [None] * len(micros)
        rows = reduction = ahead = None
        if not self._fused:
            weak = self._weak_passes(micros)
            # In flight during the student's first pass.
            reduction = self._reduce(micros, weak, notes)
        micros = [self._mixed(micro, said) for micro, said in zip(micros, weak, strict=True)]
        if reduction is not None and self._needs_sums_ahead:
            rows = self._observe(reduction)
            ahead = self._student_sums_ahead(micros, weak, rows)
        passes: list[_Pass] = []
        for number, micro in enumerate(micros):
            with self.engine.accumulate(last=number == len(micros) - 1):
                logits = self._student_pass(micro)
                if self._fused:
                    logits, weak = self._split_fused(logits, micro)
                if rows is None:
                    rows = self._observe(reduction or self._reduce(micros, weak, notes))
                outputs = self._outputs(logits, micro, weak[number], rows)
                local = self.algorithm.student_statistics(outputs)
                total = FusedSum(local).wait() if local and ahead is None else ahead or {}
                terms = self._penalized(self.algorithm.loss(outputs, self._attach(local, total)))
                self.engine.backward(terms.total(self._parts))
                contributions = terms.contributions(self._parts) if measure else {}
                passes.append(_Pass(micro, weak[number], rows, total, contributions))
        done = self.engine.step(lr, self.grad_clip)
        self.attempts += 1
        culprit = self._close(done, passes)
        metrics, classes, ranks = self._measure(passes, tell or {}) if measure else ({}, {}, {})
        bad_rows, stops, saves, missed = (round(note) for note in self._noted.tolist())
        if missed:
            self.engine.share_usage()
        return StepOutcome(
            done.applied,
            done.overflowed,
            done.old_scale,
            done.new_scale,
            done.grad_norm,
            culprit,
            metrics,
            classes,
            ranks,
            bad_rows,
            stops > 0,
            saves > 0,
        )

    @property
    def _parts(self) -> int:
        """How many contributions make the global loss."""
        return self.engine.world_size * self.micro_batches

    def _weak_passes(self, micros: list[MicroBatch]) -> list[WeakOutputs | None]:
        """What student or teacher says of the weak views, without gradient."""
        teacher = self.teacher if self.algorithm.views.teacher else None
        found: list[WeakOutputs | None] = []
        with nullcontext(self.engine.infer) if teacher is None else teacher.forward() as infer:
            for micro in micros:
                parts = list(micro.inputs.weak)
                if parts and self.algorithm.views.labeled_targets:
                    parts.append(micro.inputs.labeled)
                logits = infer(channels_last(cat(parts))) if parts else None
                found.append(None if logits is None else self._weak_outputs(logits, micro))
        return found

    @torch.no_grad()
    def _mixed(self, micro: MicroBatch, weak: WeakOutputs | None) -> MicroBatch:
        """The micro-batch as the algorithm wants the student to see it."""
        views, inputs = self.algorithm.views, micro.inputs
        if views.probed and weak is not None:
            with torch.enable_grad():
                inputs = self.algorithm.perturb(inputs, weak, self._probe)
        told = weak if views.inputs_need_targets else None
        return replace(micro, inputs=self.algorithm.mix(inputs, told))

    def _probe(self, inputs: Tensor) -> Any:
        """Logits of inputs outside of the step's own passes; nothing remembers that they were."""
        said = self.engine.examine(channels_last(inputs))
        self.engine.forget_norms()
        return self._columns(said)[0]

    def _columns(self, said: Structure) -> tuple[Any, dict[str, Tensor]]:
        """The outputs that the task goes by, of what the model said, and each head's."""
        if isinstance(said, Tensor):
            return said, {}
        outputs, heads = self.algorithm.task.outputs, self.algorithm.head_names
        own = said["logits"] if outputs == LOGITS else {name: said[name] for name in outputs}
        return own, {name: said[name] for name in heads}

    def _student_pass(self, micro: MicroBatch) -> Any:
        """Outputs of the student's rows, and of the weak views behind them if fused."""
        parts, weak = micro.inputs.parts, micro.inputs.weak if self._fused else ()
        batches = [[parts[0]], parts[1:]] if self.algorithm.normalizes_apart else [parts]
        rows = [sum(row_count(part) for part in batch) for batch in (*batches, weak) if batch]
        with self.engine.segments(rows):
            return self.engine.forward(channels_last(cat([*parts, *weak])))

    def _split_fused(
        self, said: Structure, micro: MicroBatch
    ) -> tuple[Structure, list[WeakOutputs | None]]:
        weak_rows = sum(row_count(part) for part in micro.inputs.weak)
        if not weak_rows:
            return said, [None]
        student, weak = split(said, [row_count(said) - weak_rows, weak_rows])
        if self.algorithm.views.labeled_targets:
            weak = cat([weak, narrow(student, 0, row_count(micro.inputs.labeled))])
        return student, [self._weak_outputs(detach(weak), micro)]

    def _weak_outputs(self, said: Structure, micro: MicroBatch) -> WeakOutputs:
        """From the rows of all weak views, and the labelled ones behind them if there are any."""
        inputs = micro.inputs
        sizes = [row_count(part) for part in inputs.weak]
        sizes.append(row_count(said) - sum(sizes))
        logits, heads = self._columns(said)
        first, *others, labeled = split(logits, sizes)
        kept = len(sizes) if sizes[-1] else len(sizes) - 1
        return WeakOutputs(
            first,
            micro.ids,
            tuple(others),
            labeled if sizes[-1] else None,
            inputs.labels,
            inputs.places,
            {name: tuple(split(head, sizes)[:kept]) for name, head in heads.items()},
            micro.labeled_ids,
        )

    def _notes(self, unlabeled: UnlabeledBatch[Any] | None, stop: bool, save: bool) -> Tensor:
        """What a rank tells besides sums: unusable rows, what it asks for, gradients missed."""
        bad = 0 if unlabeled is None else len(unlabeled.bad)
        notes = [bad, stop, save, self.engine.missed_gradients]
        return torch.tensor([float(note) for note in notes], device=self.engine.device)

    @torch.no_grad()
    def _reduce(
        self, micros: list[MicroBatch], weak: list[WeakOutputs | None], notes: Tensor
    ) -> FusedSum:
        """Start the one reduction of a step: rows, notes, and the algorithm's sums."""
        rows = [sum(m.inputs.labeled_rows for m in micros), sum(m.unlabeled_rows for m in micros)]
        sums = {"notes": notes, "rows": torch.tensor(rows, device=self.engine.device)}
        seen = [outputs for outputs in weak if outputs is not None]
        if seen:
            # 0, or NaN where any logit is not finite.
            sums["not finite"] = sum_(part.sum() * 0 for said in seen for part in said.everything)
            parts = [self.algorithm.statistics(outputs) for outputs in seen]
            sums |= {key: sum_(part[key] for part in parts) for key in parts[0]}
        sums |= self.algorithm.rank_statistics()
        return FusedSum(sums)

    def _observe(self, reduction: FusedSum) -> tuple[Tensor, Tensor]:
        """Wait for the sums, show them to the algorithm; give the global rows of both kinds.

        A NaN in any weak view of any rank leaves every statistic as it was, and so does a global
        batch without a valid row.
        """
        self.own_time.end()
        sums = reduction.wait()
        self._noted = sums.pop("notes")
        labeled, unlabeled = sums.pop("rows").unbind()
        sound = unlabeled > 0
        if "not finite" in sums:
            sound = sound & (sums.pop("not finite") == 0)
        unlabeled = unlabeled.clamp(min=1)  # sums over no rows are 0, and so are their means
        self.algorithm.observe(sums, unlabeled)
        self.algorithm.sound = sound
        self.algorithm.pending = {
            name: torch.where(sound, value, self.algorithm.state[name])
            for name, value in self.algorithm.pending.items()
        }
        return labeled, unlabeled

    def _outputs(
        self,
        said: Structure,
        micro: MicroBatch,
        weak: WeakOutputs | None,
        rows: tuple[Tensor, Tensor],
    ) -> StudentOutputs:
        inputs = micro.inputs
        logits, heads = self._columns(said)
        own = by_view(logits, inputs)
        return StudentOutputs(
            labeled=own.labeled,
            labels=inputs.labels,
            strong=own.strong,
            weak=weak,
            labeled_rows=rows[0],
            unlabeled_rows=rows[1],
            student_weak=own.student_weak,
            strong_labeled=own.strong_labeled,
            notes=inputs.notes,
            further=own.further,
            heads={name: by_view(head, inputs) for name, head in heads.items()},
        )

    @property
    def _needs_sums_ahead(self) -> bool:
        """Whether a micro-batch's loss depends on what the student says of the later ones."""
        return self.micro_batches > 1 and self.algorithm.uses_student_statistics

    @torch.no_grad()
    def _student_sums_ahead(
        self,
        micros: list[MicroBatch],
        weak: list[WeakOutputs | None],
        rows: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        """The student's global sums before its first backward, from passes without gradient."""
        parts = []
        for micro, weak_outputs in zip(micros, weak, strict=True):
            logits = self.engine.infer(channels_last(cat(micro.inputs.parts)))
            self.engine.forget_norms()
            outputs = self._outputs(logits, micro, weak_outputs, rows)
            parts.append(self.algorithm.student_statistics(outputs))
        return FusedSum({name: sum_(part[name] for part in parts) for name in parts[0]}).wait()

    def _attach(self, local: Mapping[str, Tensor], total: Mapping[str, Tensor]) -> Sums:
        """The student's global sums, with the gradient of this micro-batch's part of them.

        Every part computes the same function f of the sums and contributes f / parts, so the
        gradient of a part is scaled up by the number of parts.
        """
        return {
            name: total[name] + self._parts * (value - value.detach())
            for name, value in local.items()
        }

    def _close(self, done: EngineStep, passes: list[_Pass]) -> Culprit | None:
        """Make everything follow the optimizer: final if it was applied, undone if not."""
        culprit = None
        if done.applied:
            self.applied_steps += 1
            self.algorithm.commit()
        else:
            culprit = self._find_culprit(passes)
            self.algorithm.discard()
        self.engine.finish_norms(done.applied)
        if done.applied and self.teacher is not None:
            self.teacher.update()
        self.history.record(self.attempts, done, culprit)
        return culprit

    def _find_culprit(self, passes: list[_Pass]) -> Culprit | None:
        """Go through the micro-batches again; only ever after an overflow. Collective."""
        for done in passes:
            inputs = channels_last(cat(done.micro.inputs.parts))
            culprit = find_culprit(self.engine, inputs, partial(self._terms, done=done))
            if culprit is not None:
                return culprit
        return None

    def _terms(self, logits: Structure, done: _Pass) -> dict[str, Tensor]:
        """The terms of a micro-batch's loss, weighted, of other logits; without communication."""
        outputs = self._outputs(logits, done.micro, done.weak, done.rows)
        sums = self._attach(self.algorithm.student_statistics(outputs), done.total)
        terms = self.algorithm.loss(outputs, sums)
        weighted = {"supervised": terms.supervised}
        if done.micro.uses_unlabeled:
            weighted["unsupervised"] = terms.unsupervised_weight * terms.unsupervised
        shared = {name: term / self._parts for name, term in terms.global_extras.items()}
        return weighted | dict(terms.extras) | shared

    def _penalized(self, terms: LossTerms) -> LossTerms:
        """Add the L1 penalty, the same on every rank, if there is one."""
        if not self.l1:
            return terms
        penalty = self.l1 * l1_norm(self.engine.whole_parameters().values())
        return replace(terms, global_extras={**terms.global_extras, "l1_loss": penalty})

    def _measure(
        self, passes: list[_Pass], tell: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, list[float]], dict[str, list[float]]]:
        """Global means of a step, numbers of each class and of each rank. Collective."""
        sums = {n: sum_(p.contributions[n] for p in passes) for n in passes[0].contributions}
        weak = [p.weak.logits for p in passes if p.weak is not None]
        rows = passes[0].micro.inputs.places.unlabeled_rows
        seen = pseudo_labels.observed(self.algorithm, weak, rows)
        told = {"own_seconds": self.own_time.take(), **tell}
        own = apart(torch.tensor(list(told.values()), device=self.engine.device))
        sums |= {f"seen/{name}": value for name, value in seen.items()}
        reduced = FusedSum(sums | {"ranks": own}).wait()
        ranks = dict(zip(told, reduced.pop("ranks").T.tolist(), strict=True))
        numbers, shares = pseudo_labels.summarized({n: reduced.pop(f"seen/{n}") for n in seen})
        reduced |= numbers
        values = torch.stack(list(reduced.values())).tolist()  # one wait for the device
        classes = pseudo_labels.per_class(self.algorithm, shares)
        return dict(zip(reduced, values, strict=True)), classes, ranks


def sum_(values: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    first, *rest = values
    for value in rest:
        first = first + value
    return first
