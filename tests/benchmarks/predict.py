"""Rows per second of `predict_to` against a bare loop of torch over the same rows, in turns.

    python -m tests.benchmarks.predict [--rows 4096] [--rounds 5]

Pictures are PNG files of 32x32 in Parquet, and the model is a small CNN; the bare loop is a
`DataLoader` over the table that decodes with Pillow, and throws its results away. Texts have 4 to
120 words, and the model is a small BERT; the other one is `transformers.pipeline` over the list of
them, in batches of as many rows. Both have one thread. Ratios are medians, with the range, of those
of each round; above 1, `predict_to` is faster, though it alone writes what it finds.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader

import hpdist
from hpdist.data.config import Unlabeled
from hpdist.evaluate.predict import PredictOptions, predict_to
from hpdist.evaluate.predictor import Predictor
from tests.support.texts import SENTENCES, write_model

BATCH = 64


def main() -> None:
    """Measure both, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| rows | predict_to, rows/s | the other, rows/s | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, prepare in {"pictures": pictures, "texts": texts}.items():
            (folder / kind).mkdir()
            ours, other = prepare(folder / kind, given.rows)
            pairs = [(timed(ours), timed(other)) for _ in range(given.rounds + 1)][1:]
            speeds = [given.rows / statistics.median(times) for times in zip(*pairs, strict=True)]
            ratios = sorted(theirs / mine for mine, theirs in pairs)
            print(
                f"| {given.rows} {kind} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
                flush=True,
            )


def timed(call: Callable[[], None]) -> float:
    """Give the seconds that a call takes."""
    start = time.monotonic()
    call()
    return time.monotonic() - start


def train(folder: Path, model: dict[str, Any], column: str, **settings: Any) -> Predictor:
    """Train a model for a step on the first rows; give what `hpdist.load` gives."""
    source = {"path": "parquet", "data_files": str(folder / "data" / "rows.parquet")}
    hpdist.Trainer(
        model,
        {"name": "supervised"},
        labeled={**source, "input": column, "indices": list(range(8))},
        batch={"labeled": 8},
        run={"dir": str(folder), "name": "run"},
        tracker={"name": "none"},
        steps=1,
        **settings,
    ).fit()
    return hpdist.load(folder / "run")


def predicting(folder: Path, predictor: Predictor, pad: int | None) -> Callable[[], None]:
    """Give a call that predicts all rows into a new folder."""

    def call() -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        options = PredictOptions(batch=BATCH, pad=pad)
        predict_to(predictor, Unlabeled(path=str(folder / "data")), folder / "out", options)

    return call


def pictures(folder: Path, rows: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Write pictures, and give both ways to predict them."""
    noise = np.random.default_rng(0)
    images = [_png(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(rows)]
    _write(folder, {"image": images, "label": [row % 4 for row in range(rows)]})
    predictor = train(folder, {"name": "cnn", "width": 32}, "image")
    table = datasets.load_dataset("parquet", data_files=str(folder / "data" / "rows.parquet"))

    def decode(found: list[dict[str, Any]]) -> torch.Tensor:
        opened = (Image.open(io.BytesIO(row["image"])).convert("RGB") for row in found)
        arrays = np.stack([np.asarray(image) for image in opened])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()

    def bare() -> None:
        model, plain = predictor.model, predictor.views.plain
        assert model is not None
        with torch.inference_mode():
            for batch in DataLoader(table["train"], BATCH, collate_fn=decode):
                model(plain(batch)).softmax(dim=1)

    return predicting(folder, predictor, None), bare


def texts(folder: Path, rows: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Write texts of mixed lengths, and give both ways to predict them."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    words = " ".join(SENTENCES).split()
    lengths = np.random.default_rng(0).integers(4, 120, rows)
    made = [" ".join(words[i % len(words)] for i in range(n)) for n in lengths]
    _write(folder, {"text": made, "label": [row % 4 for row in range(rows)]})
    config = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 128}
    path = write_model(folder / "bert", config)
    model = {"name": f"hf:{path}", "pretrained": False}
    predictor = train(folder, model, "text", views={"name": "text", "max_length": 128})
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "run" / "model")
    other = pipeline("text-classification", loaded, tokenizer=tokenizer, device="cpu")
    pad = predictor.views.vocabulary.pad  # type: ignore[attr-defined]

    def bare() -> None:
        other(made, batch_size=BATCH, truncation=True, max_length=128)

    return predicting(folder, predictor, pad), bare


def _write(folder: Path, columns: dict[str, Any]) -> None:
    (folder / "data").mkdir()
    pq.write_table(pa.table(columns), folder / "data" / "rows.parquet", row_group_size=1000)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
