"""RegMixMatch and ResizeMix, row by row in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hpdist.algorithms import RegMixMatch, WeakOutputs
from hpdist.algorithms.base import Places, StudentInputs
from hpdist.algorithms.mixing import BETA_NUMBERS, beta
from hpdist.algorithms.regmixmatch import RegMixMatchConfig
from hpdist.algorithms.resizemix import resize_mix
from hpdist.data.random import stream_id, uniform
from tests import lockstep
from tests.algorithm_batches import softmax
from tests.algorithm_runs import GlobalBatch, cross_entropy, global_batch, run, squared_error
from tests.catalogue import build
from tests.recipes import make_step

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


def draws(places: Places, high_alpha: float, low_alpha: float) -> list[np.ndarray]:
    """Uniform numbers [rows, 4], and both kinds of shares."""
    noise = places.noise("regmixmatch", 4 + 2 * BETA_NUMBERS)
    plain, *numbers = noise.split([4, BETA_NUMBERS, BETA_NUMBERS], dim=1)
    shares = [beta(n, a, a) for n, a in zip(numbers, (high_alpha, low_alpha), strict=True)]
    return [part.double().numpy() for part in (plain, *shares)]


class Reference:
    """The algorithm in NumPy, with its state."""

    def __init__(self, **options) -> None:
        self.options = options
        self.threshold, self.mean = 1 / CLASSES, np.full(CLASSES, 1 / CLASSES)
        self.histogram = np.full(CLASSES, 1 / CLASSES)

    def partner(self, row: int, p: np.ndarray, noise: np.ndarray, pool: list) -> int | None:
        """Which of the pool's (group, confident, class) the row is mixed with."""
        o = self.options
        classes = p.argmax(axis=1)
        high = p[row].max() >= o["confident"]
        possible = [
            j
            for j, (group, confident, _) in enumerate(pool)
            if group == pool[row][0] and confident and j != row
        ]
        alike = [j for j in possible if pool[j][2] == classes[row]]
        if not high and noise[row, 1] < o["same_class"] and alike:
            possible = alike
        return possible[int(noise[row, 0] * len(possible))] if possible else None

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
        places = Places(torch.arange(LABELED), usable, LABELED, ROWS, seed=7, step=batch.step)
        noise, high_shares, low_shares = draws(places, o["high_alpha"], o["low_alpha"])
        x, labels = batch.labeled.double().numpy(), batch.labels.numpy()
        pool = [
            (int(u) * GROUPS // ROWS, c >= o["confident"], k)
            for u, c, k in zip(usable, confidence, classes, strict=True)
        ]
        inputs = list(strong)
        if o["labeled_partners"]:
            pool += [(i * GROUPS // LABELED, True, labels[i]) for i in range(LABELED)]
            inputs += list(x)
        mixed, mixed_slopes, totals, kinds = [], np.zeros((n, CLASSES)), [0.0, 0.0], [0, 0, 0]
        for row in range(n):
            high = confidence[row] >= o["confident"]
            partner = self.partner(row, p, noise, pool)
            share = (high_shares if high else low_shares)[row]
            other = row if partner is None else partner
            mixed.append(share * strong[row] + (1 - share) * inputs[other])
            if partner is None:
                kinds[2] += 1
                continue
            own = ONE_HOT[classes[row]] if high else p[row]
            label = share * own + (1 - share) * ONE_HOT[pool[partner][2]]
            loss = cross_entropy if high else squared_error
            values, slopes = loss(mixed[-1][None] @ model, label[None])
            scale = 1.0 if high else confidence[row] ** 3
            weight = o["high_weight"] if high else o["low_weight"]
            totals[not high] += weight * scale * values[0] / n
            mixed_slopes[row] = weight * scale * slopes[0] / n
            kinds[not high] += 1
        supervised, x_slopes = cross_entropy(x @ model, ONE_HOT[labels])
        return {
            "supervised_loss": supervised.mean(),
            "unsupervised_loss": (mask * losses).mean(),
            "fairness_loss": o["fairness_weight"] * fairness,
            "srm_loss": totals[0],
            "cam_loss": totals[1],
            "confident_rate": (confidence >= o["confident"]).mean(),
            "mixed": np.array(mixed),
            "slopes": [x_slopes / LABELED, strong_slopes, mixed_slopes],
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
    "labeled_partners": False,
}


def make_batch(algorithm: RegMixMatch, step: int, unusable: tuple[int, ...] = ()) -> GlobalBatch:
    return global_batch(algorithm, step, labeled=LABELED, unlabeled=ROWS, unusable=unusable)


@pytest.mark.parametrize("labeled_partners", [False, True])
@pytest.mark.parametrize("unusable", [(), (0, 3, 9, 10, 11, 12, 13, 14, 15)])
def test_over_several_steps(labeled_partners: bool, unusable: tuple[int, ...]) -> None:
    options = OPTIONS | {"labeled_partners": labeled_partners}
    algorithm, reference = RegMixMatch(CLASSES, **options, groups=GROUPS), Reference(**options)
    kinds = np.zeros(3)
    for step in range(5):
        batch = make_batch(algorithm, step, unusable)
        ran, expected = run(algorithm, batch), reference.step(batch)
        kinds += expected.pop("kinds")
        np.testing.assert_allclose(ran.arrays("inputs")[2], expected.pop("mixed"), atol=1e-5)
        assert len(ran.gradients) == 3
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
    high, low, alone = kinds
    assert high > 15
    assert low > 15
    assert bool(alone) != labeled_partners


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
        {"labeled_partners": True},
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
    assert ran.losses["cam_loss"] == 0
    assert bool(ran.losses["srm_loss"] > 0) == (confident == 0)
    assert bool(ran.gradients[2].abs().sum() > 0) == (confident == 0)
    assert len(ran.inputs[2]) == ROWS


def of_images(algorithm: RegMixMatch, logits: Tensor, ranks: int, step: int) -> StudentInputs:
    """What the student sees of images, all ranks' joined."""
    generator = torch.Generator().manual_seed(1)
    weak, strong = (torch.rand(ROWS, 3, 12, 10, generator=generator) for _ in range(2))
    labels = torch.randint(CLASSES, (LABELED,), generator=generator)
    labeled = torch.rand(LABELED, 3, 12, 10, generator=generator)
    parts = []
    for rank in range(ranks):
        x, u = (torch.arange(n).chunk(ranks)[rank] for n in (LABELED, ROWS))
        places = Places(x, u, LABELED, ROWS, seed=7, step=step)
        inputs = StudentInputs(labeled[x], labels[x], (), (strong[u],), (), (weak[u],), places)
        parts.append(algorithm.mix(inputs, WeakOutputs(logits[u], u, places=places)))
    return replace(
        parts[0],
        strong=(strong,),
        further=(torch.cat([part.further[0] for part in parts]),),
        notes={name: torch.cat([part.notes[name] for part in parts]) for name in parts[0].notes},
    )


@pytest.mark.parametrize("step", [0, 1])
def test_images_are_pasted(step: int) -> None:
    algorithm = RegMixMatch(CLASSES, **OPTIONS, groups=GROUPS)
    logits = 2.5 * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(step))
    found = of_images(algorithm, logits, 1, step)
    places = Places(torch.arange(LABELED), torch.arange(ROWS), LABELED, ROWS, seed=7, step=step)
    noise, high_draws, low_draws = draws(places, OPTIONS["high_alpha"], OPTIONS["low_alpha"])
    p = softmax(logits.double().numpy())
    confidence, classes = p.max(axis=1), p.argmax(axis=1)
    pool = [(i * GROUPS // ROWS, confidence[i] >= 0.9, classes[i]) for i in range(ROWS)]
    strong = found.strong[0].double().numpy()
    mixed = 0
    for row in range(ROWS):
        high = confidence[row] >= 0.9
        partner = Reference(**OPTIONS).partner(row, p, noise, pool)
        side = 0.1 + 0.7 * (high_draws if high else low_draws)[row] ** 0.5
        other = row if partner is None else partner
        centre = torch.from_numpy(noise[row, 2:])
        image, share = paste(strong[row], strong[other], side, centre)
        np.testing.assert_allclose(found.further[0][row].double().numpy(), image)
        if partner is not None:
            own = ONE_HOT[classes[row]] if high else p[row]
            label = share * own + (1 - share) * ONE_HOT[classes[partner]]
            np.testing.assert_allclose(found.notes["mixed labels"][row].numpy(), label, atol=1e-6)
            mixed += 1
    assert mixed > 20
    for ranks in (2, 4):
        other_ranks = of_images(algorithm, logits, ranks, step)
        assert torch.equal(other_ranks.further[0], found.further[0])
        for name, value in found.notes.items():
            torch.testing.assert_close(other_ranks.notes[name], value)


def test_accumulation_does_not_matter_in_a_real_step() -> None:
    whole, cut = (
        make_step(build("regmixmatch"), micro_batches=parts, smooth=True) for parts in (1, 4)
    )
    recorded = lockstep.record(whole, range(5))
    assert lockstep.follow(cut, recorded) == {}
    held = [step.metrics for step in recorded.firm.values()]
    assert all(sum(r[name] for r in held) > 0 for name in ("srm_loss", "cam_loss"))
    assert any(0 < record["confident_rate"] < 1 for record in held)
