"""The teacher: an exponential moving average of the weights, in fp32, sharded over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpdist.data.structures import Structure
from hpdist.distributed.fragments import Fragment
from hpdist.distributed.module_names import named_buffers, named_parameters, plain_name
from hpdist.engines.base import Engine, Replica


class ShardedTeacher:
    """theta' <- d theta' + (1 - d) theta, after every applied step t.

    While it warms up, d = min(decay, (1 + t) / (10 + t)), so that early weights are forgotten.
    Every rank holds its own 1/N of the average and updates it from its own part of the fp32 master
    weights, so an update communicates nothing. The average is fp32 even where those are bf16.
    Floating-point buffers (running statistics, equal on every rank) are averaged too, other buffers
    copied. Source: Tarvainen and Valpola 2017, arXiv:1703.01780, section 2.
    """

    def __init__(self, engine: Engine, decay: float = 0.999, warmup: bool = True) -> None:
        self.engine = engine
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._replica: Replica | None = None
        self._parts = [_fp32_copy(part) for part in engine.master_parts()]
        self.fragments = engine.fragments_of(self._parts)
        self.buffers = {name: b.detach().clone() for name, b in named_buffers(engine.module)}
        self._owners = _owners(engine.module)

    @property
    def decay_now(self) -> float:
        """The decay d of the next update."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the student; call it after every applied step, and only then."""
        decay = self.decay_now
        student = self.engine.master_parts()  # whole parts: one operation for all parameters
        if student and student[0].dtype == torch.float32:
            torch._foreach_lerp_(self._parts, student, 1 - decay)
        elif student:  # master weights in bf16, copied one part after the other
            for own, part in zip(self._parts, student, strict=True):
                own.lerp_(part.float(), 1 - decay)
        self._average_buffers(decay)
        self.updates += 1

    def _average_buffers(self, decay: float) -> None:
        """Move the floating-point buffers towards the student's, and copy the others."""
        buffers = [
            (self.buffers[name], getattr(owner, attribute))
            for name, (owner, attribute) in self._owners.items()
        ]
        averaged = [pair for pair in buffers if pair[0].is_floating_point()]
        copied = [pair for pair in buffers if not pair[0].is_floating_point()]
        if averaged:
            own, theirs = zip(*averaged, strict=True)
            torch._foreach_lerp_(own, theirs, 1 - decay)
        if copied:
            own, theirs = zip(*copied, strict=True)
            torch._foreach_copy_(own, theirs)

    @contextmanager
    def teacher_weights(self) -> Iterator[None]:
        """Swap the teacher's weights and buffers into the model, for evaluation.

        Collective: every rank must enter; one gather, none under ZeRO-3 and FSDP2.
        """
        buffers = {name: b.detach().clone() for name, b in named_buffers(self.engine.module)}
        with self.engine.swapped_weights(self.fragments):
            self._set_buffers(self.buffers)
            try:
                yield
            finally:
                self._set_buffers(buffers)

    def prepare_forward(self, model: nn.Module | None) -> None:
        """Prepare for a forward in each step. `model`, a second one, is used under ZeRO-3."""
        self._replica = self.engine.make_replica(model)

    @contextmanager
    def forward(self) -> Iterator[Callable[[Structure], Any]]:
        """Return a function from inputs to the teacher's outputs, in training mode, no gradient.

        Collective: every rank must enter; one gather, none under ZeRO-3 and FSDP2.
        """
        if self._replica is not None:
            with self._replica.swapped_weights(self.fragments):
                yield self._replica.infer
            return

        def infer(inputs: Structure) -> Any:
            with self.engine.paused_bn():  # running statistics follow the student only
                return self.engine.infer(inputs)

        with self.teacher_weights():
            yield infer

    def tensors(self) -> list[Tensor]:
        """All tensors that this rank keeps for the teacher, including those of a second model."""
        replica = [] if self._replica is None else self._replica.tensors()
        return [*self._parts, *self.buffers.values(), *replica]

    def whole(self) -> dict[str, Tensor]:
        """The teacher's parameters that have elements, with their shapes, fp32, and its buffers.

        Collective: every rank must call; one gather.
        """
        flat = self.engine.layout.gather(self.fragments)
        shapes = self.engine.parameter_shapes()
        complex_ = {n for n, p in named_parameters(self.engine.module) if p.is_complex()}
        whole = {
            name: torch.view_as_complex(flat[name].view(*shape, 2))
            if name in complex_
            else flat[name].view(shape)
            for name, shape in shapes.items()
        }
        return whole | self.buffers

    def load(self, fragments: list[Fragment], buffers: dict[str, Tensor], updates: int) -> None:
        """Load a saved teacher, already split into this rank's fragments."""
        for own, saved in zip(self.fragments, fragments, strict=True):
            own.values.copy_(saved.values)
        for name, buffer in buffers.items():
            self.buffers[name].copy_(buffer)
        self.updates = updates

    @torch.no_grad()
    def restart(self) -> None:
        """Restart from the student's weights and buffers."""
        for own, student in zip(self._parts, self.engine.master_parts(), strict=True):
            own.copy_(student)
        for name, buffer in named_buffers(self.engine.module):
            self.buffers[name].copy_(buffer)
        self.updates = 0

    @torch.no_grad()
    def _set_buffers(self, values: dict[str, Tensor]) -> None:
        for name, buffer in named_buffers(self.engine.module):
            buffer.copy_(values[name])


def _fp32_copy(part: Tensor) -> Tensor:
    """A copy of master weights; in fp32, as an average in bf16 would stand still."""
    dtype = torch.float32 if part.dtype == torch.bfloat16 else part.dtype
    return part.detach().to(dtype, copy=True)


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The modules that hold buffers, with their names: walking over all modules would be slow.

    It does not hold the buffers themselves, which a module may replace.
    """
    found = {}
    for name, _ in model.named_buffers():
        path, _, attribute = name.rpartition(".")
        found[plain_name(name)] = (model.get_submodule(path), attribute)
    return found
