"""W&B's, MLflow's and TensorBoard's own variables: over defaults, under what the config names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.engines.launch import make_accelerator
from hpdist.tracking.tracker import Tracker
from hpdist.tracking.variables import (
    Chosen,
    choose_mlflow,
    choose_tensorboard,
    choose_wandb,
)
from hpdist.train import config as configuration
from hpdist.train.config import RunConfig


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TENSORBOARD_")):
            monkeypatch.delenv(name)
    make_accelerator(ExecutionPlan())  # Accelerate's trackers ask it which process is the main one


def config(**tracker: Any) -> RunConfig:
    return configuration.parse(
        {
            "run": {"name": "small"},
            "model": {"name": "mlp"},
            "algorithm": {"name": "supervised"},
            "data": {"labeled": {"path": "nowhere"}},
            "steps": 1,
            "tracker": tracker,
        }
    )


def tracker_of(config: RunConfig, folder: Path, *args: Any, **options: Any) -> Tracker:
    settings = config.model_dump(mode="json")
    return Tracker(config.tracker, config.run.name, settings, folder, *args, **options)


def wandb(tmp_path: Path, run_id: str | None = None, **tracker: Any) -> Chosen:
    return choose_wandb(config(**tracker).tracker, tmp_path, "small", run_id)


@pytest.mark.parametrize(
    ("variables", "tracker", "mode"),
    [
        ({}, {}, "offline"),
        ({"WANDB_MODE": "online"}, {}, "online"),
        ({"WANDB_MODE": "run"}, {}, "online"),
        ({"WANDB_MODE": "dryrun"}, {}, "offline"),
        ({"WANDB_MODE": "disabled"}, {}, "disabled"),
        ({"WANDB_MODE": "shared"}, {}, "shared"),
        ({"WANDB_DISABLED": "true"}, {}, "disabled"),
        ({"WANDB_DISABLED": "false"}, {}, "offline"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "1"}, {}, "disabled"),
        ({"WANDB_MODE": "disabled"}, {"mode": "offline"}, "offline"),
        ({"WANDB_DISABLED": "true"}, {"mode": "online"}, "online"),
        ({"WANDB_MODE": "offline"}, {"mode": "online"}, "online"),
    ],
)
def test_the_mode(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    tracker: dict[str, str],
    mode: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = wandb(tmp_path, **tracker)
    assert chosen.arguments["mode"] == mode
    decided = mode != "offline" if not tracker else "WANDB_MODE" in variables
    assert (chosen.line is not None) == (decided or "WANDB_MODE" in variables)


def test_a_config_that_was_written_down_says_no_more_than_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is started from its own config.yaml still listens to the variables."""
    path = tmp_path / "config.yaml"
    path.write_text(config().to_yaml())
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_PROJECT", "other")
    chosen = choose_wandb(configuration.load(path).tracker, tmp_path, "small", None)
    assert (chosen.project, chosen.disabled) == ("other", True)
    path.write_text(config(mode="offline", project="ours").to_yaml())
    chosen = choose_wandb(configuration.load(path).tracker, tmp_path, "small", None)
    assert (chosen.project, chosen.arguments["mode"]) == ("ours", "offline")
    assert "tracker.mode: offline of the config, over WANDB_MODE" in str(chosen.line)


def test_nothing_is_started_where_wandb_is_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said: list[str] = []
    tracker = tracker_of(config(), tmp_path, True, "abc", log=said.append)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert tracker.run_id == "abc"  # of the checkpoint, for a start that is not disabled
    assert list(tmp_path.iterdir()) == []
    assert said == ["tracker wandb: mode disabled by WANDB_MODE"]


def test_a_mode_that_wandb_has_not_costs_the_tracker_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "of-line")
    with pytest.warns(UserWarning, match="WANDB_MODE is 'of-line', and must be one of online"):
        tracker_of(config(), tmp_path, True).finish()


def test_wandb_is_started_as_its_variables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    variables = {
        "PROJECT": "other",
        "ENTITY": "us",
        "NAME": "shown",
        "RUN_GROUP": "together",
        "TAGS": "a,b",
        "DIR": str(elsewhere),
        "RUN_ID": "theirs",
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    pytest.importorskip("wandb").teardown()  # it has read its variables if it was used before
    said: list[str] = []
    tracker = tracker_of(config(), tmp_path / "run", True, log=said.append)
    assert tracker._tracker is not None
    run = tracker._tracker.tracker
    found = (run.project, run.entity, run.name, run.group, run.tags, run.id)
    assert found == ("other", "us", "shown", "together", ("a", "b"), "theirs")
    assert str(elsewhere) in run.dir
    tracker.finish()
    (line,) = said
    for name, value in variables.items():
        assert f"WANDB_{name}" in line
        assert value in line or name in ("ENTITY", "RUN_GROUP", "TAGS")


def test_the_run_of_a_checkpoint_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb(tmp_path, "saved").arguments["resume"] == "allow"
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    monkeypatch.setenv("WANDB_RESUME", "must")
    chosen = wandb(tmp_path, "saved")
    assert chosen.arguments["id"] == "saved"
    assert "resume" not in chosen.arguments  # left to W&B, which reads WANDB_RESUME
    assert "run saved of the checkpoint continues, over WANDB_RUN_ID" in str(chosen.line)
    assert wandb(tmp_path).arguments["id"] == "other"


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # put back, whatever is set
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    chosen = choose_mlflow(config(name="mlflow").tracker, tmp_path, None)
    assert (chosen.project, chosen.arguments) == ("theirs", {"run_id": "abc"})
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///elsewhere")
    chosen = choose_mlflow(config(name="mlflow", project="ours").tracker, tmp_path, "saved")
    assert (chosen.project, chosen.arguments) == ("ours", {"run_id": "saved"})
    assert os.environ["MLFLOW_TRACKING_URI"] == "file:///elsewhere"
    for said in ("ours of the config, over", "run saved of the", "MLFLOW_TRACKING_URI says"):
        assert said in str(chosen.line)


def test_mlflow_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's tracker by itself would put its variables over what the config names."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'theirs.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    for project, found in ((None, "theirs"), ("ours", "ours")):
        tracker = tracker_of(config(name="mlflow", project=project), tmp_path / "run", True)
        assert tracker._tracker is not None
        run = mlflow.get_run(tracker.run_id)
        assert mlflow.get_experiment(run.info.experiment_id).name == found
        tracker.finish()
    assert not (tmp_path / "run").exists()


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = config(name="tensorboard").tracker
    assert choose_tensorboard(tracker, tmp_path, "small").arguments == {
        "logging_dir": str(tmp_path)
    }
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "/boards")
    chosen = choose_tensorboard(tracker, tmp_path, "small")
    assert chosen.arguments == {"logging_dir": str(Path("/boards/small"))}
    assert "TENSORBOARD_LOGGING_DIR" in str(chosen.line)
