"""Files for OpenVINO and ExecuTorch: the outputs of the model, under the same verbs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch

import hpdist
from hpdist import CheckpointError, ConfigError, cli
from tests.support.model_runs import KINDS, trained

pytestmark = pytest.mark.slow

PACKAGES = {"xml": "openvino", "pte": "executorch"}


def require(suffix: str) -> None:
    """Skip the test where the program of a format is not installed."""
    name = PACKAGES[suffix]
    pytest.importorskip(name, reason=f"needs the extra {name!r}, which `make test-all` installs")
    pytest.importorskip("onnxscript")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("suffix", list(PACKAGES))
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind(kind: str, suffix: str, precision: str, tmp_path: Path) -> None:
    require(suffix)
    _, rows = trained(tmp_path, kind)
    original = hpdist.load(tmp_path / "run")
    file = tmp_path / f"model.{suffix}"
    found = original.export(file, rows, precision=precision)
    assert found.relative <= found.tolerance
    exported = hpdist.load(file)
    assert (exported.precision, exported.names) == (precision, original.names)
    data = rows[0] if isinstance(rows, tuple) else rows
    expected = original.raw_outputs(data)
    given = exported.raw_outputs(data, batch=5)
    assert isinstance(expected, torch.Tensor)
    assert isinstance(given, torch.Tensor)
    assert (given - expected).abs().max() <= found.tolerance * expected.abs().max()


@pytest.mark.parametrize("suffix", list(PACKAGES))
def test_the_same_verbs(suffix: str, tmp_path: Path) -> None:
    require(suffix)
    rows = KINDS["pictures"](tmp_path)["rows"]
    many = rows.select([row % len(rows) for row in range(40)])  # more than ExecuTorch takes
    many.to_parquet(str(tmp_path / "rows.parquet"))
    trained(tmp_path, "pictures", test={"path": str(tmp_path / "rows.parquet")})
    run, file = str(tmp_path / "run"), tmp_path / f"half.{suffix}"
    assert cli.main(["export", run, "--out", str(file), "--precision", "fp16"]) == 0
    out = tmp_path / "found.json"
    assert cli.main(["evaluate", str(file), "--out", str(out), "--batch", "40"]) == 0
    assert list(json.loads(out.read_text())["results"]) == ["fp16"]
    arguments = [str(file), str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "labels")]
    assert cli.main(["predict", *arguments, "--data.input", "image"]) == 0
    labels = pq.read_table(tmp_path / "labels").column("label").to_pylist()
    assert labels == hpdist.load(run).predict(many)
    plot = ["--out", str(tmp_path / "found.png")]
    assert cli.main(["benchmark", run, str(file), "--precision", "fp32", *plot]) == 0
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [one["runs_on"] for one in results] == ["torch", PACKAGES[suffix]]
    (tmp_path / f"broken.{suffix}").write_bytes(b"nothing")
    (tmp_path / "broken.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="broken") as error:
        hpdist.load(tmp_path / f"broken.{suffix}")
    assert "\n" not in str(error.value)


def test_openvino_reports_nothing() -> None:
    require("xml")
    program = (
        "import sys; from hpdist.evaluate.export.openvino_backend import openvino; openvino('it');"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')],"
        " 'openvino.tools.ovc.telemetry_stub' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[] True", done.stderr


def test_weights_of_another_file_are_refused(tmp_path: Path) -> None:
    require("xml")
    _, rows = trained(tmp_path, "table")
    original = hpdist.load(tmp_path / "run")
    for name, precision in (("one", "fp32"), ("two", "fp16")):
        original.export(tmp_path / f"{name}.xml", rows, precision=precision)
    one, two = (tmp_path / f"{name}.bin" for name in ("one", "two"))
    two.unlink()
    with pytest.raises(CheckpointError, match=r"there is no two\.bin"):
        hpdist.load(tmp_path / "two.xml")
    content = bytearray(one.read_bytes())
    content[0] ^= 1
    one.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"one\.bin has other weights than one\.xml"):
        hpdist.load(tmp_path / "one.xml")


def test_what_differs_too_much_leaves_no_file(tmp_path: Path) -> None:
    require("xml")
    _, rows = trained(tmp_path, "table")
    out = tmp_path / "out" / "model.xml"
    with pytest.raises(ConfigError, match=r"more than 1\.0e-09"):
        hpdist.load(tmp_path / "run").export(out, rows, precision="fp16", tolerance=1e-9)
    assert list(out.parent.iterdir()) == []
