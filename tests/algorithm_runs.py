"""Steps of an algorithm on a global batch that several ranks share, without a process for each.

Does what `hpdist.step` does, with a linear model, and keeps what a test wants to look at.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hpdist.algorithms import Algorithm, StudentOutputs, WeakOutputs
from hpdist.algorithms.base import Places, StudentInputs
from tests.algorithm_batches import softmax

FEATURES = 6


@dataclass
class GlobalBatch:
    """Views of a global batch; unlabelled rows that are not `usable` have no views anywhere."""

    labeled: Tensor  # [labeled, features]
    labels: Tensor  # [labeled]
    weak: list[Tensor]  # per view [unlabeled, features]
    student_weak: list[Tensor]
    strong: list[Tensor]
    strong_labeled: list[Tensor]
    ids: Tensor
    usable: Tensor  # bool [unlabeled]
    student: Tensor  # [features, classes]
    target: Tensor  # the same of the model that makes the targets
    step: int


def global_batch(
    algorithm: Algorithm,
    seed: int = 0,
    *,
    labeled: int = 8,
    unlabeled: int = 16,
    classes: int = 5,
    unusable: tuple[int, ...] = (),
    one_class: bool = False,
) -> GlobalBatch:
    """A random one with as many views as the algorithm wants."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int, columns: int = FEATURES) -> Tensor:
        return torch.randn(count, columns, generator=generator)

    views = algorithm.views
    usable = torch.ones(unlabeled, dtype=torch.bool)
    usable[list(unusable)] = False
    labels = torch.randint(classes, (labeled,), generator=generator)
    return GlobalBatch(
        rows(labeled),
        torch.zeros_like(labels) if one_class else labels,
        [rows(unlabeled) for _ in range(views.weak)],
        [rows(unlabeled) for _ in range(views.student_weak)],
        [rows(unlabeled) for _ in range(views.strong)],
        [rows(labeled) for _ in range(views.strong_labeled)],
        torch.randperm(unlabeled * 2, generator=generator)[:unlabeled],
        usable,
        rows(FEATURES, classes),
        rows(FEATURES, classes) if views.teacher else torch.zeros(0),
        seed,
    )


@dataclass
class Ran:
    """A step as it went: tensors in the order of the global batch, views one after the other."""

    inputs: list[Tensor] = field(default_factory=list)  # what the student saw, part by part
    logits: list[Tensor] = field(default_factory=list)  # what it said, part by part
    gradients: list[Tensor] = field(default_factory=list)  # of the loss, to the logits
    notes: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def arrays(self, what: str) -> list[np.ndarray]:
        return [part.detach().double().numpy() for part in getattr(self, what)]


def run(algorithm: Algorithm, batch: GlobalBatch, ranks: int = 1, *, commit: bool = True) -> Ran:
    """One step, its global batch cut into `ranks` slices."""
    cut = [_slice(batch, rank, ranks) for rank in range(ranks)]
    said = [_say(algorithm, batch, inputs, ids) for inputs, ids in cut]
    sums: dict[str, Tensor] = {}
    for weak in said:
        for name, value in (algorithm.statistics(weak) if weak else {}).items():
            assert value.dtype == torch.float32
            sums[name] = sums[name] + value if name in sums else value
    told = [weak if algorithm.views.inputs_need_targets else None for weak in said]
    mixed = [algorithm.mix(inputs, weak) for (inputs, _), weak in zip(cut, told, strict=True)]
    _observe(algorithm, sums, said, batch)
    parts = [_student(algorithm, batch, *pair) for pair in zip(mixed, said, strict=True)]
    algorithm.commit() if commit else algorithm.discard()
    names = parts[0].losses
    return Ran(
        *(
            [torch.cat(views) for views in zip(*(getattr(p, what) for p in parts), strict=True)]
            for what in ("inputs", "logits", "gradients")
        ),
        {name: torch.cat([p.notes[name] for p in parts]) for name in parts[0].notes},
        {name: sum(p.losses[name] for p in parts) for name in names},
    )


def _slice(batch: GlobalBatch, rank: int, ranks: int) -> tuple[StudentInputs, Tensor]:
    labeled, unlabeled = len(batch.labels) // ranks, len(batch.ids) // ranks
    x = torch.arange(rank * labeled, (rank + 1) * labeled)
    u = torch.arange(rank * unlabeled, (rank + 1) * unlabeled)
    u = u[batch.usable[u]]
    inputs = StudentInputs(
        batch.labeled[x],
        batch.labels[x],
        tuple(view[u] for view in batch.student_weak),
        tuple(view[u] for view in batch.strong),
        tuple(view[x] for view in batch.strong_labeled),
        tuple(view[u] for view in batch.weak),
        Places(x, u, len(batch.labels), len(batch.ids), seed=7, step=batch.step),
    )
    return inputs, batch.ids[u]


def _say(
    algorithm: Algorithm, batch: GlobalBatch, inputs: StudentInputs, ids: Tensor
) -> WeakOutputs | None:
    if not inputs.weak:
        return None
    model = batch.target if algorithm.views.teacher else batch.student
    first, *others = [view @ model for view in inputs.weak]
    labeled = inputs.labeled @ model if algorithm.views.labeled_targets else None
    return WeakOutputs(first, ids, tuple(others), labeled, inputs.labels, inputs.places)


def _observe(
    algorithm: Algorithm,
    sums: dict[str, Tensor],
    said: list[WeakOutputs | None],
    batch: GlobalBatch,
) -> None:
    logits = [part for weak in said if weak for part in weak.all]
    algorithm.observe(sums, batch.usable.sum().float().clamp(min=1))
    finite = all(bool(part.isfinite().all()) for part in logits)
    algorithm.sound = torch.tensor(finite and bool(batch.usable.any()))
    algorithm.pending = {
        name: torch.where(algorithm.sound, value, algorithm.state[name])
        for name, value in algorithm.pending.items()
    }


def _student(
    algorithm: Algorithm, batch: GlobalBatch, inputs: StudentInputs, weak: WeakOutputs | None
) -> Ran:
    parts = inputs.parts
    logits = [(part @ batch.student).requires_grad_() for part in parts]
    ends = np.cumsum([1, len(inputs.student_weak), len(inputs.strong)])
    outputs = StudentOutputs(
        logits[0],
        inputs.labels,
        tuple(logits[ends[1] : ends[2]]),
        weak,
        torch.tensor(float(len(batch.labels))),
        batch.usable.sum().float().clamp(min=1),
        tuple(logits[ends[0] : ends[1]]),
        tuple(logits[ends[2] :]),
        inputs.notes,
    )
    terms, again = (algorithm.loss(outputs, {}) for _ in range(2))
    both = torch.stack([terms.total(1), again.total(1)]).nan_to_num()
    assert both[0] == both[1], "a second call gives another loss"
    assert not any(t.requires_grad for t in (weak.all if weak else ()))
    gradients = torch.autograd.grad(terms.total(1), logits, allow_unused=True)
    losses = {name: value.item() for name, value in terms.contributions(1).items()}
    filled = [
        torch.zeros_like(p) if g is None else g for p, g in zip(logits, gradients, strict=True)
    ]
    return Ran(parts, logits, filled, dict(inputs.notes), losses)


def with_nan(batch: GlobalBatch) -> GlobalBatch:
    """The same batch, one of whose target views is not finite."""
    broken = batch.weak[0].clone()
    broken[3] = float("nan")
    return replace(batch, weak=[broken, *batch.weak[1:]])


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-sum_c t_c log p_c per row, and its gradient to the logits; targets are soft."""
    p = softmax(logits)
    return -(targets * np.log(p)).sum(axis=1), p * targets.sum(axis=1, keepdims=True) - targets


def squared_error(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mean_c (p_c - t_c)^2 per row, and its gradient to the logits."""
    p = softmax(logits)
    slope = 2 * (p - targets) / p.shape[1]  # to p
    return ((p - targets) ** 2).mean(axis=1), p * (slope - (slope * p).sum(axis=1, keepdims=True))
