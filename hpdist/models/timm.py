"""Models of PyTorch Image Models by name: `timm:<name>`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from hpdist.config.section import nearest
from hpdist.errors import ConfigError, describe
from hpdist.models.build import ModelConfig, Pixels

PREFIX = "timm:"


class TimmConfig(ModelConfig):
    """An image classifier of timm, for the classes and channels of the data."""

    prefix: ClassVar[str] = PREFIX
    prefix_hint: ClassVar[str] = f"{PREFIX}name"
    name: str = Field(pattern=f"^{PREFIX}.")
    """`timm:` and the name of a model, with or without a tag of its weights, such as
    `timm:resnet50.a1_in1k`."""
    pretrained: bool = True
    """Begin with timm's weights, with a new last layer; false begins at random."""
    options: dict[str, Any] = Field({})
    """Further arguments of the model, such as `drop_path_rate: 0.1` or `img_size: 96`."""

    @property
    def path(self) -> str:
        """The model's name in timm."""
        return self.name.removeprefix(self.prefix)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the model, in training mode. Raises ConfigError if timm cannot."""
        self.require_image(input_shape)
        timm = self._timm()
        given = {"num_classes", "in_chans", "pretrained"} & set(self.options)
        if given:
            raise ConfigError(
                f"model.options.{min(given)}: it follows from the data or model.pretrained; leave "
                "it out"
            )
        try:
            model: nn.Module = timm.create_model(
                self.path,
                pretrained=self.pretrained,
                num_classes=num_classes,
                in_chans=input_shape[0],
                **self.options,
            )
        except Exception as error:  # a constructor and a download may raise anything
            hint = "; for random weights set model.pretrained: false" if self.pretrained else ""
            raise ConfigError(
                f"model.name: {self.name} cannot be made: {describe(error)}{hint}"
            ) from error
        return model.train()

    def pixels(self) -> Pixels:
        """The pixels that timm's weights were trained on; the size only if it is fixed."""
        settings = self._timm().models.get_pretrained_cfg(self.path)
        side = self.options.get("img_size")
        if side is None and settings.fixed_input_size:
            side = settings.input_size[-1]
        mean, std = (list(map(float, values)) for values in (settings.mean, settings.std))
        return Pixels(f"timm's config of {self.path}", mean, std, side)

    def _timm(self) -> Any:
        """Import `timm`; raises ConfigError if it is missing, or does not know the model."""
        try:
            import timm  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise ConfigError(
                f"model.name: {self.name} needs timm, which cannot be imported ({error}); "
                "pip install 'hpdist[timm]'"
            ) from error
        except RuntimeError as error:  # torchvision for another build of torch
            raise ConfigError(
                f"model.name: {self.name} needs timm, which cannot be imported: "
                f"{describe(error)}; install the torchvision that belongs to this torch"
            ) from error
        found: Any = timm
        if not found.is_model(self.path):
            raise ConfigError(
                f"model.name: timm has no model {self.path!r}"
                f"{nearest(self.path, found.list_models())}; timm.list_models() has their names"
            )
        return found
