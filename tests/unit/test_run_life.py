"""What a run saves, measures and writes down, in the order that costs least in the end."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn

from hpdist.errors import CheckpointError, ConfigError, DataError, StoppedError
from hpdist.evaluation import EvaluationError
from hpdist.trainer import Trainer
from tests.parquet_files import write_numbers
from tests.picture_runs import at_batch
from tests.ranks import run_ranks
from tests.run_records import read, records


class Breaks(nn.Module):
    """A linear model whose evaluation can be made to fail on a rank."""

    broken: int | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training and str(Breaks.broken) == os.environ.get("RANK", "0"):
            raise RuntimeError("out of luck")
        logits: Tensor = self.layer(inputs / 50)
        return logits


def held_out(*values: Any) -> Any:
    """A set to measure on; a row that is None cannot be decoded."""
    rows = [[float(v), 1.0] if v is not None else None for v in values]
    labels = [0, 1, 2, 1, 2, 0, 2, 1][: len(rows)]
    numbers = datasets.List(datasets.Value("float32"))
    features = datasets.Features({"x": numbers, "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"x": rows, "label": labels}, features=features)


def trainer(folder: Path, steps: int, name: str = "run", **settings: Any) -> Trainer:
    data = folder / "data"
    if not data.exists():
        write_numbers(data, [[30]])
    files = {"path": "parquet", "data_files": str(data / "*.parquet"), "input": "x"}
    held = {key: settings.pop(key) for key in ("test", "validation") if key in settings}
    defaults: dict[str, Any] = {
        "labeled": {**files, "rows": 12},
        "optim": {"lr": 0.001},
        "checkpoint": {"every": 2},
        "schedule": {"name": "constant"},
    }
    return Trainer(
        settings.pop("model", None) or Breaks(),
        {"name": "fixmatch", "threshold": 0.2},
        unlabeled=files,
        views={"name": "identity"},
        batch={"labeled": 4, "unlabeled": 8},
        run={"dir": str(folder), "name": name},
        log={"every": 1},
        tracker={"name": "none"},
        steps=steps,
        **{key: (value, {"input": "x"}) for key, value in held.items()},
        **(defaults | settings),
    )


@pytest.fixture(autouse=True)
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaks, "broken", None)


def saved(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


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


@pytest.mark.parametrize("every", [2, 100])
def test_an_evaluation_that_fails_costs_nothing_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Also where no checkpoint is due at its step."""
    sets = {"validation": held_out(1, 2, 3, 4, 5), "test": held_out(6, 7, 8)}
    settings = {"eval": {"every": 2}, "checkpoint": {"every": every}}
    wanted = trainer(tmp_path, 6, "whole", **settings, **sets).fit()
    failing = trainer(tmp_path, 6, **settings, **sets)
    with (
        at_batch(3, lambda: setattr(Breaks, "broken", 0)),
        pytest.raises(EvaluationError, match=r"failed on rank 0: RuntimeError: out of luck"),
    ):
        failing.fit()
    run = tmp_path / "run"
    assert saved(run)[-1] == 4
    assert [record["step"] for record in read(run)] == [1, 2, 3]
    monkeypatch.setattr(Breaks, "broken", None)
    again = trainer(tmp_path, 6, **settings, **sets)
    monkeypatch.setattr(Breaks, "broken", 0)
    with pytest.raises(EvaluationError):
        again.fit()
    monkeypatch.setattr(Breaks, "broken", None)
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


def test_the_last_step_is_safe_before_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = trainer(tmp_path, 3, test=held_out(1, 2), checkpoint={})
    seen: list[list[int]] = []
    measure = training.measuring.measure
    training.measuring.measure = lambda log: seen.append(saved(tmp_path / "run")) or measure(log)  # type: ignore[method-assign, func-returns-value]
    training.fit()
    assert seen == [[3]]


def test_rows_that_cannot_be_read_are_left_out_counted_and_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = (1, 2, 3, 4, 5)
    good = trainer(tmp_path, 2, "good", test=held_out(*rows)).fit()
    capfd.readouterr()
    caplog.clear()
    bad = trainer(tmp_path, 2, "bad", test=held_out(*rows, None), eval={"every": 1}).fit()
    scores = [key for key in good if key.startswith("test/") and "duplicates" not in key]
    assert (bad.pop("test/rows"), bad.pop("test/bad_rows")) == (5, 1)
    assert (good["test/rows"], good["test/bad_rows"]) == (5, 0)
    for key in scores[:-2]:
        assert bad[key] == good[key]
    assert read(tmp_path / "bad")[0]["eval/test/bad_rows"] == 1
    told = capfd.readouterr().err
    assert "data.test" in told
    assert "1 of 6 rows cannot be decoded and are left out of every score" in told
    assert "row 5: the value is null" in told
    named = [
        record.message for record in caplog.records if "left out of the scores" in record.message
    ]
    assert len(named) == 1, "once, not at every evaluation"


def test_a_set_without_a_row_that_can_be_read_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.validation .*row 0 cannot be decoded.*other 1 rows"
    ):
        trainer(tmp_path, 2, validation=held_out(None, None))
    assert not (tmp_path / "run").exists()


def counted(training: Trainer) -> list[int]:
    """The steps at which a trainer saves."""
    steps: list[int] = []
    assert training.writer is not None
    save = training.writer.save
    training.writer.save = lambda step, *rest, **more: (
        steps.append(step)
        or save(  # type: ignore[method-assign, func-returns-value]
            step, *rest, **more
        )
    )
    training.fit()
    return steps


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


def on_ranks(folder: Path) -> tuple[list[int], str, list[int], dict[str, Any], list[int]]:
    """On rank 1 alone rows cannot be read, and an evaluation fails; rank 0's clock decides."""
    rank = int(os.environ["RANK"])
    clock = {} if rank else {"minutes": 1e-9}
    training = trainer(folder, 3, "clock", checkpoint=clock)
    training.saving._config = training.config.checkpoint
    steps = counted(training)
    sets = {"test": held_out(1, 2, 3, 4, 5, None, 7)}
    failing = trainer(folder, 3, **sets)
    Breaks.broken = 1
    message = ""
    try:
        failing.fit()
    except EvaluationError as error:
        message = str(error)
    left = saved(folder / "run")
    Breaks.broken = None
    summary = trainer(folder, 3, **sets).fit()
    return steps, message, left, summary, [record["step"] for record in read(folder / "run")]


def test_all_ranks_save_and_measure_together(tmp_path: Path) -> None:
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
    assert "from step 2 on, other settings: " in capfd.readouterr().err
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
