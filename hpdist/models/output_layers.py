"""The linear layers that make a model's outputs: hidden layers are treated otherwise than these."""

from __future__ import annotations

from torch import nn

from hpdist.data.structures import Structure
from hpdist.models.outputs import on_trial
from hpdist.models.with_heads import WithHeads, linear_layers_run

_MARK = "makes_outputs"
"""The attribute of a marked layer."""


def mark_output_layer(model: nn.Module, example: Structure) -> None:
    """Mark the linear layer that runs last in a forward of an example, for `output_layers`.

    Raises ConfigError if the model fails on the example.
    """
    with on_trial(model):
        ran = linear_layers_run(model, example)
    for name in ran[-1:]:
        setattr(model.get_submodule(name), _MARK, True)


def output_layers(model: nn.Module) -> list[nn.Linear]:
    """The model's marked layer, or else its last one as defined, and those of heads added to it."""
    found: list[nn.Linear] = []
    while isinstance(model, WithHeads):
        found += [head for head in model.heads.modules() if isinstance(head, nn.Linear)]
        model = model.model
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    marked = [module for module in linear if getattr(module, _MARK, False)]
    return [*found, *(marked or linear[-1:])]
