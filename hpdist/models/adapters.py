"""Low-rank adapters (LoRA) in place of a pretrained model's weights, through peft.

The model's own weights stay as they are, and so in no optimizer, teacher or checkpoint: those hold
the adapters and what begins at random, such as the last layer.
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
    """The adapters' part counts alpha / rank times."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Chance of an input of an adapter to be left out."""
    targets: list[str] = Field([])
    """Linear layers that get an adapter, by the end of their name or with wildcards, as `query` or
    `*.layer.1?.*.value`; by default peft's choice for the kind of model."""


def add_adapters(model: nn.Module, config: Lora, fresh: Iterable[str]) -> None:
    """Put adapters into a model of transformers, and leave only them and what is new to train.

    Args:
        model: A classifier, whole; in fp32, or with `weights_as_stored`.
        config: Of the adapters.
        fresh: Names of parameters that no checkpoint gave, and that are trained as well.

    Raises ConfigError without peft, or where a target is not there.
    """
    peft = _require_peft()
    named = dict(model.named_parameters())
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(base, nn.Module):
        raise ConfigError(f"model.lora: {type(model).__name__} does not say which part is its body")
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
        with FullPrecisionReads():  # adapters take the dtype of what they adapt
            peft.inject_adapter_in_model(settings, model)  # which freezes all but the adapters
    except Exception as error:
        raise ConfigError(f"model.lora: peft cannot: {describe(error)}") from error
    for parameter in trained:
        parameter.requires_grad_(True)


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
            f"model.lora.targets: peft has no usual choice for a model of type {kind}; name the "
            "linear layers, as [query, value]"
        )
    return list(known[kind])


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)
