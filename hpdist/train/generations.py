"""Self-training: the teacher labels every unlabelled row, and the student is reset."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hpdist.algorithms.parts.tables import encode_ids, ids_of
from hpdist.data.batch import UnlabeledBatch
from hpdist.distributed.collectives import FusedSum
from hpdist.distributed.fragments import flat_view
from hpdist.distributed.module_names import named_buffers, named_parameters
from hpdist.errors import ConfigError
from hpdist.train.data import RunData
from hpdist.train.step import SemiSupervisedStep


class Generations:
    """The generations of a run, all of the same length.

    Args:
        step: Of the run; its algorithm gives the number of generations.
        data: Of the run.
        initial: The initial weights and buffers of every student, by name, on the CPU.
        steps: Of the whole run.

    Raises ConfigError if the steps do not divide, or the number of rows is not known.
    """

    def __init__(
        self, step: SemiSupervisedStep, data: RunData, initial: dict[str, Tensor], steps: int
    ) -> None:
        self.step = step
        self.data = data
        self.count = step.algorithm.generations
        self.steps = steps // self.count
        self._initial = initial
        if self.count == 1:
            return
        name = type(step.algorithm).__name__
        if steps % self.count:
            raise ConfigError(
                f"steps: {steps} do not divide into the {self.count} generations of {name}"
            )
        if step.teacher is None:
            raise ConfigError(f"{name} needs a teacher; give its decay")
        if data.unlabeled_rows is None:
            raise ConfigError(
                f"data.unlabeled: {name} labels every row between generations, and the number of "
                "rows is not known; convert them to Parquet: hpdist convert"
            )

    @property
    def due(self) -> bool:
        """Whether the next generation begins before the next step."""
        done = self.step.applied_steps
        if self.count == 1 or done % self.steps:
            return False
        return self.step.algorithm.generation < done // self.steps

    def within(self, step: int) -> int:
        """The applied steps of a run's step `step` within its generation."""
        return step % self.steps if self.count > 1 else step

    def begin(self, heartbeat: Callable[[], None] = lambda: None) -> None:
        """Label all rows and reset the student; `heartbeat` is called regularly. Collective."""
        step = self.step
        assert step.teacher is not None
        with step.teacher.teacher_weights():
            step.engine.module.eval()
            for batch in self.data.iterate_once():
                step.algorithm.take_labels(*self._label(batch))
                heartbeat()
            step.engine.module.train()
        step.algorithm.begin_generation()
        self._restart()

    @torch.no_grad()
    def _label(self, batch: UnlabeledBatch) -> tuple[Tensor, Tensor]:
        """Ids and probabilities of the global batch's rows that are new and usable."""
        engine = self.step.engine
        moved = batch.to(engine.device, non_blocking=True)
        logits = engine.infer(self.step.views.plain(moved.inputs))
        probabilities = logits.softmax(dim=-1)
        new = torch.ones(len(batch), dtype=torch.bool) if batch.valid is None else batch.valid
        if batch.epochs is not None:
            new = new & (batch.epochs == 0)
        assert moved.ids is not None  # rows of a stream have them
        packed = torch.cat(
            [new[:, None].to(engine.device), encode_ids(moved.ids), probabilities], dim=1
        )
        packed = torch.where(packed[:, :1] > 0, packed, 0.0)
        by_rank = packed.new_zeros(engine.world_size, *packed.shape)
        by_rank[engine.rank] = packed
        rows = FusedSum({"rows": by_rank}).wait()["rows"].flatten(0, 1)
        rows = rows[rows[:, 0] > 0.5]
        return ids_of(rows[:, 1:3]), rows[:, 3:]

    @torch.no_grad()
    def _restart(self) -> None:
        engine = self.step.engine
        names = engine.parameter_shapes()
        engine.restart({name: flat_view(self._initial[name]).float() for name in names})
        for name, buffer in named_buffers(engine.module):
            buffer.copy_(self._initial[name])
        assert self.step.teacher is not None
        self.step.teacher.restart()


def initial_values(model: nn.Module, generations: int) -> dict[str, Tensor]:
    """Copy a model's weights and buffers to the CPU, if they will be needed."""
    if generations == 1:
        return {}
    named = [*named_parameters(model), *named_buffers(model)]
    return {name: value.detach().cpu().clone() for name, value in named}
