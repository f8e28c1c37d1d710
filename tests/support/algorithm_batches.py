"""Outputs of an imagined model for the tests of algorithms, and a step on them, cut into parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpdist.algorithms import Algorithm, LossTerms, StudentOutputs, Views
from hpdist.algorithms.exchange import StudentInputs
from hpdist.algorithms.positions import BatchPositions
from hpdist.algorithms.protocol import Attempt, MicroBatch
from hpdist.data.batch import STORED

CLASSES, LABELED, UNLABELED = 5, 8, 40


@dataclass
class Batch:
    """Logits of a global batch; leaves with gradient where the student has it."""

    labeled: Tensor
    labels: Tensor
    weak: Tensor
    weak_labeled: Tensor
    student_weak: Tensor
    strong: tuple[Tensor, Tensor]
    strong_labeled: Tensor
    ids: Tensor
    places: Tensor  # of the unlabelled rows in the global batch

    @property
    def leaves(self) -> dict[str, Tensor]:
        strong = {f"strong {i}": view for i, view in enumerate(self.strong)}
        names = ("labeled", "student_weak", "strong_labeled")
        return {name: getattr(self, name) for name in names} | strong

    def gradients(self) -> dict[str, np.ndarray]:
        """Of every leaf, zeros where nothing arrived, float64; forgotten afterwards."""
        found = {}
        for name, leaf in self.leaves.items():
            found[name] = numpy(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
            leaf.grad = None
        return found


def make_batch(
    seed: int = 0,
    *,
    classes: int = CLASSES,
    labeled: int = LABELED,
    unlabeled: int = UNLABELED,
    sharpness: float = 3.0,
    ids: Tensor | None = None,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def logits(rows: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(rows, classes, generator=generator)

    return Batch(
        labeled=logits(labeled).requires_grad_(),
        labels=torch.randint(classes, (labeled,), generator=generator),
        weak=logits(unlabeled, sharpness),
        weak_labeled=logits(labeled, sharpness),
        student_weak=logits(unlabeled, sharpness).requires_grad_(),
        strong=(logits(unlabeled).requires_grad_(), logits(unlabeled).requires_grad_()),
        strong_labeled=logits(labeled).requires_grad_(),
        ids=torch.randperm(200, generator=generator)[:unlabeled] if ids is None else ids,
        places=torch.arange(unlabeled),
    )


class Identity:
    """A model whose inputs are its outputs."""

    def __init__(self, batch: Batch, views: Views) -> None:
        self.batch = batch
        self.views = views

    def targets(self, micros: Sequence[MicroBatch]) -> list[Tensor | None]:
        """What is said of the weak views, and of the labelled rows if they are among them."""
        found: list[Tensor | None] = []
        for micro in micros:
            parts = list(micro.inputs.weak)
            if parts and self.views.labeled_targets:
                parts.append(self.batch.weak_labeled[micro.inputs.positions.labeled])
            found.append(torch.cat(parts) if parts else None)
        return found

    def student(self, micro: MicroBatch) -> tuple[Tensor, None]:
        return self.preview(micro), None

    def preview(self, micro: MicroBatch) -> Tensor:
        return torch.cat(micro.inputs.parts)

    def probe(self, inputs: Tensor) -> Tensor:
        return inputs


def attempt(algorithm: Algorithm, batch: Batch, parts: int = 1) -> Attempt:
    """A step on the batch, cut into several equal slices."""
    micros = [_slice(batch, algorithm.views, part, parts) for part in range(parts)]
    return Attempt(algorithm, micros, Identity(batch, algorithm.views), parts=parts)


def _slice(batch: Batch, views: Views, part: int, parts: int) -> MicroBatch:
    x_rows, u_rows = len(batch.labels), len(batch.ids)
    x = slice(part * x_rows // parts, (part + 1) * x_rows // parts)
    u = slice(part * u_rows // parts, (part + 1) * u_rows // parts)
    slots = int(batch.places.max()) + 1 if u_rows else 4
    places = BatchPositions(torch.arange(x_rows)[x], batch.places[u], x_rows, slots, seed=0, step=0)
    inputs = StudentInputs(
        batch.labeled[x],
        batch.labels[x],
        (batch.student_weak[u],) * views.student_weak,
        tuple(view[u] for view in batch.strong[: views.strong]),
        (batch.strong_labeled[x],) * views.strong_labeled,
        (batch.weak[u],) * views.weak,
        places,
        ids=batch.ids[u],
        context=_stored(batch, u) if views.stored_labels else {},
    )
    return MicroBatch(inputs, batch.ids[u], None, len(batch.ids[u]))


def _stored(batch: Batch, rows: slice) -> dict[str, Tensor]:
    """Stored labels of rows: the softmax of their weak view."""
    probabilities = batch.weak[rows].detach().softmax(dim=-1)
    confidence = probabilities.amax(dim=-1)
    found = {
        "probabilities": probabilities,
        "confidence": confidence,
        "agreement": torch.ones_like(confidence),
    }
    return {STORED + name: kept for name, kept in found.items()}


def outputs(batch: Batch, views: Views, part: int = 0, parts: int = 1) -> StudentOutputs:
    """What a rank sees: one of several equal slices."""
    algorithm = Algorithm()
    algorithm.views = views  # type: ignore[misc]
    made = attempt(algorithm, batch, parts)
    made.begin()
    made.observe()
    return made.student_outputs(part, made.model.preview(made.micros[part]))


def run(algorithm: Algorithm, batch: Batch, parts: int = 1) -> LossTerms:
    """What a step does up to the loss; the terms summed over the parts, backward done."""
    made = attempt(algorithm, batch, parts)
    made.begin()
    terms = []
    for number in range(parts):
        terms.append(made.judge(number))
        loss = terms[-1].total(parts)
        if loss.requires_grad:
            loss.backward(retain_graph=True)
    return _sum(terms)


def _sum(terms: list[LossTerms]) -> LossTerms:
    first = terms[0]
    return LossTerms(
        supervised=sum(t.supervised for t in terms),
        unsupervised=sum(t.unsupervised for t in terms),
        unsupervised_weight=first.unsupervised_weight,
        extras={name: sum(t.extras[name] for t in terms) for name in first.extras},
        global_extras=first.global_extras,
        metrics={name: sum(t.metrics[name] for t in terms) for name in first.metrics},
    )


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of each row, with labels or with probabilities."""
    if targets.ndim == 1:
        targets = onehot(targets, logits.shape[1])
    return -(targets * np.log(softmax(logits))).sum(axis=1)


def onehot(labels: np.ndarray, classes: int = CLASSES) -> np.ndarray:
    return np.eye(classes)[labels]


def assert_gradients(batch: Batch, **expected: np.ndarray) -> None:
    """Of the leaves named; exactly zero of every other one."""
    for name, found in batch.gradients().items():
        wanted = expected.get(name)
        if wanted is None:
            assert not found.any(), name
        else:
            assert np.abs(wanted).sum() > 0, name
            np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-7, err_msg=name)
