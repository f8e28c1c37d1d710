"""The report shows rows of the test set: pictures, sounds with a player, texts and tables."""

from __future__ import annotations

import base64
import io
import json
import re
import wave
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from hpdist.data.samples.tones import write_tones
from hpdist.tracking.report import write_report
from hpdist.tracking.row_examples import RowExamples, RowGroup, ShownRow, row_examples_html
from hpdist.tracking.run_record import read_run
from hpdist.train.trainer import Trainer

ROWS = 40


def pictures(spoilt: tuple[int, ...] = (4, 9, 20)) -> Any:
    """Bright and dark pictures, of which some have the other class's label."""
    labels = np.arange(ROWS) % 2
    draws = np.random.default_rng(0)
    pixels = (draws.integers(0, 40, (ROWS, 8, 8)) + 180 * labels[:, None, None]).astype(np.uint8)
    labels[list(spoilt)] ^= 1
    feature = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["<dark>", "bright"])}
    )
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features=feature)


def trained(tmp_path: Path, data: Any, name: str = "run", **settings: Any) -> Path:
    defaults: dict[str, Any] = {
        "model": {"name": "cnn", "width": 4},
        "labeled": data,
        "unlabeled": data,
        "test": data,
        "batch": {"labeled": 16, "unlabeled": 16},
        "steps": 15,
        "tracker": {"name": "none"},
        "run": {"dir": str(tmp_path / "runs"), "name": name},
    }
    defaults["algorithm"] = {"name": "fixmatch", "threshold": 0.5}
    Trainer(**(defaults | settings)).fit()
    return tmp_path / "runs" / name


def shown_in(folder: Path) -> RowExamples:
    found = read_run(folder).rows
    assert found is not None
    return found


def report_of(folder: Path) -> str:
    write_report([folder], folder / "report.html")
    return (folder / "report.html").read_text()


def test_pictures_and_the_rows_that_are_wrong(tmp_path: Path) -> None:
    clean, learns = pictures(spoilt=()), {"optim": {"lr": 0.1}, "teacher": {"decay": 0.5}}
    folder = trained(tmp_path, clean, test=pictures(), eval={"every": 20}, steps=40, **learns)
    found = shown_in(folder)
    titles = [group.title for group in found.groups]
    assert titles[0] == "Most confident: class <dark>"
    (wrong,) = (group for group in found.groups if group.title.startswith("The teacher is wrong"))
    assert {"4", "9", "20"} <= {row.id for row in wrong.rows}
    summary = json.loads((folder / "summary.json").read_text())
    assert len(wrong.rows) == min(12, round((1 - summary["test/accuracy"]) * ROWS))
    for row in (row for group in found.groups for row in group.rows):
        image = Image.open(io.BytesIO(base64.b64decode(found.media[row.id]["picture"])))
        bright = np.asarray(image.convert("L")).mean() > 100
        assert bright == (int(row.id) % 2 == 1)
        assert (row.label == "bright") == (bright != (row.id in ("4", "9", "20")))
    page = report_of(folder)
    assert "Rows of the test set: run" in page
    assert "Most confident: class &lt;dark&gt;" in page
    assert 'src="http' not in page
    assert page.count("data:image/png;base64,") > sum(len(group.rows) for group in found.groups)


def test_sounds_have_a_spectrogram_and_a_player(tmp_path: Path) -> None:
    tones = write_tones(tmp_path / "tones")
    data = datasets.Dataset.from_parquet(str(tones / "test.parquet"), cache_dir=str(tmp_path))
    views = {"name": "audio", "sampling_rate": 8000, "seconds": 0.6, "mels": 32}
    folder = trained(tmp_path, data, views=views, steps=4)
    found = shown_in(folder)
    media = next(iter(found.media.values()))
    assert Image.open(io.BytesIO(base64.b64decode(media["picture"]))).height == 112
    with wave.open(io.BytesIO(base64.b64decode(media["sound"]))) as file:
        assert file.getframerate() == 8000
        assert 0 < file.getnframes() <= 0.6 * 8000
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert np.abs(samples).max() > 1000
    page = report_of(folder)
    assert len(re.findall(r'<audio controls preload="none" src="data:audio/wav;base64,', page))


def test_rows_of_a_table_are_lines(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    rows = {"size": draws.normal(size=ROWS), "age": draws.normal(size=ROWS)}
    data = datasets.Dataset.from_dict(rows | {"label": (np.arange(ROWS) % 2).tolist()})
    folder = trained(tmp_path, data, model={"name": "mlp", "hidden": [4]})
    found = shown_in(folder)
    text = (
        found.media["3"]["text"] if "3" in found.media else next(iter(found.media.values()))["text"]
    )
    assert re.search(r"^size +-?\d", text, re.MULTILINE)


def test_several_labels_are_shown_by_label(tmp_path: Path) -> None:
    """A picture is bright on the left, on the right, on both sides or on none."""
    sides = np.arange(ROWS)[:, None] // [1, 2] % 2  # [rows, 2]
    pixels = np.random.default_rng(0).integers(0, 40, (ROWS, 8, 8))
    pixels += 180 * np.repeat(sides, 4, axis=1)[:, None, :]
    names = ["left", "right"]
    labels = [[n for n, there in zip(names, row, strict=True) if there] for row in sides]
    labels[5], labels[6] = ["right"], ["left"]  # of [1, 0] and [0, 1]
    pictures = [Image.fromarray(p.astype(np.uint8)) for p in pixels]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Sequence(datasets.Value("string"))}
    )
    data = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    learns = {"optim": {"lr": 0.1}, "teacher": {"decay": 0.5}, "task": {"name": "multilabel"}}
    folder = trained(
        tmp_path,
        data,
        steps=40,
        views={"name": "image", "weak": {"shift": 0, "flip": False}},
        **learns,
    )
    groups = {group.title: group.rows for group in shown_in(folder).groups}
    extra = groups["Wrongly given the label left, the most confident first"]
    assert extra[0].id == "5"
    assert (extra[0].label, extra[0].teacher) == ("right", "left")
    assert extra[0].confidence is not None
    assert extra[0].confidence > 0.5
    missed = groups["Wrongly not given the label left, the least likely first"]
    assert missed[0].id == "6"
    page = report_of(folder)
    assert "Wrongly given the label left" in page
    assert (
        f'left → <span class="wrong">right</span> (left: {100 * missed[0].confidence:.1f} %)'
        in page
    )


def test_numbers_are_shown_by_their_errors(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=ROWS)
    target = 10 * x + 100
    target[[7, 11]] = 1000, -800
    clean = datasets.Dataset.from_dict({"size": x, "label": 10 * x + 100})
    data = datasets.Dataset.from_dict({"size": x, "label": target})
    settings = {
        "model": {"name": "mlp", "hidden": [8]},
        "task": {"name": "regression"},
        "algorithm": {"name": "mean_teacher"},
        "optim": {"name": "adamw", "lr": 0.05},
        "teacher": {"decay": 0.5},
    }
    folder = trained(tmp_path, clean, test=data, steps=40, **settings)
    groups = {group.title: group.rows for group in shown_in(folder).groups}
    errors = groups["Largest errors of the teacher"]
    assert [row.id for row in errors[:2]] == ["11", "7"]
    assert [row.label for row in errors[:2]] == ["-800", "1000"]
    assert 50 < float(errors[0].teacher) < 150
    assert errors[0].confidence is None
    assert "Largest differences of teacher and student" in groups
    page = report_of(folder)
    assert 'class="wrong"' not in page
    assert "-800 → " in page


def test_none_where_none_are_wanted(tmp_path: Path) -> None:
    folder = trained(tmp_path, pictures(), log={"examples": 0})
    assert read_run(folder).rows is None
    assert "Rows of the test set" not in report_of(folder)


def test_a_validation_set_is_shown_where_there_is_no_test_set(tmp_path: Path) -> None:
    folder = trained(tmp_path, pictures(), test=None, validation=pictures())
    assert shown_in(folder).name == "validation"


def example(text: str) -> RowExamples:
    row = ShownRow("1", "row 1", "a<b", "c", "d", 0.5)
    return RowExamples("test", [RowGroup("Least confident", [row])], {"1": {"text": text}})


def test_what_rows_hold_is_no_markup() -> None:
    page = row_examples_html(example("<script>alert(1)</script>"), "<run>")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "a&lt;b" in page
    assert "student: d" in page


def test_a_file_is_read_as_it_was_written_or_left_out(tmp_path: Path) -> None:
    found = example("text")
    assert RowExamples.of(json.dumps(found.to_json()).encode()) == found
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "examples").mkdir()
    for damaged in ("{}", "[", '{"name": "test", "groups": [1], "media": {}}'):
        (tmp_path / "examples/rows.json").write_text(damaged)
        run = read_run(tmp_path)
        assert run.rows is None
        assert any("rows.json is left out" in note for note in run.notes)
    spoilt = found.to_json() | {"media": {"1": {"picture": '" onerror="alert(1)'}}}
    with pytest.raises(ValueError, match=r"."):
        RowExamples.of(json.dumps(spoilt).encode())
