"""The table of labels, FlexMatch and SequenceMatch, against a dict of rows and the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hpdist.algorithms import FlexMatch, SequenceMatch, WeakOutputs
from hpdist.algorithms.parts.tables import NEVER, UNSEEN, LabelTable, WholeShards
from hpdist.algorithms.positions import BatchPositions
from hpdist.errors import ConfigError
from tests.support.algorithm_batches import (
    CLASSES,
    LABELED,
    UNLABELED,
    Batch,
    assert_gradients,
    cross_entropy,
    make_batch,
    numpy,
    onehot,
    run,
    softmax,
)


def pack(
    ids: list[int], labels: list[int], positions: list[int] | None = None, rows: int = 8
) -> Tensor:
    where = (
        torch.arange(len(ids)) if positions is None else torch.tensor(positions, dtype=torch.int64)
    )
    at = BatchPositions(torch.arange(0), where, 0, rows, seed=0, step=0)
    weak = WeakOutputs(torch.zeros(len(ids), CLASSES), torch.tensor(ids).long(), positions=at)
    return LabelTable.pack(weak, torch.tensor(labels).long())


def change(table: LabelTable, packed: Tensor, *, is_finite: bool = True) -> list[int]:
    found = table.observe(packed)
    table.commit(torch.tensor(is_finite), None)
    return found[:-1].tolist()


def test_ranks_gather_by_adding() -> None:
    whole = pack([3, 5, 2**40 + 7], [1, NEVER, 4], [0, 1, 6])
    parts = [pack([3], [1], [0]), pack([5, 2**40 + 7], [NEVER, 4], [1, 6])]
    assert torch.equal(parts[0] + parts[1], whole)
    assert whole.dtype == torch.float32
    high, low, told = whole.long()
    assert ((high << 24) + low).tolist() == [3, 5, 0, 0, 0, 0, 2**40 + 7, 0]
    assert told.tolist() == [3, 1, 0, 0, 0, 0, 6, 0]


def test_counts_follow_the_labels() -> None:
    table = LabelTable(3)
    assert change(table, pack([0, 4, 2], [1, 1, NEVER])) == [0, 2, 0]
    assert table.labels().tolist()[:5] == [1, UNSEEN, NEVER, UNSEEN, 1]
    assert change(table, pack([4, 2], [2, 0])) == [1, -1, 1]
    assert change(table, pack([4], [NEVER])) == [0, 0, 0]  # what it once had stays
    assert table.labels().tolist()[:5] == [1, UNSEEN, 0, UNSEEN, 2]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([0, 1, 2], 2), ([2, 1, 0], 0), ([0, 1, NEVER], 1), ([NEVER, 2, NEVER], 2), ([1, 1, 1], 1)],
)
def test_of_one_row_in_several_places_the_last_label_wins(labels: list[int], expected: int) -> None:
    table = LabelTable(3)
    assert change(table, pack([6, 6, 6], labels)) == onehot(np.array(expected), 3).tolist()
    assert table.labels()[6] == expected
    assert table.observe(pack([6, 6, 1, 1], [0, 0, 0, NEVER]))[-1] == 1


def test_nothing_is_written_before_commit_nor_where_it_is_not_sound() -> None:
    table = LabelTable(3)
    change(table, pack([1], [0]))
    before = table.labels()
    table.observe(pack([1], [2]))
    assert torch.equal(table.labels(), before)
    table.discard()
    table.commit(torch.tensor(True), None)
    assert torch.equal(table.labels(), before)
    change(table, pack([1], [2]), is_finite=False)
    assert torch.equal(table.labels()[:2], before[:2])
    change(table, pack([], []))
    assert torch.equal(table.labels()[:2], before[:2])


def test_table_grows_and_keeps_what_it_has() -> None:
    table = LabelTable(3)
    sizes = []
    for row in [0, 1, 2, 5, 9, 30, 31, 200]:
        assert change(table, pack([row], [row % 3]))[row % 3] == 1
        sizes.append(len(table.labels()))
    assert sizes == [1, 2, 4, 8, 16, 32, 32, 201]
    assert {row: int(v) for row, v in enumerate(table.labels()) if v >= 0} == {
        row: row % 3 for row in [0, 1, 2, 5, 9, 30, 31, 200]
    }
    assert table.labels().dtype == torch.int16


def test_table_is_as_long_as_the_rows_that_are_known() -> None:
    table = LabelTable(3)
    table.observe(pack([2], [1]))
    table.commit(None, 1000)
    assert len(table.labels()) == 1000
    table.load(WholeShards({"labels": torch.tensor([0, NEVER], dtype=torch.int16)}))
    assert table.labels().tolist() == [0, NEVER]
    assert change(table, pack([0], [2])) == [-1, 0, 1]


def test_too_many_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="32767"):
        LabelTable(40_000)


MAPPINGS = {
    "convex": lambda x: x / (2 - x),
    "linear": lambda x: x,
    "concave": lambda x: math.log(x + 1) / math.log(2),
}


class Reference:
    """Equations 5 to 12 of the FlexMatch paper in float64, with a dict of rows."""

    def __init__(self, tau: float = 0.7, *, warmup=True, mapping="convex", rows=None) -> None:
        self.tau, self.warmup, self.mapping, self.rows = tau, warmup, MAPPINGS[mapping], rows
        self.selected: dict[int, int] = {}
        self.seen: set[int] = set()

    def thresholds(self) -> np.ndarray:
        sigma = [sum(v == c for v in self.selected.values()) for c in range(CLASSES)]
        rows = len(self.seen) if self.rows is None else self.rows
        most = max(*sigma, rows - sum(sigma)) if self.warmup else max(sigma)
        return np.array([self.tau * self.mapping(s / max(most, 1)) for s in sigma])

    def mask(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        q = softmax(numpy(batch.weak))
        confidence, pseudo = q.max(axis=1), q.argmax(axis=1)
        mask = confidence >= self.thresholds()[pseudo]
        for row, sure, label in zip(
            batch.ids.tolist(), confidence >= self.tau, pseudo, strict=True
        ):
            self.seen.add(row)
            if sure:
                self.selected[row] = int(label)
        return mask.astype(float), pseudo


OPTIONS = [
    {},
    {"warmup": False},
    {"rows": 60},
    {"rows": 70, "mapping": "concave"},
    {"mapping": "linear"},
]


def flex_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(60, (UNLABELED,), generator=generator)  # some of them twice
    batch = make_batch(seed, sharpness=1.5, ids=ids)
    batch.weak[:, 0] += 1.5  # the classes are not learned equally well
    return batch


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flexmatch_over_several_steps(options) -> None:
    algorithm = FlexMatch(CLASSES, threshold=0.7, unsupervised_weight=0.5, **options)
    reference = Reference(**options)
    rates = []
    for seed in range(8):
        batch = flex_batch(seed)
        terms = run(algorithm, batch)
        mask, pseudo = reference.mask(batch)
        strong = numpy(batch.strong[0])
        unsupervised = (mask * cross_entropy(strong, pseudo)).mean()
        supervised = cross_entropy(numpy(batch.labeled), batch.labels.numpy()).mean()
        assert terms.unsupervised.item() == pytest.approx(unsupervised, rel=1e-5)
        assert terms.total(1).item() == pytest.approx(supervised + 0.5 * unsupervised, rel=1e-5)
        rates.append(terms.metrics["mask_rate"].item())
        assert rates[-1] == pytest.approx(mask.mean(), abs=1e-6)
        labeled = softmax(numpy(batch.labeled)) - onehot(batch.labels.numpy())
        gradient = 0.5 * mask[:, None] * (softmax(strong) - onehot(pseudo)) / UNLABELED
        assert_gradients(batch, labeled=labeled / LABELED, **{"strong 0": gradient})
        algorithm.commit()
        sigma = [sum(v == c for v in reference.selected.values()) for c in range(CLASSES)]
        assert algorithm.state["counts"].tolist() == sigma
        assert algorithm.state["seen"].item() == len(reference.seen)
        labels = algorithm.state_dict()["labels"].tolist()
        assert {row: label for row, label in enumerate(labels) if label >= 0} == reference.selected
    assert rates[0] == 1  # no class is learned: every threshold is 0
    assert 0 < rates[-1] < 1


def test_flexmatch_hyperparameters_matter() -> None:
    changes = [{}, {"threshold": 0.5}, *OPTIONS[1:]]
    losses = []
    for options in changes:
        algorithm = FlexMatch(CLASSES, **{"threshold": 0.7, **options})
        own = []
        for seed in range(6):
            own.append(run(algorithm, flex_batch(seed)).total(1).item())
            algorithm.commit()
        losses.append(sum(own))
    assert len(set(losses)) == len(losses)


def test_flexmatch_state_of_another_length_is_taken_over() -> None:
    algorithm, other = FlexMatch(CLASSES, threshold=0.7), FlexMatch(CLASSES, rows=1000)
    run(algorithm, flex_batch(1))
    algorithm.commit()
    run(other, flex_batch(2))
    other.commit()
    kept = other.state_dict()["labels"].clone()
    run(other, flex_batch(3))
    other.commit()
    assert len(kept) == 1000
    other.load_state_dict(algorithm.state_dict())
    assert torch.equal(other.state_dict()["labels"], algorithm.state_dict()["labels"])
    with pytest.raises(KeyError, match="labels"):
        other.load_state_dict({k: v for k, v in algorithm.state_dict().items() if k != "labels"})


def test_labels_that_were_discarded_do_not_come_with_a_later_commit() -> None:
    algorithm = FlexMatch(CLASSES, threshold=0.7, rows=60)
    run(algorithm, flex_batch(0))
    algorithm.commit()
    before = algorithm.state_dict()
    run(algorithm, flex_batch(1))
    algorithm.discard()
    algorithm.commit()
    assert all(torch.equal(before[name], v) for name, v in algorithm.state_dict().items())


def test_a_copy_of_the_state_does_not_change_with_the_run() -> None:
    algorithm = FlexMatch(CLASSES, threshold=0.7)
    run(algorithm, flex_batch(0))
    algorithm.commit()
    state = algorithm.state_dict()
    copies = {name: value.clone() for name, value in state.items()}
    for seed in range(1, 4):
        run(algorithm, flex_batch(seed))
        algorithm.commit()
    assert all(torch.equal(copies[name], value) for name, value in state.items())


def test_flexmatch_rows_that_cannot_be_used_hold_a_place_and_nothing_else() -> None:
    whole, gaps = make_batch(1), make_batch(1)
    gaps.positions = torch.arange(UNLABELED) + 3 + (torch.arange(UNLABELED) > 10) * 5
    algorithms = [FlexMatch(CLASSES), FlexMatch(CLASSES)]
    for algorithm, batch in zip(algorithms, (whole, gaps), strict=True):
        run(algorithm, batch)
        algorithm.commit()
    one, other = (algorithm.state_dict() for algorithm in algorithms)
    assert all(torch.equal(one[name], other[name]) for name in one)


def kl(target_logits: np.ndarray, logits: np.ndarray, temperature: float) -> np.ndarray:
    q, p = softmax(target_logits / temperature), softmax(logits)
    return (q * np.log(q / p)).sum(axis=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.5},
        {"rejected_weight": 1.0},
        {"masking": "flexible"},
        {"masking": "flexible", "rejected_weight": 0.7},
    ],
    ids=str,
)
def test_sequencematch_over_several_steps(options) -> None:
    algorithm = SequenceMatch(CLASSES, threshold=0.7, unsupervised_weight=0.5, rows=60, **options)
    reference = Reference(rows=60)
    temperature = options.get("temperature", 0.5)
    rho = options.get("rejected_weight", 0.0)
    rates, disagreements = [], 0
    for seed in range(6):
        batch = flex_batch(seed)
        terms = run(algorithm, batch)
        mask, pseudo = reference.mask(batch)
        weak, medium, strong = (numpy(v) for v in (batch.weak, *batch.strong))
        by_weak, by_medium = mask, mask
        if options.get("masking") != "flexible":  # each by the teaching view's own confidence
            by_weak, by_medium = (
                (softmax(view).max(axis=1) >= 0.7).astype(float) for view in (weak, medium)
            )
        disagreements += (by_weak != mask).sum() + (by_medium != by_weak).sum()
        pairs = {
            "weak_medium_loss": by_weak * kl(weak, medium, temperature),
            "medium_strong_loss": by_medium * kl(medium, strong, temperature),
            "weak_strong_loss": by_weak * kl(weak, strong, temperature),
        }
        if rho:
            pairs["rejected_loss"] = rho * (1 - mask) * kl(weak, strong, temperature)
        assert terms.extras.keys() == pairs.keys()
        unsupervised = (mask * cross_entropy(strong, pseudo)).mean()
        assert terms.unsupervised.item() == pytest.approx(unsupervised, rel=1e-5)
        for name, values in pairs.items():
            assert terms.extras[name].item() == pytest.approx(0.5 * values.mean(), rel=1e-5), name
        q_weak, q_medium = softmax(weak / temperature), softmax(medium / temperature)
        m, w, q = (kept[:, None] for kept in (mask, by_weak, by_medium))
        to_medium = w * (softmax(medium) - q_weak)  # and nothing through the medium target
        p = softmax(strong)
        to_strong = m * (p - onehot(pseudo)) + q * (p - q_medium)
        to_strong += (w + rho * (1 - m)) * (p - q_weak)
        labeled = softmax(numpy(batch.labeled)) - onehot(batch.labels.numpy())
        assert_gradients(
            batch,
            labeled=labeled / LABELED,
            **{"strong 0": 0.5 * to_medium / UNLABELED, "strong 1": 0.5 * to_strong / UNLABELED},
        )
        algorithm.commit()
        rates.append(mask.mean())
    assert bool(disagreements) == (options.get("masking") != "flexible")
    assert 0 < rates[-1] < 1
