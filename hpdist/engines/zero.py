"""DeepSpeed ZeRO behind the engine: its config, and its stages 0 to 2; stage 3 is in `zero3`.

Only these two modules know DeepSpeed. Workarounds name the upstream report; a test fails when
upstream has mended it.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from hpdist.data.structures import Structure, as_dtype
from hpdist.distributed.collectives import raise_together
from hpdist.distributed.fragments import Fragment
from hpdist.distributed.module_names import without_wrappers
from hpdist.engines.base import Engine
from hpdist.engines.config import LossScale
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.engines.launcher import hide_launcher_fields
from hpdist.engines.loss_scale import LossScaler
from hpdist.engines.optimizer_state import HasWholeState, SavedOptimizer, WholeState, make_state
from hpdist.engines.zero_reach import reduce_alike
from hpdist.errors import CheckpointError, ConfigError


def make_plugin(sharding: ExecutionPlan) -> DeepSpeedPlugin:
    """Accelerate's DeepSpeed plug-in for a run; a JSON file named at launch is the base.

    What hpdist must decide itself (batch sizes, clipping, precision, stage) overrides the file.
    """
    values = copy.deepcopy(dict(sharding.base))
    zero = values["zero_optimization"] = values.get("zero_optimization") or {}
    zero["stage"] = sharding.stage
    zero.setdefault("reduce_bucket_size", 50_000_000)  # a tenth of DeepSpeed's, which is 1 GB
    if sharding.offload != "none" and "offload_optimizer" not in zero:  # else the file decides
        target = {"device": sharding.offload, "nvme_path": sharding.nvme_path}
        parts = ("optimizer", "param") if sharding.stage == 3 else ("optimizer",)
        for part in parts:
            zero[f"offload_{part}"] = (zero.get(f"offload_{part}") or {}) | target
    if sharding.stage == 3:
        # Small parameters that stay whole would keep the student's values under a lent teacher.
        zero["stage3_param_persistence_threshold"] = 0
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", False)
    values["train_micro_batch_size_per_gpu"] = sharding.micro_batch
    values["gradient_accumulation_steps"] = sharding.accumulation
    values["train_batch_size"] = "auto"
    values["gradient_clipping"] = sharding.grad_clip or 0.0
    values["zero_allow_untested_optimizer"] = True
    values["zero_force_ds_cpu_optimizer"] = False  # the optimizer stays the one that was asked for
    for half in ("fp16", "bf16"):
        values[half] = (values.get(half) or {}) | {"enabled": half == sharding.precision}
    _set_loss_scale(values["fp16"], sharding.loss_scale)
    on_nvme = any(
        (zero.get(f"offload_{part}") or {}).get("device") == "nvme"
        for part in ("optimizer", "param")
    )
    if on_nvme:
        _check_async_io()
    if not torch.cuda.is_available() and (sharding.precision == "fp16" or on_nvme):
        # Where a device has no fp16, parameters on NVMe become bf16, in fp32 too
        # (https://github.com/deepspeedai/DeepSpeed/pull/8428).
        _allow_fp16_on_cpu()
    hide_launcher_fields()
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    return DeepSpeedPlugin(hf_ds_config=values, zero3_init_flag=False)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a warning of DeepSpeed's is of use: it doubts optimizers that are not its own."""
    return "untested optimizer" not in record.getMessage()


def _set_loss_scale(fp16: dict[str, Any], config: LossScale) -> None:
    """Set what file and config have agreed on."""
    fp16["loss_scale"] = config.static or 0
    fp16["initial_scale_power"] = int(math.log2(config.initial))
    fp16["loss_scale_window"] = config.growth_interval
    fp16["min_loss_scale"] = config.minimum


def _allow_fp16_on_cpu() -> None:
    """Lift DeepSpeed's refusal; the caller has asked the user already."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def _check_async_io() -> None:
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not installed_ops.get("async_io") and not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "zero.offload: nvme needs libaio, on which DeepSpeed builds its asynchronous I/O, and "
            "finds none; install libaio-dev (Debian) or libaio-devel (Fedora), or offload to cpu"
        )


def _missing(folder: Path, rank: int, sharded: bool) -> CheckpointError | None:
    """What is wrong where a rank's files of DeepSpeed's are not in the folder of a state."""
    needed = ["*model_states.pt"]
    if sharded:
        needed.append(f"*zero_pp_rank_{rank}_mp_rank_*optim_states.pt")
    for pattern in needed:
        if next(folder.glob(pattern), None) is None:
            return CheckpointError(
                f"load_state: rank {rank} finds no {pattern} of DeepSpeed's in {str(folder)!r}; "
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

    unreached = "is moved by weight decay alone under DeepSpeed, which takes its gradient for zero"

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.deepspeed = cast(Any, model)
        super().__init__(accelerator, model, self.deepspeed.optimizer)
        self._dtype = next(p.dtype for p in self._parameters.values() if p.is_floating_point())
        self._take_over_scale()
        if self.world_size > 1 and int(self.deepspeed.zero_optimization_stage()) in (1, 2):
            reduce_alike(self.deepspeed.optimizer, self._parameters)

    @property
    def module(self) -> nn.Module:
        """The user's own module, in half precision."""
        return without_wrappers(cast(nn.Module, self.deepspeed.module))

    @property
    def has_stepped(self) -> bool:
        """Whether DeepSpeed has; it gives its optimizer a state before the first step."""
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

        Then CheckpointError is raised, on every rank, where one does not find DeepSpeed's files: it
        would raise an error of its own on that rank alone, which names none.
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
        return self._wanted(self.deepspeed(as_dtype(inputs, self._dtype)))

    @torch.no_grad()
    def infer(self, inputs: Structure) -> Any:
        """Outputs in fp32; the parameters are whole, so DeepSpeed need not know."""
        return self.probe_forward(inputs)

    def probe_forward(self, inputs: Structure) -> Any:
        """Outputs in fp32, with gradient, past DeepSpeed's wrapper."""
        return self._wanted(self.deepspeed.module(as_dtype(inputs, self._dtype)))

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over ranks and micro-batches: a contribution counts so many times."""
        self._require_gradient(loss)
        parts = self.world_size * self.deepspeed.gradient_accumulation_steps()
        self.deepspeed.backward(loss * parts)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # only counts the micro-batch

    def master_parts(self) -> list[Tensor]:
        """This rank's flat fp32 part of each parameter group, live; on the CPU if offloaded."""
        return [flat.detach() for flat in self._flat_parts()]

    def fragments_of(self, parts: Sequence[Tensor]) -> list[Fragment]:
        """Views of what this rank owns of each parameter."""
        return [
            Fragment(place.name, place.start, parts[place.part].narrow(0, place.at, place.length))
            for place in self._slices()
        ]

    def optimizer_fragments(self) -> dict[str, list[Fragment]]:
        """Views of the optimizer state that this rank owns, live; copies of what is on NVMe."""
        found: dict[str, list[Fragment]] = {}
        for part in range(len(self._flat_parts())):
            with self._in_memory(part):
                for key, fragments in self._state_of(part).items():
                    found.setdefault(key, []).extend(fragments)
        return found

    def load_optimizer(self, saved: SavedOptimizer) -> None:
        """Take over the optimizer's state, one flat part after the other."""
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
        """Have a flat part and its state in memory for a while; keep changes if `write`."""
        return nullcontext()

    def flat_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """This rank's flat fp32 part of each parameter group, with its state."""
        wrapped = self.deepspeed.optimizer
        return [(flat, wrapped.optimizer.state[flat]) for flat in self._flat_parts()]

    @torch.no_grad()
    def load_master(self, whole: Mapping[str, Tensor]) -> None:
        """Copy into the fp32 parts and the half-precision weights."""
        for fragment in self.master_fragments():
            stop = fragment.start + len(fragment.values)
            fragment.values.copy_(whole[fragment.name][fragment.start : stop])
        self._load_weights(whole)

    @contextmanager
    def swapped_weights(self, fragments: Sequence[Fragment]) -> Iterator[None]:
        """Gather into the half-precision weights, and put the own ones back at the end."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.layout.spread(fragments, self._parameters)
        try:
            yield
        finally:
            self._load_weights(own)

    def _apply(self, clip: float | None) -> tuple[bool, float | None]:
        """Let DeepSpeed check, unscale, clip (by its config) and apply."""
        self.deepspeed.step()
        self._forget_gradients()
        norm = self.deepspeed.get_global_grad_norm()
        return bool(self.deepspeed.was_step_applied()), None if norm is None else float(norm)

    def _forget_gradients(self) -> None:
        """Clear the gradients that DeepSpeed keeps of what is offloaded.

        It writes there what a backward has reached, and would apply the rest again.
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
            theirs = self.deepspeed.optimizer.loss_scaler  # another one after `load_checkpoint`
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

    @torch.no_grad()
    def _load_weights(self, whole: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(whole[name].view(parameter.shape))


def _keep_scale(overflow: bool) -> None:
    """Do nothing, in the place of DeepSpeed's scaler; its checkpoints pickle it, by this name."""


class UnshardedEngine(HasWholeState, ZeroEngine):
    """Stage 0: everything whole on every rank; DeepSpeed keeps fp32 copies of half weights."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(accelerator, model, optimizer)
        self._masters: dict[str, Tensor] = {**self._parameters}
        wrapped = self.deepspeed.optimizer
        if hasattr(wrapped, "fp32_groups"):
            names = {parameter: name for name, parameter in self._parameters.items()}
            for halves, masters in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
                for half, master in zip(halves, masters, strict=True):
                    self._masters[names[half]] = master
        self._whole = WholeState(self._masters, wrapped, self.rank, self.world_size)

    @torch.no_grad()
    def load_master(self, whole: Mapping[str, Tensor]) -> None:
        """Copy into the fp32 copies and the half-precision weights."""
        for name, master in self._masters.items():
            master.copy_(whole[name].view(master.shape))
        self._load_weights(whole)

    def backward(self, loss: Tensor) -> None:
        """Scale the loss here: DeepSpeed unscales the gradients, but forgets to scale the loss.

        It is made to see a scale of 1 meanwhile, so that a version that remembers does no harm
        (https://github.com/deepspeedai/DeepSpeed/pull/8393).
        """
        self._tell_scale(1.0)
        super().backward(loss * self.loss_scale)

    def _apply(self, clip: float | None) -> tuple[bool, float | None]:
        """Let DeepSpeed apply, unless a gradient is not finite; in fp32 it would not ask."""
        self._tell_scale(self.loss_scale)
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / self.loss_scale
        finite = math.isfinite(norm)
        if not finite and self._dtype == torch.float32:
            for parameter in self._parameters.values():
                parameter.grad = None  # which the optimizer passes over
        self.deepspeed.step()
        return finite and bool(self.deepspeed.was_step_applied()), norm

    def _take_over_scale(self) -> None:
        """Own the loss scale, which stage 0 keeps elsewhere."""
        wrapped = self.deepspeed.optimizer
        theirs = getattr(wrapped, "loss_scale_config", None)
        if self._dtype != torch.float16 or theirs is None:
            return
        self.scaler = LossScaler(
            scale=float(theirs.cur_scale),
            growth_interval=theirs.scale_window or 1,
            minimum=theirs.min_loss_scale or 1,
            dynamic=bool(theirs.dynamic_loss_scale),
        )
        wrapped._update_scale = lambda skip: None

    def _publish_scale(self) -> None:
        self._tell_scale(self.loss_scale)

    def _tell_scale(self, scale: float) -> None:
        if self.scaler is not None:
            self.deepspeed.optimizer.loss_scale_config.cur_scale = scale
