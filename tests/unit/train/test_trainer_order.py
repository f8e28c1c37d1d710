"""`Trainer` takes a model and an algorithm in every form, and its methods in every order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpdist import ConfigError, FixMatch
from hpdist.algorithms.fixmatch import FixMatchConfig
from tests.support.call_orders import ORDERS, weights
from tests.support.odd_models import ROWS, Small, small, trainer


class Mine(FixMatch):
    """One's own, which no name stands for."""


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {  # whose weights they begin with, and how
    "name": ("mlp", lambda: "mlp"),
    "settings": ("mlp", lambda: {"name": "mlp"}),
    "module": ("small", lambda: small(3)),
    "function": ("small", lambda: {"name": "python:tests.support.odd_models:small"}),
}
ALGORITHMS: dict[str, Callable[[], Any]] = {
    "name": lambda: "fixmatch",
    "settings": lambda: {"name": "fixmatch", "threshold": 0.95},
    "class": lambda: FixMatch,
    "object": lambda: FixMatch(threshold=0.95),
    "config": lambda: FixMatchConfig(threshold=0.95),
    "own object": lambda: Mine(0.95),
}
PRODUCT = [
    pytest.param(
        model,
        algorithm,
        order,
        id=f"{model}-{algorithm}-{order.__name__}",
        marks=() if (i + j) % len(ORDERS) == k else pytest.mark.slow,
    )
    for i, model in enumerate(MODELS)
    for j, algorithm in enumerate(ALGORITHMS)
    for k, order in enumerate(ORDERS)
]


def make(folder: Path, model: str, algorithm: str) -> Any:
    settings = {"algorithm": ALGORITHMS[algorithm](), "test": ROWS}
    return trainer(MODELS[model][1](), folder, "run", 2, **settings, optim={"lr": 0.1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What comes of each model where nothing but `fit` is called."""
    found = {}
    for kind, model in (("mlp", "name"), ("small", "function")):
        made = make(tmp_path_factory.mktemp(kind), model, "name")
        made.fit()
        found[kind] = weights(made)
    return found


@pytest.mark.parametrize(("model", "algorithm", "order"), PRODUCT)
def test_every_form_in_every_order_trains_the_same(
    tmp_path: Path,
    trained: dict[str, dict[str, Tensor]],
    model: str,
    algorithm: str,
    order: Callable[[Callable[[], Any]], Any],
) -> None:
    made = order(lambda: make(tmp_path, model, algorithm))
    found, expected = weights(made), trained[MODELS[model][0]]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert made.step.applied_steps == 2


def test_a_block_that_fails_lets_go_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), trainer(Small(), tmp_path, "run", 1):
        1 / 0  # noqa: B018
    assert trainer(Small(), tmp_path, "run", 1).fit()["steps"] == 1


def test_trial_steps_are_not_of_a_trainer_that_is_closed(tmp_path: Path) -> None:
    made = trainer(Small(), tmp_path, "run", 1)
    made.fit()
    with pytest.raises(ConfigError, match="this trainer is closed"):
        made.dry_run()
    assert made.step.applied_steps == 1
