"""The run's configuration: typed, validated, from YAML plus dotted command-line overrides.

`load("run.yaml", ["--algorithm.name", "freematch"])` gives a `RunConfig`. The command line wins over
the file. The options of a component (an algorithm, a model, the views) live in that component, as a
`Component` subclass; a component is chosen by its `name`.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, cast

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails

from hpdist.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
PYTHON_PREFIX = "python:"
IN_PYTHON = "python:(given)"
"""The name of a model that Python code gave as an object."""
_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _parse_bytes(value: object) -> object:
    """Turn '512MiB' into 536870912; leave anything else to the field's own check."""
    if not isinstance(value, str):
        return value
    digits = value.strip().rstrip("BbIiKkMmGg")
    unit = value.strip()[len(digits) :].upper()
    try:
        return int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError):
        raise ValueError("give a number of bytes, such as 512MiB") from None


Bytes = Annotated[int, BeforeValidator(_parse_bytes), Field(gt=0)]


class Section(BaseModel):
    """A group of settings. Unknown keys are refused; a docstring under a field describes it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class Component(Section):
    """The options of something chosen by name: a model, an algorithm, the views."""

    kind: ClassVar[str] = ""
    name: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Make the component known under the default of its `name` field."""
        super().__pydantic_init_subclass__(**kwargs)
        default = cls.model_fields["name"].default
        if cls.kind and isinstance(default, str):
            _components.setdefault(cls.kind, {})[default] = cls


_components: dict[str, dict[str, type[Component]]] = {}


def component_names(kind: str) -> list[str]:
    """The names known for a kind of component ('model', 'algorithm', 'views'), sorted."""
    return sorted(_components.get(kind, {}))


def import_object(name: str, setting: str) -> Any:
    """Import `python:package.module:attribute`, for the setting that names it.

    Raises ConfigError when the module or the attribute cannot be found.
    """
    module_name, _, attribute = name.removeprefix(PYTHON_PREFIX).partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{setting}: {name!r} must read python:package.module:attribute")
    if os.getcwd() not in sys.path:  # the `hpdist` script does not put it there, `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{setting}: cannot import {module_name!r}: {error}") from error
    except AttributeError as error:
        raise ConfigError(f"{setting}: module {module_name!r} has no {attribute!r}") from error


class Run(Section):
    """Where a run lives and what makes it repeatable."""

    dir: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run folder's name; by default the config file's."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the weights, the data order, the choice of labels and every view's noise."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.dir) / (self.name or "run")


class Source(Section):
    """A dataset, named as `datasets.load_dataset` names it."""

    path: str
    """Hub id, local folder, or a builder such as `parquet`."""
    name: str | None = None
    """The dataset's configuration, where it has several."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Files, with wildcards, local or remote."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    split: str = "train"
    """Which split, slices allowed: `train[:90%]`."""
    input: str | None = None
    """The column that the model sees; by default the only image column."""


class LabelColumn(Source):
    """A dataset with labels."""

    label: str | None = None
    """The column of labels; by default the only ClassLabel column, or `label`."""


class Labeled(LabelColumn):
    """The labelled training rows."""

    labels_per_class: int | None = Field(None, gt=0)
    """Draw this many rows of every class."""
    indices: list[int] | None = Field(None, min_length=1)
    """Use exactly these rows of the split."""
    rows: int | None = Field(None, gt=0)
    """Draw this many rows, whatever their class."""

    @model_validator(mode="after")
    def _one_choice(self) -> Labeled:
        chosen = [k for k in ("labels_per_class", "indices", "rows") if getattr(self, k) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; keep one")
        return self


class Unlabeled(Source):
    """The unlabelled training rows."""

    streaming: bool = False
    """Read the rows as they are needed instead of preparing a local copy first."""
    shuffle_window: Bytes = 64 * 2**20
    """Memory for shuffling a stream, in bytes; more mixes better."""
    audit: bool = False
    """Write down which row each step consumed."""
    max_bad_rows: int = Field(0, ge=0)
    """How many undecodable rows to skip before the run stops."""


class Data(Section):
    """What the run trains and measures on."""

    labeled: Labeled
    unlabeled: Unlabeled | None = None
    test: LabelColumn | None = None
    """Measured and reported; never used to choose anything."""
    validation: LabelColumn | None = None
    """What `best` checkpoints are chosen by."""


class Batch(Section):
    """Global batch sizes: summed over all ranks, whatever their number."""

    labeled: int = Field(64, gt=0)
    unlabeled: int = Field(448, gt=0)
    micro: int | None = Field(None, gt=0)
    """Rows (labelled and unlabelled together) per device per forward; all at once by default."""


class Zero(Section):
    """How DeepSpeed shards; by default whatever the accelerate config file says."""

    stage: int | None = Field(None, ge=0, le=3)
    """What is sharded: 0 nothing, 1 optimizer, 2 and gradients, 3 and parameters; unset means no DeepSpeed."""


class Optim(Section):
    """The optimizer."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.03, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd."""
    nesterov: bool = True
    """Of sgd."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adam and adamw."""
    eps: float = Field(1e-8, gt=0)
    """Of adam and adamw."""
    weight_decay: float = Field(5e-4, ge=0)
    decay_all: bool = False
    """Decay biases and normalisation weights as well."""
    grad_clip: float | None = Field(None, gt=0)
    """Largest global gradient norm; no clipping by default."""


class Schedule(Section):
    """The learning rate over the applied optimizer steps."""

    name: Literal["cosine", "fixmatch_cosine", "linear", "constant"] = "fixmatch_cosine"
    """cosine and linear end at zero; fixmatch_cosine is cos(7 pi t / 16 T)."""
    warmup_steps: int = Field(0, ge=0)


class Teacher(Section):
    """The exponential moving average of the weights, used for evaluation."""

    decay: float = Field(0.999, ge=0, lt=1)
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


class Checkpoint(Section):
    """Saving and resuming."""

    every: int | None = Field(None, gt=0)
    """Optimizer steps between checkpoints; only at the end by default."""
    keep: int = Field(2, ge=2)
    """How many checkpoints stay."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest checkpoint; never refuses a folder that is not empty."""


class Tracker(Section):
    """Where metrics go besides metrics.jsonl."""

    name: Literal["wandb", "tensorboard", "none"] = "wandb"
    project: str = "hpdist"
    mode: Literal["offline", "online"] = "offline"
    """offline writes to the run folder; `wandb sync` uploads later."""


class RunConfig(Section):
    """Everything that defines a run."""

    run: Run = Run()
    model: SerializeAsAny[Component]
    data: Data
    views: SerializeAsAny[Component]
    batch: Batch = Batch()
    algorithm: SerializeAsAny[Component]
    precision: Precision | None = None
    """fp32, bf16 or fp16; by default what the launcher says, else fp32."""
    zero: Zero = Zero()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    steps: int = Field(gt=0)
    """Optimizer steps to apply."""
    teacher: Teacher = Teacher()
    eval: Eval = Eval()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    tracker: Tracker = Tracker()

    def to_yaml(self) -> str:
        """The resolved configuration, as YAML that `load` takes."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


_DEFAULT_NAMES = {"views": "image"}  # what a component is when the config does not name one
C = TypeVar("C", bound=Component)


def _component_class(kind: str, values: object) -> type[Component]:
    if not isinstance(values, dict):
        raise ConfigError(f"{kind}: give its settings, at least `name`; known: {component_names(kind)}")
    values.setdefault("name", _DEFAULT_NAMES.get(kind))
    name = values["name"]
    known = _components.get(kind, {})
    if name is None:
        raise ConfigError(f"{kind}.name is missing; known: {', '.join(component_names(kind))}")
    if isinstance(name, str) and name.startswith(PYTHON_PREFIX):
        return _python_component(kind, name)
    if name not in known:
        raise ConfigError(
            f"{kind}.name: no {kind} is called {name!r}{_nearest(str(name), known)}; "
            f"known: {', '.join(component_names(kind))}, or python:package.module:attribute"
        )
    return known[name]


def _python_component(kind: str, name: str) -> type[Component]:
    """A user's own component: its `Config` where it has one, else any settings under `args`."""
    if name == IN_PYTHON:
        return PythonComponent
    config = getattr(import_object(name, f"{kind}.name"), "Config", None)
    if isinstance(config, type) and issubclass(config, Component):
        return config
    return PythonComponent


class PythonComponent(Component):
    """A user's own function or class, called with `args`."""

    name: str
    num_classes: int | None = Field(None, ge=2)
    """Of a model: by default what the labelled data say."""
    args: dict[str, Any] = {}
    """Keyword arguments, passed as they are."""


def parse(values: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a nested dict of settings.

    Raises ConfigError that names every wrong setting by its dotted path.
    """
    import hpdist.components  # noqa: F401  (makes the built-in components known)

    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    values.setdefault("views", {})
    kinds = {}
    for kind in ("model", "algorithm", "views"):
        if kind in values:
            kinds[kind] = (_component_class(kind, values[kind]), ...)
    model = cast(Any, create_model)("RunConfig", __base__=RunConfig, **kinds)
    try:
        return cast(RunConfig, model.model_validate(values))
    except ValidationError as error:
        lines = [_explain(model, detail) for detail in error.errors()]
        separator = "\n  " if len(lines) > 1 else ""
        raise ConfigError(f"{where}: " + separator + separator.join(lines)) from None


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, lay the command line's overrides over it, and validate.

    `overrides` are `--key.sub value` or `--key.sub=value`; values are read as YAML. Raises ConfigError.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {str(path)!r}: {error}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings such as `steps: 1000`, not {type(values).__name__}")
    for key, value in _read_overrides(overrides):
        _lay_over(values, key, value)
    run = values.setdefault("run", {})
    if isinstance(run, dict) and run.get("name") is None:
        run["name"] = path.stem
    return parse(values, str(path))


def _read_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    pairs = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}; settings read --key.sub value")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value")
            text = rest.pop(0)
        try:
            pairs.append((key, yaml.safe_load(text)))
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: {text!r} is not valid YAML") from error
    return pairs


def _lay_over(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one dotted key. A new component `name` drops the old component's options."""
    *parents, last = dotted.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--{dotted}: {parent!r} is a value ({child!r}), not a group of settings")
        node = child
    if last == "name" and len(parents) == 1 and parents[0] in ("model", "algorithm", "views"):
        if node.get("name") != value:
            node.clear()
    node[last] = value


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _explain(model: type[BaseModel], detail: ErrorDetails) -> str:
    """One of pydantic's findings in hpdist's words: path, value, what is allowed."""
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _fields_at(model, detail["loc"][:-1])
        nearest = _nearest(str(detail["loc"][-1]), known)
        return f"{path}: unknown setting{nearest or '; known here: ' + ', '.join(known)}"
    if detail["type"] == "missing":
        return f"{path}: missing"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if path:
        return f"{path}: {message}, not {detail['input']!r}" if "must" in message else f"{path}: {message}"
    return message


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in loc:
        annotation = current.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        current = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(current.model_fields)


def json_schema() -> str:
    """The JSON Schema of a config file, for editors: every component's options included."""
    import hpdist.components  # noqa: F401

    kinds: dict[str, Any] = {}
    for kind, known in _components.items():
        union = Union[tuple([*known.values(), PythonComponent])]  # noqa: UP007 (made at run time)
        default = ... if kind not in _DEFAULT_NAMES else known[_DEFAULT_NAMES[kind]]()
        kinds[kind] = (union, default)
    model = cast(Callable[..., type[BaseModel]], create_model)("RunConfig", __base__=RunConfig, **kinds)
    return json.dumps(model.model_json_schema(), indent=2)
