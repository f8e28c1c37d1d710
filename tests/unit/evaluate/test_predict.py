"""Predictions of files: bad rows hold their place, filters, columns, and going on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch

import hpdist
from hpdist import cli
from hpdist.data.config import Unlabeled
from hpdist.data.sources.label_files import RECORD
from hpdist.errors import ConfigError, DataError
from hpdist.evaluate.predict import Predicted, PredictOptions, predict_to
from hpdist.evaluate.predict.memory_format import channels_last
from hpdist.evaluate.predict.parts import by_length, windows
from hpdist.messages import progress
from tests.support.pictures import picture
from tests.support.texts import SENTENCES, write_model

QUIET: dict[str, Any] = {"tracker": {"name": "none"}, "steps": 3}


def keep(row: dict[str, Any]) -> bool:
    """A filter: rows whose number is even."""
    return bool(row["number"] % 2 == 0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures, and two files of others, of which some cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [picture(row) for row in range(40)]
    labels = [row % 2 for row in range(40)]
    pq.write_table(pa.table({"image": files, "label": labels}), folder / "train.parquet")
    source = {"path": "parquet", "data_files": str(folder / "train.parquet"), "input": "image"}
    hpdist.Trainer(
        {"name": "cnn", "width": 4},
        {"name": "supervised"},
        labeled=source,
        batch={"labeled": 8},
        run={"dir": str(folder), "name": "run"},
        **QUIET,
    ).fit()
    (folder / "new").mkdir()
    damaged = {3: None, 5: b"no picture", 21: files[21][: len(files[21]) // 2]}
    for number, (start, stop) in enumerate([(0, 13), (13, 40)]):
        rows = range(start, stop)
        table = pa.table(
            {
                "image": pa.array([damaged.get(row, files[row]) for row in rows], pa.binary()),
                "number": [100 + row for row in rows],
                "tags": [[str(row), "x"] for row in rows],
            }
        )
        pq.write_table(table, folder / "new" / f"new-{number}.parquet", row_group_size=10)
    return folder


def run(folder: Path, out: str, data: dict[str, Any] | None = None, **options: Any) -> Predicted:
    found = predict_to(
        hpdist.load(folder / "run"),
        Unlabeled(path=str(folder / "new"), **data or {}),
        folder / out,
        PredictOptions(**{"batch": 4, "part_rows": 9} | options),
    )
    assert found is not None
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(folder).to_pylist())


def test_bad_rows_are_named_and_hold_their_place(pictures: Path) -> None:
    found = run(pictures, "labels", columns=("number", "tags"))
    assert (found.rows, found.written, found.bad) == (40, 40, 3)
    assert "new-0.parquet, row group 0, row 3" in found.named[0]
    rows = rows_of(pictures / "labels")
    assert [row["id"] for row in rows] == list(range(40))
    assert [row["number"] for row in rows] == list(range(100, 140))
    assert rows[7]["tags"] == ["7", "x"]
    assert (rows[33]["row_group"], rows[33]["row"]) == (2, 0)
    bad = [row for row in rows if row["error"] is not None]
    assert [row["id"] for row in bad] == [3, 5, 21]
    assert all(row["label"] is None and row["confidence"] is None for row in bad)
    predictor = hpdist.load(pictures / "run")
    good = [row for row in rows if row["error"] is None]
    images = [picture(row["id"]) for row in good]
    assert [row["label"] for row in good] == predictor.predict(images)
    sure = predictor.predict_probabilities(images).max(axis=1)
    np.testing.assert_allclose([row["confidence"] for row in good], sure, atol=1e-6)


def test_only_missing_parts_are_written(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(pictures, "parts").predicted == 40
    folder = pictures / "parts"
    assert len(list(folder.glob("*.parquet"))) == 5
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    lost = folder / "part-00000002.parquet"
    lost.unlink()
    (folder / ".part-00000002.parquet.77.tmp").write_bytes(b"half of it")
    assert run(pictures, "parts").predicted == 9
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert [path for path in before if before[path] != after[path]] == [lost]
    assert before[lost][0] == after[lost][0]
    assert run(pictures, "parts").predicted == 0


def test_other_predictions_are_not_gone_on_with(pictures: Path) -> None:
    run(pictures, "own")
    with pytest.raises(DataError, match="part_rows was 9, now 10"):
        run(pictures, "own", part_rows=10)
    with pytest.raises(DataError, match="options was"):
        run(pictures, "own", probabilities=True)
    predictor = hpdist.load(pictures / "run")
    assert predictor.model is not None
    with torch.no_grad():
        next(iter(predictor.model.parameters())).add_(1)
    with pytest.raises(DataError, match="weights was"):
        predict_to(
            predictor,
            Unlabeled(path=str(pictures / "new")),
            pictures / "own",
            PredictOptions(batch=4, part_rows=9),
        )
    with pytest.raises(DataError, match="the folder is not empty"):
        run(pictures, "run")


def test_threshold_and_filter(pictures: Path) -> None:
    sure = sorted(row["confidence"] or 0 for row in rows_of(pictures / "labels"))[25]
    found = run(pictures, "sure", threshold=sure)
    rows = rows_of(pictures / "sure")
    assert len(rows) == found.written == 15
    assert min(row["confidence"] for row in rows) >= sure
    data = {"filter": "python:tests.unit.evaluate.test_predict:keep", "columns": ("number",)}
    assert run(pictures, "even", data).written == 21
    ids = {row["id"] for row in rows_of(pictures / "even")}
    assert ids == {3, *range(0, 40, 2)}  # a filter does not see a row without a value


def test_a_folder_of_picture_files(pictures: Path) -> None:
    folder = pictures / "scans"
    folder.mkdir()
    for row in range(6):
        (folder / f"scan-{row}.png").write_bytes(picture(row))
    arguments = [str(pictures / "run"), str(folder), "--out", str(pictures / "of-files")]
    assert cli.main(["predict", *arguments, "--data.loading.threads", "2"]) == 0
    rows = rows_of(pictures / "of-files")
    assert [Path(row["file"]).name for row in rows] == [f"scan-{row}.png" for row in range(6)]
    images = [picture(row) for row in range(6)]
    assert [row["label"] for row in rows] == hpdist.load(pictures / "run").predict(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "2"], "--threshold: 2 is not within 0 and 1"),
        (["--batch", "0"], "--batch: must be at least 1"),
        (["--columns", "nothing"], "nothing"),
        (["--columns", "label"], "label"),
        (["--steps", "3"], "settings of the data alone"),
        (["--data.splt", "train"], "data.splt"),
        (["--checkpoint", "newest"], "neither best, last nor a step"),
    ],
)
def test_wrong_arguments(
    pictures: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(pictures / "run"), str(pictures / "new"), "--out", "nowhere"]
    assert cli.main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_the_progress_has_a_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    work = progress.Work("predicting", 1000, "rows", rate=True)
    work.add(250)
    monkeypatch.setattr(work, "_began", time.monotonic() - 10)
    assert work.line == "predicting: 250 of 1,000 rows, 10 s so far, 25 rows a second, 30 s left"


def test_rows_of_similar_length_go_together() -> None:
    tokens = torch.tensor([[1, 2, 3, 0, 0], [1, 0, 0, 0, 0], [1, 2, 3, 4, 0], [9, 8, 0, 0, 0]])
    found = list(by_length(tokens, 0, 2))
    assert [lines.tolist() for lines, _ in found] == [[1, 3], [0, 2]]
    rows = [cast(torch.Tensor, part) for _, part in found]
    assert [list(part.shape) for part in rows] == [[2, 2], [2, 4]]
    assert torch.equal(rows[1], tokens[[0, 2], :4])


class Views(torch.nn.Module):
    """A model that cannot work with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.convs(inputs)
        return hidden.view(len(inputs), -1)[:, :2]


def test_convolutions_have_channels_last_where_the_model_can(pictures: Path) -> None:
    predictor = hpdist.load(pictures / "run")
    inputs = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    for model, can in ((predictor.model, True), (Views().eval(), False)):
        predictor.model = model
        assert model is not None
        convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        convs = [conv for conv in convs if conv.weight.shape[1] > 1]
        before = [conv.weight.data_ptr() for conv in convs]
        expected = predictor.outputs(inputs)
        with channels_last(predictor):
            assert convs
            assert all(conv.weight.is_contiguous() is not can for conv in convs)
            torch.testing.assert_close(predictor.outputs(inputs), expected, rtol=1e-5, atol=1e-6)
        assert [conv.weight.data_ptr() for conv in convs] == before


def test_windows_of_text_grow_from_a_small_one_in_every_part() -> None:
    assert list(windows(10, 30, batch=8, sorts=False)) == [(10, 18), (18, 26), (26, 30)]
    found = list(windows(1000, 3000, batch=8, sorts=True))
    assert found == [
        (1000, 1032),
        (1032, 1288),
        (1288, 1800),
        (1800, 2312),
        (2312, 2824),
        (2824, 3000),
    ]
    rows = [stop - start for start, stop in windows(0, 10**5, batch=1024, sorts=True)]
    assert rows[:3] == [4096, 16_384, 16_384]
    assert sum(rows) == 10**5
    assert [stop - start for start, stop in windows(0, 60_000, batch=30_000, sorts=True)] == [
        30_000
    ] * 2


def test_text_of_mixed_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        " ".join(SENTENCES[: 1 + row % 5]) if row % 3 else SENTENCES[row % 6] for row in range(60)
    ]
    texts[17] = ""
    table = pa.table({"text": texts, "label": [row % 2 for row in range(60)]})
    pq.write_table(table, tmp_path / "texts.parquet")
    model = write_model(tmp_path / "bert")
    source = {"path": "parquet", "data_files": str(tmp_path / "texts.parquet"), "input": "text"}
    hpdist.Trainer(
        {"name": f"hf:{model}", "pretrained": False},
        {"name": "supervised"},
        labeled={**source, "indices": list(range(10))},
        views={"name": "text", "max_length": 64},
        batch={"labeled": 4},
        run={"dir": str(tmp_path), "name": "run"},
        **QUIET,
    ).fit()
    predictor = hpdist.load(tmp_path / "run")
    shapes = []
    outputs = type(predictor).outputs

    def counting(self: Any, inputs: Any) -> Any:
        shapes.append(tuple(inputs.shape))
        return outputs(self, inputs)

    monkeypatch.setattr(type(predictor), "outputs", counting)
    out = tmp_path / "labels"
    command = [str(tmp_path / "run"), str(tmp_path / "texts.parquet"), "--out", str(out)]
    assert cli.main(["predict", *command, "--batch", "4", "--probabilities"]) == 0
    assert len({length for _, length in shapes[1:]}) > 3  # and the first of them is an example
    assert max(rows for rows, _ in shapes[1:]) == 4
    rows = rows_of(out)
    assert [row["id"] for row in rows if row["error"]] == [17]
    good = [text for text in texts if text]
    expected = predictor.predict_probabilities(good)
    found = [row["probabilities"] for row in rows if row["error"] is None]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_run_learns_from_what_another_predicted(pictures: Path) -> None:
    run(pictures, "first", probabilities=True)
    run(pictures, "second")
    record = json.loads((pictures / "first" / RECORD).read_text())
    assert record["parts"] == 5
    spent = {"mechanism": "GNMax", "epsilon": 2.0, "delta": 1e-5}  # as hpdist vote writes it
    (pictures / "first" / RECORD).write_text(json.dumps(record | {"privacy": spent}))
    source = {"path": "parquet", "data_files": str(pictures / "train.parquet"), "input": "image"}
    labels = [str(pictures / "first"), str(pictures / "second")]

    def train(name: str, **options: Any) -> dict[str, Any]:
        unlabeled = {"path": str(pictures / "new"), "input": "image", "pseudo_labels": labels}
        hpdist.Trainer(
            {"name": "cnn", "width": 4},
            {"name": options.pop("algorithm", "stored_pseudo_labels")},
            labeled=source,
            unlabeled=unlabeled | options,
            batch={"labeled": 8, "unlabeled": 20},
            run={"dir": str(pictures), "name": name},
            log={"every": 1},
            **QUIET,
        ).fit()
        lines = (pictures / name / "metrics.jsonl").read_text().splitlines()
        return dict(json.loads(lines[-1]))

    for streaming in (True, False):
        record = train(f"student-{streaming}", streaming=streaming)
        assert 0.8 < record["mask_rate"] <= 1.0  # bad rows are not counted
        assert record["unsupervised_loss"] > 0
        kept = json.loads((pictures / f"student-{streaming}" / "privacy.json").read_text())
        assert kept["labels"] == [{"folder": labels[0], **spent}]
        assert (kept["epsilon"], kept["delta"]) == (2.0, 1e-5)
    with pytest.raises(ConfigError, match="does not learn from stored labels"):
        train("other", algorithm="fixmatch")
    with pytest.raises(ConfigError, match="pseudo_labels is missing"):
        train("none", pseudo_labels=None)
