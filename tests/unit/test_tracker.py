import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpdist import config as configuration
from hpdist.tracking.tracker import Tracker, grouped
from tests.picture_runs import train, write_config
from tests.pictures import write_pictures


@pytest.fixture
def run(tmp_path: Path):
    """Starts a run of ten steps with a tracker, and gives its folder."""
    config = write_config(tmp_path, write_pictures(tmp_path))
    test = {"path": "parquet", "data_files": str(tmp_path / "labeled.parquet"), "split": "train"}

    def start(name: str, tracker: str, *more: str) -> Path:
        overrides = [f"--tracker.name={tracker}", f"--data.test={json.dumps(test)}", "--steps=10"]
        status, errors = train(config, name, *overrides, *more)
        assert status == 0, errors
        return tmp_path / "runs" / name

    return start


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def blocks(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: parts within blocks of 32 KiB, behind a header of 7 bytes."""
    assert content[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(content):
        rest = 32768 - at % 32768
        if rest < 7:
            at += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def written_by_wandb(run: Path) -> tuple[list[dict], dict, list[str]]:
    """History, config and alerts of the offline files, in the order in which they were written."""
    from wandb.proto.wandb_internal_pb2 import Record

    history, settings, alerts = [], {}, []
    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        found: list[Record] = []
        deadline = time.monotonic() + 30
        while not any(record.HasField("exit") for record in found):  # W&B's own process writes it
            assert time.monotonic() < deadline
            found = [Record.FromString(data) for data in blocks(file.read_bytes())]
        for record in found:
            if record.HasField("history"):
                items = record.history.item
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                history.append(row)
            if record.HasField("alert"):
                alerts.append(record.alert.title)
            changes = [record.run.config] if record.HasField("run") else [record.config]
            for item in (item for change in changes for item in change.update):
                settings[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return history, settings, alerts


def test_what_wandb_writes_has_the_numbers_of_metrics_jsonl(run):
    folder = run("weights", "wandb")
    history, settings, _ = written_by_wandb(folder)
    rows = {row["_step"]: row for row in history}
    found = records(folder)
    assert [record["step"] for record in found] == list(range(1, 11))
    for record in found:
        row = rows[record["step"]]
        for key, value in record.items():
            if key not in ("step", "attempt") and not isinstance(value, list):
                assert row[grouped(key)] == pytest.approx(value, nan_ok=True), key
    assert settings["algorithm.threshold"] == 0.2
    assert settings["world_size"] == 1
    assert rows[10]["eval/test/confusion/_type"] == "table-file"


def test_numbers_stand_in_groups():
    expected = {
        "loss": "train/loss",
        "lr": "train/lr",
        "loss_scale": "precision/loss_scale",
        "mask_rate": "pseudo-labels/mask_rate",
        "thresholds": "pseudo-labels/thresholds",
        "bad_rows": "stream/bad_rows",
        "examples_per_second": "system/examples_per_second",
        "eval/test/accuracy": "eval/test/accuracy",
    }
    assert {key: grouped(key) for key in expected} == expected


def test_a_run_that_goes_on_is_one_run_in_mlflow(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # put back, whatever the run sets
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    folder = run("flow", "mlflow", "--steps=4", "--checkpoint.every=4")
    run("flow", "mlflow", "--steps=8")
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'hpdist'")
    (one,) = client.search_runs([experiment.experiment_id])
    losses = client.get_metric_history(one.info.run_id, "train/loss")
    found = {metric.step: metric.value for metric in losses}
    assert found == {record["step"]: record["loss"] for record in records(folder)}
    assert one.data.params["algorithm.name"] == "fixmatch"


def test_lists_are_a_number_and_a_bar_for_each_class(tmp_path):
    config = configuration.parse(
        {
            "model": {"name": "mlp"},
            "algorithm": {"name": "supervised"},
            "data": {"labeled": {"path": "nowhere"}},
            "steps": 1,
        }
    )
    tracker = Tracker(config, tmp_path, main=True)
    tracker.log({"thresholds": [0.5, 0.25]}, 1)
    tracker.log({"pseudo_labels": [1 / 30] * 30}, 2)
    tracker.alert("divergence", "the loss has been NaN since step 2")
    tracker.finish()
    (first, second), _, alerts = written_by_wandb(tmp_path)
    assert first["pseudo-labels/thresholds/0"] == 0.5
    assert first["pseudo-labels/thresholds/histogram/values"] == [0.5, 0.25]
    assert len(second["pseudo-labels/pseudo_labels/histogram/values"]) == 30
    assert "pseudo-labels/pseudo_labels/0" not in second
    assert alerts == ["divergence"]


@pytest.mark.parametrize(
    ("settings", "alerts"),
    [
        (["--optim.lr=1e30"], ["PrecisionError"]),
        (
            ["--divergence.collapse_share=0.1", "--divergence.collapse_steps=2"],
            ["divergence", "DivergenceError"],
        ),
    ],
)
def test_a_run_that_goes_wrong_says_so_to_whoever_watches(tmp_path, settings, alerts):
    config = write_config(tmp_path, write_pictures(tmp_path))
    status, errors = train(config, "wild", "--tracker.name=wandb", "--steps=10", *settings)
    assert status == 3
    assert alerts[-1] in errors[0]
    assert written_by_wandb(tmp_path / "runs" / "wild")[2] == alerts
