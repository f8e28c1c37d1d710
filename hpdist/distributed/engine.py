"""One class that hides how the model is sharded: plain or DDP here, DeepSpeed ZeRO in `zero`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hpdist.distributed.batch_norm import batch_norms
from hpdist.distributed.fragments import Fragment, Layout, partition
from hpdist.distributed.loss_scale import DynamicLossScale
from hpdist.distributed.reduce import world_size
from hpdist.errors import DistributedError


@dataclass(frozen=True)
class EngineStep:
    """How the engine's optimizer step went."""

    applied: bool
    overflowed: bool
    old_scale: float
    new_scale: float
    grad_norm: float | None


class Engine(ABC):
    """Forward, backward and optimizer step of a prepared model, the same whatever shards it.

    A loss given to `backward` is this rank's contribution: the gradient that is applied is that of
    the sum over all ranks and micro-batches.
    """

    fuses_weak_pass = False
    """Whether a second forward in a step is better avoided."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self._norms = list(batch_norms(self.module))

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The user's own module, without wrappers."""

    @cached_property
    def layout(self) -> Layout:
        """Where every rank's fragments lie. Collective on first use: every rank must ask."""
        return Layout(self.master_fragments())

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """What the loss is multiplied by; 1 outside fp16."""

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Logits in fp32 of the student, with gradient."""

    @abstractmethod
    def infer(self, inputs: Tensor) -> Tensor:
        """Logits in fp32, without gradient, in whatever mode the module is."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Differentiate a contribution to the loss."""

    @abstractmethod
    def step(self, lr: float | None, clip: float | None, measure: bool) -> EngineStep:
        """Apply the gradients, unless they overflowed. Collective."""

    @abstractmethod
    def master_fragments(self) -> list[Fragment]:
        """This rank's part of the fp32 master weights; live where the engine allows it."""

    @abstractmethod
    def optimizer_fragments(self) -> dict[str, list[Fragment]]:
        """This rank's part of the optimizer's per-element state, live, by the state's name."""

    def optimizer_slots(self) -> dict[str, list[Fragment]]:
        """Every element of the optimizer's state that this rank holds, its own part or more."""
        return self.optimizer_fragments()

    @abstractmethod
    def flat_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Every tensor that the optimizer steps, with its state."""

    @abstractmethod
    def scale_state(self) -> dict[str, Any]:
        """The loss scaler's numbers; empty outside fp16."""

    @abstractmethod
    def load_scale_state(self, state: Mapping[str, Any]) -> None:
        """Take over the loss scaler's numbers."""

    @abstractmethod
    def load_master(self, whole: Mapping[str, Tensor]) -> None:
        """Set master and model weights from flat fp32 tensors by name, the same on every rank."""

    @abstractmethod
    def lend_weights(self, fragments: Sequence[Fragment]) -> AbstractContextManager[None]:
        """Put other weights into the model for a while. Collective."""

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Wrap forward and backward of one micro-batch; gradients are reduced in the last one."""
        return nullcontext()

    def optimizer_scalars(self) -> dict[str, float]:
        """The optimizer's state that is one number for all parameters, such as Adam's step."""
        for _, state in self.flat_states():
            return {
                key: float(value)
                for key, value in state.items()
                if isinstance(value, (int, float))
                or (isinstance(value, Tensor) and value.dim() == 0)
            }
        return {}

    def make_optimizer_state(self, keys: Sequence[str], scalars: Mapping[str, float]) -> None:
        """Give every tensor zeroed state under `keys`, and the scalars, as after the first step."""
        for tensor, state in self.flat_states():
            state.update({key: torch.zeros_like(tensor, requires_grad=False) for key in keys})
            state.update({key: torch.tensor(value) for key, value in scalars.items()})

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter that is trained, by name."""
        return {n: p.shape for n, p in self.module.named_parameters() if p.requires_grad}

    def finish_norms(self, applied: bool) -> None:
        """Move the running statistics of batch normalisation, or leave them as they were."""
        for norm in self._norms:
            norm.commit() if applied else norm.discard()

    def forget_norms(self) -> None:
        """Drop the latest pass from what batch normalisation saw in this step."""
        for norm in self._norms:
            norm.forget_pass()

    @contextmanager
    def segments(self, rows: Sequence[int]) -> Iterator[None]:
        """Have batch normalisation treat these runs of rows as separate batches."""
        for norm in self._norms:
            norm.segments = tuple(rows)
        try:
            yield
        finally:
            for norm in self._norms:
                norm.segments = None

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of every parameter group, keeping the ratios between them."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.setdefault("lr_scale", 1.0)


class ReplicatedEngine(Engine):
    """Weights whole and fp32 on every rank, one or under DDP; mixed precision by autocast."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: str | None = None,
    ) -> None:
        super().__init__(accelerator, model, optimizer)
        self.precision = precision or {"no": "fp32"}.get(
            accelerator.mixed_precision, accelerator.mixed_precision
        )
        # Accelerate wraps the model's forward in autocast, except for fp16 on a CPU.
        self._own_autocast = self.precision == "fp16" and accelerator.mixed_precision == "no"
        self._scaler = DynamicLossScale() if self.precision == "fp16" else None
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        self._parameters = dict(named)
        self._pieces = partition([p.numel() for _, p in named], self.rank, self.world_size)
        self._names = [name for name, _ in named]
        for parameter in self._parameters.values():  # so that a flat view of it exists
            parameter.data = parameter.data.contiguous()

    @property
    def module(self) -> nn.Module:
        """The user's own module."""
        return cast(nn.Module, self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True))

    @property
    def loss_scale(self) -> float:
        """The scaler's scale in fp16, else 1."""
        return self._scaler.scale if self._scaler else 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits in fp32, through DDP's wrapper."""
        with self._autocast():
            return logits_of(self.model(inputs))

    @torch.no_grad()
    def infer(self, inputs: Tensor) -> Tensor:
        """Logits in fp32, past DDP's wrapper, which would expect a backward."""
        with self._autocast():
            return logits_of(self.module(inputs))

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Keep DDP from reducing before the last micro-batch."""
        if last or not hasattr(self.model, "no_sync"):
            return nullcontext()
        return cast(AbstractContextManager[None], self.model.no_sync())

    def backward(self, loss: Tensor) -> None:
        """DDP averages over ranks, so a contribution counts world-size times."""
        (loss * (self.world_size * self.loss_scale)).backward()

    def step(self, lr: float | None, clip: float | None, measure: bool) -> EngineStep:
        """Unscale, clip and apply; skip if a gradient is not finite in fp16."""
        if lr is not None:
            self.set_learning_rate(lr)
        scale = self.loss_scale
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = None
        if self._scaler is not None:
            torch._foreach_mul_(gradients, 1 / scale)
        if self._scaler is not None or clip is not None or measure:
            norm = torch.nn.utils.get_total_norm(gradients)
        overflowed = self._scaler is not None and not bool(torch.isfinite(cast(Tensor, norm)))
        if not overflowed:
            if clip is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    self._parameters.values(), clip, cast(Tensor, norm)
                )
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self._scaler is not None:
            self._scaler.update(overflowed)
        grad_norm = float(norm) if measure and norm is not None else None
        return EngineStep(not overflowed, overflowed, scale, self.loss_scale, grad_norm)

    def master_fragments(self) -> list[Fragment]:
        """Views of this rank's 1/N of the parameters."""
        return self._cut(self._parameters)

    def optimizer_fragments(self) -> dict[str, list[Fragment]]:
        """Views of this rank's 1/N of every state tensor that has its parameter's shape."""
        return {key: self._cut(tensors) for key, tensors in self._state_tensors().items()}

    def optimizer_slots(self) -> dict[str, list[Fragment]]:
        """The whole state: every rank holds all of it."""
        return {
            key: [Fragment(name, 0, tensor.view(-1)) for name, tensor in tensors.items()]
            for key, tensors in self._state_tensors().items()
        }

    def flat_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Every parameter with its state."""
        return [(p, self.optimizer.state[p]) for p in self._parameters.values()]

    def scale_state(self) -> dict[str, Any]:
        """The loss scaler's numbers; empty outside fp16."""
        return asdict(self._scaler) if self._scaler else {}

    def load_scale_state(self, state: Mapping[str, Any]) -> None:
        """Take over the loss scaler's numbers."""
        if self._scaler and state:
            self._scaler = DynamicLossScale(**state)

    @torch.no_grad()
    def load_master(self, whole: Mapping[str, Tensor]) -> None:
        """Copy into the parameters."""
        for name, parameter in self._parameters.items():
            parameter.copy_(whole[name].view(parameter.shape))

    @contextmanager
    def lend_weights(self, fragments: Sequence[Fragment]) -> Iterator[None]:
        """Gather, copy in, and put the own weights back at the end."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.load_master(self.layout.gather(fragments))
        try:
            yield
        finally:
            self.load_master(own)

    def _state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's per-element state by its name, then the parameter's."""
        by_state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    by_state.setdefault(key, {})[name] = value
        return by_state

    def _cut(self, tensors: dict[str, Any]) -> list[Fragment]:
        pieces = []
        for index, start, stop in self._pieces:
            name = self._names[index]
            if name in tensors:
                flat = tensors[name].detach().view(-1)
                pieces.append(Fragment(name, start, flat[start:stop]))
        return pieces

    def _autocast(self) -> AbstractContextManager[None]:
        if not self._own_autocast:
            return nullcontext()
        return cast(
            AbstractContextManager[None], torch.autocast(self.device.type, dtype=torch.float16)
        )


def logits_of(output: Any) -> Tensor:
    """The logits of whatever a model returns: a tensor, or an output with `.logits`; fp32."""
    return cast(Tensor, getattr(output, "logits", output)).float()


def ranks_are_apart(accelerator: Accelerator) -> bool:
    """Whether several processes run that the Accelerator does not join in one training."""
    launched = max(int(os.environ.get("WORLD_SIZE", "1")), world_size())
    return launched > 1 and accelerator.distributed_type == DistributedType.NO


def make_engine(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: str | None = None,
) -> Engine:
    """The engine for a model and an optimizer that `accelerator.prepare` returned."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from hpdist.distributed.zero import zero_engine

        return zero_engine(accelerator, model, optimizer)
    if ranks_are_apart(accelerator):
        raise DistributedError(
            "several ranks were launched, but this Accelerator leaves each to train by itself; "
            "on CPU ranks make it with Accelerator(cpu=True)"
        )
    return ReplicatedEngine(accelerator, model, optimizer, precision)
