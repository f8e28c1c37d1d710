"""Heads: additional outputs of a model, made from its features, for training only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpdist.config.section import nearest
from hpdist.data.structures import Structure, describe_rows, row_count, tensors_of
from hpdist.errors import ConfigError, describe
from hpdist.models.outputs import named_outputs, on_trial


class DeclaresHeads(Protocol):
    """The heads that an algorithm needs; `hpdist.Algorithm` implements it."""

    @property
    def head_names(self) -> Sequence[str]:
        """Outputs that its loss uses beside the logits."""
        ...

    @property
    def heads_hint(self) -> str:
        """What to do if the model lacks them."""
        ...

    @property
    def predicts(self) -> str | None:
        """The head whose outputs are the predictions after training, if any."""
        ...

    input_shape: torch.Size | None
    """The shape of one row as the model sees it, None for several tensors; set before `heads` is
    called."""

    def heads(self, features: torch.Size) -> Mapping[str, nn.Module]:
        """Make the head of every name, from features [rows, *features] to [rows, *]."""
        ...


class WithHeads(nn.Module):
    """A model whose output in training includes that of the heads.

    One forward maps inputs, as batches have them, to tensors by name: `logits`, or the model's
    outputs by name, and each head's output under its name, [rows, *]. In evaluation it returns the
    model's own outputs, with the head that `predicts` instead of the logits.

    Args:
        model: Maps inputs to logits, or to several outputs by name.
        heads: Modules from features [rows, *features] to [rows, *].
        features: The submodule of `model` whose output the features are; by default they are the
        input of its last linear layer.
        predicts: The head that replaces the logits in evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Mapping[str, nn.Module],
        features: Features,
        predicts: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict(heads)
        self.head_names = (*head_names_of(model), *heads)
        self.predicts = predicts
        self._features = features

    @property
    def last_layer(self) -> nn.Module | None:
        """The layer whose input the features are; None where they are the output of another one."""
        place = self._features
        return self.model.get_submodule(place.module) if place.given else None

    def forward(self, inputs: Structure) -> Any:
        """Outputs by name in training, else the model's own."""
        if not self.training and self.predicts is None:
            return self.model(inputs)
        with self._features.kept(self.model) as kept:
            own = named_outputs(self.model(inputs))
        rows = next(iter(tensors_of(inputs))).shape[0]  # len() would fix it in an exported graph
        features = kept.pop()[:rows]
        if self.training:
            return own | {name: head(features) for name, head in self.heads.items()}
        predictions: Tensor = self.heads[str(self.predicts)](features)
        return own | {"logits": predictions} if len(own) > 1 else predictions


class Features:
    """The place of the features in a model: the input or the output of a submodule."""

    def __init__(self, module: str, *, given: bool) -> None:
        self.module = module
        self.given = given

    @contextmanager
    def kept(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Store the features of the forward inside, as the last entry of the list."""
        kept: list[Tensor] = []

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            kept.append(inputs[0])

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            kept.append(_tensor(output))

        module = model.get_submodule(self.module)
        hook = (
            module.register_forward_pre_hook(before)
            if self.given
            else module.register_forward_hook(after)
        )
        try:
            yield kept
        finally:
            hook.remove()


def with_heads(
    model: nn.Module, algorithm: DeclaresHeads, example: Structure, features: str | None = None
) -> nn.Module:
    """Add the heads that the algorithm needs and the model lacks.

    Call it before `accelerator.prepare`, and give the result's parameters to the optimizer.

    Args:
        model: On the CPU.
        algorithm: Names the heads in `head_names`.
        example: A batch of inputs [rows, *], one tensor or tensors by name, for the features'
            shape.
        features: The submodule whose output the features are; by default they are the input of the
        last linear layer.

    Raises ConfigError if the model has no such submodule or no linear layer, or lacks an output
    that only a model can make, or if a head's output is not [rows, *].
    """
    algorithm.input_shape = example.shape[1:] if isinstance(example, Tensor) else None
    missing = [name for name in algorithm.head_names if name not in head_names_of(model)]
    if not missing:
        return model
    rows = row_count(example)
    with on_trial(model):
        where = _find(model, example, features)
        with where.kept(model) as kept:
            model(example)
        if not kept or kept[-1].shape[:1] != (rows,):
            found = list(kept[-1].shape) if kept else "nothing"
            raise ConfigError(
                f"model.features: {where.module} gives {found} for inputs "
                f"{describe_rows(example)}; features must be [rows, *]"
            )
        tokens = not any(tensor.is_floating_point() for tensor in tensors_of(example))
        if tokens and kept[-1].dim() > 2:
            raise ConfigError(
                f"model.features: {where.module} gives features of every token, "
                f"{list(kept[-1].shape)}; name a submodule that gives [rows, features]"
            )
        feature = kept[-1].float()
        made = algorithm.heads(feature.shape[1:])
        require_heads(algorithm, [*head_names_of(model), *made])
        heads = {name: made[name] for name in missing}
        for name, head in heads.items():
            _check_head(name, head(feature), rows)
    return WithHeads(model, heads, where, algorithm.predicts)


def head_names_of(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's outputs in training beside its logits, for algorithms to use.

    A model of one's own declares them by an attribute `head_names`.
    """
    return tuple(getattr(model, "head_names", ()))


def require_heads(algorithm: DeclaresHeads, names: Collection[str]) -> None:
    """Raise ConfigError unless all heads that the algorithm needs exist."""
    missing = [name for name in algorithm.head_names if name not in names]
    if missing:
        raise ConfigError(
            f"{type(algorithm).__name__} needs the heads {', '.join(missing)}, which the model has "
            f"not; {algorithm.heads_hint}"
        )


def _check_head(name: str, output: Any, rows: int) -> None:
    if not isinstance(output, Tensor) or output.shape[:1] != (rows,):
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"the head {name!r} gives {found} for {rows} rows; heads must give one tensor [rows, *]"
        )


def _find(model: nn.Module, example: Structure, features: str | None) -> Features:
    """Find the features, by name or else at the linear layer that runs last."""
    if features is not None:
        try:
            model.get_submodule(features)
        except AttributeError:
            names = [name for name, _ in model.named_modules() if name]
            raise ConfigError(
                f"model.features: the model has no submodule {features!r}{nearest(features, names)}"
            ) from None
        return Features(features, given=False)
    ran = linear_layers_run(model, example)
    if not ran:
        raise ConfigError(
            "the algorithm needs the model's features, and the model has no linear layer to find "
            "them by; name the submodule whose output they are: model.features"
        )
    return Features(ran[-1], given=True)


def linear_layers_run(model: nn.Module, example: Structure) -> list[str]:
    """The names of the linear layers, in the order in which a forward of an example runs them.

    Raises ConfigError if the model fails on the example.
    """
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        model(example)
    except Exception as error:
        raise ConfigError(
            f"model: it fails on inputs of shape {describe_rows(example)}: {describe(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def _tensor(output: Any) -> Tensor:
    """Find the tensor in a submodule's output."""
    if isinstance(output, tuple):
        output = output[0]
    found: Tensor = getattr(output, "last_hidden_state", output)
    return found
