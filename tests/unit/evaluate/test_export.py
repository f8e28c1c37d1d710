"""Exported files: the outputs of the model, under the same verbs, and without torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hpdist
from hpdist import CheckpointError, ConfigError, cli
from hpdist.evaluate.export.metadata import FILES, unpack
from hpdist.evaluate.export.verify import verify
from hpdist.evaluate.measure import open_measured
from tests.support.model_runs import KINDS, trained

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

WITHOUT_TORCH = """
import json, sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
scale = json.loads(facts["hpdist.normalization"])
mean, std = (np.float32(scale[key])[:, None, None] for key in ("mean", "std"))
pixels = np.load(sys.argv[2])
rows = (pixels.astype(np.float32) / np.float32(255) - mean) / std
(logits,) = session.run(["logits"], {"input": rows})
np.save(sys.argv[3], logits)
names = json.loads(facts["hpdist.names"])
assert "torch" not in sys.modules and "hpdist" not in sys.modules
print(json.dumps([names[k] for k in logits.argmax(axis=1)]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run on pictures whose test set is a file, and its rows."""
    folder = tmp_path_factory.mktemp("export")
    rows = KINDS["pictures"](folder)["rows"]
    rows.to_parquet(str(folder / "rows.parquet"))
    trained(folder, "pictures", test={"path": str(folder / "rows.parquet")})
    return folder / "run", rows


@pytest.fixture(scope="module")
def half(run: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as fp16 ONNX, by the command."""
    out = tmp_path_factory.mktemp("half") / "half.onnx"
    assert cli.main(["export", str(run[0]), "--out", str(out), "--precision", "fp16"]) == 0
    return out


def test_a_half_precision_file_gives_the_models_outputs(run: tuple[Path, Any], half: Path) -> None:
    folder, rows = run
    original, exported = hpdist.load(folder), hpdist.load(half)
    assert (exported.precision, exported.run_id) == ("fp16", original.run_id)
    assert (exported.names, exported.step) == (original.names, original.step)
    expected = original.raw_outputs(rows)
    for batch in (1, 2, 3, 12):
        found = exported.raw_outputs(rows, batch=batch)
        assert 0 < (found - expected).abs().max() < 0.01 * expected.abs().max()
    assert exported.predict(rows) == original.predict(rows)
    assert exported.evaluate(rows) == pytest.approx(original.evaluate(rows), abs=0.01)
    with pytest.raises(ConfigError, match="has no module of torch"):
        exported.with_precision("bf16")
    with pytest.raises(ConfigError, match="is fp16, and not fp32"):
        hpdist.load(half, precision="fp32")


def test_a_file_runs_without_torch(run: tuple[Path, Any], half: Path, tmp_path: Path) -> None:
    folder, rows = run
    pixels = np.stack([np.asarray(row["image"]).transpose(2, 0, 1) for row in rows])
    np.save(tmp_path / "pixels.npy", pixels)
    files = [str(half), str(tmp_path / "pixels.npy"), str(tmp_path / "logits.npy")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    original = hpdist.load(folder)
    assert json.loads(done.stdout) == original.predict(rows)
    expected = original.raw_outputs(rows)
    assert isinstance(expected, torch.Tensor)
    found = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=0.01 * expected.abs().max())


def test_evaluate_takes_a_file(half: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert cli.main(["evaluate", str(half), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert list(found["results"]) == ["fp16"]
    assert found["results"]["fp16"]["bytes"] == half.stat().st_size


def test_safetensors(run: tuple[Path, Any], tmp_path: Path) -> None:
    folder, rows = run
    original, out = hpdist.load(folder), tmp_path / "run.safetensors"
    original.export(out)
    (tmp_path / "usual").touch()
    assert out.stat().st_mode == (tmp_path / "usual").stat().st_mode
    exported = hpdist.load(out)
    assert torch.equal(exported.raw_outputs(rows), original.raw_outputs(rows))
    original.export(out, precision="bf16")
    assert not torch.equal(hpdist.load(out).raw_outputs(rows), original.raw_outputs(rows))
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.safetensors is damaged: the SHA-256"):
        hpdist.load(out)


def test_what_differs_too_much_is_not_kept(
    run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "run.safetensors"
    command = ["export", str(run[0]), "--out", str(out), "--precision", "bf16"]
    assert cli.main([*command, "--tolerance", "1e-9"]) == 2
    assert "more than 1.0e-09" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []


def test_a_model_that_overflows_in_fp16_is_not_kept(run: tuple[Path, Any], tmp_path: Path) -> None:
    original = hpdist.load(run[0])
    assert original.model is not None
    last = [m for m in original.model.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight[0] = 1e6
    with pytest.raises(ConfigError, match="--precision fp16: outputs"):
        original.export(tmp_path / "run.safetensors", precision="fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "a.onnx", "--precision", "bf16"], "onnx has no bf16 here"),
        (["--out", "a.safetensors", "--precision", "int8"], "safetensors has no int8 here"),
        (["--out", "a.engine"], "'a.engine', ends in none of .onnx (onnx), .safetensors"),
        (["--out", "a.onnx", "--format", "tensorrt"], "'tensorrt' is none of onnx, safetensors"),
        (["--out", "a.xml", "--precision", "int8"], "openvino has no int8 here: it needs"),
        (["--out", "a.pte", "--precision", "int8"], "executorch has no int8 here: it needs"),
        (["--out", "a.onnx", "--format", "safetensors"], "must end in .safetensors"),
        (["--out", "a.onnx", "--optim.lr", "1"], "export takes settings of the set"),
    ],
)
def test_what_cannot_be_done(
    options: list[str], message: str, run: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(run[0]), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_files_of_others(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(CheckpointError, match="was not written by hpdist export"):
        hpdist.load(other)
    for name in ("broken.safetensors", "broken.onnx"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(CheckpointError, match=name):
            hpdist.load(tmp_path / name)
    for path in ("../a", "/a", "a/../../b"):
        with pytest.raises(CheckpointError, match="it names"):
            unpack({FILES: json.dumps({path: ""}), "hpdist": "{}"}, other)


def test_benchmark(
    run: tuple[Path, Any], half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.png"
    models = [str(run[0]), str(half)]
    assert cli.main(["benchmark", *models, "--batch", "2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "fp16 is simulated on this CPU" in shown
    results = json.loads(out.with_suffix(".json").read_text())["results"]
    assert [(one["runs_on"], one["precision"]) for one in results] == [
        *(("torch", "fp32"), ("torch", "bf16"), ("torch", "fp16"), ("onnxruntime", "fp16"))
    ]
    assert all(0 < one["median_ms"] <= one["ms_of_90_percent"] for one in results)
    assert results[3]["bytes"] == half.stat().st_size
    assert out.read_bytes().startswith(b"\x89PNG")


def test_outputs_that_are_no_numbers_are_named(run: tuple[Path, Any]) -> None:
    folder, rows = run
    original, broken = hpdist.load(folder), hpdist.load(folder)
    assert broken.model is not None
    last = [m for m in broken.model.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight[0] = torch.nan
    with pytest.raises(ConfigError, match=rf"outputs of {len(rows)} rows are NaN or infinite"):
        verify(original, broken, open_measured(original), tolerance=math.inf)
