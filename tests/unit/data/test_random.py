"""Philox against its published vectors; draws that depend on nothing but what they are for."""

import math

import numpy as np
import pytest
import torch

from hpdist.data import random

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
@pytest.mark.parametrize("length", [1, 33])  # 33: both the vectorised loop and its remainder
def test_philox_known_answers(counter, key, expected, length):
    words = (np.full(length, word, np.uint64) for word in counter)
    result = random.philox(tuple(words), key)
    for word, answer in zip(result, expected, strict=True):
        assert word.tolist() == [answer] * length


def test_words_put_block_stream_step_position_in_the_counter_and_the_seed_in_the_key():
    (_, stream, step, position), (low, high), _ = KNOWN_ANSWERS[2]
    seed = (high << 32) | low
    drawn = random.words(seed, stream, step, torch.tensor([0, position]), 10)
    assert drawn.shape == (2, 10)
    for block in range(3):
        counter = tuple(np.array([word], np.uint64) for word in (block, stream, step, position))
        expected = np.concatenate(random.philox(counter, (low, high)))
        found = drawn[1, 4 * block : 4 * block + 4].numpy()
        assert np.array_equal(found, expected[: 10 - 4 * block])


def test_uniform_is_uniform():
    u = random.uniform(7, 1, 2, torch.arange(20_000), 10)
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    chi2 = ((counts - 2000) ** 2 / 2000).sum()  # 99 degrees of freedom
    assert 50 < chi2 < 165
    correlation = torch.corrcoef(u.T) - torch.eye(10)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)
    neighbours = torch.corrcoef(torch.stack((u[:-1, 0], u[1:, 0])))[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(20_000)


def test_uniform_stays_below_one(monkeypatch):
    everything = torch.tensor([[0, 2**32 - 1]])
    monkeypatch.setattr(random, "words", lambda *_: everything)
    assert random.uniform(0, 0, 0, torch.tensor([0]), 2).tolist() == [[0, 1 - 2**-24]]
    assert random.integers(0, 0, 0, torch.tensor([0]), 2, 2**31).tolist() == [[0, 2**31 - 1]]
    assert random.normal(0, 0, 0, torch.tensor([0]), 2).isfinite().all()


def test_integers_cover_their_range_evenly():
    drawn = random.integers(0, 1, 2, torch.arange(10_000), 7, 14)
    assert drawn.dtype == torch.int64
    counts = drawn.flatten().bincount()
    assert len(counts) == 14
    assert ((counts - 5000) ** 2 / 5000).sum() < 40  # 13 degrees of freedom


def test_normal_is_standard_normal():
    z = random.normal(0, 1, 2, torch.arange(20_000), 7)
    assert z.shape == (20_000, 7)
    assert z.dtype == torch.float32
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert (torch.corrcoef(z.T) - torch.eye(7)).abs().max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("draw", [random.uniform, random.normal])
def test_a_row_does_not_depend_on_its_batch(draw):
    positions = torch.arange(101)
    whole = draw(3, 4, 5, positions, 9)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(3, 4, 5, positions[order], 9), whole[order])
    parts = [draw(3, 4, 5, part, 9) for part in positions.split([1, 7, 40, 53])]
    assert torch.equal(torch.cat(parts), whole)


def test_a_draw_does_not_depend_on_how_many_follow():
    positions = torch.arange(5)
    assert torch.equal(
        random.uniform(0, 1, 2, positions, 3), random.uniform(0, 1, 2, positions, 9)[:, :3]
    )


def test_everything_named_changes_every_draw():
    names = {"seed": 1, "stream": 2, "step": 3}
    positions = torch.arange(100)
    base = random.words(**names, positions=positions, count=8)
    others = [{**names, name: value + 1} for name, value in names.items()]
    others.append({**names, "seed": 1 + 2**32})  # the seed's high word counts too
    for other in others:
        assert (random.words(**other, positions=positions, count=8) != base).all()
    assert (random.words(**names, positions=positions + 100, count=8) != base).all()


def test_empty_batch():
    assert random.uniform(0, 0, 0, torch.arange(0), 5).shape == (0, 5)
    assert random.normal(0, 0, 0, torch.arange(0), 5).shape == (0, 5)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stream": 2**32}, "stream"),
        ({"step": 2**32}, "step"),
        ({"positions": torch.tensor([-1])}, "positions"),
        ({"positions": torch.tensor([2**32])}, "positions"),
        ({"positions": torch.tensor([1], dtype=torch.int32)}, "positions"),
        ({"positions": torch.tensor(1)}, "positions"),
        ({"positions": torch.tensor([1], device="meta")}, "positions"),
    ],
)
def test_out_of_range_is_refused(changed, named):
    good = {"seed": 0, "stream": 0, "step": 0, "positions": torch.tensor([0]), "count": 1}
    with pytest.raises(ValueError, match=named):
        random.uniform(**{**good, **changed})


@pytest.mark.parametrize("high", [0, 2**31 + 1])
def test_integers_refuse_a_range_they_cannot_draw(high):
    with pytest.raises(ValueError, match="high"):
        random.integers(0, 0, 0, torch.tensor([0]), 1, high)


def test_stream_ids_are_stable_and_distinct():
    assert random.stream_id("unlabeled", "strong", "0") == 0x609E8B2A
    assert random.stream_id("ab", "c") != random.stream_id("a", "bc")
    streams = [
        random.stream_id(stream, view, str(copy))
        for stream in ("labeled", "unlabeled")
        for view in ("weak", "strong")
        for copy in range(100)
    ]
    assert len(set(streams)) == len(streams)
