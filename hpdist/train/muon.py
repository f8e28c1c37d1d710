"""Muon for a model's hidden matrices and AdamW for the rest, as one optimizer.

Muon's update is the momentum with its singular values made equal, by five Newton-Schulz iterations
on the whole matrix. Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural
networks"; the factor on the rate, `match_rms_adamw`: Liu et al. 2025, arXiv:2502.16982, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from hpdist.errors import ConfigError
from hpdist.models.output_layers import output_layers

AdjustLr = Literal["original", "match_rms_adamw"]
_MARK = "use_muon"
"""An attribute by which a parameter is given to Muon or kept from it; DeepSpeed's own name."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Both optimizers behind one, with the parameter groups and the state of both.

    Args:
        muon: Groups for `torch.optim.Muon`: matrices only.
        adamw: Groups for `torch.optim.AdamW`; may be empty.
        options: The arguments of `torch.optim.Muon` beside them.
        adamw_options: The arguments of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        muon: Sequence[Mapping[str, Any]],
        adamw: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        adamw_options: Mapping[str, Any],
    ) -> None:
        matrices = [{**group, "muon": True} for group in muon]
        others = [{**group, "muon": False} for group in adamw]
        self._muon = torch.optim.Muon(matrices, **options)
        self._adamw = torch.optim.AdamW(others, **adamw_options) if others else None
        groups = [*self._muon.param_groups, *(self._adamw.param_groups if self._adamw else [])]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        part: Any
        for part in (self._muon, self._adamw):
            if part is not None:
                # Each time: loading a state, and DeepSpeed, replace groups and state.
                own = part is self._muon
                part.param_groups = [group for group in self.param_groups if group["muon"] is own]
                part.state = self.state
                part.step()
        return loss

    def describe(self) -> str:
        """How many parameters each of the two has."""
        matrices = [p for group in self.param_groups if group["muon"] for p in group["params"]]
        others = [p for group in self.param_groups if not group["muon"] for p in group["params"]]
        count, rest = (sum(p.numel() for p in each) for each in (matrices, others))
        return (
            f"Muon for {len(matrices)} hidden matrices ({count:,} parameters), AdamW for the rest "
            f"({rest:,})"
        )


def make_muon(
    model: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    adjust_lr_fn: AdjustLr,
    adamw_lr_factor: float,
    betas: tuple[float, float],
    eps: float,
) -> MuonWithAdamW:
    """Make the optimizer of a model, whose trained parameters are in `groups`.

    Raises ConfigError if the model has no hidden matrix.
    """
    chosen = {id(parameter) for parameter in hidden_matrices(model)}
    if not chosen:
        raise ConfigError(
            "optim.name: muon is for hidden matrices, and the model has none (no linear layer "
            "before its last one); choose adamw or sgd"
        )
    parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for group in groups:
        for muon, part in parts.items():
            own = [p for p in group["params"] if (id(p) in chosen) is muon]
            factor = 1.0 if muon else adamw_lr_factor
            if own:
                rates = {key: group[key] * factor for key in ("lr", "lr_scale")}
                part.append({**group, **rates, "params": own})
    options = {"momentum": momentum, "nesterov": nesterov and momentum > 0}
    return MuonWithAdamW(
        parts[True],
        parts[False],
        {"lr": lr, "adjust_lr_fn": adjust_lr_fn, **options},
        {"lr": lr, "betas": betas, "eps": eps},
    )


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices of linear layers and attention, without embeddings and output layers.

    The output layers are the linear layer that runs last, as `mark_output_layer` finds it, and the
    algorithm's heads. A parameter's attribute `use_muon`, True or False, overrides this. Raises
    ConfigError if one that is no matrix has True.
    """
    kept_out = {id(p) for module in _not_hidden(model) for p in module.parameters(recurse=False)}
    inside = {
        id(parameter)
        for module in model.modules()
        if _has_matrices(module)
        for parameter in module.parameters(recurse=False)
    }
    found = []
    for name, parameter in model.named_parameters():
        usual = parameter.dim() == 2 and id(parameter) in inside and id(parameter) not in kept_out
        wanted = getattr(parameter, _MARK, usual)
        if wanted and parameter.dim() != 2:
            raise ConfigError(
                f"model: {name} has {_MARK} = True and {parameter.dim()} dimensions; Muon is for "
                "matrices"
            )
        if wanted and parameter.requires_grad:
            found.append(parameter)
    return found


def refuse_sharded(stage: int | None, shard_engine: str | None = None) -> None:
    """Raise ConfigError if ZeRO or FSDP2 shards what Muon needs whole."""
    if shard_engine is not None:
        raise ConfigError(
            f"optim.name: muon needs whole matrices, and shard.engine: {shard_engine} cuts them "
            "into rows; leave shard.engine out to train with DDP, or choose optim.name: adamw"
        )
    if stage:
        raise ConfigError(
            f"optim.name: muon needs whole matrices, and zero.stage: {stage} cuts them into flat "
            "parts; leave zero.stage out to train with DDP, or choose optim.name: adamw"
        )


def _has_matrices(module: nn.Module) -> bool:
    """Whether a layer multiplies by its 2-dimensional parameters."""
    by_name = type(module).__name__ == "Conv1D"  # GPT-2's linear layer in transformers
    return isinstance(module, (nn.Linear, nn.MultiheadAttention)) or by_name


def _not_hidden(model: nn.Module) -> list[nn.Module]:
    """The embeddings and the output layers."""
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    found = [module for module in model.modules() if isinstance(module, embeddings)]
    return [*found, *output_layers(model)]
