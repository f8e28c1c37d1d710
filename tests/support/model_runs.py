"""Short runs of every kind of model and input, whose models are loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hpdist.train.trainer import Trainer
from tests.support import sounds
from tests.support.texts import SENTENCES, write_model

ROWS = 12
VIT = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
}


def table(folder: Path) -> dict[str, Any]:
    """Numbers and a category, with views that measure the training rows."""
    draw = np.random.default_rng(0)
    rows = {
        "length": draw.normal(size=ROWS) * 3 + 7,
        "colour": [("red", "green", "blue")[row % 3] for row in range(ROWS)],
        "label": [("no", "yes")[row % 2] for row in range(ROWS)],
    }
    return {
        "rows": datasets.Dataset.from_dict(rows),
        "model": {"name": "mlp", "hidden": [8]},
        "views": {"name": "table"},
    }


def pictures(folder: Path) -> dict[str, Any]:
    """Encoded pictures, for a model with batch normalisation."""
    draw = np.random.default_rng(0)
    made = [Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(ROWS)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])}
    )
    rows = {"image": made, "label": [row % 3 for row in range(ROWS)]}
    return {
        "rows": datasets.Dataset.from_dict(rows, features=features),
        "model": {"name": "wide_resnet", "depth": 10, "width": 1},
        "views": {"name": "image", "size": 8},
    }


def texts(folder: Path) -> dict[str, Any]:
    """Sentences of several lengths, for a small BERT that begins at random."""
    rows = {
        "text": [
            SENTENCES[row % 6] + " " * (row > 5) + SENTENCES[0][: 4 * row] for row in range(ROWS)
        ],
        "label": [row % 2 for row in range(ROWS)],
    }
    source = folder / "bert"
    if not source.exists():  # other ranks have it from the first
        write_model(source)
    return {
        "rows": datasets.Dataset.from_dict(rows),
        "model": {"name": f"hf:{source}", "pretrained": False},
        "views": {"name": "text", "max_length": 24},
    }


def adapted(folder: Path) -> dict[str, Any]:
    """Low-rank adapters of a BERT with weights of its own."""
    from transformers import AutoConfig, BertForSequenceClassification

    made = texts(folder)
    source = folder / "bert"
    if not (source / "model.safetensors").exists():
        torch.manual_seed(5)
        config = AutoConfig.from_pretrained(source)
        BertForSequenceClassification(config).save_pretrained(source)
    lora = {"rank": 2, "targets": ["query", "dense"]}
    return made | {"model": {"name": f"hf:{source}", "lora": lora}}


def hf_pictures(folder: Path) -> dict[str, Any]:
    """Pictures for a small ViT that has a processor."""
    source = write_vit(folder / "vit", VIT)
    made = pictures(folder)
    return made | {"model": {"name": f"hf:{source}", "pretrained": False}, "views": "image"}


def write_vit(folder: Path, config: dict[str, Any]) -> Path:
    """Write the config of a ViT, without weights, and its image processor into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": config["image_size"], "width": config["image_size"]},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def spectrograms(folder: Path) -> dict[str, Any]:
    """Sounds of several lengths, as spectrograms for a CNN."""
    tones = [
        sounds.file_of(sounds.tone(0.1 + 0.01 * row, hertz=200 + 90 * row)) for row in range(ROWS)
    ]
    return {
        "rows": sounds.table(tones, label=[row % 2 for row in range(ROWS)]),
        "model": {"name": "cnn", "width": 4},
        "views": {"name": "audio", "sampling_rate": 8000, "mels": 20, "hop": 0.02},
    }


def waveforms(folder: Path) -> dict[str, Any]:
    """The sounds as waveforms, for a small wav2vec 2.0."""
    sounds.write_config(folder / "wav2vec2")
    model = {"name": f"hf:{folder / 'wav2vec2'}", "pretrained": False}
    views = {"name": "audio", "sampling_rate": 8000, "spectrogram": False, "seconds": 0.2}
    optim = {"name": "adamw", "lr": 0.001}
    return spectrograms(folder) | {"model": model, "views": views, "optim": optim}


def own_module(folder: Path) -> dict[str, Any]:
    """A model of a user's own, named by its function."""
    from tests.support.odd_models import rows

    columns = {"input": ["a", "b", "c", "d"]}
    return {
        "rows": (rows(ROWS), columns),
        "model": {"name": "python:tests.support.odd_models:small"},
        "views": {"name": "table"},
    }


def numbers(folder: Path) -> dict[str, Any]:
    """Two targets of each row."""
    made = table(folder)
    targets = [[100.0 + row, -3.0 * row] for row in range(ROWS)]
    rows = made["rows"].remove_columns("label").add_column("label", targets)
    return made | {"rows": rows, "task": "regression", "algorithm": "mean_teacher"}


def tags(folder: Path) -> dict[str, Any]:
    """Several classes of each row."""
    made = table(folder)
    lists = [[("a", "b", "c")[k] for k in range(3) if row >> k & 1] for row in range(ROWS)]
    rows = made["rows"].remove_columns("label").add_column("label", lists)
    return made | {"rows": rows, "task": "multilabel"}


def with_head(folder: Path) -> dict[str, Any]:
    """A head that predicts in place of the last layer."""
    return pictures(folder) | {"addons": ["abc"]}


def adapted_with_head(folder: Path) -> dict[str, Any]:
    """Such a head beside a BERT with adapters."""
    return adapted(folder) | {"addons": ["abc"]}


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    kind.__name__: kind
    for kind in (
        *(table, pictures, texts, adapted, hf_pictures, spectrograms, waveforms, own_module),
        *(numbers, tags, with_head, adapted_with_head),
    )
}


def trained(folder: Path, kind: str, name: str = "run", **settings: Any) -> tuple[Trainer, Any]:
    """Train a few steps of a kind; give the trainer, and its rows."""
    made = KINDS[kind](folder)
    rows = made.pop("rows")
    values: dict[str, Any] = {
        "algorithm": made.pop("algorithm", {"name": "fixmatch", "threshold": 0.3}),
        "batch": {"labeled": 4, "unlabeled": 8},
        "checkpoint": {"every": 1, "keep": 10, "background": False},
        "eval": {"batch": 5},
        "optim": {"lr": 0.02},
        "precision": "fp32",
        "run": {"dir": str(folder), "name": name},
        "schedule": {"name": "constant"},
        "steps": 3,
        "teacher": {"decay": 0.5},
        "tracker": {"name": "none"},
    }
    sets = {"labeled": rows, "unlabeled": rows, "test": rows}
    chosen = sets | values | made | settings
    trainer = Trainer(chosen.pop("model"), **chosen)
    trainer.fit()
    return trainer, rows


def outputs_of(trainer: Trainer, *, teacher: bool = True) -> Tensor:
    """What the training process's evaluation says of its test rows, fp32 [rows, outputs]."""
    found = []
    with trainer.step.evaluating(teacher=teacher) as predict:
        for batch, valid in trainer.data.evaluation_batches(trainer.data.test):
            found.append(predict(batch.inputs).cpu()[valid])
    return torch.cat(found)
