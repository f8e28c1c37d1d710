"""Assembles a run from its config: one function makes all parts, cheapest first.

run = build_run(config)     # a `Run`, whose parts are finished
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import datasets
from accelerate import Accelerator
from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.checkpoint.reader import SavedRun
from hpdist.distributed.collectives import call_on_all_ranks
from hpdist.distributed.launcher_watch import LauncherWatch
from hpdist.distributed.next_run import fresh_accelerate
from hpdist.engines import launch
from hpdist.engines.bf16_state import bf16_state_note
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.engines.prepare import prepare
from hpdist.errors import ConfigError
from hpdist.tracking.run_folder import RunFolder
from hpdist.train import opening
from hpdist.train.algorithm_memory import check_memory, describe_sums
from hpdist.train.checks import check_inputs, divide_batch
from hpdist.train.claim import Claim
from hpdist.train.compose import compose, execution_request
from hpdist.train.config import RunConfig
from hpdist.train.data import RunData
from hpdist.train.engine_check import check_engine, record_engine
from hpdist.train.generations import Generations, initial_values
from hpdist.train.given import InMemoryInputs, check_classes
from hpdist.train.guard import RunGuard
from hpdist.train.measuring import Measuring
from hpdist.train.model import RunModel
from hpdist.train.model_saving import ModelSaving
from hpdist.train.muon import refuse_sharded
from hpdist.train.opening import log_lines
from hpdist.train.optim import build_optimizer, optimizer_note
from hpdist.train.records import Records
from hpdist.train.recovery import Rollback
from hpdist.train.run_name import with_fresh_name
from hpdist.train.saving import Saving
from hpdist.train.sets import RunSets, open_sets
from hpdist.train.state import RunState
from hpdist.train.step import SemiSupervisedStep


@dataclass(frozen=True)
class RunPlan:
    """What a run does, by config and launcher, before anything is opened."""

    config: RunConfig
    sharding: ExecutionPlan
    uses_unlabeled: bool
    rows: int
    """Rows in a global batch."""
    micro_batches: int
    """Micro-batches per step on each rank."""


@dataclass(frozen=True)
class Outset:
    """Where a run begins: at its first step, or at a checkpoint."""

    facts: Mapping[str, Any] | None = None
    """The facts of the checkpoint; None for a new run."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """The summary of the run, if all of its steps are done already; else empty."""

    @property
    def seconds(self) -> float:
        """Seconds of training before this process."""
        return 0.0 if self.facts is None else float(self.facts["seconds"])

    @property
    def tracker_run_id(self) -> str | None:
        """The tracker's name for a continued run."""
        found: str | None = None if self.facts is None else self.facts["tracker_run_id"]
        return found


@dataclass(frozen=True)
class Run:
    """The finished parts of a run, and what must be released at its end."""

    config: RunConfig
    """The run's settings, before those of the rows and the model are added."""
    files: bool
    """Whether anything is written."""
    sharding: ExecutionPlan
    accelerator: Accelerator
    folder: RunFolder
    launcher: LauncherWatch
    claim: Claim
    data: RunData
    model: RunModel
    step: SemiSupervisedStep
    generations: Generations
    guard: RunGuard
    state: RunState
    saving: Saving
    model_saving: ModelSaving
    rollback: Rollback
    measuring: Measuring
    records: Records
    outset: Outset

    @property
    def main(self) -> bool:
        """Whether this rank is the main one."""
        return bool(self.accelerator.is_main_process)


def build_run(
    config: RunConfig, objects: InMemoryInputs | None = None, *, files: bool = True
) -> Run:
    """Check and build all parts of a run, which continues if its folder holds one.

    Args:
        config: The run's settings.
        objects: The objects that Python code gave instead of names.
        files: Whether anything is written; if not, no folder is owned and nothing is resumed.

    Collective: every rank must call. Raises ConfigError, DataError or CheckpointError, the same on
    all ranks, after closing what was opened.
    """
    plan = plan_run(config)
    with fresh_accelerate():
        return _assemble(plan, objects or InMemoryInputs(), files)


def plan_run(config: RunConfig) -> RunPlan:
    """Merge config and launcher. Raises ConfigError if they conflict."""
    sharding = launch.resolve(execution_request(config))
    if config.optim.name == "muon":
        refuse_sharded(sharding.stage, sharding.shard.engine)
    config = config.model_copy(update={"loss_scale": sharding.loss_scale})
    algorithm = compose(config)  # only for its properties; the one that trains knows the classes
    uses_unlabeled = algorithm.views.uses_unlabeled
    if uses_unlabeled and config.data.unlabeled_rows is None:
        raise ConfigError(
            f"data.unlabeled is missing: algorithm {config.algorithm.name} learns from "
            "unlabelled rows; where they stand in the labelled table, set "
            "data.labeled.unlabeled_value"
        )
    _check_stored_labels(config, algorithm)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    count = divide_batch(config.batch, algorithm, ranks)
    rows = config.batch.labeled + (config.batch.unlabeled if uses_unlabeled else 0)
    sharding = launch.with_batch(sharding, rows // ranks // count, count, ranks)
    return RunPlan(config, sharding, uses_unlabeled, rows, count)


def _check_stored_labels(config: RunConfig, algorithm: Algorithm) -> None:
    """Raise ConfigError if stored labels are missing, or nobody learns from them."""
    unlabeled, name = config.data.unlabeled, config.algorithm.name
    given = unlabeled is not None and unlabeled.pseudo_labels is not None
    if algorithm.views.stored_labels and not given:
        raise ConfigError(
            f"data.unlabeled.pseudo_labels is missing: algorithm {name} learns from labels that "
            "`hpdist predict` stored; name the folders"
        )
    if given and not algorithm.views.stored_labels:
        raise ConfigError(
            f"data.unlabeled.pseudo_labels: algorithm {name} does not learn from stored labels; "
            "choose algorithm.name: stored_pseudo_labels, or leave it out"
        )


def _assemble(plan: RunPlan, objects: InMemoryInputs, files: bool) -> Run:
    """Open folder and data, build model and step, and continue a run in the folder."""
    config, sharding = plan.config, plan.sharding
    opening.log_settings(config, sharding, plan.uses_unlabeled, files=files)
    accelerator = launch.make_accelerator(sharding)
    main = accelerator.is_main_process
    opening.log_devices(main)
    if config.run.name is None and files:
        config = with_fresh_name(config, main)
    if not (main and sys.stderr.isatty()):
        datasets.disable_progress_bars()
    with ExitStack() as stack:
        launcher = LauncherWatch(accelerator.process_index)
        stack.callback(launcher.stop)
        folder = RunFolder(config.run.folder, main)
        claim = Claim(config, folder, files)
        stack.callback(claim.release)
        saved = claim.open()
        checked = check_engine(config, accelerator, sharding, folder) if files else None
        sets = open_sets(config, objects, folder, saved=saved, uses_unlabeled=plan.uses_unlabeled)
        model = RunModel(
            config.model,
            sets,
            sharding,
            objects.model,
            seed=config.run.seed,
            checkpoints_activations=config.activation_checkpointing,
            norm_statistics=config.batch.norm_statistics,
            marks_outputs=config.optim.name == "muon" or sharding.fp8,
            main=main,
        )
        algorithm = _make_algorithm(config, objects, sets, accelerator)
        step, initial = _build_step(config, sets, accelerator, plan, model, algorithm)
        engine = step.engine
        data = RunData(sets, folder, engine.rank, engine.world_size, files=files)
        stack.callback(data.close)
        generations = Generations(step, data, initial, config.steps)
        guard = RunGuard(engine.rank, config.watchdog.seconds, launcher)
        state = RunState(step, data, config)
        saving = Saving(
            config.checkpoint, config.steps, state, folder.checkpoints if files else None
        )
        model_saving = ModelSaving(config, sets, model, state, folder, sharding, files=files)
        rollback = Rollback(config.divergence, folder, state, saving)
        measuring = Measuring(step, data, state)
        records = Records(step, data, state, saving, sharding, plan.rows)
        outset = _set_out(saved, claim, folder, data, state, saving, files)
        if files and not outset.summary:
            # Not earlier: a run that is refused must not lose its history.
            call_on_all_ranks(lambda: sets.record(folder))
            record_engine(folder, checked)
        model_saving.describe(done=bool(outset.summary))
        stack.pop_all()  # success: everything stays open
    return Run(
        config=config,
        files=files,
        sharding=sharding,
        accelerator=accelerator,
        folder=folder,
        launcher=launcher,
        claim=claim,
        data=data,
        model=model,
        step=step,
        generations=generations,
        guard=guard,
        state=state,
        saving=saving,
        model_saving=model_saving,
        rollback=rollback,
        measuring=measuring,
        records=records,
        outset=outset,
    )


def _make_algorithm(
    config: RunConfig, objects: InMemoryInputs, sets: RunSets, accelerator: Accelerator
) -> Algorithm:
    """Make the algorithm with its add-ons, and set how much data there is."""
    check_classes(objects.algorithm, sets.output_size)
    algorithm = compose(config, sets.num_classes, accelerator.device, sets.task)
    algorithm.rows = sets.unlabeled_rows
    algorithm.class_counts = sets.class_counts
    algorithm.bind_rank(accelerator.process_index, accelerator.num_processes)
    lines = check_memory(algorithm, accelerator.device, config.batch)
    lines += describe_sums(algorithm, config.batch, accelerator.num_processes)
    log_lines(lines, accelerator.is_main_process)
    check_inputs(algorithm, sets.unlabeled_spec)
    return algorithm


def _build_step(
    config: RunConfig,
    sets: RunSets,
    accelerator: Accelerator,
    plan: RunPlan,
    run_model: RunModel,
    algorithm: Algorithm,
) -> tuple[SemiSupervisedStep, dict[str, Tensor]]:
    """Build what trains, and the initial values of every generation's student.

    Raises ConfigError on all ranks. Collective.
    """
    sharding = plan.sharding
    model = run_model.make(algorithm)
    initial = initial_values(model, algorithm.generations)
    opening.log_model(
        config.model.name,
        model,
        plan.micro_batches,
        accelerator.num_processes,
        accelerator.is_main_process,
    )
    optimizer = build_optimizer(model, config.optim)
    notes = [optimizer_note(optimizer), bf16_state_note(sharding)]
    log_lines(filter(None, notes), accelerator.is_main_process)
    replicated = algorithm.views.teacher and sharding.stage == 3
    model, optimizer = prepare(accelerator, model, optimizer, sharding)
    # Not earlier: by now ZeRO-3 has released the first model's whole weights.
    replica = run_model.make(algorithm) if replicated else None
    step = SemiSupervisedStep(
        accelerator,
        model,
        optimizer,
        algorithm,
        sets.views,
        micro_batches=plan.micro_batches,
        decay=config.teacher.decay,
        teacher_warmup=config.teacher.warmup,
        grad_clip=sharding.grad_clip,
        precision=sharding.precision,
        loss_scale=config.loss_scale,
        teacher_model=replica,
        seed=config.run.seed,
        l1=config.optim.l1,
    )
    return step, initial


def _set_out(
    saved: SavedRun | None,
    claim: Claim,
    folder: RunFolder,
    data: RunData,
    state: RunState,
    saving: Saving,
    files: bool,
) -> Outset:
    """Continue from a checkpoint, or begin. Collective."""
    if saved is None:
        if files:
            call_on_all_ranks(lambda: folder.drop_metrics_after(-1))
            data.drop_audit_after(0)
        return Outset()
    facts = state.load(saved)
    saving.take_for_saved()
    done = state.step.applied_steps
    summary = claim.summary(done)
    if summary is not None:
        return Outset(facts, summary)
    call_on_all_ranks(lambda: folder.drop_metrics_after(done))
    opening.log_resumed(saved.path, done, folder.main)
    return Outset(facts)
