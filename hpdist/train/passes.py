"""How an optimizer step runs the model: in one pass or two, with everything that depends on it.

A pass in training mode updates batch normalisation, makes other ranks wait and, under ZeRO-3,
gathers the weights; the algorithm's protocol is independent of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.protocol import MicroBatch, PendingSums
from hpdist.data.structures import Structure, cat, detach, narrow, row_count, split
from hpdist.distributed.collectives import FusedSum
from hpdist.distributed.stragglers import RankTimer
from hpdist.engines.base import Engine
from hpdist.engines.teacher import ShardedTeacher
from hpdist.train.micro_batch import channels_last


class Passes:
    """Computes the targets in passes of their own, before the student's.

    Args:
        engine: Holds the model.
        algorithm: Gives the number of views.
        teacher: Makes the targets, if the algorithm uses it.
        timer: Is stopped when this rank first waits for the others.
    """

    def __init__(
        self,
        engine: Engine,
        algorithm: Algorithm,
        teacher: ShardedTeacher | None,
        timer: RankTimer,
    ) -> None:
        self.engine = engine
        self.algorithm = algorithm
        self.teacher = teacher if algorithm.views.teacher else None
        self.timer = timer

    def begin(self) -> None:
        """Begin a step."""
        if not self.engine.module.training:  # setting it visits all modules
            self.engine.module.train()
        self.timer.begin()

    def targets(self, micros: Sequence[MicroBatch]) -> Sequence[Structure | None] | None:
        """Return student's or teacher's outputs for the weak views, without gradient."""
        self._wait_for_others()
        teacher, found = self.teacher, list[Structure | None]()
        with nullcontext(self.engine.infer) if teacher is None else teacher.forward() as infer:
            for micro in micros:
                parts = list(micro.inputs.weak)
                if parts and self.algorithm.views.labeled_targets:
                    parts.append(micro.inputs.labeled)
                found.append(infer(channels_last(cat(parts))) if parts else None)
        return found

    def student(self, micro: MicroBatch) -> tuple[Structure, Structure | None]:
        """Return the student's outputs for its rows, with gradient."""
        return self._student_pass(micro, ()), None

    def preview(self, micro: MicroBatch) -> Structure:
        """Return the student's outputs for the same rows, without gradient or side effects."""
        with self.engine.paused_bn():
            outputs: Structure = self.engine.infer(channels_last(cat(micro.inputs.parts)))
        return outputs

    def probe(self, inputs: Tensor) -> Structure:
        """Return the student's outputs for other inputs, with a gradient towards these only."""
        with self.engine.paused_bn():
            outputs: Structure = self.engine.probe_forward(channels_last(inputs))
        return outputs

    def reduce(self, sums: Mapping[str, Tensor]) -> PendingSums:
        """Begin to add up sums over all ranks. Collective: every rank must call."""
        return _TimedSum(sums, self.timer)

    def _student_pass(self, micro: MicroBatch, behind: Sequence[Any]) -> Any:
        """Run the student on its rows and those added behind them, in one forward.

        Batch normalisation treats them as the batches of separate passes.
        """
        parts = micro.inputs.parts
        batches = [[parts[0]], parts[1:]] if self.algorithm.normalizes_apart else [parts]
        runs = [*batches, list(behind)] if behind else batches
        rows = [sum(row_count(part) for part in run) for run in runs if run]
        with self.engine.virtual_batches(rows):
            return self.engine.forward(channels_last(cat([*parts, *behind])))

    def _wait_for_others(self) -> None:
        """Stop the timer if the next passes wait for other ranks."""
        if self.engine.forward_communicates or self.teacher is not None:
            self.timer.end()


class FusedPass(Passes):
    """Computes the targets in the student's own forward, behind its rows.

    Under ZeRO-3 a second forward would gather all weights again, in an order that the prefetch
    does not expect.
    """

    def targets(self, micros: Sequence[MicroBatch]) -> None:
        """Leave the targets to the student's pass."""
        self._wait_for_others()

    def student(self, micro: MicroBatch) -> tuple[Structure, Structure | None]:
        """Return outputs for the student's rows, with gradient, and the weak views', without."""
        weak = micro.inputs.weak
        outputs = self._student_pass(micro, weak)
        if not weak:
            return outputs, None
        weak_rows = sum(row_count(part) for part in weak)
        student, targets = split(outputs, [row_count(outputs) - weak_rows, weak_rows])
        if self.algorithm.views.labeled_targets:
            targets = cat([targets, narrow(student, 0, row_count(micro.inputs.labeled))])
        return student, detach(targets)


def make_passes(
    engine: Engine,
    algorithm: Algorithm,
    teacher: ShardedTeacher | None,
    timer: RankTimer,
    micro_batches: int,
) -> Passes:
    """Choose the passes: fused if the engine benefits and nothing needs the targets first."""
    views = algorithm.views
    needed_first = views.teacher or views.inputs_need_targets or views.needs_gradient_probe
    fused = engine.fuses_weak_pass and micro_batches == 1 and not needed_first
    return (FusedPass if fused else Passes)(engine, algorithm, teacher, timer)


class _TimedSum(FusedSum):
    """A sum over all ranks in flight; waiting for it is waiting for the other ranks."""

    def __init__(self, sums: Mapping[str, Tensor], timer: RankTimer) -> None:
        super().__init__(sums)
        self._timer = timer

    def wait(self) -> dict[str, torch.Tensor]:
        """Stop the timer, and return the sums."""
        self._timer.end()
        return super().wait()
