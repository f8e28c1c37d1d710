"""The description of a run at its start: each entry as soon as it is known, on rank 0 only.

    algorithm:  fixmatch, 300 steps
    batch:      256 rows a step (32 labelled, 224 unlabelled), 128 on each of 2 ranks
    precision:  bf16, not sharded
    ...

A terminal gets lines of its width. A log file gets one line per entry, for easy searching.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

from torch import nn

from hpdist.checkpoint.config import Checkpoint
from hpdist.data.decode.spec import InputSpec
from hpdist.data.sources.labeled import LabeledRows
from hpdist.data.sources.unlabeled_rows import (
    AnyUnlabeled,
    MixedRows,
    ParquetRows,
    SequentialRows,
    row_count,
)
from hpdist.distributed.batch_norm import batch_norms
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.messages.human import counted, percent
from hpdist.messages.progress import columns
from hpdist.tasks.base import TaskConfig
from hpdist.tracking.console import Console, wrapped
from hpdist.tracking.environment import hosts_and_devices
from hpdist.train.config import RunConfig
from hpdist.version import __version__

Entries: TypeAlias = list[tuple[str, str]]

_LABEL = 12  # columns of an entry's label
_CLASSES = 60  # characters that the names of classes may take


def log_settings(
    config: RunConfig, sharding: ExecutionPlan, uses_unlabeled: bool, *, files: bool
) -> None:
    """Log the settings, before anything is opened, built or waited for."""
    main = os.environ.get("RANK", "0") == "0"  # ranks have not met
    log_line = Console(0, 0, main).log_line
    log_line(f"hpdist {__version__}: {config.run.name or 'a new run'}")
    log_entries(run_entries(config, sharding, uses_unlabeled, files=files), main)


def log_devices(main: bool) -> None:
    """Log the ranks' hosts and devices. Collective: every rank must call."""
    found = hosts_and_devices()
    if main:
        log_entries([("devices", _devices(found))], main)


def log_model(name: str, model: nn.Module, micro_batches: int, ranks: int, main: bool) -> None:
    """Log the size of the model, how much of it is trained, and what it normalises by."""
    log_entries([("model", f"{name}, {_parameters(model)}")], main)
    by_rank = any(norm.statistics == "rank" for norm in batch_norms(model))
    if ranks > 1 and by_rank:
        Console(0, 0, main).log_line(
            f"note: batch.norm_statistics: rank: BatchNorm goes by the rows of each of {ranks:,} "
            "ranks, so the run depends on their number; global, the default, avoids that"
        )
    if micro_batches > 1 and any(batch_norms(model)):
        Console(0, 0, main).log_line(
            f"note: BatchNorm sees one of {micro_batches} micro-batches at a time, so its "
            "statistics are not those of the global batch; norm: group avoids that"
        )


def log_resumed(path: Path, step: int, main: bool) -> None:
    """Log the checkpoint that a run continues from."""
    Console(0, 0, main).log_line(f"continuing from {path} at step {step}")


def log_entries(entries: Iterable[tuple[str, str]], main: bool) -> None:
    """Print entries with their texts aligned."""
    log_line = Console(0, 0, main).log_line
    for label, text in entries:
        for line in laid_out(label, text, columns()):
            log_line(line)


def laid_out(label: str, text: str, width: int | None) -> list[str]:
    """Format an entry in lines of at most so many columns; None: in one line."""
    head = f"{label}:".ljust(_LABEL)
    if width is None:
        return [head + text]
    return wrapped(head + text, width, indent=_LABEL)


def run_entries(
    config: RunConfig, sharding: ExecutionPlan, uses_unlabeled: bool, *, files: bool
) -> Entries:
    """The entries of the settings, including the launcher's."""
    names = [config.algorithm.name, *(addon.name for addon in config.addons)]
    return [
        ("algorithm", f"{' + '.join(names)}, {counted(config.steps, 'step')}"),
        ("batch", _batch(config, sharding, uses_unlabeled)),
        ("precision", _precision(config, sharding)),
        ("evaluation", _evaluation(config)),
        ("checkpoint", _checkpoints(config.checkpoint) if files else "none"),
        ("tracker", _tracker(config) if files else "none"),
        ("run folder", _folder(config) if files else "none: nothing is written"),
    ]


def _folder(config: RunConfig) -> str:
    if config.run.name is None:
        return f"a new one in {config.run.dir}, as there is no run.name"
    return str(config.run.folder)


def _batch(config: RunConfig, sharding: ExecutionPlan, uses_unlabeled: bool) -> str:
    labeled, unlabeled = config.batch.labeled, config.batch.unlabeled if uses_unlabeled else 0
    parts = f"{labeled:,} labelled, {unlabeled:,} unlabelled" if unlabeled else "all labelled"
    rows, ranks = labeled + unlabeled, int(os.environ.get("WORLD_SIZE", "1"))
    text = f"{rows:,} rows a step ({parts})"
    if ranks > 1:
        text += f", {rows // ranks:,} on each of {ranks:,} ranks"
    if sharding.accumulation > 1:
        text += f", in {sharding.accumulation:,} micro-batches of {sharding.micro_batch:,}"
    return text


def _precision(config: RunConfig, sharding: ExecutionPlan) -> str:
    parts: list[str] = ["fp8" if sharding.fp8 else sharding.precision, sharding.name]
    if sharding.shard.engine is not None:
        released = sharding.shard.reshard_after_forward is not False
        parts.append(f"weights {'released after each forward' if released else 'gathered once'}")
    if sharding.offloads_to != "none":
        parts.append(f"offloaded to {'the CPU' if sharding.offloads_to == 'cpu' else 'NVMe'}")
    if sharding.bf16_state:
        parts.append("master weights and optimizer state in bf16")
    if config.activation_checkpointing:
        parts.append("activation checkpointing")
    if sharding.compile is not None:
        mode = sharding.compile.get("mode")
        parts.append("compiled" if mode is None else f"compiled, {mode}")
    return ", ".join(parts)


def _evaluation(config: RunConfig) -> str:
    every = config.eval.every
    during = "" if every is None else f"every {counted(every, 'step')}"
    test, validation = config.data.test is not None, config.data.validation is not None
    if not (test or validation):
        return "none: there is neither data.test nor data.validation"
    if test and validation:
        last = "data.validation and data.test at the end"
        return f"data.validation {during}, {last}" if during else last
    name = "data.validation" if validation else "data.test"
    return f"{name} {during} and at the end" if during else f"{name} at the end"


def _checkpoints(config: Checkpoint) -> str:
    due = [] if config.every is None else [counted(config.every, "step")]
    if config.minutes is not None:
        due.append(f"{config.minutes:g} min")
    when = f"every {' or '.join(due)}, and after the last step" if due else "after the last step"
    return f"{when}; the newest {config.keep} are kept"


def _tracker(config: RunConfig) -> str:
    tracker = config.tracker
    if tracker.name != "wandb":
        return tracker.name
    mode = tracker.mode or os.environ.get("WANDB_MODE") or "offline"
    return f"wandb, {mode}"


def _devices(found: Sequence[tuple[str, str]]) -> str:
    hosts = len({host for host, _ in found})
    kinds = list(dict.fromkeys(device for _, device in found))
    counts = [sum(device == kind for _, device in found) for kind in kinds]
    if len(found) == 1:
        return f"1 rank: {kinds[0]}"
    hosts_text = ", ".join(
        kind if len(kinds) == 1 else f"{count:,} x {kind}"
        for kind, count in zip(kinds, counts, strict=True)
    )
    return f"{counted(len(found), 'rank')} on {counted(hosts, 'host')}: {hosts_text}"


def _parameters(model: nn.Module) -> str:
    # Under ZeRO-3 parameters are shards, which have their whole size as an attribute.
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
    total = sum(size for size, _ in sizes)
    trained = sum(size for size, trained in sizes if trained)
    if trained == total:
        return f"{counted(total, 'parameter')}, all trained"
    shares = f"{trained:,} trained ({percent(trained / total)}), {total - trained:,} frozen"
    return f"{counted(total, 'parameter')}, {shares}"


def log_data(
    config: RunConfig,
    spec: InputSpec,
    labeled: LabeledRows,
    unlabeled: AnyUnlabeled | None,
    measured: Mapping[str, LabeledRows | None],
    decisions: Iterable[str],
    main: bool,
) -> None:
    """Log the content of the sets and how they are read; `decisions` are further lines."""
    log_entries(data_entries(config, spec, labeled, unlabeled, measured), main)
    log_lines(decisions, main)


def log_lines(lines: Iterable[str], main: bool) -> None:
    """Print lines; some begin like an entry, such as `pictures: 3 channels`."""
    for line in lines:
        label, colon, text = line.partition(": ")
        if colon and label.isalpha() and label != "note":
            log_entries([(label, text)], main)
        else:
            Console(0, 0, main).log_line(line)


def data_entries(
    config: RunConfig,
    spec: InputSpec,
    labeled: LabeledRows,
    unlabeled: AnyUnlabeled | None,
    measured: Mapping[str, LabeledRows | None],
) -> Entries:
    """The entries of rows, classes and inputs; `measured` are the held-out sets by name."""
    known, rows = len(labeled.dataset), len(labeled)
    of = f" of {known:,}" if known != rows else ""
    task = cast(TaskConfig, config.task).makes
    entries = [("labelled", f"{rows:,}{of} rows"), (task.names_are, _names(labeled.classes.names))]
    if unlabeled is not None:
        entries.append(("unlabelled", _unlabeled(unlabeled, config.batch.unlabeled)))
    for name, rows_measured in measured.items():
        if rows_measured is not None:
            entries.append((name, f"{len(rows_measured):,} rows"))
    entries.append(("input", spec.describe()))
    return entries


def _names(names: Sequence[str]) -> str:
    """The first names, as many as fit."""
    shown: list[str] = []
    for name in names:
        if sum(len(other) + 2 for other in shown) + len(name) > _CLASSES:
            break
        shown.append(name)
    shown = shown or [f"{names[0][:_CLASSES]}…"]
    more = f" and {len(names) - len(shown):,} more" if len(shown) < len(names) else ""
    return f"{len(names):,} ({', '.join(shown)}{more})"


def _unlabeled(rows: AnyUnlabeled, batch: int) -> str:
    count = row_count(rows)
    if isinstance(rows, MixedRows):
        how = f"of {counted(len(rows.parts), 'set')}, mixed"
    elif isinstance(rows, ParquetRows):
        how = f"streamed from {counted(len(rows.index.files), 'Parquet file')}"
    elif isinstance(rows, SequentialRows):
        how = "streamed"
    else:
        how = "in a table"
    if count is None:
        return f"rows {how}; their number is not known"
    return f"{count:,} rows {how}; an epoch is {counted(max(round(count / batch), 1), 'step')}"
