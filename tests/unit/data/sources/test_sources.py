"""Opening and checking data, on real files and in-memory datasets."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from hpdist.data.config import LabelColumn, Labeled, Unlabeled
from hpdist.data.decode.pixels import ImageSpec
from hpdist.data.kinds import input_spec, spec_of_value
from hpdist.data.sources.labeled import open_test
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.sources.unlabeled_rows import ParquetRows
from hpdist.data.stream import BatchStream
from hpdist.errors import DataError
from tests.support.labeled import open_labeled


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    # Beside the data, not among it, where `datasets` would take its own cache for more files.
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


def picture(row, mode="RGB", width=64, height=48):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(row).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode if mode != "CMYK" else None)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pictures(labels, *, classes=None, **kwargs):
    label = datasets.ClassLabel(names=classes) if classes else None
    columns = {"image": [picture(row, **kwargs) for row in range(len(labels))], "label": labels}
    table = datasets.Dataset.from_dict(columns)
    features = table.features.copy()
    features["image"] = datasets.Image()
    if label:
        features["label"] = label
    return table.cast(features)


def vectors(labels, **columns):
    values = [[float(row), 1.0, 2.0] for row in range(len(labels))]
    return datasets.Dataset.from_dict({"x": values, "label": labels, **columns})


def labeled(table, seed=0, *, num_classes=None, chosen=None, **settings):
    config = Labeled(path="memory", **settings)
    return open_labeled(config, seed, dataset=table, num_classes=num_classes, chosen=chosen)


def refused(*fragments, call):
    with pytest.raises(DataError) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
    return str(caught.value)


def pixels_of(rows, spec, position=0):
    return spec.decode(rows.read(np.asarray([position]))[0])


@pytest.mark.parametrize(
    ("mode", "width", "height"), [("RGB", 64, 48), ("L", 28, 28), ("RGBA", 5, 7)]
)
def test_parquet_images_keep_their_pixels(tmp_path, mode, width, height):
    table = pictures([0, 1, 0], classes=["a", "b"], mode=mode, width=width, height=height)
    table.to_parquet(tmp_path / "rows.parquet")
    rows = open_labeled(Labeled(path="parquet", data_files=str(tmp_path / "*.parquet")), 0)
    spec = input_spec(rows)
    expected = np.asarray(picture(2, mode, width, height)).reshape(height, width, -1)
    assert spec == ImageSpec((expected.shape[2], height, width), "encoded", mode)
    assert np.array_equal(pixels_of(rows, spec, 2).numpy(), expected.transpose(2, 0, 1))
    assert rows.classes.names == ("a", "b")
    assert rows.labels.tolist() == [0, 1, 0]


def test_folder_of_parquet_shards_has_its_splits(tmp_path):
    pictures([0, 1], classes=["a", "b"]).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    pictures([1], classes=["a", "b"]).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    rows = open_labeled(Labeled(path=str(tmp_path)), 0)
    test = open_test(LabelColumn(path=str(tmp_path), split="test"), rows, input_spec(rows))
    assert (len(rows), test.labels.tolist()) == (2, [1])


def test_imagefolder_takes_classes_from_folders_and_matches_them_by_name(tmp_path):
    for row, name in enumerate(["train/cat", "train/dog", "train/owl", "test/dog", "test/owl"]):
        (tmp_path / name).mkdir(parents=True)
        picture(row, "L", 28, 28).save(tmp_path / name / "0.png")
    rows = open_labeled(Labeled(path=str(tmp_path)), 0)
    spec = input_spec(rows)
    assert (rows.classes.names, spec.shape) == (("cat", "dog", "owl"), (1, 28, 28))
    test = open_test(LabelColumn(path=str(tmp_path), split="test"), rows, spec)
    assert test.labels.tolist() == [1, 2]
    assert np.array_equal(pixels_of(test, spec, 1)[0].numpy(), picture(4, "L", 28, 28))
    files = {"train": str(tmp_path / "train" / "*" / "*.png")}
    config = Unlabeled(path="imagefolder", data_files=files, streaming=True)
    stream = BatchStream(open_unlabeled(config, rows, spec), 3, 0, 1, 0, spec)
    assert sorted(next(stream).ids.tolist()) == [0, 1, 2]
    stream.close()


def test_class_labels_are_matched_by_name_in_the_test_split():
    rows = labeled(pictures([0, 1, 2], classes=["cat", "dog", "owl"]))
    spec = input_spec(rows)
    fewer = pictures([1, 0], classes=["dog", "owl"])
    assert open_test(LabelColumn(path="m"), rows, spec, dataset=fewer).labels.tolist() == [2, 1]
    other = pictures([0, 1], classes=["dog", "elk"])
    refused(
        "row 1",
        "none of the 3",
        call=lambda: open_test(LabelColumn(path="m"), rows, spec, dataset=other),
    )


def test_strings_are_sorted_and_the_mapping_holds_for_the_test_split():
    rows = labeled(vectors(["pear", "apple", "fig"]), input="x")
    spec = input_spec(rows)
    assert rows.classes.names == ("apple", "fig", "pear")
    assert rows.labels.tolist() == [2, 0, 1]
    test = open_test(LabelColumn(path="m"), rows, spec, dataset=vectors(["pear"]))
    assert test.labels.tolist() == [2]
    refused(
        "data.test",
        "row 1",
        "'kiwi'",
        "apple, fig, pear",
        call=lambda: open_test(LabelColumn(path="m"), rows, spec, dataset=vectors(["fig", "kiwi"])),
    )


def test_integers_are_the_classes_that_are_there_or_as_the_model_says():
    assert len(labeled(vectors([0, 3, 1]), input="x").classes) == 3
    assert len(labeled(vectors([0, 3, 1]), input="x", num_classes=10).classes) == 10
    refused(
        "data.labeled.label",
        "has 3 classes, but model.num_classes is 2",
        call=lambda: labeled(vectors([0, 3, 1]), input="x", num_classes=2),
    )


def test_number_of_classes_must_match_the_model():
    table = pictures([0, 1], classes=["a", "b"])
    refused("model.num_classes", "2 classes", "5", call=lambda: labeled(table, num_classes=5))


def test_label_column_defaults():
    two = pictures([0, 1], classes=["a", "b"]).rename_column("label", "kind")
    assert labeled(two).label_column == "kind"
    assert (
        labeled(vectors([0]).rename_column("label", "labels"), input="x").label_column == "labels"
    )
    odd = vectors([0]).rename_column("label", "target")
    refused("data.labeled.label", "target", "x", call=lambda: labeled(odd, input="x"))
    refused(
        "data.labeled",
        "row 0",
        "integers or strings",
        call=lambda: labeled(vectors([0.5]), input="x"),
    )


def test_draw_depends_on_the_seed_alone_and_can_be_passed_back():
    table = vectors([row % 5 for row in range(100)])
    first = labeled(table, input="x", labels_per_class=4)
    assert first.chosen == labeled(table, input="x", labels_per_class=4).chosen
    assert first.chosen != labeled(table, 1, input="x", labels_per_class=4).chosen
    assert first.chosen == sorted(set(first.chosen))
    assert np.bincount(first.labels).tolist() == [4] * 5
    again = labeled(table, 1, input="x", labels_per_class=4, chosen=first.chosen)
    assert again.chosen == first.chosen
    assert len(labeled(table, input="x", rows=17).chosen) == 17
    assert len(labeled(table, input="x")) == 100


def test_choices_that_cannot_be_met_are_refused():
    table = pictures([0, 1, 1], classes=["cat", "dog"])
    refused(
        "data.labeled.labels_per_class",
        "'cat' has 1",
        call=lambda: labeled(table, labels_per_class=2),
    )
    refused("data.labeled.rows", "4", "3", call=lambda: labeled(table, rows=4))
    refused("data.labeled.indices", "7", "0 to 2", call=lambda: labeled(table, indices=[0, 7]))
    refused("data.labeled.indices", "-1", call=lambda: labeled(table, indices=[-1]))
    refused("data.labeled.indices", "1 is repeated", call=lambda: labeled(table, indices=[1, 1]))
    refused("recorded choice", "9", call=lambda: labeled(table, chosen=[9]))
    refused("names no rows", call=lambda: labeled(table, chosen=[]))
    refused("holds no rows", call=lambda: labeled(table.select([])))


def test_missing_files_are_named(tmp_path):
    missing = str(tmp_path / "gone")
    refused("data.labeled.path", missing, call=lambda: open_labeled(Labeled(path=missing), 0))
    vectors([0]).to_parquet(tmp_path / "a.parquet")
    files = [str(tmp_path / "a.parquet"), str(tmp_path / "b*.parquet")]
    refused(
        "data.labeled.data_files",
        "b*.parquet",
        call=lambda: open_labeled(Labeled(path="parquet", data_files=files), 0),
    )
    (tmp_path / "empty").mkdir()
    refused(
        "data.labeled", "empty", call=lambda: open_labeled(Labeled(path=str(tmp_path / "empty")), 0)
    )
    (tmp_path / "rot.parquet").write_bytes(b"not parquet at all")
    refused(
        "data.labeled",
        "rot.parquet",
        call=lambda: open_labeled(
            Labeled(path="parquet", data_files=str(tmp_path / "rot.parquet")), 0
        ),
    )


def test_unreachable_hub_id_is_named(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(
        "data.labeled.path",
        "nobody/no-such-data",
        "Hub",
        call=lambda: open_labeled(Labeled(path="nobody/no-such-data"), 0),
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_split_names_those_that_exist(tmp_path, streaming):
    vectors([0]).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    rows = labeled(vectors([0]), input="x")
    config = Unlabeled(path=str(tmp_path), split="dev", streaming=streaming)
    refused(
        "data.unlabeled.split",
        "dev",
        "train",
        call=lambda: open_unlabeled(config, rows, input_spec(rows)),
    )


def test_unknown_and_unusable_columns_name_those_that_exist():
    table = vectors([0, 1], note=["a", "b"])
    refused("data.labeled.input", "'y'", "x, label, note", call=lambda: labeled(table, input="y"))
    refused(
        "data.labeled.label",
        "'y'",
        "x, label, note",
        call=lambda: labeled(table, input="x", label="y"),
    )
    refused(
        "data.labeled.input",
        "'note'",
        "string",
        "candidates: x",
        call=lambda: labeled(table, input="note"),
    )


def test_default_input_needs_exactly_one_image_column():
    message = refused(
        "data.labeled.input", "no column holds images", call=lambda: labeled(vectors([0]))
    )
    assert "the columns are x (lists)" in message
    table = pictures([0])
    both = table.map(
        lambda row: {"other": row["image"]},
        features=datasets.Features({**table.features, "other": datasets.Image()}),
    )
    refused("2 columns hold images", "other (images)", call=lambda: labeled(both))


def test_iterable_labeled_rows_and_transforms_are_refused():
    table = vectors([0])
    refused("data.labeled", "IterableDataset", call=lambda: labeled(table.to_iterable_dataset()))
    refused("transform", call=lambda: labeled(table.with_transform(lambda rows: rows), input="x"))


@pytest.mark.parametrize("untyped", ["struct", "binary"])
def test_images_without_the_image_type(tmp_path, untyped):
    data = [png(picture(row)) for row in range(2)]
    values = [{"bytes": one, "path": None} for one in data] if untyped == "struct" else data
    table = datasets.Dataset.from_dict({"photo": values, "label": [0, 1]})
    table.to_parquet(tmp_path / "rows.parquet")
    config = Labeled(path="parquet", data_files=str(tmp_path / "rows.parquet"))
    rows = open_labeled(config, 0)
    assert rows.column == "photo"
    pixels = pixels_of(rows, input_spec(rows), 1).numpy()
    assert np.array_equal(pixels, np.asarray(picture(1)).transpose(2, 0, 1))


def test_other_modes_follow_the_first_row_in_use():
    table = datasets.Dataset.from_dict(
        {
            "image": [picture(0), picture(1, "L"), picture(2, "RGBA"), picture(3).quantize(8)],
            "label": [0, 0, 1, 1],
        },
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        ),
    )
    rows = labeled(table)
    spec = input_spec(rows)
    assert {tuple(pixels_of(rows, spec, row).shape) for row in range(4)} == {(3, 48, 64)}
    assert input_spec(labeled(table.select([3]))).mode == "RGB"
    assert input_spec(labeled(table.select([2]))).mode == "RGBA"


def test_sixteen_bit_grey_keeps_its_upper_byte_and_floats_are_refused():
    deep = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    spec = spec_of_value(png(Image.fromarray(deep)), None)
    assert np.array_equal(spec.decode(png(Image.fromarray(deep)))[0].numpy(), deep >> 8)
    buffer = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="32-bit float"):
        spec_of_value(buffer.getvalue(), None)


def test_exif_orientation_is_applied():
    image, exif = picture(0, "L", 30, 20), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert spec_of_value(buffer.getvalue(), None).shape == (1, 30, 20)


def test_sizes_must_agree_or_be_resized():
    table = datasets.Dataset.from_dict(
        {"image": [picture(0), picture(1, width=32, height=40)], "label": [0, 1]}
    )
    rows = labeled(table)
    values = rows.read(np.arange(2))
    refused(
        "row 1",
        "3x40x32",
        "3x48x64",
        "views.size",
        call=lambda: input_spec(rows).decode_rows(values, [0, 1], rows.name),
    )
    resized = input_spec(rows, size=16).decode_rows(values, [0, 1], rows.name)
    assert resized.shape == (2, 3, 16, 16)
    expected = np.asarray(picture(0).resize((16, 16), Image.Resampling.BILINEAR))
    assert np.abs(resized[0].numpy().astype(int) - expected.transpose(2, 0, 1)).max() <= 2


def test_a_test_split_of_another_shape_is_refused_before_training():
    rows = labeled(pictures([0, 1], classes=["a", "b"]))
    other = pictures([0], classes=["a", "b"], width=10, height=10)
    refused(
        "data.test",
        "row 0",
        "3x10x10",
        "3x48x64",
        call=lambda: open_test(LabelColumn(path="m"), rows, input_spec(rows), dataset=other),
    )


@pytest.mark.parametrize(
    ("shape", "feature", "expected"),
    [
        ((4, 5), datasets.Array2D((4, 5), "uint8"), (1, 4, 5)),
        ((4, 5, 3), datasets.Array3D((4, 5, 3), "uint8"), (3, 4, 5)),
        ((3, 4, 5), datasets.Array3D((3, 4, 5), "int64"), (3, 4, 5)),
        ((4, 5), datasets.List(datasets.List(datasets.Value("int32"))), (1, 4, 5)),
        ((7,), datasets.List(datasets.Value("float64"), length=7), (7,)),
        ((7,), datasets.List(datasets.Value("uint8")), (7,)),
    ],
)
def test_numeric_arrays(tmp_path, shape, feature, expected):
    values = np.random.default_rng(0).integers(0, 256, (3, *shape))
    table = datasets.Dataset.from_dict(
        {"x": [value.tolist() for value in values], "label": [0, 1, 2]},
        features=datasets.Features({"x": feature, "label": datasets.Value("int64")}),
    )
    table.to_parquet(tmp_path / "rows.parquet")
    config = Labeled(path="parquet", data_files=str(tmp_path / "rows.parquet"), input="x")
    rows = open_labeled(config, 0)
    spec = input_spec(rows)
    assert spec.shape == expected
    value = values[2] if shape != (4, 5, 3) else values[2].transpose(2, 0, 1)
    assert np.array_equal(pixels_of(rows, spec, 2).numpy(), value.reshape(expected))


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ([[[0, 1], [2, 3]], [[0, 256], [1, 1]]], "0..255"),
        ([[[0, 1], [2, 3]], [[0, 1], [2]]], "differ in length"),
        ([[[0, 1], [2, 3]], None], "null"),
        ([[[0, 1], [2, 3]], [[0, None], [1, 1]]], "nulls"),
        ([[0.0, 1.0], [0.0, float("nan")]], "NaN"),
        ([[0.0, 1.0], [0.0, 1.0, 2.0]], "is 3, the first labelled row's is 2"),
    ],
)
def test_bad_arrays_name_the_row(values, cause):
    rows = labeled(datasets.Dataset.from_dict({"x": values, "label": [0, 1]}), input="x")
    spec = input_spec(rows)
    refused(
        "data.labeled",
        "row 1",
        cause,
        call=lambda: spec.decode_rows(rows.read(np.arange(2)), [0, 1], rows.name),
    )


def test_streamed_rows_read_the_input_column_alone_with_file_order_ids(tmp_path):
    for shard in range(2):
        part = vectors([0] * 5, bad=[f"{shard}{row}" for row in range(5)])
        part.map(lambda row, s=shard: {"x": [row["x"][0] + 5 * s, 1.0, 2.0]}).to_parquet(
            tmp_path / f"train-0000{shard}-of-00002.parquet"
        )
    rows = labeled(vectors([0]), input="x")
    config = Unlabeled(path=str(tmp_path), streaming=True, shuffle_window="1KiB")
    stream = open_unlabeled(config, rows, input_spec(rows))
    assert isinstance(stream, ParquetRows)
    reader = stream.reader(0, 10)
    read = reader.read(0, 10, 0, 10)
    reader.close()
    assert read.table.column_names == ["x"]
    values = dict(zip(read.ids.tolist(), read.table["x"].to_pylist(), strict=True))
    assert {row: value[0] for row, value in values.items()} == {i: float(i) for i in range(10)}


def test_unlabeled_objects_of_both_kinds():
    rows = labeled(vectors([0, 1]), input="x")
    spec = input_spec(rows)
    config = Unlabeled(path="memory")
    assert len(open_unlabeled(config, rows, spec, dataset=vectors([0, 1]))) == 2
    generated = datasets.IterableDataset.from_generator(lambda: ({"x": [1.0, 2, 3]} for _ in "ab"))
    stream = open_unlabeled(config, rows, spec, dataset=generated)
    reader = stream.reader(0, 2)
    assert sorted(reader.read(0, 2, 0, 2).ids.tolist()) == [0, 1]
    reader.close()
    empty = datasets.IterableDataset.from_generator(lambda: iter(()))
    refused(
        "data.unlabeled",
        "holds no rows",
        call=lambda: open_unlabeled(config, rows, spec, dataset=empty),
    )
