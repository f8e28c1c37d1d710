"""FSDP2 behind the engine: weights, gradients and optimizer state sharded by torch itself.

`hpdist.engines.fsdp2_shard` shards the model. The shards are the fp32 master weights; a gathered
unit is in half precision if the run is. A shard is a range of a weight's first dimension, so it is
contiguous, and a fragment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hpdist.data.structures import Structure, as_dtype
from hpdist.distributed.collectives import summed
from hpdist.distributed.fragments import Elements, Fragment, flat_view
from hpdist.distributed.module_names import named_parameters, plain_name, without_wrappers
from hpdist.engines.base import Engine
from hpdist.engines.config import LossScale
from hpdist.engines.fsdp2_shard import DTYPES, Sharded
from hpdist.engines.loss_scale import LossScaler
from hpdist.engines.optimizer_state import SavedOptimizer, make_state, scalars_by_parameter
from hpdist.engines.reach import GradientWatch


class ShardedEngine(Engine):
    """Every rank holds a part of each weight; a unit's weights are gathered when it computes."""

    unreached = "changes only by weight decay under FSDP2, where its gradient is zero"
    refuses_save_state = (
        "accelerator.save_state and load_state do not know a model that hpdist.fully_shard has "
        "sharded; hpdist.Trainer's checkpoints do, on any number of processes"
    )

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sharded: Sharded,
        loss_scale: LossScale | None = None,
    ) -> None:
        found = [(plain_name(n), m) for n, m in model.named_modules() if isinstance(m, FSDPModule)]
        self._units: dict[str, FSDPModule] = dict(found)
        super().__init__(accelerator, model, optimizer)
        self._dtype = DTYPES[sharded.precision]
        self._reshards = sharded.reshards
        self._last = True
        self._ran: set[str] = set()
        for name, unit in found:
            hook = partial(self._note_run, name)
            cast(nn.Module, unit).register_forward_pre_hook(hook)
        if sharded.precision == "fp16":
            self.scaler = LossScaler.of(loss_scale or LossScale())
        # Parameters of which this rank has elements, and the first of these.
        self._starts = {
            name: start
            for name, parameter in self._shards()
            if (start := first_element(parameter)) is not None
        }

    @property
    def module(self) -> nn.Module:
        """The user's own module, of a class that `fully_shard` has derived from its own."""
        return without_wrappers(self.model)

    @property
    def forward_communicates(self) -> bool:
        """Whether a forward waits for the other ranks, which it does for their shards."""
        return self.world_size > 1

    def forward(self, inputs: Structure) -> Any:
        """Outputs in fp32; the weights are gathered unit by unit."""
        try:
            outputs = self.model(as_dtype(inputs, self._dtype))
        except Exception:
            # An evaluation that fails on all ranks must leave the weights as they were.
            with suppress(RuntimeError):  # before the first forward there is nothing to reset
                cast(FSDPModule, self.model).reset_iter_state()
            raise
        return self._requested(outputs)

    @torch.no_grad()
    def infer(self, inputs: Structure) -> Any:
        """Outputs in fp32. A second forward in a step gathers again, or not at all.

        It is not fused into the student's: gathering costs less than the weak views' backward.
        """
        return self.forward(inputs)

    def probe_forward(self, inputs: Structure) -> Any:
        """Outputs in fp32, with gradient."""
        return self.forward(inputs)

    def whole_parameters(self) -> dict[str, Tensor]:
        """Empty: every rank holds only a part of each parameter."""
        return {}

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Reduce in the last micro-batch only, if the weights stay gathered until then too.

        Where they are released, there may be no room for whole gradients either, so every
        micro-batch reduces its own.
        """
        self._last = last or self._reshards
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Scale the loss: FSDP averages over ranks, so a contribution counts world-size times.

        The ranks reduce the same weights, with zeros for missing gradients; but not in a backward
        outside the step, which has none and need not communicate.
        """
        self._require_gradient(loss)
        self._set_reduction(self._last, unused=True)
        torch.autograd.backward(loss * (self.world_size * self.loss_scale))
        self._set_reduction(self._last, unused=False)

    def _apply(self, clip: float | None) -> tuple[bool, float | None]:
        """Every rank finds the same norm, by one small all-reduce; unscale, clip and step."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        own = [local(gradient) for gradient in gradients]
        if self.loss_scale != 1:
            torch._foreach_mul_(own, 1 / self.loss_scale)
        squares = torch.nn.utils.get_total_norm(own).to(self.device).double().square()
        norm = float(summed(squares).sqrt())  # the step's only wait for the device
        finite = math.isfinite(norm)
        if finite:
            if clip is not None and norm > clip:
                torch._foreach_mul_(own, clip / (norm + 1e-6))
            self.optimizer.step()
        self.optimizer.zero_grad()
        return finite, norm

    def master_parts(self) -> list[Tensor]:
        """This rank's part of each weight, fp32, live."""
        return [flat_view(local(self._parameters[name])) for name in self._starts]

    def fragments_of(self, parts: Sequence[Tensor]) -> list[Fragment]:
        """The parts, named."""
        places = zip(self._starts.items(), parts, strict=True)
        return [Fragment(name, start, values) for (name, start), values in places]

    def flat_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Every parameter that the optimizer steps, with its state, both sharded."""
        return [(p, self.optimizer.state[p]) for p in self._parameters.values()]

    def optimizer_fragments(self) -> dict[str, list[Fragment]]:
        """Views of this rank's part of every state tensor per element."""
        found: dict[str, list[Fragment]] = {}
        for name, start in self._starts.items():
            state = self.optimizer.state.get(self._parameters[name], {})
            for key, value in state.items():
                if isinstance(value, DTensor):
                    values = flat_view(local(value))
                    found.setdefault(key, []).append(Fragment(name, start, values))
        return found

    def optimizer_scalars_by_parameter(self) -> dict[str, dict[str, float]]:
        """The numbers of parameters that some steps left out."""
        return scalars_by_parameter(self._parameters, self.flat_states())

    @torch.no_grad()
    def load_optimizer(self, saved: SavedOptimizer) -> None:
        """Load this rank's part of the state; a parameter without saved state gets none."""
        for (name, parameter), (_, state) in zip(self._shards(), self.flat_states(), strict=True):
            held = [key for key in saved.keys if saved.holds(key, name)]
            if saved.keys and not held:
                state.clear()
                continue
            make_state(parameter, state, held, saved.numbers_of(name))
            if name not in self._starts:
                continue
            for key in held:
                place = Fragment(name, self._starts[name], flat_view(local(state[key])))
                place.values.copy_(saved.read(key, place))

    @torch.no_grad()
    def load_master(self, saved: Elements) -> None:
        """Copy into this rank's shards."""
        for fragment in self.master_fragments():
            stop = fragment.start + len(fragment.values)
            fragment.values.copy_(saved.read(fragment.name, fragment.start, stop))
        self._release_gathered()

    @contextmanager
    def swapped_weights(self, fragments: Sequence[Fragment]) -> Iterator[None]:
        """Copy into this rank's shards, which the forward gathers as usual: no collective here.

        A second sharded model for the teacher would save these copies of a shard, at the price of
        one more shard in memory.
        """
        shards = {f.name: f.values for f in self.master_fragments()}
        own = {name: values.clone() for name, values in shards.items()}
        self._set_shards(shards, {f.name: f.values for f in fragments})
        try:
            yield
        finally:
            self._set_shards(shards, own)

    @torch.no_grad()
    def _set_shards(self, shards: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        self._release_gathered()
        if shards:
            torch._foreach_copy_(list(shards.values()), [values[name] for name in shards])

    def _release_gathered(self) -> None:
        """Release weights that an earlier forward has left whole, with their old values."""
        for unit in self._units.values():
            unit.reshard()

    def _set_reduction(self, reduces: bool, *, unused: bool) -> None:
        for name, unit in self._units.items():
            # A unit that never ran has no gathered weights, for whose gradients FSDP would look.
            keeps = not reduces and name in self._ran
            unit.set_reduce_scatter_unused_params(unused, recurse=False)
            unit.set_requires_gradient_sync(not keeps, recurse=False)
            unit.set_reshard_after_backward(not keeps, recurse=False)

    def _note_run(self, name: str, unit: nn.Module, arguments: Any) -> None:
        self._ran.add(name)

    def _make_watch(self) -> GradientWatch:
        return cast(GradientWatch, _GatheredWatch(self._units, self._parameters))

    def _shards(self) -> Iterator[tuple[str, DTensor]]:
        return iter(cast(dict[str, DTensor], self._parameters).items())


class _GatheredWatch:
    """Records which parameters a backward reaches: by their gathered copies.

    The shards receive zeros where there is no gradient.
    """

    def __init__(
        self, units: Mapping[str, FSDPModule], trained: Mapping[str, nn.Parameter]
    ) -> None:
        self.reached: set[str] = set()
        self._trained = trained
        self._watched: set[str] = set()
        self._handles = [
            cast(nn.Module, unit).register_forward_pre_hook(partial(self._gathered, name))
            for name, unit in units.items()
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _gathered(self, prefix: str, unit: nn.Module, arguments: Any) -> None:
        """Watch a unit's parameters, which are gathered by now; those of inner units are not."""
        for inner, parameter in named_parameters(unit):
            name = f"{prefix}.{inner}" if prefix else inner
            if name in self._trained.keys() - self._watched and not isinstance(parameter, DTensor):
                self._watched.add(name)
                note: Callable[[Tensor], None] = partial(self._note, name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(note))

    def _note(self, name: str, _: Tensor) -> None:
        self.reached.add(name)


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, live."""
    return cast(DTensor, tensor).to_local()


def first_element(parameter: DTensor) -> int | None:
    """The first of this rank's elements in a flat whole parameter; None if it has none.

    FSDP splits the rows of the first dimension as `torch.chunk` does: equally, rounded up, so that
    the last ranks may have fewer or none.
    """
    rows, own = parameter.shape[0], local(parameter)
    if not own.numel():
        return None
    mesh = parameter.device_mesh
    each = -(-rows // mesh.size())
    start = mesh.get_local_rank() * each
    assert len(own) == min(each, rows - start), "FSDP splits in another way"
    return start * (parameter.numel() // rows)
