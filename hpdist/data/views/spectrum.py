"""Log-mel spectrograms of batches of sound, and what hides parts of them; all on its device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_FLOOR = 1e-7  # of the mel bands' power, so that silence has a logarithm


def log_mel(waveform: Tensor, window: int, hop: int, mels: Tensor) -> Tensor:
    """Logarithm of the power in mel bands: float32 [B, mels, frames], natural, floored at 1e-7.

    Frame f is a periodic Hann window around sample f * hop, zeros beyond both ends; there are as
    many frames as hops that begin within the row.

    Args:
        waveform: float32 [B, samples], zeros behind a sound's end.
        window: Samples of a frame.
        hop: Samples from one frame to the next.
        mels: Weights of each frequency in each band, float32 [mels, frequencies]: `mel_bands`.

    """
    size = 2 * (mels.shape[1] - 1)
    hann = torch.hann_window(window, device=waveform.device)
    spectrum = torch.stft(
        waveform, size, hop, window, hann, center=True, pad_mode="constant", return_complex=True
    )  # [B, frequencies, samples // hop + 1]
    spectrum = spectrum[..., : frames_of(waveform.shape[1], hop)]
    power = spectrum.real.square() + spectrum.imag.square()  # abs() would take a root first
    return torch.matmul(mels, power).clamp(min=_FLOOR).log()


def frames_of(samples: int, hop: int) -> int:
    """How many hops begin within so many samples."""
    return -(-samples // hop)


def transform_size(window: int) -> int:
    """The power of two, in samples, that holds a window."""
    return 1 << (window - 1).bit_length()


@cache
def mel_bands(mels: int, size: int, rate: int, low: float, high: float) -> Tensor:
    """Triangular bands, equally wide on the mel scale 2595 log10(1 + f / 700), of height 1.

    Args:
        mels: How many.
        size: Samples of the Fourier transform.
        rate: Samples per second.
        low: Where the first band begins, Hz.
        high: Where the last one ends, Hz.

    Returns:
        float32 [mels, size // 2 + 1], on the CPU.

    Raises:
        ValueError: a band holds none of the transform's frequencies.

    """
    ends = torch.linspace(_mel(low), _mel(high), mels + 2, dtype=torch.float64)
    edges = 700 * (10 ** (ends / 2595) - 1)  # Hz
    frequencies = torch.linspace(0, rate / 2, size // 2 + 1, dtype=torch.float64)
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - left) / (middle - left)
    falling = (right - frequencies) / (right - middle)
    bands = torch.minimum(rising, falling).clamp(min=0)  # [mels, frequencies]
    empty = (bands.sum(dim=1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{len(empty)} of {mels} bands, number {empty[0]} the first, hold nothing")
    return bands.to(torch.float32)


def _mel(frequency: float) -> float:
    return float(2595 * torch.log10(torch.tensor(1 + frequency / 700, dtype=torch.float64)))


def runs(noise: Tensor, size: Tensor, most: float, places: int) -> Tensor:
    """Mark runs of places, bool [B, places]: each as long as its noise says and anywhere.

    Args:
        noise: Uniform in [0, 1), float32 [B, runs, 2]: of each run's length and its beginning.
        size: How many of a row's first places a run may lie in, int64 [B].
        most: The longest run, as a share of `size`.
        places: Of a row.

    """
    length = (noise[:, :, 0] * ((most * size)[:, None].floor() + 1)).long()  # [B, runs]
    start = (noise[:, :, 1] * (size[:, None] - length + 1)).long()
    place = torch.arange(places, device=noise.device)
    inside = (place >= start[..., None]) & (place < (start + length)[..., None])
    return inside.any(dim=1)


def without_bands(waveform: Tensor, hidden: Tensor, bands: Tensor) -> Tensor:
    """Take mel bands out of sound: float32 [B, samples].

    Args:
        waveform: float32 [B, samples].
        hidden: Which bands, bool [B, mels].
        bands: int64 [samples // 2 + 1], of each frequency of a row's transform: `bands_of`.

    """
    spectrum = torch.fft.rfft(waveform)  # [B, samples // 2 + 1]
    kept = torch.nn.functional.pad(~hidden, (0, 1), value=True)  # the last: of no band
    found: Tensor = torch.fft.irfft(spectrum * kept[:, bands], n=waveform.shape[1])
    return found


def bands_of(samples: int, rate: int, mels: int, low: float, high: float) -> Tensor:
    """The mel band of each frequency, `mels` where there is none: int64 [samples // 2 + 1]."""
    ends = torch.linspace(_mel(low), _mel(high), mels + 1, dtype=torch.float64)
    frequencies = torch.arange(samples // 2 + 1, dtype=torch.float64) * (rate / samples)
    place = torch.searchsorted(ends, 2595 * torch.log10(1 + frequencies / 700), right=True) - 1
    return torch.where((place < 0) | (place >= mels), mels, place)
