"""Steps of an algorithm on a global batch, with a linear model and without an engine.

The model's features are its inputs: vectors, or small images for algorithms that rotate them. The
batch can be shared by ranks, each a thread with its own algorithm, and split into micro-batches.
The outcome of a step is kept for inspection.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.exchange import StudentInputs
from hpdist.algorithms.loss_terms import LossTerms
from hpdist.algorithms.positions import BatchPositions
from hpdist.algorithms.protocol import Attempt, MicroBatch, OwnSums, Reduce
from hpdist.data.batch import STORED, StoredTensors
from hpdist.data.structures import Structure, index, map_tensors

FEATURES = 6
IMAGE = (1, 3, 3)
T = TypeVar("T")
_PATIENCE = 60  # seconds that a rank waits for the others


@dataclass
class GlobalBatch:
    """Views of a global batch; unlabelled rows that are not `usable` have no views."""

    labeled: Tensor  # [labeled, features]
    labels: Any  # [labeled, *], as the task has them: one tensor, or tensors by name
    weak: list[Tensor]  # per view [unlabeled, features]
    student_weak: list[Tensor]
    strong: list[Tensor]
    strong_labeled: list[Tensor]
    ids: Tensor
    usable: Tensor  # bool [unlabeled]
    student: Tensor  # [features, numbers of all outputs of a row]
    target: Tensor  # the same for the model that makes the targets
    step: int
    outputs: Mapping[str, tuple[int, ...]]  # the shape of a row of each output, by name
    heads: dict[str, torch.nn.Module] = field(default_factory=dict)
    labeled_ids: Tensor = field(default_factory=lambda: torch.zeros(0).long())
    stored: dict[str, Tensor] = field(default_factory=dict)  # by name [unlabeled, *]

    def slice(self, number: int, slices: int) -> MicroBatch:
        """Return one of several equal slices, in the order of the global batch."""
        labeled, unlabeled = len(self.labeled) // slices, len(self.ids) // slices
        x = torch.arange(number * labeled, (number + 1) * labeled)
        u = torch.arange(number * unlabeled, (number + 1) * unlabeled)
        u = u[self.usable[u]]
        inputs = StudentInputs(
            self.labeled[x],
            index(self.labels, x),
            tuple(view[u] for view in self.student_weak),
            tuple(view[u] for view in self.strong),
            tuple(view[x] for view in self.strong_labeled),
            tuple(view[u] for view in self.weak),
            BatchPositions(x, u, len(self.labeled), len(self.ids), seed=7, step=self.step),
            ids=self.ids[u],
            context={name: kept[u] for name, kept in self.stored.items()},
        )
        labeled_ids = self.labeled_ids[x] if len(self.labeled_ids) else None
        return MicroBatch(inputs, self.ids[u], labeled_ids, len(u))


def global_batch(
    algorithm: Algorithm,
    seed: int = 0,
    *,
    labeled: int = 8,
    unlabeled: int = 16,
    classes: int = 5,
    unusable: Sequence[int] = (),
    one_class: bool = False,
) -> GlobalBatch:
    """Make a random batch with as many views as the algorithm needs."""
    generator = torch.Generator().manual_seed(seed)
    shape = IMAGE if "rotation" in algorithm.head_names else (FEATURES,)
    features = math.prod(shape)

    def rows(count: int, *shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    views = algorithm.views
    usable = torch.ones(unlabeled, dtype=torch.bool)
    usable[list(unusable)] = False
    labels = algorithm.task.example_labels(labeled, classes, generator)
    shapes = algorithm.task.example_outputs(classes)
    outputs = sum(math.prod(row) for row in shapes.values())
    return GlobalBatch(
        rows(labeled, *shape),
        map_tensors(torch.zeros_like, labels) if one_class else labels,
        [rows(unlabeled, *shape) for _ in range(views.weak)],
        [rows(unlabeled, *shape) for _ in range(views.student_weak)],
        [rows(unlabeled, *shape) for _ in range(views.strong)],
        [rows(labeled, *shape) for _ in range(views.strong_labeled)],
        torch.randperm(unlabeled * 2, generator=generator)[:unlabeled],
        usable,
        rows(features, outputs),
        rows(features, outputs) if views.teacher else torch.zeros(0),
        seed,
        shapes,
        make_heads(algorithm, features),
        torch.randperm(4 * labeled, generator=generator)[:labeled] + 2**30,
        stored_labels(unlabeled, outputs, generator) if views.stored_labels else {},
    )


def stored_labels(rows: int, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw what an algorithm is given of stored labels; every fifth row has none."""
    drawn = torch.randn(rows, classes, generator=generator).mul(2).softmax(dim=-1)
    there = torch.arange(rows) % 5 != 4
    agreement = torch.randint(1, 4, (rows,), generator=generator) / 3 * there
    probabilities = drawn * there[:, None]
    found = StoredTensors(
        probabilities=probabilities, confidence=probabilities.amax(dim=-1), agreement=agreement
    )
    return {STORED + name: cast(Tensor, kept) for name, kept in found.items()}


def make_heads(algorithm: Algorithm, features: int = FEATURES) -> dict[str, torch.nn.Module]:
    """Make the heads that it needs, the same in every call."""
    torch.manual_seed(3)
    algorithm.input_shape = torch.Size([features])
    made = algorithm.heads(torch.Size([features]))
    own = {name: torch.nn.Linear(features, 3) for name in algorithm.head_names}  # of the model
    return {name: made.get(name, own[name]) for name in algorithm.head_names}


@dataclass
class Ran:
    """The outcome of a step: tensors in the order of the global batch, view by view."""

    inputs: list[Tensor] = field(default_factory=list)  # of the student, part by part
    logits: list[Tensor] = field(default_factory=list)  # of the student, its first output
    gradients: list[Tensor] = field(default_factory=list)  # of the loss, to the logits
    context: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    heads: dict[str, list[Tensor]] = field(default_factory=dict)
    """The other outputs, and those of heads, part by part."""
    head_gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Violations that were noticed, in words."""

    def arrays(self, what: str) -> list[np.ndarray]:
        """Return the tensors of a field in float64."""
        return [part.detach().double().numpy() for part in getattr(self, what)]


class LinearModel:
    """Student and teacher of a global batch; the student's outputs are leaves with a gradient."""

    def __init__(self, algorithm: Algorithm, batch: GlobalBatch) -> None:
        self.views = algorithm.views
        self.batch = batch
        self.leaves: dict[str, list[Tensor]] = {}
        """The student's latest outputs and heads, by name and part by part."""

    def targets(self, micros: Sequence[MicroBatch]) -> list[Structure | None]:
        """Return student's or teacher's outputs for the weak views."""
        model = self.batch.target if self.views.teacher else self.batch.student
        found: list[Structure | None] = []
        for micro in micros:
            parts = list(micro.inputs.weak)
            if parts and self.views.labeled_targets:
                parts.append(micro.inputs.labeled)
            found.append(_joined_outputs(self._model_outputs(parts, model)) if parts else None)
        return found

    def student(self, micro: MicroBatch) -> tuple[Structure, None]:
        """Return the student's outputs for its rows."""
        outputs = self._model_outputs(micro.inputs.parts, self.batch.student)
        self.leaves = {
            name: [part.detach().requires_grad_() for part in parts]
            for name, parts in outputs.items()
        }
        return self.last_outputs(), None

    def last_outputs(self) -> Structure:
        """Return the student's latest outputs."""
        return _joined_outputs(self.leaves)

    def preview(self, micro: MicroBatch) -> Structure:
        """Return the outputs that the student will give for the same rows."""
        return _joined_outputs(self._model_outputs(micro.inputs.parts, self.batch.student))

    def probe(self, inputs: Tensor) -> Structure:
        """Return the student's outputs for other inputs."""
        return self._of_rows(inputs, self.batch.student)

    @torch.no_grad()
    def _model_outputs(self, parts: Sequence[Tensor], model: Tensor) -> dict[str, list[Tensor]]:
        found = [self._of_rows(part, model) for part in parts]
        names = [*self.batch.outputs, *self.batch.heads]
        return {name: [outputs[name] for outputs in found] for name in names}

    def _of_rows(self, inputs: Tensor, model: Tensor) -> dict[str, Tensor]:
        """Return every output and head of some rows, by name."""
        rows, shapes = inputs.flatten(1), self.batch.outputs
        columns = (rows @ model).split([math.prod(shape) for shape in shapes.values()], dim=1)
        outputs = {
            name: numbers.reshape(len(rows), *shape)
            for (name, shape), numbers in zip(shapes.items(), columns, strict=True)
        }
        return outputs | {name: head(rows) for name, head in self.batch.heads.items()}


def _joined_outputs(parts: Mapping[str, Sequence[Tensor]]) -> Structure:
    return {name: torch.cat(list(views)) for name, views in parts.items()}


def run_step(
    algorithms: Sequence[Algorithm],
    batch: GlobalBatch,
    micro_batches: int = 1,
    *,
    commit: bool = True,
) -> Ran:
    """Do one step on the global batch, shared by as many ranks as there are algorithms.

    Each rank splits its part into `micro_batches`. With several ranks, every algorithm is already
    bound to its own. Raises whatever an algorithm raises.
    """
    if len(algorithms) == 1:
        return _run_rank(algorithms[0], batch, 0, 1, micro_batches, OwnSums, commit)
    ranks = len(algorithms)

    def run(rank: int, reduce: Reduce) -> Ran:
        return _run_rank(algorithms[rank], batch, rank, ranks, micro_batches, reduce, commit)

    return _join(on_ranks(algorithms, run))


def on_ranks(algorithms: Sequence[Algorithm], call: Callable[[int, Reduce], T]) -> list[T]:
    """Call a function with every rank and its reduction, at once; give what each returned.

    The algorithms, already bound to their ranks, are also given the reductions between steps.
    Raises whatever one of the calls raises.
    """
    ranks = len(algorithms)
    together = _SharedSums(ranks)

    def run(rank: int) -> T:
        algorithms[rank].over_ranks = _OverThreads(together, rank, ranks)
        try:
            return call(rank, together.of_rank(rank))
        except BaseException:
            together.barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def _run_rank(
    algorithm: Algorithm,
    batch: GlobalBatch,
    rank: int,
    ranks: int,
    micro_batches: int,
    reduce: Reduce,
    commit: bool,
) -> Ran:
    slices = ranks * micro_batches
    first = rank * micro_batches
    micros = [batch.slice(number, slices) for number in range(first, first + micro_batches)]
    model = LinearModel(algorithm, batch)
    attempt = Attempt(algorithm, micros, model, reduce, slices)
    attempt.begin()
    found = [_judge(attempt, model, number) for number in range(micro_batches)]
    attempt.close(commit)
    return _join(found)


def _judge(attempt: Attempt, model: LinearModel, number: int) -> Ran:
    """Return the loss of a micro-batch, and its gradient."""
    inputs, weak = attempt.micros[number].inputs, attempt.weak[number]
    targets = () if weak is None else weak.everything
    versions = [part._version for part in (*targets, *inputs.parts)]
    terms = attempt.judge(number)
    again = attempt.terms(number, model.last_outputs())
    loss = terms.total(attempt.parts)
    problems = _problems(attempt, number, terms, again)
    if versions != [part._version for part in (*targets, *inputs.parts)]:
        problems.append("changes the outputs of the weak views, or its inputs, in place")
    names = [(name, at) for name, leaves in model.leaves.items() for at in range(len(leaves))]
    leaves = [model.leaves[name][at] for name, at in names]
    gradients: dict[str, list[Tensor]] = {name: [] for name in model.leaves}
    made: Sequence[Tensor | None] = (
        torch.autograd.grad(loss, leaves, allow_unused=True)
        if loss.requires_grad
        else [None] * len(leaves)
    )
    for (name, _), leaf, gradient in zip(names, leaves, made, strict=True):
        gradients[name].append(torch.zeros_like(leaf) if gradient is None else gradient)
    heads = dict(model.leaves)
    first = next(iter(model.batch.outputs))
    return Ran(
        inputs.parts,
        heads.pop(first),
        gradients.pop(first),
        dict(inputs.context),
        {name: value.item() for name, value in terms.contributions(attempt.parts).items()},
        heads,
        gradients,
        problems,
    )


def _problems(attempt: Attempt, number: int, terms: LossTerms, again: LossTerms) -> list[str]:
    inputs, weak = attempt.micros[number].inputs, attempt.weak[number]
    totals = [one.total(attempt.parts).detach().nan_to_num() for one in (terms, again)]
    problems = []
    if not torch.equal(*totals):
        problems.append(
            f"a second call of `loss` gives {totals[1]:.7g}, the first {totals[0]:.7g}: it must be "
            "a function of its arguments, `pending` and the noise of `BatchPositions`"
        )
    if weak is not None and any(part.requires_grad for part in weak.everything):
        problems.append("needs a gradient into the targets: use them unchanged, or a copy")
    if any(part.requires_grad for part in (*inputs.parts, *inputs.context.values())):
        problems.append("gives the student inputs or context with a gradient: detach them")
    remembered = {**attempt.algorithm.state, **attempt.algorithm.pending}
    if kept := [name for name, value in remembered.items() if value.requires_grad]:
        problems.append(f"stores {', '.join(kept)} with a gradient: detach it")
    return problems


def _join(parts: Sequence[Ran]) -> Ran:
    """Assemble the parts of a step, in the order of the global batch."""

    def rows(views: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        return [torch.cat(view) for view in zip(*views, strict=True)]

    first = parts[0]
    return Ran(
        rows(part.inputs for part in parts),
        rows(part.logits for part in parts),
        rows(part.gradients for part in parts),
        {name: torch.cat([part.context[name] for part in parts]) for name in first.context},
        {name: sum(part.losses[name] for part in parts) for name in first.losses},
        {name: rows([part.heads[name] for part in parts]) for name in first.heads},
        {
            name: rows([part.head_gradients[name] for part in parts])
            for name in first.head_gradients
        },
        list(dict.fromkeys(problem for part in parts for problem in part.problems)),
    )


class _SharedSums:
    """The reduction of ranks that are threads: they wait for one another, and sum identically."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=_PATIENCE)
        self._given: list[dict[str, Tensor]] = [{} for _ in range(ranks)]

    def of_rank(self, rank: int) -> Reduce:
        """Return the reduction of a rank."""
        return lambda sums: _PendingShare(self, rank, OwnSums(sums).wait())

    def exchange(self, rank: int, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum the tensors of all ranks. Raises ValueError if they give different tensors."""
        given = self.everyone(rank, sums)
        return {name: torch.stack([one[name] for one in given]).sum(dim=0) for name in sums}

    def everyone(self, rank: int, sums: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Give the tensors of all ranks. Raises ValueError if they are different ones."""
        self._given[rank] = sums
        self.barrier.wait()
        given = list(self._given)
        self.barrier.wait()  # before any rank gives the next
        shapes = [[(name, tuple(v.shape)) for name, v in one.items()] for one in given]
        if any(other != shapes[0] for other in shapes):
            raise ValueError(f"the ranks reduce different sums: {shapes}")
        return given


@dataclass(frozen=True)
class _OverThreads:
    """Reductions over the ranks between steps."""

    together: _SharedSums
    rank: int
    world_size: int

    def sum(self, value: Tensor) -> Tensor:
        """Give the sum, in the tensor's own dtype."""
        return self._stacked(value).sum(dim=0)

    def max(self, value: Tensor) -> Tensor:
        """Give the largest, in the tensor's own dtype."""
        return self._stacked(value).amax(dim=0)

    def _stacked(self, value: Tensor) -> Tensor:
        given = self.together.everyone(self.rank, {"value": value})
        return torch.stack([one["value"] for one in given])


@dataclass(frozen=True)
class _PendingShare:
    together: _SharedSums
    rank: int
    sums: dict[str, Tensor]

    def wait(self) -> dict[str, Tensor]:
        """Wait for the other ranks."""
        return self.together.exchange(self.rank, self.sums)


def with_nan(batch: GlobalBatch) -> GlobalBatch:
    """Return the same batch with a NaN in a target view."""
    broken = batch.weak[0].clone()
    broken[3] = float("nan")
    return replace(batch, weak=[broken, *batch.weak[1:]])
