"""The pixels that a pretrained image model expects: read from its checkpoint, for the views."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpdist.config.component import Component
from hpdist.data.views import ImageViewsConfig
from hpdist.errors import ConfigError
from hpdist.hub import checkpoint_folder, require_transformers
from hpdist.messages.human import shown_numbers
from hpdist.messages.progress import working
from hpdist.models.build import ModelConfig, Pixels

_FILES = ("processor_config.json", "preprocessor_config.json")  # the first may hold the second


@working("reading how the model was trained to see images")
def with_model_pixels(views: Component, model: Component) -> tuple[Component, str | None]:
    """Complete the image views' settings by those that the model was trained with.

    Returns the views' settings and a message on what was taken; None if there is nothing to
    report. Raises ConfigError if the model's settings cannot be used.
    """
    if not isinstance(views, ImageViewsConfig) or not isinstance(model, ModelConfig):
        return views, None
    missing = [key for key in ("mean", "std", "size") if getattr(views, key) is None]
    found = model.pixels() if missing else None
    if found is None:
        return views, None
    taken = {key: getattr(found, key) for key in missing if getattr(found, key) is not None}
    if not taken:
        return views, f"note: {found.source}: views.{', views.'.join(missing)} keep their defaults"
    settings = ", ".join(f"views.{key} {shown_numbers(value)}" for key, value in taken.items())
    return views.model_copy(update=taken), f"{settings}: taken from {found.source}"


def checkpoint_pixels(path: str, revision: str | None, setting: str) -> Pixels:
    """Read the image processor's file of a Hugging Face checkpoint, if there is one.

    `path` is a folder or an id of the Hub; `setting` is for messages. Raises ConfigError.
    """
    found = _find_processor(path, revision, setting)
    if found is None:
        return Pixels(f"{path} holds no {_FILES[1]}")
    values, name = found
    return _of_processor(values, f"{name} of {path}")


def read_processor(path: str, revision: str | None, setting: str) -> Mapping[str, Any] | None:
    """Read the settings of a checkpoint's image processor or feature extractor, if there is one.

    Raises as `checkpoint_pixels` does.
    """
    found = _find_processor(path, revision, setting)
    return None if found is None else found[0]


def _find_processor(
    path: str, revision: str | None, setting: str
) -> tuple[Mapping[str, Any], str] | None:
    """The settings in a checkpoint's file of its processor, and the name of that file."""
    require_transformers(setting)
    from transformers.utils.hub import cached_file

    with checkpoint_folder(path, setting) as place:
        for name in _FILES:
            file = cached_file(
                place, name, revision=revision, _raise_exceptions_for_missing_entries=False
            )
            if file is None:
                continue
            values = json.loads(Path(file).read_text(encoding="utf-8"))
            if name == _FILES[0]:
                values = values.get("image_processor")
            if values is not None:
                return values, name
    return None


def _of_processor(values: Mapping[str, Any], source: str) -> Pixels:
    """Convert an image processor's settings into those for pixels in [0, 1] at one size."""
    try:
        mean, std = _normalisation(values)
        return Pixels(source, mean, std, _side(values))
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model.name: {source} is an image processor that views cannot follow ({error}); set "
            "views.mean, views.std and views.size"
        ) from error


def _normalisation(values: Mapping[str, Any]) -> tuple[list[float] | None, list[float] | None]:
    """Mean and deviation, per channel, of pixels in [0, 1]."""
    factor = float(values.get("rescale_factor") or 1 / 255) if values.get("do_rescale", True) else 1
    factor *= 255  # applied to pixels in [0, 1]
    offset = 1.0 if values.get("rescale_offset") else 0.0
    if not values.get("do_normalize", True):
        mean, std = [0.0], [1.0]
    elif values.get("image_mean") is None or values.get("image_std") is None:
        return None, None
    else:
        mean, std = (_numbers(values[key]) for key in ("image_mean", "image_std"))
    if not all(value > 0 for value in std):
        raise ValueError(f"image_std is {std}")
    return [(value + offset) / factor for value in mean], [value / factor for value in std]


def _numbers(value: Any) -> list[float]:
    return [float(number) for number in (value if isinstance(value, list) else [value])]


def _side(values: Mapping[str, Any]) -> int | None:
    """The side of the square that the model sees; None if rows keep their size."""
    if values.get("do_center_crop") and values.get("crop_size") is not None:
        size = values["crop_size"]
    elif values.get("do_resize", True):
        size = values.get("size")
    else:
        return None
    if isinstance(size, Mapping):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if size.get(key)}
        if len(sides) != 1:
            raise ValueError(f"its size is {dict(size)}, not one square's")
        (size,) = sides
    return None if size is None else int(size)
