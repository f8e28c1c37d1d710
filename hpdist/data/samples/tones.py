"""Made-up sounds as Parquet, the same every time: to try audio without a download.

    python -m hpdist.data.samples.tones demo/tones

Short tones of four classes, by their timbre: sine, square, sawtooth and a sine that beats. Pitch,
length and loudness are drawn for each, and there is noise behind it. WAV, 8 kHz, 16 bit.
"""

from __future__ import annotations

import io
import os
import sys
import wave
from pathlib import Path

import datasets
import numpy as np

from hpdist.data.decode.encoded import Array
from hpdist.data.samples.program import write_samples
from hpdist.errors import DataError

RATE = 8000
CLASSES = ("sine", "square", "sawtooth", "beat")
ROWS = {"labeled": 40, "unlabeled": 400, "test": 100}
"""Rows of each file; the unlabelled one has no column of labels."""


def write_tones(folder: str | Path) -> Path:
    """Write labeled, unlabeled and test.parquet into the folder, and return it.

    Columns `audio` (WAV bytes, as `datasets.Audio`) and `label` (as many of each class). Files are
    written anew. Raises DataError where that cannot be.
    """
    folder, generator = Path(folder), np.random.default_rng(0)
    names = datasets.ClassLabel(names=list(CLASSES))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part, rows in ROWS.items():
            labels = [row % len(CLASSES) for row in range(rows)]
            clips = [{"bytes": _wav(_tone(label, generator)), "path": None} for label in labels]
            table = datasets.Dataset.from_dict({"audio": clips, "label": labels})
            table = table.cast_column("audio", datasets.Audio(RATE, decode=False))
            if part == "unlabeled":
                table = table.remove_columns("label")
            else:
                table = table.cast_column("label", names)
            temporary = folder / f".{part}.{os.getpid()}"
            table.to_parquet(str(temporary))
            temporary.replace(folder / f"{part}.parquet")
    except OSError as error:
        raise DataError(f"cannot write the tones to {str(folder)!r}: {error}") from error
    return folder


def _tone(label: int, generator: np.random.Generator) -> Array:
    """A sound of a class, float64 [samples], within -1 to 1."""
    seconds, level = generator.uniform(0.2, 0.6), generator.uniform(0.1, 0.6)
    cycles = generator.uniform(200, 800) * np.arange(round(seconds * RATE)) / RATE
    cycles = cycles + generator.uniform()
    shapes = {
        "sine": np.sin(2 * np.pi * cycles),
        "square": np.sign(np.sin(2 * np.pi * cycles)),
        "sawtooth": 2 * (cycles % 1) - 1,
        "beat": np.sin(2 * np.pi * cycles) * np.sin(2 * np.pi * cycles / 20),
    }
    shape: Array = shapes[CLASSES[label]]
    return np.clip(level * (shape + 0.2 * generator.normal(size=len(shape))), -1, 1)


def _wav(waveform: Array) -> bytes:
    """A WAV file of one channel."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((waveform * 32767).astype("<i2").tobytes())
    return out.getvalue()


def main(arguments: list[str]) -> int:
    """Write the sounds into a folder."""
    return write_samples("tones", arguments, write_tones)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
