"""What a trained model is, beside its weights: all that is needed to build and to feed it, as JSON.

A run writes it down when it begins (`model.json`), for its checkpoints, and in the folder of its
model (`model/hpdist.json`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hpdist.checkpoint.manifest import Count, regular_size
from hpdist.config.component import Component, ComponentOf
from hpdist.data.decode.spec import InputSpec
from hpdist.data.kinds import kind_named, kind_of_views
from hpdist.data.sources.classes import Classes
from hpdist.data.sources.label_encoding import Encoding
from hpdist.errors import CheckpointError, ConfigError, HpdistError, describe
from hpdist.messages.redaction import redacted_settings
from hpdist.tasks.base import Task, TaskConfig

FORMAT = 1
RUN_DESCRIPTION = "model.json"
"""The description of a run's model in the run folder."""

_MOST_BYTES = 64 << 20  # of a description: a million names of classes need 20 MB


class LabelFacts(BaseModel):
    """How labels are read."""

    model_config = ConfigDict(strict=True, extra="allow")

    column: str
    """The column of labels in the labelled set."""
    names: list[str]
    """The classes, or the targets."""
    kind: str = "integer"
    stored: str = "integers"
    encoding: dict[str, Any] = {}
    """What the task's encoding needs beside the classes."""

    @property
    def classes(self) -> Classes:
        """The classes, as the labelled set has them."""
        return Classes(tuple(self.names), self.kind, self.stored)  # type: ignore[arg-type]


class InputFacts(BaseModel):
    """How inputs are read."""

    model_config = ConfigDict(strict=True, extra="allow")

    kind: str
    reader: str
    """The kind that finds the column."""
    column: str | list[str]
    """The column or columns of the labelled set that the model sees."""
    spec: dict[str, Any]
    """What `InputSpec.record` gave."""


class RunFacts(BaseModel):
    """The run that trained it."""

    model_config = ConfigDict(strict=True, extra="allow")

    id: str
    name: str


class HeadFacts(BaseModel):
    """What makes the head that predicts, where it could not become the model's last layer."""

    model_config = ConfigDict(strict=True, extra="allow")

    algorithm: dict[str, Any]
    addons: list[dict[str, Any]]
    steps: Count


class FileFacts(BaseModel):
    """The size and the SHA-256 of a file beside the description."""

    model_config = ConfigDict(strict=True)

    bytes: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Description(BaseModel):
    """The facts of a model."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: Count = FORMAT
    hpdist: str
    """The version that wrote it."""
    run: RunFacts
    step: Count | None = None
    which: Literal["teacher", "student"] = "teacher"
    chosen: Literal["last", "best"] | None = None
    """Why the weights are those of this step: the last one, or the best on the validation set."""
    model: dict[str, Any]
    """The config's section."""
    outputs: Count
    """The logits of a row."""
    heads: HeadFacts | None = None
    """What makes the head that predicts, of a run that has one."""
    task: dict[str, Any]
    labels: LabelFacts
    views: dict[str, Any]
    inputs: InputFacts
    seed: int
    batch: Count = 256
    """Rows of a batch of the run's evaluation."""
    test: dict[str, Any] | None = None
    """The config's section of the run's test set, and of how it is loaded."""
    precision: Literal["fp32", "bf16", "fp16"]
    """That of the training."""
    weights: Literal["fp32", "bf16", "fp16"] = "fp32"
    """That of the weights in the folder."""
    files: dict[str, FileFacts] = {}
    """The files beside the description, by their paths in the folder."""

    def to_json(self) -> str:
        """Write it as JSON, without passwords and signatures."""
        return json.dumps(redacted_settings(self.model_dump(mode="json")), indent=2) + "\n"

    def section(self, name: Literal["model", "task", "views"]) -> Component:
        """Make the config's section of a name. Raises ConfigError."""
        return component(name, getattr(self, name))

    def make_task(self) -> Task:
        """Make the task, before it goes by labels."""
        section = self.section("task")
        if not isinstance(section, TaskConfig):
            raise ConfigError(f"task: {section.name} is no task")
        return section.build()

    def make_spec(self, folder: Path) -> InputSpec:
        """Make the spec of the inputs; what decoding needs beside it is in `folder`.

        Raises CheckpointError where the values are not those of a spec.
        """
        kind_of_views(self.section("views"))  # which makes a kind of one's own known
        try:
            return kind_named(self.inputs.kind).recorded_spec(self.inputs.spec, folder)
        except HpdistError:
            raise
        except Exception as error:
            raise CheckpointError(f"{folder}: its inputs' spec: {describe(error)}") from error


def component(kind: str, values: Mapping[str, Any]) -> Component:
    """Make a section of a config from its values. Raises ConfigError."""
    try:
        return ComponentOf(kind).choose(dict(values))
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, (kind, *detail['loc'])))}: {detail['msg']}"
            for detail in error.errors()
        )
        raise ConfigError(found) from None


def read_description(file: Path) -> Description:
    """Read a description. Raises CheckpointError where it is none, or of a later format."""
    try:
        if regular_size(file) > _MOST_BYTES:
            raise CheckpointError(f"{file} has more bytes than a description ever has")
        values: Any = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    found = values.get("format") if isinstance(values, dict) else None
    if type(found) is not int:
        raise CheckpointError(f"{file} is not what hpdist writes: it has no format")
    if found > FORMAT:
        raise CheckpointError(
            f"{file.parent} has format {found}, this hpdist knows up to {FORMAT}; upgrade hpdist"
        )
    try:
        return Description.model_validate(values)
    except (ValidationError, RecursionError) as error:
        what = "it is nested too deeply"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CheckpointError(f"{file} is not what hpdist writes: {what}") from error


def describe_labels(column: str, encoding: Encoding) -> LabelFacts:
    """Say how labels are read, as JSON."""
    classes = encoding.classes
    record = getattr(encoding, "record", dict)
    return LabelFacts(
        column=column,
        names=list(classes.names),
        kind=classes.kind,
        stored=classes.stored,
        encoding={"class": type(encoding).__qualname__, **record()},
    )
