"""Models whose predicting head cannot take the place of the last layer: they keep it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hpdist
from hpdist import CheckpointError, cli
from hpdist.evaluate.model_folder import HEADS
from hpdist.models.with_heads import WithHeads
from hpdist.train.trainer import Trainer
from tests.support.model_runs import outputs_of, trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, Any]:
    """ABC's head predicts from a layer that is named, and not from the last one's input."""
    folder = tmp_path_factory.mktemp("kept")
    model = {"name": "mlp", "hidden": [8, 4], "features": "features.1"}
    trainer, rows = trained(folder, "table", model=model, addons=["abc"], validation=None)
    rows.to_parquet(str(folder / "rows.parquet"))
    return folder / "run", trainer, rows


def test_outputs_are_those_of_the_training_process(run: tuple[Path, Trainer, Any]) -> None:
    folder, trainer, rows = run
    expected = outputs_of(trainer)
    assert (folder / "model" / HEADS).is_file()
    for place in (folder, folder / "model", folder / "checkpoints" / "step-00000003"):
        loaded = hpdist.load(place)
        assert isinstance(loaded.model, WithHeads)
        assert list(loaded.model.heads) == [loaded.model.predicts]
        found = loaded.raw_outputs(rows, batch=5)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)
    student = hpdist.load(folder, "student").raw_outputs(rows, batch=5)
    torch.testing.assert_close(student, outputs_of(trainer, teacher=False), rtol=0.0, atol=1e-6)
    assert not torch.equal(student, expected)


def test_half_precision_halves_the_head_too(run: tuple[Path, Trainer, Any]) -> None:
    folder, trainer, rows = run
    half = hpdist.load(folder, precision="bf16")
    assert isinstance(half.model, WithHeads)
    assert {p.dtype for p in half.model.heads.parameters()} == {torch.bfloat16}
    expected = outputs_of(trainer)
    assert 0 < (half.raw_outputs(rows) - expected).abs().max() < 0.05


@pytest.mark.parametrize(
    ("name", "precision"),
    [("m.safetensors", "fp32"), ("m.safetensors", "fp16"), ("m.onnx", "fp16")],
)
def test_exported_files_have_the_head(
    run: tuple[Path, Trainer, Any], tmp_path: Path, name: str, precision: str
) -> None:
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    folder, trainer, rows = run
    out = tmp_path / name
    data = str(folder.parent / "rows.parquet")
    command = ["export", str(folder), data, "--out", str(out), "--precision", precision]
    assert cli.main(command) == 0
    expected = outputs_of(trainer)
    limit = 1e-6 if precision == "fp32" else 5e-3
    assert (hpdist.load(out).raw_outputs(rows) - expected).abs().max() < limit


def test_a_folder_without_the_head_is_refused(
    run: tuple[Path, Trainer, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run[0] / "model", folder)
    (folder / HEADS).unlink()
    with pytest.raises(CheckpointError, match=HEADS):
        hpdist.load(folder)
