"""The interface that hides how the model is sharded: `replicated` and `zero` implement it."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpdist.aliases import find_moved
from hpdist.data.structures import Structure
from hpdist.distributed.batch_norm import batch_norms
from hpdist.distributed.fragments import Elements, Fragment, Layout, WholeTensors
from hpdist.distributed.module_names import named_parameters
from hpdist.distributed.normalisation.running import RunningStatistics
from hpdist.engines.loss_scale import LossScaler
from hpdist.engines.optimizer_state import SavedOptimizer, scalars_of
from hpdist.engines.reach import GradientWatch, reached_nowhere, unreached_note
from hpdist.errors import ConfigError
from hpdist.models.outputs import LOGITS, NO_GRADIENT, outputs_of


@dataclass(frozen=True)
class EngineStep:
    """The outcome of the engine's optimizer step."""

    applied: bool
    overflowed: bool
    old_scale: float
    new_scale: float
    grad_norm: float | None
    exhausted: bool = False
    """Whether it overflowed when the loss scale was already at its minimum."""


class Replica(Protocol):
    """A second model, without gradient, whose weights can be replaced."""

    def swapped_weights(self, fragments: Sequence[Fragment]) -> AbstractContextManager[None]:
        """Hold these weights for a while."""
        ...

    def infer(self, inputs: Structure) -> Any:
        """Outputs in fp32, like those of the engine."""
        ...

    def tensors(self) -> list[Tensor]:
        """All tensors of it that this rank keeps."""
        ...


class Engine(ABC):
    """Forward, backward and optimizer step of a prepared model, the same whatever shards it.

    Inputs are one tensor, or tensors by name, and reach the model unchanged. Its outputs are those
    set by `set_outputs`, fp32: logits as one tensor, several outputs by name.

    A loss given to `backward` is this rank's contribution: the applied gradient is that of the sum
    over all ranks and micro-batches.
    """

    fuses_weak_pass = False
    """Whether a second forward in a step should be avoided."""

    unreached = "stays as it is"
    """What happens to a parameter that no step reaches; part of a message."""

    refuses_save_state: str | None = None
    """Why `accelerator.save_state` and `load_state` cannot be used; None if they can."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.scaler: LossScaler | None = None
        self._outputs: tuple[str, ...] = LOGITS
        self._heads: tuple[str, ...] = ()
        self._running = RunningStatistics(batch_norms(self.module))
        self._trained = {n: p for n, p in named_parameters(self.module) if p.requires_grad}
        # Parameters without elements have no place in state, teacher and checkpoint.
        self._parameters = {name: p for name, p in self._trained.items() if _whole_size(p)}
        self._watch: GradientWatch | None = self._make_watch()  # of the first step

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The user's own module, without wrappers."""

    @property
    def has_stepped(self) -> bool:
        """Whether the optimizer has done a step, here or in what was loaded."""
        return any(self.optimizer.state.values())

    @property
    def saved_as(self) -> dict[str, int | str]:
        """Facts of the files that Accelerate saves of this engine, which a later load must match.

        Files of another engine cannot be loaded at all.
        """
        return {}

    @property
    def saved_steps(self) -> int | None:
        """The number of steps that such files record, if they do."""
        return None

    def check_before_loading(  # noqa: B027 - most engines load after those hooks
        self, check: Callable[[Path], None]
    ) -> None:
        """Have `check(folder)` called first if the engine loads before Accelerate's hooks."""

    @cached_property
    def layout(self) -> Layout:
        """The layout of every rank's fragments. Collective on first use."""
        return Layout(self.master_fragments())

    @property
    def forward_communicates(self) -> bool:
        """Whether a forward waits for the other ranks: for weights, or for batch statistics."""
        waits = any(norm.statistics == "global" for norm in self._running.norms)
        return self.fuses_weak_pass or (self.world_size > 1 and waits)

    @property
    def loss_scale(self) -> float:
        """The factor of the loss; 1 outside fp16."""
        return self.scaler.scale if self.scaler is not None else 1.0

    def set_outputs(self, outputs: Sequence[str], heads: Sequence[str] = ()) -> None:
        """Set the outputs of the model that forwards return, and heads to add in training.

        By default they return the logits.
        """
        self._outputs, self._heads = tuple(outputs), tuple(heads)

    @abstractmethod
    def forward(self, inputs: Structure) -> Any:
        """Outputs in fp32 of the student, with gradient."""

    @abstractmethod
    def infer(self, inputs: Structure) -> Any:
        """Outputs in fp32, without gradient, in whatever mode the module is."""

    @abstractmethod
    def probe_forward(self, inputs: Structure) -> Any:
        """Outputs in fp32, with gradient, outside of any step: nothing is applied."""

    def _requested(self, output: Any) -> Structure:
        """Select the outputs of `set_outputs` from the model's; ConfigError if one is missing."""
        heads = self._heads if self._heads and self.module.training else ()
        return outputs_of(output, (*self._outputs, *heads))

    def whole_parameters(self) -> dict[str, Tensor]:
        """The parameters by name, for gradients towards them; empty if they are sharded."""
        return dict(self._parameters)

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Differentiate a contribution to the loss."""

    def step(self, lr: float | None, clip: float | None) -> EngineStep:
        """Apply the gradients, unless one is not finite; then update the loss scale.

        Collective: every rank must call; all apply or all skip.
        """
        if lr is not None:
            self.set_learning_rate(lr)
        if self._watch is not None:
            self._warn_unreached(self._watch)
        old_scale = self.loss_scale
        applied, norm = self._apply(clip)
        exhausted = False
        if self.scaler is not None:
            exhausted = not applied and self.scaler.at_minimum
            self.scaler.update(overflowed=not applied)
            self._publish_scale()
        return EngineStep(applied, not applied, old_scale, self.loss_scale, norm, exhausted)

    def _make_watch(self) -> GradientWatch:
        """Begin to record which parameters a step reaches."""
        return GradientWatch(self._parameters)

    def _warn_unreached(self, watch: GradientWatch) -> None:
        """After the first step's backward, warn of parameters without gradient. Collective."""
        watch.close()
        self._watch = None
        nowhere, anywhere = reached_nowhere(self._missing(watch), list(self._parameters))
        if anywhere:
            self.share_usage()
        if nowhere and self.rank == 0:
            warnings.warn(unreached_note(self.module, nowhere, self.unreached), stacklevel=3)

    def _missing(self, watch: GradientWatch) -> list[str]:
        """The parameters that the first step has not reached on this rank."""
        return [name for name in self._parameters if name not in watch.reached]

    @property
    def missed_gradients(self) -> bool:
        """Whether gradients were missing in a step here, and the ranks do not share usage yet."""
        return False

    def share_usage(self) -> None:  # noqa: B027 (only DDP has to)
        """Agree in each step from now on what has no gradient. Every rank must call."""

    @staticmethod
    def _require_gradient(loss: Tensor) -> None:
        """Raise ConfigError if a loss has no gradient."""
        if not loss.requires_grad:
            raise ConfigError(NO_GRADIENT)

    @abstractmethod
    def _apply(self, clip: float | None) -> tuple[bool, float | None]:
        """Unscale, clip and apply the gradients; return whether it did, and the global norm."""

    def _publish_scale(self) -> None:  # noqa: B027 (only DeepSpeed keeps a copy)
        """Pass the new scale to other code that scales the loss."""

    @abstractmethod
    def master_parts(self) -> list[Tensor]:
        """The tensors that hold this rank's part of the fp32 master weights.

        Few, flat and live if the engine allows it; read them again after every step, since an
        engine may move them. There may be padding between the fragments.
        """

    @abstractmethod
    def fragments_of(self, parts: Sequence[Tensor]) -> list[Fragment]:
        """Views of tensors that are laid out like `master_parts`, as fragments."""

    def master_fragments(self) -> list[Fragment]:
        """This rank's part of the fp32 master weights; live if the engine allows it."""
        return self.fragments_of(self.master_parts())

    @abstractmethod
    def optimizer_fragments(self) -> dict[str, list[Fragment]]:
        """This rank's part of the optimizer's per-element state, live, by the state's name."""

    @abstractmethod
    def flat_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Every tensor that the optimizer steps, with its state."""

    def scale_state(self) -> dict[str, Any]:
        """The loss scaler's numbers; empty outside fp16."""
        return self.scaler.state() if self.scaler is not None else {}

    def load_scale_state(self, state: Mapping[str, Any]) -> None:
        """Take over the loss scaler's numbers."""
        if self.scaler is not None:
            self.scaler.load_state(state)
            self._publish_scale()

    @abstractmethod
    def load_master(self, saved: Elements) -> None:
        """Set master and model weights from flat fp32 tensors by name.

        A rank reads its own fragments and has the rest, if it keeps more, from the others.
        Collective: every rank must call.
        """

    @contextmanager
    def swapped_weights(self, fragments: Sequence[Fragment]) -> Iterator[None]:
        """Gather other weights into the model, and restore its own at the end. Collective."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.layout.gather_into(fragments, self._parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(own[name])

    def make_replica(self, model: nn.Module | None) -> Replica | None:
        """A second model for other weights, if swapping them into the first would cost too much."""
        return None

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Wrap forward and backward of one micro-batch; gradients are reduced in the last one."""
        return nullcontext()

    def optimizer_scalars(self) -> dict[str, float]:
        """State of the optimizer that is one number for all parameters, such as Adam's step."""
        return scalars_of(self.flat_states())

    def optimizer_scalars_by_parameter(self) -> dict[str, dict[str, float]]:
        """These numbers by parameter if they differ, because some steps left parameters out."""
        return {}

    @abstractmethod
    def load_optimizer(self, saved: SavedOptimizer) -> None:
        """Take over the optimizer's state."""

    def restart(self, whole: Mapping[str, Tensor]) -> None:
        """Set the weights, flat fp32 by name, and reset the optimizer's state."""
        self.load_master(WholeTensors(whole))
        scalars = dict.fromkeys(self.optimizer_scalars(), 0.0)
        self.load_optimizer(SavedOptimizer(sorted(self.optimizer_fragments()), scalars))

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """The shape of every trained parameter, by name."""
        return {name: p.shape for name, p in self._parameters.items()}

    def commit_bn(self, applied: bool) -> None:
        """Update the running statistics of batch normalisation, or discard those of this step."""
        self._running.commit() if applied else self._running.discard()

    def paused_bn(self) -> AbstractContextManager[None]:
        """Inside, passes do not count towards the running statistics of batch normalisation."""
        return self._running.paused()

    @contextmanager
    def virtual_batches(self, rows: Sequence[int]) -> Iterator[None]:
        """Have batch normalisation treat these runs of rows as separate batches."""
        runs = tuple(rows) if len(rows) > 1 else None  # compiled graphs depend on their sizes
        for norm in self._running.norms:
            norm.virtual_batches = runs
        try:
            yield
        finally:
            for norm in self._running.norms:
                norm.virtual_batches = None

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of every parameter group, keeping the ratios between them."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.setdefault("lr_scale", 1.0)


def _whole_size(parameter: nn.Parameter) -> int:
    """A parameter's total number of elements; a shard of it has fewer."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def __getattr__(name: str) -> object:
    """Find names that have moved from here."""
    return find_moved(__name__, name)
