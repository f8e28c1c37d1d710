"""Predictions by exported files: those of the run, on any number of ranks, of one file alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

import hpdist
from hpdist import DataError, cli
from hpdist.data.config import Unlabeled
from hpdist.data.sources.label_files import RECORD
from hpdist.evaluate.predict import PredictOptions, predict_to
from tests.support.predictions import OPTIONS, ROWS, contents, make_run, vectors
from tests.support.ranks import run_ranks

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FILES = {"fp16.onnx": "fp16", "fp32.safetensors": "fp32"}
OTHERS = {"fp16.onnx": "fp32.onnx", "fp32.safetensors": "bf16.safetensors"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on numbers, its data, and two exported files of each format."""
    folder = tmp_path_factory.mktemp("exported")
    predictor = hpdist.load(make_run(folder))
    rows = {"path": str(folder / "data"), "input": "x"}
    for name in (*FILES, *OTHERS.values()):
        predictor.export(folder / name, rows, precision=name.split(".")[0])
    return folder


def on_rank(file: str, data: str, out: str) -> int:
    """Predict by a file, as one of several ranks; give their number."""
    from hpdist.distributed.joined import joined_ranks, own_place

    with joined_ranks():
        rank, world_size = own_place()
        predict_to(
            hpdist.load(file),
            Unlabeled(path=data),
            Path(out),
            PredictOptions(**OPTIONS),
            rank=rank,
            world_size=world_size,
        )
    return world_size


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_predicts_as_its_run(name: str, trained: Path) -> None:
    file, data, out = trained / name, str(trained / "data"), trained / f"labels-{name}"
    command = ["predict", str(file), data, "--out", str(out), "--probabilities"]
    command += ["--batch", str(OPTIONS["batch"]), "--rows-per-file", str(OPTIONS["part_rows"])]
    assert cli.main(command) == 0
    original, exported = hpdist.load(trained / "run"), hpdist.load(file)
    table = pq.read_table(out).sort_by("id")
    labels = table.column("label").to_pylist()
    assert len(labels) == ROWS
    assert labels == original.predict(vectors()) == exported.predict(vectors())
    assert len(set(labels)) > 1
    expected = original.predict_probabilities(vectors())
    for found in (
        np.array(table.column("probabilities").to_pylist()),
        exported.predict_probabilities(vectors()),
    ):
        np.testing.assert_allclose(found, expected, atol=0.01)
    before = contents(out)
    lost = out / "part-00000003.parquet"
    lost.unlink()
    assert cli.main(command) == 0
    assert contents(out) == before
    assert run_ranks(2, on_rank, str(file), data, f"{out}-2") == [2, 2]
    assert contents(Path(f"{out}-2")) == before


@pytest.mark.parametrize("name", list(FILES))
def test_another_file_is_refused_by_name(name: str, trained: Path) -> None:
    out = trained / f"own-{name}"
    options = PredictOptions(**OPTIONS)
    data = Unlabeled(path=str(trained / "data"))
    predict_to(hpdist.load(trained / name), data, out, options)
    digest = json.loads((out / RECORD).read_text())["weights"]
    copy = trained / f"copy-of-{name}"
    copy.write_bytes((trained / name).read_bytes())
    found = predict_to(hpdist.load(copy), data, out, options)
    assert found is not None
    assert found.predicted == 0
    for other in (trained / OTHERS[name], trained / "run"):
        with pytest.raises(DataError, match=f'weights was "{digest}", now'):
            predict_to(hpdist.load(other), data, out, options)
