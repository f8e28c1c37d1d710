"""The demo from end to end, a few steps long."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run_demo(folder):
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "demo.py", "--steps", "6", "--seeds", "1"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_demo_ends_with_a_table_a_picture_and_run_folders(tmp_path):
    (tmp_path / "demo" / "runs" / "left-over").mkdir(parents=True)
    done = run_demo(tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    line = re.compile(r"^(labels only|FixMatch) {2,}[\d.]+ +([\d.]+)$", re.MULTILINE)
    rows = dict(line.findall(done.stdout))
    assert rows.keys() == {"labels only", "FixMatch"}
    assert all(0 <= float(mean) <= 100 for mean in rows.values())
    with Image.open(tmp_path / "demo" / "curves.png") as picture:
        assert min(picture.size) > 300
    runs = {path.name: path for path in (tmp_path / "demo" / "runs").iterdir()}
    assert runs.keys() == {"fixmatch-seed0", "supervised-seed0"}
    for folder in runs.values():
        names = {path.name for path in folder.iterdir()}
        assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints"} <= names


def test_the_demo_says_so_when_a_training_fails(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "runs").write_text("not a folder")
    done = run_demo(tmp_path)
    assert done.returncode != 0
    assert "run folder" in done.stderr
