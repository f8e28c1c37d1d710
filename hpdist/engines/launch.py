"""Makes the Accelerator of a run from hpdist's config and the settings of `accelerate launch`."""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import os
import socket
import sys
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    compare_versions,
)

from hpdist.distributed.collectives import keep_group
from hpdist.distributed.mpi import adopt_mpi
from hpdist.engines.bf16_state import BF16_STATE, check_bf16_state, check_both
from hpdist.engines.compilation import compile_arguments
from hpdist.engines.config import ExecutionRequest, Precision, Shard, Zero
from hpdist.engines.deepspeed_config import agreed_loss_scale, base_of_run, read_deepspeed, section
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.engines.fsdp2_launcher import check_shard
from hpdist.engines.launcher import Launcher, neutralised, read_launcher, unused_settings
from hpdist.errors import ConfigError
from hpdist.messages.progress import working
from hpdist.models.fp8 import check_fp8

_TIMEOUT = timedelta(minutes=10)
ALLOW_CPU_FP16 = "HPDIST_ALLOW_CPU_FP16"
T = TypeVar("T")
_DEEPSPEED = "0.19.8"
"""The oldest DeepSpeed in which every stage and accumulation was verified to be correct."""


def resolve(request: ExecutionRequest) -> ExecutionPlan:
    """Merge hpdist's config and the launcher's; batch sizes are left to the caller.

    Raises ConfigError if both set a value and differ, naming both places, or if the device or the
    installation does not support it.
    """
    adopt_mpi()
    launcher = read_launcher()
    path = launcher.get("file", (None, ""))[0]
    notes = unused_settings()
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path not in (None, named):
        notes.append(f"DeepSpeed's config: {path} ({named} is not in {os.getcwd()})")
    if "compile" in launcher:
        notes.append(
            f"{launcher['compile'][1]}: hpdist compiles the model itself, so that its weights keep "
            "their names"
        )
    stage = _agree(launcher, "zero.stage", request.zero.stage)
    fp8 = request.precision == "fp8"
    sharding = ExecutionPlan(
        precision=_agree(launcher, "precision", "bf16" if fp8 else request.precision) or "fp32",
        fp8=fp8,
        stage=stage,
        offload=_agree(launcher, "zero.offload", request.zero.offload) or "none",
        nvme_path=_agree(launcher, "zero.nvme_path", request.zero.nvme_path),
        bf16_state=_bf16_state(launcher, request.zero),
        shard=_agree_on_shard(launcher, request.shard),
        grad_clip=_agree(launcher, "optim.grad_clip", request.grad_clip),
        loss_scale=request.loss_scale,
        deepspeed=path,
        compile=compile_arguments(request.compile, launcher.get("compile"), stage),
        find_unused=request.find_unused_parameters,
        asked_accumulation=launcher.get("accumulation"),
        notes=tuple(notes),
        patience=request.patience,
    )
    _check_precision(sharding.precision)
    if fp8:
        check_fp8()
        if sharding.is_sharded:
            raise ConfigError(
                f"precision: fp8 is for one GPU or DDP, and this run is sharded ({sharding.name}); "
                "leave zero.stage and shard.engine out, or use bf16"
            )
    _check_zero(sharding)
    check_bf16_state(sharding)
    check_shard(sharding, launcher)
    if sharding.find_unused and sharding.is_sharded:
        raise ConfigError(
            f"find_unused_parameters: DDP's, but this run is sharded ({sharding.name}); leave it "
            "out: what a step does not reach is found without it"
        )
    return sharding if path is None else _with_file(sharding, request, path)


def _with_file(sharding: ExecutionPlan, request: ExecutionRequest, path: str) -> ExecutionPlan:
    """Add the settings of the DeepSpeed JSON to the plan."""
    values = read_deepspeed(path)
    base, unused = base_of_run(values, path, request.training, sharding.precision)
    parameters = section(section(base, "zero_optimization", path), "offload_param", path)
    if parameters.get("device") == "nvme":
        place = f"zero_optimization.offload_param.nvme_path in {path}"
        _check_nvme(parameters.get("nvme_path"), place)
    scale = sharding.loss_scale
    if sharding.precision == "fp16":
        scale = agreed_loss_scale(values, path, scale)
    notes = sharding.notes
    if unused:
        notes = (*notes, f"{path}: hpdist does not use {', '.join(unused)}")
    return replace(sharding, base=base, loss_scale=scale, notes=notes)


def _join_after_restart(backend: str) -> None:
    """Join the process group under names of this attempt if the launcher has restarted us.

    The launcher's static rendezvous keeps one store for all attempts, which torch takes for a new
    one: ranks would connect to the addresses of dead processes. Several machines need
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


@working("setting up the process group")
def make_accelerator(sharding: ExecutionPlan) -> Accelerator:
    """Make the Accelerator. Collective: it joins the process group."""
    on_cpu = not torch.cuda.is_available()
    atexit.register(keep_group)
    for note in sharding.notes:
        _print_once(note)
    if sharding.stage is not None:
        _be_one_process()
    # Our buffers are already equal on every rank. The option's new name is not in every torch.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    handlers: list[Any] = [
        DistributedDataParallelKwargs(
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=sharding.find_unused,
        )
    ]
    if "LOCAL_RANK" in os.environ:
        # Without a named backend every CPU rank under DeepSpeed takes itself for rank 0 of 1.
        backend = "gloo" if on_cpu else "nccl"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=_TIMEOUT))
        _join_after_restart(backend)
    precision = sharding.precision
    mixed = "no" if precision == "fp32" else precision
    if sharding.shard.engine is not None:
        mixed = "no"  # weights are gathered in half precision: there is nothing to cast
    if sharding.stage is None:
        if precision == "fp16" and on_cpu:
            # Accelerate would silently compute in fp32; the engine does it instead.
            mixed = "no"
        os.environ["ACCELERATE_MIXED_PRECISION"] = mixed
        # Without cpu=True Accelerate joins CPU ranks to a group, but lets each train by itself.
        with neutralised():
            return Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=handlers)

    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by names that torch has renamed; users cannot change that.
    warnings.filterwarnings("ignore", message=r"`torch.distributed.*` is deprecated")
    from hpdist.engines.deepspeed_plugin import make_plugin
    from hpdist.engines.operators import needed_builders, prepare_operators

    os.environ["ACCELERATE_MIXED_PRECISION"] = mixed
    plugin = make_plugin(sharding)
    prepare_operators(needed_builders(plugin.deepspeed_config), _print_line, sharding.patience)
    with neutralised():
        return Accelerator(mixed_precision=mixed, deepspeed_plugin=plugin, kwargs_handlers=handlers)


def with_batch(
    sharding: ExecutionPlan, micro_batch: int, accumulation: int, ranks: int
) -> ExecutionPlan:
    """Return the plan for this split of the batch; checked against the launcher's numbers."""
    ours = {
        "train_batch_size": micro_batch * accumulation * ranks,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
    }
    others = [
        (key, sharding.base.get(key), f"{key}: {sharding.base.get(key)} in {sharding.deepspeed}")
        for key in ours
    ]
    if sharding.asked_accumulation is not None:
        others.append(("gradient_accumulation_steps", *sharding.asked_accumulation))
    for key, theirs, place in others:
        if theirs is not None and (isinstance(theirs, bool) or theirs != ours[key]):
            raise ConfigError(
                f"{place}, but hpdist's batch sizes (labelled and unlabelled rows, split by "
                f"batch.micro) make it {ours[key]}; write auto there"
            )
    return replace(sharding, micro_batch=micro_batch, accumulation=accumulation)


def _agree(launcher: Launcher, setting: str, ours: T | None) -> Any:
    """Return the value of a setting that may stand in two places."""
    if setting not in launcher:
        return ours
    theirs, place = launcher[setting]
    if ours is not None and ours != theirs:
        raise ConfigError(
            f"{setting}: {ours} in hpdist's config, but {place}; make them agree, or leave "
            "hpdist's out"
        )
    return theirs


def _agree_on_shard(launcher: Launcher, ours: Shard) -> Shard:
    """Return the settings of FSDP2, each of which may stand in two places."""
    keys = Shard.model_fields
    return Shard(**{key: _agree(launcher, f"shard.{key}", getattr(ours, key)) for key in keys})


def _bf16_state(launcher: Launcher, zero: Zero) -> bool:
    """Whether config and launcher ask for master weights and optimizer state in bf16."""
    wanted = {key: bool(_agree(launcher, f"zero.{key}", getattr(zero, key))) for key in BF16_STATE}
    check_both(wanted)
    return all(wanted.values())


def _check_precision(precision: Precision) -> None:
    on_gpu = torch.cuda.is_available()
    if precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: bf16, but this GPU does not support it; use fp16")
    if precision == "fp16" and not on_gpu:
        if os.environ.get(ALLOW_CPU_FP16) != "1":
            raise ConfigError(
                "precision: fp16 needs a GPU, and none is visible; use bf16 on a CPU "
                f"(for trials, {ALLOW_CPU_FP16}=1 computes fp16 on the CPU, very slowly)"
            )
        if os.environ.get("LOCAL_RANK", "0") == "0":
            message = f"{ALLOW_CPU_FP16}=1: fp16 on a CPU, for tests and trials only"
            warnings.warn(message, stacklevel=2)


def _check_zero(sharding: ExecutionPlan) -> None:
    stage, offload = sharding.stage, sharding.offload
    if offload != "none" and not stage:
        raise ConfigError(f"zero.offload: {offload} needs zero.stage 1, 2 or 3")
    if offload == "nvme" and stage != 3:
        raise ConfigError(f"zero.offload: nvme needs zero.stage 3, not {stage}")
    if offload == "nvme":
        _check_nvme(sharding.nvme_path, "zero.nvme_path")
    if stage is None:
        return
    if stage not in range(4):
        raise ConfigError(f"zero.stage: {stage} must be 0, 1, 2 or 3")
    for package in ("deepspeed", "transformers"):  # Accelerate's plug-in needs the latter
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"zero.stage: {stage} needs {package}, which is not installed; "
                'pip install "hpdist[deepspeed]", or launch without DeepSpeed'
            )
    installed = importlib.metadata.version("deepspeed")
    if compare_versions("deepspeed", "<", _DEEPSPEED):
        raise ConfigError(
            f"zero.stage: {stage} needs deepspeed {_DEEPSPEED} or newer, and {installed} is "
            "installed: older ones silently lose a part of the gradients (ZeRO-2 with "
            f'accumulation, ZeRO-0 in bf16); pip install "deepspeed>={_DEEPSPEED}"'
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


def _print_once(line: str) -> None:
    """Print a line on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        _print_line(line)


def _print_line(line: str) -> None:
    """Print a line on this process, before any ranks have joined."""
    print(line, file=sys.stderr, flush=True)
