"""Evaluations that fail, and held-out rows that nobody can read: the training loses nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpdist.evaluate.scoring import EvaluationError
from tests.support.fault_table import Fault, steps_repeated
from tests.support.parquet_files import write_numbers
from tests.support.picture_runs import at_batch
from tests.support.ranks import run_ranks
from tests.support.run_records import read, records
from tests.support.small_runs import Breaks, broken, counted, held_out, saved, trainer


@pytest.mark.parametrize("every", [2, 100])
def test_an_evaluation_that_fails_costs_nothing_and_is_made_up_for(
    tmp_path: Path, every: int, inject: Callable[..., Fault], capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where no checkpoint is due at its step."""
    fault = inject("an evaluation that fails, twice", 2)
    sets = {"validation": held_out(1, 2, 3, 4, 5), "test": held_out(6, 7, 8)}
    settings = {"eval": {"every": 2}, "checkpoint": {"every": every}}
    wanted = trainer(tmp_path, 6, "whole", **settings, **sets).fit()
    capfd.readouterr()
    failing = trainer(tmp_path, 6, **settings, **sets)
    with (
        at_batch(3, lambda: setattr(Breaks, "broken", 0)),
        broken(None),
        pytest.raises(EvaluationError, match=r"failed on rank 0: RuntimeError: out of luck"),
    ):
        failing.fit()
    run = tmp_path / "run"
    assert saved(run)[-1] == 4
    assert [record["step"] for record in read(run)] == [1, 2, 3]
    again = trainer(tmp_path, 6, **settings, **sets)
    with broken(), pytest.raises(EvaluationError):
        again.fit()
    found = trainer(tmp_path, 6, **settings, **sets).fit()
    assert records(run) == records(tmp_path / "whole")
    timed = ("seconds", "peak_memory_bytes")
    assert {k: v for k, v in found.items() if k not in timed} == {
        k: v for k, v in wanted.items() if k not in timed
    }
    weights = "checkpoints/step-00000006/rank-00000.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    facts = [
        json.loads((tmp_path / name / "checkpoints/step-00000006/manifest.json").read_text())
        for name in ("whole", "run")
    ]
    assert facts[0]["best"] == facts[1]["best"]
    fault.survived(steps_repeated=steps_repeated(capfd.readouterr().err))


def test_rows_that_cannot_be_read_are_left_out_counted_and_named(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    inject: Callable[..., Fault],
) -> None:
    fault = inject("a test row that cannot be read")
    rows = (1, 2, 3, 4, 5)
    good = trainer(tmp_path, 2, "good", test=held_out(*rows)).fit()
    capfd.readouterr()
    caplog.clear()
    bad = trainer(tmp_path, 2, "bad", test=held_out(*rows, None, None), eval={"every": 1}).fit()
    scores = [key for key in good if key.startswith("test/") and "duplicates" not in key]
    assert (bad.pop("test/rows"), bad.pop("test/bad_rows")) == (5, 2)
    assert (good["test/rows"], good["test/bad_rows"]) == (5, 0)
    for key in scores[:-2]:
        assert bad[key] == good[key]
    assert read(tmp_path / "bad")[0]["eval/test/bad_rows"] == 2
    told = capfd.readouterr().err
    assert "data.test" in told
    assert "2 of 7 rows cannot be decoded and are left out of every score" in told
    assert "row 5: the value is null" in told
    (named,) = [  # not at every evaluation, and not what was named at the start
        record.message for record in caplog.records if "left out of the scores" in record.message
    ]
    assert "row 6" in named
    fault.survived(rows_masked=2)


def on_ranks(folder: Path) -> tuple[list[int], str, list[int], dict[str, Any], list[int]]:
    """On rank 1 alone rows cannot be read, and an evaluation fails; rank 0's clock decides."""
    rank = int(os.environ["RANK"])
    clock = {} if rank else {"minutes": 1e-9}
    training = trainer(folder, 3, "clock", checkpoint=clock)
    steps = counted(training)
    sets = {"test": held_out(1, 2, 3, 4, 5, None, 7)}
    failing = trainer(folder, 3, **sets)
    with broken(1), pytest.raises(EvaluationError) as caught:
        failing.fit()
    message = str(caught.value)
    left = saved(folder / "run")
    summary = trainer(folder, 3, **sets).fit()
    return steps, message, left, summary, [record["step"] for record in read(folder / "run")]


def test_all_ranks_save_and_measure_together(tmp_path: Path, inject: Callable[..., Fault]) -> None:
    fault = inject("an evaluation that fails on one of two ranks")
    write_numbers(tmp_path / "data", [[30]])
    for steps, message, left, summary, recorded in run_ranks(2, on_ranks, tmp_path):
        assert steps == [1, 2, 3]
        assert (
            message
            == "the evaluation failed on rank 1: RuntimeError: out of luck"
            + (message.partition("out of luck")[2])
        )
        assert left[-1] == 3
        assert (summary["test/rows"], summary["test/bad_rows"]) == (6, 1)
        assert recorded == [1, 2, 3]
    fault.survived()
