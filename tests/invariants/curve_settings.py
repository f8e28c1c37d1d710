"""What every recorded curve trains: settings as a config has them, by the curve's name.

Each is set so that all parts of an algorithm act within twenty steps: thresholds that some rows
pass and others do not, short ramps, small banks.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

STEPS = 20
Settings = dict[str, Any]

ALGORITHMS: dict[str, Settings] = {
    "adamatch": {"threshold": 0.8, "window": 3},
    "comatch": {
        "threshold": 0.45,
        "graph_threshold": 0.3,
        "bank": 60,
        "width": 8,
        "alignment_steps": 3,
        "smoothing": 0.6,
    },
    "crmatch": {"threshold": 0.4, "width": 8},
    "dash": {"warmup": 0.1, "decay_every": 0.1, "min_threshold": 0.4},
    "defixmatch": {"threshold": 0.5},
    "entropy_minimization": {"unsupervised_weight": 0.5},
    "fixmatch": {"threshold": 0.5},
    "flexmatch": {"threshold": 0.6},
    "freematch": {"momentum": 0.8, "fairness_weight": 0.05},
    "fully_supervised": {},
    "ict": {"unsupervised_weight": 20.0, "ramp": 0.3},
    "ladder": {"layer_weights": [1.0, 0.3, 0.1]},
    "mean_teacher": {"unsupervised_weight": 20.0, "ramp": 0.3},
    "mixmatch": {"ramp": 0.3, "unsupervised_weight": 5.0},
    "noisy_student": {"generations": 2, "threshold": 0.35},
    "pi_model": {"unsupervised_weight": 20.0, "ramp": 0.3},
    "pseudo_label": {"threshold": 0.5, "ramp": 0.3},
    "refixmatch": {"threshold": 0.5},
    "regmixmatch": {
        "momentum": 0.5,
        "fairness_weight": 0.01,
        "confident": 0.6,
        "labeled_mixed": True,
    },
    "remixmatch": {"ramp": 0.3, "strong_views": 2, "window": 3},
    "sequencematch": {"threshold": 0.6, "rejected_weight": 0.1},
    "simmatch": {
        "threshold": 0.5,
        "bank": 40,
        "width": 8,
        "alignment_steps": 3,
        "smoothing": 0.6,
    },
    "softmatch": {"momentum": 0.8},
    "stored_pseudo_labels": {"threshold": 0.4, "agreement": 0.6, "temperature": 0.8},
    "supervised": {},
    "temporal_ensembling": {"unsupervised_weight": 20.0, "ramp": 0.3},
    "uda": {"threshold": 0.45, "annealing": "linear"},
    "vat": {"epsilon": 1.0, "ramp": 0.3},
}
ADDONS: dict[str, Settings] = {
    "abc": {"threshold": 0.4},
    "crest": {"generations": 2, "momentum": 0.5, "alpha": 1.5},
    "darp": {"warmup": 0.2, "every": 4},
    "debiaspl": {"momentum": 0.8},
    "logit_adjustment": {},
    "reconstruction": {"patch": 2, "hidden": 8},
}
TASKS: dict[str, tuple[str, ...]] = {
    "classification": tuple(ALGORITHMS),
    "detection": ("fixmatch", "fully_supervised", "pseudo_label", "supervised"),
    "multilabel": (
        "entropy_minimization",
        "fixmatch",
        "fully_supervised",
        "ict",
        "mean_teacher",
        "pi_model",
        "pseudo_label",
        "supervised",
        "temporal_ensembling",
        "vat",
    ),
    "regression": (
        "fully_supervised",
        "ict",
        "mean_teacher",
        "pi_model",
        "supervised",
        "temporal_ensembling",
        "vat",
    ),
}
"""The algorithms that have a meaning for each task."""
ADDON_TASKS = {"reconstruction": ("multilabel", "regression")}
"""The tasks besides classification that an add-on has a meaning for."""
OF_TASKS: dict[str, Settings] = {
    "detection-fixmatch": {"threshold": 0.12, "targets": "teacher", "burn_in": 3},
    "detection-pseudo_label": {"threshold": 0.12},
    "multilabel-fixmatch": {"threshold": 0.6},
    "multilabel-pseudo_label": {"threshold": 0.55},
    "regression-temporal_ensembling": {"unsupervised_weight": 1.0, "ramp": 0.3},
    "regression-vat": {"entropy_weight": 0.0},
}
"""What they set otherwise than for classification."""
MEASURED = {"fixmatch", "supervised", "mean_teacher"}
"""Of every task, the algorithms whose curves hold evaluations as well."""

PICTURES = {"crmatch", "remixmatch"}  # turn their inputs
MODELS: dict[str, Settings] = {
    "vector": {"name": "mlp", "hidden": [16]},
    "table": {"name": "mlp", "hidden": [16]},
    "image": {"name": "cnn", "width": 4},
    "shapes": {"name": "center_net", "width": 8, "depth": 1, "norm": "group"},
    "audio": {"name": "cnn", "width": 4},
    "text": {"name": "hf:TEXT_MODEL", "pretrained": False},
}
VIEWS: dict[str, Settings] = {
    "vector": {"name": "table", "weak": {"noise": 0.3}, "strong": {"corruption": 0.3}},
    "table": {"name": "table", "missing": "mean"},
    "image": {"name": "image", "weak": {"flip": False}, "strong": {"ops": 2, "cutout": 0.25}},
    "shapes": {"name": "image", "strong": {"magnitude": 0.5, "cutout": 0.25}},
    "audio": {
        "name": "audio",
        "sampling_rate": 4000,
        "seconds": 0.2,
        "mels": 12,
        "window": 0.032,
        "hop": 0.016,
    },
    "text": {"name": "text", "max_length": 16},
}
OF_INPUTS: dict[str, Settings] = {
    "text": {"optim": {"name": "adamw", "lr": 0.01}, "algorithm": {"threshold": 0.3}},
}
INPUTS: dict[str, Any] = {
    "vector": "x",
    "table": ["x0", "x1", "x2", "x3", "city"],
    "image": "image",
    "shapes": "image",
    "audio": "audio",
    "text": "text",
}


def _settings(kind: str, task: str, algorithm: str, /, **changes: Any) -> Settings:
    """The settings of a curve; `kind` and `measured` are the recorder's own."""
    own = ALGORITHMS[algorithm] | OF_TASKS.get(f"{task}-{algorithm}", {})
    values: Settings = {
        "kind": kind,
        "measured": algorithm in MEASURED and "addons" not in changes,
        "task": {"name": task},
        "model": MODELS[kind],
        "views": VIEWS[kind],
        "algorithm": {"name": algorithm, **own},
        "batch": {"labeled": 8, "unlabeled": 24},
        "optim": {"lr": 0.08},
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "teacher": {"decay": 0.5},  # which the warm-up reaches after eight steps
        "steps": STEPS,
    }
    if algorithm == "ladder":
        values["model"] = {"name": "ladder", "hidden": [16], "noise": 0.0}
    return deepcopy(_merged(values, changes))


def _merged(values: Settings, changes: Settings) -> Settings:
    found = dict(values)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = {**found[key], **value} if both else value
    return found


def _of_components() -> dict[str, Settings]:
    """A curve of each algorithm for each of its tasks, and of each add-on."""
    found = {}
    for task, algorithms in TASKS.items():
        for name in algorithms:
            kind = "image" if name in PICTURES else "vector"
            if task == "detection":  # its losses are sums over boxes and cells
                found[f"{task}-{name}"] = _settings("shapes", task, name, optim={"lr": 0.001})
                continue
            found[f"{task}-{name}"] = _settings(kind, task, name)
    for name, options in ADDONS.items():
        for task in ("classification", *ADDON_TASKS.get(name, ())):
            base = "fixmatch" if task == "classification" else "mean_teacher"
            kind = "image" if name == "reconstruction" and task == "classification" else "vector"
            found[f"{task}-{base}+{name}"] = _settings(
                kind, task, base, addons=[{"name": name, **options}]
            )
    return found


def _of_inputs() -> dict[str, Settings]:
    """A curve of each kind of input, and of each way to read it."""
    task, found = "classification", {}
    for kind in ("table", "image", "audio", "text"):
        found[f"input-{kind}"] = _settings(kind, task, "fixmatch", **OF_INPUTS.get(kind, {}))
    found["input-text-pair"] = _settings(
        "text", task, "fixmatch", **OF_INPUTS["text"] | {"views": {"strong_column": "back"}}
    )
    found["input-stream"] = _settings(
        "vector", task, "flexmatch", unlabeled={"streaming": True, "shuffle_window": 64}
    )
    found["input-image-stream-mean-teacher"] = _settings(
        "image", task, "mean_teacher", unlabeled={"streaming": True}
    )
    return found


def _of_steps() -> dict[str, Settings]:
    """A curve of each way to do a step."""
    task, micro = "classification", {"batch": {"micro": 8}}
    adam = {"name": "adamw", "lr": 0.01, "grad_clip": 1.0, "l1": 1e-4, "weight_decay": 0.05}
    return {
        "step-micro-freematch": _settings("vector", task, "freematch", **micro),
        "step-micro-images": _settings("image", task, "mean_teacher", **micro),
        "step-micro-comatch": _settings("vector", task, "comatch", **micro),
        "step-micro-mixmatch": _settings("image", task, "mixmatch", **micro),
        "step-micro-vat": _settings("vector", task, "vat", **micro),
        "step-checkpointed": _settings(
            "image",
            task,
            "fixmatch",
            activation_checkpointing=True,
            model={"name": "wide_resnet", "depth": 10, "width": 1},
        ),
        "step-adamw-clip-l1": _settings("vector", task, "softmatch", optim=adam),
        "step-dropout": _settings("vector", task, "uda", model={"dropout": 0.2}),
        "step-three-addons": _settings(
            "vector",
            task,
            "flexmatch",
            addons=[{"name": name, **ADDONS[name]} for name in ("debiaspl", "darp", "abc")],
        ),
    }


CURVES: dict[str, Settings] = {**_of_components(), **_of_inputs(), **_of_steps()}
