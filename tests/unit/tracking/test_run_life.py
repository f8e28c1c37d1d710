"""What a run saves, measures and writes down, in the order that costs least in the end."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from hpdist.errors import CheckpointError, ConfigError, DataError, StoppedError
from hpdist.tracking.run_lock import InUseError, RunLock
from tests.support.picture_runs import at_batch
from tests.support.run_records import read, records
from tests.support.small_runs import counted, held_out, saved, trainer


def contents(run: Path) -> dict[str, tuple[str, int]]:
    """Every file, what it holds and when it was written."""
    return {
        str(path.relative_to(run)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in run.rglob("*")
        if path.is_file()
    }


def test_the_last_step_is_safe_before_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = trainer(tmp_path, 3, test=held_out(1, 2), checkpoint={})
    seen: list[list[int]] = []
    measure = training.measuring.measure
    training.measuring.measure = lambda log: seen.append(saved(tmp_path / "run")) or measure(log)  # type: ignore[method-assign, func-returns-value]
    training.fit()
    assert seen == [[3]]


def test_a_set_without_a_row_that_can_be_read_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.validation .*row 0 cannot be decoded.*other 1 rows"
    ):
        trainer(tmp_path, 2, validation=held_out(None, None))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("checkpoint", "steps"),
    [
        ({}, [4]),
        ({"minutes": 1e-9}, [1, 2, 3, 4]),
        ({"every": 3}, [3, 4]),
        ({"every": 3, "minutes": 1e-9}, [1, 2, 3, 4]),
        ({"minutes": None}, [4]),
    ],
)
def test_when_a_run_is_saved(tmp_path: Path, checkpoint: dict[str, Any], steps: list[int]) -> None:
    training = trainer(tmp_path, 4, checkpoint=checkpoint)
    assert training.config.checkpoint.minutes == (
        checkpoint.get("minutes", None if "every" in checkpoint else 15)
        if checkpoint != {"minutes": None}
        else None
    )
    assert counted(training) == steps


def test_a_run_that_is_done_is_left_as_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = trainer(tmp_path, 2, test=held_out(1, 2)).fit()
    before = contents(tmp_path / "run")
    for steps, lr in ((2, 9.0), (1, 0.001), (2, 0.001)):
        capfd.readouterr()
        again = trainer(tmp_path, steps, test=held_out(1, 2), optim={"lr": lr})
        assert again.fit() == first == again.fit()
        assert contents(tmp_path / "run") == before
        told = capfd.readouterr().err
        assert "nothing to do: the run in" in told
        assert "has done its 2 steps" in told
        assert ("optim.lr 0.001 -> 9.0" in told) == (lr == 9.0)
        assert ("steps 2 -> 1" in told) == (steps == 1)


def test_later_settings_stand_beside_the_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def changes() -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (run / "config_changes.jsonl").read_text().splitlines()
        ]

    trainer(tmp_path, 2).fit()
    config = (run / "config.yaml").read_bytes()
    trainer(tmp_path, 4, optim={"lr": 0.5}).fit()
    assert "other settings from step 2 on: " in capfd.readouterr().err
    first = {"optim.lr": {"was": 0.001, "now": 0.5}, "steps": {"was": 2, "now": 4}}
    assert changes() == [{"step": 2, "settings": first}]
    trainer(tmp_path, 6, optim={"lr": 0.001}).fit()
    second = {"optim.lr": {"was": 0.5, "now": 0.001}, "steps": {"was": 4, "now": 6}}
    assert changes() == [{"step": 2, "settings": first}, {"step": 4, "settings": second}]
    assert (run / "config.yaml").read_bytes() == config


def test_labelled_rows_are_those_of_the_beginning(tmp_path: Path) -> None:
    trainer(tmp_path, 2).fit()
    before = contents(tmp_path / "run")
    files = {"path": "parquet", "data_files": str(tmp_path / "data/*.parquet"), "input": "x"}
    for choice in ({"rows": 15}, {"labels_per_class": 4}, {"indices": [1, 2, 3, 4, 5, 9]}):
        with pytest.raises(CheckpointError, match=r"data\.labeled\..* there, .* here"):
            trainer(tmp_path, 4, labeled={**files, **choice})
    assert contents(tmp_path / "run") == before


def test_a_trainer_saves_and_closes_at_any_time(tmp_path: Path) -> None:
    training = trainer(tmp_path, 2)
    training.save()
    training.close()
    training.close()
    assert saved(tmp_path / "run") == [0]
    with pytest.raises(ConfigError, match="closed"):
        training.fit()
    again = trainer(tmp_path, 2)
    assert again.fit()["steps"] == 2
    again.close()
    assert again.fit()["steps"] == 2


def test_ctrl_c_saves_and_ends_a_fit(tmp_path: Path) -> None:
    training = trainer(tmp_path, 6, checkpoint={"every": 100})
    with (
        at_batch(2, lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(StoppedError, match=r"stopped by SIGINT on rank 0 after step 3, which"),
    ):
        training.fit()
    assert saved(tmp_path / "run") == [3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert trainer(tmp_path, 6, checkpoint={"every": 100}).fit()["steps"] == 6
    assert [record["step"] for record in read(tmp_path / "run")] == list(range(1, 7))


def test_a_stop_does_not_wait_for_an_evaluation(tmp_path: Path) -> None:
    settings = {"validation": held_out(1, 2, 3), "eval": {"every": 1}, "checkpoint": {"every": 100}}
    trainer(tmp_path, 4, "whole", **settings).fit()
    training = trainer(tmp_path, 4, **settings)
    measured: list[int] = []
    measure = training.measuring.measure
    training.measuring.measure = lambda log: (  # type: ignore[method-assign]
        measured.append(training.step.applied_steps) or measure(log)  # type: ignore[func-returns-value]
    )
    with at_batch(1, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(StoppedError):
        training.fit()
    assert measured == [1]
    trainer(tmp_path, 4, **settings).fit()
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_run_whose_folder_was_taken_ends_and_leaves_it_alone(tmp_path: Path) -> None:
    training = trainer(tmp_path, 6)
    lock = training.claim._lock
    assert lock is not None
    with (
        at_batch(4, lambda: setattr(lock, "lost", "process 1 on another")),
        pytest.raises(CheckpointError, match="was taken by process 1 on another"),
    ):
        training.fit()
    assert saved(tmp_path / "run") == [2, 4]


def test_a_run_waits_for_its_folder_if_it_is_told_to(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    other = RunLock(tmp_path / "run")
    assert other.acquire(0)
    other.busy = True
    with pytest.raises(InUseError, match=f"in use by process {os.getpid()} on .* since "):
        trainer(tmp_path, 2)
    threading.Timer(0.5, other.release).start()
    waiting = {"dir": str(tmp_path), "name": "run", "wait": 60}
    assert trainer(tmp_path, 2, run=waiting).fit()["steps"] == 2
    assert "waiting 60 s for that" in capfd.readouterr().err
