"""The parameters that a step's backward passes reach, and DDP when one does not reach them all.

DDP waits for a gradient of every parameter on every rank. It can search for those that will get
none before each backward (`find_unused_parameters`), which costs a walk over the graph in every
step; without that, a parameter that no loss depends on ends the run, and one that only some ranks
reach leaves ranks waiting. Here a rank's missing gradients are zeros, given to DDP when its own
backward is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpdist.distributed.collectives import sums, world_size
from hpdist.distributed.module_names import collapsed, shortened


class GradientWatch:
    """Records by hooks which parameters have received a gradient."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.reached: set[str] = set()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._note, name))
            for name, parameter in parameters.items()
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, name: str, _: Tensor) -> None:
        self.reached.add(name)


def reached_nowhere(missing: Iterable[str], names: Sequence[str]) -> tuple[list[str], bool]:
    """Return which of all parameters no rank reaches, and whether any rank misses any.

    Collective: every rank must call.
    """
    unreached = set(missing)
    counts = sums([int(name in unreached) for name in names])
    ranks = world_size()
    nowhere = [name for name, count in zip(names, counts, strict=True) if count == ranks]
    return nowhere, any(counts)


def unreached_note(model: nn.Module, names: list[str], then: str) -> str:
    """The warning about parameters that the first step has given no gradient on any rank.

    `then` says what the optimizer does with parameters that no step reaches.
    """
    return (
        f"model: the loss of the first step does not reach {shortened(collapsed(model, names))}; "
        f"what no step reaches {then}. If intended, freeze it (requires_grad = False); else "
        "look for a layer that forward() leaves out, a detach(), no_grad(), or a "
        "torch.utils.checkpoint that needs use_reentrant=False"
    )


class DdpUsage:
    """Completes DDP's reduction if a rank's backward has not reached every parameter.

    A parameter that no rank reaches in a step then has no gradient, as with one process, so the
    optimizer leaves it alone. For that the ranks must inform each other, in one small all-reduce
    a step. They do so in the first step, and in every step after one has missed a gradient. Until
    then a missing gradient is zero.

    Args:
        ddp: The wrapper.
        parameters: All trained parameters.
    """

    def __init__(
        self, ddp: DistributedDataParallel, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self.shared = False
        """Whether the ranks inform each other; the same on all."""
        self.missing: list[str] = []
        """The parameters that this rank's loss of the latest step does not reach."""
        self._ddp = ddp
        self._parameters = parameters
        self._watch: GradientWatch | None = None
        # Then it does all of this itself, and would take a second gradient for an error.
        self._leave_it = bool(ddp.find_unused_parameters or ddp.static_graph)

    def without_reduction(self) -> AbstractContextManager[None]:
        """Wrap a micro-batch that is not the last of the step."""
        if self._watch is None:
            # Its gradients hide which parameters the last one reaches.
            self._watch = GradientWatch(self._parameters)
        return cast(AbstractContextManager[None], self._ddp.no_sync())

    def begin_last(self) -> None:
        """Begin the last micro-batch of a step, after which DDP reduces."""
        if self._watch is not None:
            self._watch.reached.clear()

    def complete(self) -> None:
        """Give DDP the missing gradients after a backward; it reduces in a step's last one."""
        if not self._ddp.require_backward_grad_sync:
            return
        self.missing = [name for name, p in self._parameters.items() if p.grad is None]
        silent = self.missing
        if self._watch is not None:
            silent = [name for name in self._parameters if name not in self._watch.reached]
        if silent and not self._leave_it:
            parameters = [self._parameters[name] for name in silent]
            torch.autograd.backward(parameters, [torch.zeros_like(p) for p in parameters])

    def drop_unused(self) -> None:
        """Drop the zeros that stand for no gradient anywhere. Collective if `shared`."""
        if not self.shared or self._leave_it:
            return
        missing = set(self.missing)
        device = next(iter(self._parameters.values())).device
        used = torch.tensor([float(n not in missing) for n in self._parameters], device=device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        for parameter, is_used in zip(self._parameters.values(), used.tolist(), strict=True):
            if not is_used:
                parameter.grad = None
