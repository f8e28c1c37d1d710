"""SIGKILL at the steps of writing a checkpoint: the resumed run is the same, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_table import COSTS, Fault
from tests.support.kill_points import kill_everywhere
from tests.support.ranks import run_ranks

NAMES = {"fp32": "DDP in fp32", "zero2_fp16": "ZeRO-2 in fp16", "fsdp2_fp16": "FSDP2 in fp16"}


def check(results: list[dict[str, Any]], kind: str, inject: Callable[..., Fault]) -> None:
    for result in results:
        which = "the first rank" if result["victim"] == 0 else "another rank"
        fault = inject(f"{which} killed while writing a checkpoint, {NAMES[kind]}")
        assert result["killed"], result
        assert result["resumed"] == [0, 0], result
        assert result["differs"] is None, result
        assert result["leftovers"] == [], result
        costs = {name: result[name] for name in COSTS}
        assert (costs["rows_lost"], costs["rows_repeated"]) == (0, 0), result
        fault.survived(**costs)


@pytest.mark.parametrize("kind", ["fp32", pytest.param("fsdp2_fp16", marks=pytest.mark.slow)])
def test_killed_while_writing(tmp_path: Path, kind: str, inject: Callable[..., Fault]) -> None:
    (results,) = run_ranks(1, kill_everywhere, tmp_path, kind, 6)
    assert {result["victim"] for result in results} == {0, 1}
    check(results, kind, inject)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_killed_at_every_point_of_writing(
    tmp_path: Path, kind: str, inject: Callable[..., Fault]
) -> None:
    (results,) = run_ranks(1, kill_everywhere, tmp_path, kind, 1, timeout=1800)
    assert len(results) > 20
    check(results, kind, inject)
