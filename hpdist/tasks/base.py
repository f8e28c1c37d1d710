"""What a task is: the meaning of labels and of a model's outputs.

An algorithm says who labels a row, when, and how much that counts; the task says what a label is.
It reads the column of labels, gives losses, predictions, pseudo-labels and scores, and says in
words and pictures what it has found. Every task is one file, which registers its `TaskConfig`: a
config names it in `task.name`, as `python:package.module:Class` where it is a user's own.

Every loss is of each row, [rows], in fp32; where a row has several classes or targets it is the
mean over them. Labels and outputs are structures: one tensor, or tensors by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import model_validator
from torch import Tensor

from hpdist.aliases import find_moved
from hpdist.config.component import Component, components
from hpdist.errors import ConfigError
from hpdist.tasks.metrics import Meter
from hpdist.tasks.row_choices import ShowsRows

if TYPE_CHECKING:  # what reads labels imports `datasets`, which a config alone does not need
    from hpdist.data.decode.encoded import Array
    from hpdist.data.sources.classes import Classes, StoredLabels
    from hpdist.data.sources.label_encoding import Encoding

PREDICTIONS = "predictions"
"""`predictions` and `squared_error`: what consistency can be asked of."""
DIVERGENCE = "divergence"
"""`divergence`: how far two predictions are apart."""
ENTROPY = "entropy"
"""`entropy`: how unsure a prediction is."""
PSEUDO_LABELS = "pseudo-labels"
"""`pseudo_labels` and `pseudo_label_losses`: predictions can be taken for labels."""
ONE_CLASS = "exclusive classes"
"""Outputs are logits [rows, classes] of a softmax, and labels are int64 [rows]."""

_METHODS: Mapping[str, tuple[str, ...]] = {
    PREDICTIONS: ("predictions",),
    DIVERGENCE: ("divergence",),
    ENTROPY: ("entropy",),
    PSEUDO_LABELS: ("pseudo_labels", "pseudo_label_losses"),
}
"""The methods that a task must define for an ability."""


class Task(ShowsRows):
    """The base of every task: what is not defined here a task must say itself."""

    name: ClassVar[str]
    """What messages call it; of a task that comes with hpdist, its `task.name`."""
    Config: ClassVar[type[TaskConfig]]
    """The options of the task; set by the `TaskConfig` that makes it."""
    abilities: ClassVar[frozenset[str]] = frozenset()
    """What algorithms may ask of it: PREDICTIONS, DIVERGENCE, ENTROPY, PSEUDO_LABELS, ONE_CLASS."""
    headline: ClassVar[str]
    """The score that the best evaluation is chosen by, and the log shows."""
    headline_title: ClassVar[str] = ""
    """What the headline's chart is called; by default the headline's name in words."""
    larger_is_better: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ()
    """The scores that the log shows; by default the headline."""
    in_percent: ClassVar[frozenset[str]] = frozenset()
    """Scores that people read as a percentage."""
    summarized: ClassVar[tuple[str, ...]] = ()
    """The scores that a run's summary has of what predicts; of the student it has the first. By
    default the headline."""
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    """The model's outputs that it goes by. What is `logits` below is one tensor where they are the
    logits alone, else these tensors by name, fp32 where floating-point."""
    names_are: ClassVar[str] = "classes"
    """What the names that a column of labels has are called in messages."""
    rows_have_a_class: ClassVar[bool] = False
    """Whether each row is of one class, so that rows can be drawn by class."""
    labels_have_places: ClassVar[bool] = False
    """Whether labels have a place in the row's picture, as boxes have. What is `logits` below then
    holds, beside the outputs for a view, where the pixels went in it, under the names of
    `hpdist.data.views.places`; outputs for rows as they are come without. Views must be
    `MappedViews`."""
    counts_labels: ClassVar[bool] = False
    """Whether the mean of a loss is over what `label_counts` counts, instead of over rows."""
    always_written: ClassVar[tuple[str, ...]] = ("label", "confidence")
    """The columns of `prediction_columns` that `predict` writes unless all are asked for."""
    charts: ClassVar[tuple[str, ...]] = ()
    """What a report draws of it beside the curves: "confusion", a matrix for each set."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise TypeError where a task says that it is able of what it does not define."""
        super().__init_subclass__(**kwargs)
        if not cls.summarized and hasattr(cls, "headline"):
            cls.summarized = (cls.headline,)
        for ability in cls.abilities:
            for method in _METHODS.get(ability, ()):
                if getattr(cls, method) is getattr(Task, method):
                    raise TypeError(f"{cls.__name__} says that it has {ability}: define {method}")

    # ------------------------------------------------------------------ labels and outputs

    def find_encoding(
        self, stored: StoredLabels, num_classes: int | None, recorded: Sequence[str] | None = None
    ) -> Encoding:
        """Say how the labelled split's column is read.

        Args:
            stored: The column of labels.
            num_classes: What the model's config says, or None.
            recorded: The names of the classes of a run that goes on.

        Raises DataError where the column does not fit the task.
        """
        raise NotImplementedError(f"{type(self).__name__} must define find_encoding()")

    def recorded_encoding(
        self, classes: Classes, facts: Mapping[str, Any], state: Mapping[str, Array]
    ) -> Encoding | None:
        """Make the encoding of a trained model again, without the labelled rows.

        Args:
            classes: The encoding's classes.
            facts: Under `class` the name of the encoding's class, and what its method `record`
                gave, if it has one.
            state: The encoding's state.

        By default None: a set that is measured on is then read by `find_encoding`, with the names
        of the classes, and must have the same ones.
        """
        return None

    def fitted(self, encoding: Encoding) -> Task:
        """Give the task for labels that were read so: itself, unless it goes by their scale."""
        return self

    def output_size(self, num_classes: int) -> int:
        """Count the logits of a row where the labels have so many classes or targets."""
        return num_classes

    def check_outputs(self, outputs: Any, rows: int, num_classes: int, description: str) -> None:
        """Raise ConfigError unless a model's outputs for so many rows are those of the task.

        `outputs` are tensors by name where `Task.outputs` names more than the logits, else what
        stands for these; `description` says in words what the model gave.
        """
        if self.outputs == Task.outputs:
            expected = [rows, self.output_size(num_classes)]
            if not isinstance(outputs, Tensor) or list(outputs.shape) != expected:
                raise ConfigError(
                    f"model: {description}, expected logits {expected}: [rows, classes]"
                )
            return
        for name, tensor in outputs.items():
            if tensor.shape[:1] != (rows,):
                raise ConfigError(
                    f"model: its output {name} is {list(tensor.shape)} for {rows} rows, expected "
                    "[rows, *]"
                )

    # ------------------------------------------------------------------ what trains

    def losses(self, logits: Any, labels: Any) -> Tensor:
        """Give the loss of each labelled row, [rows]; `labels` as a `LabeledBatch` has them."""
        raise NotImplementedError(f"{type(self).__name__} must define losses()")

    def label_counts(self, labels: Any) -> Tensor:
        """Count what losses are a mean over, fp32 [rows], of labels or of pseudo-labels.

        Only of a task that `counts_labels`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define label_counts()")

    def predictions(self, logits: Any) -> Any:
        """Give what consistency is asked of, [rows, classes]: probabilities, or the numbers."""
        raise self._lacks(PREDICTIONS)

    def squared_error(self, logits: Any, targets: Any) -> Tensor:
        """mean_c (p_c - q_c)^2, [rows], with p the predictions of `logits` and q `targets`."""
        error: Tensor = (self.predictions(logits) - targets).square().mean(dim=-1)
        return error

    def divergence(self, target_logits: Any, logits: Any) -> Tensor:
        """Say how far predictions are from those of `target_logits`, [rows]; 0 if they agree."""
        raise self._lacks(DIVERGENCE)

    def entropy(self, logits: Any) -> Tensor:
        """Give the entropy of the predictions, [rows]. Raises ConfigError where they have none."""
        raise ConfigError(
            f"task.name: {self.name} has no entropy; set algorithm.entropy_weight to 0, or choose "
            "another algorithm"
        )

    def pseudo_labels(self, logits: Any, threshold: float) -> tuple[Tensor, Any]:
        """Say which pseudo-labels reach a threshold, fp32, and what they are.

        [rows] both, or [rows, classes] where every class is decided on its own. Raises ConfigError
        where predictions have no confidence.
        """
        raise ConfigError(f"task.name: {self.name} has no confidence; choose another algorithm")

    def pseudo_label_losses(self, logits: Any, labels: Any, mask: Tensor) -> Tensor:
        """Give the loss of pseudo-labels where `mask` holds, [rows]; the others count as 0."""
        raise self._lacks(PSEUDO_LABELS)

    def pseudo_label_metrics(self, labels: Any, mask: Tensor) -> dict[str, Tensor]:
        """Give more numbers of each row's pseudo-labels to log, by name, fp32 [rows]."""
        return {}

    def _lacks(self, ability: str) -> ConfigError:
        return ConfigError(f"task.name: {self.name} has no {ability}; choose another algorithm")

    # ------------------------------------------------------------------ what is measured and said

    def meter(self, outputs: Any) -> Meter:
        """Make what collects a set's scores, of outputs like these of its first batch."""
        raise NotImplementedError(f"{type(self).__name__} must define meter()")

    def prediction_columns(self, outputs: Any, names: Sequence[str]) -> dict[str, Any]:
        """Give what is written of each row that was predicted: columns by name.

        `label` is among them. Each is a list, or an array whose first dimension is rows, on the
        CPU; `names` are those of the classes or targets.
        """
        raise NotImplementedError(f"{type(self).__name__} must define prediction_columns()")

    def prediction_types(self) -> dict[str, Any]:
        """Give the Arrow types of columns of predictions that one row may not tell, by name."""
        return {}

    def class_counts(self, logits: Any) -> Tensor | None:
        """Count the rows that each class takes, fp32 [classes]; None unless a row is of one."""
        return None

    def confidence(self, logits: Any) -> Tensor | None:
        """Give the probability of each row's likeliest class, [rows]; None unless it has one."""
        return None

    def example_labels(self, rows: int, num_classes: int, generator: torch.Generator) -> Any:
        """Draw labels of so many rows, as a `LabeledBatch` has them, to try an algorithm with."""
        raise NotImplementedError(f"{type(self).__name__} must define example_labels()")

    def example_outputs(self, num_classes: int) -> dict[str, tuple[int, ...]]:
        """Give the shape of a row of each output, by name, to try an algorithm with.

        The first one is what `outputs` names first. Raises ConfigError where a task of several
        outputs does not say.
        """
        if self.outputs != Task.outputs:
            raise ConfigError(f"task.name: {self.name} must define example_outputs() to be tried")
        return {"logits": (self.output_size(num_classes),)}

    @classmethod
    def display(cls) -> dict[str, Any]:
        """Give what a report must know of the task, as JSON: it is kept with the run."""
        return {
            "name": cls.name,
            "headline": cls.headline,
            "title": cls.headline_title or cls.headline.replace("_", " ").capitalize(),
            "summarized": list(cls.summarized),
            "charts": list(cls.charts),
        }


class TaskConfig(Component):
    """The options of a task; a subclass names in `makes` the task that it is of."""

    kind: ClassVar[str] = "task"
    makes: ClassVar[type[Task]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have the task know its options, so that `python:module:Task` stands for both.

        Raises TypeError where the task lacks what is said of every task.
        """
        super().__init_subclass__(**kwargs)
        if "makes" in vars(cls):
            for attribute in ("name", "headline"):
                if not hasattr(cls.makes, attribute):
                    raise TypeError(f"{cls.makes.__name__} must have a {attribute}")
            cls.makes.Config = cls

    @model_validator(mode="before")
    @classmethod
    def _without_defaults_of_others(cls, values: Any) -> Any:
        """Leave out what only other tasks have, at its default: it was once written down for all.

        Raises ValueError where such a setting has another value.
        """
        if not hasattr(cls, "makes"):
            raise ValueError(f"{cls.__name__} must name in `makes` the task that it is of")
        if not isinstance(values, Mapping):
            return values
        kept = dict(values)
        for key in [key for key in kept if key not in cls.model_fields]:
            having = {n: c for n, c in components(cls.kind).items() if key in c.model_fields}
            if any(kept[key] == c.model_fields[key].default for c in having.values()):
                del kept[key]
            elif having:
                names = " or ".join(having)
                raise ValueError(f"{key} is only used with name: {names}; leave it out")
        return kept

    def build(self) -> Task:
        """Make the task. Its constructor takes the options by their names."""
        return self.makes(**{n: getattr(self, n) for n in type(self).model_fields if n != "name"})


def abilities_of(kind: type[Component]) -> frozenset[str]:
    """Give the abilities of the task that a registered config makes."""
    return kind.makes.abilities if issubclass(kind, TaskConfig) else frozenset()


def able_tasks(needs: Iterable[str]) -> tuple[str, ...]:
    """Name the registered tasks that have all of these abilities, sorted."""
    needed = frozenset(needs)
    return tuple(
        name for name, kind in components(TaskConfig.kind).items() if needed <= abilities_of(kind)
    )


def require_abilities(task: Task, needs: Iterable[str], who: str) -> None:
    """Raise ConfigError, with what it lacks in words, where a task has not all these abilities."""
    missing = sorted(frozenset(needs) - task.abilities)
    if missing:
        fitting = ", ".join(able_tasks(needs)) or "none that is known"
        raise ConfigError(
            f"task.name: {who} has no meaning for {task.name}, which has no "
            f"{' and no '.join(missing)}, only for {fitting}; `hpdist algorithms` lists which do "
            "what"
        )


def require_places_kept(task: Task, changes_inputs: bool, who: str) -> None:
    """Raise ConfigError where labels have a place in inputs that an algorithm changes."""
    if changes_inputs and task.labels_have_places:
        raise ConfigError(
            f"task.name: {who} has no meaning for {task.name}, whose labels have a place in the "
            "inputs that it mixes or changes; leave it out, or choose another"
        )


def require_named(task: Task, names: Iterable[str], who: str) -> None:
    """Raise ConfigError unless a task is among names, as algorithms gave them before; and warn."""
    warnings.warn(
        f"{who}.tasks names tasks; say in `needs` which abilities of a task it goes by "
        "(hpdist.tasks.base): names go with the next release",
        DeprecationWarning,
        stacklevel=3,
    )
    if task.name not in names:
        raise ConfigError(
            f"task.name: {who} has no meaning for {task.name}, only for {', '.join(names)}; "
            "`hpdist algorithms` lists which do what"
        )


def task_letters() -> dict[str, str]:
    """Give the shortest beginning of every registered task's name that no other begins with."""
    names = list(components(TaskConfig.kind))
    return {
        name: next(
            name[:length]
            for length in range(1, len(name) + 1)
            if length == len(name) or sum(other.startswith(name[:length]) for other in names) == 1
        )
        for name in names
    }


def share(mask: Tensor) -> Tensor:
    """Give the share of a row's decisions that a mask of pseudo-labels holds for, [rows]."""
    return mask if mask.dim() == 1 else mask.mean(dim=-1)


def __getattr__(name: str) -> object:
    """Find what this module held when all tasks were in it."""
    return find_moved(__name__, name)
