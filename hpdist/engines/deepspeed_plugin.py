"""Accelerate's DeepSpeed plug-in, filled from a run's execution plan."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin

from hpdist.engines.bf16_state import BF16_STATE
from hpdist.engines.config import LossScale
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.engines.launcher import hide_launcher_fields
from hpdist.errors import ConfigError


def make_plugin(sharding: ExecutionPlan) -> DeepSpeedPlugin:
    """Make Accelerate's DeepSpeed plug-in for a run; a JSON file named at launch is the base.

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
        # Small parameters that stay whole would keep the student's values under swapped weights.
        zero["stage3_param_persistence_threshold"] = 0
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", False)
    values["train_micro_batch_size_per_gpu"] = sharding.micro_batch
    values["gradient_accumulation_steps"] = sharding.accumulation
    values["train_batch_size"] = "auto"
    values["gradient_clipping"] = sharding.grad_clip or 0.0
    values["zero_allow_untested_optimizer"] = True
    values["zero_force_ds_cpu_optimizer"] = False  # keep the optimizer that the config names
    for half in ("fp16", "bf16"):
        values[half] = (values.get(half) or {}) | {"enabled": half == sharding.precision}
    values["bf16"] |= dict.fromkeys(BF16_STATE, sharding.bf16_state)
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
    """Whether a warning of DeepSpeed's is useful: it warns of optimizers that are not its own."""
    return "untested optimizer" not in record.getMessage()


def _set_loss_scale(fp16: dict[str, Any], config: LossScale) -> None:
    """Set the loss scale on which file and config agree."""
    fp16["loss_scale"] = config.static or 0
    fp16["initial_scale_power"] = int(math.log2(config.initial))
    fp16["loss_scale_window"] = config.growth_interval
    fp16["min_loss_scale"] = config.minimum


def _allow_fp16_on_cpu() -> None:
    """Lift DeepSpeed's refusal; the caller has already checked the user's consent."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def _check_async_io() -> None:
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not installed_ops.get("async_io") and not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "zero.offload: nvme needs libaio, on which DeepSpeed builds its asynchronous I/O, and "
            "it is missing; install libaio-dev (Debian) or libaio-devel (Fedora), or offload to cpu"
        )
