"""Sound as samples: encoded bytes (WAV, FLAC, OGG, MP3) become one channel at one sampling rate.

A row is float32 [samples]: the file's channels averaged, resampled, cut off where it is too long.
Behind the end of a shorter sound it is NaN, so that a batch holds how long each of its rows is.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, ClassVar, cast

import numpy as np

from hpdist.data.decode.arrays import Arrays
from hpdist.data.decode.encoded import Array, mean_bytes, stored_bytes
from hpdist.data.decode.spec import ArraySpec
from hpdist.data.files.named_files import USUAL_LIMITS, Limits
from hpdist.errors import ConfigError
from hpdist.messages.human import duration

_MARGIN = 0.05  # seconds read beyond the row, so that the resampler's end lies outside of it
_LARGEST_FACTOR = 1000  # of the ratio of two rates; the rest changes the pitch by under 1e-6
_THREADS_PAY_BYTES = 65536  # of a sound file
_TAPS = 10  # of the resampling filter, on each side and per step of the slower rate


@dataclass(frozen=True)
class Sampling:
    """How sound is sampled: alike for every row, whatever its file says."""

    rate: int  # Hz
    samples: int  # of a row

    def require(self) -> None:
        """Raise ConfigError where what decodes sound is not installed."""
        try:
            import scipy.signal  # type: ignore[import-untyped]  # noqa: F401
            import soundfile  # type: ignore[import-untyped]  # noqa: F401
        except (ImportError, OSError) as error:  # OSError: without libsndfile itself
            raise ConfigError(
                f"views.name: audio needs soundfile and scipy, which cannot be imported ({error}); "
                "pip install 'hpdist[audio]'"
            ) from error

    def decode_into(self, value: Any, out: Array, limits: Limits) -> None:
        """Decode one stored value, bytes, {bytes, path} or a NamedFile, into `out`: fp32 [samples].

        Raises ValueError where it is no sound, one without samples or with NaN or infinity, or
        beyond the limits.
        """
        data = stored_bytes(value, "sound", limits)
        if not data:
            raise ValueError("it holds no bytes")
        samples = self._resampled(*self._read(data, limits))[: self.samples]
        out[: len(samples)] = samples
        out[len(samples) :] = np.nan

    def _read(self, data: bytes, limits: Limits) -> tuple[Array, int]:
        """The beginning of a file, as much as a row holds: float32 [samples], and its rate."""
        import soundfile

        try:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                rate = int(file.samplerate)
                wanted = int((self.samples / self.rate + _MARGIN) * rate) + 1
                frames = min(wanted, max(0, file.frames))
                if frames * file.channels > limits.samples:  # by what the header says alone
                    raise ValueError(
                        f"its header says {rate} Hz and {file.channels} channels, so that a row is "
                        f"{frames * file.channels} samples, more than {limits.samples}; if that is "
                        "right, raise data.loading.most_samples"
                    )
                channels = file.read(frames, dtype="float32", always_2d=True)  # [frames, channels]
        except soundfile.LibsndfileError as error:  # its message holds an address in memory
            raise ValueError(f"it is no sound file: {error.error_string}") from error
        if not len(channels):
            raise ValueError("it holds no samples")
        mono: Array = channels[:, 0] if channels.shape[1] == 1 else channels.mean(axis=1)
        if not np.isfinite(mono).all():
            raise ValueError("it holds NaN or infinity")
        return mono, rate

    def _resampled(self, samples: Array, rate: int) -> Array:
        if rate == self.rate:
            return samples
        from scipy.signal import resample_poly

        ratio = Fraction(self.rate, rate).limit_denominator(_LARGEST_FACTOR)
        up, down = ratio.numerator, ratio.denominator
        if not up:
            raise ValueError(f"its sampling rate, {rate} Hz, is too far from {self.rate} Hz")
        resampled: Array = resample_poly(samples, up, down, window=_low_pass(max(up, down)))
        return resampled.astype(np.float32)


def length_of(value: Any) -> float | None:
    """How many seconds a stored sound lasts, by its header; None where that cannot be read."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(stored_bytes(value, "sound", USUAL_LIMITS))) as file:
            return float(file.frames / file.samplerate)
    except (ValueError, OSError, soundfile.LibsndfileError):  # named when it is decoded
        return None


def wav_file(samples: Array, rate: int) -> bytes:
    """Write one channel of samples in [-1, 1], float32 [samples], as a WAV file of 16 bits."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return stream.getvalue()


@cache
def _low_pass(factor: int) -> Array:
    """The filter of a resampler between rates of which the larger is `factor` times their step."""
    from scipy.signal import firwin

    taps: Array = firwin(2 * _TAPS * factor + 1, 1 / factor, window=("kaiser", 5.0))
    return taps.astype(np.float32)


@dataclass(frozen=True)
class AudioSpec(ArraySpec):
    """Rows are float32 [samples], NaN behind a sound's end."""

    kind: ClassVar[str] = "audio"
    sampling: Sampling
    views_shape: tuple[int, ...]
    """The shape of what the views make of a row: a waveform's, or a spectrogram's."""
    limits: Limits = USUAL_LIMITS
    """What a row may take to decode."""

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Give the shape of a row as it is decoded."""
        return (self.sampling.samples,)

    @property
    def model_input_shape(self) -> tuple[int, ...]:
        """Give the shape of a row as the views give it to the model."""
        return self.views_shape

    @property
    def worth_processes(self) -> bool:
        """Whether worker processes pay, as they do for files."""
        return True

    @property
    def are_waveforms(self) -> bool:
        """Whether the model is given waveforms, and no spectrograms."""
        return self.views_shape == self.shape

    @property
    def not_for_arrays(self) -> str | None:
        """Say what a model of plain arrays cannot take of waveforms."""
        if not self.are_waveforms:
            return None
        return "waveforms; set views.spectrogram: true, or use hf:… or a model of your own"

    def threads_pay(self, values: Sequence[Any]) -> bool:
        """Tell whether sound files are large enough for it."""
        return mean_bytes(values) >= _THREADS_PAY_BYTES

    def describe(self) -> str:
        """Say what a row is, for the opening lines of a run."""
        sampling = self.sampling
        seconds = sampling.samples / sampling.rate
        return f"sounds of {duration(seconds)} at {sampling.rate:,} Hz"

    def decode_row(self, value: Any, out: Arrays) -> None:
        """Decode one stored sound. Raises ValueError; see `Sampling.decode_into`."""
        self.sampling.decode_into(value, cast(Array, out), self.limits)
