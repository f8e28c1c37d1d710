"""RegMixMatch and ResizeMix, row by row in float64."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpdist.algorithms import RegMixMatch, WeakOutputs
from hpdist.algorithms.exchange import StudentInputs
from hpdist.algorithms.parts.mixing import BETA_NUMBERS, beta
from hpdist.algorithms.parts.resizemix import resize_mix
from hpdist.algorithms.positions import BatchPositions
from hpdist.algorithms.regmixmatch import RegMixMatchConfig
from hpdist.data.random import stream_id, uniform
from tests.support import lockstep
from tests.support.algorithm_batches import softmax
from tests.support.algorithm_runs import (
    GlobalBatch,
    cross_entropy,
    global_batch,
    run,
    squared_error,
)
from tests.support.catalogue import build
from tests.support.recipes import make_step

CLASSES = 5
ROWS, LABELED, GROUPS = 32, 8, 4
ONE_HOT = np.eye(CLASSES)


def paste(image: np.ndarray, other: np.ndarray, side: float, centre: Tensor) -> tuple:
    """ResizeMix of one image [channels, height, width], pixel by pixel."""
    image, (height, width) = image.copy(), image.shape[1:]
    crop_h, crop_w = max(int(height * 0.9), 1), max(int(width * 0.9), 1)
    at_h, at_w = (height - crop_h) // 2, (width - crop_w) // 2
    middle = other[:, at_h : at_h + crop_h, at_w : at_w + crop_w]
    box_h, box_w = int(height * side), int(width * side)
    top = int(float(centre[0]) * height) - box_h // 2
    left = int(float(centre[1]) * width) - box_w // 2
    bottom, right = min(top + box_h, height), min(left + box_w, width)
    top, left = max(top, 0), max(left, 0)
    for y in range(top, bottom):
        for x in range(left, right):
            from_y = (y - top) * crop_h // (bottom - top)
            from_x = (x - left) * crop_w // (right - left)
            image[:, y, x] = middle[:, from_y, from_x]
    return image, 1 - (bottom - top) * (right - left) / (height * width)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (2, 11, 17), (1, 1, 1)])
def test_resize_mix_pixel_by_pixel(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.randn(40, *shape, generator=generator) for _ in range(2))
    sides = torch.linspace(0, 1, 40)
    centres = uniform(0, stream_id("test"), 0, torch.arange(40), 2)
    before = images.clone()
    mixed, shares = resize_mix(images, others, sides, centres)
    assert torch.equal(images, before)
    for row in range(40):
        pair = (images[row].double().numpy(), others[row].double().numpy())
        image, share = paste(*pair, float(sides[row]), centres[row])
        np.testing.assert_array_equal(mixed[row].double().numpy(), image)
        assert float(shares[row]) == pytest.approx(share)
    assert shares.min() < (0.5 if shape[1] > 1 else 1)
    assert shares[0] == 1


def test_a_pasted_image_is_the_whole_middle_made_smaller() -> None:
    """torch's own nearest pixels, where sizes divide."""
    other = torch.arange(100.0).view(1, 1, 10, 10)
    centre = torch.full((1, 2), 0.5)
    sides = torch.tensor([0.3])
    mixed, share = resize_mix(torch.zeros(1, 1, 10, 10), other, sides, centre)
    small = torch.nn.functional.interpolate(other[:, :, :9, :9], (3, 3), mode="nearest")
    assert torch.equal(mixed[:, :, 4:7, 4:7], small)
    assert float(share) == pytest.approx(0.91)
    assert mixed.count_nonzero() == 8 + int(small[0, 0, 0, 0] != 0)


def draws(
    positions: BatchPositions, high_alpha: float, low_alpha: float, labeled: bool = False
) -> list[np.ndarray]:
    """Uniform numbers [rows, 4], and both kinds of shares."""
    noise = positions.noise("regmixmatch", 4 + 2 * BETA_NUMBERS, labeled=labeled)
    plain, *numbers = noise.split([4, BETA_NUMBERS, BETA_NUMBERS], dim=1)
    shares = [beta(n, a, a) for n, a in zip(numbers, (high_alpha, low_alpha), strict=True)]
    return [part.double().numpy() for part in (plain, *shares)]


class Reference:
    """The algorithm in NumPy, with its state."""

    def __init__(self, **options) -> None:
        self.options = options
        self.threshold, self.mean = 1 / CLASSES, np.full(CLASSES, 1 / CLASSES)
        self.histogram = np.full(CLASSES, 1 / CLASSES)

    def partner(self, row: int, noise: np.ndarray, pool: list) -> int | None:
        """Which of the pool's (group, confident, class, labelled) the row is mixed with."""
        o = self.options
        own_group, high, own_class, _ = pool[row]
        labeled = o["labeled_mixed"] if high else o["labeled_partners"]
        possible = [
            j
            for j, (group, confident, _, is_labeled) in enumerate(pool)
            if group == own_group and (labeled if is_labeled else confident)
        ]
        if not high and noise[1] < o["same_class"]:
            possible = [j for j in possible if pool[j][2] == own_class]
        return possible[int(noise[0] * len(possible))] if possible else None

    def step(self, batch: GlobalBatch) -> dict:
        o = self.options
        m, model = o["momentum"], batch.student.double().numpy()
        usable = batch.usable.nonzero().flatten()
        weak, strong = (v[0][usable].double().numpy() for v in (batch.weak, batch.strong))
        n, p = len(usable), softmax(weak @ model)
        confidence, classes = p.max(axis=1), p.argmax(axis=1)
        count = np.bincount(classes, minlength=CLASSES)
        self.threshold = m * self.threshold + (1 - m) * confidence.mean()
        self.mean = m * self.mean + (1 - m) * p.mean(axis=0)
        self.histogram = m * self.histogram + (1 - m) * count / n
        mask = confidence >= self.threshold * self.mean[classes] / self.mean.max()
        losses, slopes = cross_entropy(strong @ model, ONE_HOT[classes])
        fairness, fair_slopes = self._fairness(softmax(strong @ model), mask)
        strong_slopes = (mask[:, None] * slopes) / n + o["fairness_weight"] * fair_slopes
        positions = BatchPositions(
            torch.arange(LABELED), usable, LABELED, ROWS, seed=7, step=batch.step
        )
        x, labels = batch.labeled.double().numpy(), batch.labels.numpy()
        pool = [
            (int(u) * GROUPS // ROWS, c >= o["confident"], k, False)
            for u, c, k in zip(usable, confidence, classes, strict=True)
        ]
        pool += [(i * GROUPS // LABELED, True, labels[i], True) for i in range(LABELED)]
        drawn = [
            draws(positions, o["high_alpha"], o["low_alpha"], labeled=x) for x in (False, True)
        ]
        noise, high_shares, low_shares = (np.concatenate(pair) for pair in zip(*drawn, strict=True))
        inputs, low = [*strong, *x], confidence < o["confident"]
        rejected = max(low.sum(), 1)
        cubes = (low * confidence**3).sum() / rejected  # one weight for all rejected rows
        count = n + (LABELED if o["labeled_mixed"] else 0)
        mixed, mixed_slopes, totals = [], np.zeros((count, CLASSES)), [0.0, 0.0]
        kinds = dict.fromkeys(("high", "low", "alone", "labelled partner"), 0)
        for row in range(count):
            high, partner = pool[row][1], self.partner(row, noise[row], pool)
            share = 1.0 if partner is None else (high_shares if high else low_shares)[row]
            other = row if partner is None else partner
            mixed.append(share * inputs[row] + (1 - share) * inputs[other])
            own = ONE_HOT[pool[row][2]] if high else p[row]
            label = share * own + (1 - share) * ONE_HOT[pool[other][2]]
            loss = cross_entropy if high else squared_error
            values, slopes = loss(mixed[-1][None] @ model, label[None])
            scale = o["high_weight"] / n
            if not high:
                weight = cubes if o["weighting"] == "mean" else confidence[row] ** 3
                scale = o["low_weight"] * weight / rejected
            totals[not high] += scale * values[0]
            mixed_slopes[row] = scale * slopes[0]
            kinds["high" if high else "low"] += 1
            kinds["alone"] += partner is None
            kinds["labelled partner"] += high and pool[other][3]
        supervised, x_slopes = cross_entropy(x @ model, ONE_HOT[labels])
        return {
            "supervised_loss": supervised.mean(),
            "unsupervised_loss": (mask * losses).mean(),
            "fairness_loss": o["fairness_weight"] * fairness,
            "srm_loss": totals[0],
            "cam_loss": totals[1],
            "confident_rate": (confidence >= o["confident"]).mean(),
            "mixed": np.split(np.array(mixed), [n]),
            "slopes": [x_slopes / LABELED, strong_slopes, *np.split(mixed_slopes, [n])],
            "kinds": kinds,
        }

    def _fairness(self, p: np.ndarray, mask: np.ndarray) -> tuple[float, np.ndarray]:
        expected = self.mean / self.histogram
        expected /= expected.sum()
        sums = (p * mask[:, None]).sum(axis=0)
        counts = np.bincount(p.argmax(axis=1)[mask], minlength=CLASSES)
        seen = counts > 0
        ratio = np.where(seen, sums / np.maximum(counts, 1), 0)
        observed = ratio / ratio.sum()
        loss = (expected * np.log(observed + 1e-12)).sum()
        slope = np.where(seen, expected / np.maximum(ratio, 1e-9), 0)
        slope = np.where(seen, slope - expected[seen].sum() / ratio.sum(), 0)
        slope = slope / np.maximum(counts, 1)
        return loss, mask[:, None] * p * (slope - (p * slope).sum(axis=1, keepdims=True))


OPTIONS = {
    "momentum": 0.4,
    "fairness_weight": 0.3,
    "confident": 0.9,
    "high_alpha": 0.8,
    "low_alpha": 6.0,
    "same_class": 0.5,
    "high_weight": 0.7,
    "low_weight": 2.0,
    "weighting": "mean",
    "labeled_partners": True,
    "labeled_mixed": False,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"labeled_mixed": True},
    {"weighting": "row"},
    {"labeled_partners": False},
    {"labeled_partners": False, "same_class": 0.0, "weighting": "row"},
]


def make_batch(algorithm: RegMixMatch, step: int, unusable: tuple[int, ...] = ()) -> GlobalBatch:
    return global_batch(algorithm, step, labeled=LABELED, unlabeled=ROWS, unusable=unusable)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("unusable", [(), (0, 3, 9, 10, 11, 12, 13, 14, 15)])
def test_over_several_steps(variant: dict[str, Any], unusable: tuple[int, ...]) -> None:
    options = OPTIONS | variant
    algorithm, reference = RegMixMatch(CLASSES, **options, groups=GROUPS), Reference(**options)
    kinds: Counter[str] = Counter()
    for step in range(5):
        batch = make_batch(algorithm, step, unusable)
        ran, expected = run(algorithm, batch, ranks=(1, 2, 4)[step % 3]), reference.step(batch)
        kinds.update(expected.pop("kinds"))
        parts = [part for part in expected["mixed"] if len(part)]
        for found, mixed in zip(ran.arrays("inputs")[2:], parts, strict=True):
            np.testing.assert_allclose(found, mixed, atol=1e-5)
        del expected["mixed"]
        expected["slopes"] = expected["slopes"][: 2 + len(parts)]
        for found, slopes in zip(ran.arrays("gradients"), expected.pop("slopes"), strict=True):
            assert np.abs(slopes).sum() > 0
            np.testing.assert_allclose(found, slopes, rtol=2e-3, atol=1e-6)
            assert not found[np.abs(slopes).sum(axis=1) == 0].any()
        for name, value in expected.items():
            assert ran.losses[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
        names = ("supervised_loss", "unsupervised_loss", "fairness_loss", "srm_loss", "cam_loss")
        assert ran.losses["loss"] == pytest.approx(sum(expected[n] for n in names), rel=1e-4)
        state = algorithm.state_dict()
        assert float(state["threshold"]) == pytest.approx(reference.threshold, rel=1e-5)
        np.testing.assert_allclose(state["probability"], reference.mean, rtol=1e-5)
        np.testing.assert_allclose(state["histogram"], reference.histogram, rtol=1e-5)
    assert kinds["high"] > 15
    assert kinds["low"] > 15
    assert kinds["alone"] > 0  # of its class there is none, or no confident one at all
    assert bool(kinds["labelled partner"]) == options["labeled_mixed"]


PLAIN = {"confident": 0.9, "momentum": 0.5, "low_weight": 10.0, "same_class": 0.0, "groups": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.1},
        {"unsupervised_weight": 2.0},
        {"fairness_weight": 0.5},
        {"max_threshold": 0.3},
        {"confident": 0.7},
        {"high_alpha": 8.0},
        {"low_alpha": 0.5},
        {"same_class": 1.0},
        {"high_weight": 2.0},
        {"low_weight": 2.0},
        {"labeled_partners": False},
        {"labeled_mixed": True},
        {"weighting": "row"},
        {"groups": 4},
    ],
    ids=str,
)
def test_every_option_changes_the_loss(change: dict[str, float]) -> None:
    plain, other = (
        RegMixMatchConfig(**PLAIN | options).build(CLASSES)  # type: ignore[arg-type]
        for options in ({}, change)
    )
    batches = [make_batch(plain, step) for step in range(3)]
    ran = [(run(plain, batch), run(other, batch)) for batch in batches]
    assert max(abs(one.losses["loss"] - two.losses["loss"]) for one, two in ran) > 1e-3


@pytest.mark.parametrize("confident", [0.0, 1.0])
def test_all_or_no_row_is_confident(confident: float) -> None:
    algorithm = RegMixMatch(CLASSES, confident=confident, groups=GROUPS)
    ran = run(algorithm, make_batch(algorithm, 0))
    assert ran.losses["confident_rate"] == 1 - confident
    assert bool(ran.losses["cam_loss"] > 0) == (confident == 1)
    assert bool(ran.losses["srm_loss"] > 0) == (confident == 0)
    assert bool(ran.gradients[2].abs().sum() > 0)
    assert len(ran.inputs[2]) == ROWS


@pytest.mark.parametrize(
    ("labels", "options", "mixed"),
    [
        (None, {}, False),
        (100 * CLASSES - 1, {}, False),
        (100 * CLASSES, {}, True),
        (100 * CLASSES, {"labeled_partners": False}, False),
        (100 * CLASSES, {"labeled_mixed": False}, False),
        (1, {"labeled_mixed": True}, True),
    ],
)
def test_labelled_rows_are_mixed_from_a_hundred_per_class(
    labels: int | None, options: dict[str, bool], mixed: bool
) -> None:
    algorithm = RegMixMatch(CLASSES, groups=GROUPS, **options)
    if labels is not None:
        counts = torch.zeros(CLASSES)
        counts[0] = labels  # it is the mean that counts
        algorithm.class_counts = counts
    for step in range(2):
        ran = run(algorithm, make_batch(algorithm, step))
        assert [len(part) for part in ran.inputs] == [LABELED, ROWS, ROWS, *[LABELED] * mixed]
        assert ("mixed labels of labelled rows" in ran.context) == mixed


def of_images(algorithm: RegMixMatch, logits: Tensor, ranks: int, step: int) -> StudentInputs:
    """What the student sees of images, all ranks' joined."""
    generator = torch.Generator().manual_seed(1)
    weak, strong = (torch.rand(ROWS, 3, 12, 10, generator=generator) for _ in range(2))
    labels = torch.randint(CLASSES, (LABELED,), generator=generator)
    labeled = torch.rand(LABELED, 3, 12, 10, generator=generator)
    parts = []
    for rank in range(ranks):
        x, u = (torch.arange(n).chunk(ranks)[rank] for n in (LABELED, ROWS))
        positions = BatchPositions(x, u, LABELED, ROWS, seed=7, step=step)
        inputs = StudentInputs(labeled[x], labels[x], (), (strong[u],), (), (weak[u],), positions)
        parts.append(algorithm.mix(inputs, WeakOutputs(logits[u], u, positions=positions)))
    return replace(
        parts[0],
        strong=(strong,),
        extra_inputs=(torch.cat([part.extra_inputs[0] for part in parts]),),
        context={
            name: torch.cat([part.context[name] for part in parts]) for name in parts[0].context
        },
    )


@pytest.mark.parametrize("step", [0, 1])
def test_images_are_pasted(step: int) -> None:
    options = OPTIONS | {"labeled_partners": False}  # labelled images are another draw
    algorithm = RegMixMatch(CLASSES, **options, groups=GROUPS)
    logits = 2.5 * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(step))
    found = of_images(algorithm, logits, 1, step)
    positions = BatchPositions(
        torch.arange(LABELED), torch.arange(ROWS), LABELED, ROWS, seed=7, step=step
    )
    noise, high_draws, low_draws = draws(positions, OPTIONS["high_alpha"], OPTIONS["low_alpha"])
    p = softmax(logits.double().numpy())
    confidence, classes = p.max(axis=1), p.argmax(axis=1)
    pool = [(i * GROUPS // ROWS, confidence[i] >= 0.9, classes[i], False) for i in range(ROWS)]
    strong = found.strong[0].double().numpy()
    mixed = 0
    for row in range(ROWS):
        high = confidence[row] >= 0.9
        partner = Reference(**options).partner(row, noise[row], pool)
        side = 0.1 + 0.7 * (high_draws if high else low_draws)[row] ** 0.5
        other = row if partner is None else partner
        centre = torch.from_numpy(noise[row, 2:])
        image, share = paste(strong[row], strong[other], side, centre)
        if partner is None:
            image, share = strong[row], 1.0
        np.testing.assert_allclose(found.extra_inputs[0][row].double().numpy(), image)
        own = ONE_HOT[classes[row]] if high else p[row]
        label = share * own + (1 - share) * ONE_HOT[classes[other]]
        np.testing.assert_allclose(found.context["mixed labels"][row].numpy(), label, atol=1e-6)
        mixed += partner is not None
    assert mixed > 20
    for ranks in (2, 4):
        other_ranks = of_images(algorithm, logits, ranks, step)
        assert torch.equal(other_ranks.extra_inputs[0], found.extra_inputs[0])
        for name, value in found.context.items():
            torch.testing.assert_close(other_ranks.context[name], value)


def test_accumulation_does_not_matter_in_a_real_step() -> None:
    whole, cut = (
        make_step(build("regmixmatch"), micro_batches=parts, smooth=True) for parts in (1, 4)
    )
    recorded = lockstep.record(whole, range(5))
    assert lockstep.follow(cut, recorded) == {}
    held = [step.metrics for step in recorded.firm.values()]
    assert all(sum(r[name] for r in held) > 0 for name in ("srm_loss", "cam_loss"))
    assert any(0 < record["confident_rate"] < 1 for record in held)
