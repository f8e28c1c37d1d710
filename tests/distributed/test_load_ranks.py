"""Models of runs on two ranks, under every engine: loaded on one, and measured on two."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import hpdist
from hpdist.distributed.collectives import run_on_main
from hpdist.distributed.joined import joined_ranks
from hpdist.evaluate.measure import measure, open_measured
from hpdist.evaluate.precisions import in_precisions
from hpdist.train import model as run_model
from hpdist.train.trainer import Trainer
from tests.support.model_runs import adapted, outputs_of, pictures, trained
from tests.support.ranks import run_ranks

ENGINES: dict[str, dict[str, Any]] = {"ddp": {}} | {
    f"zero{stage}": {"zero": {"stage": stage}} for stage in (1, 2, 3)
}
CASES = {
    f"{engine}_{precision}": {**settings, "precision": precision}
    for engine, settings in ENGINES.items()
    for precision in ("fp32", "bf16", "fp16")
}
QUICK = [*(f"{engine}_fp32" for engine in ENGINES), "zero2_bf16", "zero3_bf16"]


def train(folder: str, settings: dict[str, Any], kind: str) -> tuple[list[Any], Any, int]:
    """What this rank's evaluation says of its rows, the teacher's whole weights, and the models
    that this rank builds to write `model/` again."""
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    trainer, _ = trained(Path(folder), kind, **settings)
    teacher = {name: value.clone() for name, value in trainer.teacher_model().named_parameters()}
    outputs = outputs_of(trainer).tolist()
    return outputs, {k: v.tolist() for k, v in teacher.items()}, built_while_writing(trainer)


def built_while_writing(trainer: Trainer) -> int:
    """Remove `model/`, write it again as at the end, and count the models that this rank builds."""
    run_on_main(lambda: shutil.rmtree(trainer.run.folder.path / "model"))
    with mock.patch.object(run_model, "build_model", wraps=run_model.build_model) as build:
        trainer.run.model_saving.finish()
    return int(build.call_count)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c in QUICK else (pytest.mark.slow,)) for c in CASES],
)
def test_outputs_are_those_of_two_ranks(case: str, tmp_path: Path) -> None:
    """The ranks evaluate six rows each, in order; only the first builds what it writes."""
    found = run_ranks(2, train, str(tmp_path), CASES[case], "pictures")
    assert [built for _, _, built in found] == [1, 0]
    expected = torch.tensor(found[0][0] + found[1][0])
    weights = found[0][1]
    rows = pictures(tmp_path)["rows"]
    for place in ("", "model", "checkpoints/step-00000003"):
        predictor = hpdist.load(tmp_path / "run" / place)
        assert predictor.model is not None
        for name, parameter in predictor.model.named_parameters():
            assert parameter.tolist() == weights[name], name
        outputs = predictor.raw_outputs(rows, batch=5)
        close = 1e-6 if CASES[case]["precision"] == "fp32" else 0.05
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


def not_finite(folder: str) -> list[int]:
    """The rows with an output that is no number, in fp32 and fp16, of a model that overflows."""
    with joined_ranks():
        loaded = hpdist.load(folder)
        assert loaded.model is not None
        last = [m for m in loaded.model.modules() if isinstance(m, torch.nn.Linear)][-1]
        with torch.no_grad():
            last.weight[0] = 1e6
        found = measure(in_precisions(loaded, ["fp16"]), open_measured(loaded), 4)
    return [each.not_finite for each in found]


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
    expected = not_finite(str(tmp_path / "run"))
    assert expected[0] == 0 < expected[1]
    assert run_ranks(2, not_finite, str(tmp_path / "run")) == [expected, expected]
