"""Orders in which the methods of a `Trainer` may be called; each must leave the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from hpdist import ConfigError

Make: TypeAlias = Callable[[], Any]


def score(trainer: Any) -> dict[str, float]:
    return dict(trainer.evaluate(trainer.data.test).values)


def fit_again(make: Make) -> Any:
    """Fit, and again when it is closed; a module that was given is left alone the second time."""
    made = make()
    summary = made.fit()
    scores = score(made)
    given = made.run.model._given
    if given is not None:
        with torch.no_grad():
            given.last.bias.fill_(7.0)
    made.close()
    made.close()
    assert made.fit() == summary
    assert score(made) == scores
    assert given is None or given.last.bias.tolist() == [7.0] * 3
    return made


def look_and_save_first(make: Make) -> Any:
    """Measure and save, and train then; what is saved need not be saved again."""
    made = make()
    before = score(made)
    made.save()
    assert score(made) == before
    made.fit()
    made.save()
    return made


def save_and_come_back(make: Make) -> Any:
    """Save at once and close; another trainer goes on from there."""
    first = make()
    first.save()
    first.close()
    first.save()
    with pytest.raises(ConfigError, match="this trainer is closed; make a new one"):
        first.fit()
    with pytest.raises(ConfigError, match="this trainer is closed"):
        first.dry_run()
    again = make()
    assert again.run.outset.facts["step"] == 0
    again.fit()
    return again


def close_first(make: Make) -> Any:
    """Close what has done nothing, which can be measured, but no longer saved or trained."""
    first = make()
    before = score(first)
    first.close()
    assert score(first) == before
    for call in (first.save, first.fit):
        with pytest.raises(ConfigError, match="this trainer is closed"):
            call()
    again = make()
    again.fit()
    return again


def in_a_block(make: Make) -> Any:
    """Train in a `with` block, which closes; a run that is done gives its summary to the next."""
    with make() as first:
        summary = first.fit()
    with make() as again:
        assert again.fit() == summary
        assert again.fit() == summary
    assert score(first) == score(again)
    return again


ORDERS = (fit_again, look_and_save_first, save_and_come_back, close_first, in_a_block)


def weights(made: Any) -> dict[str, Tensor]:
    """The teacher's and the student's weights."""
    models = {"teacher": made.teacher_model(), "student": made.student_model()}
    return {f"{k}.{n}": v for k, model in models.items() for n, v in model.state_dict().items()}
