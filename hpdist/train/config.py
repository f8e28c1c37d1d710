"""The run's configuration: typed, validated, from YAML plus dotted command-line overrides.

`load("run.yaml", ["--algorithm.name", "freematch"])` gives a `RunConfig`. The command line wins
over the file. The options of a component (an algorithm, a model, the views) live in that component,
as a `Component` subclass; a component is chosen by its `name`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from hpdist.data.config import CHOICES, Bytes, Data, Duplicates, LabelColumn, Labeled, Loading, LongTail, Source, TaskChoice, Unlabeled, UnlabeledPart, UnlabeledSource
from hpdist.errors import ConfigError
from hpdist.config.overrides import lay_over, read_overrides, read_yaml, to_yaml
from hpdist.messages.redaction import MARK, redacted_parts, redacted_settings
from hpdist.config.component import IN_PYTHON, PYTHON_PREFIX, ByName, Component, ComponentOf, PythonComponent, component_names, components, import_object, nothing_imported
from hpdist.config.section import Section

__all__ = [
    "CHOICES",
    "IN_PYTHON",
    "PYTHON_PREFIX",
    "Bytes",
    "Component",
    "Data",
    "Duplicates",
    "LabelColumn",
    "Labeled",
    "Loading",
    "LongTail",
    "PythonComponent",
    "RunConfig",
    "Section",
    "Source",
    "TaskChoice",
    "Unlabeled",
    "UnlabeledPart",
    "UnlabeledSource",
    "component_names",
    "components",
    "import_object",
    "json_schema",
    "load",
    "parse",
]

Precision = Literal["fp32", "bf16", "fp16"]


Share = Annotated[float, Field(ge=0, lt=1)]


class Run(Section):
    """Where a run lives and what makes it repeatable."""

    dir: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run folder's name; by default the config file's, in Python the next free `run-0001`."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the weights, the data order, the choice of labels and every view's noise."""
    wait: float = Field(0.0, ge=0)
    """Seconds to wait for the end of another run that is at work in the run folder."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.dir) / (self.name or "run")


class Batch(Section):
    """Global batch sizes: summed over all ranks, whatever their number."""

    labeled: int = Field(64, gt=0)
    """Labelled rows of a step."""
    unlabeled: int = Field(448, gt=0)
    """Unlabelled rows of a step; unused by an algorithm that has no unlabelled views."""
    micro: int | None = Field(None, gt=0)
    """Rows (labelled and unlabelled together) per device per forward; all at once by default."""


class Zero(Section):
    """How DeepSpeed shards; by default whatever the accelerate config file says."""

    stage: int | None = Field(None, ge=0, le=3)
    """What is sharded: 0 nothing, 1 optimizer, 2 and gradients, 3 and parameters.

    Unset means no DeepSpeed.
    """
    offload: Literal["none", "cpu", "nvme"] | None = None
    """Where the optimizer's state lives (from stage 1 on), and the parameters too in stage 3."""
    nvme_path: str | None = None
    """A folder on the local NVMe disk, for `offload: nvme`."""

    @model_validator(mode="after")
    def _possible(self) -> Zero:
        offload = self.offload or "none"
        if offload != "none" and self.stage == 0:
            raise ValueError(f"offload: {offload} needs stage 1, 2 or 3; stage 0 shards nothing")
        if offload == "nvme" and self.stage is not None and self.stage < 3:
            raise ValueError("offload: nvme needs stage 3")
        if offload == "nvme" and not self.nvme_path:
            raise ValueError("offload: nvme needs nvme_path, a folder on the local disk")
        return self


class LossScale(Section):
    """The loss scale of fp16; one number for all ranks and all terms."""

    static: float | None = Field(None, gt=0)
    """A fixed scale; dynamic by default."""
    initial: float = Field(2.0**16, gt=0)
    """The dynamic scale to start with, a power of 2."""
    growth_interval: int = Field(1000, gt=0)
    """Steps without overflow after which the dynamic scale doubles."""
    minimum: int = Field(1, ge=1)
    """Where the dynamic scale stops falling: a further overflow ends the run."""

    @field_validator("initial")
    @classmethod
    def _power_of_two(cls, value: float) -> float:
        if math.frexp(value)[0] != 0.5:
            raise ValueError(f"must be a power of 2, such as 65536, not {value:g}")
        return value


class Optim(Section):
    """The optimizer."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Which of torch's optimizers."""
    lr: float = Field(0.03, gt=0)
    """Learning rate before the schedule."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd."""
    nesterov: bool = True
    """Of sgd; unused without momentum."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Of adam and adamw."""
    eps: float = Field(1e-8, gt=0)
    """Of adam and adamw."""
    weight_decay: float = Field(5e-4, ge=0)
    """Of weights; adamw decouples it from the gradient."""
    l1: float = Field(0.0, ge=0)
    """Adds so much times the sum of the weights' absolute values to the loss; not under ZeRO-3.

    Biases and normalisation weights are left out. Weights come close to zero, and are seldom it.
    """
    decay_all: bool = False
    """Decay biases and normalisation weights as well."""
    grad_clip: float | None = Field(None, gt=0)
    """Largest global gradient norm; no clipping by default."""


class Schedule(Section):
    """The learning rate over the applied optimizer steps."""

    name: Literal["cosine", "fixmatch_cosine", "linear", "constant"] = "fixmatch_cosine"
    """cosine and linear end at zero; fixmatch_cosine is cos(7 pi t / 16 T)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises from 0."""


class Teacher(Section):
    """The exponential moving average of the weights, used for evaluation."""

    decay: float = Field(0.999, ge=0, lt=1)
    """Share of the average that a step keeps."""
    warmup: bool = True
    """Start with the smaller decay (1 + t) / (10 + t), so that early weights are forgotten."""


class Eval(Section):
    """Evaluation during training."""

    every: int | None = Field(None, gt=0)
    """Optimizer steps between evaluations; only at the end by default."""
    batch: int = Field(256, gt=0)
    """Rows per device per forward."""


class Log(Section):
    """Logging of the training step."""

    every: int = Field(10, gt=0)
    """Optimizer steps between records."""
    examples: int = Field(8, ge=0)
    """Rows of the first batch whose weak and strong views are written into the run folder's
    `examples`; 0 for none."""


class Checkpoint(Section):
    """Saving and resuming."""

    every: int | None = Field(None, gt=0)
    """Optimizer steps between checkpoints; by default time decides. The last step has one, too."""
    minutes: float | None = Field(15.0, gt=0)
    """Minutes between checkpoints, on the first rank's clock; null where `every` is given alone.

    With both, whichever comes first; without either, only the last step has a checkpoint.
    """
    keep: int = Field(2, ge=2)
    """How many checkpoints stay."""
    background: bool = True
    """Train on while a checkpoint is written; costs a copy of the state in the host's memory."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest whole checkpoint; never refuses a folder that is not empty."""

    @model_validator(mode="before")
    @classmethod
    def _steps_alone(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("every") is not None:
            return {"minutes": None, **values}
        return values


class Divergence(Section):
    """What happens when training goes wrong without an error, as seen in the logged steps."""

    on: Literal["stop", "rollback"] = "stop"
    """stop ends the run; rollback goes on from the newest checkpoint before, with later rows."""
    nan_steps: int = Field(1, gt=0)
    """Applied steps in a row whose loss may be NaN."""
    collapse_share: float = Field(0.98, gt=0, le=1)
    """Share of the pseudo-labels that one class may take."""
    collapse_steps: int = Field(1000, gt=0)
    """Applied steps in a row for which one class may take more."""
    most_rollbacks: int = Field(3, gt=0)
    """Times to go back before the run ends."""


class Watchdog(Section):
    """The end of a run that hangs."""

    seconds: float | None = Field(900.0, gt=0)
    """Without progress for so long, every rank prints its stacks and exits; null waits for ever.

    Longer than any evaluation batch, the compilation of the model, and `data.loading.patience`.
    """


class Tracker(Section):
    """Where metrics go besides metrics.jsonl."""

    name: Literal["wandb", "tensorboard", "mlflow", "none"] = "wandb"
    """Which tracker."""
    project: str | None = None
    """The tracker's project; by default what WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says, else
    hpdist."""
    mode: Literal["offline", "online"] | None = None
    """offline writes to the run folder; `wandb sync` uploads later.

    By default what WANDB_MODE says, else offline.
    """


class RunConfig(Section):
    """Everything that defines a run."""

    run: Run = Run()
    model: Annotated[SerializeAsAny[Component], ComponentOf("model")]
    data: Data
    task: Annotated[TaskChoice, ByName()] = TaskChoice()
    views: Annotated[SerializeAsAny[Component], ComponentOf("views")] = Field(
        default_factory=lambda: ComponentOf("views").choose({})
    )
    """By default what the columns of the labelled rows ask for."""
    batch: Batch = Batch()
    algorithm: Annotated[SerializeAsAny[Component], ComponentOf("algorithm")]
    addons: list[Annotated[SerializeAsAny[Component], ComponentOf("addon")]] = Field([])
    """What is put around the algorithm, the first innermost; each at most once."""
    precision: Precision | None = None
    """fp32, bf16 or fp16; by default what the launcher says, else fp32."""
    loss_scale: LossScale = LossScale()
    zero: Zero = Zero()
    activation_checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the model with torch.compile."""
    find_unused_parameters: bool = False
    """Have DDP itself look, before every backward, for parameters that it will not reach.

    Nothing needs it: what a step does not reach is found after the backward, at no such cost.
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

    @field_validator("addons")
    @classmethod
    def _each_once(cls, value: list[Component]) -> list[Component]:
        names = [addon.name for addon in value]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))} is there twice; name each add-on once")
        return value

    @model_validator(mode="after")
    def _patient_watchdog(self) -> RunConfig:
        seconds, patience = self.watchdog.seconds, self.data.loading.patience
        if seconds is not None and seconds <= patience:
            raise ValueError(
                f"watchdog.seconds: {seconds:g} must be more than data.loading.patience, which is "
                f"{patience:g}; lower that, or raise this"
            )
        return self

    @model_validator(mode="after")
    def _all_labels(self) -> RunConfig:
        labeled = self.data.labeled
        chosen = [name for name in CHOICES if getattr(labeled, name) is not None]
        if self.algorithm.name == "fully_supervised" and chosen:
            raise ValueError(
                f"data.labeled.{chosen[0]}: fully_supervised learns from every label; set it to "
                "null, or choose algorithm.name: supervised"
            )
        return self

    @model_validator(mode="after")
    def _by_class(self) -> RunConfig:
        """What goes by a row's class needs rows that have one."""
        if self.task.name == "classification":
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
                    f"{setting}: goes by the class of a row, and of task.name: {self.task.name} a "
                    "row has not one; use data.labeled.rows or indices"
                )
        return self

    def to_yaml(self) -> str:
        """The resolved configuration, as YAML that `load` takes.

        Passwords and signatures are left out; of such a file `load` asks for them.
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
            f"{where}: {', '.join(left_out)}: a password or signature was left out where it says "
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
    """The settings of a section that may be given by its name alone."""
    if isinstance(value, Component):
        return value.model_dump()
    return {"name": value} if isinstance(value, str) else dict(value)


def _spelt(path: str, given: Sequence[str]) -> str:
    """A setting's path, with dashes where the command line gave it or a part of it."""
    typed = (f"{key}." for key in given)
    own = f"{path}."
    return f"--{path}" if any(own.startswith(key) or key.startswith(own) for key in typed) else path


def load(path: str | Path, overrides: Sequence[str] = (), *, run_code: bool = True) -> RunConfig:
    """Read a YAML file, lay the command line's overrides over it, and validate.

    `overrides` are `--key.sub value` or `--key.sub=value`; values are read as YAML. Without
    `run_code` no module of a `python:` name is imported, and its settings are taken as they are:
    such a config can be looked at, and nothing can be built from it. Raises ConfigError.
    """
    path = Path(path)
    values = read_yaml(path)
    pairs = read_overrides(overrides)
    lay_over(values, pairs)
    run = values.setdefault("run", {})
    if isinstance(run, dict) and run.get("name") is None:
        run["name"] = _default_name(path)
    with nullcontext() if run_code else nothing_imported():
        return parse(values, str(path), [key for key, _ in pairs])


def _default_name(path: Path) -> str:
    """The config file's; in a sweep of W&B with the run's id, since each is a run of its own."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "run"
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        name = f"{name}-{os.environ['WANDB_RUN_ID']}"
    return name


def json_schema() -> str:
    """The JSON Schema of a config file, for editors: every component's options included."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)
