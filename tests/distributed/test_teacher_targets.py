"""Pseudo-labels of the teacher and a burn-in, on every engine and any number of ranks."""

from __future__ import annotations

import io

import pytest
import torch

from hpdist.algorithms import FixMatch, FreeMatch
from hpdist.algorithms.base import Algorithm
from hpdist.train.step import SemiSupervisedStep
from tests.support.ranks import run_ranks
from tests.support.recipes import global_batches, make_model, make_step, slice_of

STAGES = [None, 1, 2, 3, "fsdp2", "fsdp2 whole"]
STEPS, BURN_IN, SAVED_AFTER = 5, 3, 2
KEYS = ("loss", "supervised_loss", "unsupervised_loss", "mask_rate")


def algorithm() -> Algorithm:
    return FreeMatch(10, momentum=0.5, fairness_weight=0.05, targets="teacher", burn_in=BURN_IN)


def make(stage: int | str | None, made: Algorithm) -> SemiSupervisedStep:
    replica = {"teacher_model": make_model(made, smooth=True)} if stage == 3 else {}
    return make_step(made, stage=stage, smooth=True, lr=0.1, decay=0.9, **replica)


def curve(step: SemiSupervisedStep, numbers: range) -> list[dict[str, float]]:
    records = []
    for number in numbers:
        engine = step.engine
        batches = [slice_of(b, engine.rank, engine.world_size) for b in global_batches(number)]
        metrics = step(*batches, measure=True).metrics
        records.append({key: metrics[key] for key in KEYS})
    return records


def curves() -> dict[int | str | None, tuple[list[dict[str, float]], float]]:
    """By stage the curve, and how many applied steps the algorithm's saved state counts."""
    found = {}
    for stage in STAGES:
        step = make(stage, algorithm())
        records = curve(step, range(SAVED_AFTER))
        saved = io.BytesIO()
        torch.save(step.algorithm.state_dict(), saved)
        saved.seek(0)
        later = algorithm()  # as after a resume: it knows only what was saved
        later.load_state_dict(torch.load(saved))
        step.algorithm = later
        records += curve(step, range(SAVED_AFTER, STEPS))
        found[stage] = records, float(step.algorithm.state_dict()["burn_in"])
    return found


def test_every_engine_and_any_number_of_ranks() -> None:
    whole = curve(make(None, algorithm()), range(STEPS))
    for number, record in enumerate(whole):
        assert (record["loss"] == record["supervised_loss"]) == (number < BURN_IN)
        assert record["mask_rate"] > 0
    by_student = FreeMatch(10, momentum=0.5, fairness_weight=0.05, burn_in=BURN_IN)
    other = curve(make(None, by_student), range(STEPS))
    assert other[-1]["unsupervised_loss"] != pytest.approx(whole[-1]["unsupervised_loss"], rel=1e-3)
    for found in run_ranks(2, curves):
        for stage, (records, counted) in found.items():
            assert counted == STEPS
            for record, expected in zip(records, whole, strict=True):
                assert record == pytest.approx(expected, rel=2e-4, abs=1e-5), stage


def test_labels_alone_train_before() -> None:
    """During the burn-in the weights are those of training on the labels alone."""
    steps = [make_step(FixMatch(0.0, weight, burn_in=2), lr=0.1) for weight in (1.0, 0.0)]
    for number in range(3):
        for step in steps:
            curve(step, range(number, number + 1))
        one, other = (
            torch.cat([p.detach().flatten() for p in step.engine.module.parameters()])
            for step in steps
        )
        assert torch.equal(one, other) == (number < 2)
