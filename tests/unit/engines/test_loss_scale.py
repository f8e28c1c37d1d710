"""The loss scale's rules, by themselves."""

from __future__ import annotations

from hpdist.engines.config import LossScale
from hpdist.engines.loss_scale import LossScaler


def scales(config: LossScale, overflows: list[bool]) -> list[float]:
    scaler = LossScaler.of(config)
    seen = []
    for overflowed in overflows:
        scaler.update(overflowed)
        seen.append(scaler.scale)
    return seen


def test_a_static_scale_never_changes() -> None:
    config = LossScale(static=64, growth_interval=1)
    assert scales(config, [False, True, True, False]) == [64] * 4
    assert not LossScaler.of(LossScale(static=1, minimum=1)).at_minimum, "none can fall"


def test_a_dynamic_scale_halves_and_doubles() -> None:
    config = LossScale(initial=8, growth_interval=2, minimum=2)
    overflows = [False, True, False, False, True, True, True, False, False]
    assert scales(config, overflows) == [8, 4, 4, 8, 4, 2, 2, 2, 4]


def test_it_is_at_its_minimum_only_when_it_can_fall_no_further() -> None:
    scaler = LossScaler.of(LossScale(initial=4, minimum=2))
    assert not scaler.at_minimum
    scaler.update(overflowed=True)
    assert scaler.at_minimum


def test_its_state_goes_through_a_checkpoint() -> None:
    scaler = LossScaler.of(LossScale(initial=8, growth_interval=3))
    scaler.update(overflowed=False)
    other = LossScaler.of(LossScale(initial=2, growth_interval=3))
    other.load_state(scaler.state())
    for one in (scaler, other):
        one.update(overflowed=False)
        one.update(overflowed=False)
    assert (other.scale, other.good_steps) == (scaler.scale, scaler.good_steps) == (16, 0)
