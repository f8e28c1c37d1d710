"""The config of a model, and how a model is built from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from hpdist.config.component import IN_PYTHON, Component, PythonComponent, import_object
from hpdist.data.decode.spec import InputSpec
from hpdist.errors import ConfigError, describe
from hpdist.messages.progress import working


@dataclass(frozen=True)
class Pixels:
    """The pixels that a model was trained on; None where that is not known."""

    source: str
    """The source of these values, or why they are not known."""
    mean: list[float] | None = None
    """Mean per channel, or one for all, of pixels in [0, 1]."""
    std: list[float] | None = None
    """Divisor of pixels after that."""
    size: int | None = None
    """Side of the images, which are square."""


class ModelConfig(Component):
    """The options of a model; `build` makes it."""

    kind: ClassVar[str] = "model"
    takes: ClassVar[frozenset[str]] = frozenset({"image", "audio"})
    """Kinds of input that it supports: see `hpdist.data.kinds`."""
    num_classes: int | None = Field(None, ge=2)
    """By default the number of classes in the labelled data."""
    features: str | None = None
    """The submodule whose output the features are, for algorithms with their own heads; by default
    the input of the last linear layer."""
    save: Literal["full", "half", "none"] = "full"
    """What the run folder's `model/` holds: the weights in fp32, in the run's half precision, or
    nothing, where there is none."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the model for inputs of a shape (without the batch) and a number of classes."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def build_for(self, spec: InputSpec, num_classes: int) -> nn.Module:
        """Make the model for the content of the input column."""
        shape = spec.model_input_shape
        if spec.not_for_arrays is not None:
            raise ConfigError(f"model.name: {self.name} does not take {spec.not_for_arrays}")
        if not isinstance(shape, tuple):
            raise ConfigError(
                f"model.name: {self.name} takes one tensor, and the inputs are tensors by name, "
                f"{', '.join(shape)}; use a model of your own"
            )
        return self.build(shape, num_classes)

    def pixels(self) -> Pixels | None:
        """The pixels that the model expects, if something that comes with it says so."""
        return None

    def require_image(self, input_shape: tuple[int, ...]) -> None:
        """Raise ConfigError unless the inputs are [channels, height, width]."""
        if len(input_shape) != 3:
            raise ConfigError(
                f"model.name: {self.name} takes images [channels, height, width], but the input "
                f"column holds vectors of shape {list(input_shape)}; use mlp"
            )


@working("building the model")
def build_model(
    config: Component, inputs: InputSpec | tuple[int, ...], num_classes: int, seed: int
) -> nn.Module:
    """Build the model that a config names; the same weights for a seed, on every rank.

    `inputs` is the input column's spec, or the shape of one of its rows, for images or vectors.
    A `python:module:function` is called as `function(num_classes=..., **args)`. Raises ConfigError
    if that fails or returns no module.
    """
    torch.manual_seed(seed)
    if isinstance(config, ModelConfig):
        if isinstance(inputs, tuple):
            return config.build(inputs, num_classes)
        return config.build_for(inputs, num_classes)
    if not isinstance(config, PythonComponent):
        raise ConfigError(f"model.name: {config.name} is not a ModelConfig")
    return _call(config, num_classes)


def _call(config: PythonComponent, num_classes: int) -> nn.Module:
    """Call a user's function."""
    if config.name == IN_PYTHON:
        raise ConfigError(
            "model.name: this run's model was an object in Python; give it again there"
        )
    try:
        model = import_object(config.name)(num_classes=num_classes, **config.args)
    except Exception as error:  # it may raise anything
        raise ConfigError(
            f"model.name: {config.name}, called with num_classes={num_classes} and model.args, "
            f"failed: {describe(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.name: {config.name} returned {type(model).__name__}, not a torch.nn.Module"
        )
    return model
