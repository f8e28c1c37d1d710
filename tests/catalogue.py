"""Every algorithm and add-on of the catalogue, set so that all parts act from the first steps."""

from __future__ import annotations

from typing import Any, cast

import torch

from hpdist.algorithms import Algorithm, AlgorithmConfig
from hpdist.algorithms.addon import AddOnConfig, build_algorithm
from hpdist.config import component_names, components
from tests.recipes import make_model, make_step, train

# Thresholds that some rows pass and no row comes close to, where rounding would decide.
SETTINGS: dict[str, dict[str, Any]] = {
    "dash": {"warmup": 0.05, "decay_every": 0.05, "min_threshold": 1.5},
    "defixmatch": {"threshold": 0.13},
    "fixmatch": {"threshold": 0.16},
    "flexmatch": {"threshold": 0.15, "warmup": False, "unsupervised_weight": 0.1},
    "freematch": {"momentum": 0.5, "fairness_weight": 0.05},
    "ict": {"unsupervised_weight": 50.0, "ramp": 0.1},
    "mean_teacher": {"unsupervised_weight": 50.0, "ramp": 0.1},
    "mixmatch": {"ramp": 0.1},
    "pi_model": {"unsupervised_weight": 50.0, "ramp": 0.1},
    "pseudo_label": {"threshold": 0.14, "ramp": 0.1},
    "refixmatch": {"threshold": 0.15},
    "remixmatch": {"ramp": 0.1, "strong_views": 2},
    "sequencematch": {"threshold": 0.15, "warmup": False, "unsupervised_weight": 0.1},
    "softmatch": {"momentum": 0.5},
    "temporal_ensembling": {"unsupervised_weight": 50.0, "ramp": 0.1},
    "vat": {"epsilon": 1.0, "ramp": 0.1},
    "uda": {"threshold": 0.14, "annealing": "linear"},
}
ADDON_SETTINGS: dict[str, dict[str, Any]] = {
    "abc": {"threshold": 0.14},
    "darp": {"warmup": 0.05, "every": 2},
    "debiaspl": {"momentum": 0.5},
}
RUN_STEPS = 40  # that ramps are made for


NAMES = [*component_names("algorithm"), *(f"fixmatch {name}" for name in component_names("addon"))]


def build(name: str) -> Algorithm:
    """An algorithm for ten classes; behind its name, add-ons from the innermost on."""
    name, *addons = name.split()
    configs = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
    around = cast(dict[str, type[AddOnConfig]], components("addon"))
    algorithm = build_algorithm(
        configs[name](name=name, **SETTINGS.get(name, {})),
        [around[addon](name=addon, **ADDON_SETTINGS.get(addon, {})) for addon in addons],
        10,
        steps=RUN_STEPS,
    )
    algorithm.class_counts = torch.arange(10.0, 0.0, -1.0)
    return algorithm


def run(name: str, steps: int, **options: Any) -> list[dict[str, float]]:
    """The metrics of every step, and at the end what the algorithm and the teacher hold."""
    algorithm = build(name)
    if options.get("stage") == 3 and algorithm.views.teacher:
        options["teacher_model"] = make_model(algorithm)
    step = make_step(algorithm, **options)
    curve = train(step, steps)
    state = {
        f"state {key}": float(value.double().sum())
        for key, value in step.algorithm.state_dict().items()
    }
    assert step.teacher is not None
    whole = step.teacher.whole()
    teacher = sum(float(value.double().square().sum()) for value in whole.values())
    curve.append({"teacher": teacher, **state})
    return curve


def finite(curve: list[dict[str, float]]) -> bool:
    """Whether no number is NaN or infinite."""
    values = [float(value) for record in curve for value in record.values()]
    return bool(torch.tensor(values).isfinite().all())
