"""What a user can get wrong about data, batch, model and run folder: one line, before training."""

import sys
from pathlib import Path

import pytest
import torch

from hpdist import cli
from hpdist.data.samples.digits import write_digits
from hpdist.errors import ConfigError
from hpdist.train.checks import divide_batch
from hpdist.train.compose import compose
from hpdist.train.config import parse

CONFIG = """
run: {dir: runs}
model: {name: mlp, hidden: [8]}
data:
  labeled: {path: parquet, data_files: {train: digits/train-*.parquet}, labels_per_class: 2}
  unlabeled: {path: parquet, data_files: {train: digits/train-*.parquet}}
batch: {labeled: 4, unlabeled: 8}
algorithm: {name: fixmatch}
tracker: {name: none}
steps: 1
"""
MODULE = """
from torch import nn

def three(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def wide(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(65, num_classes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("errors")
    write_digits(path / "digits")
    (path / "run.yaml").write_text(CONFIG)
    (path / "wrong_models.py").write_text(MODULE)
    return path


@pytest.fixture
def here(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("HPDIST_ALLOW_CPU_FP16", raising=False)
    return folder


def refusal(capfd, *overrides: str) -> str:
    assert cli.main(["train", "run.yaml", *overrides]) == 2
    output = capfd.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("hpdist: ")]
    assert "Traceback" not in output.err
    assert not list(Path("runs").glob("*/metrics.jsonl"))
    assert not list(Path("runs").glob("*/checkpoints/*"))
    (line,) = lines
    return line.removeprefix("hpdist: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.labeled.data_files=nope-*.parquet",
            "DataError: data.labeled.data_files: nothing matches 'nope-*.parquet'",
        ),
        ("data.labeled.path=./nowhere", "DataError: data.labeled.path: './nowhere' does not exist"),
        (
            "data.labeled.split=valid",
            'DataError: data.labeled.split: Unknown split "valid". Should be one of train.',
        ),
        (
            "data.unlabeled.split=valid",
            'DataError: data.unlabeled.split: Unknown split "valid". Should be one of train.',
        ),
        ("data.labeled.split=train[:0]", "DataError: data.labeled (parquet"),
        (
            "data.labeled.input=pixels",
            "DataError: data.labeled.input: there is no column 'pixels'; there are image, label",
        ),
        (
            "data.labeled.label=target",
            "DataError: data.labeled.label: there is no column 'target'; there are image, label",
        ),
        (
            "data.unlabeled.input=pixels",
            "DataError: data.unlabeled.input: there is no column 'pixels'; there",
        ),
        (
            "data.labeled.labels_per_class=999",
            "DataError: data.labeled.labels_per_class: 999 asked for, class '0' has ",
        ),
        (
            "model.num_classes=5",
            "DataError: data.labeled.label: column 'label' has 10 classes, but model.num_",
        ),
        (
            "data.unlabeled=null",
            "ConfigError: data.unlabeled is missing: algorithm fixmatch learns from",
        ),
        (
            "batch.micro=5",
            "ConfigError: batch.micro: 5 rows do not divide each rank's 12 rows",
        ),
        (
            "model.name=python:wrong_models:three",
            "ConfigError: model: it maps inputs [2, 1, 8, 8] to [2, 3], expected logits [2, 10]",
        ),
        (
            "model.name=python:wrong_models:wide",
            "ConfigError: model: it fails on inputs of shape [2, 1, 8, 8]: RuntimeError: mat1",
        ),
        (
            "views.mean=[0.1, 0.2]",
            "ConfigError: views.mean has 2 values, but the rows have 1 channels",
        ),
    ],
)
@pytest.mark.usefixtures("here")
def test_data_batch_and_model(override, message, capfd):
    assert refusal(capfd, f"--{override}").startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for want of a GPU")
@pytest.mark.usefixtures("here")
def test_fp16_needs_a_gpu(capfd):
    assert "precision: fp16 needs a GPU, and none is visible" in refusal(capfd, "--precision=fp16")


def test_the_run_folder(here, capfd):
    (here / "a_file").touch()
    line = refusal(capfd, "--run.dir=a_file")
    assert line.startswith("CheckpointError: run.dir: cannot write to the run folder 'a_file/run'")
    (here / "runs" / "full").mkdir(parents=True)
    (here / "runs" / "full" / "notes.txt").touch()
    line = refusal(capfd, "--run.name=full", "--checkpoint.resume=never")
    assert line.startswith("CheckpointError: checkpoint.resume: never, but the run folder")


@pytest.mark.usefixtures("here")
def test_two_ranks(capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refusal(capfd, "--batch.labeled=33")
    assert line == ("ConfigError: batch.labeled: 33 rows do not divide over 2 ranks; use 32 or 34")


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "micro", "ranks", "count"),
    [
        (8, 56, None, 1, 1),
        (8, 56, 64, 1, 1),
        (8, 56, 999, 1, 1),
        (8, 56, 16, 1, 4),
        (8, 56, 16, 2, 2),
        (8, 56, 8, 4, 2),
        (8, 56, 5, 1, "possible: 8, 16, 32, 64"),
        (8, 56, 24, 1, "possible: 8, 16, 32, 64"),
        (8, 57, None, 2, "batch.unlabeled: 57 rows do not divide over 2 ranks; use 56 or 58"),
        (1, 56, None, 2, "batch.labeled: 1 rows do not divide over 2 ranks; use 2"),
    ],
)
def test_divide_batch(labeled, unlabeled, micro, ranks, count):
    batch = {"labeled": labeled, "unlabeled": unlabeled, "micro": micro}
    config = parse(
        {"model": {"name": "mlp"}, "algorithm": {"name": "fixmatch"}, "steps": 1, "batch": batch}
        | {"data": {"labeled": {"path": "x"}}}
    )
    if isinstance(count, int):
        assert divide_batch(config.batch, compose(config), ranks) == count
    else:
        with pytest.raises(ConfigError) as caught:
            divide_batch(config.batch, compose(config), ranks)
        assert str(caught.value).endswith(count)


def test_unlabelled_rows_that_are_not_used_need_not_divide():
    config = parse(
        {"model": {"name": "mlp"}, "algorithm": {"name": "supervised"}, "steps": 1}
        | {"data": {"labeled": {"path": "x"}}, "batch": {"labeled": 8, "unlabeled": 7, "micro": 4}}
    )
    assert divide_batch(config.batch, compose(config), 2) == 1
