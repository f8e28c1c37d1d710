"""Small generated data of every kind of input, the same on every machine.

All numbers are NumPy's, rounded where a file or a decoder could differ, so that what a curve
starts from depends on no library's version.
"""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

ROWS = {"labeled": 40, "unlabeled": 168, "test": 24, "validation": 20}
CLASSES = 4
SHARES = (0.4, 0.3, 0.2, 0.1)  # of the classes: alignments have something to do
FEATURES = 8
SIDE = 8
RATE = 4000
WORDS = ("north", "cargo", "river", "stone", "violet", "engine", "copper", "meadow")
COMMON = ("the", "a", "of", "near", "with", "under", "over", "and")
Columns = dict[str, Any]
Make = Callable[[np.random.Generator, np.ndarray], tuple[Columns, dict[str, Any]]]


def _vectors(generator: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    centres = 1.4 * np.eye(CLASSES, FEATURES) + 0.4 * np.eye(CLASSES, FEATURES, k=3)
    drawn = generator.normal(size=(len(labels), FEATURES)) + centres[labels]
    return (np.round(drawn * 1024) / 1024).astype(np.float32)


def vector(generator: np.random.Generator, labels: np.ndarray) -> tuple[Columns, dict[str, Any]]:
    """One column `x` of vectors."""
    return {"x": _vectors(generator, labels).tolist()}, {
        "x": datasets.List(datasets.Value("float32"), length=FEATURES)
    }


def table(generator: np.random.Generator, labels: np.ndarray) -> tuple[Columns, dict[str, Any]]:
    """Columns of numbers, one with gaps, and one of categories."""
    rows = _vectors(generator, labels).astype(float)
    columns: Columns = {f"x{k}": rows[:, k].tolist() for k in range(4)}
    columns["x3"] = [None if number % 7 == 3 else v for number, v in enumerate(columns["x3"])]
    columns["city"] = [("Rome", "Ulm", "Oslo")[int(v > 0) + int(v > 1)] for v in rows[:, 4]]
    return columns, {
        **{f"x{k}": datasets.Value("float64") for k in range(4)},
        "city": datasets.Value("string"),
    }


def image(generator: np.random.Generator, labels: np.ndarray) -> tuple[Columns, dict[str, Any]]:
    """PNG files of a bright quarter each, with noise."""
    values = generator.integers(0, 90, size=(len(labels), SIDE, SIDE))
    half = SIDE // 2
    for picture, label in zip(values, labels, strict=True):
        top, left = half * (label // 2), half * (label % 2)
        picture[top : top + half, left : left + half] += generator.integers(20, 120)
    files = [_png(picture.astype(np.uint8)) for picture in values]
    return {"image": files}, {"image": datasets.Image(mode="L")}


def _png(picture: np.ndarray) -> Columns:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def audio(generator: np.random.Generator, labels: np.ndarray) -> tuple[Columns, dict[str, Any]]:
    """WAV files of a tone each, whose pitch is the class, with noise."""
    sounds = []
    for label in labels:
        times = np.arange(int(generator.integers(500, 800))) / RATE
        tone = np.sin(2 * np.pi * (250 + 350 * label + generator.uniform(-60, 60)) * times)
        sounds.append(0.3 * tone + 0.1 * generator.normal(size=len(times)))
    return {"audio": [_wav(sound) for sound in sounds]}, {"audio": datasets.Audio(decode=False)}


def _wav(sound: np.ndarray) -> Columns:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    return {"bytes": out.getvalue(), "path": None}


def text(generator: np.random.Generator, labels: np.ndarray) -> tuple[Columns, dict[str, Any]]:
    """Sentences with a word of their class among common ones, and a second column beside them."""
    sentences, back = [], []
    for label in labels:
        words = list(generator.choice(COMMON, size=int(generator.integers(4, 9))))
        for place in range(2):
            words[place * 2] = WORDS[2 * label + int(generator.integers(2))]
        sentences.append(" ".join(words))
        back.append(" ".join(reversed(words)))
    texts = datasets.Value("string")
    return {"text": sentences, "back": back}, {"text": texts, "back": texts}


def shapes(generator: np.random.Generator, labels: np.ndarray) -> tuple[Columns, dict[str, Any]]:
    """PNG files with up to two bright rectangles each, whose boxes are the labels."""
    side = 4 * SIDE
    values = generator.integers(0, 60, size=(len(labels), side, side))
    objects = []
    for picture, label in zip(values, labels, strict=True):
        own: Columns = {"bbox": [], "category": []}
        for number in range(int(generator.integers(3))):
            width, height = (int(one) for one in generator.integers(8, 17, 2))
            x, y = (
                int(generator.integers(side - width + 1)),
                int(generator.integers(side - height + 1)),
            )
            picture[y : y + height, x : x + width] = 120 + 40 * (int(label) % 3) + number
            own["bbox"].append([float(x), float(y), float(width), float(height)])
            own["category"].append(int(label) % 3)
        objects.append(own)
    boxes = datasets.List(datasets.List(datasets.Value("float32"), length=4))
    classes = datasets.List(datasets.ClassLabel(names=["dark", "grey", "white"]))
    types = {"image": datasets.Image(mode="L"), "objects": {"bbox": boxes, "category": classes}}
    return {"image": [_png(one.astype(np.uint8)) for one in values], "objects": objects}, types


KINDS: dict[str, Make] = {
    "vector": vector,
    "table": table,
    "image": image,
    "audio": audio,
    "text": text,
    "shapes": shapes,
}


def _labels_of(task: str, labels: np.ndarray, values: np.ndarray) -> tuple[list[Any], Any]:
    """What a task has in its column of labels, and that column's type."""
    if task == "multilabel":
        lists = [
            sorted({int(label), *np.flatnonzero(row[:CLASSES] > 1.2).tolist()})
            for label, row in zip(labels, values, strict=True)
        ]
        return lists, datasets.List(datasets.Value("int64"))
    if task == "regression":
        targets = [[50 + 4 * float(row[0]), float(row[1]) - float(row[2])] for row in values]
        return targets, datasets.List(datasets.Value("float32"), length=2)
    return labels.tolist(), datasets.ClassLabel(names=[f"class {k}" for k in range(CLASSES)])


def write_labels(folder: Path) -> list[str]:
    """Write what two models would have stored of the unlabelled rows; one labels a third."""
    folders = []
    for number, step in enumerate((1, 3)):
        target = folder / f"labels-{number}"
        folders.append(str(target))
        target.mkdir(exist_ok=True)
        generator = np.random.default_rng(100 + number)
        ids = np.flatnonzero(np.arange(ROWS["unlabeled"]) % step == 0)
        drawn = generator.integers(0, 100, size=(len(ids), CLASSES)) ** 2 + 1
        shares = drawn / drawn.sum(axis=1, keepdims=True)
        table = datasets.Dataset.from_dict({"id": ids, "probabilities": shares})
        table.to_parquet(target / "part-0.parquet")
    return folders


def write(folder: Path, kind: str, task: str = "classification") -> dict[str, str]:
    """Write a Parquet file per set into the folder, once; the path of each.

    The unlabelled rows come in two row groups and without a column of labels.
    """
    paths = {name: folder / f"{kind}-{task}-{name}.parquet" for name in ROWS}
    for number, (name, path) in enumerate(paths.items()):
        if path.exists():
            continue
        generator = np.random.default_rng(number)
        labels = generator.choice(CLASSES, size=ROWS[name], p=SHARES)
        columns, types = KINDS[kind](generator, labels)
        if name == "unlabeled":
            columns.pop("objects", None)
            types.pop("objects", None)
        elif kind != "shapes":
            values = np.array(columns["x"]) if kind == "vector" else np.zeros((ROWS[name], 0))
            columns["label"], types["label"] = _labels_of(task, labels, values)
        objects = {key: datasets.Features(types)[key] for key in columns if key == "objects"}
        made = datasets.Dataset.from_dict(columns)
        for column, feature in (types | objects).items():  # a sound is not encoded anew so
            made = made.cast_column(column, feature)
        made.to_parquet(str(path), batch_size=(ROWS[name] + 1) // 2)
    return {name: str(path) for name, path in paths.items()}


def write_text_model(folder: Path) -> Path:
    """Write a small BERT without weights and a tokenizer of whole words into a folder, once."""
    if (folder / "config.json").exists():
        return folder
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = {word: number for number, word in enumerate([*special, *COMMON, *WORDS])}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, **{f"{key}_token": token for key, token in names.items()}
    )
    fast.save_pretrained(folder)
    config = {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 24,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
        "vocab_size": len(ids),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
