"""Every command in the README is run as it stands, in a folder like a clone after `make demo`."""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from hpdist.data.samples.digits import write_digits

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(bash|python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHECKED_OTHERWISE = ("make", "pip", "source", "wandb", "tensorboard", "sbatch", "kubectl", "sky")
"""Commands that install, need an account, or do not end: what they name must exist."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for part in ("configs", "launch"):
        shutil.copytree(ROOT / part, folder / part)
    write_digits(folder / "demo" / "digits")
    _write_photos(folder / "photos")
    _write_customers(folder / "customers")
    _write_tagged(folder / "tagged")
    return folder


def _write_photos(folder):
    """Photos of two classes and of several sizes, as the README's `photos.yaml` expects them."""
    noise = np.random.default_rng(0)
    pictures = [
        Image.fromarray(noise.integers(0, 256, (40 + k, 36, 3), dtype=np.uint8)) for k in range(16)
    ]
    for part in ("labeled", "held_out"):
        for k, picture in enumerate(pictures):
            place = folder / part / ("cat", "dog")[k % 2]
            place.mkdir(parents=True, exist_ok=True)
            picture.save(place / f"{k}.jpg")
    (folder / "unlabeled").mkdir()
    rows = datasets.Dataset.from_dict({"picture": pictures, "taken": list(range(16))})
    rows = rows.cast_column("picture", datasets.Image())
    rows.to_parquet(str(folder / "unlabeled" / "0.parquet"))


def _write_customers(folder):
    """Customers with gaps, as the README's `customers.yaml` expects them."""
    folder.mkdir()
    for part in ("labeled", "unlabeled"):
        columns = {
            "name": ["Ada"] * 40,
            "age": [None if row == 3 else 20 + row for row in range(40)],
            "income": [1000.5 * row for row in range(40)],
            "member": [row % 3 == 0 for row in range(40)],
        }
        if part == "labeled":
            columns["churned"] = [row % 2 for row in range(40)]
        datasets.Dataset.from_dict(columns).to_csv(str(folder / f"{part}.csv"))


def _write_tagged(folder):
    """Vectors with several tags each, as the README's `tagged.yaml` expects them."""
    folder.mkdir()
    rows = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    tags = [
        [name for name, value in zip("abc", row[:3].tolist(), strict=True) if value > 0]
        for row in rows
    ]
    for part in ("labeled", "unlabeled", "test"):
        columns = {"x": rows.tolist()} | ({} if part == "unlabeled" else {"tags": tags})
        datasets.Dataset.from_dict(columns).to_parquet(str(folder / f"{part}.parquet"))


def test_every_command_of_the_readme_works(clone):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "HF_HOME": str(clone / "cache"),
    }
    ran = 0
    for language, text in FENCED.findall(README):
        name = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        if language != "bash":
            assert name, f"a {language} block of the README must begin with its file name"
            (clone / name[1]).write_text(text, encoding="utf-8")
            continue
        for line in text.replace("\\\n", " ").splitlines():
            command = shlex.split(line, comments=True)
            if not command:
                continue
            while "=" in command[0]:  # a variable for the command
                command.pop(0)
            if command[0] in (*CHECKED_OTHERWISE, "launch/hosts.sh") or "# GPUs" in line:
                _check(command, clone)
                continue
            done = subprocess.run(
                line, shell=True, cwd=clone, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"$ {line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            if "--run.name again --steps 8" in line:
                assert "at step 4" in done.stderr
            if line.endswith("# goes on at step 5"):
                assert "step 8: loss" in done.stdout
                assert "step 4: loss" not in done.stdout
            ran += 1
    assert ran >= 10


def _check(command, clone):
    """What a command that cannot be run here names must exist."""
    if command[0] == "make":
        subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, check=True, capture_output=True)
    elif command[0] == "pip":
        wanted = re.search(r"\[(.*)\]", command[-1])[1].split(",")
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in wanted)
    elif command[:2] == ["wandb", "sync"]:
        assert glob.glob(command[-1], root_dir=clone)
    elif command[:2] == ["wandb", "sweep"]:
        _check_sweep(clone / command[2])
    elif command[0] in ("sbatch", "launch/hosts.sh"):  # tests/faults runs both
        script, config = command[-4:-2] if command[0] == "sbatch" else command[:2]
        subprocess.run(["bash", "-n", ROOT / script], check=True)
        assert (ROOT / config).exists()
    elif command[0] in ("kubectl", "sky"):
        assert (ROOT / command[-1]).exists()
    elif command[0] == "tensorboard":
        assert list((clone / command[-1]).rglob("events.out.tfevents.*"))
    elif command[0] == "accelerate":
        file = ROOT / command[command.index("--config_file") + 1]
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["distributed_type"] == "DEEPSPEED"


def _check_sweep(file):
    """What an agent of the sweep would start must be a training that hpdist accepts."""
    sweep = yaml.safe_load(file.read_text(encoding="utf-8"))
    ranges = sweep["parameters"].items()
    drawn = [f"--{key}={values.get('min') or values['values'][0]}" for key, values in ranges]
    program, command, *rest = (part for part in sweep["command"] if part != "${args}")
    done = subprocess.run(
        [sys.executable, "-m", program, command, *rest, *drawn, "--print-config"],
        cwd=file.parent,
        env=os.environ | {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["run"]["name"] == "digits-r1"


def test_links_and_pictures_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target
