"""One optimizer step of semi-supervised training: the plug-in for a loop of one's own.

accelerator = Accelerator()
model, optimizer = accelerator.prepare(hpdist.global_batch_norm(model), optimizer)
step = SemiSupervisedStep(accelerator, model, optimizer, FixMatch(), views)
for labeled, unlabeled in batches:      # this rank's slices of the global batches
    outcome = step(labeled, unlabeled)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.parts.mixing import check_groups
from hpdist.algorithms.protocol import Attempt, MicroBatch, add
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.structures import cat, sent
from hpdist.data.views.base import Views
from hpdist.distributed.collectives import AllRanks, FusedSum, rank_rows
from hpdist.distributed.stragglers import RankTimer
from hpdist.engines.base import Engine, EngineStep
from hpdist.engines.config import LossScale, Precision
from hpdist.engines.overflow import OverflowHistory, OverflowSource, find_overflow_source
from hpdist.engines.prepare import make_engine
from hpdist.engines.teacher import ShardedTeacher
from hpdist.errors import ConfigError
from hpdist.evaluate.scoring import evaluating
from hpdist.models.with_heads import head_names_of, require_heads
from hpdist.train import pseudo_label_metrics as pseudo_labels
from hpdist.train.ahead import Following, ViewsAhead
from hpdist.train.micro_batch import MicroBatcher, channels_last, require_maps
from hpdist.train.optim import l1_norm
from hpdist.train.outcome import StepOutcome
from hpdist.train.passes import make_passes
from hpdist.train.step_state import join_save_state

__all__ = ["SemiSupervisedStep", "StepOutcome"]


class SemiSupervisedStep:
    """Views, weak pass, one reduction, student pass, loss, backward, optimizer, teacher, commit.

    The batches are this rank's slices, in rank order, of the global batches; every rank must give
    slices of the same size. Collective: every rank must call it equally often.
    `accelerator.save_state` and `load_state` save and load all of its state.

    Args:
        accelerator: The one that prepared `model` and `optimizer`.
        model: Prepared; maps inputs, as batches have them, to logits [rows, classes], or to an
            output with `.logits`, or to all the outputs that the algorithm's task names.
        optimizer: Prepared with the model.
        algorithm: Gives the loss; its state must be on the accelerator's device.
        views: Makes weak and strong views of the inputs.
        micro_batches: Micro-batches of a step. Under DeepSpeed it must equal
            `gradient_accumulation_steps`.
        decay: Of the teacher; `None`: there is no teacher.
        teacher_warmup: Whether the teacher's decay starts small.
        grad_clip: Largest global gradient norm. Under DeepSpeed its own config decides.
        precision: Only for fp16 on a CPU, where Accelerate does not know it.
        loss_scale: For fp16 without DeepSpeed; with it, its own config decides.
        teacher_model: A second, unprepared model like the first: needed under ZeRO-3 by an
            algorithm whose targets come from the teacher.
        seed: For the algorithm's draws, such as how it mixes rows.
        l1: Weight of the L1 norm of the weights, a term of the loss.

    Raises ConfigError if `l1` is given and ZeRO-3 or FSDP2 shards the weights, or if the algorithm
    needs a teacher and there is none, or heads that the model lacks (`hpdist.with_heads` adds
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
        algorithm.bind_rank(self.engine.rank, self.engine.world_size)
        algorithm.over_ranks = AllRanks()
        self.views = views
        self.micro_batches = micro_batches
        self.grad_clip = grad_clip
        self.l1 = l1
        if l1 and not self.engine.whole_parameters():
            raise ConfigError(
                "optim.l1: ZeRO-3 and FSDP2 shard the weights; use zero.stage 0, 1 or 2"
            )
        self.teacher = None if decay is None else ShardedTeacher(self.engine, decay, teacher_warmup)
        self.history = OverflowHistory()
        self.rank_timer = RankTimer(self.engine.device)
        """Begins with a step, or earlier if the caller begins it to include the reading of rows."""
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
        require_maps(algorithm.task, views)
        require_heads(algorithm, head_names_of(self.engine.module))
        self.engine.set_outputs(algorithm.task.outputs, algorithm.head_names)
        self._passes = make_passes(
            self.engine, algorithm, self.teacher, self.rank_timer, micro_batches
        )
        self._ahead = ViewsAhead()
        self._seed = seed
        join_save_state(self)

    def evaluating(self, *, teacher: bool = True) -> AbstractContextManager[Callable[[Any], Any]]:
        """Set evaluation mode for a while, with the teacher's weights if there is a teacher.

        with step.evaluating() as predict:
            logits = predict(inputs)        # inputs as in batches; logits fp32 [rows, classes]

        For a task with more outputs than logits, `predict` returns them by name.
        Collective: every rank must enter, and under ZeRO-3 or FSDP2 call `predict` equally often.
        """
        return evaluating(self.engine, self.teacher if teacher else None, self.views)

    def __call__(
        self,
        labeled: LabeledBatch[Any, Any],
        unlabeled: UnlabeledBatch[Any] | None = None,
        *,
        lr: float | None = None,
        measure: bool = False,
        rank_metrics: Mapping[str, float] | None = None,
        stop: bool = False,
        save: bool = False,
        following: Following | None = None,
    ) -> StepOutcome:
        """Do one optimizer step.

        Args:
            labeled: This rank's slice of the labelled global batch.
            unlabeled: Likewise the unlabelled one; ignored by an algorithm that needs no views.
            lr: Learning rate of this step; by default the optimizer keeps its own.
            measure: Also return metrics of the step, at the cost of a wait for the device.
            rank_metrics: Numbers of this rank, where `measure`. Every rank's outcome then holds
                those of all ranks, under the same names on all.
            stop: Whether this rank wants the run to stop after this step, as when it cannot read
            its next rows. Every rank's outcome then has it, without further communication.
            save: Whether it wants a checkpoint after this step; likewise.
            following: Gives the next step's batches, or None where they are not at hand; their
                views are then made while the device computes this step. It is called once, and may
                seed what views draw from.

        Raises ConfigError if rows are missing or do not divide into micro-batches, and
        PrecisionError if overflow does not end.
        """
        self._passes.begin()
        micros = self._micros(labeled, unlabeled)
        flags = {"flags": self._flags(unlabeled, stop, save)}
        attempt = Attempt(
            self.algorithm, micros, self._passes, self._passes.reduce, self._parts, flags
        )
        attempt.begin()
        contributions = []
        for number in range(len(micros)):
            with self.engine.accumulate(last=number == len(micros) - 1):
                terms = self._penalized(attempt.judge(number))
                self.engine.backward(terms.total(self._parts))
                contributions += [terms.contributions(self._parts)] if measure else []
        if following is not None:
            with self.rank_timer.ahead():
                self._ahead.make(self._cutter(), following, self.attempts + 1)
        done = self.engine.step(lr, self.grad_clip)
        self.attempts += 1
        overflow_source = self._close(done, attempt)
        measured = (
            self._measure(attempt, contributions, rank_metrics or {}) if measure else ({}, {}, {})
        )
        bad_rows, stops, saves, missed = (round(flag) for flag in attempt.extra["flags"].tolist())
        if missed:
            self.engine.share_usage()
        return StepOutcome(
            done.applied,
            done.overflowed,
            done.old_scale,
            done.new_scale,
            done.grad_norm,
            overflow_source,
            *measured,
            bad_rows,
            stops > 0,
            saves > 0,
        )

    def _micros(
        self, labeled: LabeledBatch[Any, Any], unlabeled: UnlabeledBatch[Any] | None
    ) -> list[MicroBatch]:
        """Give the micro-batches of this step, which the one before may have made."""
        cutter = self._cutter()
        made = self._ahead.take(cutter, (labeled, unlabeled), self.attempts)
        return list(cutter.split(labeled, unlabeled, self.attempts) if made is None else made)

    @property
    def _parts(self) -> int:
        """The number of contributions that make the global loss."""
        return self.engine.world_size * self.micro_batches

    def _cutter(self) -> MicroBatcher:
        engine = self.engine
        return MicroBatcher(
            self.algorithm,
            self.views,
            self.micro_batches,
            engine.rank,
            engine.world_size,
            engine.device,
            self._seed,
        )

    def _flags(self, unlabeled: UnlabeledBatch[Any] | None, stop: bool, save: bool) -> Tensor:
        """A rank's flags: unusable rows, requests to stop or save, missed gradients."""
        bad = 0 if unlabeled is None else len(unlabeled.bad)
        flags = [bad, stop, save, self.engine.missed_gradients]
        return sent(torch.tensor([float(flag) for flag in flags]), self.engine.device)

    def _close(self, done: EngineStep, attempt: Attempt) -> OverflowSource | None:
        """Commit everything if the step was applied, and discard it if not."""
        overflow_source = None if done.applied else self._find_overflow_source(attempt)
        attempt.close(done.applied)
        self.engine.commit_bn(done.applied)
        if done.applied:
            self.applied_steps += 1
            if self.teacher is not None:
                self.teacher.update()
        self.history.record(self.attempts, done, overflow_source)
        return overflow_source

    def _find_overflow_source(self, attempt: Attempt) -> OverflowSource | None:
        """Repeat the micro-batches to find an overflow's source; only after one. Collective."""
        for number, micro in enumerate(attempt.micros):
            inputs = channels_last(cat(micro.inputs.parts))
            terms = partial(attempt.weighted_terms, number)
            overflow_source = find_overflow_source(self.engine, inputs, terms)
            if overflow_source is not None:
                return overflow_source
        return None

    def _penalized(self, terms: LossTerms) -> LossTerms:
        """Add the L1 penalty, the same on every rank, if there is one."""
        if not self.l1:
            return terms
        penalty = self.l1 * l1_norm(self.engine.whole_parameters().values())
        return replace(terms, global_extras={**terms.global_extras, "l1_loss": penalty})

    def _measure(
        self,
        attempt: Attempt,
        contributions: list[dict[str, Tensor]],
        rank_metrics: Mapping[str, float],
    ) -> tuple[dict[str, float], dict[str, list[float]], dict[str, list[float]]]:
        """Return a step's global means, numbers of each class and of each rank. Collective."""
        sums = {name: add(part[name] for part in contributions) for name in contributions[0]}
        weak = [view.logits for view in attempt.weak if view is not None]
        rows = attempt.micros[0].inputs.positions.unlabeled_rows
        observed = pseudo_labels.observed(self.algorithm, weak, rows)
        per_rank = {"compute_seconds": self.rank_timer.take(), **rank_metrics}
        own = rank_rows(sent(torch.tensor(list(per_rank.values())), self.engine.device))
        sums |= {f"seen/{name}": value for name, value in observed.items()}
        reduced = FusedSum(sums | {"ranks": own}).wait()
        ranks = dict(zip(per_rank, reduced.pop("ranks").T.tolist(), strict=True))
        numbers, shares = pseudo_labels.summarized({n: reduced.pop(f"seen/{n}") for n in observed})
        reduced |= numbers
        values = torch.stack(list(reduced.values())).tolist()  # a single wait for the device
        classes = pseudo_labels.per_class(self.algorithm, shares)
        return dict(zip(reduced, values, strict=True)), classes, ranks
