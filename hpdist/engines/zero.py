"""DeepSpeed ZeRO behind the engine, stages 1 and 2; `zero0` and `zero3` build on it.

Only the modules of this package know DeepSpeed. Workarounds name the upstream report; a test fails
when upstream has fixed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpdist.aliases import find_moved
from hpdist.data.structures import Structure, as_dtype
from hpdist.distributed.collectives import call_on_all_ranks, raise_together
from hpdist.distributed.fragments import Elements, Fragment
from hpdist.distributed.module_names import without_wrappers
from hpdist.engines.base import Engine
from hpdist.engines.loss_scale import LossScaler
from hpdist.engines.optimizer_state import SavedOptimizer, make_state
from hpdist.engines.zero_reach import reduce_same_parameters
from hpdist.errors import CheckpointError


def _missing(folder: Path, rank: int, sharded: bool) -> CheckpointError | None:
    """The error if a rank's files of DeepSpeed's are missing from the folder of a state."""
    needed = ["*model_states.pt"]
    if sharded:
        needed.append(f"*zero_pp_rank_{rank}_mp_rank_*optim_states.pt")
    for pattern in needed:
        if next(folder.glob(pattern), None) is None:
            return CheckpointError(
                f"load_state: rank {rank} finds no {pattern} from DeepSpeed in {str(folder)!r}; "
                "load a folder that all ranks have saved to and that all machines share"
            )
    return None


class FlatSlice(NamedTuple):
    """Elements of a parameter from `start` on lie in a flat part from `at` on."""

    name: str
    start: int
    part: int
    at: int
    length: int


class ZeroEngine(Engine):
    """ZeRO 1 and 2: half-precision weights whole on every rank, fp32 master and state sharded."""

    unreached = "changes only by weight decay under DeepSpeed, which treats its gradient as zero"

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.deepspeed = cast(Any, model)
        super().__init__(accelerator, model, self.deepspeed.optimizer)
        self._dtype = next(p.dtype for p in self._parameters.values() if p.is_floating_point())
        self._take_over_scale()
        if self.world_size > 1 and int(self.deepspeed.zero_optimization_stage()) in (1, 2):
            reduce_same_parameters(self.deepspeed.optimizer, self._parameters)

    @property
    def module(self) -> nn.Module:
        """The user's own module, in half precision."""
        return without_wrappers(cast(nn.Module, self.deepspeed.module))

    @property
    def has_stepped(self) -> bool:
        """Whether DeepSpeed has stepped; it creates optimizer state before the first step."""
        return int(self.deepspeed.global_steps) > 0

    @property
    def saved_as(self) -> dict[str, int | str]:
        """The stage, the dtype of the weights and, where DeepSpeed shards, the number of ranks."""
        stage = int(self.deepspeed.zero_optimization_stage())
        dtype = str(self._dtype).removeprefix("torch.")
        found: dict[str, int | str] = {"stage": stage, "dtype": dtype}
        if stage:
            found["ranks"] = self.world_size
        return found

    @property
    def saved_steps(self) -> int:
        """The steps that DeepSpeed counts, skipped ones included."""
        return int(self.deepspeed.global_steps)

    def check_before_loading(self, check: Callable[[Path], None]) -> None:
        """Have `check(folder)` called by each rank before DeepSpeed loads anything.

        Then CheckpointError is raised, on every rank, if one does not find DeepSpeed's files:
        DeepSpeed would raise its own error on that rank only, without the name of a file.
        """
        load = partial(type(self.deepspeed).load_checkpoint, self.deepspeed)

        def checked(folder: str, tag: str | None = None, *args: Any, **options: Any) -> Any:
            check(Path(folder))
            if tag is not None:  # Accelerate always gives one
                sharded = "ranks" in self.saved_as
                raise_together(_missing(Path(folder, tag), self.rank, sharded))
            return load(folder, tag, *args, **options)

        self.deepspeed.load_checkpoint = checked

    def forward(self, inputs: Structure) -> Any:
        """Outputs in fp32 of a half-precision forward."""
        return self._requested(self.deepspeed(as_dtype(inputs, self._dtype)))

    @torch.no_grad()
    def infer(self, inputs: Structure) -> Any:
        """Outputs in fp32; the parameters are whole, so DeepSpeed is not involved."""
        return self.probe_forward(inputs)

    def probe_forward(self, inputs: Structure) -> Any:
        """Outputs in fp32, with gradient, bypassing DeepSpeed's wrapper."""
        return self._requested(self.deepspeed.module(as_dtype(inputs, self._dtype)))

    def backward(self, loss: Tensor) -> None:
        """Scale the contribution: DeepSpeed averages over ranks and micro-batches."""
        self._require_gradient(loss)
        parts = self.world_size * self.deepspeed.gradient_accumulation_steps()
        self.deepspeed.backward(loss * parts)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # only counts the micro-batch

    def master_parts(self) -> list[Tensor]:
        """This rank's flat fp32 part of each parameter group, live; on the CPU if offloaded."""
        return [flat.detach() for flat in self._flat_parts()]

    def fragments_of(self, parts: Sequence[Tensor]) -> list[Fragment]:
        """Views of this rank's part of each parameter."""
        return [
            Fragment(place.name, place.start, parts[place.part].narrow(0, place.at, place.length))
            for place in self._slices()
        ]

    def optimizer_fragments(self) -> dict[str, list[Fragment]]:
        """Views of this rank's part of the optimizer state, live; copies of what is on NVMe."""
        found: dict[str, list[Fragment]] = {}
        for part in range(len(self._flat_parts())):
            with self._in_memory(part):
                for key, fragments in self._state_of(part).items():
                    found.setdefault(key, []).extend(fragments)
        return found

    def load_optimizer(self, saved: SavedOptimizer) -> None:
        """Load the optimizer's state, one flat part after the other."""
        for part in range(len(self._flat_parts())):
            with self._in_memory(part, write=True):
                make_state(*self.flat_states()[part], saved.keys, saved.scalars)
                for key, fragments in ZeroEngine._state_of(self, part).items():
                    for fragment in fragments:
                        fragment.values.copy_(saved.read(key, fragment))

    def _state_of(self, part: int) -> dict[str, list[Fragment]]:
        """Live views of the state of a flat part that is in memory."""
        # Not by DeepSpeed's own mapping, which is made when only the first group has state.
        flat, state = self.flat_states()[part]
        return {
            key: [
                Fragment(place.name, place.start, values.narrow(0, place.at, place.length))
                for place in self._slices()
                if place.part == part
            ]
            for key, values in state.items()
            if isinstance(values, Tensor) and values.shape == flat.shape
        }

    def _in_memory(self, part: int, *, write: bool = False) -> AbstractContextManager[None]:
        """Hold a flat part and its state in memory for a while; keep changes if `write`."""
        return nullcontext()

    def flat_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """This rank's flat fp32 part of each parameter group, with its state."""
        wrapped = self.deepspeed.optimizer
        return [(flat, wrapped.optimizer.state[flat]) for flat in self._flat_parts()]

    @torch.no_grad()
    def load_master(self, saved: Elements) -> None:
        """Copy into this rank's fp32 part; the others' parts of the weights come from them."""
        own = self.master_fragments()

        def read() -> None:
            for fragment in own:
                stop = fragment.start + len(fragment.values)
                fragment.values.copy_(saved.read(fragment.name, fragment.start, stop))

        call_on_all_ranks(read)  # or others would wait in the gather for one that cannot read
        self.layout.gather_into(own, self._parameters)

    def _apply(self, clip: float | None) -> tuple[bool, float | None]:
        """Let DeepSpeed check, unscale, clip (by its config) and apply."""
        self.deepspeed.step()
        self._forget_gradients()
        norm = self.deepspeed.get_global_grad_norm()
        return bool(self.deepspeed.was_step_applied()), None if norm is None else float(norm)

    def _forget_gradients(self) -> None:
        """Clear the gradients that DeepSpeed keeps for offloaded parts.

        A backward overwrites only what it reaches, and DeepSpeed would apply the rest again.
        """
        for flat in self._flat_parts():
            if flat.grad is not None:
                flat.grad.zero_()

    def _take_over_scale(self) -> None:
        """Own the loss scale, so that it changes only after the step that it was used for.

        DeepSpeed unscales the gradients by the *new* scale, which halves the update on every step
        on which the scale grows (https://github.com/deepspeedai/DeepSpeed/pull/8588).
        """
        theirs = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        if self._dtype != torch.float16 or theirs is None:
            return
        self.scaler = LossScaler(
            scale=float(theirs.cur_scale),
            growth_interval=getattr(theirs, "scale_window", 1),
            minimum=getattr(theirs, "min_scale", 1),
            dynamic=bool(theirs.dynamic),
        )
        self._publish_scale()

    def _publish_scale(self) -> None:
        if self.scaler is not None:
            theirs = self.deepspeed.optimizer.loss_scaler  # another object after `load_checkpoint`
            theirs.cur_scale = self.scaler.scale
            theirs.update_scale = _keep_scale

    def _slices(self) -> Iterator[FlatSlice]:
        """Where this rank's part of each parameter lies in the flat parts."""
        for name, parameter in self._parameters.items():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                start, at = mapping.lp_fragment_address.start, mapping.hp_fragment_address
                yield FlatSlice(name, start, mapping.param_group_index, at.start, at.numel)

    def _flat_parts(self) -> list[Tensor]:
        return list(self.deepspeed.optimizer.single_partition_of_fp32_groups)


def _keep_scale(overflow: bool) -> None:
    """Do nothing, in place of DeepSpeed's scaler; its checkpoints pickle it, by this name."""


def __getattr__(name: str) -> object:
    """Find names that have moved from here."""
    return find_moved(__name__, name)
