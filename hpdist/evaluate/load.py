"""Loads a trained model: from a run folder, its model, a checkpoint or an exported file.

    hpdist.load("runs/cifar10")                          # what the run ended in
    hpdist.load("runs/cifar10", checkpoint=2000)         # the teacher of an earlier step
    hpdist.load("runs/cifar10", which="student", checkpoint="last")

No code comes from the folder. A model that the config names as `python:module:function`, and views
and tasks of one's own, are imported from the user's own path, as in training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from hpdist.checkpoint.manifest import MANIFEST, folder_name, list_checkpoints, step_of
from hpdist.checkpoint.reader import SavedRun
from hpdist.data.decode.encoded import Array
from hpdist.data.kinds import kind_named
from hpdist.data.sources.classes import Classes
from hpdist.data.views.make import TARGETS, VIEWS, fitted_views
from hpdist.errors import CheckpointError, ConfigError
from hpdist.evaluate import model_folder
from hpdist.evaluate.build import model_of_checkpoint, model_of_folder
from hpdist.evaluate.description import RUN_DESCRIPTION, Description, read_description
from hpdist.evaluate.export.read import open_exported
from hpdist.evaluate.precision import cast_weights, check_precision
from hpdist.evaluate.predictor import Predictor
from hpdist.messages.redaction import redacted_errors

Which: TypeAlias = Literal["teacher", "student"]
Checkpoint: TypeAlias = Literal["best", "last"] | int | None

_SUMMARY = "summary.json"


@redacted_errors()
def load(
    path: str | os.PathLike[str],
    which: Which = "teacher",
    checkpoint: Checkpoint = None,
    precision: str | None = None,
    device: str | torch.device | None = None,
    *,
    model: nn.Module | None = None,
) -> Predictor:
    """Load a trained model.

    Args:
        path: A run folder, its `model/` folder, the folder of a checkpoint, or a file that
            `hpdist export` wrote.
        which: The teacher, which scores refer to, or the student. The teacher of a run without one
            is the student.
        checkpoint: Of a run folder: "best" on the validation set, "last", or a step; by default
            what is in `model/`, else the newest checkpoint that verifies.
        precision: fp32, bf16 or fp16, of weights and computations; by default fp32. Normalisations
            and softmax are in fp32 anyway; on a CPU, fp16 is simulated.
        device: By default this process's GPU, else the CPU.
        model: A module of the same shape, which receives the weights, of a run that was given its
            model in Python.

    Communicates nothing: every rank may call it. Raises CheckpointError where nothing there
    verifies, and ConfigError where an argument is wrong or the model cannot be built.
    """
    place, where = Path(path), _device(device)
    check_precision(precision or "fp32")
    if which not in ("teacher", "student"):
        raise ConfigError(f"which: {which!r} is neither teacher nor student")
    if not place.exists():
        raise CheckpointError(f"there is no {str(path)!r}: name a run folder, or its model/")
    if place.is_file():
        if checkpoint is not None or which == "student":
            raise ConfigError(f"{path} is an exported file, which has one model: name the run")
        loaded = _of_file(place, model)
        if loaded.backend is not None:
            return _on_backend(loaded, precision, device)
    else:
        found = _find(place, which, checkpoint)
        loaded = (
            _of_folder(found, model) if found.saved is None else _of_checkpoint(found, which, model)
        )
    cast_weights(loaded._module, precision or "fp32", where)
    loaded.precision, loaded.device = precision or "fp32", where
    return loaded


class _Found:
    """Where a model is: in a folder of its own, or in a checkpoint of a run."""

    def __init__(self, folder: Path, saved: SavedRun | None = None) -> None:
        self.folder = folder
        self.saved = saved


def _find(place: Path, which: str, checkpoint: Checkpoint) -> _Found:
    """Find what a path stands for."""
    if (place / model_folder.DESCRIPTION).is_file():
        if checkpoint is not None or which == "student":
            return _find_in_run(place.parent, which, checkpoint, place)
        return _Found(place)
    if (place / MANIFEST).is_file():
        if checkpoint is not None:
            raise ConfigError(f"checkpoint: {place} is one already; leave it out")
        return _Found(_run_of(place), SavedRun(place))
    return _find_in_run(place, which, checkpoint, model_folder.find(place))


def _run_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint."""
    real = checkpoint.resolve()
    for folder in (checkpoint.absolute().parent.parent, real.parent.parent):
        if (folder / RUN_DESCRIPTION).is_file():
            return folder
    raise _undescribed(checkpoint)


def _undescribed(place: Path) -> CheckpointError:
    return CheckpointError(
        f"{place} has no {RUN_DESCRIPTION} beside its checkpoints, which says how the model is "
        "built and fed; hpdist train CONFIG writes it, also of a run that is done"
    )


def _find_in_run(run: Path, which: str, checkpoint: Checkpoint, folder: Path | None) -> _Found:
    """Find the model of a run: in its own folder if that is what is asked for."""
    saved = list_checkpoints(run / "checkpoints")
    steps = {step_of(path.name) or 0: path for path in saved}
    wanted = _step(run, checkpoint, steps)
    if folder is not None and which == "teacher":
        step = read_description(folder / model_folder.DESCRIPTION).step
        if checkpoint is None or step == wanted or (checkpoint == "last" and not saved):
            return _Found(folder)
    if not saved:
        there = "no checkpoint" if folder is None else "no checkpoint beside its model/"
        raise CheckpointError(f"{run} is no run folder with a trained model: it has {there}")
    if not (run / RUN_DESCRIPTION).is_file():
        raise _undescribed(run)
    if wanted is None:
        return _Found(run, _newest(saved))
    if wanted not in steps:
        have = ", ".join(map(str, sorted(steps)))
        raise ConfigError(
            f"checkpoint: {run} has none of step {wanted}; there are {have}; checkpoint.keep says "
            "how many a run keeps"
        )
    return _Found(run, SavedRun(run / "checkpoints" / folder_name(wanted)))


def _step(run: Path, checkpoint: Checkpoint, steps: Mapping[int, Path]) -> int | None:
    """The step that is asked for; None where the newest checkpoint that verifies will do."""
    if checkpoint is None:
        return None
    if type(checkpoint) is int:
        return checkpoint
    if checkpoint == "last":
        return max(steps, default=None)
    if checkpoint != "best":
        raise ConfigError(f"checkpoint: {checkpoint!r} is neither best, last nor a step")
    best = _best(run, steps)
    if best is None:
        raise ConfigError(
            f"checkpoint: best, but {run} has measured nothing on a validation set; set "
            "data.validation, or choose last"
        )
    return best


def _best(run: Path, steps: Mapping[int, Path]) -> int | None:
    """The step of a run's best score on its validation set."""
    try:
        summary = json.loads((run / _SUMMARY).read_bytes())
        found = summary.get("validation/best_step")
        if type(found) is int:
            return found
    except (OSError, ValueError, AttributeError):  # the run is not done, or the file is damaged
        pass
    if not steps:
        return None
    best = _newest([steps[step] for step in sorted(steps, reverse=True)]).facts.get("best")
    return int(best[1]) if best else None


def _newest(saved: list[Path]) -> SavedRun:
    """Open the newest checkpoint that verifies."""
    *newer, oldest = saved
    for path in newer:
        with suppress(CheckpointError):
            return SavedRun(path)
    return SavedRun(oldest)


def _of_folder(found: _Found, given: nn.Module | None) -> Predictor:
    description = model_folder.read(found.folder)
    fitted = model_folder.read_tensors(found.folder, model_folder.FITTED)
    predictor = fed(description, found.folder, fitted)
    predictor.model = model_of_folder(
        found.folder, description, predictor.spec, predictor.views, given
    )
    return predictor


def _of_checkpoint(found: _Found, which: str, given: nn.Module | None) -> Predictor:
    saved = found.saved
    assert saved is not None
    description = read_description(found.folder / RUN_DESCRIPTION)
    description = description.model_copy(
        update={"step": saved.facts["step"], "which": which, "chosen": None, "weights": "fp32"}
    )
    common = {k: v for k, v in saved.common.items() if k.startswith((VIEWS, TARGETS))}
    predictor = fed(description, found.folder, common)
    predictor.source = saved.path
    predictor.model = model_of_checkpoint(
        saved, description, predictor.spec, predictor.views, which=which, given=given
    )
    return predictor


def _of_file(file: Path, given: nn.Module | None) -> Predictor:
    """Open an exported file, by the end of its name."""
    folder, precision, backend = open_exported(file)
    description = read_description(folder / model_folder.DESCRIPTION)
    fitted = model_folder.read_tensors(folder, model_folder.FITTED)
    predictor = fed(description, folder, fitted)
    predictor.source, predictor.backend, predictor.precision = file, backend, precision
    if backend is None:
        predictor.model = model_of_folder(
            folder, description, predictor.spec, predictor.views, given
        )
    return predictor


def _on_backend(
    loaded: Predictor, precision: str | None, device: str | torch.device | None
) -> Predictor:
    """Check what is asked of a file that another program runs. Raises ConfigError."""
    if precision not in (None, loaded.precision):
        raise ConfigError(
            f"precision: {loaded.source} is {loaded.precision}, and not {precision}; export the "
            "run again"
        )
    if device is not None and torch.device(device).type != "cpu":
        raise ConfigError(f"device: {loaded.source} runs on the CPU, and not on {device}")
    return loaded


def fed(description: Description, folder: Path, fitted: Mapping[str, Tensor]) -> Predictor:
    """Make a predictor without a model: what a description says of inputs, labels and the task.

    Args:
        description: Of the model.
        folder: Where what decoding needs beside the description is.
        fitted: What views and labels were measured to be, by the names in a checkpoint.
    """
    spec = description.make_spec(folder)
    views_section = description.section("views")
    views = fitted_views(views_section, description.seed, spec, fitted, str(folder))
    labels, task = description.labels, description.make_task()
    state = {
        name.removeprefix(TARGETS): tensor.numpy()
        for name, tensor in fitted.items()
        if name.startswith(TARGETS)
    }
    encoding = task.recorded_encoding(labels.classes, labels.encoding, state)
    task = task.fitted(encoding or _Measured(labels.classes, state))  # type: ignore[arg-type]
    column = description.inputs.column
    return Predictor(
        model=None,
        task=task,
        names=tuple(labels.names),
        kind=kind_named(description.inputs.reader),
        spec=spec,
        column=column if isinstance(column, str) else tuple(column),
        views=views,
        encoding=encoding,
        precision="fp32",
        device=torch.device("cpu"),
        source=folder,
        description=description,
        fitted=fitted,
    )


class _Measured:
    """What a task may go by of an encoding that only a set's own labels can make."""

    def __init__(self, classes: Classes, state: Mapping[str, Array]) -> None:
        self.classes = classes
        self.state: Mapping[str, Any] = state


def _device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        )
    return torch.device("cpu")
