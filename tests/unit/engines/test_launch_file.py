"""A launch file names its DeepSpeed JSON from whatever folder it is launched in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpdist.engines import launch
from hpdist.engines.launch_file import find_deepspeed
from hpdist.errors import ConfigError
from tests.support.ranks import free_port

ROOT = Path(__file__).parents[3]
NAMED = "configs/deepspeed/zero2_fp16.json"


def launched(folder: Path, launch_file: str) -> str:
    """What `accelerate launch` from another folder says."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch_file]
    command += ["--num_processes", "1", "--main_process_port", str(free_port())]
    command += ["-m", "hpdist", "train", "digits"]
    done = subprocess.run(
        [*command, "--dry-run"],
        cwd=folder,
        env=kept | {launch.ALLOW_CPU_FP16: "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0, "there are no digits in this folder"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it launches CPU ranks")
def test_the_folders_above_the_launch_file_are_searched_after_the_current_one(
    tmp_path: Path,
) -> None:
    project, away = tmp_path / "project", tmp_path / "away"
    shutil.copytree(ROOT / "configs", project / "configs")
    away.mkdir()
    said = launched(away, "../project/configs/accelerate/zero2_fp16.yaml")
    assert f"DeepSpeed's config: {project / NAMED} ({NAMED} is not in {away})" in said
    assert "precision:  fp16, ZeRO stage 2" in said
    assert "nothing matches 'demo/digits/train-*.parquet'" in said, "it has got as far as the data"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it launches CPU ranks")
def test_a_launch_file_whose_deepspeed_file_is_nowhere_is_refused(tmp_path: Path) -> None:
    project, away = tmp_path / "project", tmp_path / "away"
    shutil.copytree(ROOT / "configs", project / "configs")
    away.mkdir()
    (project / NAMED).unlink()
    launch_file = project / "configs" / "accelerate" / "zero2_fp16.yaml"
    said = launched(away, str(launch_file))
    [line] = [line for line in said.splitlines() if "ConfigError" in line]
    assert f"no such file in {away} or above {launch_file}; give" in line


def test_a_path_is_taken_as_it_is_where_it_leads_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text("{}")
    assert find_deepspeed("ds.json") == "ds.json"
    assert find_deepspeed("~/ds.json") == str(tmp_path / "ds.json")
    absolute = str(tmp_path / "no.json")
    with pytest.raises(ConfigError) as caught:
        find_deepspeed(absolute)
    assert f"config {absolute!r}: there is no such file; give" in str(caught.value)
    with pytest.raises(ConfigError, match="hpdist configs --copy"):
        find_deepspeed("no.json")
