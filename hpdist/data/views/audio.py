"""Weak and strong views of sound, batched on its device: noise on waveforms and on spectrograms.

Weak: moved in time, louder or softer, a little noise. Strong: the same and more of it, played
faster or slower, and SpecAugment's masks over time and frequency. A few numbers per row are drawn
on the CPU from the counter-based generator; nothing is read back from the device.
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hpdist.config.component import Component
from hpdist.config.section import Section
from hpdist.data import random
from hpdist.data.decode.audio import Sampling
from hpdist.data.structures import sent
from hpdist.data.views.spectrum import (
    bands_of,
    frames_of,
    log_mel,
    mel_bands,
    runs,
    transform_size,
    without_bands,
)
from hpdist.errors import ConfigError, DataError

_PER_ROW = 5  # numbers: shift, gain, how loud the noise is, where it begins, speed
_SOFTER = 20.0  # dB: how much softer than at its loudest the noise may be
_LEAST = 0.75  # share of a sound that no shift moves out of the row
_NOISE = 1 << 18  # numbers of the table of noise, and more of long rows
_NOISE_COLUMNS = 1024  # of them are drawn at a time
_TINY = 1e-5  # so that silence can be standardised


class WeakAudio(Section):
    """The weak view."""

    shift: float = Field(default=0.05, ge=0)
    """Longest shift in time to either side, in seconds; what comes in is silence."""
    gain: float = Field(default=3.0, ge=0)
    """Largest change in loudness to either side, in dB; of no effect where rows are standardised
    each by its own, but for the softest parts."""
    snr: float | None = Field(default=30.0)
    """Lowest signal-to-noise ratio of the white noise, in dB; a row's is up to 20 dB higher. null
    adds none."""


class StrongAudio(WeakAudio):
    """The strong view."""

    shift: float = Field(default=0.1, ge=0)
    """Longest shift in time to either side, in seconds; what comes in is silence."""
    gain: float = Field(default=6.0, ge=0)
    """Largest change in loudness to either side, in dB; of no effect where rows are standardised
    each by its own, but for the softest parts."""
    snr: float | None = Field(default=10.0)
    """Lowest signal-to-noise ratio of the white noise, in dB; a row's is up to 20 dB higher. null
    adds none."""
    speed: float = Field(default=0.15, ge=0, lt=1)
    """Largest change of the speed to either side, as a share; the pitch goes with it."""
    time_masks: int = Field(default=2, ge=0, le=16)
    """How many runs of time are hidden (SpecAugment)."""
    time_mask: float = Field(default=0.2, ge=0, le=1)
    """Longest of these, as a share of the sound."""
    frequency_masks: int = Field(default=2, ge=0, le=16)
    """How many runs of mel bands are hidden (SpecAugment)."""
    frequency_mask: float = Field(default=0.2, ge=0, le=1)
    """Widest of these, as a share of the bands."""


class AudioViewsConfig(Component):
    """Weak and strong views of sound, as log-mel spectrograms or as waveforms."""

    kind: ClassVar[str] = "views"
    input_kind: ClassVar[str] = "audio"
    name: Literal["audio"] = "audio"
    sampling_rate: int = Field(default=16000, ge=1000)
    """Samples per second, Hz; rows of another rate are resampled as they are read."""
    seconds: float | None = Field(default=None, gt=0)
    """Length of a row: longer sound is cut, shorter sound padded; by default the longest labelled
    sound's, and no more than 10."""
    spectrogram: bool = True
    """Give the model log-mel spectrograms [rows, 1, mels, frames], as images of one channel; false
    gives it waveforms [rows, samples], NaN behind a sound's end, as some models `hf:` want."""
    mels: int = Field(default=64, ge=1)
    """Mel bands of a spectrogram, and of what frequency masks hide."""
    window: float = Field(default=0.025, gt=0)
    """Seconds of a spectrogram's frame."""
    hop: float = Field(default=0.01, gt=0)
    """Seconds from one frame to the next."""
    low: float = Field(default=0.0, ge=0)
    """Where the mel bands begin, Hz."""
    high: float | None = Field(default=None, gt=0)
    """Where the mel bands end, Hz; by default at half the sampling rate."""
    mean: float | None = None
    """Subtracted from spectrograms or waveforms; by default each row's own mean."""
    std: float | None = Field(default=None, gt=0)
    """What they are divided by, after the mean; by default each row's own."""
    weak: WeakAudio = WeakAudio()
    strong: StrongAudio = StrongAudio()

    @model_validator(mode="after")
    def _possible(self) -> AudioViewsConfig:
        rate, nyquist = self.sampling_rate, self.sampling_rate / 2
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together; give both, or neither")
        if self.low >= self.top or self.top > nyquist:
            raise ValueError(
                f"low {self.low:g} and high {self.top:g} Hz must be a range within 0 to half the "
                f"sampling rate, {nyquist:g}"
            )
        for setting in ("seconds", "window", "hop"):
            value = getattr(self, setting)
            if value is not None and round(value * rate) < 1:
                raise ValueError(f"{setting}: {value:g} is less than one sample")
        if self.seconds is not None and self.window > self.seconds:
            raise ValueError(f"window: {self.window:g} seconds is more than the row's")
        if self.spectrogram:
            try:
                self.bands  # noqa: B018  (for an error to come here)
            except ValueError as error:
                raise ValueError(
                    f"mels: {error}; lower mels, or raise window (the transform has "
                    f"{transform_size(round(self.window * rate)) // 2 + 1} frequencies)"
                ) from None
        return self

    @property
    def top(self) -> float:
        """Where the mel bands end, Hz."""
        return self.sampling_rate / 2 if self.high is None else self.high

    @property
    def bands(self) -> Tensor:
        """The mel bands' weights, float32 [mels, frequencies]. Raises ValueError."""
        size = transform_size(round(self.window * self.sampling_rate))
        return mel_bands(self.mels, size, self.sampling_rate, self.low, self.top)

    @property
    def sampling(self) -> Sampling:
        """How rows are decoded. Raises ConfigError where it is not known yet how long rows are."""
        if self.seconds is None:
            raise ConfigError("views.seconds: missing; without a run's rows it must be set")
        return Sampling(self.sampling_rate, round(self.seconds * self.sampling_rate))

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of a row as the model sees it."""
        samples = self.sampling.samples
        if not self.spectrogram:
            return (samples,)
        return (1, self.mels, frames_of(samples, round(self.hop * self.sampling_rate)))

    def build(self, seed: int) -> AudioViews:
        """Build the views, with noise from this seed. Raises ConfigError without `seconds`."""
        self.sampling  # noqa: B018  (for an error to come here)
        return AudioViews(self, seed)


class AudioViews:
    """The `Views` of sound: float32 [B, samples], NaN behind a sound's end, to `output_shape`.

    Frames and samples behind a sound's end are 0 in a spectrogram and NaN in a waveform, and count
    for nothing in a row's mean and standard deviation. What is masked becomes the mean, 0.

    SpecAugment: Park et al. 2019, arXiv:1904.08779, without its time warping: the sound itself is
    played faster or slower. The masks' sizes are shares of each sound, not absolute. The noise of a
    row is a stretch, anywhere, of one table of white noise.
    """

    def __init__(self, config: AudioViewsConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.hop = round(config.hop * config.sampling_rate)
        self.window = round(config.window * config.sampling_rate)
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def unmixable(self) -> str | None:
        """What the views make that has no sum: see `hpdist.data.views.base.unmixable`."""
        return None if self.config.spectrogram else "waveforms of different lengths"

    def plain(self, x: Tensor) -> Tensor:
        """Make standardised spectrograms or waveforms. See `Views`."""
        waveform, length = self._split(x)
        return self._given(waveform, length, None)

    def weak(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> Tensor:
        """Move the sound, make it louder or softer, and add noise. See `Views`."""
        waveform, length = self._split(x)
        names = ("audio weak", stream, str(copy))
        noise = self._drawn(x, names, step, positions, _PER_ROW)
        return self._given(*self._changed(waveform, length, self.config.weak, noise), None)

    def strong(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> Tensor:
        """Do more of that, change the speed, and mask times and frequencies. See `Views`."""
        waveform, length = self._split(x)
        names, view = ("audio strong", stream, str(copy)), self.config.strong
        count = _PER_ROW + 2 * (view.time_masks + view.frequency_masks)
        noise = self._drawn(x, names, step, positions, count)
        waveform, length = self._changed(waveform, length, view, noise, view.speed)
        return self._given(waveform, length, noise[:, _PER_ROW:].unflatten(1, (-1, 2)))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sound with zeros in place of NaN, [B, samples], and how long it is, int64 [B]."""
        samples = self.config.sampling.samples
        if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != samples:
            raise DataError(
                f"audio views take float32 rows [B, {samples}], not {x.dtype} {list(x.shape)}; for "
                "rows that are no sound set views.name to image, text, table or identity"
            )
        return split(x)

    def _drawn(
        self, x: Tensor, names: tuple[str, ...], step: int, positions: Tensor, count: int
    ) -> Tensor:
        """Uniform numbers, float32 [B, count], where `x` is."""
        if positions.device.type != "cpu" or positions.shape != x.shape[:1]:
            raise ValueError(
                f"positions must be one per row, [{len(x)}], on the CPU, "
                f"not {list(positions.shape)} on {positions.device}"
            )
        drawn = random.uniform(self.seed, random.stream_id(*names), step, positions, count)
        return sent(drawn, x.device)

    def _changed(
        self, waveform: Tensor, length: Tensor, view: WeakAudio, noise: Tensor, speed: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Speed, shift, gain and noise, in this order."""
        signed = 2 * noise - 1  # in [-1, 1)
        shift = (signed[:, 0] * view.shift * self.config.sampling_rate).round().long()  # [B]
        rate = 1 + signed[:, 4] * speed if speed else None
        waveform, length = moved(waveform, length, shift, rate)
        waveform = waveform * 10 ** (signed[:, 1] * view.gain / 20)[:, None]
        if view.snr is None:
            return waveform, length
        stretches = self._table("noise", waveform.device).unfold(0, waveform.shape[1], 1)
        added = stretches[(noise[:, 3] * len(stretches)).long()]
        added = added * _first(length, waveform.shape[1])
        power = waveform.square().sum(dim=1) / length.clamp(min=1)  # the padding is 0
        level = power.sqrt() * 10 ** (-(view.snr + _SOFTER * noise[:, 2]) / 20)
        return waveform + added * level[:, None], length

    def _given(self, waveform: Tensor, length: Tensor, masks: Tensor | None) -> Tensor:
        """What the model is given; `masks` are the noise of SpecAugment's, [B, masks, 2]."""
        if not self.config.spectrogram:
            return self._waveform(waveform, length, masks)
        bands = self._table("bands", waveform.device)
        values = log_mel(waveform, self.window, self.hop, bands)  # [B, mels, frames]
        frames = (length + self.hop - 1) // self.hop
        there = _first(frames, values.shape[2])[:, None]  # [B, 1, frames]
        values = self._standardized(values, there.expand_as(values))
        if masks is not None:
            times, hidden = self._hidden(masks, frames, values.shape[2])
            there = there & ~times[:, None] & ~hidden[:, :, None]
        return (values * there)[:, None]

    def _waveform(self, waveform: Tensor, length: Tensor, masks: Tensor | None) -> Tensor:
        there = _first(length, waveform.shape[1])
        if masks is not None:
            times, hidden = self._hidden(masks, length, waveform.shape[1])
            if self.config.strong.frequency_masks:
                waveform = without_bands(
                    waveform, hidden, self._table("frequencies", waveform.device)
                )
            waveform = self._standardized(waveform, there) * ~times
        else:
            waveform = self._standardized(waveform, there)
        return waveform.masked_fill(~there, torch.nan)

    def _hidden(self, masks: Tensor, size: Tensor, places: int) -> tuple[Tensor, Tensor]:
        """Times, bool [B, places], and mel bands, bool [B, mels], that are hidden."""
        view = self.config.strong
        over_time, over_bands = masks.split([view.time_masks, view.frequency_masks], dim=1)
        bands = torch.full_like(size, self.config.mels)
        return (
            runs(over_time, size, view.time_mask, places),
            runs(over_bands, bands, view.frequency_mask, self.config.mels),
        )

    def _standardized(self, values: Tensor, there: Tensor) -> Tensor:
        """By the mean and deviation that are set, or else of what is `there` in each row."""
        if self.config.mean is not None and self.config.std is not None:
            return (values - self.config.mean) / self.config.std
        over = tuple(range(1, values.dim()))
        count = there.sum(dim=over, keepdim=True).clamp(min=1)
        mean = (values * there).sum(dim=over, keepdim=True) / count
        values = values - mean
        variance = (values.square() * there).sum(dim=over, keepdim=True) / count
        return values / (variance + _TINY**2).sqrt()

    def _table(self, name: str, device: torch.device) -> Tensor:
        """What is the same in every batch, made once on each device."""
        key = (name, device)
        if key not in self._tables:
            self._tables[key] = getattr(self, f"_{name}").to(device)
        return self._tables[key]

    @cached_property
    def _noise(self) -> Tensor:
        """White noise: standard normal numbers, float32 [256 Ki], or of long rows [4 * samples]."""
        numbers = max(_NOISE, 4 * self.config.sampling.samples)
        stream, rows = random.stream_id("audio noise"), torch.arange(numbers // _NOISE_COLUMNS + 1)
        return random.normal(self.seed, stream, 0, rows, _NOISE_COLUMNS).flatten()

    @property
    def _bands(self) -> Tensor:
        return self.config.bands

    @property
    def _frequencies(self) -> Tensor:
        config = self.config
        rate, samples = config.sampling_rate, config.sampling.samples
        return bands_of(samples, rate, config.mels, config.low, config.top)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Part waveforms [B, samples], NaN behind a sound's end, into sound and its length.

    Gives the sound, zeros in place of NaN, and how many samples each row has, int64 [B].
    """
    there = ~x.isnan()
    return torch.where(there, x, 0.0), there.sum(dim=1)


def moved(
    waveform: Tensor, length: Tensor, shift: Tensor, rate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Play sound later or earlier, and faster or slower; gives it and its new length.

    Three quarters of a sound at least stay, but for what a row is too short for.

    Args:
        waveform: float32 [B, samples], zeros behind its end.
        length: Samples of it, int64 [B].
        shift: Samples that it begins later, int64 [B].
        rate: How fast it is played, float32 [B]; None leaves the speed as it is.

    """
    samples = waveform.shape[1]
    new = length if rate is None else (length / rate).floor().long().clamp(min=1)
    shift = torch.maximum(shift, -((1 - _LEAST) * new).long())
    shift = torch.minimum(shift, (samples - _LEAST * new).long().clamp(min=0))
    place = torch.arange(samples, device=waveform.device) - shift[:, None]  # [B, samples]
    inside = (place >= 0) & (place < new[:, None])
    if rate is None:
        moved_waveform = waveform.gather(1, place.clamp(0, samples - 1))
    else:
        at = (place.double() * rate[:, None].double()).clamp(0, samples - 1)
        before = at.long()
        share = (at - before).to(waveform.dtype)
        ended = torch.nn.functional.pad(waveform, (0, 1))
        moved_waveform = torch.lerp(waveform.gather(1, before), ended.gather(1, before + 1), share)
    return moved_waveform * inside, (shift + new).clamp(1, samples)


def _first(count: Tensor, places: int) -> Tensor:
    """Mark the first places of each row, bool [B, places]; `count` is int64 [B]."""
    return torch.arange(places, device=count.device) < count[:, None]
