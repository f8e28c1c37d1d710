"""Runs that an earlier hpdist began, and what it went on to: written once, kept as fixtures.

    python -m tests.invariants.runs_of_before NAME…|--all

For each kind of run, `tests/fixtures/runs/<kind>` has the folder `run` as it was after the first
steps, and in `continued.json` the numbers of the run when that same code went on. Their data lie
beside them: another version of pyarrow would write other files. A fixture is never written anew to
make a test pass: it is what users have on their disks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.invariants import curve_data, recorded_curves
from tests.support.ranks import run_ranks

FOLDER = Path(__file__).parents[1] / "fixtures" / "runs"
FIRST, LAST = 4, 8  # steps that were done, and that are done in all
STATE = "save_state"

KINDS: dict[str, dict[str, Any]] = {
    "one": {"algorithm": {"name": "flexmatch", "threshold": 0.5}, "eval": {"every": 2}},
    "ddp": {"algorithm": {"name": "temporal_ensembling", "ramp": 0.0}},
    "zero1": {"precision": "bf16", "zero": {"stage": 1}, "optim": {"name": "adamw", "lr": 0.01}},
    "zero2_fp16": {"precision": "fp16", "zero": {"stage": 2}, "loss_scale": {"initial": 256.0}},
    "zero3": {"precision": "bf16", "zero": {"stage": 3}, "optim": {"name": "adamw", "lr": 0.01}},
    "stream": {"unlabeled": {"streaming": True, "shuffle_window": 64, "audit": True}},
    "table": {"views": {"name": "table", "missing": "mean"}},
}
RANKS = {"ddp": 2, "zero1": 2, "zero2_fp16": 2, "zero3": 2}
MEASURED = {"one", "table"}


def train(kind: str, steps: int) -> None:
    """Train, or go on with, `runs/<kind>` below the working folder, on this rank."""
    import hpdist

    settings = dict(KINDS[kind])
    columns = "table" if kind == "table" else "vector"
    inputs = ["x0", "x1", "x2", "x3", "city"] if kind == "table" else "x"
    sets = {
        name: {
            "path": "parquet",
            "data_files": f"data/{columns}-classification-{name}.parquet",
            "input": inputs,
        }
        for name in ("labeled", "unlabeled", *(["test", "validation"] if kind in MEASURED else []))
    }
    sets["unlabeled"] |= settings.pop("unlabeled", {})
    defaults = {
        "algorithm": {"name": "fixmatch", "threshold": 0.4},
        "views": {"name": "table"},
        "optim": {"lr": 0.1},
    }
    hpdist.Trainer(
        {"name": "mlp", "hidden": [16]},
        **sets,
        **(defaults | settings),
        batch={"labeled": 8, "unlabeled": 24},
        schedule={"name": "constant"},
        teacher={"decay": 0.8},
        steps=steps,
        run={"dir": "runs", "name": kind},
        log={"every": 1, "examples": 0},
        tracker={"name": "none"},
    ).fit()


def go_on(kind: str, steps: int = LAST) -> dict[str, Any]:
    """Train `runs/<kind>` up to a step, on its ranks; what its folder then says."""
    if kind in RANKS:
        run_ranks(RANKS[kind], train, kind, steps)
    else:
        with recorded_curves.one_thread():
            train(kind, steps)
    return recorded_curves.read_run(Path("runs", kind), steps)


# ---------------------------------------------------------------------------------------------


def own_loop(folder: Path, first: int, last: int, save: bool) -> list[float]:
    """The losses of an ordinary Accelerate loop, begun anew or gone on with."""
    from accelerate import Accelerator

    import hpdist

    with recorded_curves.one_thread(), _fresh_accelerate():
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        features, classes = curve_data.FEATURES, curve_data.CLASSES
        model = nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, classes))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = accelerator.prepare(model, optimizer)
        views = hpdist.IdentityViewsConfig().build(0)
        algorithm = hpdist.FreeMatch(classes, momentum=0.8)
        step = hpdist.SemiSupervisedStep(accelerator, model, optimizer, algorithm, views, decay=0.8)
        if first:
            accelerator.load_state(str(folder))
        losses = [step(*batches(n), measure=True).metrics["loss"] for n in range(first, last)]
        if save:
            accelerator.save_state(str(folder))
    return losses


def batches(number: int) -> tuple[Any, Any]:
    """The labelled and unlabelled rows of a step."""
    import hpdist

    generator = np.random.default_rng(number)
    drawn = generator.normal(size=(32, curve_data.FEATURES)).astype(np.float32)
    x, labels = torch.from_numpy(drawn), torch.from_numpy(generator.integers(4, size=8))
    x[:8] += 2 * torch.eye(4, curve_data.FEATURES)[labels]
    ids = torch.arange(32) + 32 * number
    return (
        hpdist.LabeledBatch(x[:8], labels, ids[:8]),
        hpdist.UnlabeledBatch(x[8:], ids[8:]),
    )


@contextmanager
def _fresh_accelerate() -> Iterator[None]:
    """Leave no accelerator behind for those who come later in this process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# ---------------------------------------------------------------------------------------------


def prepare(kind: str) -> None:
    """Lay a fixture and its data into the working folder, to go on with."""
    shutil.copytree(FOLDER / "data", "data", dirs_exist_ok=True)
    shutil.copytree(FOLDER / kind / "run", Path("runs", kind))


def continued(kind: str) -> Any:
    """What the code that wrote the fixture went on to."""
    return json.loads((FOLDER / kind / "continued.json").read_text())


def write(kind: str) -> None:
    """Write a fixture, in the working folder first."""
    kept = FOLDER / kind
    shutil.rmtree(kept, ignore_errors=True)
    if kind == STATE:
        own_loop(kept / "run", 0, FIRST, save=True)
        found: Any = own_loop(kept / "run", FIRST, LAST, save=False)
    else:
        shutil.copytree(FOLDER / "data", "data", dirs_exist_ok=True)
        go_on(kind, FIRST)
        shutil.copytree(Path("runs", kind), kept / "run")
        found = go_on(kind)
    (kept / "continued.json").write_text(recorded_curves.to_json(found))


def write_data() -> None:
    """Write the data of all fixtures, unless they are there."""
    folder = FOLDER / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("vector", "table"):
        curve_data.write(folder, kind)


def main() -> None:
    """Write the fixtures that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    names = [*KINDS, STATE]
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*names, []])
    parser.add_argument("--all", action="store_true", help="write all that are missing")
    given = parser.parse_args()
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    write_data()
    missing = [name for name in names if not (FOLDER / name / "continued.json").exists()]
    for name in missing if given.all else given.names:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            write(name)
            os.chdir(FOLDER)
        print(f"{name}: written", flush=True)


if __name__ == "__main__":
    main()
