"""The contract of an algorithm: the views it needs, the sums it has reduced, and its loss.

An algorithm sees this rank's rows and the global statistics, and never communicates in a step. Each
number that it adds to the loss is a *contribution*: a sum over this rank's rows divided by the
global number of rows, so that the contributions of all ranks and micro-batches add up to the mean
of the global batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from hpdist.algorithms.exchange import LogitsFn, StudentInputs, StudentOutputs, Sums, WeakOutputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.options import DeclaredConfig, WithOptions, argument
from hpdist.algorithms.over_ranks import ONE_RANK, OverRanks
from hpdist.algorithms.saved_state import SavedShards, Shards, Table, check_names
from hpdist.algorithms.view_request import Views
from hpdist.aliases import find_moved
from hpdist.tasks import DEFAULT_TASK
from hpdist.tasks.base import (
    ONE_CLASS,
    Task,
    able_tasks,
    require_abilities,
    require_named,
    require_places_kept,
)

Groups = int | Literal["auto"]
"""Parts of a global batch within which rows are mixed; "auto" chooses by the batch's sizes."""


class AlgorithmConfig(DeclaredConfig):
    """The options of an algorithm; `build` makes it."""

    kind: ClassVar[str] = "algorithm"

    def build(
        self, num_classes: int, device: torch.device | str = "cpu", steps: int = 1
    ) -> Algorithm:
        """Make the algorithm for a run of `steps`, its state on `device`."""
        if self.declared_by is None:
            raise NotImplementedError(f"{type(self).__name__} must define build()")
        return cast(Algorithm, self.declared_by.from_config(self, num_classes, device, steps))


class Algorithm(WithOptions):
    """The base of every algorithm.

    One optimizer step calls, in this order: `recall` and `take_recalled`, if it `recalls`;
    `statistics`, `perturb` and `mix` per micro-batch;
    `rank_statistics` and, with the sums over the global batch, `observe` once; `student_statistics`
    if it gives any; `loss` per micro-batch; and `commit` if the step was applied, else `discard`.
    """

    config_base: ClassVar[type[DeclaredConfig]] = AlgorithmConfig
    first_arguments: ClassVar[tuple[str, ...]] = ()
    device: torch.device | str = argument(default="cpu")
    """Where the state is made; an argument of the constructor alone, as the state may be moved."""
    paper: ClassVar[str] = ""
    views: ClassVar[Views] = Views()
    needs: ClassVar[frozenset[str]] = frozenset({ONE_CLASS})
    """The abilities of a task that it needs (`hpdist.tasks.base`): it supports every task that has
    them. By default it needs the softmax of exclusive classes."""
    task: Task = DEFAULT_TASK
    """The task that gives the outputs their meaning; set by `set_task` before the first step."""
    groups: Groups | None = None
    """Parts of the global batch within which `mix` combines rows: ranks times micro-batches must
    divide them, so that no row needs another rank's. None: it mixes no rows."""
    mixed: tuple[str, ...] = ("labeled", "unlabeled")
    """The kinds of rows that it mixes, if any: each needs two or more in a group."""
    head_names: tuple[str, ...] = ()
    """Outputs that its loss uses beside the logits; `heads` makes those that the model lacks."""
    generations: int = 1
    """Equal parts of the run. Before each but the first the teacher labels every unlabelled row
    (`take_labels`), and the student is reset."""
    normalizes_apart: bool = False
    """Whether batch normalisation treats labelled rows and the others as separate batches."""
    heads_hint: str = "before prepare: model = hpdist.with_heads(model, algorithm, example)"
    """What to do if the model lacks these heads."""
    predicts: str | None = None
    """The head whose outputs are the predictions after training; by default the model's own."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        """What the algorithm remembers from applied steps; fp32, the same on every rank."""
        self.pending: dict[str, Tensor] = {}
        """The state as it will be if this step is applied; `loss` uses it."""
        self.tables: dict[str, Table] = {}
        """Other state that is saved and restored under these names; only `commit` writes it."""
        self.rows: int | None = None
        """How many unlabelled rows there are, where that is known; set before the first step."""
        self.class_counts: Tensor | None = None
        """Labelled rows of each class, fp32 [classes], where known; set before the first step."""
        self.input_shape: torch.Size | None = None
        """Shape of one row as the model sees it; None for several tensors; set before `heads`."""
        self.over_ranks: OverRanks = ONE_RANK
        """Sums over the ranks of what each holds of tables, between steps; set after `bind_rank`.
        Only `commit` and `begin_generation` may use them, alike on every rank."""
        self.is_finite: Tensor | None = None
        """Bool []: whether this step's sums may enter the state; set after `observe`."""

    @classmethod
    def from_config(
        cls, config: Any, num_classes: int, device: torch.device | str, steps: int
    ) -> Algorithm:
        """Make the algorithm from its `Config` for a run of `steps`, its state on `device`."""
        return cls(**cls.arguments(config, num_classes=num_classes, device=device, steps=steps))

    @property
    def changes_inputs(self) -> bool:
        """Whether it mixes, adds to or reconstructs inputs: they must be plain numbers."""
        return self.groups is not None or self.views.needs_gradient_probe

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it has a meaning for, by their names, of those that are known."""
        return able_tasks(self.needs)

    def set_task(self, task: Task) -> None:
        """Have the outputs mean something else; before the first step.

        Raises ConfigError where the task lacks what the algorithm needs of it.
        """
        named: Any = type(self).tasks
        if isinstance(named, property):
            require_abilities(task, self.needs, type(self).__name__)
        else:  # names of tasks, as an algorithm gave them before
            require_named(task, named, type(self).__name__)
        require_places_kept(task, self.changes_inputs, type(self).__name__)
        self.task = task

    def bind_rank(self, rank: int, world_size: int) -> None:
        """Keep only this rank's part of what is sharded; called before anything else.

        An algorithm that overrides `take_place`, the former name, is still called by it for one
        release.
        """
        former = getattr(self, "take_place", None)
        if former is not None:
            warnings.warn(
                f"{type(self).__name__}.take_place is bind_rank(rank, world_size) now; the old "
                "name goes with the next release",
                DeprecationWarning,
                stacklevel=2,
            )
            former(rank, world_size)

    def heads(self, features: torch.Size) -> dict[str, nn.Module]:
        """Make the head of every name in `head_names`: features [rows, *features] to [rows, *].

        They are trained with the model, by its optimizer, and removed after training.
        """
        return {}

    @property
    def recalls(self) -> bool:
        """Whether this rank needs what other ranks remember of its rows; the same on every rank."""
        return False

    def recall(self, encoded: Tensor) -> dict[str, Tensor]:
        """Give what this rank remembers of the rows of a global batch, by their ids.

        `encoded` [global batch, 2] are those of `encode_ids`, `protocol.TAKEN` added before, and 0
        at a position without a row. What is given, fp32 [global batch, *], is added up over the
        ranks: 0 where another rank remembers the row.
        """
        return {}

    def take_recalled(self, sums: Sums) -> None:
        """Take the sums of `recall` over the ranks, before anything else of a step."""

    def remembered_bytes(self, rows: int) -> int:
        """Count the bytes that a rank needs to remember so many unlabelled rows."""
        tables = (table.values for table in self.tables.values())
        return rows * sum(v.shape[1:].numel() * v.element_size() for v in tables)

    def batch_bytes(self, labeled: int, unlabeled: int) -> int:
        """Count the bytes that a rank holds at once of global batches of so many rows.

        That is beside its own rows, and of those that are no small part of a GPU's memory.
        """
        return 0

    def summed_bytes(self, labeled: int, unlabeled: int) -> int:
        """Count the bytes of a step's sums over the ranks that grow with rows times classes.

        The global batches have so many rows.
        """
        return 0

    def statistics(self, weak: WeakOutputs) -> dict[str, Tensor]:
        """Sums over this rank's rows to be added up over the global batch; fp32, O(classes)."""
        return {}

    def rank_statistics(self) -> dict[str, Tensor]:
        """Sums that a rank adds once a step, however many micro-batches it has; fp32.

        For what does not follow from this step's rows, such as changes in the shards since then.
        """
        return {}

    def observe(self, sums: Sums, unlabeled_rows: Tensor) -> None:
        """Take the sums over the global batch and make `pending` from `state`."""
        self.pending = dict(self.state)

    def mix(self, inputs: StudentInputs, weak: WeakOutputs | None) -> StudentInputs:
        """Change what the student will see; `weak` is given only if `Views.inputs_need_targets`.

        The number of rows must not depend on what the rows hold.
        """
        return inputs

    def perturb(self, inputs: StudentInputs, weak: WeakOutputs, model: LogitsFn) -> StudentInputs:
        """Change the student's inputs by its present predictions, if `Views.needs_gradient_probe`.

        `model` gives logits with a gradient towards its inputs. Only `torch.autograd.grad` towards
        inputs may be used: the parameters' gradients must stay untouched.
        """
        return inputs

    @property
    def uses_student_statistics(self) -> bool:
        """Whether `student_statistics` gives any."""
        return False

    def student_statistics(self, outputs: StudentOutputs) -> dict[str, Tensor]:
        """Differentiable sums, if the loss is a function of global means: one more collective."""
        return {}

    def loss(self, outputs: StudentOutputs, student_sums: Sums) -> LossTerms:
        """This micro-batch's contributions to the loss."""
        raise NotImplementedError

    @property
    def class_thresholds(self) -> Tensor | None:
        """The confidence that each class needed in the latest loss, fp32 [classes].

        None if all classes have the same threshold.
        """
        return None

    @property
    def generation(self) -> int:
        """How often the student has been reset."""
        return 0

    def take_labels(self, ids: Tensor, probabilities: Tensor) -> None:
        """Store the teacher's predictions for some rows, int64 [rows] and fp32 [rows, classes].

        Called between two generations, for all rows; the same on every rank.
        """

    def begin_generation(self) -> None:
        """Begin the next generation: all rows have their labels."""

    def commit(self) -> None:
        """Make this step's pending state final; never called for a skipped step."""
        self.state = self.pending

    def discard(self) -> None:
        """Forget this step's pending state."""
        self.pending = dict(self.state)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors, with the tables; on several ranks without the `shards`.

        `hpdist.whole_state` gives all of it on any number of ranks.
        """
        return self.state | {name: table.values for name, table in self.tables.items()}

    def shards(self) -> Shards:
        """What this rank holds alone, in parts of flat tensors that any number of ranks can load.

        On one rank this is all of it, and `state_dict` may hold it too under the same names.
        """
        return {}

    def load_state_dict(
        self, state: Mapping[str, Tensor], saved: SavedShards | None = None
    ) -> None:
        """Take over a state; raises KeyError where the names differ.

        What is sharded is read from `saved` (only this rank's part), or stands in `state`.
        """
        check_names(state, [*self.state, *self.tables])
        self.state = {k: state[k].to(v.device, v.dtype).clone() for k, v in self.state.items()}
        for name, table in self.tables.items():
            table.load(state[name])
        self.discard()


def __getattr__(name: str) -> object:
    """Find names that have moved from here."""
    return find_moved(__name__, name)
