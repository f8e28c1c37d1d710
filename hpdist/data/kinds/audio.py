"""Sound: encoded files, as samples of one length and one rate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import datasets
import numpy as np
from pydantic import ValidationError
from torch import Tensor

from hpdist.data.decode.audio import AudioSpec, Sampling, length_of, wav_file
from hpdist.data.decode.encoded import is_elsewhere
from hpdist.data.decode.recorded import restored
from hpdist.data.decode.spec import InputSpec
from hpdist.data.files.named_files import Limits
from hpdist.data.kinds.base import (
    Context,
    Facts,
    InputKind,
    Recognised,
    TableOfRows,
    UsesInputs,
    changes_refused,
)
from hpdist.data.kinds.columns import is_encoded_audio
from hpdist.data.kinds.drawing import Cells, audio_cells
from hpdist.data.kinds.registry import register
from hpdist.data.structures import Structure
from hpdist.errors import ConfigError, DataError
from hpdist.messages.progress import working

_LONGEST = 10.0  # seconds of a row, where nobody says how long it is
_MOST = 1000  # sounds whose headers are read for that
_MOST_REMOTE = 16
_SECONDS = 5.0  # that it may take
_AT_ONCE = 16  # rows


class AudioKind(InputKind):
    """Waveforms, of which the views make spectrograms unless told otherwise."""

    name: ClassVar[str] = "audio"
    held: ClassVar[str] = "audio"
    needs_own_views: ClassVar[bool] = True
    folder_column: ClassVar[str] = "audio"

    def recognise(self, feature: Any) -> Recognised | None:
        """See sound wherever it is."""
        return Recognised("certain", "sound") if isinstance(feature, datasets.Audio) else None

    def begins_like(self, data: bytes) -> bool:
        """Tell whether bytes begin as WAV, FLAC, Ogg or MP3 files do."""
        if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
            return True
        return data.startswith((b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"))

    def fits(self, feature: Any) -> bool:
        """Take sound, and bytes."""
        return is_encoded_audio(feature)

    def measure(self, views: Any, rows: TableOfRows, context: Context) -> Facts:
        """Find out how long rows are, where the config does not say.

        Raises ConfigError where sound cannot be read here, and DataError where no file tells.
        """
        if views.seconds is not None:
            return Facts()
        if "seconds" in context.recorded:
            seconds = float(context.recorded["seconds"])
            return Facts({"seconds": seconds}, (f"views.seconds: {seconds:g}, as the run began",))
        _sampled(views, _LONGEST).sampling.require()
        lengths = _lengths(rows)
        if not lengths:
            raise DataError(
                f"{rows.name}: no sound of its first rows says how long it is, such as "
                f"{rows.describe(int(rows.ids[0]))}; mend them, or set views.seconds"
            )
        longest = max(lengths)
        seconds = min(_LONGEST, max(0.01, math.ceil(longest * 100) / 100))
        line = f"views.seconds: {seconds:g}, by the longest of {len(lengths)} labelled sounds"
        if longest > _LONGEST:
            line += f", which lasts {longest:.1f} s; what is longer is cut off"
        return Facts({"seconds": seconds}, (line,))

    def fill_views(self, views: Any, values: Mapping[str, Any]) -> Any:
        """Fill in how long rows are; raises ConfigError where other options forbid it."""
        return _sampled(views, values["seconds"]) if "seconds" in values else views

    @working("looking at the first rows")
    def make_spec(
        self, views: Any, rows: TableOfRows, context: Context, values: Mapping[str, Any]
    ) -> AudioSpec:
        """Decode as the views' settings say. Raises ConfigError where nothing here decodes."""
        views.sampling.require()
        return AudioSpec(views.sampling, views.output_shape, context.limits)

    def is_record(self, found: Mapping[str, Any]) -> bool:
        """Tell whether a record's length is one."""
        return isinstance(found.get("seconds", 0.0), (int, float, type(None)))

    def recorded_spec(self, values: Mapping[str, Any], folder: Path) -> InputSpec:
        """Make the spec of sound again."""
        parts: dict[str, type] = {"sampling": Sampling, "limits": Limits}
        made: dict[str, Any] = {name: restored(kind, values[name]) for name, kind in parts.items()}
        return restored(AudioSpec, values, **made)

    def refuses(self, spec: InputSpec, algorithm: UsesInputs) -> str | None:
        """Refuse what changes inputs, of waveforms: each has a length of its own."""
        if not cast(AudioSpec, spec).are_waveforms or not algorithm.changes_inputs:
            return None
        return changes_refused(
            algorithm,
            "waveforms of different lengths do not",
            "set views.spectrogram: true, or choose",
        )

    def playable_file(self, spec: InputSpec, rows: Structure) -> bytes | None:
        """Give one row, [1, samples], as a WAV file of 16 bits, up to its end."""
        samples = cast(Tensor, rows)[0]
        return wav_file(samples[~samples.isnan()].numpy(), cast(AudioSpec, spec).sampling.rate)

    def draw(self, spec: InputSpec, rows: Structure, shown: Mapping[str, Structure]) -> Cells:
        """Show spectrograms or waveforms."""
        return audio_cells(shown)


def _lengths(rows: TableOfRows) -> list[float]:
    """Read how long the labelled sounds last, or many of them, spread evenly."""
    began = time.monotonic()
    remote = is_elsewhere(rows.read(np.zeros(1, np.int64))[0])
    count = min(len(rows), _MOST_REMOTE if remote else _MOST)
    places = np.linspace(0, len(rows) - 1, count).astype(np.int64)
    found: list[float] = []
    for start in range(0, count, _AT_ONCE):
        lengths = map(length_of, rows.read(places[start : start + _AT_ONCE]))
        found += [length for length in lengths if length]
        if found and time.monotonic() - began > _SECONDS:
            break
    return found


def _sampled(views: Any, seconds: float) -> Any:
    try:
        return type(views).model_validate({**views.model_dump(), "seconds": seconds})
    except ValidationError as error:
        found = "; ".join(detail["msg"] for detail in error.errors())
        raise ConfigError(f"views: with seconds: {seconds:g}, {found}") from None


AUDIO = AudioKind()
register(AUDIO)
