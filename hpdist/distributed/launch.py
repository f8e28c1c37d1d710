"""Makes the Accelerator of a run from hpdist's config and what `accelerate launch` said."""

from __future__ import annotations

import importlib.util
import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from hpdist.config import Precision, Zero
from hpdist.errors import ConfigError

ALLOW_CPU_FP16 = "HPDIST_ALLOW_CPU_FP16"
_FROM_ACCELERATE: dict[str, Precision] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


def resolve_precision(precision: Precision | None) -> Precision:
    """The precision of the run: the config's, else the launcher's, else fp32.

    Raises ConfigError where both name one and differ, or where the device has none of it.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in _FROM_ACCELERATE:
        raise ConfigError(
            f"accelerate's mixed_precision is {launcher!r}; hpdist knows no, bf16, fp16"
        )
    if precision is None:
        resolved = _FROM_ACCELERATE[launcher]
    elif launcher != "no" and _FROM_ACCELERATE[launcher] != precision:
        raise ConfigError(
            f"precision: {precision} in hpdist's config, but mixed_precision: {launcher} in "
            "accelerate's; make them agree, or leave hpdist's out"
        )
    else:
        resolved = precision
    if resolved == "fp16" and not torch.cuda.is_available():
        _refuse_cpu_fp16()
    if resolved == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: bf16, but this GPU has none; use fp16")
    return resolved


def resolve_zero_stage(zero: Zero) -> int | None:
    """The ZeRO stage of the run: the config's, else the launcher's; None without DeepSpeed.

    Raises ConfigError where both name one and differ, or DeepSpeed is not installed.
    """
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    stage = zero.stage
    if launched:
        from_launcher = _launcher_stage()
        if stage is not None and stage != from_launcher:
            raise ConfigError(
                f"zero.stage: {stage} in hpdist's config, but accelerate was launched with ZeRO "
                f"stage {from_launcher}; make them agree, or leave hpdist's out"
            )
        stage = from_launcher
    if stage is not None:
        for package in ("deepspeed", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"ZeRO stage {stage} needs {package}, which is not installed; "
                    'pip install "hpdist[deepspeed]", or launch without DeepSpeed'
                )
    return stage


def make_accelerator(
    precision: Precision,
    stage: int | None,
    *,
    micro_batch: int,
    accumulation: int,
    grad_clip: float | None,
) -> Accelerator:
    """Make the Accelerator. Collective: it joins the process group.

    `micro_batch` is rows per device per forward, `accumulation` the micro-batches of a step.
    """
    on_cpu = not torch.cuda.is_available()
    if stage is not None:
        _be_one_process()
    # Our buffers are the same on every rank already. The option's new name is not in every torch.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if "LOCAL_RANK" in os.environ:
        # Without a named backend every CPU rank under DeepSpeed believes that it is rank 0 of 1.
        backend = "gloo" if on_cpu else "nccl"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=10)))
    if stage is None:
        # Accelerate knows no fp16 on a CPU: it would compute in fp32 without a word.
        # The engine does it instead.
        mixed = "no" if precision == "fp32" or (precision == "fp16" and on_cpu) else precision
        os.environ["ACCELERATE_MIXED_PRECISION"] = mixed
        # Without cpu=True Accelerate joins CPU ranks to a group, but lets each train by itself.
        return Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=handlers)

    from hpdist.distributed.zero import make_plugin

    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    mixed = "no" if precision == "fp32" else precision
    os.environ["ACCELERATE_MIXED_PRECISION"] = mixed
    plugin = make_plugin(precision, stage, micro_batch, accumulation, grad_clip)
    return Accelerator(mixed_precision=mixed, deepspeed_plugin=plugin, kwargs_handlers=handlers)


def _launcher_stage() -> int:
    config = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if config == "none":
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    from hpdist.distributed.zero import read_config_file

    return int(read_config_file(config).get("zero_optimization", {}).get("stage", 0))


def _refuse_cpu_fp16() -> None:
    if os.environ.get(ALLOW_CPU_FP16) != "1":
        raise ConfigError(
            "precision: fp16 needs a GPU, and none is visible; use bf16 on a CPU "
            f"(for trials, {ALLOW_CPU_FP16}=1 computes fp16 on the CPU, very slowly)"
        )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(f"{ALLOW_CPU_FP16}=1: fp16 on a CPU, for tests and trials only", stacklevel=2)


def _be_one_process() -> None:
    """DeepSpeed needs a process group even for one process that nothing launched."""
    if "LOCAL_RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
