"""DeepSpeed ZeRO behind the engine: its config, and its stages 1, 2 and 3.

The only module that knows DeepSpeed. Workarounds name the upstream report; a test fails when
upstream has mended it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from hpdist.config import Precision
from hpdist.distributed.engine import Engine, EngineStep, logits_of
from hpdist.distributed.fragments import Fragment
from hpdist.errors import ConfigError, PrecisionError

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_config_file(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON config; raises ConfigError where it cannot be read."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed config {path!r}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the DeepSpeed config {path!r} must hold an object")
    return values


def make_plugin(
    precision: Precision, stage: int, micro_batch: int, accumulation: int, grad_clip: float | None
) -> DeepSpeedPlugin:
    """Accelerate's DeepSpeed plug-in for a run; a config file named at launch is the base.

    What hpdist must decide itself (batch sizes, clipping, precision) overrides the file.
    """
    launcher_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    values = {} if launcher_file == "none" else read_config_file(launcher_file)
    zero = values.setdefault("zero_optimization", {})
    zero["stage"] = stage
    if stage == 3:
        # Small parameters that stay whole would keep the student's values under a lent teacher.
        zero["stage3_param_persistence_threshold"] = 0
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", False)
    values["train_micro_batch_size_per_gpu"] = micro_batch
    values["gradient_accumulation_steps"] = accumulation
    values["train_batch_size"] = "auto"
    values["gradient_clipping"] = grad_clip or 0.0
    values["zero_allow_untested_optimizer"] = True
    values["zero_force_ds_cpu_optimizer"] = False
    half = {"fp16": "fp16", "bf16": "bf16"}.get(precision)
    for name in ("fp16", "bf16"):
        values.setdefault(name, {})["enabled"] = name == half
    values["fp16"].setdefault("initial_scale_power", 16)
    values["fp16"].setdefault("hysteresis", 1)
    if precision == "fp16" and not torch.cuda.is_available():
        _allow_fp16_on_cpu()
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = "none"
    return DeepSpeedPlugin(hf_ds_config=values, zero3_init_flag=False)


def _allow_fp16_on_cpu() -> None:
    """Lift DeepSpeed's refusal; the caller has asked the user already."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def zero_engine(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Engine:
    """The engine for the stage that DeepSpeed was configured with."""
    stage = int(cast(Any, model).zero_optimization_stage())
    if stage == 3:
        return PartitionedEngine(accelerator, model, optimizer)
    if stage in (1, 2):
        return ZeroEngine(accelerator, model, optimizer)
    raise ConfigError("zero.stage: 0 is not supported yet; launch without DeepSpeed instead")


class ZeroEngine(Engine):
    """ZeRO 1 and 2: half-precision weights whole on every rank, fp32 master and state sharded."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.deepspeed = cast(Any, model)
        super().__init__(accelerator, model, self.deepspeed.optimizer)
        self._parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self._dtype = next(iter(self._parameters.values())).dtype
        self._held_back: list[bool] = []
        self._update_scale: Callable[[bool], None] | None = None
        self._hold_back_scale()

    @property
    def module(self) -> nn.Module:
        """The user's own module, in half precision."""
        return cast(nn.Module, self.deepspeed.module)

    @property
    def loss_scale(self) -> float:
        """DeepSpeed's scale; 1 outside fp16."""
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        return float(scaler.loss_scale) if scaler is not None else 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits in fp32 of a half-precision forward."""
        return logits_of(self.deepspeed(self._cast(inputs)))

    @torch.no_grad()
    def infer(self, inputs: Tensor) -> Tensor:
        """Logits in fp32; the parameters are whole, so DeepSpeed need not know."""
        return logits_of(self.module(self._cast(inputs)))

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over ranks and micro-batches: a contribution counts so many times."""
        parts = self.world_size * self.deepspeed.gradient_accumulation_steps()
        self.deepspeed.backward(loss * parts)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # only counts the micro-batch

    def step(self, lr: float | None, clip: float | None, measure: bool) -> EngineStep:
        """Let DeepSpeed check, unscale, clip (by its config) and apply; then update the scale."""
        if lr is not None:
            self.set_learning_rate(lr)
        old_scale = self.loss_scale
        self.deepspeed.step()
        applied = bool(self.deepspeed.was_step_applied())
        self._release_scale()
        norm = self.deepspeed.get_global_grad_norm()
        return EngineStep(
            applied=applied,
            overflowed=not applied,
            old_scale=old_scale,
            new_scale=self.loss_scale,
            grad_norm=float(norm) if measure and norm is not None else None,
        )

    def master_fragments(self) -> list[Fragment]:
        """Live views of the fp32 parts that this rank owns."""
        return [
            Fragment(name, mapping.lp_fragment_address.start, mapping.get_hp_fragment())
            for name, mapping in self._mappings()
        ]

    def optimizer_fragments(self) -> dict[str, list[Fragment]]:
        """Live views of the optimizer state that this rank owns."""
        # Not by DeepSpeed's own mapping, which is made when only the first group has state.
        flat_states = self.flat_states()
        found: dict[str, list[Fragment]] = {}
        for name, mapping in self._mappings():
            flat, state = flat_states[mapping.param_group_index]
            start, at = mapping.lp_fragment_address.start, mapping.hp_fragment_address
            for key, values in state.items():
                if isinstance(values, Tensor) and values.shape == flat.shape:
                    fragment = Fragment(name, start, values.narrow(0, at.start, at.numel))
                    found.setdefault(key, []).append(fragment)
        return found

    def flat_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """This rank's flat fp32 part of each parameter group, with its state."""
        wrapped = self.deepspeed.optimizer
        return [(flat, wrapped.optimizer.state[flat]) for flat in self._flat_parts(wrapped)]

    def scale_state(self) -> dict[str, Any]:
        """The numbers of DeepSpeed's loss scaler; empty outside fp16."""
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        if scaler is None or not scaler.dynamic:
            return {}
        return {name: getattr(scaler, name) for name in _SCALER_STATE}

    def load_scale_state(self, state: Mapping[str, Any]) -> None:
        """Take over the numbers of the loss scaler."""
        for name, value in state.items():
            setattr(self.deepspeed.optimizer.loss_scaler, name, value)

    @torch.no_grad()
    def load_master(self, whole: Mapping[str, Tensor]) -> None:
        """Copy into the fp32 parts and the half-precision weights."""
        for fragment in self.master_fragments():
            stop = fragment.start + len(fragment.values)
            fragment.values.copy_(whole[fragment.name][fragment.start : stop])
        for name, parameter in self._parameters.items():
            parameter.copy_(whole[name].view(parameter.shape))

    @contextmanager
    def lend_weights(self, fragments: Sequence[Fragment]) -> Iterator[None]:
        """Gather, copy into the half-precision weights, and put the own ones back at the end."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        whole = self.layout.gather(fragments)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(whole[name].view(parameter.shape))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(own[name])

    def _mappings(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._parameters.items():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                yield name, mapping

    def _flat_parts(self, wrapped: Any) -> list[Tensor]:
        return list(wrapped.single_partition_of_fp32_groups)

    def _cast(self, inputs: Tensor) -> Tensor:
        return inputs.to(self._dtype) if inputs.is_floating_point() else inputs

    def _hold_back_scale(self) -> None:
        """Have the scale change only after the step that it was used for.

        DeepSpeed unscales the gradients by the *new* scale, which halves the update on every step
        on which the scale grows (https://github.com/deepspeedai/DeepSpeed/pull/8588).
        """
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        if scaler is not None and getattr(scaler, "dynamic", False):
            self._update_scale = scaler.update_scale
            scaler.update_scale = self._held_back.append

    def _release_scale(self) -> None:
        for overflowed in self._held_back:
            try:
                cast(Callable[[bool], None], self._update_scale)(overflowed)
            except Exception as error:  # DeepSpeed raises a bare Exception at the smallest scale
                if "already at minimum" not in str(error):
                    raise
                raise PrecisionError(
                    f"the loss scale is at its minimum ({self.loss_scale:g}) and the gradients "
                    "still overflow; lower optim.lr, set optim.grad_clip, or use bf16"
                ) from error
        self._held_back.clear()


class PartitionedEngine(ZeroEngine):
    """ZeRO 3: the half-precision weights are sharded too; a second forward a step is avoided."""

    fuses_weak_pass = True

    @torch.no_grad()
    def infer(self, inputs: Tensor) -> Tensor:
        """Logits in fp32; the hooks gather the parameters."""
        return logits_of(self.deepspeed(self._cast(inputs)))

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """The whole shape of every parameter."""
        return {name: p.ds_shape for name, p in self._sharded()}

    def master_fragments(self) -> list[Fragment]:
        """This rank's parts of the fp32 master weights."""
        from deepspeed.utils import safe_get_local_fp32_param

        return [
            self._fragment(name, p, safe_get_local_fp32_param(p)) for name, p in self._sharded()
        ]

    def optimizer_fragments(self) -> dict[str, list[Fragment]]:
        """This rank's parts of the optimizer state."""
        from deepspeed.utils import safe_get_local_optimizer_state

        state = self.deepspeed.optimizer.optimizer.state
        first: dict[str, Any] = next(iter(state.values()), {})
        keys = [k for k, v in first.items() if isinstance(v, Tensor) and v.dim() > 0]
        return {
            key: [
                self._fragment(name, p, safe_get_local_optimizer_state(p, key))
                for name, p in self._sharded()
            ]
            for key in keys
        }

    @torch.no_grad()
    def load_master(self, whole: Mapping[str, Tensor]) -> None:
        """Copy into this rank's parts."""
        fragments = self.master_fragments()
        for fragment in fragments:
            stop = fragment.start + len(fragment.values)
            fragment.values.copy_(whole[fragment.name][fragment.start : stop])
        self._copy_into_shards(fragments)

    @contextmanager
    def lend_weights(self, fragments: Sequence[Fragment]) -> Iterator[None]:
        """Copy into this rank's parts, which the forward gathers as ever: no collective here."""
        own = [p.ds_tensor.detach().clone() for _, p in self._sharded()]
        self._copy_into_shards(fragments)
        try:
            yield
        finally:
            for (_, parameter), values in zip(self._sharded(), own, strict=True):
                parameter.ds_tensor.data.copy_(values)

    def _flat_parts(self, wrapped: Any) -> list[Tensor]:
        return list(wrapped.fp32_partitioned_groups_flat)

    def _sharded(self) -> Iterator[tuple[str, Any]]:
        return iter(cast(dict[str, Any], self._parameters).items())

    def _fragment(self, name: str, parameter: Any, values: Tensor) -> Fragment:
        """The unpadded part of a parameter's partition; ranks hold equal runs in order."""
        start = min(self.rank * parameter.ds_tensor.ds_numel, parameter.ds_numel)
        length = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)
        return Fragment(name, start, values.view(-1)[:length])

    @torch.no_grad()
    def _copy_into_shards(self, fragments: Sequence[Fragment]) -> None:
        for fragment in fragments:
            shard = cast(Any, self._parameters[fragment.name]).ds_tensor
            shard.data[: len(fragment.values)].copy_(fragment.values)
