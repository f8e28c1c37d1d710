"""Makes the Accelerator of a run from hpdist's config and what `accelerate launch` said."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from hpdist.config import LossScale, Precision, RunConfig
from hpdist.distributed.reduce import keep_group
from hpdist.errors import ConfigError

_TIMEOUT = timedelta(minutes=10)
ALLOW_CPU_FP16 = "HPDIST_ALLOW_CPU_FP16"
Offload = Literal["none", "cpu", "nvme"]
T = TypeVar("T")
N = TypeVar("N", int, float)


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


def _join_after_restart(backend: str) -> None:
    """Join the process group under names of this attempt, where the launcher has restarted us.

    The launcher's static rendezvous keeps one store for all attempts, and torch takes it for a new
    one: ranks would connect to the addresses of those that died. Several machines need
    `--rdzv_backend c10d`, which makes a store for every attempt.
    """
    environment = os.environ
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    one_machine = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
    if attempt == "0" or not shared or not one_machine or dist.is_initialized():
        return
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=_TIMEOUT)  # type: ignore[attr-defined]
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"hpdist/attempt-{attempt}", store),  # type: ignore[attr-defined]
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        timeout=_TIMEOUT,
    )


def make_accelerator(sharding: Sharding) -> Accelerator:
    """Make the Accelerator. Collective: it joins the process group."""
    on_cpu = not torch.cuda.is_available()
    atexit.register(keep_group)
    if sharding.stage is not None:
        _be_one_process()
    # Our buffers are the same on every rank already. The option's new name is not in every torch.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    handlers: list[Any] = [
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    ]
    if "LOCAL_RANK" in os.environ:
        # Without a named backend every CPU rank under DeepSpeed believes that it is rank 0 of 1.
        backend = "gloo" if on_cpu else "nccl"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=_TIMEOUT))
        _join_after_restart(backend)
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
    # DeepSpeed calls collectives by names that torch has renamed since; nothing a user could mend.
    warnings.filterwarnings("ignore", message=r"`torch.distributed.*` is deprecated")
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
    more = _read_environment() if path == "none" else _read_file(path)
    if (
        "precision" in found
        and "precision" in more
        and found["precision"][0] != more["precision"][0]
    ):
        raise ConfigError(
            f"{found['precision'][1]}, but {more['precision'][1]}; leave the first out"
        )
    return found | more


def _read_environment() -> Launcher:
    """DeepSpeed's settings from accelerate's own config."""
    found: Launcher = {}
    ours = "accelerate's config"
    stage = _number(int, os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"), "zero_stage", ours)
    found["zero.stage"] = (stage, f"zero_stage: {stage} in {ours}")
    names = {
        "zero.offload": "OFFLOAD_OPTIMIZER_DEVICE",
        "zero.nvme_path": "OFFLOAD_OPTIMIZER_NVME_PATH",
    }
    for setting, name in names.items():
        value = os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none")
        if value.lower() != "none":
            found[setting] = (value, f"{name.lower()}: {value} in {ours}")
    params = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    if params not in ("none", found.get("zero.offload", ("none", ""))[0]):
        raise ConfigError(
            f"offload_param_device: {params} in {ours} without the same offload_optimizer_device; "
            "hpdist offloads both alike, unless a DeepSpeed JSON (deepspeed_config_file) says more"
        )
    clip = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if clip not in ("auto", "none"):
        norm = _number(float, clip, "gradient_clipping", ours)
        found["optim.grad_clip"] = (norm or None, f"gradient_clipping: {clip} in {ours}")
    return found


def _read_file(path: str) -> Launcher:
    """DeepSpeed's settings from the JSON that the launcher named."""
    values = read_deepspeed(path)
    zero = _section(values, "zero_optimization", path)
    found: Launcher = {"file": (path, path)}
    stage = _number(int, zero.get("stage", 0), "zero_optimization.stage", path)
    found["zero.stage"] = (stage, f"zero_optimization.stage: {stage} in {path}")
    offload = _section(zero, "offload_optimizer", path)
    if offload.get("device", "none") != "none":
        device = offload["device"]
        place = f"zero_optimization.offload_optimizer.device: {device} in {path}"
        found["zero.offload"] = (device, place)
    if offload.get("nvme_path"):
        place = f"zero_optimization.offload_optimizer.nvme_path in {path}"
        found["zero.nvme_path"] = (offload["nvme_path"], place)
    parameters = _section(zero, "offload_param", path)
    if parameters.get("device") == "nvme":
        place = f"zero_optimization.offload_param.nvme_path in {path}"
        _check_nvme(parameters.get("nvme_path"), place)
    for half in ("fp16", "bf16"):
        if _section(values, half, path).get("enabled") is True:
            found["precision"] = (half, f"{half}.enabled: true in {path}")
    clip = values.get("gradient_clipping", "auto")
    if clip != "auto":
        norm = _number(float, clip, "gradient_clipping", path)
        found["optim.grad_clip"] = (norm or None, f"gradient_clipping: {clip} in {path}")
    return found


def _section(values: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    """An object in the JSON, empty where it is left out or null."""
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: {found!r} in {path} must be an object")
    return found


def _number(kind: Callable[[Any], N], value: object, setting: str, where: str) -> N:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{setting}: {value!r} in {where} must be a number") from None


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
    if offload == "nvme":
        _check_nvme(sharding.nvme_path, "zero.nvme_path")
    if stage is None:
        return
    for package in ("deepspeed", "transformers"):  # Accelerate's plug-in asks for the latter
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"zero.stage: {stage} needs {package}, which is not installed; "
                'pip install "hpdist[deepspeed]", or launch without DeepSpeed'
            )


def _check_nvme(path: str | None, setting: str) -> None:
    if not (path and Path(path).is_dir()):
        raise ConfigError(
            f"{setting}: {path!r} is no folder; offload to nvme needs one on the local disk"
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
