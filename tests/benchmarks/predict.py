"""Rows per second of `predict_to`, in turns with what a user would write without it.

    python -m tests.benchmarks.predict [--rows 2048] [--rounds 5] [--kinds pictures texts]

- pictures: PNG files of 32x32 and a small CNN, against a bare loop of torch, a `DataLoader` that
  decodes with Pillow;
- texts: 4 to 120 words each, as many of every length, and a small BERT; and skewed_texts: the
  lengths of text as people write it, log-normal, of 30 words in the middle; both against
  `transformers.pipeline("text-classification")`;
- photos: JPEG files of 96x96 and a small ViT of 64x64, against
  `transformers.pipeline("image-classification")` with the ViT's own image processor; and camera:
  the same with files as cameras write them, of 640x480, or with the pictures of `--camera DIR`.

Everything lies in one Parquet file, batches have 64 rows, and torch computes on one thread.
`predict_to` decodes in one thread more; the other one may do the same in a worker process, so it
is measured with none and with one, and the faster counts. Ratios are medians, with the range, of
those of each round; above 1, `predict_to` is faster, though it alone writes what it finds. The last
column is the share of `predict_to`'s time that its model alone takes for the same batches: what no
decoding or writing can save.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from hpdist.evaluate.predict.memory_format import channels_last
from hpdist.evaluate.predictor import Predictor
from tests.support.model_runs import VIT, write_vit
from tests.support.texts import SENTENCES, write_model

BATCH = 64
WORKERS = (0, 1)
_LONGEST = 128  # tokens
CAMERA: list[Path] = []
"""The folder of Parquet files whose pictures are taken, if one is given."""


@dataclass(frozen=True)
class Rivals:
    """The same rows, predicted in several ways."""

    folder: Path
    predictor: Predictor
    pad: int | None
    other: Callable[[int], Sequence[str]]
    """Predict with so many worker processes; the labels, where it makes some."""

    def ours(self) -> None:
        """Predict all rows into a new folder."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        options = PredictOptions(batch=BATCH, pad=self.pad)
        data = Unlabeled(path=str(self.folder / "data"))
        predict_to(self.predictor, data, self.folder / "out", options)

    def forward_alone(self) -> Callable[[], None]:
        """Give a call of the model for the batches that `ours` makes."""
        batches: list[Any] = []
        outputs = Predictor.outputs

        def keeping(predictor: Predictor, inputs: Any) -> Any:
            batches.append(inputs)
            return outputs(predictor, inputs)

        Predictor.outputs = keeping  # type: ignore[method-assign]
        self.ours()
        Predictor.outputs = outputs  # type: ignore[method-assign]

        def forward() -> None:
            with channels_last(self.predictor):
                for inputs in batches:
                    self.predictor.outputs(inputs)

        return forward

    def check(self) -> None:
        """Raise AssertionError where the labels of both differ, but for a few near a border."""
        self.ours()
        ours = pq.read_table(self.folder / "out").sort_by("id").column("label").to_pylist()
        other = self.other(0)
        if other:
            same = sum(map(str.__eq__, map(str, ours), map(str, other)))
            assert same >= 0.98 * len(ours), f"{same} of {len(ours)} labels are the same"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--camera", type=Path, action="append", default=CAMERA, help="Parquet")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| rows | predict_to, rows/s | the other, rows/s | ratio | the model's share |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for kind in given.kinds:
            (Path(name) / kind).mkdir()
            print(line(kind, KINDS[kind](Path(name) / kind, given.rows), given), flush=True)


def line(kind: str, rivals: Rivals, given: argparse.Namespace) -> str:
    """Measure in turns; a row of the table."""
    rivals.check()
    calls = [rivals.ours, rivals.forward_alone()]
    calls += [lambda workers=workers: rivals.other(workers) for workers in WORKERS]  # type: ignore[misc]
    rounds = [[timed(call) for call in calls] for _ in range(given.rounds + 1)][1:]
    ours, alone, *others = map(list, zip(*rounds, strict=True))
    workers, fastest = min(enumerate(others), key=lambda found: statistics.median(found[1]))
    ratios = sorted(theirs / mine for mine, theirs in zip(ours, fastest, strict=True))
    share = statistics.median(a / o for a, o in zip(alone, ours, strict=True))
    speeds = [given.rows / statistics.median(times) for times in (ours, fastest)]
    return (
        f"| {given.rows} {kind.replace('_', ' ')} | {speeds[0]:,.0f} | {speeds[1]:,.0f}, "
        f"{WORKERS[workers]} workers | {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {share:.0%} |"
    )


def timed(call: Callable[[], Any]) -> float:
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


def pictures(folder: Path, rows: int) -> Rivals:
    """Write small pictures, for a CNN and a bare loop."""
    noise = np.random.default_rng(0)
    images = [
        encoded(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8), "PNG") for _ in range(rows)
    ]
    predictor = train(write(folder, "image", images), {"name": "cnn", "width": 32}, "image")
    table = read(folder)

    def decode(found: list[dict[str, Any]]) -> torch.Tensor:
        opened = (Image.open(io.BytesIO(row["image"])).convert("RGB") for row in found)
        arrays = np.stack([np.asarray(image) for image in opened])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()

    def bare(workers: int) -> list[str]:
        model, plain = predictor.model, predictor.views.plain
        assert model is not None
        loader = DataLoader(table, BATCH, num_workers=workers, collate_fn=decode)
        with torch.inference_mode():
            found = [model(plain(batch)).softmax(dim=1).argmax(dim=1) for batch in loader]
        return [predictor.names[number] for number in torch.cat(found).tolist()]

    return Rivals(folder, predictor, None, bare)


def texts(folder: Path, rows: int) -> Rivals:
    """Write texts of 4 to 120 words, as many of every length."""
    return worded(folder, np.random.default_rng(0).integers(4, 120, rows))


def skewed_texts(folder: Path, rows: int) -> Rivals:
    """Write texts of log-normal lengths."""
    return worded(folder, np.random.default_rng(0).lognormal(np.log(30), 0.8, rows).astype(int) + 1)


def worded(folder: Path, lengths: np.ndarray) -> Rivals:
    """Write texts of so many words, for a BERT."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    words = " ".join(SENTENCES).split()
    made = [
        " ".join(words[(at + i) % len(words)] for i in range(n)) for at, n in enumerate(lengths)
    ]
    write(folder, "text", made)
    config = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": _LONGEST}
    model = {"name": f"hf:{write_model(folder / 'bert', config)}", "pretrained": False}
    predictor = train(folder, model, "text", views={"name": "text", "max_length": _LONGEST})
    saved = folder / "run" / "model"
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    pipe = pipeline("text-classification", loaded, tokenizer=tokenizer, device="cpu")

    def other(workers: int) -> list[str]:
        options = {"truncation": True, "max_length": _LONGEST}
        found = pipe(made, batch_size=BATCH, num_workers=workers, **options)
        return [row["label"] for row in found]

    pad = predictor.views.vocabulary.pad  # type: ignore[attr-defined]
    return Rivals(folder, predictor, pad, other)


def photos(folder: Path, rows: int) -> Rivals:
    """Write larger pictures, for a ViT with its image processor."""
    noise = np.random.default_rng(0)
    coarse = [noise.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(rows)]
    smooth = [np.asarray(Image.fromarray(each).resize((96, 96))) for each in coarse]
    return photographed(folder, [encoded(each, "JPEG") for each in smooth])


def camera(folder: Path, rows: int) -> Rivals:
    """Write the pictures of `--camera`, or some of 640x480, again and again."""
    if CAMERA:
        tables = [
            pq.read_table(file, columns=["image"]) for file in sorted(CAMERA[0].glob("*.parquet"))
        ]
        found = [row["bytes"] for table in tables for row in table.column("image").to_pylist()]
    else:
        noise = np.random.default_rng(0)
        coarse = [noise.integers(0, 256, (30, 40, 3), dtype=np.uint8) for _ in range(64)]
        found = [encoded(np.asarray(Image.fromarray(c).resize((640, 480))), "JPEG") for c in coarse]
    return photographed(folder, [found[row % len(found)] for row in range(rows)])


def photographed(folder: Path, files: list[bytes]) -> Rivals:
    """Write such pictures, for a ViT with its image processor."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
    from transformers.pipelines.pt_utils import KeyDataset

    write(folder, "image", files)
    small = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    config = VIT | small | {"image_size": 64, "patch_size": 8, "num_attention_heads": 4}
    model = {"name": f"hf:{write_vit(folder / 'vit', config)}", "pretrained": False}
    predictor = train(folder, model, "image", views={"name": "image", "size": 64})
    saved = folder / "run" / "model"
    loaded = AutoModelForImageClassification.from_pretrained(saved)
    processor = AutoImageProcessor.from_pretrained(saved)
    pipe = pipeline("image-classification", loaded, image_processor=processor, device="cpu")
    decoded: Any = KeyDataset(read(folder).cast_column("image", datasets.Image()), "image")

    def other(workers: int) -> list[str]:
        found = pipe(decoded, batch_size=BATCH, num_workers=workers, top_k=1)
        return [row[0]["label"] for row in found]

    return Rivals(folder, predictor, None, other)


def write(folder: Path, column: str, values: list[Any]) -> Path:
    """Write rows of four classes; the folder."""
    (folder / "data").mkdir()
    table = pa.table({column: values, "label": [row % 4 for row in range(len(values))]})
    pq.write_table(table, folder / "data" / "rows.parquet", row_group_size=1000)
    return folder


def read(folder: Path) -> Any:
    """Open the rows as `datasets` does."""
    files = str(folder / "data" / "rows.parquet")
    return datasets.load_dataset("parquet", data_files=files, split="train")


def encoded(pixels: np.ndarray, file_format: str) -> bytes:
    """Encode pixels, uint8 [height, width, 3], as an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format)
    return file.getvalue()


KINDS = {each.__name__: each for each in (pictures, texts, skewed_texts, photos, camera)}


if __name__ == "__main__":
    main()
