"""ZeRO stage 3 behind the engine: the half-precision weights are sharded too; offload to NVMe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpdist.data.structures import Structure, as_dtype, tensors_of
from hpdist.distributed.batch_norm import batch_norms
from hpdist.distributed.collectives import raise_together
from hpdist.distributed.fragments import Elements, Fragment
from hpdist.distributed.module_names import named_parameters
from hpdist.distributed.normalisation.running import RunningStatistics
from hpdist.engines.base import Replica
from hpdist.engines.reentrant import reentrant_error
from hpdist.engines.zero import FlatSlice, ZeroEngine
from hpdist.engines.zero_shapes import unregister_empty
from hpdist.errors import ConfigError


def partition_weights(model: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Partition every weight by DeepSpeed's config, in the dtype that it trains.

    One weight after the other is copied onto the device and released. So weights that are pages of
    a checkpoint's files, which ranks share, never become a rank's own memory: DeepSpeed alone
    would write into the pages. Buffers stay whole. Collective: every rank must call.
    """
    import deepspeed

    values = {key: value for key, value in config.items() if key != "train_batch_size"}  # "auto"
    dtype = torch.float32
    for half, kind in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if (values.get(half) or {}).get("enabled"):
            dtype = kind
    unregister_empty(model, dtype, device)
    scalars = [parameter for parameter in model.parameters() if parameter.dim() == 0]
    deepspeed.zero.Init(module=_OneByOne(model, dtype, device), config_dict_or_path=values)
    for parameter in scalars:
        parameter.ds_shape = torch.Size([])  # type: ignore[attr-defined]
    for buffer in model.buffers():  # DeepSpeed assumes that they are on the device as well
        buffer.data = buffer.data.to(device)


class _OneByOne(nn.Module):
    """Copies each parameter when it is needed, all into the same memory."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._dtype = dtype
        self._device = device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The model's parameters, each to be partitioned before the next is requested."""
        sizes = [p.numel() for p in self.model.parameters() if p.is_floating_point()]
        # Separate copies would leave holes in the heap, together as large as a shard.
        shared = torch.empty(max(sizes, default=0), dtype=self._dtype, device=self._device)
        last = None
        for parameter in self.model.parameters(recurse):
            if last is not None and last.data_ptr() == shared.data_ptr():
                shared = torch.empty_like(shared)  # DeepSpeed has requested this one too early
            shape = parameter.shape or (1,)  # DeepSpeed sends it as bytes, so it needs a dimension
            if parameter.is_floating_point():
                whole = shared[: parameter.numel()].view(shape)
                parameter.data = whole.copy_(parameter.data.view(shape))
            elif not parameter.dim():
                parameter.data = parameter.data.view(shape)
            last = parameter
            yield parameter


class PartitionedEngine(ZeroEngine):
    """ZeRO 3: every rank holds a part of each weight; a second forward in a step is avoided."""

    fuses_weak_pass = True

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(accelerator, model, optimizer)
        self._checked_graph = False  # whether a forward with gradient was looked at

    def forward(self, inputs: Structure) -> Any:
        """Outputs in fp32; the hooks gather the parameters.

        Raises ConfigError on all ranks, in the first step, for a reentrant checkpoint. Collective.
        """
        outputs = super().forward(inputs)
        if not self._checked_graph and torch.is_grad_enabled():
            self._checked_graph = True
            raise_together(reentrant_error(tensors_of(outputs)))
        return outputs

    @torch.no_grad()
    def infer(self, inputs: Structure) -> Any:
        """Outputs in fp32; the hooks gather the parameters."""
        return self._requested(self.deepspeed(as_dtype(inputs, self._dtype)))

    def whole_parameters(self) -> dict[str, Tensor]:
        """Empty: every rank holds only a part of each parameter."""
        return {}

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """The whole shape of every parameter."""
        return {name: p.ds_shape for name, p in self._sharded()}

    def master_parts(self) -> list[Tensor]:
        """This rank's flat fp32 part of each sub-group, live; a copy if it is on NVMe."""
        # Not by DeepSpeed's getters: they copy what is offloaded, and wait for the device once per
        # parameter.
        parts = []
        for number, flat in enumerate(self._flat_parts()):
            with self._in_memory(number):
                parts.append(flat.detach().clone() if self._is_swapped(number) else flat.detach())
        return parts

    @torch.no_grad()
    def load_master(self, saved: Elements) -> None:
        """Copy into this rank's parts."""
        for number, flat in enumerate(self._flat_parts()):
            with self._in_memory(number, write=True):
                for place in self._slices():
                    if place.part == number:
                        stop = place.start + place.length
                        values = saved.read(place.name, place.start, stop)
                        flat.detach()[place.at : place.at + place.length].copy_(values)
        self._copy_into_shards(self.master_fragments())

    @contextmanager
    def swapped_weights(self, fragments: Sequence[Fragment]) -> Iterator[None]:
        """Copy into this rank's parts, which the forward gathers as usual: no collective here."""
        self._release_gathered()
        own = {name: read_shard(p) for name, p in self._sharded()}
        self._copy_into_shards(fragments)
        try:
            yield
        finally:
            self._release_gathered()
            for name, parameter in self._sharded():
                write_shard(parameter, own[name])

    def make_replica(self, model: nn.Module | None) -> Replica | None:
        """Make a second engine: swapping in the first would break its prefetch order every step."""
        if model is None:
            raise ConfigError(
                "under ZeRO-3 an algorithm whose targets come from the teacher needs a second "
                "model; give teacher_model"
            )
        config = self.deepspeed.config
        return PartitionedReplica(model, config, self._dtype, self.device, self._requested)

    def _flat_parts(self) -> list[Tensor]:
        return list(self.deepspeed.optimizer.fp32_partitioned_groups_flat)

    def _forget_gradients(self) -> None:
        """Clear the partitioned gradients too.

        For a parameter that a step's backward does not reach, stage 3 would otherwise apply the
        gradient of an earlier step again, but not after a restart.
        """
        super()._forget_gradients()
        self.deepspeed.optimizer.grad_partitions_flat_buffer.zero_()

    def _release_gathered(self) -> None:
        """Release parameters that an earlier forward has left whole, with their old values."""
        self.deepspeed.optimizer.parameter_offload.partition_all_parameters()

    def _sharded(self) -> Iterator[tuple[str, Any]]:
        return iter(cast(dict[str, Any], self._parameters).items())

    def _slices(self) -> Iterator[FlatSlice]:
        """The unpadded part of each parameter's partition; ranks hold equal ranges in order."""
        wrapped = self.deepspeed.optimizer
        for name, parameter in self._sharded():
            part, at, _ = wrapped.grad_position[wrapped.get_param_id(parameter)]
            start = min(self.rank * parameter.ds_tensor.ds_numel, parameter.ds_numel)
            length = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)
            yield FlatSlice(name, start, part, at, length)

    def _is_swapped(self, part: int) -> bool:
        return bool(self.deepspeed.optimizer._swappable_optimizer_subgroup(part))

    @contextmanager
    def _in_memory(self, part: int, *, write: bool = False) -> Iterator[None]:
        """Read a sub-group from NVMe, if it is there; its buffers are reused."""
        wrapped = self.deepspeed.optimizer
        if not self._is_swapped(part):
            yield
            return
        wrapped._optimizer_states_and_gradient_swap_in(part)
        try:
            yield
        finally:
            if write:
                wrapped._optimizer_states_and_gradient_swap_out(part)
            else:
                wrapped._release_swap_buffers(part)

    def _state_of(self, part: int) -> dict[str, list[Fragment]]:
        """The state of a sub-group, copied out of the buffers if it comes from NVMe."""
        found = super()._state_of(part)
        if not self._is_swapped(part):
            return found
        return {key: [f.like(f.values.clone()) for f in state] for key, state in found.items()}

    def _copy_into_shards(self, fragments: Sequence[Fragment]) -> None:
        for fragment in fragments:
            write_shard(cast(Any, self._parameters[fragment.name]), fragment.values)


class PartitionedReplica:
    """A second ZeRO-3 engine without an optimizer, partitioned like the first."""

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        wanted: Callable[[Any], Structure],
    ) -> None:
        import deepspeed

        kept = ("train_micro_batch_size_per_gpu", "fp16", "bf16")
        values: dict[str, Any] = {key: config[key] for key in kept if key in config}
        zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
        offload = config["zero_optimization"].get("offload_param") or {}
        if offload.get("device", "none") != "none":
            # From NVMe to the CPU: every step overwrites it, and it would delete the first's files.
            zero["offload_param"] = {"device": "cpu"}
        values["zero_optimization"] = zero
        self._dtype = dtype
        self._requested = wanted
        partition_weights(model, values, device)
        self._engine = deepspeed.initialize(model=model.to(dtype), config=values)[0]
        self._engine.module.train()
        self._parameters = dict(named_parameters(self._engine.module))
        self._running = RunningStatistics(batch_norms(self._engine.module))

    @contextmanager
    def swapped_weights(self, fragments: Sequence[Fragment]) -> Iterator[None]:
        """Copy this rank's part; no collective."""
        for fragment in fragments:
            write_shard(cast(Any, self._parameters[fragment.name]), fragment.values)
        yield

    @torch.no_grad()
    def infer(self, inputs: Structure) -> Structure:
        """Outputs in fp32, in training mode; batch statistics are discarded."""
        with self._running.paused():
            return self._requested(self._engine(as_dtype(inputs, self._dtype)))

    def tensors(self) -> list[Tensor]:
        """This rank's part of each weight, and the buffers."""
        shards = [cast(Any, parameter).ds_tensor for parameter in self._parameters.values()]
        return [*shards, *self._engine.module.buffers()]


def read_shard(parameter: Any) -> Tensor:
    """A copy of this rank's part of a ZeRO-3 parameter, from memory or from NVMe."""
    shard = parameter.ds_tensor
    if not _is_on_nvme(parameter):
        return cast(Tensor, shard.detach().clone())
    values = torch.empty(shard.ds_numel, dtype=parameter.dtype)
    parameter.nvme_swapper.swap_into_buffer(parameter, values)
    return values


@torch.no_grad()
def write_shard(parameter: Any, values: Tensor) -> None:
    """Set this rank's part of a ZeRO-3 parameter, in memory or on NVMe; padding may be left out."""
    shard = parameter.ds_tensor
    if not _is_on_nvme(parameter):
        shard.data[: len(values)].copy_(values)
        return
    padded = torch.nn.functional.pad(values.detach(), (0, shard.ds_numel - len(values)))
    parameter.nvme_swapper.swap_out_partitioned_params([parameter], [padded])


def _is_on_nvme(parameter: Any) -> bool:
    """Whether a shard is stored on NVMe; if so, a prefetched copy is dropped."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    shard, swapper = parameter.ds_tensor, parameter.nvme_swapper
    if shard.final_location != OffloadDeviceEnum.nvme:
        return False
    if shard.status == PartitionedParamStatus.INFLIGHT:
        swapper.synchronize_reads()
    if shard.status == PartitionedParamStatus.AVAILABLE:
        swapper.remove_partition_and_release_buffers([parameter])
    return True
