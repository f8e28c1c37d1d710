"""Makes the Accelerator of a run from hpdist's config and what `accelerate launch` said."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import warnings
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from hpdist.config import LossScale, Precision, RunConfig
from hpdist.errors import ConfigError

ALLOW_CPU_FP16 = "HPDIST_ALLOW_CPU_FP16"
Offload = Literal["none", "cpu", "nvme"]
T = TypeVar("T")


@dataclass(frozen=True)
class Sharding:
    """How a run computes and shards: what config and launcher agree on."""

    precision: Precision = "fp32"
    stage: int | None = None
    """The ZeRO stage; None without DeepSpeed."""
    offload: Offload = "none"
    nvme_path: str | None = None
    grad_clip: float | None = None
    loss_scale: LossScale = field(default_factory=LossScale)
    micro_batch: int = 1
    """Rows per device per forward."""
    accumulation: int = 1
    """Micro-batches of a step."""
    deepspeed: str | None = None
    """The DeepSpeed JSON that the launcher named, the base of the run's own."""


def resolve(config: RunConfig) -> Sharding:
    """Put hpdist's config and the launcher's together; batch sizes are left to the caller.

    Raises ConfigError where both name a setting and differ, saying where each stands, or where the
    device or the installation cannot do it.
    """
    launcher = _read_launcher()
    sharding = Sharding(
        precision=_agree(launcher, "precision", config.precision) or "fp32",
        stage=_agree(launcher, "zero.stage", config.zero.stage),
        offload=_agree(launcher, "zero.offload", config.zero.offload) or "none",
        nvme_path=_agree(launcher, "zero.nvme_path", config.zero.nvme_path),
        grad_clip=_agree(launcher, "optim.grad_clip", config.optim.grad_clip),
        loss_scale=config.loss_scale,
        deepspeed=launcher.get("file", (None, ""))[0],
    )
    _check_precision(sharding.precision)
    _check_zero(sharding)
    return sharding


def make_accelerator(sharding: Sharding) -> Accelerator:
    """Make the Accelerator. Collective: it joins the process group."""
    on_cpu = not torch.cuda.is_available()
    if sharding.stage is not None:
        _be_one_process()
    # Our buffers are the same on every rank already. The option's new name is not in every torch.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if "LOCAL_RANK" in os.environ:
        # Without a named backend every CPU rank under DeepSpeed believes that it is rank 0 of 1.
        backend = "gloo" if on_cpu else "nccl"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=10)))
    precision = sharding.precision
    mixed = "no" if precision == "fp32" else precision
    if sharding.stage is None:
        if precision == "fp16" and on_cpu:
            # Accelerate would compute in fp32 without a word; the engine does it instead.
            mixed = "no"
        os.environ["ACCELERATE_MIXED_PRECISION"] = mixed
        # Without cpu=True Accelerate joins CPU ranks to a group, but lets each train by itself.
        return Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=handlers)

    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from hpdist.distributed.zero import make_plugin

    os.environ["ACCELERATE_MIXED_PRECISION"] = mixed
    plugin = make_plugin(sharding)
    return Accelerator(mixed_precision=mixed, deepspeed_plugin=plugin, kwargs_handlers=handlers)


def with_batch(sharding: Sharding, micro_batch: int, accumulation: int) -> Sharding:
    """The sharding of a batch that is cut so; checked against numbers in the DeepSpeed JSON."""
    values = read_deepspeed(sharding.deepspeed)
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
    }
    for key, value in ours.items():
        theirs = values.get(key, "auto")
        if theirs not in ("auto", value):
            raise ConfigError(
                f"{key}: {theirs} in {sharding.deepspeed}, but hpdist's batch sizes make it "
                f"{value}; write auto there"
            )
    return replace(sharding, micro_batch=micro_batch, accumulation=accumulation)


def read_deepspeed(path: str | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON config; empty without one. Raises ConfigError."""
    if path is None:
        return {}
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed config {path!r}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the DeepSpeed config {path!r} must hold an object")
    return values


def hide_launcher_fields() -> None:
    """Keep Accelerate from holding its own config against the one that hpdist made of it."""
    for name in ("ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        os.environ.pop(name, None)


Launcher = dict[str, tuple[Any, str]]  # setting -> (value, where it stands)


def _read_launcher() -> Launcher:
    """What `accelerate launch` has set, and where; nothing that it leaves open."""
    found: Launcher = {}
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", "bf16", "fp16"):
        raise ConfigError(f"accelerate's mixed_precision is {mixed!r}; use no, bf16 or fp16")
    if mixed != "no":
        found["precision"] = (mixed, f"mixed_precision: {mixed} in accelerate's config")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return found
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return found | (_read_environment() if path == "none" else _read_file(path))


def _read_environment() -> Launcher:
    """DeepSpeed's settings from accelerate's own config."""
    found: Launcher = {}
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    found["zero.stage"] = (stage, f"zero_stage: {stage} in accelerate's config")
    names = {
        "zero.offload": "OFFLOAD_OPTIMIZER_DEVICE",
        "zero.nvme_path": "OFFLOAD_OPTIMIZER_NVME_PATH",
    }
    for setting, name in names.items():
        value = os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none")
        if value.lower() != "none":
            found[setting] = (value, f"{name.lower()}: {value} in accelerate's config")
    clip = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if clip not in ("auto", "none"):
        found["optim.grad_clip"] = (
            float(clip),
            f"gradient_clipping: {clip} in accelerate's config",
        )
    return found


def _read_file(path: str) -> Launcher:
    """DeepSpeed's settings from the JSON that the launcher named."""
    values = read_deepspeed(path)
    zero = values.get("zero_optimization", {})
    found: Launcher = {"file": (path, path)}
    stage = int(zero.get("stage", 0))
    found["zero.stage"] = (stage, f"zero_optimization.stage: {stage} in {path}")
    offload = zero.get("offload_optimizer", {})
    if offload.get("device", "none") != "none":
        device = offload["device"]
        place = f"zero_optimization.offload_optimizer.device: {device} in {path}"
        found["zero.offload"] = (device, place)
    if offload.get("nvme_path"):
        place = f"zero_optimization.offload_optimizer.nvme_path in {path}"
        found["zero.nvme_path"] = (offload["nvme_path"], place)
    for half in ("fp16", "bf16"):
        if values.get(half, {}).get("enabled") is True:
            found["precision"] = (half, f"{half}.enabled: true in {path}")
    clip = values.get("gradient_clipping", "auto")
    if clip != "auto":
        found["optim.grad_clip"] = (float(clip) or None, f"gradient_clipping: {clip} in {path}")
    return found


def _agree(launcher: Launcher, setting: str, ours: T | None) -> Any:
    """The value of a setting that may stand in two places."""
    if setting not in launcher:
        return ours
    theirs, place = launcher[setting]
    if ours is not None and ours != theirs:
        raise ConfigError(
            f"{setting}: {ours} in hpdist's config, but {place}; make them agree, or leave "
            "hpdist's out"
        )
    return theirs


def _check_precision(precision: Precision) -> None:
    on_gpu = torch.cuda.is_available()
    if precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: bf16, but this GPU has none; use fp16")
    if precision == "fp16" and not on_gpu:
        if os.environ.get(ALLOW_CPU_FP16) != "1":
            raise ConfigError(
                "precision: fp16 needs a GPU, and none is visible; use bf16 on a CPU "
                f"(for trials, {ALLOW_CPU_FP16}=1 computes fp16 on the CPU, very slowly)"
            )
        if os.environ.get("LOCAL_RANK", "0") == "0":
            message = f"{ALLOW_CPU_FP16}=1: fp16 on a CPU, for tests and trials only"
            warnings.warn(message, stacklevel=2)


def _check_zero(sharding: Sharding) -> None:
    stage, offload = sharding.stage, sharding.offload
    if offload != "none" and not stage:
        raise ConfigError(f"zero.offload: {offload} needs zero.stage 1, 2 or 3")
    if offload == "nvme" and stage != 3:
        raise ConfigError(f"zero.offload: nvme needs zero.stage 3, not {stage}")
    if offload == "nvme" and not (sharding.nvme_path and Path(sharding.nvme_path).is_dir()):
        raise ConfigError(
            f"zero.nvme_path: {sharding.nvme_path!r} is no folder; zero.offload: nvme needs one on "
            "the local disk"
        )
    if stage is None:
        return
    for package in ("deepspeed", "transformers"):  # Accelerate's plug-in asks for the latter
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"zero.stage: {stage} needs {package}, which is not installed; "
                'pip install "hpdist[deepspeed]", or launch without DeepSpeed'
            )


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
