"""Every algorithm and add-on against the labels alone, at an equal number of steps.

    python -m tests.benchmarks.algorithms digits --out FOLDER
    python -m tests.benchmarks.algorithms cifar10 --data FOLDER_OF_SHARDS --out FOLDER

One process of one thread per run, fp32, `--workers` of them at a time. Prints a table and writes it
to `--out`. A finished run is kept, so that a second call only does what is missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpdist.config.component import component_names, components
from hpdist.data.samples.digits import write_digits
from hpdist.train import config
from tests.benchmarks.seeds import ENOUGH, caveat, gains, with_error

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "config": "digits.yaml",
        "steps": 300,
        "settings": {"model.width": 16, "batch.labeled": 32, "batch.unlabeled": 96},
        "told": "CNN of width 16, 4 labels per class, 32 + 96 rows a step",
    },
    "cifar10": {
        "config": "cifar10_fixmatch.yaml",
        "steps": 600,
        "settings": {
            "model": {"name": "python:tests.benchmarks.small_cnn:SmallCNN"},
            "data.labeled.labels_per_class": 25,
            "data.test.split": "test[:2000]",
            "batch.labeled": 32,
            "batch.unlabeled": 96,
            "optim": {"name": "adamw", "lr": 0.003, "weight_decay": 0.01},
            "precision": "fp32",
            "eval.batch": 500,
        },
        "threshold": 0.8,
        "told": "CNN of 70 thousand weights (small_cnn.py), 25 labels per class, 32 + 96 rows a "
        "step, AdamW, thresholds of 0.8 and more at 0.8, 2,000 test rows",
    },
}
# What the papers set for hundreds of thousands of steps, set for a few hundred.
SHORT: dict[str, dict[str, Any]] = {
    "adamatch": {"momentum": 0.99},
    "dash": {"warmup": 0.1},
    "freematch": {"momentum": 0.99},
    "ladder": {"layer_weights": [1.0, 0.1]},
    "mixmatch": {"unsupervised_weight": 10.0, "ramp": 0.5},
    "noisy_student": {"generations": 3},
    "regmixmatch": {"momentum": 0.99},
    "remixmatch": {"strong_views": 2, "ramp": 0.5},
    "softmatch": {"momentum": 0.99},
}
SHORT_ADDONS: dict[str, dict[str, Any]] = {
    "crest": {"generations": 3, "momentum": 0.99},
    "debiaspl": {"momentum": 0.99},
}


def cases(which: str) -> dict[str, dict[str, Any]]:
    """The settings of every case by its name."""
    found: dict[str, dict[str, Any]] = {}
    for name, component in components("algorithm").items():
        options = dict(SHORT.get(name, {}))
        threshold = component.model_fields.get("threshold")
        high = threshold is not None and threshold.default >= 0.8 and name != "adamatch"
        if high and "threshold" in RECIPES[which]:
            options["threshold"] = RECIPES[which]["threshold"]
        if name not in ("fully_supervised", "stored_pseudo_labels"):  # of other runs' labels
            found[name] = {"algorithm": {"name": name, **options}}
    if "ladder" in found:
        own = {"model": {"name": "ladder"}, "optim": {"name": "adam", "lr": 0.002}}  # the paper's
        found["ladder"] |= own
        found["ladder: labels alone"] = {"algorithm": {"name": "supervised"}, **own}
    everything = {"algorithm": {"name": "fully_supervised"}, "data.labeled.labels_per_class": None}
    if "fully_supervised" in component_names("algorithm"):
        found["fully_supervised"] = everything
    for name in component_names("addon"):
        addon = {"name": name, **SHORT_ADDONS.get(name, {})}
        found[f"fixmatch + {name}"] = {**found["fixmatch"], "addons": [addon]}
    return found


def train(task: tuple[argparse.Namespace, str, int]) -> tuple[str, int, str]:
    """Train once, unless that was done; an error's text or nothing."""
    options, case, seed = task
    import torch
    from accelerate.state import AcceleratorState

    from hpdist.errors import HpdistError
    from hpdist.train.trainer import Trainer

    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of a run before
    folder = _folder(options, case, seed)
    if (folder / "summary.json").exists():
        return case, seed, ""
    recipe = RECIPES[options.set]
    own = cases(options.set)[case]
    common = {k: v for k, v in recipe["settings"].items() if "model" not in own or k[:5] != "model"}
    settings = {
        "data.labeled.data_files.train": f"{options.data}/train-*.parquet",
        "data.unlabeled.data_files.train": f"{options.data}/train-*.parquet",
        "data.test.data_files.test": f"{options.data}/test-*.parquet",
        **common,
        "steps": options.steps,
        "eval.every": None,
        "checkpoint.every": None,
        "log.every": max(options.steps // 20, 1),
        "tracker.name": "none",
        "run.seed": seed,
        "run.dir": str(folder.parent),
        "run.name": folder.name,
        **own,
    }
    pairs = [f"--{key}={json.dumps(value)}" for key, value in settings.items()]
    start = time.monotonic()
    try:
        parsed = config.load(CONFIGS / recipe["config"], pairs)
        Trainer.from_config(parsed).fit()
    except HpdistError as error:
        return case, seed, f"{type(error).__name__}: {error}"
    print(f"{case}, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
    return case, seed, ""


def table(options: argparse.Namespace, errors: dict[str, str]) -> str:
    """Test accuracy of the teacher, as Markdown."""
    recipe = RECIPES[options.set]
    lines = [
        f"# Every algorithm on {options.set}",
        "",
        f"{recipe['told']}, {options.steps} steps, {options.seeds} seeds, fp32, one thread a run. "
        f"Test accuracy in %: of the teacher, and of the student. {caveat(options.seeds)}",
        "",
        "| | accuracy | against labels alone | seeds | student |",
        "|---|---|---|---|---|",
    ]
    found = {case: _summaries(options, case) for case in cases(options.set)}
    for case in sorted(case for case in found if found[case]):
        base = found["ladder: labels alone" if case.startswith("ladder") else "supervised"]
        teacher, baseline = (_percent(runs, "test/accuracy") for runs in (found[case], base))
        gained = "-"
        if found[case] is not base and len(teacher) == len(baseline):
            gained = with_error(gains(teacher, baseline), sign=True)
        seeds = ", ".join(f"{accuracy:.1f}" for accuracy in teacher)
        student = with_error(_percent(found[case], "test/accuracy_student"))
        lines.append(f"| {case} | {with_error(teacher)} | {gained} | {seeds} | {student} |")
    changed = {**SHORT, **SHORT_ADDONS}
    told = "; ".join(f"{n} {o}" for n, o in sorted(changed.items()) if o)
    lines += ["", f"Settings that differ from the defaults: {told}."]
    lines += [f"{case}: {error}" for case, error in errors.items()]
    return "\n".join(lines) + "\n"


def _folder(options: argparse.Namespace, case: str, seed: int) -> Path:
    name = case.replace(": ", "-").replace(" + ", "-").replace(" ", "-")
    return Path(options.out) / f"{options.set}-{name}-{seed}"


def _summaries(options: argparse.Namespace, case: str) -> list[dict[str, float]]:
    files = [_folder(options, case, seed) / "summary.json" for seed in range(options.seeds)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def _percent(summaries: list[dict[str, float]], key: str) -> list[float]:
    return [100 * summary[key] for summary in summaries]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=RECIPES)
    parser.add_argument("--data", type=Path, help="folder of the Parquet shards; of cifar10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=ENOUGH)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cases", nargs="+", help="some of them only")
    options = parser.parse_args(arguments)
    options.steps = options.steps or RECIPES[options.set]["steps"]
    if options.set == "digits":
        options.data = write_digits(options.out / "digits")
    names = options.cases or list(cases(options.set))
    tasks = [(options, case, seed) for seed in range(options.seeds) for case in names]
    errors = {}
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for case, _, error in pool.imap_unordered(train, tasks):
            if error:
                errors[case] = error
                print(f"{case}: {error}", flush=True)
    text = table(options, errors)
    (options.out / f"algorithms_{options.set}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
