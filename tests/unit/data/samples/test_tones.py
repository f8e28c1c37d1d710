"""Made-up sounds: the same every time, of four classes, and a run learns them by the command."""

import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from hpdist.data.decode.audio import AudioSpec, Sampling
from hpdist.data.samples.tones import CLASSES, ROWS, main, write_tones
from hpdist.errors import DataError

ROOT = Path(__file__).parents[4]


def test_the_files_are_the_same_every_time_and_can_be_decoded(tmp_path):
    first, again = write_tones(tmp_path / "a"), write_tones(tmp_path / "b")
    for part, rows in ROWS.items():
        assert (first / f"{part}.parquet").read_bytes() == (again / f"{part}.parquet").read_bytes()
        table = datasets.load_dataset(
            "parquet", data_files=str(first / f"{part}.parquet"), cache_dir=str(tmp_path / "c")
        )["train"]
        assert len(table) == rows
        assert table.features["audio"] == datasets.Audio(8000, decode=False)
        assert ("label" in table.features) == (part != "unlabeled")
    assert table.features["label"].names == list(CLASSES)
    spec = AudioSpec(Sampling(8000, 4800), (4800,))
    assert len(spec.decode_rows(table["audio"][:], range(rows), "t")) == rows
    with pytest.raises(DataError, match="cannot write the tones"):
        write_tones(first / "test.parquet")
    assert main([]) == 2


@pytest.mark.slow
def test_a_run_of_the_command_evaluates(tmp_path):
    write_tones(tmp_path / "demo" / "tones")
    command = [sys.executable, "-m", "hpdist", "train", ROOT / "configs" / "tones_fixmatch.yaml"]
    command += ["--steps", "3", "--tracker.name", "none", "--data.loading.processes", "1"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "test/accuracy" in (tmp_path / "runs" / "tones_fixmatch" / "summary.json").read_text()
