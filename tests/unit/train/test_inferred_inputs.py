"""What a config leaves open of views and columns follows from the labelled rows, and is said."""

import collections
import datetime
import io
import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from hpdist.data.decode.categories import Categories, find_categories
from hpdist.data.kinds import find_input, kind_names
from hpdist.data.views import TableViewsConfig
from hpdist.errors import ConfigError, DataError
from hpdist.train.config import parse
from hpdist.train.input_choice import settle_inputs
from hpdist.train.trainer import Trainer
from tests.support.ranks import run_ranks

ROWS = 40
TABLE = frozenset({"image", "audio", "table"})
TEXT = frozenset({"image", "audio", "text"})
PICTURES = frozenset({"image", "audio"})


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


def picture(number=0):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 20 % 256, 0, 0)).save(out, "PNG")
    return out.getvalue()


def wave():
    soundfile = pytest.importorskip("soundfile")
    out = io.BytesIO()
    soundfile.write(out, np.zeros(80), 8000, format="WAV")
    return out.getvalue()


COLUMNS = {
    "photo": lambda: ([{"bytes": picture(), "path": None}] * ROWS, datasets.Image()),
    "sound": lambda: ([{"bytes": wave(), "path": None}] * ROWS, datasets.Audio(decode=False)),
    "stored": lambda: ([picture()] * ROWS, datasets.Value("binary")),
    "recorded": lambda: ([wave()] * ROWS, datasets.Value("binary")),
    "grid": lambda: ([[[0] * 4] * 4] * ROWS, datasets.Array2D((4, 4), "uint8")),
    "vector": lambda: ([[0.5, 1.0]] * ROWS, datasets.List(datasets.Value("float32"))),
    "news": lambda: ([f"text {row}" for row in range(ROWS)], datasets.Value("string")),
    "id": lambda: (list(range(ROWS)), datasets.Value("int64")),
    "age": lambda: ([row / 3 for row in range(ROWS)], datasets.Value("float32")),
    "year": lambda: ([2000 + row % 9 for row in range(ROWS)], datasets.Value("int64")),
    "member": lambda: ([row % 2 == 0 for row in range(ROWS)], datasets.Value("bool")),
    "city": lambda: (["Rome", "Ulm"] * (ROWS // 2), datasets.Value("string")),
    "kind": lambda: ([0, 1] * (ROWS // 2), datasets.ClassLabel(names=["b", "a"])),
    "day": lambda: ([datetime.date(2020, 1, 1)] * ROWS, datasets.Value("date32")),
}


def table(*names):
    made = {name: COLUMNS[name]() for name in names}
    values = {name: values for name, (values, _) in made.items()}
    found = datasets.Dataset.from_dict(values | {"label": [row % 2 for row in range(ROWS)]})
    features = {name: feature for name, (_, feature) in made.items()}
    return found.cast(datasets.Features(features | {"label": datasets.Value("int64")}))


@pytest.mark.parametrize(
    ("columns", "takes", "kind", "column"),
    [
        ("photo", TABLE, "image", "photo"),
        ("photo news age", TEXT, "image", "photo"),
        ("sound news", PICTURES, "audio", "sound"),
        ("stored", PICTURES, "image", "stored"),
        ("recorded", PICTURES, "audio", "recorded"),
        ("grid", PICTURES, "image", "grid"),
        ("vector", TABLE, "table", "vector"),
        ("news", TEXT, "text", "news"),
        ("news age id", TEXT, "text", "news"),
        ("news", kind_names(), "text", "news"),
        ("age member", TABLE, "table", ("age", "member")),
        ("age", PICTURES, "table", ("age",)),
        ("id age year city kind day", TABLE, "table", ("age", "year", "city", "kind")),
        ("id age news", TABLE, "table", ("age",)),
        ("age year", kind_names(), "table", ("age", "year")),
    ],
)
def test_the_columns_tell_what_the_input_is(columns, takes, kind, column):
    found = find_input(table(*columns.split()), "label", "data.labeled", takes)
    assert (found.kind, found.column) == (kind, column)
    assert f"input: {kind}, the column" in found.lines[0]
    left = {"id", "day", "news"} & set(columns.split()) if kind == "table" else set()
    assert all(any(name in line for line in found.lines[1:]) for name in left)


@pytest.mark.parametrize(
    ("columns", "takes", "said"),
    [
        ("photo sound", PICTURES, r"candidates: photo \(images\), sound \(sound\)"),
        ("vector age", TABLE, r"candidates: vector \(vectors\), age \(numbers\)"),
        ("city age", kind_names(), r"candidates: city \(text\), age \(numbers\)"),
        ("city news", TEXT, r"candidates: city \(text\), news \(text\)"),
        ("day", TABLE, r"no column can be .*: day \(of another kind\); besides .* 'label'"),
        ("id", TABLE, r"every column tells rows apart, as an id does \(id\)"),
    ],
)
def test_where_several_columns_fit_or_none_they_are_listed(columns, takes, said):
    with pytest.raises(DataError, match=r"data\.labeled\.input: .*" + said):
        find_input(table(*columns.split()), "label", "data.labeled", takes)


@pytest.mark.parametrize("name", ["unlabeled", "test"])
def test_a_column_that_another_set_lacks_is_named(tmp_path, name):
    rows = people(24, ("Rome", "Ulm"))
    rows.to_csv(str(tmp_path / "labeled.csv"))
    rows.remove_columns("city").to_csv(str(tmp_path / "more.csv"))
    sets = {"unlabeled": str(tmp_path / "labeled.csv"), name: str(tmp_path / "more.csv")}
    with pytest.raises(DataError, match=rf"^data\.{name}: .* and there is no column 'city' here"):
        Trainer(
            "mlp",
            {"name": "fixmatch"},
            labeled={"path": str(tmp_path / "labeled.csv")},
            **sets,
            batch={"labeled": 8, "unlabeled": 8},
            steps=1,
            run={"dir": str(tmp_path), "name": "run"},
            tracker="none",
        ).fit()


def test_a_text_that_is_another_in_every_row_is_what_a_model_of_text_takes():
    rows = {"note": [f"note {row}" for row in range(40)], "label": [0, 1] * 20}
    with pytest.raises(DataError, match=r"a model of text, such as hf:…, takes 'note' as text"):
        find_input(datasets.Dataset.from_dict(rows), "label", "data.labeled", TABLE)


def test_a_column_of_very_many_texts_is_named_with_a_way_out():
    values = [f"street {row % 101}" for row in range(202)]
    rows = {"street": values, "age": [0.5] * 202, "label": [0, 1] * 101}
    many = datasets.Dataset.from_dict(rows)
    with pytest.raises(DataError, match=r"'street' has 101 different .*such as data.*\[age\]"):
        find_input(many, "label", "data.labeled", TABLE)
    with pytest.raises(DataError, match=r"column 'street' has 101 different texts"):
        find_categories(many, ("street", "age"), "data.labeled")


def settled(dataset, model="mlp", **settings):
    values = {"model": model, "algorithm": "supervised", "steps": 1}
    labeled = {"path": "memory"} | settings.pop("labeled", {})
    config = parse(values | {"data": {"labeled": labeled}} | settings)
    return settle_inputs(config, dataset, {}).config


def test_named_columns_and_options_tell_the_views():
    every = table("photo", "sound", "news", "age", "city")
    for name, kind in {"photo": "image", "sound": "audio", "news": "text"}.items():
        assert settled(every, labeled={"input": name}).views.name == kind
    config = settled(every, labeled={"input": ["age", "city"]})
    assert (config.views.name, config.data.labeled.input) == ("table", ["age", "city"])
    config = settled(table("photo"), views={"weak": {"shift": 0.25}})
    assert (config.views.name, config.views.weak.shift) == ("image", 0.25)
    with pytest.raises(ConfigError, match=r"asks for views\.name: text, which .*weak\.shift"):
        settled(every, views={"weak": {"shift": 0.25}}, labeled={"input": "news"})
    assert settled(table("news", "age"), model="hf:any/text").views.name == "text"
    config = settled(table("age", "city"), views="identity")
    assert (config.views.name, config.data.labeled.input) == ("identity", ["age", "city"])


def test_categories_are_features_and_what_is_none_of_them_is_zero():
    rows = table("age", "city", "kind")
    found = find_categories(rows, ("age", "city", "kind"), "data.labeled")
    assert found is not None
    assert found.features == ("age", "city=Rome", "city=Ulm", "kind=b", "kind=a")
    assert found.groups == (0, 1, 1, 2, 2)
    assert found.encode([2.5, "Ulm", 1]).tolist() == [2.5, 0, 1, 0, 1]
    assert found.encode([2, "Bern", "b"]).tolist() == [2, 0, 0, 1, 0]
    assert found.encode([0, None, None]).tolist() == [0, 0, 0, 0, 0]
    assert np.isnan(found.encode([None, "", -1])[0])
    assert Categories.recorded(json.loads(json.dumps(found.record()))) == found
    with pytest.raises(ValueError, match="it has 2 columns"):
        found.encode([1, "Ulm"])
    assert find_categories(rows, ("age",), "data.labeled") is None
    other = table("age").add_column("city", ["Ulm", "Bern"] * 20).add_column("kind", ["a"] * 40)
    wider = found.widened(other, ("age", "city", "kind"), "data.unlabeled")
    assert wider.names == (None, ("Bern", "Rome", "Ulm"), ("b", "a"))
    said = found.strangers(other, ("age", "city", "kind"), "data.test")
    assert len(said) == 1
    assert "'city' has values that no training row has (Bern) in 20 rows" in said[0]
    with pytest.raises(DataError, match=r"'city' holds text, and column 'age' of data.labeled"):
        found.check(rows.features, ("city", "city", "kind"), "data.test")
    turned = rows.cast_column("kind", datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(DataError, match=r"'kind' is a ClassLabel of a, b, .* categories b, a"):
        found.check(turned.features, ("age", "city", "kind"), "data.test")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_files_and_streams_become_the_same_features(tmp_path, kind, streaming):
    rows = people(24, ("Rome", "Ulm"))
    rows.to_csv(str(tmp_path / "labeled.csv"))
    more = people(30, ("Ulm", "Bern", None), 1).remove_columns("label")
    if kind == "csv":
        more.to_csv(str(tmp_path / "more.csv"))
    else:  # as pandas writes a column of categories
        stored = more.data.table
        coded = stored.column("city").combine_chunks().dictionary_encode()
        stored = stored.set_column(stored.column_names.index("city"), "city", coded)
        pq.write_table(stored, tmp_path / "more.parquet")
    run = Trainer(
        "mlp",
        {"name": "fixmatch"},
        labeled={"path": str(tmp_path / "labeled.csv")},
        unlabeled={
            "path": str(tmp_path / f"more.{kind}"),
            "streaming": streaming,
            "map": "python:tests.unit.train.test_inferred_inputs:older",
        },
        batch={"labeled": 4, "unlabeled": 30},
        run={"dir": str(tmp_path), "name": "run"},
        tracker="none",
        steps=1,
    )
    known = ["Rome", "Ulm"] if streaming else ["Bern", "Rome", "Ulm"]
    assert run.data.spec.names == ("age", *(f"city={name}" for name in known), "member")
    _, batch = run.data.next()
    for row, found in zip(batch.ids.tolist(), batch.inputs.tolist(), strict=True):
        one = more[row]
        city = [float(one["city"] == name) for name in known]
        assert found == pytest.approx([one["age"] + 1, *city, float(one["member"])])
    run.close()


def older(row):
    return row | {"age": row["age"] + 1}


def test_the_strong_view_replaces_the_features_of_one_column_together():
    groups = (0, 1, 1, 1, 2)
    kinds = np.eye(3, dtype=np.float32)[np.arange(64) % 3]
    rows = np.concatenate([np.arange(64.0)[:, None], kinds, np.ones((64, 1))], axis=1)
    config = TableViewsConfig(
        standardize=False, weak={"noise": 0}, strong={"corruption": 0.5, "noise": 0}
    )
    apart = 0
    for own in (groups, ()):
        views = config.build(0, own)
        views.fit([rows.astype(np.float32)])
        x = torch.from_numpy(rows.astype(np.float32))
        strong = views.strong(x, stream="u", step=0, positions=torch.arange(64))
        assert (strong != x).any()
        apart += int((strong[:, 1:4].sum(dim=1) != 1).any())
        if own:
            assert not apart
    assert apart == 1  # without groups a row may be of two categories


def changes(run):
    """The settings in which a run that went on once differs from how it began."""
    return json.loads((run / "config_changes.jsonl").read_text())["settings"]


def people(rows, cities, seed=0):
    drawn = np.random.default_rng(seed)
    columns = {
        "id": list(range(rows)),
        "age": drawn.normal(40, 9, rows).tolist(),
        "city": [cities[row % len(cities)] for row in range(rows)],
        "member": [row % 3 == 0 for row in range(rows)],
        "label": [row % 2 for row in range(rows)],
    }
    return datasets.Dataset.from_dict(columns)


def run_of_people(folder, steps, unlabeled=("Ulm", "Bern"), name="run", **settings):
    Trainer(
        "mlp",
        {"name": "fixmatch", "threshold": 0.4},
        labeled=people(24, ("Rome", "Ulm")),
        unlabeled=people(30, unlabeled, 1).remove_columns("label"),
        test=people(10, ("Rome", "Lima", None), 2),
        batch={"labeled": 4, "unlabeled": 8},
        run={"dir": str(folder), "name": name},
        log={"every": 1},
        tracker="none",
        schedule="constant",
        steps=steps,
        **settings,
    ).fit()
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]


def test_a_table_of_numbers_and_categories_trains_and_goes_on(tmp_path, capfd):
    whole = run_of_people(tmp_path, 4, name="whole")
    said = capfd.readouterr()
    said = said.out + said.err
    assert "table, the columns age, city, member of data.labeled" in said
    assert "as of an id: id;" in said
    assert "a 0 or 1 for every category of city (3); 5 features in all" in said
    assert "column 'city' has no value in 3 rows and values that no training row has (Lima)" in said
    config = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert config["views"]["name"] == "table"
    assert config["data"]["labeled"]["input"] == ["age", "city", "member"]
    kept = json.loads((tmp_path / "whole" / "inputs.json").read_text())
    assert kept["categories"]["names"] == [None, ["Bern", "Rome", "Ulm"], None]
    run_of_people(tmp_path, 2)
    resumed = run_of_people(tmp_path, 4)
    assert [r["loss"] for r in resumed] == [r["loss"] for r in whole]
    assert list(changes(tmp_path / "run")) == ["steps"]
    with pytest.raises(DataError, match="the data is not that of the saved run"):
        run_of_people(
            tmp_path, 6, unlabeled=("Ulm", "Zug", "Brig")
        )  # and no other size of the model


def test_a_folder_of_sound_files_trains_by_itself(tmp_path, capfd):
    soundfile = pytest.importorskip("soundfile")
    for kind, pitch in (("high", 900), ("low", 200)):
        (tmp_path / "sounds" / kind).mkdir(parents=True)
        for row in range(4):
            times = np.arange(1600 + 100 * row) / 8000
            path = tmp_path / "sounds" / kind / f"{row}.wav"
            soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * times), 8000)
    for steps in (1, 2):
        trainer = Trainer(
            "cnn",
            "supervised",
            labeled={"path": str(tmp_path / "sounds")},
            views={"weak": {"shift": 0.01}},  # which images have too
            batch={"labeled": 4},
            run={"dir": str(tmp_path), "name": "run"},
            tracker="none",
            steps=steps,
        )
        assert trainer.data.labeled.classes.names == ("high", "low")
        trainer.fit()
    said = "".join(capfd.readouterr())
    assert "views.seconds: 0.24, by the longest of 8 labelled sounds" in said
    assert "views.seconds: 0.24, as the run began" in said
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["views"]["name"], config["views"]["seconds"]) == ("audio", 0.24)
    assert config["views"]["weak"]["shift"] == 0.01


def pictures(folder: Path, broken=()):
    for kind in ("cat", "dog"):
        (folder / kind).mkdir(parents=True)
        for row in range(3):
            data = picture(row)
            path = folder / kind / f"{row}.png"
            path.write_bytes(data[:40] if f"{kind}/{row}" in broken else data)
    return str(folder)


def picture_run(tmp_path, path, steps=1, **settings):
    return Trainer(
        "cnn",
        "supervised",
        labeled={"path": path},
        batch={"labeled": 2},
        run={"dir": str(tmp_path), "name": "run"},
        tracker="none",
        steps=steps,
        **settings,
    )


def test_labelled_rows_that_cannot_be_decoded_are_all_named_before_the_training(tmp_path):
    path = pictures(tmp_path / "pictures", broken=("cat/0", "dog/0"))
    with pytest.raises(DataError) as caught:
        picture_run(tmp_path, path)
    said = str(caught.value)
    assert "2 labelled rows cannot be decoded: row 0 (" in said
    assert "cat/0.png) of class 'cat': " in said
    assert "dog/0.png) of class 'dog': " in said
    assert "mend them, or leave them out" in said


def test_a_run_that_named_its_views_goes_on_without_the_name(tmp_path):
    path = pictures(tmp_path / "pictures")
    picture_run(tmp_path, path, views="image").fit()
    picture_run(tmp_path, path, steps=2).fit()
    assert list(changes(tmp_path / "run")) == ["steps"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def refused_on_a_rank(folder, path):
    with pytest.raises(DataError) as caught:
        picture_run(Path(folder), path)
    return str(caught.value)


def test_both_ranks_refuse_the_rows_that_either_of_them_finds(tmp_path):
    path = pictures(tmp_path / "pictures", broken=("cat/1", "dog/2"))  # of rank 0 and of rank 1
    said = run_ranks(2, refused_on_a_rank, str(tmp_path), path)
    assert said[0] == said[1]
    assert "2 labelled rows" in said[0]
    assert "cat/1.png) of class 'cat'" in said[0]
    assert "dog/2.png) of class 'dog'" in said[0]


def test_unlooked_labelled_rows_are_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("hpdist.train.first_look.MOST_LABELED", 2)
    path = pictures(tmp_path / "pictures", broken=("dog/2",))
    run = picture_run(tmp_path, path)
    assert "4 of 6 rows were not looked at before the training" in "".join(capfd.readouterr())
    stream = iter(run.data.labeled_stream)
    with pytest.raises(DataError, match=r"row 5 \(.*dog/2\.png\) cannot be decoded"):
        collections.deque(itertools.islice(stream, 3))
    run.close()
