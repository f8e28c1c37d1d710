import json
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

import hpdist
from hpdist.tracking.environment import _hosts
from hpdist.tracking.metrics import curve_names, grouped
from hpdist.tracking.tracker import Tracker
from hpdist.train import config as configuration
from hpdist.train.divergence import OverflowStorm
from tests.support.picture_runs import train, write_config
from tests.support.pictures import write_pictures


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


def a_config(tracker: str = "wandb", **labeled):
    PartialState()  # Accelerate's trackers ask it whose rank this is
    return configuration.parse(
        {
            "model": {"name": "mlp"},
            "algorithm": {"name": "supervised"},
            "data": {"labeled": {"path": "nowhere", **labeled}},
            "tracker": {"name": tracker},
            "steps": 1,
        }
    )


def tracker_of(config, folder, **options):
    settings = config.model_dump(mode="json")
    return Tracker(config.tracker, config.run.name, settings, folder, **options)


def test_lists_are_a_number_and_a_bar_for_each_class(tmp_path):
    tracker = tracker_of(a_config(), tmp_path, main=True, classes=["cat", "dog/wolf"])
    tracker.log({"thresholds": [0.5, 0.25], "examples_per_second_per_rank": [3.0, 4.0]}, 1)
    tracker.log({"pseudo_labels": [1 / 30] * 30}, 2)
    tracker.alert("divergence", "the loss has been NaN since step 2")
    tracker.finish()
    (first, second), _, alerts = written_by_wandb(tmp_path)
    assert first["pseudo-labels/thresholds/cat"] == 0.5
    assert first["pseudo-labels/thresholds/dog_wolf"] == 0.25
    assert first["system/examples_per_second_per_rank/1"] == 4
    assert first["pseudo-labels/thresholds/histogram/values"] == [0.5, 0.25]
    assert len(second["pseudo-labels/pseudo_labels/histogram/values"]) == 30
    assert "pseudo-labels/pseudo_labels/0" not in second
    assert second["pseudo-labels/pseudo_labels/max"] == 1 / 30
    assert alerts == ["divergence"]


ODD = [
    {
        "loss": 0.5,
        "thresholds": [0.25] * 1000,
        "pseudo_labels": [number / 21_841 for number in range(21_841)],
        "examples_per_second_per_rank": [float(number) for number in range(1000)],
    },
    {"loss": 0.25, "thresholds": [0.5] * 512, "pseudo_labels": [1.0] * 513, "other": []},
    {"loss": 0.125, "thresholds": [float("nan"), float("inf")] * 600, "grad_norm": float("nan")},
    {"loss": 1e300, "lr": float("inf"), "thresholds": [-1e308, 1e308, float("-inf")] * 100},
    {"loss": 1.0, "bad_rows": 10**400, "pseudo_labels": [float("nan"), 0.5], "epoch": 10**30},
    {"loss": 2.0, "none": None, "mask_rate": 1, "text": "x" * 200_000, "of a/b c\n\0\u00fc": 3.0},
]
NAMES = ["a/b", "a b", "", "same", "same", "\u732b", "x" * 500, "histogram", ".", "A_B", "$x<y>\n"]


def send_odd(name: str, folder: Path) -> None:
    """What no run should lose its tracker by; then a record like any other."""
    tracker = tracker_of(a_config(name), folder, main=True, classes=NAMES)
    for step, record in enumerate(ODD, 1):
        tracker.log(record, step)
    tracker.log({"thresholds": [number / 16 for number in range(len(NAMES))]}, len(ODD) + 1)
    counts = [[int(true == said) for said in range(1100)] for true in range(1100)]
    counts[7][9] = 3
    classes = [f"class {number}" for number in range(1100)]
    tracker.log_confusions({"test": {"classes": classes, "teacher": counts}}, len(ODD) + 2)
    tracker.note("overflow", "rank 3, " + "x" * 100_000, len(ODD) + 2)
    tracker.alert("t" * 500, "x" * 100_000)
    tracker.log({"loss": 3.0}, len(ODD) + 3)
    tracker.finish()


def test_only_who_sends_confusion_matrices_is_given_them(tmp_path):
    """A matrix as lists takes far more memory than the scores, which every rank has."""
    assert not tracker_of(a_config("wandb"), tmp_path, main=False).has_tables
    assert not tracker_of(a_config("none"), tmp_path, main=True).has_tables


def test_no_metric_turns_wandb_off(tmp_path, recwarn):
    send_odd("wandb", tmp_path)
    assert [str(warning.message) for warning in recwarn if "tracker" in str(warning.message)] == []
    history, _, _ = written_by_wandb(tmp_path)
    rows = {row["_step"]: row for row in history}
    assert rows[len(ODD) + 3]["train/loss"] == 3.0
    first = rows[1]
    bars = first["pseudo-labels/pseudo_labels/histogram/values"]
    assert len(bars) == 508  # of 43 classes each
    assert bars[0] == pytest.approx(21 / 21_841)
    assert first["pseudo-labels/pseudo_labels/histogram/bins"][-1] == 21_841
    assert first["pseudo-labels/thresholds/histogram/values"] == [0.25] * 500
    assert first["system/examples_per_second_per_rank/mean"] == 499.5
    assert rows[2]["pseudo-labels/thresholds/histogram/bins"] == list(range(513))
    assert len(rows[2]["pseudo-labels/pseudo_labels/histogram/values"]) == 257
    assert rows[3]["pseudo-labels/thresholds/histogram/values"] == [0.0] * 400
    named = {key: value for key, value in rows[len(ODD) + 1].items() if "thresholds/" in key}
    curves = sorted(value for key, value in named.items() if "/histogram/" not in key)
    assert curves == [number / 16 for number in range(len(NAMES))]
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/eval/test/*.json")
    pairs = json.loads(table.read_text())["data"]
    assert pairs[0] == ["class 7", "class 9", 3]
    assert len(pairs) == 1101


def test_no_metric_turns_tensorboard_off(tmp_path, recwarn):
    send_odd("tensorboard", tmp_path)
    said = [str(warning.message) for warning in recwarn if "tracker" in str(warning.message)]
    assert len(said) == 1  # an integer that no float is as large as
    assert said[0].startswith("tracker tensorboard refuses stream/bad_rows, which are not sent")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (file for file in tmp_path.glob("hpdist/events*"))
    events = EventAccumulator(str(file)).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses[len(ODD) + 3] == 3.0
    assert len(losses) == len(ODD) + 1
    curves = [tag for tag in events.Tags()["scalars"] if tag.startswith("pseudo-labels/thresholds")]
    of_classes = [tag for tag in curves if not tag.endswith(("mean", "min", "max"))]
    assert sorted(of_classes) == sorted(f"pseudo-labels/thresholds/{n}" for n in curve_names(NAMES))


def test_curves_of_classes_have_names_that_differ_and_that_trackers_take():
    assert curve_names(["cat", "dog"]) == ["cat", "dog"]
    assert curve_names(["0", "1"]) == ["0", "1"]
    assert curve_names(["a b", "c"]) == ["a_b", "c"]
    odd = curve_names(NAMES)
    assert len({name.casefold() for name in odd}) == len(NAMES)
    assert all(re.fullmatch(r"[\w.-]{1,70}", name) for name in odd)
    assert curve_names(["mean", "max"]) == ["0_mean", "1_max"]
    assert curve_names(["Cat", "cat"]) == ["0_Cat", "1_cat"]


def test_a_tracker_that_is_gone_is_given_up_and_says_so_once(tmp_path, recwarn):
    tracker = tracker_of(a_config("tensorboard"), tmp_path, main=True)
    tracker.log({"loss": 1.0}, 1)
    tracker._tracker.writer.close()
    tracker._tracker.writer.file_writer = None
    tracker._tracker.writer._get_file_writer = None  # as it is when its folder cannot be written
    for step in (2, 3):
        tracker.log({"loss": 1.0, "lr": 2.0}, step)
    tracker.finish()
    (said,) = [str(warning.message) for warning in recwarn if "tracker" in str(warning.message)]
    assert said.startswith("tracker tensorboard failed and is off for the rest of the run")


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
