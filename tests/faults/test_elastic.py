"""A run goes on with other ranks, stages, engines: its curve does, no row is lost or repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.elastic_runs import train_all
from tests.support.fault_table import Fault
from tests.support.ranks import run_ranks
from tests.support.run_records import TIMED
from tests.support.sampling import selected

LIKE = {
    **dict.fromkeys(("ranks", "engines"), "whole"),
    **dict.fromkeys(("stages", "both", "engines_fp16"), "whole_fp16"),
}
SLOW = {"both", "engines_fp16"}
RUNS = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in LIKE]
TOLERANCE = {"whole": 2e-4, "whole_fp16": 2e-2}


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    names = {name for (name,) in selected(request, "run")}
    names |= {LIKE[name] for name in names if name in LIKE}
    folder = tmp_path_factory.mktemp("elastic")
    (found,) = run_ranks(1, train_all, folder, names, timeout=900)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("run", RUNS)
def test_the_curve_continues(outcomes: dict[str, Any], run: str) -> None:
    like = LIKE[run]
    pairs = zip(outcomes[run]["records"], outcomes[like]["records"], strict=True)
    for step, (found, wanted) in enumerate(pairs, start=1):
        for key in wanted.keys() - TIMED:
            near = pytest.approx(wanted[key], rel=TOLERANCE[like], abs=1e-3)
            assert found[key] == near, (step, key)


@pytest.mark.parametrize("run", ["whole", *RUNS])
def test_no_row_is_lost_or_repeated(
    outcomes: dict[str, Any], run: str, inject: Callable[..., Fault]
) -> None:
    outcome = outcomes[run]
    fault = inject(
        "stopped, then other numbers of ranks, ZeRO stages or engines", outcome["resumes"]
    )
    assert outcome["most"] == 1
    assert outcome["used"] == outcome["rows"] == 12 * 24
    fault.survived(**outcome["cost"])


@pytest.mark.parametrize("run", RUNS)
def test_counters_are_carried_over(outcomes: dict[str, Any], run: str) -> None:
    for key in ("loss_scale", "optimizer", "teacher_updates"):
        assert outcomes[run][key] == outcomes[LIKE[run]][key], key
