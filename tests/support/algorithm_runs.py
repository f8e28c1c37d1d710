"""Steps of an algorithm on a global batch that several ranks share, without a process for each.

Does what `hpdist.train.step` does, with a linear model whose features are its inputs, and keeps
what a test wants to look at. Inputs are vectors, or small images for algorithms that rotate them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hpdist.algorithms import Algorithm, StudentOutputs, WeakOutputs
from hpdist.algorithms.base import HeadOutputs, Places, StudentInputs
from tests.support.algorithm_batches import softmax

FEATURES = 6
IMAGE = (1, 3, 3)


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
    heads: dict[str, torch.nn.Module] = field(default_factory=dict)
    labeled_ids: Tensor = field(default_factory=lambda: torch.zeros(0).long())


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

    shape = IMAGE if "rotation" in algorithm.head_names else (FEATURES,)
    features = math.prod(shape)

    def rows(count: int, *shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    views = algorithm.views
    usable = torch.ones(unlabeled, dtype=torch.bool)
    usable[list(unusable)] = False
    labels = torch.randint(classes, (labeled,), generator=generator)
    return GlobalBatch(
        rows(labeled, *shape),
        torch.zeros_like(labels) if one_class else labels,
        [rows(unlabeled, *shape) for _ in range(views.weak)],
        [rows(unlabeled, *shape) for _ in range(views.student_weak)],
        [rows(unlabeled, *shape) for _ in range(views.strong)],
        [rows(labeled, *shape) for _ in range(views.strong_labeled)],
        torch.randperm(unlabeled * 2, generator=generator)[:unlabeled],
        usable,
        rows(features, classes),
        rows(features, classes) if views.teacher else torch.zeros(0),
        seed,
        make_heads(algorithm, features),
        torch.randperm(4 * labeled, generator=generator)[:labeled] + 2**30,
    )


def make_heads(algorithm: Algorithm, features: int = FEATURES) -> dict[str, torch.nn.Module]:
    """Those that it wants, the same in every call."""
    torch.manual_seed(3)
    algorithm.input_shape = torch.Size([features])
    made = algorithm.heads(torch.Size([features]))
    own = {name: torch.nn.Linear(features, 3) for name in algorithm.head_names}  # of the model
    return {name: made.get(name, own[name]) for name in algorithm.head_names}


@dataclass
class Ran:
    """A step as it went: tensors in the order of the global batch, views one after the other."""

    inputs: list[Tensor] = field(default_factory=list)  # what the student saw, part by part
    logits: list[Tensor] = field(default_factory=list)  # what it said, part by part
    gradients: list[Tensor] = field(default_factory=list)  # of the loss, to the logits
    notes: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    heads: dict[str, list[Tensor]] = field(default_factory=dict)  # what they said, part by part
    head_gradients: dict[str, list[Tensor]] = field(default_factory=dict)

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
    mixed = [_mixed(algorithm, batch, *pair) for pair in zip(cut, said, strict=True)]
    _observe(algorithm, sums, said, batch)
    pairs = zip(mixed, said, strict=True)
    outputs = [_outputs(algorithm, batch, *pair) for pair in pairs]
    parts = _judge(algorithm, outputs, mixed)
    algorithm.commit() if commit else algorithm.discard()
    return Ran(
        *(_joined([getattr(part, what) for part in parts]) for what in _VIEWS),
        {name: torch.cat([p.notes[name] for p in parts]) for name in parts[0].notes},
        {name: sum(p.losses[name] for p in parts) for name in parts[0].losses},
        *(
            {name: _joined([getattr(p, what)[name] for p in parts]) for name in batch.heads}
            for what in ("heads", "head_gradients")
        ),
    )


_VIEWS = ("inputs", "logits", "gradients")


def _joined(parts: list[list[Tensor]]) -> list[Tensor]:
    """Of each view, the rows of all parts."""
    return [torch.cat(views) for views in zip(*parts, strict=True)]


def _mixed(
    algorithm: Algorithm,
    batch: GlobalBatch,
    cut: tuple[StudentInputs, Tensor],
    weak: WeakOutputs | None,
) -> StudentInputs:
    inputs = cut[0]
    if algorithm.views.probed and weak is not None:
        inputs = algorithm.perturb(inputs, weak, lambda rows: _said(rows, batch.student))
    return algorithm.mix(inputs, weak if algorithm.views.inputs_need_targets else None)


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
        ids=batch.ids[u],
    )
    return inputs, batch.ids[u]


def _say(
    algorithm: Algorithm, batch: GlobalBatch, inputs: StudentInputs, ids: Tensor
) -> WeakOutputs | None:
    if not inputs.weak:
        return None
    model = batch.target if algorithm.views.teacher else batch.student
    first, *others = [_said(view, model) for view in inputs.weak]
    labeled = _said(inputs.labeled, model) if algorithm.views.labeled_targets else None
    views = [*inputs.weak, *([] if labeled is None else [inputs.labeled])]
    with torch.no_grad():
        features = [view.flatten(1) for view in views]
        heads = {name: tuple(head(f) for f in features) for name, head in batch.heads.items()}
    said = WeakOutputs(first, ids, tuple(others), labeled, inputs.labels, inputs.places, heads)
    return replace(said, labeled_ids=batch.labeled_ids[inputs.places.labeled])


def _said(rows: Tensor, model: Tensor) -> Tensor:
    """Logits of rows."""
    return rows.flatten(1) @ model


def _observe(
    algorithm: Algorithm,
    sums: dict[str, Tensor],
    said: list[WeakOutputs | None],
    batch: GlobalBatch,
) -> None:
    logits = [part for weak in said if weak for part in weak.everything]
    algorithm.observe(sums, batch.usable.sum().float().clamp(min=1))
    finite = all(bool(part.isfinite().all()) for part in logits)
    algorithm.sound = torch.tensor(finite and bool(batch.usable.any()))
    algorithm.pending = {
        name: torch.where(algorithm.sound, value, algorithm.state[name])
        for name, value in algorithm.pending.items()
    }


def _outputs(
    algorithm: Algorithm, batch: GlobalBatch, inputs: StudentInputs, weak: WeakOutputs | None
) -> StudentOutputs:
    own = _by_view([_said(part, batch.student) for part in inputs.parts], inputs)
    with torch.no_grad():
        features = [part.flatten(1) for part in inputs.parts]
        heads = {name: [head(part) for part in features] for name, head in batch.heads.items()}
    return StudentOutputs(
        own.labeled,
        inputs.labels,
        own.strong,
        weak,
        torch.tensor(float(len(batch.labels))),
        batch.usable.sum().float().clamp(min=1),
        own.student_weak,
        own.strong_labeled,
        inputs.notes,
        own.further,
        {name: _by_view(parts, inputs) for name, parts in heads.items()},
    )


def _by_view(parts: list[Tensor], inputs: StudentInputs) -> HeadOutputs:
    leaves = iter([part.detach().requires_grad_() for part in parts])
    counts = (inputs.student_weak, inputs.strong, inputs.strong_labeled, inputs.further)
    return HeadOutputs(next(leaves), *(tuple(next(leaves) for _ in part) for part in counts))


def _leaves(outputs: StudentOutputs | HeadOutputs) -> list[Tensor]:
    views = (outputs.student_weak, outputs.strong, outputs.strong_labeled, outputs.further)
    return [outputs.labeled, *(leaf for view in views for leaf in view)]


def _judge(
    algorithm: Algorithm, outputs: list[StudentOutputs], inputs: list[StudentInputs]
) -> list[Ran]:
    """The loss of every part, and its gradient."""
    local = [algorithm.student_statistics(part) for part in outputs]
    total = {name: sum(part[name].detach() for part in local) for name in local[0]}
    found = []
    for part, own, seen in zip(outputs, local, inputs, strict=True):
        sums = {n: total[n] + len(outputs) * (v - v.detach()) for n, v in own.items()}
        terms, again = (algorithm.loss(part, sums) for _ in range(2))
        losses = [t.total(len(outputs)) for t in (terms, again)]
        both = torch.stack(losses).nan_to_num()
        assert both[0] == both[1], "a second call gives another loss"
        assert not any(t.requires_grad for t in (part.weak.everything if part.weak else ()))
        groups = {"": _leaves(part)} | {name: _leaves(h) for name, h in part.heads.items()}
        leaves = [leaf for group in groups.values() for leaf in group]
        gradients = iter(torch.autograd.grad(losses[0], leaves, allow_unused=True))
        filled = {
            name: [
                torch.zeros_like(leaf) if gradient is None else gradient
                for leaf, gradient in zip(group, gradients, strict=False)
            ]
            for name, group in groups.items()
        }
        named = {n: v.item() for n, v in terms.contributions(len(outputs)).items()}
        ran = Ran(seen.parts, groups.pop(""), filled.pop(""), dict(part.notes), named)
        found.append(replace(ran, heads=groups, head_gradients=filled))
    return found


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


def check_rotation(
    ran: Ran, batch: GlobalBatch, name: str, view: Tensor, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """That the last further input is a view with each row turned, and its head's gradient.

    Gives the turned rows, flattened, and the cross-entropy of each.
    """
    usable = batch.usable.nonzero().flatten()
    at = Places(torch.arange(0), usable, 0, len(batch.ids), seed=7, step=batch.step)
    turns = np.floor(4 * at.noise(f"{name} rotation", 1)[:, 0].numpy()).astype(int)
    assert len(set(turns)) > 2
    images = view[batch.usable].double().numpy()
    turned = [np.rot90(image[0], k).ravel() for image, k in zip(images, turns, strict=True)]
    *others, said = [part.detach().double().numpy() for part in ran.heads["rotation"]]
    assert said.shape == (len(turns), 4)
    errors, slopes = cross_entropy(said, np.eye(4)[turns])
    *none, found = ran.head_gradients["rotation"]
    assert len(none) == len(others)
    assert not any(part.any() for part in none)
    np.testing.assert_allclose(found, weight * slopes / len(turns), rtol=1e-3, atol=1e-7)
    return np.stack(turned), errors
