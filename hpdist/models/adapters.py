"""Low-rank adapters (LoRA) in place of a pretrained model's weights, through peft.

The model's own weights stay unchanged and are in no optimizer, teacher or checkpoint: those hold
the adapters and newly initialised weights, such as the last layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, cast

from pydantic import Field
from torch import nn

from hpdist.config.section import Section, nearest
from hpdist.errors import ConfigError, describe
from hpdist.models.stored import FullPrecisionReads


class Lora(Section):
    """Low-rank adapters: only they and the classifier are trained."""

    rank: int = Field(8, gt=0)
    """Rank of each adapter's two factors."""
    alpha: float = Field(16.0, gt=0)
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of an adapter's input."""
    targets: list[str] = Field([])
    """Linear layers that get an adapter, by the end of their name or with wildcards, such as
    `query` or `*.layer.1?.*.value`; by default peft's choice for the type of model."""


def add_adapters(model: nn.Module, config: Lora, fresh: Iterable[str]) -> None:
    """Add adapters to a model of transformers, and freeze all but them and new weights.

    Args:
        model: A whole classifier, in fp32 or with `weights_as_stored`.
        config: Of the adapters.
        fresh: Names of parameters that the checkpoint lacks, which are trained as well.

    Raises ConfigError without peft, or if a target does not exist.
    """
    peft = _require_peft()
    named = dict(model.named_parameters())
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(base, nn.Module):
        raise ConfigError(f"model.lora: {type(model).__name__} does not name its body")
    inside, new = set(base.parameters()), set(fresh)
    trained = [p for name, p in named.items() if p not in inside or name in new]
    layers = _linear_layers(model, base)
    wanted = config.targets or _usual_targets(peft, model)
    chosen = [name for name in layers if any(_fits(name, target) for target in wanted)]
    for target in wanted:
        if not any(_fits(name, target) for name in layers):
            ends = [*layers, *(name.rpartition(".")[2] for name in layers)]
            raise ConfigError(
                f"model.lora.targets: no linear layer is called {target!r}{nearest(target, ends)}"
            )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=chosen,
        fan_in_fan_out=not isinstance(layers[chosen[0]], nn.Linear),
    )
    try:
        with FullPrecisionReads():  # adapters take the dtype of the layer that they adapt
            peft.inject_adapter_in_model(settings, model)  # which freezes all but the adapters
    except Exception as error:
        raise ConfigError(f"model.lora: peft failed: {describe(error)}") from error
    for parameter in trained:
        parameter.requires_grad_(True)


def merge_adapters(model: nn.Module) -> None:
    """Add the product of every adapter's factors to the layer that it adapts, and remove it.

    The layers keep their names, so the model is one without adapters again. In place; a model that
    has none is left alone, whether peft is there or not.
    """
    adapted = [
        (name, module)
        for name, module in model.named_modules()
        if callable(getattr(module, "get_base_layer", None)) and hasattr(module, "merge")
    ]
    for name, module in adapted:
        layer: Any = module
        layer.merge()
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, layer.get_base_layer())


def _require_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"model.lora needs peft, which cannot be imported ({error}); pip install 'hpdist[lora]'"
        ) from error
    return cast(Any, peft)


def _linear_layers(model: nn.Module, base: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model's body, by their names in the model."""
    from transformers.pytorch_utils import Conv1D  # what GPT-2's linear layers are

    inside = set(base.modules())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module in inside
    }


def _usual_targets(peft: Any, model: nn.Module) -> list[str]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if kind not in known:
        raise ConfigError(
            f"model.lora.targets: peft has no default for a model of type {kind}; name the "
            "linear layers, such as [query, value]"
        )
    return list(known[kind])


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)
