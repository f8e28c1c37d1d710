"""`hpdist.load`: the outputs of the training process's evaluation, from whatever a run has left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hpdist
from hpdist import CheckpointError, ConfigError
from hpdist.distributed.batch_norm import GlobalBatchNorm
from hpdist.models.with_heads import WithHeads
from tests.support.model_runs import KINDS, outputs_of, trained

CLOSE = {"rtol": 0.0, "atol": 1e-6}
MERGED = {"rtol": 1e-5, "atol": 1e-5}  # a merged adapter adds up in another order


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A run on pictures, and its trainer and rows."""
    folder = tmp_path_factory.mktemp("load")
    trainer, rows = trained(folder, "pictures", validation=None)
    return folder / "run", trainer, rows


@pytest.mark.parametrize("kind", list(KINDS))
def test_outputs_are_those_of_the_training_process(kind: str, tmp_path: Path) -> None:
    trainer, rows = trained(tmp_path, kind)
    run = tmp_path / "run"
    expected = outputs_of(trainer)
    close = MERGED if kind.startswith("adapted") else CLOSE
    assert expected.std() > 0
    newest = run / "checkpoints" / "step-00000003"
    for place in (run, run / "model", newest):
        predictor = hpdist.load(place)
        assert predictor.step == 3
        torch.testing.assert_close(predictor.raw_outputs(rows, batch=5), expected, **close)
        assert is_plain(predictor.model)
        predicted = predictor.predict(rows)
        assert len(predicted) == len(expected)
    student = hpdist.load(run, "student")
    torch.testing.assert_close(
        student.raw_outputs(rows, batch=5), outputs_of(trainer, teacher=False), **close
    )
    assert not torch.equal(student.raw_outputs(rows, batch=5), expected)


def test_a_cpu_computes_few_rows_at_a_time(run: tuple[Path, Any, Any]) -> None:
    predictor = hpdist.load(run[0])
    assert predictor.model is not None
    rows = torch.randint(0, 256, (600, 3, 8, 8), dtype=torch.uint8)
    seen: list[int] = []
    predictor.model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    found = predictor.outputs(rows)
    assert seen == [300, 300]
    with torch.inference_mode():
        torch.testing.assert_close(
            found, predictor.model(predictor.views.plain(rows)), rtol=1e-5, atol=1e-5
        )


def is_plain(model: nn.Module | None) -> bool:
    assert model is not None
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    hooked = any(getattr(hook, "__module__", "").startswith("hpdist") for hook in hooks)
    own = (GlobalBatchNorm, WithHeads)
    adapters = any("lora" in name for name, _ in model.named_parameters())
    found = any(isinstance(m, own) for m in model.modules())
    return not (hooked or found or adapters or model.training)


@pytest.mark.parametrize(
    "kind", ["texts", "adapted", "hf_pictures", "waveforms", "adapted_with_head"]
)
def test_transformers_load_the_folder_itself(kind: str, tmp_path: Path) -> None:
    import transformers

    trained(tmp_path, kind)
    folder = tmp_path / "run" / "model"
    name = {"hf_pictures": "Image", "waveforms": "Audio"}.get(kind, "Sequence")
    model = getattr(transformers, f"AutoModelFor{name}Classification").from_pretrained(folder)
    ours = hpdist.load(folder).model
    assert ours is not None
    theirs = model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.model.state_dict().items())
    assert len(model.config.id2label) == model.config.num_labels
    if name == "Sequence":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer("the cat")["input_ids"]
    if name == "Image":
        found = json.loads((folder / "preprocessor_config.json").read_text())
        assert found["image_mean"] == [0.5, 0.5, 0.5]


def test_a_step_and_the_best_one_are_found(tmp_path: Path) -> None:
    """The seed makes the best score come early: `model/` keeps it, checkpoints have the others."""
    _, rows = trained(tmp_path, "table", validation=None, steps=4)
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="has measured nothing on a validation set"):
        hpdist.load(run, checkpoint="best")
    assert [hpdist.load(run, checkpoint=step).step for step in (1, 2, 3, 4, "last")] == [
        1,
        2,
        3,
        4,
        4,
    ]
    first, last = (hpdist.load(run, checkpoint=step).raw_outputs(rows) for step in (1, 4))
    assert not torch.equal(first, last)
    with pytest.raises(ConfigError, match="has none of step 9; there are 1, 2, 3, 4"):
        hpdist.load(run, checkpoint=9)


def test_best_is_what_the_validation_says(tmp_path: Path) -> None:
    from tests.support.model_runs import table

    rows = table(tmp_path)["rows"]
    trained(tmp_path, "table", validation=rows, steps=6, eval={"every": 1}, optim={"lr": 3.0})
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    best = summary["validation/best_step"]
    assert best < 6, "else it shows nothing"
    loaded = hpdist.load(run)
    assert (loaded.step, loaded.description.chosen) == (best, "best")
    same = hpdist.load(run, checkpoint=best)
    assert same.source == loaded.source
    shutil.rmtree(run / "model")
    again = hpdist.load(run, checkpoint="best")
    torch.testing.assert_close(again.raw_outputs(rows), loaded.raw_outputs(rows), **CLOSE)
    right = np.mean([a == b for a, b in zip(loaded.predict(rows), rows["label"], strict=True)])
    assert right == pytest.approx(summary["validation/best_accuracy"])


def test_rows_come_in_every_shape(run: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, _, rows = run
    predictor = hpdist.load(folder)
    expected = predictor.predict(rows)
    assert set(expected) <= {"cat", "dog", "owl"}
    assert predictor.predict(rows["image"][:]) == expected  # pictures of Pillow
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    assert predictor.predict(tmp_path / "rows.parquet") == expected
    assert (
        predictor.predict({"path": str(tmp_path / "rows.parquet"), "split": "train[:3]"})
        == expected[:3]
    )
    without = rows.remove_columns("label")
    assert predictor.predict(without) == expected
    for number, picture in enumerate(rows["image"]):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture.save(tmp_path / "pictures" / f"{number:03}.png")
    assert predictor.predict(tmp_path / "pictures") == expected
    probabilities = predictor.predict_probabilities(rows)
    assert probabilities.shape == (len(rows), 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    with pytest.raises(hpdist.DataError, match="row 1 cannot be decoded"):
        predictor.predict([rows["image"][0], b"no picture"])


def test_numbers_are_in_their_own_units(tmp_path: Path) -> None:
    _, rows = trained(tmp_path, "numbers", optim={"name": "adamw", "lr": 0.01}, steps=20)
    found = np.array(hpdist.load(tmp_path / "run").predict(rows))
    assert found.shape == (len(rows), 2)
    assert abs(found[:, 0].mean() - 105.5) < 10
    with pytest.raises(ConfigError, match="regression has no probabilities"):
        hpdist.load(tmp_path / "run").predict_probabilities(rows)


def test_precisions_keep_what_must_be_exact(run: tuple[Path, Any, Any]) -> None:
    folder, _, rows = run
    full = hpdist.load(folder)
    expected = full.raw_outputs(rows)
    for precision, dtype, most in (("bf16", torch.bfloat16, 0.05), ("fp16", torch.float32, 5e-3)):
        half = hpdist.load(folder, precision=precision)
        found = half.raw_outputs(rows)
        assert found.dtype == torch.float32
        difference = (found - expected).abs().max()
        assert 0 < difference < most
        assert half.bytes < 0.52 * full.bytes
        norms = [m for m in half.model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {norm.weight.dtype for norm in norms} == {torch.float32}
        assert (
            half.model.get_submodule(
                "classifier" if hasattr(half.model, "classifier") else _last(half.model)
            ).weight.dtype
            == dtype
        )
    with pytest.raises(ConfigError, match="precision: 'fp8' is none of"):
        hpdist.load(folder, precision="fp8")


def _last(model: nn.Module) -> str:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]


def test_fp16_overflows_where_fp16_does() -> None:
    """Rounding through fp16 must show the overflow that a device in fp16 would have."""
    from hpdist.evaluate.precision import computing

    layer = nn.Linear(4, 1, bias=False)
    nn.init.constant_(layer.weight, 300.0)
    with computing("fp16", torch.device("cpu")):
        assert layer(torch.full((1, 4), 300.0)).isinf().all()
    assert layer(torch.full((1, 4), 300.0)).isfinite().all()


def test_half_precision_is_saved_where_that_is_asked_for(tmp_path: Path) -> None:
    kinds = {"texts": {}, "pictures": {}}
    for kind in kinds:
        model = KINDS[kind](tmp_path / kind)["model"] | {"save": "half"}
        _, rows = trained(tmp_path / kind, kind, model=model, precision="bf16")
        folder = tmp_path / kind / "run" / "model"
        loaded = hpdist.load(folder)
        assert loaded.description.weights == "bf16"
        full = hpdist.load(tmp_path / kind / "run", checkpoint="last", which="student")
        assert full.description.weights == "fp32"
        expected = hpdist.load(tmp_path / kind / "run" / "checkpoints" / "step-00000003")
        difference = (loaded.raw_outputs(rows) - expected.raw_outputs(rows)).abs().max()
        assert 0 < difference < 0.05
        assert (folder / "model.safetensors").stat().st_size < 0.8 * expected.bytes


def test_nothing_is_saved_where_nothing_is_asked_for(tmp_path: Path) -> None:
    model = KINDS["table"](tmp_path)["model"] | {"save": "none"}
    trained(tmp_path, "table", model=model)
    assert not (tmp_path / "run" / "model").exists()
    assert hpdist.load(tmp_path / "run").step == 3


def test_a_module_given_in_python_receives_the_weights(tmp_path: Path) -> None:
    from tests.support.odd_models import Complex, Small

    for kind in (Small, Complex):
        trainer, rows = trained(tmp_path, "own_module", model=kind(), name=kind.__name__)
        place = tmp_path / kind.__name__
        with pytest.raises(ConfigError, match="give a module of the same shape"):
            hpdist.load(place)
        for path in (place, place / "checkpoints" / "step-00000003"):
            loaded = hpdist.load(path, model=kind())
            torch.testing.assert_close(loaded.raw_outputs(rows), outputs_of(trainer), **CLOSE)
        with pytest.raises(CheckpointError, match="does not fit the model"):
            hpdist.load(place, model=nn.Linear(4, 3))


def copy_of(run: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(run / "model", place))


def test_what_is_wrong_with_a_folder_is_one_line(
    run: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    def refused(
        place: Path, what: str, error: type[Exception] = CheckpointError, **options: Any
    ) -> None:
        with pytest.raises(error, match=what) as found:
            hpdist.load(place, **options)
        assert "\n" not in str(found.value)
        assert found.value.exit_status == 2  # type: ignore[attr-defined]

    folder = run[0]
    place = copy_of(folder, tmp_path / "one")
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(place, "is truncated or changed")
    place = copy_of(folder, tmp_path / "one")
    content = bytearray((place / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (place / "model.safetensors").write_bytes(content)
    refused(place, "is damaged: its SHA-256 differs")
    place = copy_of(folder, tmp_path / "one")
    (place / "model.safetensors").unlink()
    refused(place, "is missing")

    def changed(**values: Any) -> Path:
        place = copy_of(folder, tmp_path / "one")
        file = place / "hpdist.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return place

    refused(changed(format=99), "has format 99, this hpdist knows up to 1; upgrade hpdist")
    refused(changed(format="one"), "is not what hpdist writes")
    refused(changed(labels={}), "is not what hpdist writes: labels")
    refused(changed(files={"../x": {"bytes": 1, "sha256": "0" * 64}}), "is not what hpdist writes")
    refused(changed(outputs=4), "does not fit the model")
    refused(changed(model={"name": "wide_rasnet"}), "no model is called", ConfigError)
    refused(changed(model={"name": "python:no_such_module:f"}), "cannot import", ConfigError)
    (place / "hpdist.json").write_text("{")
    refused(place, "cannot be read")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is no run folder with a trained model")
    refused(tmp_path / "nothing", "there is no")
    refused(folder / "summary.json", "is a file")
    refused(folder, "neither teacher nor student", ConfigError, which="master")
    refused(folder, "neither best, last nor a step", ConfigError, checkpoint="first")
    refused(folder, "which needs no module", ConfigError, model=nn.Linear(1, 1))


def test_a_run_without_a_model_gets_it_when_it_is_started_again(tmp_path: Path) -> None:
    """As one of an earlier version has none."""
    _, rows = trained(tmp_path, "table")
    run = tmp_path / "run"
    before = hpdist.load(run)
    shutil.rmtree(run / "model")
    (run / "model.json").unlink()
    with pytest.raises(CheckpointError, match="hpdist train CONFIG writes it"):
        hpdist.load(run)
    trained(tmp_path, "table")
    again = hpdist.load(run / "model")
    assert torch.equal(again.raw_outputs(rows), before.raw_outputs(rows))
    assert again.run_id != before.run_id


def test_a_best_model_that_cannot_be_written_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hpdist.evaluate import model_folder
    from tests.support.model_runs import table

    save, calls = model_folder.save_file, []

    def once_full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(model_folder, "save_file", once_full)
    rows = table(tmp_path)["rows"]
    trained(tmp_path, "table", validation=rows, eval={"every": 1})
    assert "No space left on device; make room there; the training continues" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    assert hpdist.load(tmp_path / "run" / "model").step in (2, 3)
