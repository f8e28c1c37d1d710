"""Every algorithm and add-on of the catalogue, set so that all parts act from the first steps."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from hpdist.algorithms import Algorithm, AlgorithmConfig
from hpdist.algorithms.addons.base import AddOnConfig, build_algorithm
from hpdist.config.component import component_names, components
from hpdist.train.algorithm_state import whole_state
from hpdist.train.step import SemiSupervisedStep
from tests.support.recipes import digits, make_model, make_step, train

# Thresholds that some rows pass and no row comes close to, where rounding would decide.
SETTINGS: dict[str, dict[str, Any]] = {
    "adamatch": {"window": 3},
    "comatch": {
        "threshold": 0.1304,
        "graph_threshold": 0.102736,
        "bank": 100,
        "alignment_steps": 3,
        "smoothing": 0.6,
    },
    "crmatch": {"threshold": 0.15},
    "dash": {"warmup": 0.05, "decay_every": 0.05, "min_threshold": 1.5},
    "defixmatch": {"threshold": 0.13},
    "fixmatch": {"threshold": 0.16},
    "flexmatch": {"threshold": 0.15, "warmup": False, "unsupervised_weight": 0.1},
    "freematch": {"momentum": 0.5, "fairness_weight": 0.05},
    "ict": {"unsupervised_weight": 50.0, "ramp": 0.1, "groups": 8},
    "ladder": {"layer_weights": [10.0, 1.0, 0.1]},
    "mean_teacher": {"unsupervised_weight": 50.0, "ramp": 0.1},
    "mixmatch": {"ramp": 0.1, "groups": 8},
    "noisy_student": {"threshold": 0.2},
    "pi_model": {"unsupervised_weight": 50.0, "ramp": 0.1},
    "pseudo_label": {"threshold": 0.14, "ramp": 0.1},
    "refixmatch": {"threshold": 0.15},
    "regmixmatch": {
        "momentum": 0.5,
        "fairness_weight": 0.01,
        "confident": 0.16,
        "unsupervised_weight": 0.1,
        "high_weight": 0.1,
        "low_weight": 100.0,
        "labeled_mixed": True,
        "groups": 8,
    },
    "remixmatch": {"ramp": 0.1, "strong_views": 2, "window": 3, "groups": 8},
    "sequencematch": {"threshold": 0.15, "warmup": False, "unsupervised_weight": 0.1},
    "simmatch": {"threshold": 0.1702, "bank": 50, "alignment_steps": 3, "smoothing": 0.6},
    "softmatch": {"momentum": 0.5},
    "stored_pseudo_labels": {"threshold": 0.3, "agreement": 0.6, "temperature": 0.7},
    "temporal_ensembling": {"unsupervised_weight": 50.0, "ramp": 0.1},
    "vat": {"epsilon": 1.0, "ramp": 0.1},
    "uda": {"threshold": 0.14, "annealing": "linear"},
}
ADDON_SETTINGS: dict[str, dict[str, Any]] = {
    "crest": {"momentum": 0.5},
    "abc": {"threshold": 0.14},
    "darp": {"warmup": 0.05, "every": 2},
    "debiaspl": {"momentum": 0.5},
    "reconstruction": {"patch": 2, "hidden": 16},
}
INSIDE: dict[str, dict[str, Any]] = {"crest": {"threshold": 0.2}}
"""Of the algorithm inside an add-on that changes how confident the model is."""
NORMALISED = {"ladder"}
"""Those whose model normalises over the rows of a pass, which micro-batches make smaller."""
RUN_STEPS = 40  # that ramps are made for


NAMES = [*component_names("algorithm"), *(f"fixmatch {name}" for name in component_names("addon"))]
FEW = {  # that together do all that an algorithm can do to a step
    "comatch",
    "fixmatch abc",
    "fixmatch reconstruction",
    "freematch",
    "ladder",
    "mean_teacher",
    "mixmatch",
    "noisy_student",
    "remixmatch",
    "simmatch",
    "temporal_ensembling",
    "vat",
}
CASES = [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in NAMES]
"""The names; what takes long by default only of a few."""


def build(name: str, device: torch.device | str = "cpu") -> Algorithm:
    """An algorithm for ten classes; behind its name, add-ons from the innermost on."""
    name, *addons = name.split()
    configs = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
    around = cast(dict[str, type[AddOnConfig]], components("addon"))
    algorithm = build_algorithm(
        configs[name](name=name, **SETTINGS.get(name, {}) | INSIDE.get("".join(addons), {})),
        [around[addon](name=addon, **ADDON_SETTINGS.get(addon, {})) for addon in addons],
        10,
        device,
        steps=RUN_STEPS,
    )
    algorithm.class_counts = torch.arange(10.0, 0.0, -1.0)
    if algorithm.generations > 1:  # as after the first
        ids = torch.arange(len(digits()[1]), device=device)
        said = (ids[:, None] * torch.arange(1, 11, device=device)).sin().softmax(dim=1)
        algorithm.take_labels(ids, said)
        algorithm.begin_generation()
    return algorithm


def make(name: str, *, device: torch.device | str = "cpu", **options: Any) -> SemiSupervisedStep:
    """A step of it; the algorithm's state is on the device."""
    algorithm = build(name, device)
    if options.get("stage") == 3 and algorithm.views.teacher:
        options["teacher_model"] = make_model(algorithm)
    return make_step(algorithm, **options)


def run(name: str, steps: int, **options: Any) -> list[dict[str, float]]:
    """The metrics of every step, and at the end what the algorithm and the teacher hold."""
    step = make(name, **options)
    curve = train(step, steps)
    alone = build(name)  # by one rank, from what all ranks hold
    alone.load_state_dict(whole_state(step.algorithm))
    state = {f"state {key}": float(v.double().sum()) for key, v in alone.state_dict().items()}
    assert step.teacher is not None
    whole = step.teacher.whole()
    teacher = sum(float(value.double().square().sum()) for value in whole.values())
    curve.append({"teacher": teacher, **state})
    return curve


def finite(curve: list[dict[str, float]]) -> bool:
    """Whether no number is NaN or infinite."""
    values = [float(value) for record in curve for value in record.values()]
    return bool(torch.tensor(values).isfinite().all())
