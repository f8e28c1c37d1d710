"""The model of a run: as it trains, and as it is returned with the trained weights.

A given module does not train itself: a copy does, which gets heads, batch normalisation over the
global batch, a device, half precision, partitions. The given module is unchanged until the run has
ended, and then receives the trained weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hpdist.algorithms.base import Algorithm
from hpdist.config.component import Component
from hpdist.distributed.batch_norm import global_batch_norm
from hpdist.distributed.collectives import call_on_all_ranks
from hpdist.distributed.config import NormStatistics
from hpdist.distributed.fragments import Fragment
from hpdist.distributed.module_names import named_buffers, named_parameters, plain_name
from hpdist.engines.base import Engine
from hpdist.engines.compilation import compile_model
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.errors import ConfigError, describe
from hpdist.models.activation_checkpointing import checkpoint_activations
from hpdist.models.build import build_model
from hpdist.models.fp8 import to_fp8
from hpdist.models.full_precision import to_full_precision
from hpdist.models.output_layers import mark_output_layer
from hpdist.models.stored import weights_as_stored
from hpdist.models.with_heads import WithHeads, with_heads
from hpdist.tracking.console import Console
from hpdist.train import opening
from hpdist.train.checks import check_gradient, check_model
from hpdist.train.sets import RunSets
from hpdist.train.step import SemiSupervisedStep


class RunModel:
    """Makes the model of a run, and returns trained copies.

    Args:
        config: Of the model.
        sets: Of the run; the model is checked against them.
        sharding: How the run shards.
        given: The module given in Python, if any.
        seed: Of the run.
        checkpoints_activations: Whether activations are recomputed in the backward pass.
        norm_statistics: Whose rows batch normalisation goes by.
        marks_outputs: Whether the layer that makes the outputs is marked, for `output_layers`.
        main: Whether this rank is the main one.
    """

    def __init__(
        self,
        config: Component,
        sets: RunSets,
        sharding: ExecutionPlan,
        given: nn.Module | None,
        *,
        seed: int,
        checkpoints_activations: bool,
        norm_statistics: NormStatistics,
        marks_outputs: bool = False,
        main: bool,
    ) -> None:
        self._config = config
        self._seed = seed
        self._checkpoints_activations = checkpoints_activations
        self._norm_statistics = norm_statistics
        self._marks_outputs = marks_outputs
        self._sets = sets
        self._sharding = sharding
        self._given = given
        self._in_place = False  # for a module that cannot be copied
        self._main = main
        self._log_line = Console(0, 0, main).log_line

    def make(self, algorithm: Algorithm) -> nn.Module:
        """Build the model to train, or copy the given one; check it with the data. Collective."""
        with weights_as_stored(self._sharding.stage == 3):
            model = call_on_all_ranks(lambda: self._made(algorithm))
        if self._sharding.compile is not None:
            compile_model(model, self._sharding.compile)
        return model

    def student(self, step: SemiSupervisedStep) -> nn.Module:
        """Make a separate model with the student's weights. Collective: every rank must call."""
        return self._handed_out(step, self._student_of(step))

    def teacher(self, step: SemiSupervisedStep) -> nn.Module:
        """Make a separate model with the teacher's weights, or the student's without a teacher.

        Collective: every rank must call.
        """
        return self._handed_out(step, self._teacher_of(step))

    def teacher_on_main(self, step: SemiSupervisedStep) -> nn.Module | None:
        """Make on the main rank what `teacher` makes; the other ranks build no model, and get None.

        They only send their shards of the weights. Collective: every rank must call.
        """
        if self._main:
            return self._handed_out(step, self._teacher_of(step))
        call_on_all_ranks(lambda: None)  # the main rank may fail to build one
        step.engine.layout.gather_into(self._teacher_of(step)[0], None)
        return None

    def give_back(self, step: SemiSupervisedStep) -> None:
        """Copy the student's weights into the given module, if any. Collective."""
        given = self._given
        if given is None or self._in_place:
            return
        _fill(given, step.engine, *self._student_of(step))
        given.eval()
        which = "" if step.teacher is None else "; trainer.teacher_model() has the teacher's"
        predicts = step.algorithm.predicts
        if predicts is not None:
            which += f", with the head {predicts!r} that predicts and was measured"
        self._log_line(
            "the given model now has the student's trained weights, in fp32, on its own "
            f"device and in evaluation mode{which}"
        )

    def _made(self, algorithm: Algorithm) -> nn.Module:
        sets = self._sets
        model = self._copied() if self._given is not None else self._built()
        opening.log_lines(filter(None, [to_full_precision(model)]), self._main)
        model = global_batch_norm(model, statistics=self._norm_statistics)
        example = sets.views.plain(sets.spec.example(2))
        outputs = algorithm.task.outputs
        trains = check_model(model, example, sets.num_classes, algorithm.task)
        if self._marks_outputs:
            mark_output_layer(model, example)
        model = with_heads(model, algorithm, example, self._features)
        if not trains:
            check_gradient(model, example, outputs)
        if self._sharding.fp8:
            opening.log_lines([to_fp8(model)], self._main)
        if self._checkpoints_activations:
            checkpoint_activations(model)
        return model

    def _built(self) -> nn.Module:
        return build_model(self._config, self._sets.spec, self._sets.output_size, self._seed)

    def _copied(self) -> nn.Module:
        """Copy the given module, or return it if it cannot be copied."""
        given = self._given
        assert given is not None
        if self._in_place:
            raise ConfigError(
                f"model: {type(given).__name__} cannot be copied, and a second one is needed; name "
                "a function that makes it (model={'name': 'python:module:function'})"
            )
        try:
            copied = copy.deepcopy(given)
        except Exception as error:  # a member of it may raise anything
            self._log_line(
                f"note: {type(given).__name__} cannot be copied ({describe(error)}), so it trains "
                "itself and stays as the training leaves it"
            )
            self._in_place = True
            return given
        for own, theirs in zip(copied.parameters(), given.parameters(), strict=True):
            own.__dict__.update(theirs.__dict__)  # such as marks for the optimizer
        return copied

    @property
    def _features(self) -> str | None:
        features: str | None = getattr(self._config, "features", None)
        return features

    def _student_of(
        self, step: SemiSupervisedStep
    ) -> tuple[Sequence[Fragment], Mapping[str, Tensor]]:
        engine = step.engine
        return engine.master_fragments(), dict(named_buffers(engine.module))

    def _teacher_of(
        self, step: SemiSupervisedStep
    ) -> tuple[Sequence[Fragment], Mapping[str, Tensor]]:
        if step.teacher is None:
            return self._student_of(step)
        return step.teacher.fragments, step.teacher.buffers

    def _handed_out(
        self,
        step: SemiSupervisedStep,
        weights: tuple[Sequence[Fragment], Mapping[str, Tensor]],
    ) -> nn.Module:
        model = call_on_all_ranks(lambda: self._to_hand_out(step))
        _fill(model, step.engine, *weights)
        return model.eval()

    def _to_hand_out(self, step: SemiSupervisedStep) -> nn.Module:
        model = self._built() if self._given is None else self._copied()
        if step.algorithm.predicts is None:
            return model
        example = self._sets.views.plain(self._sets.spec.example(2))
        return with_heads(model, step.algorithm, example, self._features)  # one that predicts


@torch.no_grad()
def _fill(
    model: nn.Module,
    engine: Engine,
    fragments: Sequence[Fragment],
    buffers: Mapping[str, Tensor],
) -> None:
    """Copy the trained weights into a plain model, as fp32. Collective: every rank must call.

    Untrained ones stay: an engine may have rounded them to half precision.
    """
    to_full_precision(model)
    heads_added = isinstance(engine.module, WithHeads) and not isinstance(model, WithHeads)
    prefix = "model." if heads_added else ""
    own = {prefix + name: parameter for name, parameter in named_parameters(model)}
    whole = {}
    for name, size in engine.layout.sizes.items():
        parameter = own.get(name)
        if parameter is None:  # of a head that is left out
            whole[name] = torch.empty(size)
        elif parameter.is_contiguous():
            whole[name] = parameter.detach()
        else:
            whole[name] = torch.empty(parameter.shape, dtype=parameter.dtype)
    engine.layout.gather_into(fragments, whole)
    for name in own.keys() & whole.keys():
        if not own[name].is_contiguous():
            own[name].copy_(whole[name])
    for name, buffer in list(model.named_buffers()):
        learnt = buffers.get(prefix + plain_name(name))
        if learnt is not None and not torch.equal(learnt, buffer.to(learnt.device, learnt.dtype)):
            module, _, attribute = name.rpartition(".")
            value = learnt.detach().clone().to(buffer.device, buffer.dtype)
            model.get_submodule(module)._buffers[attribute] = value
