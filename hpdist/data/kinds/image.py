"""Images: encoded ones of any mode and size, and arrays of pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import datasets
from PIL import Image

from hpdist.data.decode.categories import is_number
from hpdist.data.decode.image import CHANNELS
from hpdist.data.decode.pixels import ImageSpec
from hpdist.data.decode.recorded import restored
from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.stored_values import Column
from hpdist.data.files.named_files import Limits
from hpdist.data.kinds.base import Context, Facts, InputKind, Recognised, TableOfRows
from hpdist.data.kinds.columns import (
    check_list,
    find_column,
    has_equal_bytes,
    is_array,
    is_encoded_image,
    is_list_or_array,
    is_text,
)
from hpdist.data.kinds.drawing import Cells, pixel_cells
from hpdist.data.kinds.first_rows import input_spec
from hpdist.data.kinds.modes import (
    choose_mode,
    for_channels,
    reconsider,
    recorded_mode,
)
from hpdist.data.kinds.registry import register
from hpdist.data.structures import Structure
from hpdist.errors import ConfigError
from hpdist.messages.progress import working


class ImageKind(InputKind):
    """Pixels; also what rows are taken for whose views name no kind."""

    name: ClassVar[str] = "image"
    held: ClassVar[str] = "images"
    folder_column: ClassVar[str] = "image"

    def recognise(self, feature: Any) -> Recognised | None:
        """See images wherever they are, and arrays where there is nothing else."""
        if isinstance(feature, datasets.Image):
            return Recognised("certain", self.held)
        return Recognised("alone", "arrays") if is_array(feature) else None

    def begins_like(self, data: bytes) -> bool:
        """Tell whether Pillow knows the bytes."""
        try:
            with Image.open(io.BytesIO(data)):
                return True
        except Exception:  # image libraries raise nearly everything on a damaged file
            return False

    def fits(self, feature: Any) -> bool:
        """Take images, bytes, lists and arrays."""
        return is_encoded_image(feature) or has_equal_bytes(feature) or is_list_or_array(feature)

    def usual(self, feature: Any) -> bool:
        """Take images and bytes."""
        return is_encoded_image(feature)

    def find_columns(
        self,
        features: Any,
        column: Column | list[str] | None,
        where: str,
        exclude: str | None = None,
    ) -> Column:
        """Find the column of images; of a list each column must be one of a table's."""
        setting = f"{where}.input"
        if isinstance(column, (list, tuple)):
            check_list(features, column, setting, exclude)
            return tuple(column)
        return find_column(
            features,
            column,
            setting,
            exclude,
            usual=self.usual,
            fits=self.fits,
            what=self.held,
            taker=f"views.name: {IMAGE.name}",
            wanted="neither images nor arrays of numbers",
            hint=_hint,
        )

    def measure(self, views: Any, rows: TableOfRows, context: Context) -> Facts:
        """Choose the mode of pictures by what the labelled ones and the settings say."""
        spec = self._spec(views, rows, context)
        if not isinstance(spec, ImageSpec):
            return Facts()
        if spec.stored != "encoded":
            return Facts({"mode": spec.mode})
        channels = getattr(views, "channels", None)
        return choose_mode(channels, rows, spec, context)

    @working("looking at the first rows")
    def make_spec(
        self, views: Any, rows: TableOfRows, context: Context, values: Mapping[str, Any]
    ) -> InputSpec:
        """Derive size and mode from the first row, the views and what was measured."""
        spec = self._spec(views, rows, context)
        mode = values.get("mode")
        return spec.with_mode(mode) if mode and isinstance(spec, ImageSpec) else spec

    def _spec(self, views: Any, rows: TableOfRows, context: Context) -> InputSpec:
        spec = input_spec(rows, getattr(views, "size", None), limits=context.limits)
        if not isinstance(spec, ImageSpec):
            if getattr(views, "input_kind", None) == self.name:
                raise ConfigError(
                    f"{self.setting}, but column {rows.column!r} holds vectors; set views.name: "
                    "table, or identity"
                )
            return spec
        channels = getattr(views, "channels", None)
        if channels is not None and spec.stored == "array" and spec.shape[0] != channels:
            raise ConfigError(
                f"views.channels: {channels}, but column {rows.column!r} holds arrays of "
                f"{spec.shape[0]} channels, which are taken as they are; leave views.channels out, "
                "or store pictures"
            )
        return spec

    @working("looking at the other sets' pictures")
    def measure_sets(
        self, spec: InputSpec, facts: Facts, sets: Mapping[str, Any], context: Context
    ) -> Facts:
        """Look for colour in the other sets, where the labelled pictures are all grey."""
        if not isinstance(spec, ImageSpec) or spec.stored != "encoded":
            return facts
        return reconsider(facts, sets)

    def finish(
        self, spec: InputSpec, views: Any, given: Any, values: Mapping[str, Any]
    ) -> tuple[InputSpec, Any, str | None]:
        """Decode in the mode of all sets; make mean and deviation from the model fit it."""
        if not isinstance(spec, ImageSpec):
            return spec, views, None
        if spec.stored == "encoded":
            spec = spec.with_mode(values["mode"])
            if "channels" in type(views).model_fields:
                views = views.model_copy(update={"channels": spec.shape[0]})
        if "channels" not in type(views).model_fields:
            return spec, views, None
        return spec, *for_channels(views, given, spec.shape[0])

    def is_record(self, found: Mapping[str, Any]) -> bool:
        """Tell whether a record's mode is one."""
        return recorded_mode(found) in (None, *CHANNELS)

    def recorded_spec(self, values: Mapping[str, Any], folder: Path) -> InputSpec:
        """Make the spec of images again."""
        return restored(ImageSpec, values, limits=restored(Limits, values["limits"]))

    def picture_size(self, value: Any, limits: Limits) -> tuple[int, int]:
        """Read the header of an encoded image, turned by its EXIF orientation; an array's shape."""
        height, width = ImageSpec.of(value, limits=limits).shape[1:]
        return height, width

    def draw(self, spec: InputSpec, rows: Structure, shown: Mapping[str, Structure]) -> Cells:
        """Show pixels."""
        return pixel_cells(rows, shown)


def _hint(column: str, feature: Any) -> str:
    """What to do about a column of another kind."""
    if isinstance(feature, datasets.Audio):
        return "; for audio set views.name: audio"
    if is_text(feature):
        return "; for text set views.name: text"
    return f"; a list makes a vector: [{column}]" if is_number(feature) else ""


IMAGE = ImageKind()
register(IMAGE)
