"""What a run says of itself: at its start as soon as it is known, and at its end in units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from hpdist.cli.closing import summary_lines
from hpdist.distributed.batch_norm import batch_norms
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.tracking.console import Console
from hpdist.train.config import parse
from hpdist.train.opening import _devices, _names, _parameters, laid_out, log_model, run_entries
from hpdist.version import __version__
from tests.support.small_runs import held_out, trainer


def entries(sharding: ExecutionPlan | None = None, files: bool = True, **settings: Any) -> Any:
    sets = settings.pop("sets", ("unlabeled",))
    data = {name: {"path": "parquet", "data_files": "x"} for name in ("labeled", *sets)}
    values = {"model": {"name": "mlp"}, "algorithm": {"name": "fixmatch"}, "steps": 3000}
    config = parse({"data": data, **values, **settings})
    return dict(run_entries(config, sharding or ExecutionPlan(), "unlabeled" in sets, files=files))


def test_settings_are_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    found = entries(
        ExecutionPlan("bf16", stage=3, offload="cpu", micro_batch=32, accumulation=4),
        addons=[{"name": "darp"}],
        eval={"every": 500},
        checkpoint={"every": 100, "minutes": 90},
        activation_checkpointing=True,
        sets=("unlabeled", "test", "validation"),
    )
    assert found == {
        "algorithm": "fixmatch + darp, 3,000 steps",
        "batch": "512 rows a step (64 labelled, 448 unlabelled), 128 on each of 4 ranks, "
        "in 4 micro-batches of 32",
        "precision": "bf16, ZeRO stage 3, offloaded to the CPU, activation checkpointing",
        "evaluation": "data.validation every 500 steps, data.validation and data.test at the end",
        "checkpoint": "every 100 steps or 90 min, and after the last step; the newest 2 are kept",
        "tracker": "wandb, offline",
        "run folder": "a new one in runs, as there is no run.name",
    }
    monkeypatch.setenv("WORLD_SIZE", "1")
    found = entries(tracker={"name": "none"}, algorithm={"name": "supervised"}, sets=("test",))
    assert found["batch"] == "64 rows a step (all labelled)"
    assert found["precision"] == "fp32, not sharded"
    assert found["evaluation"] == "data.test at the end"
    assert found["checkpoint"].startswith("every 15 min, and after the last step")
    found = entries(files=False, checkpoint={"minutes": None})
    assert found["evaluation"] == "none: there is neither data.test nor data.validation"
    assert found["run folder"] == "none: nothing is written"


def test_a_terminal_has_lines_of_its_width_and_a_log_has_one() -> None:
    path = "/data/" + "long/" * 20 + "run"
    (line,) = laid_out("duplicates", "none " * 30, None)
    assert line.startswith("duplicates: none none")
    lines = laid_out("tracker", f"none {'none ' * 30}{path}", 80)
    assert lines[0].startswith("tracker:    none")
    assert all(len(line) <= 80 for line in lines[:-1])
    assert all(line.startswith(" " * 12 + "none") for line in lines[1:-1])
    assert lines[-1].strip() == path


def test_names_of_many_classes_are_cut_off_between_names() -> None:
    assert _names(["cat", "dog"]) == "2 (cat, dog)"
    text = _names([f"class {number}" for number in range(1000)])
    assert text.startswith("1,000 (class 0, class 1, ")
    assert text.endswith(" more)")
    assert len(text) < 100
    assert _names(["x" * 500]) == f"1 ({'x' * 60}…)"


def test_devices_and_parameters() -> None:
    assert _devices([("a", "CPU")]) == "1 rank: CPU"
    assert _devices([("a", "H100"), ("a", "H100"), ("b", "H100")]) == "3 ranks on 2 hosts: H100"
    mixed = [("a", "H100"), ("a", "H200"), ("a", "H100")]
    assert _devices(mixed) == "3 ranks on 1 host: 2 x H100, 1 x H200"
    model = nn.Sequential(nn.Linear(9, 100), nn.Linear(100, 10))
    assert _parameters(model) == "2,010 parameters, all trained"
    model[0].requires_grad_(False)
    assert _parameters(model) == "2,010 parameters, 1,010 trained (50.25 %), 1,000 frozen"


def test_a_run_says_what_it_is_before_it_trains_and_from_where_it_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, 2, test=held_out(1, 2, 3), eval={"every": 1}).fit()
    told = capfd.readouterr().err.splitlines()
    labels = [line.partition(":")[0] for line in told]
    assert labels[:16] == [
        *(f"hpdist {__version__}", "algorithm", "batch", "precision", "evaluation", "checkpoint"),
        *("tracker", "run folder", "devices", "labelled", "classes", "unlabelled", "test", "input"),
        *("duplicates", "model"),
    ]
    said = dict(zip(labels, (line.partition(":")[2].strip() for line in told), strict=True))
    assert said["labelled"] == "12 of 30 rows"
    assert said["classes"] == "3 (0, 1, 2)"
    assert said["unlabelled"] == "30 rows in a table; an epoch is 4 steps"
    assert said["test"] == "3 rows"
    assert said["input"] == "vectors of 2 numbers"
    assert said["run folder"] == str(tmp_path / "run")
    assert said["model"].endswith(", 9 parameters, all trained")
    assert "accuracy" in said["step 2/2"]
    assert "%" in said["step 2/2"]
    trainer(tmp_path, 3, test=held_out(1, 2, 3)).fit()
    told = capfd.readouterr().err.splitlines()
    resumed = f"continuing from {tmp_path}/run/checkpoints/step-00000002 at step 2"
    assert told.index(resumed) < next(n for n, line in enumerate(told) if "step 3/3" in line)


def test_normalisation_by_rank_is_said_where_there_are_ranks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    batch = {"labeled": 4, "unlabeled": 8, "norm_statistics": "rank"}
    run = trainer(tmp_path, 1, model=model, batch=batch)
    run.fit()
    (norm,) = batch_norms(run.step.engine.module)
    assert norm.statistics == "rank"
    assert "norm_statistics" not in capfd.readouterr().err  # on one process it makes no difference
    log_model("m", run.step.engine.module, 1, 4, True)
    (note,) = [line for line in capfd.readouterr().err.splitlines() if "note" in line]
    assert note.startswith("note: batch.norm_statistics: rank: BatchNorm goes by the rows of each")
    norm.statistics = "global"
    log_model("m", run.step.engine.module, 1, 4, True)
    assert "note" not in capfd.readouterr().err


def test_a_summary_is_printed_in_units() -> None:
    summary = {
        "test/accuracy": 0.97222,
        "test/rmse": 0.123456,
        "validation/best_step": 12_000,
        "seconds": 7384.2,
        "examples": 1_280_000,
        "zero_stage": None,
        "precision": "bf16",
        "peak_memory_bytes": 5 * 2**30,
        "duplicates_not_compared": ["data.test was not compared", "nor was data.labeled"],
    }
    lines = dict(line.split(None, 1) for line in summary_lines(summary, "runs/x"))
    assert lines == {
        "test/accuracy": "97.22 %",
        "test/rmse": "0.1235",
        "validation/best_step": "12,000",
        "seconds": "2 h 03 min",
        "examples": "1,280,000 (173 a second)",
        "zero_stage": "none",
        "precision": "bf16",
        "peak_memory_bytes": "5.00 GiB",
        "duplicates_not_compared": "data.test was not compared; nor was data.labeled",
        "run": "folder                   runs/x",
    }
    assert list(summary_lines({}, "runs/x")) == []


def test_a_narrow_terminal_cuts_no_number_short(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(10_000, 0, main=True)
    console._shown = {"loss": "0.111", "mask rate": "0.03", "loss scale": "65536"}
    console._shown["accuracy"] = "80.83 %"
    for width, names in ((80, ["loss", "accuracy"]), (120, ["loss", "accuracy", *console._shown])):
        monkeypatch.setattr("hpdist.tracking.console.columns", lambda width=width: width)
        assert set(console._fitting) == set(names)
