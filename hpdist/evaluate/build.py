"""Builds the plain model that a description names, and gives it trained weights.

From the folder of a model the weights are read as they were written there; from a checkpoint of
any engine and world size they are put together from its fragments.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpdist.algorithms.addons.base import build_algorithm
from hpdist.checkpoint.reader import SavedRun
from hpdist.config.component import IN_PYTHON, Component
from hpdist.data.decode.spec import InputSpec
from hpdist.data.structures import Structure
from hpdist.data.views.base import Views
from hpdist.distributed.fragments import real
from hpdist.distributed.module_names import named_parameters, plain_name, shortened
from hpdist.errors import CheckpointError, ConfigError
from hpdist.evaluate.description import Description, HeadFacts, component
from hpdist.evaluate.model_folder import HEADS, WEIGHTS, fill, read_tensors
from hpdist.hub import PREFIX
from hpdist.models.build import build_model
from hpdist.models.full_precision import to_full_precision
from hpdist.models.plain import plain_model
from hpdist.models.with_heads import WithHeads, with_heads
from hpdist.tasks.base import Task

_HEADS, _INNER = "heads.", "model."
_IN_FOLDER: Mapping[str, Any] = {
    **{"revision": None, "pretrained": True, "config": {}, "lora": None, "freeze": []},
    **{"layer_decay": None, "trust_remote_code": False},
}
"""What changes in the section of a model `hf:` whose weights and config are in a model's folder."""


def model_of_folder(
    folder: Path, description: Description, spec: InputSpec, views: Views, given: nn.Module | None
) -> nn.Module:
    """Build the model and read its weights from its folder, in fp32 on the CPU.

    `given` is a module that the run was given in Python. Raises ConfigError where the model cannot
    be built, and CheckpointError where the weights do not fit it.
    """
    section = description.section("model")
    if section.name.startswith(PREFIX):
        known = {k: v for k, v in _IN_FOLDER.items() if k in type(section).model_fields}
        section = section.model_copy(update={**known, "name": f"{PREFIX}{folder}"})
        model = built(section, description, spec, given)
    else:
        model = built(_at_random(section), description, spec, given)
        fill(model, _in_fp32(read_tensors(folder, WEIGHTS)), str(folder / WEIGHTS))
    if description.heads is not None:
        model = add_heads(model, description, description.heads, spec, views)
        fill(model.heads, _in_fp32(read_tensors(folder, HEADS)), str(folder / HEADS))
    to_full_precision(model)
    return model.eval()


def model_of_checkpoint(
    saved: SavedRun,
    description: Description,
    spec: InputSpec,
    views: Views,
    *,
    which: str,
    given: nn.Module | None,
) -> nn.Module:
    """Build the model and give it the weights of a checkpoint, in fp32 on the CPU.

    The teacher of a run without one is the student. Raises as `model_of_folder` does.
    """
    section = description.section("model")
    names = set(saved.whole("master"))
    # What training leaves as it is, no checkpoint holds: it begins as the run did.
    model = built(section, description, spec, given)
    own = {name for name, _ in named_parameters(model)}
    has_heads = not names <= own and all(n.startswith((_HEADS, _INNER)) for n in names)
    if has_heads and description.heads is not None:
        model = add_heads(model, description, description.heads, spec, views)
    to_full_precision(model)
    prefix = _INNER if has_heads and not isinstance(model, WithHeads) else ""
    teacher = which == "teacher" and "teacher" in saved.kinds()
    _fill_parameters(model, saved, "teacher" if teacher else "master", prefix)
    _fill_buffers(model, saved, "teacher/" if teacher else "buffer/", prefix)
    return plain_model(model, views.plain(spec.example(2)))


def built(
    section: Component, description: Description, spec: InputSpec, given: nn.Module | None
) -> nn.Module:
    """Make the model of a section; the weights are the section's own."""
    if section.name == IN_PYTHON:
        if given is None:
            raise ConfigError(
                "this run's model was an object in Python: give a module of the same shape, "
                "hpdist.load(path, model=module), which receives the trained weights"
            )
        return given
    if getattr(section, "trust_remote_code", False):  # a folder may be somebody else's
        if given is None:
            raise ConfigError(
                f"this run's model, {section.name}, needs code of the Hub (trust_remote_code), "
                "which loading a checkpoint does not run: build the module yourself and give it, "
                "hpdist.load(path, model=module)"
            )
        return given
    if given is not None:
        raise ConfigError(
            f"model: the run's is {section.name}, which needs no module; leave it out"
        )
    with torch.random.fork_rng(devices=[]):
        return build_model(section, spec, description.outputs, description.seed)


def add_heads(
    model: nn.Module, description: Description, facts: HeadFacts, spec: InputSpec, views: Views
) -> WithHeads:
    """Add the heads of the run's algorithm, untrained."""
    algorithm = component("algorithm", facts.algorithm)
    addons = [component("addon", addon) for addon in facts.addons]
    task: Task = description.make_task()
    with torch.random.fork_rng(devices=[]):
        made = build_algorithm(
            cast(Any, algorithm), cast(Any, addons), description.outputs, "cpu", facts.steps, task
        )
        example: Structure = views.plain(spec.example(2))
        found = with_heads(
            model, made, example, getattr(description.section("model"), "features", None)
        )
    if not isinstance(found, WithHeads) or found.predicts is None:
        raise CheckpointError("the algorithm that the description names has no head that predicts")
    found.heads = nn.ModuleDict({found.predicts: found.heads[found.predicts]})
    return found


def _at_random(section: Component) -> Component:
    """Begin without the weights that a name stands for: others are read into the model."""
    if "pretrained" in type(section).model_fields:
        return section.model_copy(update={"pretrained": False})
    return section


def _in_fp32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


@torch.no_grad()
def _fill_parameters(model: nn.Module, saved: SavedRun, kind: str, prefix: str) -> None:
    whole = saved.whole(kind)
    own = {prefix + name: parameter for name, parameter in named_parameters(model)}
    left = {name for name in whole if name not in own}
    foreign = sorted(name for name in left if not name.startswith(_HEADS))
    if foreign:
        raise CheckpointError(
            f"{saved.path} does not fit the model, which has no {shortened(foreign)}"
        )
    shapes = saved.facts.get("identity", {}).get("parameters", {})
    untrained = sorted(
        name for name, p in own.items() if name in shapes and name not in whole and p.numel()
    )
    if untrained:
        raise CheckpointError(f"{saved.path} lacks {shortened(untrained)}")
    for name in own.keys() & set(whole):
        values, parameter = whole[name], real(own[name].detach())
        if values.numel() != parameter.numel():
            raise CheckpointError(
                f"{saved.path} does not fit the model: {name} has {values.numel()} numbers there, "
                f"and {parameter.numel()} in the model"
            )
        parameter.copy_(values.view(parameter.shape))


@torch.no_grad()
def _fill_buffers(model: nn.Module, saved: SavedRun, kind: str, prefix: str) -> None:
    for name, buffer in model.named_buffers():
        found = saved.common.get(f"{kind}{prefix}{plain_name(name)}")
        if found is not None and found.shape == buffer.shape:
            buffer.copy_(found)
