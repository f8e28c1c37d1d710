"""Long-tailed sets: how many rows of every class, which ones, and what is refused."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest

from hpdist.data.config import Labeled, Unlabeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources.labeled import LabeledRows, UnlabeledTable
from hpdist.data.sources.labels import sizes_of, tail
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.sources.unlabeled_rows import MixedRows, row_count
from hpdist.data.stream import BatchStream
from hpdist.errors import ConfigError, DataError, HpdistError
from hpdist.train.config import parse
from hpdist.train.trainer import Trainer
from tests.support.labeled import open_labeled

SIZES = (90, 60, 50, 40)


def table(sizes: tuple[int, ...] = SIZES, label: str = "label") -> datasets.Dataset:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(0).shuffle(labels)
    values = [[float(row), 1.0] for row in range(len(labels))]
    return datasets.Dataset.from_dict({"x": values, label: labels.tolist(), "y": labels.tolist()})


TABLE = table()


def labeled(seed: int = 0, chosen: list[int] | None = None, **settings: Any) -> LabeledRows:
    config = Labeled(path="memory", input="x", **settings)
    return open_labeled(config, seed, dataset=TABLE, chosen=chosen)


def unlabeled(seed: int = 0, data: Any = None, **settings: Any) -> UnlabeledTable:
    like = labeled()
    config = Unlabeled(path="memory", **settings)
    data = TABLE if data is None else data
    rows = open_unlabeled(config, like, input_spec(like), dataset=data, seed=seed)
    assert isinstance(rows, UnlabeledTable)
    return rows


def counts(ids: Any) -> list[int]:
    return np.bincount(np.asarray(TABLE["label"])[np.asarray(ids)], minlength=4).tolist()


@pytest.mark.parametrize(
    ("most", "imbalance", "classes", "expected"),
    [
        (1500, 100, 10, [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]),
        (1000, 10, 4, [1000, 464, 215, 100]),
        (150, 100, 3, [150, 15, 1]),
        (7, 1, 3, [7, 7, 7]),
        (40, 20, 1, [40]),
        (500, 1000, 2, [500, 0]),
    ],
)
def test_sizes_by_the_formula(most: int, imbalance: float, classes: int, expected: list) -> None:
    config = Unlabeled(path="m", imbalance=imbalance)
    assert sizes_of(most, tail(config, classes)).tolist() == expected
    for number in range(classes):
        exact = most * imbalance ** (-number / max(classes - 1, 1))
        assert abs(expected[number] - exact) < 1
    turned = Unlabeled(path="m", imbalance=imbalance, imbalance_reversed=True)
    if classes > 1:
        assert sizes_of(most, tail(turned, classes)).tolist() == expected[::-1]


def test_a_size_that_is_whole_is_not_rounded_down() -> None:
    shares = tail(Unlabeled(path="m", imbalance=8), 100)
    assert (8 * shares)[33] < 4  # as floats have it
    assert sizes_of(8, shares)[33] == 4


def test_labeled_rows_are_drawn_by_the_seed() -> None:
    options = {"labels_per_class": 40, "imbalance": 8}
    rows = labeled(**options)
    assert counts(rows.ids) == [40, 20, 10, 5]
    assert np.bincount(rows.labels).tolist() == [40, 20, 10, 5]
    assert rows.chosen == sorted(set(rows.chosen)) == labeled(**options).chosen
    assert rows.chosen != labeled(1, **options).chosen
    assert labeled(1, **options, chosen=rows.chosen).chosen == rows.chosen
    assert counts(labeled(**options, imbalance_reversed=True).ids) == [5, 10, 20, 40]


def test_without_imbalance_the_same_rows_as_ever() -> None:
    even = labeled(labels_per_class=9)
    assert even.chosen == labeled(labels_per_class=9, imbalance=1).chosen
    generator, picked = np.random.default_rng([0, 0xC401CE]), []
    for number in range(4):
        of_class = np.flatnonzero(np.asarray(TABLE["label"]) == number)
        picked += generator.choice(of_class, 9, replace=False).tolist()
    assert even.chosen == sorted(picked)
    assert unlabeled().ids.tolist() == list(range(240))


def test_unlabeled_rows_are_drawn_by_the_seed() -> None:
    rows = unlabeled(imbalance=8, rows_per_class=80)
    assert counts(rows.ids) == [80, 40, 20, 10]
    assert rows.ids.tolist() == sorted(set(rows.ids.tolist()))
    assert rows.ids.tolist() == unlabeled(imbalance=8, rows_per_class=80).ids.tolist()
    assert rows.ids.tolist() != unlabeled(1, imbalance=8, rows_per_class=80).ids.tolist()
    assert row_count(rows) == 150
    turned = unlabeled(imbalance=8, rows_per_class=40, imbalance_reversed=True)
    assert counts(turned.ids) == [5, 10, 20, 40]


def test_by_default_as_many_as_every_class_allows() -> None:
    assert counts(unlabeled(imbalance=8).ids) == [90, 45, 22, 11]
    assert counts(unlabeled(imbalance=8, imbalance_reversed=True).ids) == [5, 10, 20, 40]
    assert counts(unlabeled(imbalance=1).ids) == [40, 40, 40, 40]
    assert counts(unlabeled(imbalance=1.2).ids) == [48, 45, 42, 40]


def test_labels_are_for_the_draw_alone() -> None:
    rows = unlabeled(imbalance=8, label="y")
    assert rows.dataset.column_names == ["x"]
    spec = input_spec(labeled())
    stream = BatchStream(rows, 7, 0, 1, 0, spec)
    seen = [next(stream) for _ in range(24)]
    stream.close()
    ids = np.concatenate([batch.ids.numpy() for batch in seen])
    assert np.array_equal(np.sort(ids)[:168], np.sort(rows.ids))
    values = np.concatenate([batch.inputs.numpy() for batch in seen])
    assert values[:, 0].tolist() == ids.tolist()
    assert not hasattr(seen[0], "labels")


def test_the_column_of_labels_may_have_another_name() -> None:
    rows = unlabeled(data=table(label="kind"), imbalance=8, label="kind")
    assert counts(rows.ids) == [90, 45, 22, 11]


def refused(*fragments: str, **settings: Any) -> None:
    data = settings.pop("data", None)
    with pytest.raises(DataError) as caught:
        unlabeled(data=data, **settings)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_what_a_table_cannot_give_is_refused() -> None:
    few = Labeled(path="m", input="x", labels_per_class=60, imbalance=2)
    with pytest.raises(DataError, match=r"labels_per_class: 47 asked for, class '1' has 1"):
        open_labeled(few, 0, dataset=table((90, 1, 50, 40)))
    refused(
        "data.unlabeled.rows_per_class: 95 asked for, class '0' has 90",
        imbalance=8,
        rows_per_class=95,
    )
    refused("data.unlabeled.rows_per_class: 5 rows", "imbalance 8", imbalance=8, rows_per_class=5)
    refused("data.unlabeled.imbalance: 90 rows", "class '0' has 90 rows in all", imbalance=100)
    refused("class '3' has 0 rows", imbalance=2, data=table((90, 60, 50)))
    refused("none of the 4 classes", imbalance=2, data=table((9, 9, 9, 9, 9)))
    refused("data.unlabeled.label: there is no column 'kind'", imbalance=2, label="kind")
    refused(
        "data.unlabeled.imbalance: the labels of all rows are needed",
        "datasets.Dataset",
        imbalance=2,
        data=TABLE.to_iterable_dataset(),
    )
    bare = TABLE.remove_columns(["label", "y"])
    refused("data.unlabeled.label: name the column of labels", imbalance=2, data=bare)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("labeled", {"imbalance": 10}, "needs labels_per_class, at least 10"),
        ("labeled", {"imbalance": 10.5, "labels_per_class": 10}, "at least 11"),
        ("labeled", {"imbalance": 0.5, "labels_per_class": 10}, "data.labeled.imbalance: must be"),
        ("labeled", {"imbalance_reversed": True}, "imbalance_reversed is only used with imbalance"),
        ("unlabeled", {"imbalance_reversed": True}, "imbalance_reversed is only used with imb"),
        ("unlabeled", {"label": "kind"}, "label is only used with imbalance; leave it out"),
        ("unlabeled", {"rows_per_class": 9}, "rows_per_class is only used with imbalance"),
        (
            "unlabeled",
            {"imbalance": 9, "streaming": True},
            "which a stream does not tell; set streaming: false",
        ),
        (
            "unlabeled",
            {"imbalance": 9, "path": "", "mix": [{"path": "m"}]},
            "set it in the parts of mix",
        ),
    ],
)
def test_what_a_config_cannot_mean_is_refused(
    section: str, settings: dict[str, Any], message: str
) -> None:
    data = {"labeled": {"path": "m"}, "unlabeled": {"path": "m"}}
    data[section] = data[section] | settings
    values = {"model": {"name": "cnn"}, "algorithm": {"name": "fixmatch"}, "steps": 1}
    with pytest.raises(ConfigError, match=message):
        parse(values | {"data": data})


def test_parts_of_a_mix_have_their_own_tails(tmp_path: Any) -> None:
    TABLE.to_parquet(tmp_path / "rows.parquet")
    source = {"path": "parquet", "data_files": str(tmp_path / "rows.parquet")}
    parts = [source | {"imbalance": 8}, source | {"imbalance": 8, "imbalance_reversed": True}]
    like = labeled()
    rows = open_unlabeled(Unlabeled(mix=parts), like, input_spec(like), seed=3)
    assert isinstance(rows, MixedRows)
    tables = [part for part in rows.parts if isinstance(part, UnlabeledTable)]
    assert [counts(part.ids) for part in tables] == [[90, 45, 22, 11], [5, 10, 20, 40]]


def test_a_run_and_its_resume_use_the_same_rows(tmp_path: Any) -> None:
    def trainer(name: str, steps: int, seed: int = 0, imbalance: float = 8) -> Trainer:
        return Trainer(
            {"name": "mlp", "hidden": [4]},
            "fixmatch",
            labeled=(TABLE, {"input": "x", "labels_per_class": 40, "imbalance": 8}),
            unlabeled=(TABLE, {"input": "x", "imbalance": imbalance}),
            addons=[{"name": "logit_adjustment"}],
            batch={"labeled": 4, "unlabeled": 8},
            views={"name": "identity"},
            steps=steps,
            run={"dir": str(tmp_path), "name": name, "seed": seed},
            tracker={"name": "none"},
        )

    first, other = trainer("first", 1), trainer("other", 1, seed=1)
    rows, others = first.data.unlabeled, other.data.unlabeled
    assert isinstance(rows, UnlabeledTable)
    assert isinstance(others, UnlabeledTable)
    assert counts(rows.ids) == counts(others.ids) == [90, 45, 22, 11]
    assert rows.ids.tolist() != others.ids.tolist()
    assert rows.ids.tolist() == unlabeled(imbalance=8).ids.tolist()
    algorithm = first.step.algorithm
    assert algorithm.rows == 168
    assert algorithm.class_counts is not None
    assert algorithm.class_counts.tolist() == [40, 20, 10, 5]
    first.fit()
    again = trainer("first", 2).data.unlabeled
    assert isinstance(again, UnlabeledTable)
    assert again.ids.tolist() == rows.ids.tolist()
    with pytest.raises(HpdistError, match="other rows"):
        trainer("first", 2, imbalance=4)
