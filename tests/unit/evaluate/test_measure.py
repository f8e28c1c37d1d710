"""`hpdist evaluate`: the scores of the run, in several precisions, on any set."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import hpdist
from hpdist import cli
from hpdist.evaluate.measure import measure, open_measured
from hpdist.evaluate.precisions import in_precisions, table
from tests.support.model_runs import KINDS, trained

SHOWN = {"table": "accuracy", "numbers": "rmse", "tags": "mean_average_precision"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run on pictures whose test set is a file, and its rows."""
    folder = tmp_path_factory.mktemp("measure")
    rows = KINDS["pictures"](folder)["rows"]
    file = folder / "rows.parquet"
    rows.to_parquet(str(file))
    trained(folder, "pictures", test={"path": str(file)})
    return folder / "run", rows


@pytest.mark.parametrize("kind", ["table", "pictures", "texts", "numbers", "tags", "with_head"])
def test_scores_are_those_of_the_training(kind: str, tmp_path: Path) -> None:
    trainer, rows = trained(tmp_path, kind)
    expected = trainer.measuring.evaluate(trainer.data.test).teacher.values
    predictor = hpdist.load(tmp_path / "run")
    found = predictor.evaluate(rows, batch=5)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


def test_what_half_precision_costs(run: tuple[Path, Any]) -> None:
    folder, rows = run
    models = in_precisions(hpdist.load(folder), ["bf16", "fp16"])
    found = {one.precision: one for one in measure(models, open_measured(models[0]), 5)}
    assert list(found) == ["fp32", "bf16", "fp16"]
    full = found["fp32"]
    assert (full.agreement, full.largest_difference, full.rows) == (1.0, 0.0, len(rows))
    outputs = {model.precision: model.raw_outputs(rows, batch=5) for model in models}
    for name in ("bf16", "fp16"):
        one, other = outputs[name], outputs["fp32"]
        difference = float((one.double() - other.double()).abs().max())
        assert found[name].largest_difference == pytest.approx(difference)
        agreement = float((one.argmax(dim=1) == other.argmax(dim=1)).double().mean())
        assert found[name].agreement == agreement
        assert found[name].bytes < 0.52 * full.bytes
        assert found[name].simulated == (name == "fp16")
    shown = table(list(found.values()), frozenset({"accuracy"}))
    assert "fp16 is simulated on this CPU" in shown
    assert " %" in shown.splitlines()[1]


def test_what_leaves_the_range_is_named(run: tuple[Path, Any]) -> None:
    """A model whose fp16 overflows: its rows are counted, and its difference stays a number."""
    folder, _ = run
    loaded = hpdist.load(folder)
    assert loaded.model is not None
    last = [m for m in loaded.model.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight[0] = 1e6
    models = in_precisions(loaded, ["fp16"])
    full, half = measure(models, open_measured(loaded), 5)
    assert not full.not_finite
    assert half.not_finite > 0
    assert math.isfinite(half.largest_difference)
    assert "in fp16, outputs of" in table([full, half])
    json.dumps(half.to_json(), allow_nan=False)


def test_the_command(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, rows = run
    assert cli.main(["evaluate", str(folder), "--precision", "fp32,bf16"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{folder}/model: the teacher of step 3, the last; 12 rows in ")
    assert [line.split()[0] for line in shown[1:4]] == ["precision", "fp32", "bf16"]
    written = json.loads((folder / "evaluation.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert written["results"].keys() == {"fp32", "bf16"}
    scores = written["results"]["fp32"]["scores"]
    assert scores["accuracy"] == pytest.approx(summary["test/accuracy"])
    assert written["names"] == ["cat", "dog", "owl"]
    assert sum(map(sum, written["results"]["fp32"]["confusion"])) == written["rows"] == 12
    assert written["run"]["id"] == hpdist.load(folder).run_id

    out = tmp_path / "out" / "found.json"
    some = ["--data.test.split", "train[:5]", "--out", str(out), "--precision", "bf16"]
    assert cli.main(["evaluate", str(folder / "model"), *some]) == 0
    found = json.loads(out.read_text())
    assert (found["rows"], list(found["results"])) == (5, ["bf16"])
    assert found["results"]["bf16"]["largest_difference"] > 0, "compared with fp32 all the same"

    rows.rename_columns({"image": "photo", "label": "animal"}).to_parquet(
        str(tmp_path / "b.parquet")
    )
    student = ["--which", "student", "--checkpoint", "2", "--data.test.label", "animal"]
    data = [str(tmp_path / "b.parquet"), "--data.test.input", "photo", "--out", str(out)]
    assert cli.main(["evaluate", str(folder), *data, *student]) == 0
    found = json.loads(out.read_text())
    assert (found["rows"], found["step"], found["which"]) == (12, 2, "student")


def test_rows_that_cannot_be_read_are_left_out(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.parquet"
    stored = run[1].cast_column("image", datasets.Image(decode=False)).to_list()
    stored[3]["image"] = {"bytes": b"no picture", "path": None}
    datasets.Dataset.from_list(stored, features=run[1].features).to_parquet(str(file))
    out = tmp_path / "found.json"
    assert (
        cli.main(["evaluate", str(run[0]), str(file), "--out", str(out), "--precision", "fp32"])
        == 0
    )
    assert "note: 1 row could not be decoded" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found["rows"], found["bad_rows"]) == (11, 1)
    assert found["results"]["fp32"]["agreement"] == 1.0


def test_what_is_wrong_is_one_line(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, rows = run

    def refused(what: str, *arguments: str, status: int = 2) -> None:
        assert cli.main(["evaluate", *arguments]) == status
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert what in line

    place = str(folder)
    refused("there is no", str(tmp_path / "nothing"))
    refused("--precision: int4 is none of fp32, bf16, fp16", place, "--precision", "fp32,int4")
    refused("--checkpoint: 'first' is neither", place, "--checkpoint", "first")
    refused("evaluate takes settings of the set", place, "--optim.lr", "1")
    refused("--batch: 0 must be at least 1", place, "--batch", "0")
    refused("does not exist", place, str(tmp_path / "nothing.parquet"))
    rows.remove_columns("label").to_parquet(str(tmp_path / "bare.parquet"))
    refused("label", place, str(tmp_path / "bare.parquet"))
    copy = shutil.copytree(folder / "model", tmp_path / "model")
    file = copy / "hpdist.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"test": None}))
    refused("the run's data.test is not there; name the data to measure on", str(copy))
    file.write_text(json.dumps(values | {"format": 2}))
    refused("has format 2, this hpdist knows up to 1", str(copy))


def test_a_test_set_given_in_python_must_be_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trained(tmp_path, "table")
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    assert "was given in Python; name the data to measure on" in capsys.readouterr().err


def test_a_password_that_was_left_out_is_asked_for(run: tuple[Path, Any], tmp_path: Path) -> None:
    """The run's files have none, so the address that needed one must be given again."""
    loaded = hpdist.load(run[0])
    secret = "https://user:word@host.invalid/rows.parquet"
    loaded.description.test = {"set": {"path": secret}, "loading": {}}
    text = loaded.description.to_json()
    assert "word@" not in text
    loaded.description.test = json.loads(text)["test"]
    with pytest.raises(hpdist.ConfigError, match=r"data.test.path: a password or signature"):
        open_measured(loaded)
    rows = tmp_path / "rows.parquet"
    run[1].to_parquet(str(rows))
    assert len(open_measured(loaded, overrides={"path": str(rows)})) == 12


def test_agreement_is_the_share_of_rows_with_the_same_label(run: tuple[Path, Any]) -> None:
    folder, rows = run
    loaded, other = hpdist.load(folder), hpdist.load(folder)
    assert other.model is not None
    last = [m for m in other.model.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.neg_()
    same = [a == b for a, b in zip(loaded.predict(rows), other.predict(rows), strict=True)]
    assert not all(same)
    found = measure([loaded, other], open_measured(loaded), 5)[1]
    assert found.agreement == pytest.approx(sum(same) / len(same))
