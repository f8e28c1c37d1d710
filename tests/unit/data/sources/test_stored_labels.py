"""Stored labels: joined by id, averaged, and refused by name where they are of other rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from hpdist.data.config import Labeled, Loading, Unlabeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources.label_files import METADATA, PRIVACY, RECORD
from hpdist.data.sources.label_privacy import add_up, describe, read_spent
from hpdist.data.sources.labeled import open_labeled
from hpdist.data.sources.stored_labels import StoredLabels, lay_out_labels, open_stored_labels
from hpdist.data.sources.unlabeled import open_unlabeled, scan_metadata
from hpdist.data.sources.unlabeled_rows import AnyUnlabeled
from hpdist.errors import DataError
from hpdist.tasks import DEFAULT_TASK

ROWS, NAMES = 30, ["cat", "dog", "owl"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", str(tmp_path / "cache"))


def open_rows(folder: Path, streaming: bool, split: str = "train") -> AnyUnlabeled:
    """Thirty rows in two files of row groups of four, the second with one row more or less."""
    if not folder.exists():
        folder.mkdir()
        x = np.arange(ROWS * 2, dtype=np.float32).reshape(ROWS, 2)
        for number, (start, stop) in enumerate([(0, 14), (14, ROWS)]):
            table = pa.table(
                {"x": list(x[start:stop]), "label": [NAMES[i % 3] for i in range(start, stop)]}
            )
            pq.write_table(table, folder / f"rows-{number}.parquet", row_group_size=4)
    source = {"path": str(folder), "input": "x"}
    labeled = open_labeled(Labeled(**source, label="label"), 0, labels=DEFAULT_TASK)
    spec = input_spec(labeled)
    config = Unlabeled(**source, streaming=streaming, split=split)
    found = scan_metadata(config, labeled, spec, Loading())
    return open_unlabeled(config, labeled, spec, found=found)


def test_what_votes_have_cost_adds_up(tmp_path: Path) -> None:
    one = {"mechanism": "GNMax", "epsilon": 1.5, "delta": 1e-5}
    folders = [tmp_path / name for name in ("a", "b", "none")]
    for folder, name, record in zip(
        folders, (RECORD, PRIVACY, RECORD), ({"privacy": one}, {"privacy": one}, {}), strict=True
    ):
        folder.mkdir()
        (folder / name).write_text(json.dumps(record))
    found = [read_spent(folder) for folder in folders]
    assert found == [one, one, None]
    total = add_up([one, one])
    assert (total["epsilon"], total["delta"]) == (3.0, 2e-5)
    assert "2 private votes have labelled" in describe(total)
    assert "epsilon 3 at delta 2e-05" in describe(total)
    for wrong in ({"epsilon": -1, "delta": 0}, {"epsilon": 1}, 3, {"epsilon": "x", "delta": 0}):
        (folders[0] / RECORD).write_text(json.dumps({"privacy": wrong}))
        with pytest.raises(DataError, match=r"does not say what the labels cost in privacy"):
            read_spent(folders[0])


def write(
    folder: Path, ids: Sequence[int], *, parts: int = 2, names: Any = None, **columns: Any
) -> str:
    """Write a folder of labels, its rows divided over files."""
    folder.mkdir()
    table = pa.table({"id": pa.array(ids, pa.int64())} | columns)
    if names is not None:
        table = table.replace_schema_metadata({METADATA: json.dumps({"names": names})})
    size = -(-len(ids) // parts)
    for number in range(parts):
        pq.write_table(table.slice(number * size, size), folder / f"part-{number}.parquet")
    return str(folder)


def opened(folders: list[str], rows: AnyUnlabeled) -> StoredLabels:
    lay_out_labels(folders, rows, NAMES)
    return open_stored_labels(folders, rows, NAMES)


def soft(seed: int, ids: Sequence[int]) -> np.ndarray:
    drawn = np.random.default_rng(seed).dirichlet([1, 1, 1], len(ids))
    return np.asarray(drawn, np.float32)


@pytest.mark.parametrize("streaming", [True, False])
def test_means_over_folders(tmp_path: Path, streaming: bool) -> None:
    rows = open_rows(tmp_path / "rows", streaming)
    first, second, third = [7, 3, 29, 0, 11], [0, 3, 4, 29], [3, 5, 29]
    a, b = soft(0, first), soft(1, second)
    folders = [
        write(tmp_path / "a", first, probabilities=list(a)),
        # Its classes stand in another order.
        write(
            tmp_path / "b", second, probabilities=list(b[:, [2, 0, 1]]), names=["owl", "cat", "dog"]
        ),
        write(tmp_path / "c", third, label=["dog", "cat", None], confidence=[0.5, 0.75, 0.25]),
    ]
    stored = opened(folders, rows)
    assert stored.count == 7
    ids = np.asarray([3, 4, 5, 6, 29], np.int64)
    found = stored.take(ids)
    dog = np.eye(3)[1]
    expected = np.stack(
        [(a[1] + b[1] + dog) / 3, b[2], np.eye(3)[0], np.zeros(3), (a[2] + b[3]) / 2]
    )
    np.testing.assert_allclose(found["probabilities"], expected, atol=2e-3)
    best = expected.argmax(axis=1)
    of_three = [a[1].argmax() == best[0], b[1].argmax() == best[0], best[0] == 1]
    of_two = [a[2].argmax() == best[4], b[3].argmax() == best[4]]
    agreement = [np.mean(of_three), 1, 1, 0, np.mean(of_two)]
    np.testing.assert_allclose(found["agreement"], agreement, atol=1e-6)
    sure = (a[1][best[0]] + b[1][best[0]] + 0.5 * (best[0] == 1)) / 3
    confidence = [sure, b[2].max(), 0.75, 0, expected[4].max()]
    np.testing.assert_allclose(found["confidence"], confidence, atol=2e-3)


def test_numbers_of_classes_stand_for_their_names(tmp_path: Path) -> None:
    rows = open_rows(tmp_path / "rows", True)
    stored = opened([write(tmp_path / "a", [2, 1], label=[2, 0])], rows)
    found = stored.take(np.asarray([1, 2]))
    assert found["probabilities"].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert found["confidence"].tolist() == [1, 1]


def _refused(folder: str, rows: AnyUnlabeled) -> str:
    with pytest.raises(DataError) as raised:
        opened([folder], rows)
    return str(raised.value)


@pytest.mark.parametrize("streaming", [True, False])
def test_what_does_not_fit_is_named(tmp_path: Path, streaming: bool) -> None:
    rows = open_rows(tmp_path / "rows", streaming)
    cases: list[tuple[str, dict[str, Any], list[int]]] = [
        ("id 30 is of no row", {"label": ["cat", "dog"]}, [3, 30]),
        ("id -1 is of no row", {"label": ["cat", "dog"]}, [3, -1]),
        ("id 3 occurs twice", {"label": ["cat", "dog"]}, [3, 3]),
        ("'cow' is none of the run's classes", {"label": ["cat", "cow"]}, [3, 4]),
        ("7 is none of the run's classes", {"label": [1, 7]}, [3, 4]),
        ("id 4 has 2 probabilities", {"probabilities": [[0, 0, 1], [0, 1]]}, [3, 4]),
        ("id 4 add up to 0.5", {"probabilities": [[0, 0, 1], [0, 0.5, 0]]}, [3, 4]),
        ("id 4 is not within 0 and 1", {"probabilities": [[0, 0, 1], [0, 2.0, -1]]}, [3, 4]),
        ("needs id, and label", {"class": ["cat", "dog"]}, [3, 4]),
        ("no row of", {"label": pa.array([None, None], pa.string())}, [3, 4]),
    ]
    for number, (message, columns, ids) in enumerate(cases):
        folder = write(tmp_path / f"labels-{number}", ids, parts=1, **columns)
        assert message in _refused(folder, rows), message
    (tmp_path / "empty").mkdir()
    assert "holds no Parquet" in _refused(str(tmp_path / "empty"), rows)
    assert "is no folder" in _refused(str(tmp_path / "nowhere"), rows)
    foreign = write(
        tmp_path / "foreign", [1], probabilities=[[0, 0, 1]], parts=1, names=["cat", "dog", "cow"]
    )
    assert "'cow'" in _refused(foreign, rows)
    (tmp_path / "empty" / "part-0.parquet").write_text("not Parquet")
    assert "cannot read" in _refused(str(tmp_path / "empty"), rows)


def _places(rows: Any, ids: list[int]) -> dict[str, Any]:
    described = [rows.index.describe(i).split(", ") for i in ids]
    return {
        "file": [path for path, _, _ in described],
        "row_group": [int(group.split()[-1]) for _, group, _ in described],
        "row": [int(row.split()[-1]) for _, _, row in described],
    }


def test_a_row_that_has_moved_is_named(tmp_path: Path) -> None:
    rows = open_rows(tmp_path / "rows", True)
    ids = [2, 13, 14, 29]
    places = _places(rows, ids)
    right = write(tmp_path / "right", ids, label=["cat"] * 4, **places)
    assert opened([right], rows).count == 4
    for column, value in {"file": "rows-7.parquet", "row_group": 3, "row": 1}.items():
        changed: dict[str, Any] = {
            **places,
            column: [*places[column][:2], value, places[column][3]],
        }
        folder = write(tmp_path / column, ids, label=["cat"] * 4, **changed)
        message = _refused(folder, rows)
        assert "id 14 was" in message
        assert "rows-1.parquet, row group 0, row 0 now" in message
    # A slice numbers its rows as the whole split does.
    part = open_rows(tmp_path / "rows", True, "train[:20]")
    assert opened([right], part).count == 4


def test_a_folder_that_is_not_finished_or_of_other_files(tmp_path: Path) -> None:
    rows: Any = open_rows(tmp_path / "rows", True)
    folder = write(tmp_path / "a", [1, 2], label=["cat", "dog"])
    record = {"parts": 2, "rows": ROWS, "files": rows.index.record()}
    path = Path(folder, RECORD)
    path.write_text(json.dumps(record))
    assert opened([folder], rows).count == 2
    path.write_text(json.dumps(record | {"parts": 3}))
    assert "is not finished, 2 of 3 parts" in _refused(folder, rows)
    files = [list(entry) for entry in record["files"]]
    files[1][2:] = [17, "another footer"]
    path.write_text(json.dumps(record | {"files": files}))
    assert "rows-1.parquet was rewritten" in _refused(folder, rows)
    path.write_text(json.dumps(record | {"files": None, "rows": 31}))
    assert "are of 31 rows" in _refused(folder, rows)


def test_the_layout_is_made_once_and_anew_for_other_labels(tmp_path: Path) -> None:
    rows = open_rows(tmp_path / "rows", True)
    folder = write(tmp_path / "a", [1], label=["cat"], parts=1)
    first = opened([folder], rows)
    laid_out = list((tmp_path / "cache" / "hpdist" / "labels").iterdir())
    opened([folder], rows)
    assert list((tmp_path / "cache" / "hpdist" / "labels").iterdir()) == laid_out
    pq.write_table(
        pa.table({"id": [1, 2], "label": ["dog", "dog"]}), Path(folder, "part-0.parquet")
    )
    second = opened([folder], rows)
    assert second.content != first.content
    assert second.take(np.asarray([1]))["probabilities"].tolist() == [[0, 1, 0]]
