"""Small sounds as files in memory, random models for them, and spoken digits if at hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile

DIGITS = Path(__file__).parents[3] / "shared" / "data" / "fsdd"
needs_digits = pytest.mark.skipif(not DIGITS.is_dir(), reason=f"needs the FSDD files in {DIGITS}")

AUDIO = datasets.Audio(decode=False)
WAV2VEC2 = {
    "model_type": "wav2vec2",
    "architectures": ["Wav2Vec2ForSequenceClassification"],
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 4, 4],
    "conv_stride": [5, 4, 4],
    "conv_bias": True,
    "num_feat_extract_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "initializer_range": 0.3,
} | dict.fromkeys(
    (
        "hidden_dropout",
        "activation_dropout",
        "attention_dropout",
        "feat_proj_dropout",
        "final_dropout",
    ),
    0.0,
)


def tone(seconds: float, rate: int = 8000, hertz: float = 440.0) -> np.ndarray:
    """A sine of half the range, float64 [samples]."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def file_of(wave: np.ndarray, rate: int = 8000, kind: str = "WAV", **options: Any) -> bytes:
    """A sound file of [samples] or [samples, channels]."""
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=kind, **options)
    return out.getvalue()


def rows_of(*lengths: int, samples: int = 800, seed: int = 0) -> np.ndarray:
    """Noise of so many samples a row, NaN behind it: float32 [rows, samples]."""
    rng = np.random.default_rng(seed)
    rows = np.full((len(lengths), samples), np.nan, np.float32)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = 0.1 * rng.standard_normal(length)
    return rows


def table(values: list[Any], **columns: Any) -> datasets.Dataset:
    """A dataset with a column `audio` of file bytes."""
    stored = [v if v is None or isinstance(v, dict) else {"bytes": v, "path": None} for v in values]
    made = datasets.Dataset.from_dict({"audio": stored, **columns})
    return made.cast_column("audio", AUDIO)


def write_config(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """Write the config of a small wav2vec 2.0, without weights, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(WAV2VEC2 | (config or {})))
    return folder


def digits_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a short FixMatch run on spoken digits."""
    train = {"path": "parquet", "data_files": str(DIGITS / "train-*.parquet")}
    values: dict[str, Any] = {
        "run": {"dir": str(folder), "name": "digits"},
        "model": {"name": "cnn", "width": 4},
        "views": {"name": "audio", "sampling_rate": 8000, "seconds": 0.5, "mels": 20, "hop": 0.02},
        "data": {
            "labeled": {**train, "labels_per_class": 4},
            "unlabeled": {**train, "streaming": True},
            "test": {
                "path": "parquet",
                "data_files": str(DIGITS / "test-*.parquet"),
                "split": "train[:64]",
            },
        },
        "batch": {"labeled": 8, "unlabeled": 16},
        "algorithm": {"name": "fixmatch", "threshold": 0.155},
        "optim": {"name": "adamw", "lr": 0.003},
        "log": {"every": 1},
        "steps": 6,
        "tracker": {"name": "none"},
    }
    return values | changes
