"""FSDP2 as accelerate's config asks for it: read, refused, or reported as unused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hpdist.engines.config import Shard
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.engines.fsdp2_shard import check_torch
from hpdist.errors import ConfigError

_OURS = "accelerate's config"
_INSTEAD = {  # what accelerate's config can ask for, and what to do instead
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing: true",
        "set activation_checkpointing: true in hpdist's config instead",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (
        "fsdp_activation_checkpointing_offload: true",
        "hpdist does not offload activations; leave it out",
    ),
}


def read_fsdp() -> dict[str, tuple[Any, str]]:
    """Read what `accelerate launch` sets for FSDP; settings left at their default are left out.

    Raises ConfigError for what hpdist does not support.
    """
    _refuse()
    found: dict[str, tuple[Any, str]] = {
        "shard.engine": ("fsdp2", f"distributed_type: FSDP in {_OURS}")
    }
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if reshard not in ("true", "false"):
        raise ConfigError(
            f"fsdp_reshard_after_forward: {reshard} in {_OURS} must be true or false; names of "
            "strategies are FSDP1's"
        )
    if reshard == "false":
        place = f"fsdp_reshard_after_forward: false in {_OURS}"
        found["shard.reshard_after_forward"] = (False, place)
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        found["shard.offload"] = ("cpu", f"fsdp_offload_params: true in {_OURS}")
    return found | _units()


def unused_fsdp() -> list[str]:
    """Name the settings of FSDP that hpdist does not use."""
    return ["fsdp_state_dict_type (hpdist writes its own checkpoints, which any engine reads)"] * (
        "FSDP_STATE_DICT_TYPE" in os.environ
    )


def check_shard(sharding: ExecutionPlan, launcher: Mapping[str, tuple[Any, str]]) -> None:
    """Raise ConfigError for settings of FSDP2 without it, and for what does not go with it."""
    shard = sharding.shard
    if shard.engine is None:
        given = [key for key in Shard.model_fields if getattr(shard, key) is not None]
        if given:
            raise ConfigError(f"shard.{given[0]}: it needs shard.engine: fsdp2")
        return
    where = launcher.get("shard.engine", (None, "shard.engine: fsdp2 in hpdist's config"))[1]
    if sharding.stage is not None:
        zero = f"zero.stage: {sharding.stage} in hpdist's config"
        zero = launcher.get("zero.stage", (None, zero))[1]
        raise ConfigError(f"{where}, but also {zero}; only one can shard: leave the other out")
    if sharding.offload != "none":
        raise ConfigError(f"zero.offload: {sharding.offload}, but {where}; use shard.offload: cpu")
    if sharding.compile is not None:
        raise ConfigError(
            f"compile: true, but {where}; hpdist does not compile a model that FSDP2 shards: leave "
            "one of them out, or shard by zero.stage"
        )
    check_torch()


def _refuse() -> None:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            f"fsdp_version: {version} in {_OURS}: hpdist shards by FSDP2; write fsdp_version: 2"
        )
    for variable, (what, instead) in _INSTEAD.items():
        if _is_set(variable):
            raise ConfigError(f"{what} in {_OURS}: {instead}")
    ignored = os.environ.get("FSDP_IGNORED_MODULES", "None")
    if ignored != "None":
        raise ConfigError(
            f"fsdp_ignored_modules: {ignored} in {_OURS}: hpdist shards the whole model, since "
            "nothing else would average the gradients of the rest; leave it out"
        )


def _units() -> dict[str, tuple[Any, str]]:
    """Which parts of the model are gathered one by one."""
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    place = f"fsdp_auto_wrap_policy: {policy} in {_OURS}"
    if policy == "NO_WRAP":
        return {"shard.units": ([], place)}
    if policy == "SIZE_BASED_WRAP":
        least = os.environ.get("FSDP_MIN_NUM_PARAMS", "100000000")
        if not least.isdecimal():
            raise ConfigError(f"fsdp_min_num_params: {least!r} in {_OURS} must be a whole number")
        return {"shard.min_parameters": (int(least), f"fsdp_min_num_params: {least} in {_OURS}")}
    if policy != "TRANSFORMER_BASED_WRAP":
        raise ConfigError(
            f"{place}: use TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP or NO_WRAP, or leave it out"
        )
    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "None")
    if names in ("None", ""):
        return {}
    place = f"fsdp_transformer_layer_cls_to_wrap: {names} in {_OURS}"
    return {"shard.units": ([name.strip() for name in names.split(",")], place)}


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes", "y", "on", "t")
