"""Evaluation sees every row exactly once, whatever the number of ranks."""

import datasets
import pytest
import torch
from PIL import Image

from hpdist.data.config import LabelColumn, Labeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources.held_out import evaluation_batches, look_through, summarize_looks
from hpdist.data.sources.labeled import open_test
from hpdist.errors import DataError
from tests.support.labeled import open_labeled


def rows_of(count):
    columns = {
        "x": [[float(row), 0.0] for row in range(count)],
        "label": [row % 3 for row in range(count)],
    }
    config = Labeled(path="memory", input="x")
    return open_labeled(config, 0, dataset=datasets.Dataset.from_dict(columns))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("count", "batch"), [(50, 8), (48, 8), (3, 8), (1, 1), (9, 4)])
def test_every_row_is_valid_once_over_all_ranks(count, batch, world_size):
    rows = rows_of(count)
    spec = input_spec(rows)
    ranks = [
        list(evaluation_batches(rows, spec, batch, rank, world_size)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len({len(part) for batches in ranks for part, _ in batches}) == 1
    assert max(len(part) for batches in ranks for part, _ in batches) <= batch
    seen = []
    for part, valid in (pair for batches in ranks for pair in batches):
        assert valid.dtype == torch.bool
        assert valid.shape == part.ids.shape
        assert part.inputs[:, 0].tolist() == part.ids.tolist()
        assert (part.labels == part.ids % 3).all()
        seen += part.ids[valid].tolist()
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("bad", [{0}, {0, 7, 10}, {3, 4, 5, 6, 7}, set(range(11)) - {9}])
def test_rows_that_cannot_be_decoded_are_left_out_and_told_once(bad, world_size):
    numbers = [None if row in bad else [float(row), 0.0] for row in range(11)]
    labels = [row % 3 for row in range(11)]
    like = rows_of(11)
    spec = input_spec(like)
    numeric = datasets.List(datasets.Value("float64"))
    features = datasets.Features({"x": numeric, "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"x": numbers, "label": labels}, features=features)
    rows = open_test(LabelColumn(path="memory"), like, spec, dataset=table)
    told, seen = [], []
    sizes = set()
    for rank in range(world_size):
        batches = list(evaluation_batches(rows, spec, 4, rank, world_size, told.append))
        sizes.add((len(batches), len(batches[0][0])))
        for part, valid in batches:
            assert part.inputs[valid][:, 0].tolist() == part.ids[valid].tolist()
            seen += part.ids[valid].tolist()
    assert len(sizes) == 1, "ranks that differ wait for each other"
    assert sorted(seen) == sorted(set(range(11)) - bad)
    assert sorted(row.id for row in told) == sorted(bad)


def test_a_picture_is_named_by_its_file_and_what_was_not_looked_at_is_said(tmp_path):
    for number in range(9):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
        if number in (0, 5):
            path.write_bytes(path.read_bytes()[:40])
    paths = [str(tmp_path / f"{number}.png") for number in range(9)]
    table = datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 2] * 3})
    table = table.cast_column("image", datasets.Image())
    like = open_labeled(Labeled(path="memory"), 0, dataset=table.select([1, 2, 3]))
    spec = input_spec(like)
    rows = open_test(LabelColumn(path="memory"), like, spec, dataset=table, where="data.test")
    looks = [look_through(rows, spec, rank, 2) for rank in range(2)]
    said = summarize_looks(rows.name, len(rows), looks)
    assert "2 of 9 rows cannot be decoded and are left out of every score, such as row 0" in said
    assert f"row 0 ({paths[0]}): " in said
    assert "not looked at" not in said
    hurried = [look_through(rows, spec, rank, 2, seconds=0) for rank in range(2)]
    assert [look.looked_at for look in hurried] == [1, 1]
    assert "7 of 9 rows were not looked at" in summarize_looks(rows.name, len(rows), hurried)
    (tmp_path / "8.png").unlink()  # after all, a file may go at any time
    told = []
    list(evaluation_batches(rows, spec, 4, 0, 1, told.append))
    assert [row.id for row in told] == [0, 5, 8]
    for number in range(8):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(
        DataError, match=r"row 0 \(.*0.png\) cannot be decoded: .*none of the other 8 rows"
    ):
        open_test(LabelColumn(path="memory"), like, spec, dataset=table, where="data.test")
