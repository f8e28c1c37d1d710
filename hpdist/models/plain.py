"""A trained model as a plain module of torch: adapters merged, and the head that predicts in place.

Training adds to a model what a user of it need not have: low-rank adapters beside its layers, and
heads beside its last layer. What comes out here is the module that the model's config makes, with
weights that give the same outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpdist.data.structures import Structure
from hpdist.models.adapters import merge_adapters
from hpdist.models.outputs import named_outputs, on_trial
from hpdist.models.with_heads import WithHeads


def plain_model(model: nn.Module, example: Structure) -> nn.Module:
    """Give the plain module of a trained model, which is changed.

    A head that predicts becomes the last layer where that layer is a linear one of the same shape
    and the outputs for `example` stay what they are; else the result is still a `WithHeads`, with
    that head alone.
    """
    merge_adapters(model)
    if not isinstance(model, WithHeads):
        return model.eval()
    assert model.predicts is not None
    model.heads = nn.ModuleDict({model.predicts: model.heads[model.predicts]})
    model.eval()
    return _with_last_layer(model, example) or model


@torch.no_grad()
def _with_last_layer(model: WithHeads, example: Structure) -> nn.Module | None:
    """The model inside, with the head in place of its last layer; None where they differ."""
    layer = model.last_layer
    head = _linear_of(model.heads[str(model.predicts)])
    if not isinstance(layer, nn.Linear) or head is None:
        return None
    own, other = dict(layer.named_parameters()), dict(head.named_parameters())
    if own.keys() != other.keys() or any(own[key].shape != other[key].shape for key in own):
        return None
    before = {name: tensor.clone() for name, tensor in own.items()}
    with on_trial(model):
        expected = _outputs(model, example)
        for name, tensor in own.items():
            tensor.copy_(other[name])
        found = _outputs(model.model, example)
    if expected.keys() == found.keys() and all(
        torch.equal(expected[name], found[name]) for name in found
    ):
        return model.model
    for name, tensor in own.items():
        tensor.copy_(before[name])
    return None


def _outputs(model: nn.Module, example: Structure) -> dict[str, Tensor]:
    return named_outputs(model(example))


def _linear_of(head: nn.Module) -> nn.Linear | None:
    """The only layer of a head that has parameters, where it is a linear one."""
    owners = [m for m in head.modules() if list(m.parameters(recurse=False))]
    return owners[0] if len(owners) == 1 and isinstance(owners[0], nn.Linear) else None
