"""The run's configuration: typed, validated, from YAML plus dotted command-line overrides.

`load("run.yaml", ["--algorithm.name", "freematch"])` gives a `RunConfig`. The command line wins
over the file. The options of a component (an algorithm, a model, the views) live in that component,
as a `Component` subclass; a component is chosen by its `name`.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

import hpdist.algorithms
import hpdist.data.views
import hpdist.models
import hpdist.tasks  # noqa: F401  (every component is known from here on)
from hpdist.checkpoint.config import Checkpoint
from hpdist.config.component import ByName, Component, ComponentOf, nothing_imported
from hpdist.config.overrides import lay_over, read_overrides
from hpdist.config.section import Section
from hpdist.config.yaml import read_yaml, to_yaml
from hpdist.data.config import CHOICES, Data
from hpdist.data.files.paths import did_you_mean
from hpdist.distributed.config import NormStatistics, Watchdog
from hpdist.engines.compilation import Compile
from hpdist.engines.config import AskedPrecision, LossScale, Shard, Teacher, Zero
from hpdist.errors import ConfigError
from hpdist.evaluate.config import Eval
from hpdist.messages.redaction import MARK, redacted_parts, redacted_settings
from hpdist.tasks import DEFAULT_TASK, choose_task
from hpdist.tasks.base import TaskConfig
from hpdist.tracking.config import Log, Tracker
from hpdist.train.divergence import Divergence
from hpdist.train.optim import Optim, Schedule


class Run(Section):
    """Where a run is stored, and what makes it reproducible."""

    dir: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run folder's name; by default the config file's, in Python the next free `run-0001`."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the weights, the data order, the choice of labels and every view's noise."""
    wait: float = Field(0.0, ge=0)
    """Seconds to wait for another run in the run folder to end."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.dir) / (self.name or "run")


class Batch(Section):
    """Global batch sizes: sums over all ranks, whatever their number."""

    labeled: int = Field(64, gt=0)
    """Labelled rows of a step."""
    unlabeled: int = Field(448, gt=0)
    """Unlabelled rows of a step; unused by an algorithm without unlabelled views."""
    micro: int | None = Field(None, gt=0)
    """Rows (labelled and unlabelled together) per device per forward; all at once by default."""
    norm_statistics: NormStatistics = "global"
    """Whose rows batch normalisation goes by: all ranks', or each rank's own.

    `rank` saves two small collectives per layer and pass, but then the curve depends on the number
    of ranks. The running statistics, and so evaluation, are those of all ranks in both cases.
    """


class RunConfig(Section):
    """Everything that defines a run."""

    run: Run = Run()
    model: Annotated[SerializeAsAny[Component], ComponentOf("model")]
    data: Data
    task: Annotated[SerializeAsAny[Component], ComponentOf("task", DEFAULT_TASK.name)] = Field(
        default_factory=choose_task
    )
    """What the labels are, and with them loss and scores."""
    views: Annotated[SerializeAsAny[Component], ComponentOf("views")] = Field(
        default_factory=lambda: ComponentOf("views").choose({})
    )
    """By default chosen by the columns of the labelled rows."""
    batch: Batch = Batch()
    algorithm: Annotated[SerializeAsAny[Component], ComponentOf("algorithm")]
    addons: list[Annotated[SerializeAsAny[Component], ComponentOf("addon")]] = Field([])
    """Wrappers of the algorithm, the first innermost; each at most once."""
    precision: AskedPrecision | None = None
    """fp32, bf16, fp16 or fp8; by default the launcher's setting, else fp32.

    fp8 is bf16 whose linear layers multiply in fp8, where the GPU can; not under DeepSpeed.
    """
    loss_scale: LossScale = LossScale()
    zero: Zero = Zero()
    shard: Shard = Shard()
    activation_checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass instead of keeping them."""
    compile: bool | Compile = False
    """Compile the model with torch.compile: true, or a group of settings."""
    find_unused_parameters: bool = False
    """Have DDP itself look, before every backward, for parameters that it will not reach.

    Nothing needs it: hpdist finds them after the backward, without that cost.
    """
    optim: Annotated[Optim, ByName()] = Optim()
    schedule: Annotated[Schedule, ByName()] = Schedule()
    steps: int = Field(gt=0)
    """Optimizer steps to apply."""
    teacher: Teacher = Teacher()
    eval: Eval = Eval()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    tracker: Annotated[Tracker, ByName()] = Tracker()
    watchdog: Watchdog = Watchdog()
    divergence: Divergence = Divergence()

    @field_validator("compile", mode="wrap")
    @classmethod
    def _flag_or_group(cls, value: object, _: object) -> bool | Compile:
        if isinstance(value, Mapping):
            return Compile.model_validate(value)
        if not isinstance(value, (bool, Compile)):
            raise ValueError("must be true, false, or settings such as {mode: reduce-overhead}")
        return value

    @field_validator("addons")
    @classmethod
    def _each_once(cls, value: list[Component]) -> list[Component]:
        names = [addon.name for addon in value]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))} occurs twice; name each add-on once")
        return value

    @model_validator(mode="after")
    def _patient_watchdog(self) -> RunConfig:
        seconds, patience = self.watchdog.seconds, self.data.loading.patience
        if seconds is not None and seconds <= patience:
            raise ValueError(
                f"watchdog.seconds: {seconds:g} must be more than data.loading.patience "
                f"({patience:g}); lower that, or raise this"
            )
        return self

    @model_validator(mode="after")
    def _all_labels(self) -> RunConfig:
        labeled = self.data.labeled
        chosen = [name for name in CHOICES if getattr(labeled, name) is not None]
        if self.algorithm.name == "fully_supervised" and chosen:
            raise ValueError(
                f"data.labeled.{chosen[0]}: fully_supervised trains on every label; set it to "
                "null, or choose algorithm.name: supervised"
            )
        return self

    @model_validator(mode="after")
    def _by_class(self) -> RunConfig:
        """Refuse settings that need a class for every row if the task has none."""
        if not isinstance(self.task, TaskConfig) or self.task.makes.rows_have_a_class:
            return self
        unlabeled = self.data.unlabeled
        parts = [] if unlabeled is None else [unlabeled, *(unlabeled.mix or [])]
        used = {
            "data.labeled.labels_per_class": self.data.labeled.labels_per_class,
            "data.unlabeled.imbalance": next((p.imbalance for p in parts if p.imbalance), None),
        }
        for setting, value in used.items():
            if value is not None:
                raise ValueError(
                    f"{setting}: needs the class of each row, and with task {self.task.name} rows "
                    "have none; use data.labeled.rows or indices"
                )
        return self

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML that `load` can read.

        Passwords and signatures are left out; `load` then asks for them.
        """
        values = redacted_settings(self.model_dump(mode="json"))
        left_out = redacted_parts(values)
        note = f"# Left out of {', '.join(left_out)}: what is marked {MARK}.\n" if left_out else ""
        return note + to_yaml(values)


def parse(values: Mapping[str, Any], where: str = "config", given: Sequence[str] = ()) -> RunConfig:
    """Validate a nested dict of settings; `given` are the dotted keys of the command line.

    Raises ConfigError that names every wrong setting by its dotted path.
    """
    left_out = redacted_parts(values)
    if left_out:
        raise ConfigError(
            f"{where}: {', '.join(left_out)}: a password or signature was replaced by "
            f"{MARK}; write the whole value there, or give it again: --{left_out[0]} …"
        )
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        found = [(".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors()]
        lines = [f"{_spelt(path, given)}: {message}" for path, message in found]
        separator = "\n  " if len(lines) > 1 else " "
        raise ConfigError(f"{where}:" + separator + separator.join(lines)) from None


def named(value: str | Mapping[str, Any] | Component) -> dict[str, Any]:
    """Return the settings of a section that may be given by its name only."""
    if isinstance(value, Component):
        return value.model_dump()
    return {"name": value} if isinstance(value, str) else dict(value)


def _spelt(path: str, given: Sequence[str]) -> str:
    """Spell a setting's path, with dashes if it came from the command line."""
    typed = (f"{key}." for key in given)
    own = f"{path}."
    return f"--{path}" if any(own.startswith(key) or key.startswith(own) for key in typed) else path


def load(path: str | Path, overrides: Sequence[str] = (), *, run_code: bool = True) -> RunConfig:
    """Read a YAML file, apply the command line's overrides, and validate.

    `overrides` are `--key.sub value` or `--key.sub=value`; values are parsed as YAML. Without
    `run_code` no module of a `python:` name is imported, and its settings are not checked: such a
    config can be inspected, but nothing can be built from it. Raises ConfigError.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(
            f"cannot read the config {str(path)!r}: {os.strerror(errno.ENOENT)}"
            f"{did_you_mean(str(path))}"
        )
    values = read_yaml(path)
    pairs = read_overrides(overrides)
    lay_over(values, pairs)
    run = values.setdefault("run", {})
    if isinstance(run, dict) and run.get("name") is None:
        run["name"] = _default_name(path)
    with nullcontext() if run_code else nothing_imported():
        return parse(values, str(path), [key for key, _ in pairs])


def _default_name(path: Path) -> str:
    """The config file's name; in a W&B sweep with the run's id, since each is a run of its own."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "run"
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        name = f"{name}-{os.environ['WANDB_RUN_ID']}"
    return name


def json_schema() -> str:
    """Return the JSON Schema of a config file, for editors, with every component's options."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)
