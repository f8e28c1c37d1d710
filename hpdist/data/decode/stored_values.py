"""How a stored value becomes one row of a batch.

Images stay uint8 [channels, height, width] until the views run on the device; one-dimensional
arrays are float32 vectors; text becomes int64 token ids, sound float32 samples. One `InputSpec` is
derived from the labelled rows and shared by every other set, so that a test or unlabelled row is
decoded as a labelled one is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from PIL import UnidentifiedImageError

from hpdist.data.decode.arrow_types import plain_column
from hpdist.data.decode.encoded import Array, Unreadable
from hpdist.data.decode.image import CHANNELS, mode_of, open_image, part_pixels, pixels_of
from hpdist.data.files.named_files import USUAL_LIMITS, Limits
from hpdist.errors import DataError, printable

__all__ = [
    "CHANNELS",
    "Array",
    "Column",
    "InputSpec",
    "Unreadable",
    "stored_inputs",
    "stored_values",
]

if TYPE_CHECKING:  # imported where it is used: a decoding process does without it
    import torch
    from torch import Tensor

    from hpdist.data.decode.audio import Sampling
    from hpdist.data.decode.categories import Categories
    from hpdist.data.decode.text import Tokenizer

Column: TypeAlias = str | tuple[str, ...]
"""Where a row's input is: in one column, or in several, of a number or a category each."""

_REASON_LENGTH = 300


@dataclass(frozen=True)
class InputSpec:
    """How every set's inputs are decoded, and the shape of one row.

    Every image is converted to `mode`, whatever its own: L is 8-bit grey (of 16 bits the upper
    eight are kept), RGB, or RGBA. Images of 32-bit floats are refused.
    """

    kind: Literal["image", "vector", "text", "audio"]
    shape: tuple[int, ...]  # (channels, height, width), (features,), ([2,] tokens) or (samples,)
    stored: Literal["encoded", "array", "text", "sound"]
    mode: str | None = None  # L, RGB or RGBA, of images
    channels_last: bool = False  # how 3-D arrays are stored
    size: int | None = None  # every image is resized to size x size
    missing: bool = False  # whether a vector may hold NaN, for the views to fill in
    names: tuple[str, ...] = ()  # of the features, where they are columns or their categories
    categories: Categories | None = None  # of the columns that hold no numbers
    tokenizer: Tokenizer | None = None  # of text
    sampling: Sampling | None = None  # of sound
    seen: tuple[int, ...] | None = None  # a row as the views give it to the model, if not `shape`
    paired_column: str | None = (
        None  # a column with a second text of each row; stored values are pairs
    )
    limits: Limits = USUAL_LIMITS  # what a row may take to decode

    @classmethod
    def of(
        cls,
        value: Any,
        size: int | None,
        mode: str | None = None,
        limits: Limits = USUAL_LIMITS,
    ) -> InputSpec:
        """Derive the spec from the first labelled row's value, as `stored_values` gives it.

        Without a `mode`, that of encoded images is what this one is by itself; see `mode_of`.
        Raises ValueError when the value is neither an image nor an array of a known shape, or is
        beyond the limits.
        """
        if value is None or isinstance(value, Unreadable):
            raise ValueError(value.reason if value else "the value is null")
        if not isinstance(value, np.ndarray):
            image = open_image(value, limits)
            found = mode_of(image)  # refuses what no mode can be made of
            mode = mode or found
            height, width = (size, size) if size else (image.height, image.width)
            shape = (CHANNELS[mode], height, width)
            return cls("image", shape, "encoded", mode, size=size, limits=limits)
        if value.ndim == 1:
            if size:
                raise ValueError(
                    f"views.size is {size}, but the rows are vectors: remove views.size"
                )
            return cls("vector", value.shape, "array")
        channels_last = value.ndim == 3 and value.shape[2] in CHANNELS.values()
        channels, height, width = _to_channels_first(value, channels_last).shape
        modes = {count: mode for mode, count in CHANNELS.items()}
        if channels not in modes:
            raise ValueError(
                f"an array of shape {_by(value.shape)} is no image: it must be height x width, "
                "height x width x channels or channels x height x width with 1, 3 or 4 channels"
            )
        shape = (channels, size or height, size or width)
        return cls("image", shape, "array", modes[channels], channels_last, size)

    @classmethod
    def of_text(cls, tokenizer: Tokenizer, paired_column: str | None = None) -> InputSpec:
        """The spec of text, which no row needs to tell; with a second one in column `beside`."""
        shape = (tokenizer.max_length,) if paired_column is None else (2, tokenizer.max_length)
        return cls("text", shape, "text", tokenizer=tokenizer, paired_column=paired_column)

    @classmethod
    def of_audio(cls, sampling: Sampling, seen: tuple[int, ...]) -> InputSpec:
        """The spec of sound; `seen` is the shape of what the views make of a row."""
        return cls("audio", (sampling.samples,), "sound", sampling=sampling, seen=seen)

    @property
    def array_dtype(self) -> np.dtype[Any]:
        """uint8 for images, float32 for vectors and sound, int64 for text."""
        return np.dtype({"image": np.uint8, "text": np.int64}.get(self.kind, np.float32))

    @property
    def dtype(self) -> torch.dtype:
        """`array_dtype` as torch calls it."""
        import torch

        found: torch.dtype = getattr(torch, self.array_dtype.name)
        return found

    def example(self, rows: int) -> Tensor:
        """Rows to try a model on: zeros (of sound, silence), or the tokens of a few words."""
        import torch

        if self.tokenizer is not None:
            return torch.from_numpy(self.tokenizer.example(rows))
        return torch.zeros((rows, *self.shape), dtype=self.dtype)

    def decode(self, value: Any) -> Tensor:
        """Turn one stored value into a tensor of `shape` and `dtype`.

        Raises ValueError (or what the image library raises) when the value does not fit the spec.
        """
        import torch

        out = torch.empty(self.shape, dtype=self.dtype)
        self._decode_into(value, out.numpy())
        return out

    def decode_rows(
        self,
        values: Sequence[Any],
        ids: Sequence[int],
        name: str,
        describe: Callable[[int], str] = "row {}".format,
    ) -> Tensor:
        """Decode stored values into [rows, *shape].

        Raises DataError that names the dataset, the row, as `describe` does, and the cause.
        """
        import torch

        out = torch.empty((len(values), *self.shape), dtype=self.dtype)
        for line, reason in self.decode_valid(values, out).items():
            raise DataError(
                f"{name}: {describe(ids[line])} cannot be decoded: {reason}; mend or remove that "
                "row"
            )
        return out

    def decode_valid(self, values: Sequence[Any], out: Tensor) -> dict[int, str]:
        """Decode each value into its line of `out`: [rows, *shape] of `dtype`, on the CPU.

        Returns why, by line and in their order, for the values that cannot be decoded; their lines
        are zeros.
        """
        return self.decode_array(values, out.numpy())

    def decode_array(self, values: Sequence[Any], out: Array) -> dict[int, str]:
        """Do as `decode_valid` does, into a numpy array; imports torch only to resize images."""
        if out.shape != (len(values), *self.shape):
            raise ValueError(
                f"{len(values)} rows of {_by(self.shape)} do not fit into {_by(out.shape)}"
            )
        if self.tokenizer is not None:
            if self.paired_column is not None:
                return self.tokenizer.decode_pairs_into(values, out, self.paired_column)
            return self.tokenizer.decode_into(values, out)
        reasons = {}
        for line, value in enumerate(values):
            reason = self._try_into(value, out[line])
            if reason is not None:
                reasons[line] = reason
        return reasons

    def _try_into(self, value: Any, out: Array) -> str | None:
        try:
            self._decode_into(value, out)
        except Exception as error:  # image libraries raise nearly everything on a damaged file
            out[...] = 0
            return _reason(error)
        return None

    def _decode_into(self, value: Any, out: Array) -> None:
        if self.tokenizer is not None:
            for reason in self.decode_array([value], out[None]).values():
                raise ValueError(reason)
            return
        if self.sampling is not None:
            self.sampling.decode_into(value, out, self.limits)
            return
        if value is None:
            raise ValueError("the value is null")
        if isinstance(value, Unreadable):
            raise ValueError(value.reason)
        if (self.stored == "array") != isinstance(value, np.ndarray):
            found = "an array" if isinstance(value, np.ndarray) else "an encoded image"
            raise ValueError(f"it is {found}, but the labelled rows are not")
        if self.kind == "vector":
            row = value if self.categories is None else self.categories.encode(value)
            array: Array = _finite(row, self.missing, self.names)  # [features]
        elif self.stored == "encoded":
            pixels = pixels_of(open_image(value, self.limits), str(self.mode))
            if pixels.shape[:2] == self.shape[1:]:
                part_pixels(pixels, out)
                return
            array = pixels.transpose(2, 0, 1)[: self.shape[0]]  # [channels, height, width]
        else:
            array = _bytes_of(_to_channels_first(value, self.channels_last))
        if self.size and array.shape[0] == self.shape[0]:
            array = _resize(array, self.size)
        if array.shape != self.shape:
            ours, first = _by(array.shape), _by(self.shape)
            resizable = self.kind == "image" and array.shape[0] == self.shape[0]
            hint = " (set views.size to resize every image)" if resizable else ""
            raise ValueError(f"its shape is {ours}, the first labelled row's is {first}{hint}")
        out[...] = array


def stored_values(column: pa.ChunkedArray) -> list[Any]:
    """Take a column's values as they are stored, one per row, undecoded.

    Encoded images are bytes or {bytes, path}; lists of numbers, nested or not, are arrays; a list
    that is ragged or holds nulls is `Unreadable`, and so is text that is not UTF-8.
    """
    values: list[Any] = []
    for chunk in plain_column(column).chunks:
        storage = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        if _is_list(storage.type):
            values += [_nested(storage.slice(row, 1)) for row in range(len(storage))]
        else:
            values += _plain(storage)
    return values


def stored_inputs(table: pa.Table, column: Column) -> list[Any]:
    """Take the inputs as they are stored, one per row; of several columns a vector, null as NaN.

    Where a column holds other than numbers the vector is one of objects.
    """
    if isinstance(column, str):
        return stored_values(table.column(column))
    columns = [plain_column(table.column(name)) for name in column]
    of_numbers = [_is_number(one.type) for one in columns]
    if all(of_numbers):
        return list(np.stack([_numbers(one) for one in columns], axis=1))
    rows = np.empty((len(table), len(columns)), object)
    for number, (one, is_number) in enumerate(zip(columns, of_numbers, strict=True)):
        rows[:, number] = _numbers(one) if is_number else stored_values(one)
    return list(rows)


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    checks = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
    return any(check(kind) for check in checks)


def _numbers(column: pa.ChunkedArray) -> Array:
    """A column of numbers or booleans as float64 [rows]."""
    return np.asarray(pc.cast(column, pa.float64(), safe=False).to_numpy())


def _plain(array: pa.Array) -> list[Any]:
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return [_plain_value(value) for value in array]


def _plain_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return Unreadable("it holds text that is not UTF-8")


def _is_list(type_: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)
    )


def _nested(array: pa.Array) -> Array | Unreadable | None:
    """One row's nested lists as an array; None for a null."""
    if array.null_count:
        return None
    shape = []
    while _is_list(array.type):
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            return Unreadable("its lists differ in length or hold nulls")
        shape.append(lengths[0])
        array = array.flatten()
    if array.null_count:
        return Unreadable("its lists hold nulls")
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)


def _to_channels_first(array: Array, channels_last: bool) -> Array:
    """[height, width] or 3-D to [channels, height, width]."""
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise ValueError(
            f"an array of shape {_by(array.shape)} is no image: give 2 or 3 dimensions"
        )
    return np.moveaxis(array, -1, 0) if channels_last else array


def _bytes_of(array: Array) -> Array:
    """Integer values in 0..255 as uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iufb":
        raise ValueError(f"an image of {array.dtype} is not one of numbers")
    with np.errstate(invalid="ignore"):  # NaN fails the comparison below
        as_bytes = array.astype(np.uint8)
    if not np.array_equal(as_bytes, array):
        raise ValueError(
            "its pixels are not whole numbers in 0..255: scale and store them as uint8"
        )
    return as_bytes


def _finite(array: Array, missing: bool, names: tuple[str, ...]) -> Array:
    """Numbers as float32, all of them finite, or else NaN where they may be `missing`."""
    if array.dtype.kind not in "iufb":
        raise ValueError(f"a vector of {array.dtype} is not one of numbers")
    with np.errstate(over="ignore"):  # infinities are refused below
        vector = array.astype(np.float32)
    wrong = np.isinf(vector) if missing else ~np.isfinite(vector)
    if wrong.any():
        place = int(wrong.argmax())
        where = f" in column {names[place]!r}" if place < len(names) else ""
        hint = "; views.missing: mean, of views.name: table, fills in what is missing"
        raise ValueError(
            f"it holds NaN or infinity{where}, or leaves float32's range"
            f"{hint if np.isnan(array[place]) else ''}"
        )
    return vector


def _resize(image: Array, size: int) -> Array:
    """uint8 [channels, height, width] to [channels, size, size], bilinear and antialiased."""
    if image.shape[1:] == (size, size):
        return image
    import torch

    # Channels last in memory, since torch fails on channels first where size is 1. A copy, since
    # torch warns of read-only arrays.
    pixels = torch.from_numpy(np.array(image.transpose(1, 2, 0), order="C")).permute(2, 0, 1)
    resized = torch.nn.functional.interpolate(
        pixels[None], (size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].numpy()


def _reason(error: Exception) -> str:
    """Say in one line why a value cannot be decoded, the same in every run."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image that Pillow knows"  # its own message holds an address in memory
    said = " ".join(str(error).split()) or type(error).__name__
    return printable(said, _REASON_LENGTH)


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(length) for length in shape)
