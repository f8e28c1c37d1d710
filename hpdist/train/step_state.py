"""The state of a step beside model and optimizer: in checkpoints, and in Accelerate's.

accelerator.save_state("saved")     # every rank; saved/hpdist has the step's part
accelerator.load_state("saved")     # every rank, with the step made as before

Accelerate saves and loads model, optimizer and random numbers. It would save registered objects on
its main process only, where a gather would wait for ever; its hooks run on every rank, so each
rank writes its part there, in the format of `hpdist.checkpoint.reader`.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.saved_state import Shards
from hpdist.aliases import current_name
from hpdist.checkpoint import reader as checkpoint
from hpdist.checkpoint.manifest import Count, folder_name, list_checkpoints, read_manifest
from hpdist.checkpoint.writer import CheckpointWriter
from hpdist.distributed.collectives import call_on_all_ranks, raise_together, run_on_main
from hpdist.distributed.fragments import Fragment
from hpdist.distributed.module_names import shortened, without_wrappers
from hpdist.engines.base import Engine
from hpdist.engines.teacher import ShardedTeacher
from hpdist.errors import CheckpointError, ConfigError, why_not_written

FOLDER = "hpdist"
"""The folder of a step in that of `save_state`; a second model's step has `hpdist_1`."""

_VISIBLE_SECONDS = 30.0  # until a folder made on one machine is visible on all others

_Steps = list["weakref.ref[StepParts]"]
_followed: weakref.WeakKeyDictionary[Accelerator, _Steps] = weakref.WeakKeyDictionary()


class StepParts(Protocol):
    """The parts of a `SemiSupervisedStep` that are saved and restored."""

    engine: Engine
    algorithm: Algorithm
    teacher: ShardedTeacher | None
    applied_steps: int
    attempts: int


class StepFacts(BaseModel):
    """The facts of a step in the manifest of `save_state`."""

    model_config = ConfigDict(strict=True, extra="allow")

    attempts: Count
    teacher_updates: Count
    loss_scale: dict[str, bool | int | float]
    algorithm: str
    decay: Annotated[float, Field(ge=0, le=1)] | None
    parameters: dict[str, list[Count]]
    engine: dict[str, int | str] | None = None
    engine_steps: int | None = None


def join_save_state(step: StepParts) -> None:
    """Have the Accelerator's `save_state` and `load_state` include the step.

    A later step of the same model replaces an earlier one; a step without references is not saved.
    """
    accelerator = step.engine.accelerator
    if step.engine.has_stepped:
        warnings.warn(
            "the optimizer has done steps before this SemiSupervisedStep was made, which begins "
            "with step 0 and a teacher like the student; to continue a saved one, make it before "
            "accelerator.load_state",
            stacklevel=3,
        )
    if accelerator not in _followed:
        steps = _followed[accelerator] = []

        def save(models: list[nn.Module], weights: Any, folder: str) -> None:
            _refuse(steps)
            for name, each in _live(steps).items():
                _save(each, Path(folder) / name)

        def load(models: list[nn.Module], folder: str) -> None:
            _refuse(steps)
            for name, each in _live(steps).items():
                _load(each, Path(folder) / name)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)
    _followed[accelerator].append(weakref.ref(step))
    followed = weakref.ref(step)

    def check(folder: Path) -> None:
        for name, each in _live(_followed[accelerator]).items():
            if each is followed():
                own = folder / name
                _check_engine(each, run_on_main(partial(_engine_of, own)), own)

    step.engine.check_before_loading(check)


def _refuse(steps: _Steps) -> None:
    """Raise ConfigError, on every rank, for an engine that Accelerate cannot save."""
    for step in _live(steps).values():
        if step.engine.refuses_save_state is not None:
            raise ConfigError(step.engine.refuses_save_state)


def _live(steps: _Steps) -> dict[str, StepParts]:
    """The steps that still exist, by their folders, which number the models as Accelerate does."""
    found = {}
    for step in (each for reference in steps if (each := reference()) is not None):
        engine = step.engine
        for number, model in enumerate(engine.accelerator._models):
            if model is engine.model or without_wrappers(model) is engine.module:
                found[f"{FOLDER}_{number}" if number else FOLDER] = step
                break
        else:  # `free_memory` has removed it
            warnings.warn(
                "the Accelerator does not know the model of a SemiSupervisedStep any longer, so it "
                "saves and loads neither of them",
                stacklevel=4,
            )
    return found


def fragments_of(step: StepParts, shards: Shards) -> dict[str, list[Fragment]]:
    """This rank's share of the teacher and of the algorithm's state, by kind."""
    fragments = {
        "algorithm": [
            Fragment(name, start, values)
            for name, parts in shards.items()
            for start, values in parts
        ]
    }
    if step.teacher is not None:
        fragments["teacher"] = step.teacher.fragments
    return fragments


def common_of(step: StepParts, shards: Shards) -> dict[str, Tensor]:
    """What is equal on every rank in teacher and algorithm."""
    common = {
        f"algorithm/{name}": value
        for name, value in step.algorithm.state_dict().items()
        if name not in shards
    }
    if step.teacher is not None:
        common |= {f"teacher/{name}": value for name, value in step.teacher.buffers.items()}
    return common


def facts_of(step: StepParts) -> dict[str, Any]:
    """The step's counters and the loss scale's numbers."""
    return {
        "attempts": step.attempts,
        "teacher_updates": step.teacher.updates if step.teacher else 0,
        "loss_scale": step.engine.scale_state(),
    }


@torch.no_grad()
def load_step(step: StepParts, saved: checkpoint.SavedRun) -> None:
    """Load teacher, algorithm, loss scale and applied steps; not the attempts."""
    facts = saved.facts
    step.engine.load_scale_state(facts["loss_scale"])
    step.algorithm.load_state_dict(_under(saved.common, "algorithm/"), saved.whole("algorithm"))
    if step.teacher is not None:
        restored = [f.like(saved.read("teacher", f)) for f in step.teacher.fragments]
        step.teacher.load(restored, _under(saved.common, "teacher/"), facts["teacher_updates"])
    step.applied_steps = facts["step"]


def _save(step: StepParts, folder: Path) -> None:
    """Write the step's part. Collective; raises CheckpointError, on all ranks, if one fails."""
    engine = step.engine
    run_on_main(lambda: _make(folder))
    raise_together(_not_visible(folder, engine.rank))
    shards = step.algorithm.shards()
    writer = CheckpointWriter(
        folder, engine.rank, engine.world_size, keep=1 << 30, background=False
    )
    engine_facts = {"engine": engine.saved_as, "engine_steps": engine.saved_steps}
    facts = {**facts_of(step), **_identity(step), **engine_facts}
    writer.save(step.applied_steps, fragments_of(step, shards), common_of(step, shards), facts)
    writer.finish()
    # What another training left there may be of a later step, so its age does not identify it.
    run_on_main(lambda: _remove_others(folder, folder_name(step.applied_steps)))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"save_state: cannot write to {str(folder)!r}: {why_not_written(error, folder)}"
        ) from error


def _not_visible(folder: Path, rank: int) -> CheckpointError | None:
    """The error if the folder that the first rank has made is not visible to this rank."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not folder.is_dir():
        if time.monotonic() >= deadline:
            return CheckpointError(
                f"save_state: rank {rank} does not see {str(folder)!r}, which rank 0 has made; "
                "save to a folder that all machines share"
            )
        time.sleep(0.1)
    return None


def _remove_others(folder: Path, kept: str) -> None:
    try:
        for path in list_checkpoints(folder):
            if path.name != kept:
                checkpoint.remove(path)
    except OSError as error:
        raise CheckpointError(
            f"save_state: the earlier state in {str(folder)!r} cannot be removed: {error}"
        ) from error


def _load(step: StepParts, folder: Path) -> None:
    """Read the step's part, on any number of ranks.

    Collective; raises CheckpointError, on all ranks, if there is none, or it is damaged or of
    another algorithm, model or teacher.
    """
    problems: list[str] = []
    try:
        saved = checkpoint.open_newest(folder, problems.append, facts=StepFacts)
    except CheckpointError as error:
        if not problems:  # it is of a later format
            raise
        raise CheckpointError(f"load_state: {'; '.join(problems)}; load another folder") from error
    if saved is None:
        raise CheckpointError(
            f"load_state: {str(folder)!r} does not exist, and teacher and algorithm need it; "
            "load what save_state has written with hpdist.SemiSupervisedStep made before it"
        )
    call_on_all_ranks(lambda: _take_over(step, saved))


def _take_over(step: StepParts, saved: checkpoint.SavedRun) -> None:
    here, facts = _identity(step), dict(saved.facts)
    facts["algorithm"] = current_name(facts["algorithm"])
    _check_engine(step, facts.get("engine"), saved.path)
    if facts.get("engine_steps", step.engine.saved_steps) != step.engine.saved_steps:
        raise CheckpointError(
            f"load_state: {saved.path} was saved after {facts['engine_steps']} steps, and the "
            f"weights beside it after {step.engine.saved_steps}, so the saving was cut off; load "
            "another folder, and save to a new one each time"
        )
    for key in ("algorithm", "parameters"):
        if facts[key] != here[key]:
            there, own = (
                shortened(sorted(each)) if isinstance(each, Mapping) else each
                for each in (facts[key], here[key])
            )
            raise CheckpointError(
                f"load_state: {saved.path} is of another {key.rstrip('s')}: {there} there, {own} "
                "here; make model and algorithm as they were"
            )
    if (facts["decay"] is None) != (step.teacher is None):
        there, own = ("without", "with") if facts["decay"] is None else ("with", "without")
        raise CheckpointError(
            f"load_state: {saved.path} is of a step {there} a teacher, and this is one {own}; "
            "give SemiSupervisedStep the decay that it had"
        )
    try:
        load_step(step, saved)
    except KeyError as error:
        raise CheckpointError(
            f"load_state: the algorithm in {saved.path} has other options: {error.args[0]}"
        ) from error
    step.attempts = facts["attempts"]


def _engine_of(folder: Path) -> dict[str, int | str] | None:
    """How the newest state in a folder was saved; None if that is not known, or there is none."""
    for path in list_checkpoints(folder):
        found: dict[str, int | str] | None = read_manifest(path).get("engine")
        return found
    return None


def _check_engine(step: StepParts, saved: Mapping[str, int | str] | None, path: Path) -> None:
    """Raise CheckpointError if the weights beside the step's part cannot be loaded here."""
    here = step.engine.saved_as
    if saved is not None and saved != here:
        raise CheckpointError(
            f"load_state: {path} was saved {_described(saved)}, and this is {_described(here)}; "
            "Accelerate and DeepSpeed cannot change that, so start it as it was (hpdist.Trainer's "
            "own checkpoints go on with any number of processes)"
        )


def _described(engine: Mapping[str, int | str]) -> str:
    if not engine:
        return "without DeepSpeed"
    ranks = engine.get("ranks")
    where = "" if ranks is None else f" on {ranks} process{'es' if ranks != 1 else ''}"
    return f"under ZeRO-{engine['stage']} in {engine['dtype']}{where}"


def _identity(step: StepParts) -> dict[str, Any]:
    """What a step must have in common with the one that was saved."""
    kind = type(step.algorithm)
    shapes = step.engine.parameter_shapes()
    return {
        "algorithm": f"{kind.__module__}.{kind.__qualname__}",
        "decay": None if step.teacher is None else float(step.teacher.decay),
        "parameters": {name: list(shape) for name, shape in shapes.items()},
    }


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
