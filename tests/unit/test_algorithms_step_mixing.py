"""Algorithms that mix rows or keep a table of them, in real steps of one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hpdist.algorithms import ICT, Algorithm, MixMatch, PiModel, ReMixMatch, TemporalEnsembling
from hpdist.errors import ConfigError
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
    whole, cut = MAKERS[name](), MAKERS[name]()
    curves = [train(make_step(whole), 5), train(make_step(cut, micro_batches=4), 5)]
    for one, other in zip(*curves, strict=True):
        assert one["applied"]
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert curves[0][-1]["unsupervised_loss"] > 0
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_micro_batches_that_cut_a_group_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.groups"):
        train(make_step(MixMatch(groups=2), micro_batches=4), 1)
    with pytest.raises(ConfigError, match=r"algorithm\.groups"):
        train(make_step(ICT(groups=1), micro_batches=2), 1)


def test_a_batch_that_does_not_divide_into_groups_is_refused_by_its_setting() -> None:
    with pytest.raises(ConfigError, match=r"16 labelled rows .* change batch\.labeled or"):
        train(make_step(MixMatch(groups=32)), 1)
