"""Models of runs on two ranks, under every engine: loaded on one, and measured on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hpdist
from tests.support.model_runs import adapted, outputs_of, pictures, trained
from tests.support.ranks import run_ranks

CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"zero": {"stage": 1}},
    "zero2": {"zero": {"stage": 2}, "precision": "bf16"},
    "zero3": {"zero": {"stage": 3}},
    "zero3_bf16": {"zero": {"stage": 3}, "precision": "bf16"},
}


def train(folder: str, settings: dict[str, Any], kind: str) -> tuple[list[Any], Any]:
    """What this rank's evaluation says of its rows, and the teacher's whole weights."""
    trainer, _ = trained(Path(folder), kind, **settings)
    teacher = {name: value.clone() for name, value in trainer.teacher_model().named_parameters()}
    return outputs_of(trainer).tolist(), {k: v.tolist() for k, v in teacher.items()}


@pytest.mark.parametrize("case", list(CASES))
def test_outputs_are_those_of_two_ranks(case: str, tmp_path: Path) -> None:
    """The ranks evaluate six rows each, in order."""
    found = run_ranks(2, train, str(tmp_path), CASES[case], "pictures")
    expected = torch.tensor(found[0][0] + found[1][0])
    weights = found[0][1]
    rows = pictures(tmp_path)["rows"]
    for place in ("", "model", "checkpoints/step-00000003"):
        predictor = hpdist.load(tmp_path / "run" / place)
        assert predictor.model is not None
        for name, parameter in predictor.model.named_parameters():
            assert parameter.tolist() == weights[name], name
        outputs = predictor.raw_outputs(rows, batch=5)
        close = 0.05 if "precision" in CASES[case] else 1e-6
        torch.testing.assert_close(outputs, expected, rtol=0.0, atol=close)


def test_adapters_under_zero_3(tmp_path: Path) -> None:
    rows = adapted(tmp_path)["rows"]
    found = run_ranks(2, train, str(tmp_path), {"zero": {"stage": 3}}, "adapted")
    expected = torch.tensor(found[0][0] + found[1][0])
    for place in ("model", "checkpoints/step-00000003"):
        outputs = hpdist.load(tmp_path / "run" / place).raw_outputs(rows, batch=5)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


def evaluate(arguments: list[str]) -> int:
    from hpdist import cli

    return cli.main(["evaluate", *arguments])


def test_every_row_is_measured_once_on_any_number_of_ranks(tmp_path: Path) -> None:
    rows = pictures(tmp_path)["rows"]
    rows.select(range(11)).to_parquet(str(tmp_path / "rows.parquet"))
    trained(tmp_path, "pictures", test={"path": str(tmp_path / "rows.parquet")})
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        arguments = [str(tmp_path / "run"), "--out", str(out), "--batch", "4"]
        assert set(run_ranks(ranks, evaluate, arguments)) == {0}
        found.append(json.loads(out.read_text()))
    one, two = found
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["rows"] == two["rows"] == 11
    for precision in ("fp32", "bf16", "fp16"):
        first, second = (each["results"][precision] for each in found)
        assert first["confusion"] == second["confusion"]
        assert first["agreement"] == second["agreement"]
        assert first["largest_difference"] == pytest.approx(second["largest_difference"], rel=0.05)
        for name, value in first["scores"].items():
            assert second["scores"][name] == pytest.approx(value, rel=1e-3), name
