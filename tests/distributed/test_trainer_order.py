"""The methods of a `Trainer` in every order on two ranks, model and algorithm given as objects."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpdist import FixMatch
from tests.support.call_orders import ORDERS, weights
from tests.support.odd_models import ROWS, small, trainer
from tests.support.ranks import run_ranks

CASES: dict[str, dict[str, Any]] = {
    "ddp": {"optim": {"lr": 0.1}},
    "zero2": {
        "precision": "fp16",
        "zero": {"stage": 2},
        "optim": {"name": "adamw", "lr": 0.01},
    },
    "zero3": {"precision": "bf16", "zero": {"stage": 3}, "optim": {"lr": 0.1}},
}


def all_orders(folder: str, case: str) -> dict[str, dict[str, Tensor]]:
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"

    def make(name: str) -> Any:
        given = {"algorithm": FixMatch(0.9), "test": ROWS, **CASES[case]}
        return trainer(small(3), Path(folder), name, 2, **given)

    plain = make("plain")
    plain.fit()
    found = {"plain": weights(plain)}
    for order in ORDERS:
        found[order.__name__] = weights(order(partial(make, order.__name__)))
    return found


@pytest.mark.parametrize("case", ["ddp", "zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_every_order_trains_the_same_on_ranks(tmp_path: Path, case: str) -> None:
    for found in run_ranks(2, all_orders, str(tmp_path), case):
        expected = found["plain"]
        assert len(found) == len(ORDERS) + 1
        for name, values in found.items():
            assert values.keys() == expected.keys(), name
            same = all(torch.equal(values[key], value) for key, value in expected.items())
            assert same, name
