"""Writes models of `transformers` as folders that its `AutoModel` classes load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from hpdist.errors import HpdistError
from hpdist.hub import PREFIX
from hpdist.models.hf.audio import AudioClassifier
from hpdist.models.hf.text import ImageClassifier, TextClassifier
from hpdist.models.pixels import read_processor

_WHOLE = "1000GB"  # no second file of weights
_PROCESSOR = "preprocessor_config.json"


def save_hf_files(
    model: nn.Module,
    folder: Path,
    names: Sequence[str],
    settings: Mapping[str, Any],
    views: Mapping[str, Any],
) -> bool:
    """Write the model of `transformers` inside a classifier, if it is one; tell whether it is.

    Args:
        model: The classifier.
        folder: Where the files go.
        names: The classes, or the targets.
        settings: The config's section of the model, which names the checkpoint that it began with.
        views: The settings of the views, which say what pixels the model is given.
    """
    if not isinstance(model, (TextClassifier, ImageClassifier, AudioClassifier)):
        return False
    inner: Any = model.model
    inner.config.id2label = dict(enumerate(names))
    inner.config.label2id = {name: number for number, name in enumerate(names)}
    inner.save_pretrained(folder, max_shard_size=_WHOLE)
    if not isinstance(model, TextClassifier):
        _save_processor(folder, settings, views)
    return True


def save_hf_config(model: nn.Module, folder: Path) -> None:
    """Write the config of a model of `transformers` alone, which its tokenizer is loaded by."""
    if isinstance(model, (TextClassifier, ImageClassifier, AudioClassifier)):
        model.model.config.save_pretrained(folder)


def _save_processor(folder: Path, settings: Mapping[str, Any], views: Mapping[str, Any]) -> None:
    """Write the checkpoint's own processor, with what the views make of pixels in its place."""
    path = str(settings["name"]).removeprefix(PREFIX)
    found = None
    with suppress(HpdistError, OSError):  # gone since, or the Hub is out of reach
        found = read_processor(path, settings.get("revision"), "model.name")
    if found is None:
        return
    values = dict(found)
    if values.get("image_mean") is not None and views.get("mean") and views.get("std"):
        mean, std = views["mean"], views["std"]
        values |= {"do_normalize": True, "image_mean": mean, "image_std": std}
        values |= {"do_rescale": True, "rescale_factor": 1 / 255}
    (folder / _PROCESSOR).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
