"""An optimizer or scheduler section of a DeepSpeed JSON, translated into hpdist's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpdist.config.section import nearest
from hpdist.errors import ConfigError

_ADAM = {"lr": "optim.lr", "betas": "optim.betas", "eps": "optim.eps"}
_OPTIMIZERS = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "sgd": {"lr": "optim.lr", "momentum": "optim.momentum", "nesterov": "optim.nesterov"},
}
_WARMUP = {"warmup_max_lr": "optim.lr", "warmup_num_steps": "schedule.warmup_steps"}
_SCHEDULES = {
    "warmuplr": ("constant", _WARMUP),
    "warmupdecaylr": ("linear", {**_WARMUP, "total_num_steps": "steps"}),
    "warmupcosinelr": (
        "cosine",
        {"warmup_num_steps": "schedule.warmup_steps", "total_num_steps": "steps"},
    ),
}
_NO_MATTER = {  # values with which a parameter has no effect
    "torch_adam": (True, False),
    "fused": (True, False),
    "adam_w_mode": (True, False),  # already in the name of the optimizer
    "bias_correction": (True,),
    "amsgrad": (False,),
    "dampening": (0, 0.0),
    "max_grad_norm": (0, 0.0, None),
    "warmup_min_lr": (0, 0.0),
    "warmup_min_ratio": (0, 0.0),
    "cos_min_ratio": (0, 0.0),
    "warmup_type": ("linear",),
    "last_batch_iteration": (-1,),
}


def described_optimizer(section: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return hpdist's equivalent settings. Raises ConfigError if there are none."""
    kind, params = _parts(section, "optimizer", path)
    if kind.lower() not in _OPTIMIZERS:
        raise ConfigError(
            f"optimizer.type: {kind} in {path}: hpdist has {', '.join(_OPTIMIZERS)}; set "
            "optim.name to one of them, and remove the section"
        )
    name = kind.lower()
    if name == "adam" and params.get("adam_w_mode", True) is not False:
        name = "adamw"  # the default of DeepSpeed's Adam
    names = {**_OPTIMIZERS[name], "weight_decay": "optim.weight_decay"}
    return {"optim.name": name} | _settings("optimizer", params, names, path)


def described_schedule(section: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return hpdist's equivalent settings. Raises ConfigError if there are none."""
    kind, params = _parts(section, "scheduler", path)
    if kind.lower() not in _SCHEDULES:
        raise ConfigError(
            f"scheduler.type: {kind} in {path}: hpdist has no such schedule; choose schedule.name, "
            "and remove the section"
        )
    name, names = _SCHEDULES[kind.lower()]
    return {"schedule.name": name} | _settings("scheduler", params, names, path)


def _parts(section: Mapping[str, Any], key: str, path: str) -> tuple[str, dict[str, Any]]:
    allowed = ("type", "params", "legacy_fusion")
    for name in section:
        if name not in allowed:
            raise ConfigError(f"{key}.{name} in {path}: unknown{nearest(name, allowed)}")
    kind, params = section.get("type"), section.get("params") or {}
    if not isinstance(kind, str) or not isinstance(params, dict):
        raise ConfigError(f"{key} in {path} must have a type (a name) and params (an object)")
    return kind, params


def _settings(
    key: str, params: Mapping[str, Any], names: Mapping[str, str], path: str
) -> dict[str, Any]:
    found = {}
    for name, value in params.items():
        if value == "auto" or value in _NO_MATTER.get(name, ()):
            continue
        if name not in names:
            hint = nearest(name, [*names, *_NO_MATTER]) if name not in _NO_MATTER else ""
            raise ConfigError(
                f"{key}.params.{name}: {value!r} in {path}: hpdist has no equivalent{hint}; remove "
                "it"
            )
        found[names[name]] = tuple(value) if isinstance(value, list) else value
    return found
