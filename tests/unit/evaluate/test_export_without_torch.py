"""The script of docs/export.md, where nothing but onnxruntime, numpy and pillow is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from hpdist import cli
from hpdist.data.samples.digits import TEST_ROWS, write_digits
from tests.support.documents import ROOT, files

NEEDED = ("onnxruntime", "numpy", "pillow")


def fresh_environment(folder: Path) -> Path:
    """Make a virtual environment of what the script needs; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    constraints = ["--constraint", str(ROOT / ".ci" / "constraints.txt")]
    command = [str(python), "-m", "pip", "install", "--quiet", *constraints, *NEEDED]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        last = installed.stderr.strip().splitlines()[-1:]
        pytest.skip(f"pip cannot install {', '.join(NEEDED)} here: {' '.join(last)}")
    return python


@pytest.mark.slow
def test_the_script_of_the_page_labels_every_scan_alike(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    python = fresh_environment(tmp_path / "fresh")
    there = subprocess.run(
        [str(python), "-c", "import torch"], capture_output=True, text=True, check=False
    )
    assert "No module named 'torch'" in there.stderr
    digits = write_digits(tmp_path / "digits")
    settings = {
        "data.labeled.data_files.train": f"{digits}/train-*.parquet",
        "data.unlabeled.data_files.train": f"{digits}/train-*.parquet",
        "data.test.data_files.test": f"{digits}/test-*.parquet",
        "model.width": "8",
        "batch.unlabeled": "32",
        "precision": "fp32",
        "tracker.name": "none",
        "run.dir": str(tmp_path),
        "run.name": "run",
        "steps": "40",
    }
    options = [part for key, value in settings.items() for part in (f"--{key}", value)]
    assert cli.main(["train", str(ROOT / "configs" / "digits.yaml"), *options]) == 0
    scans = tmp_path / "scans"
    scans.mkdir()
    rows = pq.read_table(digits / "test-00000-of-00001.parquet").to_pylist()
    for number, row in enumerate(rows):
        (scans / f"{number:04}.png").write_bytes(row["image"]["bytes"])
    run, labels = str(tmp_path / "run"), tmp_path / "labels"
    assert cli.main(["predict", run, str(scans), "--out", str(labels)]) == 0
    table = pq.read_table(labels).to_pylist()
    expected = {Path(row["file"]).name: row["label"] for row in table}
    assert len(expected) == TEST_ROWS
    assert len(set(expected.values())) > 2
    file = tmp_path / "digits.onnx"
    assert cli.main(["export", run, "--out", str(file), "--precision", "fp16"]) == 0
    (tmp_path / "run_onnx.py").write_text(files()["run_onnx.py"])
    done = subprocess.run(
        [str(python), str(tmp_path / "run_onnx.py"), str(file), str(scans)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={},
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert found == {name: str(label) for name, label in expected.items()}
