"""The sections of a DeepSpeed JSON, checked by DeepSpeed's own models and hpdist's promises."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, get_args

import torch
from pydantic import BaseModel, ValidationError

from hpdist.config.section import nearest
from hpdist.errors import ConfigError

_MASTERS = (
    "fp16 cannot hold master weights; in bf16 they can be kept (bf16_master_weights_and_grads)"
)
_QUANTISED = "quantised communication makes results depend on the number of ranks"
_PARTS = "hpdist shards teacher and checkpoints by DeepSpeed's plain partitions"
_REFUSED = {  # key -> (values without effect, why hpdist refuses others)
    "fp16.fp16_master_weights_and_grads": ((False,), _MASTERS),
    "bf16.check_grad_overflow": ((True,), "a step whose gradients are not finite is skipped"),
    "bf16.immediate_grad_update": ((False,), _PARTS),
    "zero_optimization.zenflow": ((), "its late updates are not those of the global batch"),
    "zero_optimization.zero_hpz_partition_size": ((1,), _PARTS),
    "zero_optimization.zero_quantized_weights": ((False,), _QUANTISED),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), _QUANTISED),
    "zero_optimization.zero_quantized_gradients": ((False,), _QUANTISED),
    "zero_optimization.compute_grad_norm": ((True,), "overflow is found by the gradient norm"),
    "zero_optimization.parameter_alignment": ((False,), _PARTS),
    "zero_optimization.legacy_stage1": ((False,), _PARTS),
    "zero_optimization.cpu_offload": ((False,), 'write "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_param": ((False,), 'write "offload_param": {"device": "cpu"}'),
    "zero_optimization.offload_optimizer.ratio": ((1, 1.0), _PARTS),
    "zero_optimization.offload_optimizer.super_offload": ((False,), _PARTS),
}
_GONE = {  # keys of older DeepSpeeds; newer ones raise on them, whatever the value
    "zero_optimization.mics_shard_size": (-1, 0, 1),
    "zero_optimization.mics_hierarchical_params_gather": (False,),
    "zero_optimization.zeropp_loco_param": (),
}
_NAMES = {
    "aio": (
        "block_size",
        "queue_depth",
        "intra_op_parallelism",
        "single_submit",
        "overlap_events",
        "use_gds",
    ),
    "timers": ("throughput",),
    "timers.throughput": ("enabled", "synchronized"),
}
_DROPPED = (  # set by hpdist itself, or about checkpoints that it does not write
    "stage3_gather_fp16_weights_on_model_save",
    "cpu_offload",
    "cpu_offload_param",
    "mics_shard_size",
    "mics_hierarchical_params_gather",
)


def is_off(value: Any) -> bool:
    """Whether a value or section enables nothing: null, false, auto, or only such values."""
    if isinstance(value, Mapping):
        if "enabled" in value:
            return is_off(value["enabled"])
        return all(is_off(part) for part in value.values())
    return value is None or value is False or value == "auto"


def check_sections(values: Mapping[str, Any], path: str) -> None:
    """Refuse unknown keys, wrong values, and what breaks a promise. Raises ConfigError.

    Imports DeepSpeed if there is a section for which it has a model.
    """
    for key, (harmless, reason) in _REFUSED.items():
        value = _at(values, key)
        if value not in (None, "auto", {}, *harmless):
            raise ConfigError(f"{key}: {value!r} in {path} is not supported: {reason}")
    for key, harmless in _GONE.items():
        value = _at(values, key)
        if value not in (None, "auto", *harmless):
            raise ConfigError(f"{key}: {value!r} in {path}: DeepSpeed has removed it; take it out")
    models = _models() if any(isinstance(values.get(key), dict) for key in _MODELLED) else {}
    for key, model in models.items():
        value = values.get(key)
        if isinstance(value, dict):
            checked = plain_section(value)
            checked.pop("stage", None)  # merged with the launcher's settings elsewhere
            _validate(model, checked, key, path)
    for key in _NAMES:
        _check_names(_at(values, key), key, path)
    if _at(values, "aio.use_gds") is True and not torch.cuda.is_available():
        raise ConfigError(f"aio.use_gds: true in {path} needs a GPU; take it out")


def plain_section(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section without open values, and without keys that DeepSpeed no longer reads."""
    return {
        key: plain_section(part) if isinstance(part, Mapping) else part
        for key, part in value.items()
        if part is not None and part != "auto" and key not in _DROPPED
    }


def one_name_each(zero: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `zero_optimization` section, with hpdist's name for a key that has two."""
    fields = _models()["zero_optimization"].model_fields if zero else {}
    names = {name: field.alias for name, field in fields.items() if field.alias}
    return {names.get(key) or key: value for key, value in zero.items()}


_MODELLED = ("zero_optimization", "fp16", "bf16", "comms_logger")


def _models() -> dict[str, type[BaseModel]]:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    kinds = (DeepSpeedZeroConfig, DeepSpeedFP16Config, DeepSpeedBF16Config, CommsLoggerConfig)
    return dict(zip(_MODELLED, kinds, strict=True))


def _validate(model: type[BaseModel], values: dict[str, Any], key: str, path: str) -> None:
    try:
        model(**values)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join([key, *map(str, detail["loc"])])
        if detail["type"] != "extra_forbidden":
            message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            shown = detail["input"]
            value_shown = "" if isinstance(shown, (dict, BaseModel)) else f" {shown!r}"
            raise ConfigError(f"{where}:{value_shown} in {path}: {message}") from None
        inner: Any = model
        for part in detail["loc"][:-1]:
            inner = _inner(inner, str(part))
        known = [field.alias or name for name, field in inner.model_fields.items()]
        hint = nearest(str(detail["loc"][-1]), known) or "; take it out"
        raise ConfigError(f"{where} in {path}: DeepSpeed knows no such key{hint}") from None


def _inner(model: Any, name: str) -> Any:
    """The model of a section within one."""
    kind = model.model_fields[name].annotation
    return next((part for part in get_args(kind) if hasattr(part, "model_fields")), kind)


def _check_names(value: Any, key: str, path: str) -> None:
    """Refuse a misspelt key of a section whose unknown keys DeepSpeed ignores."""
    if not isinstance(value, Mapping):
        return
    known = _NAMES[key]
    for name in value:
        if name == "thread_count":
            raise ConfigError(f"{key}.thread_count in {path}: it is now intra_op_parallelism")
        if name not in known:
            hint = nearest(name, known) or "; take it out"
            raise ConfigError(f"{key}.{name} in {path}: DeepSpeed knows no such key{hint}")


def _at(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None if any part of it is missing."""
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part)
    return found
