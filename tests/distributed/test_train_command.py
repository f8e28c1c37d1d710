"""`accelerate launch -m hpdist train` on two processes, and the files that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from hpdist.data.samples.digits import write_digits
from hpdist.tracking.tracker import Tracker
from hpdist.train import config as configuration

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    digits = write_digits(folder / "digits")
    train = f"{digits}/train-*.parquet"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", ROOT / "configs/accelerate/cpu_bf16.yaml", "--main_process_port", "0"),
        *("-m", "hpdist", "train", ROOT / "configs/digits.yaml"),
        *("--data.labeled.data_files.train", train, "--data.unlabeled.data_files.train", train),
        *("--data.test.data_files.test", f"{digits}/test-*.parquet", "--model.width", "8"),
        *("--steps", "6", "--log.every", "2", "--eval.every", "3", "--checkpoint.every", "2"),
        *("--algorithm.name", "freematch", "--run.dir", folder / "runs", "--run.name", "command"),
    ]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (folder / "runs/command/stdout").write_text(done.stdout)
    (folder / "runs/command/stderr").write_text(done.stderr)
    return folder / "runs/command"


def test_leaves_the_run_folder_of_the_contract(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["skipped_steps"] == 0
    assert summary["world_size"] == 2
    assert summary["precision"] == "bf16"
    assert summary["zero_stage"] is None
    assert summary["examples"] == 6 * 256
    assert summary["peak_memory_bytes"] > 10**8
    assert 0 < summary["test/accuracy"] < 1
    assert 0 < summary["test/accuracy_student"] < 1
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 3, 4, 6]
    logged = {"step", "attempt", "loss", "supervised_loss", "unsupervised_loss", "mask_rate"}
    logged |= {"loss_scale", "overflows", "lr", "grad_norm", "examples_per_second", "epoch"}
    assert logged <= records[0].keys()
    for record in records[::2]:  # of 2 ranks together; the second is an evaluation only
        shares = record["pseudo_labels"]
        assert len(shares) == len(record["thresholds"]) == 10
        assert sum(shares) == pytest.approx(1)
        assert max(shares) == pytest.approx(record["pseudo_label_top_share"])
        assert 0.1 <= record["confidence"] <= 1
        assert 0 < record["teacher_decay"] < 1
    evaluated = [record["step"] for record in records if "eval/test/accuracy" in record]
    assert evaluated == [3, 6]
    assert records[-1]["eval/test/accuracy"] == summary["test/accuracy"]
    for score in ("macro_f1", "balanced_accuracy"):
        assert records[-1][f"eval/test/{score}"] == summary[f"test/{score}"]
        assert 0 < records[-1][f"eval/test/{score}_student"] < 1
    confusion = json.loads((run / "confusion_test.json").read_text())
    assert confusion["classes"] == [str(digit) for digit in range(10)]
    for which, key in (("teacher", "test/accuracy"), ("student", "test/accuracy_student")):
        assert sum(map(sum, confusion[which])) == 360
        assert sum(confusion[which][digit][digit] for digit in range(10)) / 360 == summary[key]
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["step-00000004", "step-00000006"], "two are kept"
    assert len(json.loads((run / "labeled_rows.json").read_text())) == 40


def test_the_written_config_is_the_one_that_ran(run: Path) -> None:
    config = configuration.load(run / "config.yaml")
    assert (config.steps, config.algorithm.name, config.run.name) == (6, "freematch", "command")


def test_only_the_main_process_speaks_and_tracks(run: Path) -> None:
    assert (run / "stdout").read_text().count("test/accuracy_student") == 1
    assert (run / "stderr").read_text().count("step 2/6") == 1
    assert len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 1


def test_a_tracker_that_fails_warns_once_and_training_goes_on(tmp_path: Path) -> None:
    settings = {
        "model": {"name": "mlp"},
        "algorithm": {"name": "supervised"},
        "data": {"labeled": {"path": "nowhere"}},
        "steps": 1,
        "tracker": {"name": "tensorboard"},
    }
    folder = tmp_path / "file"
    folder.write_text("where the tracker wants a folder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = configuration.parse(settings)
        whole = config.model_dump(mode="json")
        tracker = Tracker(config.tracker, config.run.name, whole, folder, main=True)
        tracker.log({"loss": 1.0}, 1)
        tracker.finish()
    told = [str(w.message) for w in caught if "tracker tensorboard failed" in str(w.message)]
    assert len(told) == 1
    assert "training continues" in told[0]
