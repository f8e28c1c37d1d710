"""Algorithms that mix rows or keep a table of them, in real steps of one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hpdist.algorithms import (
    ICT,
    Algorithm,
    MixMatch,
    PiModel,
    RegMixMatch,
    ReMixMatch,
    TemporalEnsembling,
)
from hpdist.errors import ConfigError
from hpdist.train.micro_batch import _warn_once
from tests.support import lockstep
from tests.support.recipes import make_step, train

MAKERS: dict[str, Callable[[], Algorithm]] = {
    "pi_model": lambda: PiModel(5.0, 3),
    "temporal_ensembling": lambda: TemporalEnsembling(10, ramp_steps=3),
    "ict": lambda: ICT(ramp_steps=3, groups=4),
    "mixmatch": lambda: MixMatch(ramp_steps=3, groups=4),
    "remixmatch": lambda: ReMixMatch(10, ramp_steps=3, strong_views=2, groups=4),
}


@pytest.mark.parametrize("name", MAKERS)
def test_accumulation_does_not_matter(name: str) -> None:
    whole, cut = (make_step(MAKERS[name](), micro_batches=n, smooth=True) for n in (1, 4))
    run = lockstep.record(whole, range(5))
    assert lockstep.follow(cut, run) == {}
    assert max(run.firm) >= 3
    assert run.firm[max(run.firm)].metrics["unsupervised_loss"] > 0


def test_micro_batches_that_cut_a_group_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.groups"):
        train(make_step(MixMatch(groups=2), micro_batches=4), 1)
    with pytest.raises(ConfigError, match=r"algorithm\.groups"):
        train(make_step(ICT(groups=1), micro_batches=2), 1)


@pytest.mark.parametrize("name", ["mixmatch", "ict"])
def test_two_micro_batches_of_eight_rows_are_mixed_as_one_of_sixteen(name: str) -> None:
    """16 + 48 rows are two groups without being told."""
    made = {"mixmatch": MixMatch, "ict": ICT}[name]
    curves = [train(make_step(made(), micro_batches=parts), 3) for parts in (1, 2)]
    for one, other in zip(*curves, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_a_group_of_few_rows_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_once.cache_clear()
    step = make_step(MixMatch(), micro_batches=4)
    train(step, 2)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in (
        "MixMatch mixes rows within 4 groups of the batch, each with only 4 labelled: hardly",
        "raise batch.labeled to 32 or more, or use fewer ranks and micro-batches (here 4 in all)",
        "not 2: mixtures differ from those of other numbers",
    ):
        assert part in record.getMessage()
    train(make_step(MixMatch(), micro_batches=2), 1)  # 8 rows of each kind
    assert len(caplog.records) == 1


def test_a_group_of_one_row_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"16 groups .* 1 labelled .* which leaves none .* algorithm\.groups to 2$",
    ):
        train(make_step(MixMatch(groups=16)), 1)
    with pytest.raises(ConfigError, match=r"RegMixMatch .* 1 labelled .*fewer ranks and micro"):
        train(make_step(RegMixMatch(10), micro_batches=16), 1)
    train(make_step(ICT(groups=16)), 1)  # mixes the 48 unlabelled rows alone


def test_a_batch_that_does_not_divide_into_groups_is_refused_by_its_setting() -> None:
    with pytest.raises(ConfigError, match=r"16 labelled rows .* change batch\.labeled or"):
        train(make_step(MixMatch(groups=32)), 1)
