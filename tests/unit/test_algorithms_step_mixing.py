"""Algorithms that mix rows or keep a table of them, in real steps of one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hpdist.algorithms import ICT, Algorithm, MixMatch, PiModel, ReMixMatch, TemporalEnsembling
from hpdist.errors import ConfigError
from tests import lockstep
from tests.recipes import make_step, train

MAKERS: dict[str, Callable[[], Algorithm]] = {
    "pi_model": lambda: PiModel(5.0, 3),
    "temporal_ensembling": lambda: TemporalEnsembling(10, ramp_steps=3),
    "ict": lambda: ICT(ramp_steps=3),
    "mixmatch": lambda: MixMatch(ramp_steps=3),
    "remixmatch": lambda: ReMixMatch(10, ramp_steps=3, strong_views=2),
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


def test_a_batch_that_does_not_divide_into_groups_is_refused_by_its_setting() -> None:
    with pytest.raises(ConfigError, match=r"16 labelled rows .* change batch\.labeled or"):
        train(make_step(MixMatch(groups=32)), 1)
