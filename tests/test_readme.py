"""The commands of README and docs are run as they stand, in a clone after `make demo`."""

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
from tests.support.documents import GUIDES, ROOT, blocks, files, name_of
from tests.support.signals import write_signals

CHECKED_OTHERWISE = (
    *("make", "pip", "source", "wandb", "tensorboard"),
    *("launch/hosts.sh", "sbatch", "kubectl", "sky"),
)
"""Commands that install, need an account, or do not end: what they name must exist."""

pytestmark = pytest.mark.slow


def statements(text):
    """Yield each command of a block with its words; a quotation may go over several lines."""
    begun = ""
    for line in text.splitlines():
        begun += line
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # its quotation goes on
            begun += "\n"
            continue
        yield begun, words
        begun = ""
    assert not begun, f"a quotation is not closed: {begun}"


def commands(page):
    """Return a page's commands: each line as it stands, and its words without variables."""
    found = []
    for block in blocks(page):
        if block.language == "bash":
            for line, words in statements(block.text.replace("\\\n", " ")):
                while words and "=" in words[0]:  # a variable for the command
                    words.pop(0)
                if words:
                    found.append((line, words))
    return found


@pytest.fixture
def clone(tmp_path):
    """A clone, the demo's data, and the files that the pages tell their reader to write."""
    folder = tmp_path / "clone"
    for part in ("configs", "launch"):
        shutil.copytree(ROOT / part, folder / part)
    write_digits(folder / "demo" / "digits")
    _write_photos(folder / "photos")
    _write_customers(folder / "customers")
    _write_tagged(folder / "tagged")
    write_signals(folder / "signals")
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _write_photos(folder):
    """Photos of two classes and of several sizes, as the pages' `photos.yaml` expects them."""
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
    """Customers with gaps, as the pages' `customers.yaml` expects them."""
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
    """Vectors with several tags each, as the pages' `tagged.yaml` expects them."""
    folder.mkdir()
    rows = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    tags = [
        [name for name, value in zip("abc", row[:3].tolist(), strict=True) if value > 0]
        for row in rows
    ]
    for part in ("labeled", "unlabeled", "test"):
        columns = {"x": rows.tolist()} | ({} if part == "unlabeled" else {"tags": tags})
        datasets.Dataset.from_dict(columns).to_parquet(str(folder / f"{part}.parquet"))


@pytest.mark.parametrize("page", [page for page in GUIDES if commands(page)], ids=name_of)
def test_every_command_of_a_page_works(page, clone):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "HF_HOME": str(clone / "cache"),
    }
    for line, words in commands(page):
        if words[0] in CHECKED_OTHERWISE or "# GPUs" in line:
            _check(words, clone)
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
        _resolve(command[command.index("-m") + 2 :], clone)
    elif command[0] == "hpdist":
        _resolve(command[1:], clone)
    else:
        assert " ".join(command) in ("source .venv/bin/activate", "wandb login")


def _resolve(arguments, folder, **environment):
    """Return the config that a training would run with, which must be one that hpdist accepts."""
    done = subprocess.run(
        [sys.executable, "-m", "hpdist", *arguments, "--print-config"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def _check_sweep(file):
    """What an agent of the sweep would start must be a training that hpdist accepts."""
    sweep = yaml.safe_load(file.read_text(encoding="utf-8"))
    ranges = sweep["parameters"].items()
    drawn = [f"--{key}={values.get('min') or values['values'][0]}" for key, values in ranges]
    program, *arguments = (part for part in sweep["command"] if part != "${args}")
    assert program == sweep["program"] == "hpdist"
    config = _resolve([*arguments, *drawn], file.parent, WANDB_SWEEP_ID="s", WANDB_RUN_ID="r1")
    assert config["run"]["name"] == "digits-r1"
