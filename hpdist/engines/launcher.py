"""The environment that `accelerate launch` sets: read, refused, or reported as unused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import patch_environment

from hpdist.engines.bf16_state import BF16_STATE
from hpdist.engines.deepspeed_config import check_file, is_enabled, read_deepspeed, section
from hpdist.engines.fsdp2_launcher import read_fsdp, unused_fsdp
from hpdist.engines.launch_file import find_deepspeed
from hpdist.errors import ConfigError

N = TypeVar("N", int, float)
Launcher = dict[str, tuple[Any, str]]  # setting -> (value, where it was set)
_OURS = "accelerate's config"
_REFUSED = {  # variable -> what the config says, and what to do instead
    "ACCELERATE_USE_MEGATRON_LM": (
        "distributed_type: MEGATRON_LM",
        "hpdist has no tensor or pipeline parallelism; set distributed_type: DEEPSPEED or FSDP",
    ),
    "ACCELERATE_USE_SAGEMAKER": (
        "compute_environment: AMAZON_SAGEMAKER",
        "hpdist cannot join SageMaker's own library for data parallelism; use LOCAL_MACHINE with "
        "torchrun's variables",
    ),
}
_PARALLEL = ("DP_SHARD_SIZE", "TP_SIZE", "CP_SIZE", "SP_SIZE")
_UNUSED = {  # variables without effect in a run of hpdist's
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag (weights are sharded one by one anyway)",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "zero3_save_16bit_model (hpdist writes the "
    "model itself)",
    "ACCELERATE_USE_IPEX": "ipex (hpdist does not optimise by IPEX)",
    "ACCELERATE_DEBUG_MODE": "debug (hpdist does not use Accelerate's checked operations)",
}


def read_launcher() -> Launcher:
    """Read the settings of `accelerate launch`, and where they stand; omit those left open.

    Raises ConfigError for what hpdist does not support.
    """
    _refuse()
    found: Launcher = {}
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", "bf16", "fp16"):
        raise ConfigError(f"accelerate's mixed_precision is {mixed!r}; use no, bf16 or fp16")
    if mixed != "no":
        found["precision"] = (mixed, f"mixed_precision: {mixed} in {_OURS}")
    compiled = _read_dynamo()
    if compiled is not None:
        found["compile"] = compiled
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if steps != "auto":
        number = whole_number(steps, "gradient_accumulation_steps", _OURS)
        found["accumulation"] = (number, f"gradient_accumulation_steps: {number} in {_OURS}")
    if _is_set("ACCELERATE_USE_FSDP"):
        return found | read_fsdp()
    if not _is_set("ACCELERATE_USE_DEEPSPEED"):
        return found
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        return found | _read_environment({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})
    environment, file = found | _read_environment({}), _read_file(find_deepspeed(path))
    for setting in environment.keys() & file.keys():
        if environment[setting][0] != file[setting][0]:
            raise ConfigError(
                f"{environment[setting][1]}, but {file[setting][1]}; leave the first out"
            )
    return (
        {"zero.stage": (0, f"no zero_optimization.stage in {file['file'][0]}")} | environment | file
    )


def unused_settings() -> list[str]:
    """Name the settings in accelerate's config that hpdist does not use, a line for each group."""
    lines = []
    named = [meaning for variable, meaning in _UNUSED.items() if _is_set(variable)]
    if _is_set("ACCELERATE_USE_FSDP"):
        named += unused_fsdp()
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        named.append("parallelism_config (every rank holds rows of its own)")
    if named:
        lines.append(f"{_OURS}: hpdist does not use {', '.join(named)}")
    device = torch.accelerator.current_accelerator()
    if device is not None and device.type != "cuda":
        lines.append(f"this machine's {device.type} is not used: hpdist trains on CUDA or the CPU")
    several = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    alone = "WORLD_SIZE" not in os.environ
    if _is_set("ACCELERATE_USE_CPU") and several and alone:
        lines.append(
            "accelerate has started one process, although several were requested: on CPUs it needs "
            "mpirun for that; distributed_type: MULTI_GPU with use_cpu: false starts them "
            "(configs/accelerate/cpu_bf16.yaml)"
        )
    return lines


def neutralised() -> AbstractContextManager[None]:
    """Keep Accelerate from doing what hpdist does itself, or has reported as not done.

    The weights of a model that Accelerate compiles would have other names in checkpoints; one that
    it shards would average its gradients in half precision, and not be sharded on CPU ranks.
    """
    return cast(
        AbstractContextManager[None],
        patch_environment(
            ACCELERATE_DYNAMO_BACKEND="no",
            ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1",
            ACCELERATE_USE_PARALLELISM_CONFIG="false",
            ACCELERATE_USE_IPEX="false",
            ACCELERATE_USE_FSDP="false",
        ),
    )


def hide_launcher_fields() -> None:
    """Keep Accelerate from comparing its own config with the one that hpdist made from it."""
    for name in ("ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        os.environ.pop(name, None)


def whole_number(value: object, setting: str, where: str) -> int:
    """Read a whole number. Raises ConfigError that says where it stands."""
    number = _number(float, value, setting, where)
    if isinstance(value, bool) or number != int(number):
        raise ConfigError(f"{setting}: {value!r} in {where} must be a whole number")
    return int(number)


def _refuse() -> None:
    for variable, (what, instead) in _REFUSED.items():
        if variable == "ACCELERATE_USE_SAGEMAKER":
            kind = os.environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "NO")
            if kind == "NO":
                continue
        if _is_set(variable):
            raise ConfigError(f"{what} in {_OURS}: {instead}")
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        for name in _PARALLEL:
            size = os.environ.get(f"PARALLELISM_CONFIG_{name}", "1")
            if size not in ("1", "None", "-1"):
                raise ConfigError(
                    f"parallelism_config_{name.lower()}: {size} in {_OURS}: hpdist has no tensor, "
                    "context or sequence parallelism; leave it out, and shard by zero.stage or "
                    "shard.engine"
                )
    if _is_set("ACCELERATE_USE_CPU") and torch.cuda.is_available():
        raise ConfigError(
            f"use_cpu: true in {_OURS}, but GPUs are visible, and hpdist trains on those that it "
            'sees; hide them with CUDA_VISIBLE_DEVICES="", or write use_cpu: false'
        )
    ours = "cuda" if torch.cuda.is_available() else "cpu"
    device = os.environ.get("ACCELERATE_TORCH_DEVICE", ours)
    if device.partition(":")[0] != ours:
        raise ConfigError(
            f"ACCELERATE_TORCH_DEVICE={device}: hpdist trains on the GPUs that it sees, and where "
            "there are none on the CPU; unset it"
        )


def _read_dynamo() -> tuple[dict[str, Any], str] | None:
    """The launcher's settings for compilation, as arguments of `torch.compile`."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend == "no":
        return None
    place = f"dynamo_backend: {backend.upper()} in {_OURS}"
    known = torch.compiler.list_backends(exclude_tags=None)
    if backend not in known:
        raise ConfigError(f"{place}: torch does not have this backend; it has {', '.join(known)}")
    if _is_set("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"):
        raise ConfigError(
            f"dynamo_use_regional_compilation: true in {_OURS}: hpdist compiles the model whole; "
            "leave it out"
        )
    arguments: dict[str, Any] = {"backend": backend}
    mode = os.environ.get("ACCELERATE_DYNAMO_MODE", "default")
    if mode != "default":
        arguments["mode"] = mode
    if _is_set("ACCELERATE_DYNAMO_USE_FULLGRAPH"):
        arguments["fullgraph"] = True
    if _is_set("ACCELERATE_DYNAMO_USE_DYNAMIC"):  # launchers write False if it was not set
        arguments["dynamic"] = True
    return arguments, place


def _read_environment(defaults: Mapping[str, str]) -> Launcher:
    """DeepSpeed's settings from accelerate's own config."""
    found: Launcher = {}
    variables = defaults | os.environ
    if "ACCELERATE_DEEPSPEED_ZERO_STAGE" in variables:
        stage = whole_number(variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"], "zero_stage", _OURS)
        found["zero.stage"] = (stage, f"zero_stage: {stage} in {_OURS}")
    names = {
        "zero.offload": "OFFLOAD_OPTIMIZER_DEVICE",
        "zero.nvme_path": "OFFLOAD_OPTIMIZER_NVME_PATH",
    }
    for setting, name in names.items():
        value = os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none")
        if value.lower() != "none":
            found[setting] = (value, f"{name.lower()}: {value} in {_OURS}")
    params = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    if params not in ("none", found.get("zero.offload", ("none", ""))[0]):
        raise ConfigError(
            f"offload_param_device: {params} in {_OURS} without the same offload_optimizer_device; "
            "hpdist offloads both or neither; a DeepSpeed JSON (deepspeed_config_file) may differ"
        )
    clip = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if clip not in ("auto", "none"):
        norm = _norm(clip, _OURS)
        found["optim.grad_clip"] = (norm or None, f"gradient_clipping: {clip} in {_OURS}")
    return found


def _read_file(path: str) -> Launcher:
    """DeepSpeed's settings from the JSON that the launcher named."""
    values = read_deepspeed(path)
    zero = section(values, "zero_optimization", path)
    found: Launcher = {"file": (path, path)}
    if zero.get("stage") is not None:
        stage = whole_number(zero["stage"], "zero_optimization.stage", path)
        found["zero.stage"] = (stage, f"zero_optimization.stage: {stage} in {path}")
    offload = section(zero, "offload_optimizer", path)
    if offload.get("device", "none") not in ("none", "auto", None):
        device = offload["device"]
        place = f"zero_optimization.offload_optimizer.device: {device} in {path}"
        found["zero.offload"] = (device, place)
    if offload.get("nvme_path"):
        place = f"zero_optimization.offload_optimizer.nvme_path in {path}"
        found["zero.nvme_path"] = (offload["nvme_path"], place)
    section(zero, "offload_param", path)
    for key in BF16_STATE:
        value = section(values, "bf16", path).get(key, "auto")
        if isinstance(value, bool):
            found[f"zero.{key}"] = (value, f"bf16.{key}: {json.dumps(value)} in {path}")
    for half in ("fp16", "bf16"):
        if is_enabled(values, half, path):
            found["precision"] = (half, f"{half}.enabled: true in {path}")
    clip = values.get("gradient_clipping", "auto")
    if clip not in ("auto", None):
        norm = _norm(clip, path)
        found["optim.grad_clip"] = (norm or None, f"gradient_clipping: {clip} in {path}")
    check_file(values, path)
    return found


def _norm(value: object, where: str) -> float:
    norm = _number(float, value, "gradient_clipping", where)
    if isinstance(value, bool) or not 0 <= norm < float("inf"):
        raise ConfigError(f"gradient_clipping: {value!r} in {where} must be a number of 0 or more")
    return norm


def _number(kind: Callable[[Any], N], value: object, setting: str, where: str) -> N:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{setting}: {value!r} in {where} must be a number") from None


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes", "y", "on", "t")
