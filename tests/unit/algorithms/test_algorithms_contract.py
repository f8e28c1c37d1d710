"""What every algorithm must keep to, whatever its formula."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from hpdist.algorithms import Algorithm, AlgorithmConfig
from hpdist.config.component import components
from tests.support.algorithm_batches import CLASSES, Batch, make_batch, outputs, run

pytestmark = pytest.mark.sampled

CONFIGS = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
VARIANTS = {name: config(name=name) for name, config in CONFIGS.items()} | {
    "uda tsa": CONFIGS["uda"](name="uda", annealing="log"),
}


def is_plain(algorithm: Algorithm) -> bool:
    """Whether the student sees the views as they are, and says no more than logits."""
    plain = type(algorithm).mix is Algorithm.mix and not algorithm.views.needs_gradient_probe
    return plain and not algorithm.head_names


NAMES = [name for name, config in VARIANTS.items() if is_plain(config.build(CLASSES))]


def build(name: str, classes: int = CLASSES) -> Algorithm:
    algorithm = VARIANTS[name].build(classes, steps=8)
    algorithm.rows = 200  # the ids of the batches are below that
    return algorithm


def snapshot(algorithm: Algorithm) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in algorithm.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_do_not_matter(name: str, parts: int) -> None:
    whole, cut = build(name), build(name)
    for seed in range(5):
        batch = make_batch(seed)
        alone = run(whole, batch)
        gradients = batch.gradients()
        together = run(cut, batch, parts)
        assert together.total(1).item() == pytest.approx(alone.total(1).item(), rel=1e-5)
        for key, value in alone.metrics.items():
            assert together.metrics[key].item() == pytest.approx(value.item(), rel=1e-5), key
        for key, value in batch.gradients().items():
            torch.testing.assert_close(
                torch.from_numpy(value), torch.from_numpy(gradients[key]), rtol=1e-4, atol=1e-7
            )
        whole.commit()
        cut.commit()
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(cut.state_dict()[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_final_on_commit_only(name: str) -> None:
    algorithm = build(name)
    run(algorithm, make_batch(0))
    algorithm.commit()
    before = snapshot(algorithm)
    run(algorithm, make_batch(1))
    assert_equal(before, algorithm.state_dict())
    algorithm.discard()
    assert_equal(before, algorithm.state_dict())
    run(algorithm, make_batch(1))
    algorithm.commit()
    after = algorithm.state_dict()
    if before:
        assert any(
            not torch.equal(v, after[k]) for k, v in before.items() if v.shape == after[k].shape
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_skipped_leaves_no_trace(name: str) -> None:
    skipping, plain = build(name), build(name)
    for seed in range(4):
        run(skipping, make_batch(seed + 100))
        skipping.discard()
        losses = [run(algorithm, make_batch(seed)).total(1) for algorithm in (skipping, plain)]
        assert torch.equal(*losses)
        skipping.commit()
        plain.commit()
    assert_equal(skipping.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_sums_that_are_not_sound_leave_no_trace(name: str) -> None:
    algorithm = build(name)
    if not algorithm.views.weak:
        pytest.skip("has no targets")
    run(algorithm, make_batch(0))
    algorithm.commit()
    before = snapshot(algorithm)
    batch = make_batch(1)
    batch.weak[3, 2] = batch.weak_labeled[1, 1] = float("nan")
    run(algorithm, batch)
    algorithm.commit()
    assert_equal(before, algorithm.state_dict())
    run(algorithm, make_batch(2))
    algorithm.commit()
    assert all(value.isfinite().all() for value in algorithm.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_round(name: str) -> None:
    algorithm, other = build(name), build(name)
    for seed in range(3):
        run(algorithm, make_batch(seed))
        algorithm.commit()
    state = snapshot(algorithm)
    other.load_state_dict(state)
    assert_equal(state, other.state_dict())
    losses = [run(a, make_batch(7)).total(1) for a in (algorithm, other)]
    assert torch.equal(*losses)
    algorithm.commit()
    other.commit()
    assert_equal(algorithm.state_dict(), other.state_dict())
    with pytest.raises(KeyError, match="nonsense"):
        other.load_state_dict(state | {"nonsense": torch.zeros(1)})


@pytest.mark.parametrize("name", NAMES)
def test_state_is_kept_exactly(name: str) -> None:
    """fp32, or integers: an average with momentum 0.999 never moves in half precision."""
    algorithm = build(name)
    run(algorithm, make_batch(0))
    algorithm.commit()
    exact = {torch.float32, torch.int16, torch.int64}
    assert {value.dtype for value in algorithm.state_dict().values()} <= exact


@pytest.mark.parametrize("name", NAMES)
def test_loss_can_be_asked_for_again(name: str) -> None:
    algorithm = build(name)
    batch = make_batch(3)
    first = run(algorithm, batch).total(1)
    part = outputs(batch, algorithm.views)
    again = algorithm.loss(part, algorithm.student_statistics(part)).total(1)
    assert torch.equal(first, again)


def certain(batch: Batch, label: int | None = None) -> Batch:
    """Every unlabelled row is certain, of one class or of its own."""
    labels = batch.weak.argmax(dim=1) if label is None else torch.full((len(batch.weak),), label)
    batch.weak = 40 * torch.nn.functional.one_hot(labels, batch.weak.shape[1]).float()
    with torch.no_grad():
        batch.student_weak.copy_(batch.weak)
    return batch


DEGENERATE = {
    "nothing passes": lambda: make_batch(0, sharpness=1e-3),
    "everything passes": lambda: certain(make_batch(0)),
    "one class only": lambda: certain(make_batch(0), 2),
    "two classes": lambda: make_batch(0, classes=2),
    "batch of one": lambda: make_batch(0, labeled=1, unlabeled=1),
    "no valid row": lambda: make_batch(0, unlabeled=0),
    "the same row over and over": lambda: make_batch(0, ids=torch.full((40,), 7)),
    "huge logits": lambda: make_batch(0, sharpness=1e4),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_batches(name: str, case: str) -> None:
    batch = DEGENERATE[case]()
    algorithm = build(name, batch.weak.shape[1])
    for _ in range(10):  # through warm-ups and ramps
        terms = run(algorithm, batch)
        named = {"total": terms.total(1), **terms.extras, **terms.global_extras, **terms.metrics}
        assert all(value.isfinite() for value in named.values()), named
        assert all(torch.from_numpy(g).isfinite().all() for g in batch.gradients().values())
        algorithm.commit()
        assert all(value.isfinite().all() for value in algorithm.state_dict().values())
        if "mask_rate" in terms.metrics:
            assert -1e-6 <= terms.metrics["mask_rate"] <= 1 + 1e-6
    if case == "no valid row":
        assert terms.unsupervised == 0
