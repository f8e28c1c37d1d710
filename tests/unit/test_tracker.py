import json
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hpdist
from hpdist import config as configuration
from hpdist.divergence import OverflowStorm
from hpdist.tracking.environment import _hosts
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


def test_a_run_that_goes_on_is_one_run_in_wandb(run):
    folder = run("curve", "wandb", "--steps=4", "--checkpoint.every=4")
    run("curve", "wandb", "--steps=8")
    ids = {path.name.removesuffix(".wandb") for path in folder.glob("wandb/offline-run-*/*.wandb")}
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2
    assert len(ids) == 1
    history, _, _ = written_by_wandb(folder)
    found = {row["_step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert found == {record["step"]: record["loss"] for record in records(folder)}
    assert list(found) == list(range(1, 9))


def test_wandb_is_told_where_and_with_what_code_a_run_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    _, settings, _ = written_by_wandb(run("told", "wandb"))
    assert settings["git_commit"] == commit.strip()
    assert settings["hpdist"] == hpdist.__version__
    assert settings["torch"] == torch.__version__
    assert settings["hosts"] == f"{socket.gethostname()} (rank 0: CPU)"
    topology = ("world_size", "precision", "zero_stage", "offload", "accumulation")
    assert [settings[name] for name in topology] == [1, "fp32", "none", "none", 1]


def test_every_evaluation_has_its_confusion_matrix(run):
    history, _, _ = written_by_wandb(run("evaluated", "wandb", "--eval.every=5"))
    tables = {row["_step"] for row in history if "eval/test/confusion/_type" in row}
    assert tables == {5, 10}
    assert all("eval/test/accuracy" in row for row in history if row["_step"] in tables)


@pytest.mark.filterwarnings("ignore:HPDIST_ALLOW_CPU_FP16")
def test_overflows_name_their_culprit_and_a_storm_of_them_is_an_alert(tmp_path, monkeypatch):
    """A loss scale that grows at every step is too large at every other one."""
    monkeypatch.setenv("HPDIST_ALLOW_CPU_FP16", "1")
    config = write_config(tmp_path, write_pictures(tmp_path))
    settings = ["--tracker.name=wandb", "--steps=60", "--precision=fp16"]
    settings += ["--loss_scale.growth_interval=1"]
    status, errors = train(config, "storm", *settings)
    assert status == 0, errors
    folder = tmp_path / "runs" / "storm"
    history, _, alerts = written_by_wandb(folder)
    assert alerts == ["overflow storm"]
    said = [row["precision/overflow"] for row in history if "precision/overflow" in row]
    assert any("rank 0, supervised term, " in line for line in said)
    assert all("; loss scale " in line for line in said)


def test_a_storm_is_told_once_and_again_when_it_comes_back():
    storm = OverflowStorm()
    told = [storm.look(True) for _ in range(30)]
    assert [number for number, line in enumerate(told) if line] == [19]
    assert told[19] == "20 of the last 20 steps overflowed"
    assert not any(storm.look(False) for _ in range(100))
    assert [storm.look(True) for _ in range(20)][19] == "20 of the last 100 steps overflowed"
    calm = OverflowStorm()
    assert not any(calm.look(number < 16) for number in range(200))  # the first loss scale


def test_hosts_are_told_with_their_ranks_and_devices():
    places = [("n0", "H100")] * 4 + [("n1", "H100")] * 2 + [("n2", "CPU")]
    assert _hosts(places) == "n0 (ranks 0 to 3: H100), n1 (ranks 4, 5: H100), n2 (rank 6: CPU)"


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
