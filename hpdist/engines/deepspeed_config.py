"""The keys of a DeepSpeed JSON: passed on, compared with hpdist's config, unused, or refused.

Every key is handled here, so that no file says one thing while the run does another. DeepSpeed's
own models define what a section may hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hpdist.config.section import nearest
from hpdist.engines.config import LossScale, Precision
from hpdist.engines.deepspeed_sections import check_sections, is_off, one_name_each, plain_section
from hpdist.engines.described import described_optimizer, described_schedule
from hpdist.errors import ConfigError

_AGREED = (  # with hpdist's config, elsewhere
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16",
    "bf16",
    "zero_optimization",
)
_PASSED = (
    "aio",
    "comms_logger",
    "dump_state",
    "wall_clock_breakdown",
    "memory_breakdown",
    "disable_python_gc",
    "log_level",
    "timers",
)
_CHECKPOINTS = "hpdist writes its own checkpoints"
_TRACKER = "hpdist's tracker section sends the numbers"
_UNUSED = {
    "steps_per_print": "hpdist prints at log.every",
    "activation_checkpointing": "hpdist's own setting of that name does it",
    "flops_profiler": "it would count several forwards of a step as one",
    "tensorboard": _TRACKER,
    "wandb": _TRACKER,
    "csv_monitor": "metrics.jsonl has the numbers",
    "comet": _TRACKER,
    "checkpoint": _CHECKPOINTS,
    "nebula": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "dataloader_drop_last": "hpdist reads the data",
    "pipeline": "hpdist has no pipeline",
    "seq_parallel_communication_data_type": "hpdist has no sequence parallelism",
    "use_data_before_expert_parallelism": "hpdist has no expert parallelism",
    "vocabulary_size": "it has no effect",
}
_PRECISION = "choose precision: bf16 or fp16, with fp32 master weights, instead"
_MEAN = "gradients are the mean over the global batch, whatever the number of ranks"
_BATCH = "hpdist's batch section and data decide what a step trains on"
_REFUSED = {
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "compression_training": "DeepSpeed has no compression any more",
    "quantize_training": "DeepSpeed has no quantised training any more",
    "weight_quantization": "hpdist trains no quantised weights",
    "sparse_gradients": "DeepSpeed has no compression of dense gradients any more",
    "eigenvalue": "DeepSpeed has no quantised training any more",
    "sparse_attention": "DeepSpeed has no sparse attention any more",
    "progressive_layer_drop": "DeepSpeed has no layer drop any more",
    "graph_harvesting": "DeepSpeed has no graph harvesting any more",
    "elasticity": _BATCH,
    "curriculum_learning": _BATCH,
    "data_efficiency": _BATCH,
    "autotuning": "it ends the process after a few steps",
    "hybrid_engine": "hpdist does not generate",
    "compile": "set compile: true in hpdist's config",
    "tensor_parallel": "hpdist shards by ZeRO alone",
    "expert_parallel": "hpdist shards by ZeRO alone",
    "sequence_parallel_size": "hpdist shards by ZeRO alone",
    "prescale_gradients": _MEAN,
    "gradient_predivide_factor": _MEAN,
    "gradient_allreduce_op": _MEAN,
    "fp32_allreduce": "write communication_data_type: fp32",
    "managed_gradient_accumulation": "batch.micro in hpdist's config splits a step",
    "disable_allgather": "every rank needs the updated weights",
    "allgather_size": "write zero_optimization.allgather_bucket_size",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {  # values that change nothing
    "sequence_parallel_size": (1,),
    "gradient_predivide_factor": (1, 1.0),
    "gradient_allreduce_op": ("mean",),
    "managed_gradient_accumulation": (True,),
    "steps_per_print": (float("inf"),),
}
_FORCED = {  # set by hpdist, whatever the file says
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
_HALVES = ("fp16", "bf16")
_TYPES = ("communication_data_type", "data_types", "optimizer", "scheduler")


def read_deepspeed(path: str | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON config; empty without one. Raises ConfigError."""
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=_without_doubles)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed config {path!r}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the DeepSpeed config {path!r} must hold an object")
    return _with_new_names(values, path)


def check_file(values: Mapping[str, Any], path: str) -> None:
    """Refuse keys and values that no run supports. Raises ConfigError that names the key."""
    known = [*_AGREED, *_PASSED, *_UNUSED, *_REFUSED, *_FORCED, *_TYPES]
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"{key} in {path}: hpdist knows no such key of DeepSpeed's"
                f"{nearest(key, known) or '; take it out'}"
            )
        if key in _REFUSED and not _is_default(key, value):
            raise ConfigError(
                f"{key} in {path} is not for hpdist: {_REFUSED[key]}; take it out of the file"
            )
    enabled = [half for half in _HALVES if is_enabled(values, half, path)]
    if len(enabled) > 1:
        raise ConfigError(
            f"fp16.enabled and bf16.enabled are both true in {path}; a run uses only one of them"
        )
    check_sections(values, path)


def is_enabled(values: Mapping[str, Any], half: str, path: str) -> bool | None:
    """Whether the file enables a half precision; None if it does not say."""
    value = section(values, half, path).get("enabled", "auto")
    if value in ("auto", None):
        return None
    if not isinstance(value, bool):
        raise ConfigError(f'{half}.enabled: {value!r} in {path} must be true, false or "auto"')
    return value


def section(values: Mapping[str, Any], key: str, path: str) -> dict[str, Any]:
    """Return an object of the JSON; empty if it is missing, null or `"auto"`."""
    found = values.get(key)
    if found in (None, False, "auto"):
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: {found!r} in {path} must be an object")
    return found


def base_of_run(
    values: Mapping[str, Any], path: str, training: Mapping[str, Any], precision: Precision
) -> tuple[dict[str, Any], list[str]]:
    """Return the part of the file for DeepSpeed, and the names of its unused parts.

    `training` are the run's own settings by dotted name (`ExecutionRequest.training`).

    Raises ConfigError if the file and hpdist's config differ.
    """
    if precision in _HALVES and is_enabled(values, precision, path) is False:
        raise ConfigError(
            f"precision: {precision}, but {precision}.enabled: false in {path}; write true or auto"
        )
    _check_types(values, path, precision)
    unused = []
    for key, describe in (("optimizer", described_optimizer), ("scheduler", described_schedule)):
        if section(values, key, path):
            _check_described(key, describe(values[key], path), training, path)
            unused.append(f"{key} (hpdist's own setting agrees)")
    for key, reason in _UNUSED.items():
        if key in values and not _is_default(key, values[key]):
            unused.append(f"{key} ({reason})")
    for key, forced in _FORCED.items():
        if values.get(key, forced) not in (forced, "auto", None):
            unused.append(f"{key} (always {json.dumps(forced)} here)")
    if precision == "fp16" and section(values, "fp16", path).get("hysteresis", 1) not in (
        1,
        "auto",
    ):
        unused.append("fp16.hysteresis (the loss scale halves on every overflow)")
    kept = {key: value for key, value in values.items() if key in (*_AGREED, *_PASSED)}
    if values.get("communication_data_type"):
        kept["communication_data_type"] = values["communication_data_type"]
    if values.get("zero_optimization"):
        kept["zero_optimization"] = one_name_each(section(values, "zero_optimization", path))
        threshold = "stage3_param_persistence_threshold"
        if kept["zero_optimization"].get(threshold, "auto") not in (0, "auto", None):
            unused.append(f"zero_optimization.{threshold} (always 0 here)")
    return plain_section(kept), unused


def agreed_loss_scale(values: Mapping[str, Any], path: str, ours: LossScale) -> LossScale:
    """Combine the file's loss scale with hpdist's. Raises ConfigError if they differ."""
    fp16 = section(values, "fp16", path)
    read: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "static": ("loss_scale", lambda value: float(value) or None),
        "initial": ("initial_scale_power", lambda value: 2.0 ** int(value)),
        "growth_interval": ("loss_scale_window", int),
        "minimum": ("min_loss_scale", int),
    }
    found = {}
    for setting, (key, convert) in read.items():
        if fp16.get(key, "auto") in ("auto", None):
            continue
        theirs, own = convert(fp16[key]), getattr(ours, setting)
        if setting in ours.model_fields_set and own != theirs:
            raise ConfigError(
                f"loss_scale.{setting}: {own} in hpdist's config, but fp16.{key}: {fp16[key]} in "
                f"{path}; make them agree, or leave one out"
            )
        found[setting] = theirs
    return LossScale.model_validate(ours.model_dump(exclude_unset=True) | found)


def _check_types(values: Mapping[str, Any], path: str, precision: Precision) -> None:
    """Refuse dtypes that would lose precision."""
    communicated = values.get("communication_data_type")
    if communicated not in (None, "fp32", precision):
        raise ConfigError(
            f"communication_data_type: {communicated} in {path}: gradients are summed in fp32 or "
            f"in the run's precision, {precision}"
        )
    for key, value in section(values, "data_types", path).items():
        usual = {"param_dtype": precision, "grad_accum_dtype": precision}.get(key)
        if value not in (None, "auto", usual):
            raise ConfigError(
                f"data_types.{key}: {value!r} in {path} is not for hpdist, which keeps weights and "
                "gradients in the run's precision, and fp32 master weights; take it out"
            )


def _check_described(
    key: str, described: Mapping[str, Any], training: Mapping[str, Any], path: str
) -> None:
    """Compare a section, translated into hpdist's settings, with the run's own."""
    differing = []
    for setting, theirs in described.items():
        ours = training[setting]
        if ours != theirs:
            shown = list(theirs) if isinstance(theirs, tuple) else theirs
            differing.append(f"{setting}: {shown} (now {ours})")
    if differing:
        raise ConfigError(
            f"{key} in {path} differs from hpdist's config, which decides; to train as the file "
            f"says, set {', '.join(differing)} there; else remove the section"
        )


def _is_default(key: str, value: Any) -> bool:
    harmless = _HARMLESS.get(key, ())
    return value in harmless or (is_off(value) and not (value is False and True in harmless))


def _with_new_names(values: dict[str, Any], path: str) -> dict[str, Any]:
    """Remove comments, and rename keys that have two names."""
    found = {k: v for k, v in values.items() if not k.startswith(("_", "//", "#"))}
    if "bfloat16" in found:
        if "bf16" in found:
            raise ConfigError(f"bf16 and bfloat16 in {path} are the same; keep bf16")
        found["bf16"] = found.pop("bfloat16")
    return found


def _without_doubles(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} occurs twice")
        found[key] = value
    return found
