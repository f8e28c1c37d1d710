"""The base of add-ons: they change what an algorithm sees or add to its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from hpdist.algorithms.base import Algorithm, AlgorithmConfig
from hpdist.algorithms.exchange import LogitsFn, StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import DeclaredConfig, argument
from hpdist.algorithms.saved_state import SavedShards, Shards, check_names
from hpdist.algorithms.view_request import Views
from hpdist.errors import ConfigError
from hpdist.tasks import DEFAULT_TASK
from hpdist.tasks.base import Task, require_abilities, require_named, require_places_kept


class AddOnConfig(DeclaredConfig):
    """The options of an add-on; `build` wraps an algorithm."""

    kind: ClassVar[str] = "addon"

    def build(
        self, base: Algorithm, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> AddOn:
        """Make the add-on for a run of `steps`, its state on `device`."""
        if self.declared_by is None:
            raise NotImplementedError(f"{type(self).__name__} must define build()")
        run = {"num_classes": num_classes, "device": device, "steps": steps}
        return cast(AddOn, self.declared_by(base, **self.declared_by.arguments(self, **run)))


class _OfBase:
    """An attribute that the step sets from outside; it belongs to the inner algorithm."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: AddOn, owner: type | None = None) -> Any:
        return getattr(instance.base, self.name)

    def __set__(self, instance: AddOn, value: Any) -> None:
        setattr(instance.base, self.name, value)


class AddOn(Algorithm):
    """The base of every add-on: passes everything on to the inner algorithm.

    An add-on overrides `targets` and `student`, which change the outputs that the inner algorithm
    sees, and `own_statistics`, `own_observe` and `add` for sums, state and terms of its own.
    Its state and sums carry the name as a prefix, so add-ons can be nested. Heads and further
    inputs of its own are hidden from the inner algorithm.
    """

    config_base: ClassVar[type[DeclaredConfig]] = AddOnConfig
    first_arguments: ClassVar[tuple[str, ...]] = ("base",)
    base: Algorithm = argument(kw_only=False)
    name: ClassVar[str] = ""
    own_extra_inputs: int = 0
    """Inputs that its `mix` adds behind those of the inner algorithm."""
    addon_paper: ClassVar[str] = ""
    addon_needs: ClassVar[frozenset[str]] = Algorithm.needs
    """The abilities of a task that the add-on needs, besides those of the algorithm inside."""
    rows: Any = _OfBase()
    task: Any = _OfBase()
    class_counts: Any = _OfBase()
    input_shape: Any = _OfBase()
    is_finite: Any = _OfBase()
    over_ranks: Any = _OfBase()

    def __init__(self, base: Algorithm, own_state: Mapping[str, Tensor] | None = None) -> None:
        self.base = base
        self.own = dict(own_state or {})
        """The add-on's own state, fp32; without the prefix."""
        self.own_pending = dict(self.own)
        self.tables = {}
        """The add-on's own pending state; without the prefix."""
        self.views: Views = base.views  # type: ignore[misc]
        self.paper = base.paper  # type: ignore[misc]
        self.needs = base.needs | self.addon_needs  # type: ignore[misc]
        self.groups = base.groups
        self.mixed = base.mixed
        self.head_names = base.head_names
        self.normalizes_apart = base.normalizes_apart
        self.heads_hint = base.heads_hint
        self.predicts = base.predicts
        self.generations = base.generations

    def remember(self, own_state: Mapping[str, Tensor]) -> None:
        """Register state of the add-on's own, fp32; called by `start`."""
        self.own = dict(own_state)
        self.own_pending = dict(own_state)

    @property
    def state(self) -> dict[str, Tensor]:
        """Both states."""
        return self.base.state | self._prefixed(self.own)

    @state.setter
    def state(self, value: Mapping[str, Tensor]) -> None:
        self.own, self.base.state = self._divide(value)

    @property
    def pending(self) -> dict[str, Tensor]:
        """Both pending states."""
        return self.base.pending | self._prefixed(self.own_pending)

    @pending.setter
    def pending(self, value: Mapping[str, Tensor]) -> None:
        self.own_pending, self.base.pending = self._divide(value)

    @property
    def changes_inputs(self) -> bool:
        """Whether the inner algorithm changes inputs."""
        return self.base.changes_inputs

    def targets(self, weak: WeakOutputs) -> WeakOutputs:
        """Return the weak views' outputs as the inner algorithm is to see them."""
        return weak

    def student(self, outputs: StudentOutputs) -> StudentOutputs:
        """Return the student's outputs as the inner algorithm is to see them."""
        return outputs

    def own_statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Sums over this rank's rows for the add-on itself, of the model's unchanged outputs."""
        return {}

    def own_observe(self, sums: Sums, unlabeled_rows: Tensor) -> dict[str, Tensor]:
        """Make, from the global sums, the add-on's own state if this step is applied."""
        return dict(self.own)

    def own_heads(self, features: torch.Size) -> dict[str, nn.Module]:
        """The heads that the add-on puts into `head_names`."""
        return {}

    def add(self, outputs: StudentOutputs, terms: LossTerms) -> LossTerms:
        """The inner algorithm's terms with the add-on's; `outputs` are the model's, unchanged."""
        return terms

    def set_task(self, task: Task) -> None:
        """Have the outputs mean something else, to the algorithm inside too.

        Raises ConfigError where the task lacks what either needs of it.
        """
        self.base.set_task(task)
        former = getattr(self, "addon_tasks", None)
        if former is not None:  # names of tasks, as an add-on gave them before
            require_named(task, former, type(self).__name__)
        else:
            require_abilities(task, self.addon_needs, type(self).__name__)
        require_places_kept(task, self.changes_inputs, type(self).__name__)

    def bind_rank(self, rank: int, world_size: int) -> None:
        """Pass the task on."""
        self.base.bind_rank(rank, world_size)

    def heads(self, features: torch.Size) -> dict[str, nn.Module]:
        """Both sets of heads."""
        return self.base.heads(features) | self.own_heads(features)

    @property
    def recalls(self) -> bool:
        """Whether the inner algorithm needs what other ranks remember."""
        return self.base.recalls

    def recall(self, encoded: Tensor) -> dict[str, Tensor]:
        """What the inner algorithm remembers."""
        return self.base.recall(encoded)

    def take_recalled(self, sums: Sums) -> None:
        """Pass on what all ranks remember."""
        self.base.take_recalled(sums)

    def remembered_bytes(self, rows: int) -> int:
        """Count those of both."""
        return super().remembered_bytes(rows) + self.base.remembered_bytes(rows)

    def batch_bytes(self, labeled: int, unlabeled: int) -> int:
        """Count those of the inner algorithm."""
        return self.base.batch_bytes(labeled, unlabeled)

    def summed_bytes(self, labeled: int, unlabeled: int) -> int:
        """Count those of the inner algorithm."""
        return self.base.summed_bytes(labeled, unlabeled)

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Both sets of sums."""
        own = {self._key(name): value for name, value in self.own_statistics(weak).items()}
        return self.base.statistics(self._inner(weak)) | own

    def rank_statistics(self) -> dict[str, Tensor]:
        """The inner algorithm's rank statistics."""
        return self.base.rank_statistics()

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Pass each its sums."""
        own, others = self._divide(sums)
        self.own_pending = self.own_observe(own, unlabeled_rows)
        self.base.observe(others, unlabeled_rows)

    def perturb(self, inputs: StudentInputs, weak: WeakOutputs, model: LogitsFn) -> StudentInputs:
        """Mix as the inner algorithm does."""
        return self.base.perturb(inputs, self._inner(weak), model)

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Perturb as the inner algorithm does."""
        return self.base.mix(inputs, None if weak is None else self._inner(weak))

    @property
    def uses_student_statistics(self) -> bool:
        """Whether the inner algorithm has student statistics."""
        return self.base.uses_student_statistics

    def student_statistics(self, outputs: StudentOutputs) -> dict[str, Tensor]:
        """The inner algorithm's student statistics."""
        return self.base.student_statistics(self._inner_outputs(outputs))

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """The inner algorithm's terms, and the add-on's."""
        return self.add(outputs, self.base.loss(self._inner_outputs(outputs), student_sums))

    @property
    def class_thresholds(self) -> Tensor | None:
        """The inner algorithm's thresholds."""
        return self.base.class_thresholds

    @property
    def generation(self) -> int:
        """The inner algorithm's generation."""
        return self.base.generation

    def take_labels(self, ids: Tensor, probabilities: Tensor) -> None:
        """Pass the labels on."""
        self.base.take_labels(ids, probabilities)

    def begin_generation(self) -> None:
        """Pass the new generation on."""
        self.base.begin_generation()

    def commit(self) -> None:
        """Make both states final."""
        self.own = self.own_pending
        self.base.commit()

    def discard(self) -> None:
        """Forget both pending states."""
        self.own_pending = dict(self.own)
        self.base.discard()

    def state_dict(self) -> dict[str, Tensor]:
        """Both states, with their tables."""
        tables = {name: table.values for name, table in self.tables.items()}
        return self.base.state_dict() | self._prefixed(self.own | tables)

    def shards(self) -> Shards:
        """The inner algorithm's shards."""
        return self.base.shards()

    def load_state_dict(
        self, state: Mapping[str, Tensor], saved: SavedShards | None = None
    ) -> None:
        """Take over both states; raises KeyError where the names differ."""
        own, others = self._divide(state)
        expected = dict.fromkeys([*self.own, *self.tables], torch.empty(0))
        check_names(self._prefixed(own), self._prefixed(expected))
        self.own = {k: own[k].to(v.device, v.dtype).clone() for k, v in self.own.items()}
        for name, table in self.tables.items():
            table.load(own[name])
        self.base.load_state_dict(others, saved)
        self.discard()

    def required_counts(self, like: Tensor) -> Tensor:
        """The labelled rows of each class, fp32 [classes], on the device of `like`.

        Raises ConfigError where they are not known.
        """
        if self.class_counts is None:
            raise ConfigError(
                f"{type(self).__name__} needs the number of labelled rows of each class; set "
                "algorithm.class_counts = torch.bincount(labels) before the first step"
            )
        self.class_counts = self.class_counts.to(like.device, torch.float32)  # copied only once
        counts: Tensor = self.class_counts
        return counts

    def _inner(self, weak: WeakOutputs) -> WeakOutputs:
        """The weak views' outputs as the inner algorithm sees them."""
        own = {name: views for name, views in weak.heads.items() if name in self.base.head_names}
        return self.targets(replace(weak, heads=own))

    def _inner_outputs(self, outputs: StudentOutputs) -> StudentOutputs:
        """The student's outputs, and the weak ones in them, as the inner algorithm sees them."""
        extra_inputs = len(outputs.extra_inputs) - self.own_extra_inputs
        return self.student(
            replace(
                outputs,
                weak=None if outputs.weak is None else self._inner(outputs.weak),
                extra_inputs=outputs.extra_inputs[:extra_inputs],
                heads={
                    name: replace(head, extra_inputs=head.extra_inputs[:extra_inputs])
                    for name, head in outputs.heads.items()
                    if name in self.base.head_names
                },
            )
        )

    def _key(self, name: str) -> str:
        return f"{self.name}.{name}"

    def _prefixed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self._key(name): value for name, value in values.items()}

    def _divide(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Split values into those of this add-on, without the prefix, and the inner algorithm's."""
        prefix = self._key("")
        own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        return own, {k: v for k, v in values.items() if not k.startswith(prefix)}


def build_algorithm(
    config: AlgorithmConfig,
    addons: Sequence[AddOnConfig] = (),
    num_classes: int = 2,
    device: torch.device | str = "cpu",
    steps: int = 1,
    task: Task = DEFAULT_TASK,
) -> Algorithm:
    """Wrap an algorithm in its add-ons, the first innermost.

    Raises ConfigError if one of them does not support the task.
    """
    algorithm = config.build(num_classes, device, steps)
    algorithm.set_task(task)
    for addon in addons:
        algorithm = addon.build(algorithm, num_classes, device, steps)
        algorithm.set_task(task)
    return algorithm
