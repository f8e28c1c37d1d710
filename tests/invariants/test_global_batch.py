"""The same seed gives the same curve on 1, 2 and 4 ranks, with and without accumulation."""

from __future__ import annotations

import pytest
import torch

from hpdist.algorithms import FixMatch
from tests.ranks import run_ranks
from tests.recipes import make_step, train

STEPS = 20
ALGORITHMS = ["supervised", "fixmatch", "freematch"]
# (norm, micro-batches): a BatchNorm sees one micro-batch at a time, so it is not cut
SHAPES = [("group", 1), ("group", 2), ("batch", 1)]
# No row of these runs comes within 1e-4 of its threshold, where rounding would decide.
THRESHOLDS = {"group": 0.22, "batch": 0.18}
Curves = dict[tuple[str, str, int], list[dict[str, float]]]


def curves() -> Curves:
    found: Curves = {}
    accelerator = None
    for algorithm in ALGORITHMS:
        for norm, micro_batches in SHAPES:
            step = make_step(
                FixMatch(THRESHOLDS[norm]) if algorithm == "fixmatch" else algorithm,
                norm=norm,
                micro_batches=micro_batches,
                accelerator=accelerator,
                lr=0.01 if norm == "group" else 0.002,  # BatchNorm of few rows amplifies rounding
            )
            accelerator = step.engine.accelerator
            curve = train(step, STEPS)
            with step.teacher.in_student():  # type: ignore[union-attr]
                teacher = torch.cat([p.detach().view(-1) for p in step.engine.module.parameters()])
            curve.append({"teacher": float(teacher.double().square().sum())})
            found[algorithm, norm, micro_batches] = curve
    return found


@pytest.fixture(scope="module")
def by_ranks() -> dict[int, Curves]:
    return {ranks: run_ranks(ranks, curves)[0] for ranks in (1, 2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}-{s[1]}")
def test_ranks_do_not_matter(
    by_ranks: dict[int, Curves], ranks: int, algorithm: str, shape: tuple[str, int]
) -> None:
    assert_same(by_ranks[1][(algorithm, *shape)], by_ranks[ranks][(algorithm, *shape)])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_accumulation_does_not_matter(
    by_ranks: dict[int, Curves], ranks: int, algorithm: str
) -> None:
    assert_same(by_ranks[1][algorithm, "group", 1], by_ranks[ranks][algorithm, "group", 2])


def test_the_curves_are_no_trivial_ones(by_ranks: dict[int, Curves]) -> None:
    for (algorithm, _, _), curve in by_ranks[1].items():
        losses = [record["loss"] for record in curve[:-1]]
        assert len(set(losses)) == STEPS
        if algorithm != "supervised":
            rates = [record["mask_rate"] for record in curve[:-1]]
            assert 0 < sum(rates) < len(rates), "the threshold must cut, else it is not tested"
        if algorithm == "freematch":
            assert any(record["fairness_loss"] != 0 for record in curve[:-1])


def assert_same(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), f"{key} at step {step}"
