"""Datasets written once as Parquet: every row and feature kept, in small checked row groups."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from hpdist import cli
from hpdist.data.config import Source, Unlabeled
from hpdist.data.convert import Layout, convert
from hpdist.data.files.open import Retry
from hpdist.data.sources import loading
from hpdist.data.stream.index_build import build_index
from hpdist.data.stream.parquet import ParquetReader
from hpdist.errors import ConfigError, DataError
from hpdist.train.config import load

KIB = 2**10
VECTOR = datasets.List(datasets.Value("float32"))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)


def json_lines(folder, rows, files=1, size=20):
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    for number in range(files):
        lines = [
            json.dumps({"x": [row, 0.5], "text": "word " * (size // 5), "n": row, "junk": junk})
            for row, junk in ((row, noise.bytes(8).hex()) for row in range(number, rows, files))
        ]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return Source(path="json", data_files=str(folder / "*.jsonl"), input="x")


def groups_of(files):
    for file in files:
        metadata = pq.ParquetFile(file).metadata
        for number in range(metadata.num_row_groups):
            yield metadata.row_group(number)


def reopened(written, streaming=False):
    files = [str(file) for file in written.files]
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)


def test_every_row_and_column_in_order(tmp_path):
    source = json_lines(tmp_path / "in", 1000, files=3)
    written = convert(source, tmp_path / "out", layout=Layout(8 * KIB, 30, 6 * KIB))
    assert (written.rows, written.input) == (1000, "x")
    names = [file.name for file in written.files]
    count = len(names)
    assert count > 1
    assert names == [f"train-{n:05}-of-{count:05}.parquet" for n in range(count)]
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert written.bytes == sum(file.stat().st_size for file in written.files)
    original = datasets.load_dataset(
        "json", data_files=source.data_files, split="train", streaming=True
    )
    assert list(reopened(written, streaming=True)) == list(original)
    assert written.groups == len(list(groups_of(written.files)))
    assert all(file.stat().st_size < 3 * 6 * KIB for file in written.files)


@pytest.mark.parametrize(
    ("row_bytes", "rows", "low", "high"),
    [(50, 5500, 1000, 1000), (2 * KIB, 600, 100, 140), (400 * KIB, 6, 1, 1)],
)
def test_row_groups_are_small(row_bytes, rows, low, high, tmp_path):
    written = convert(json_lines(tmp_path / "in", rows, size=row_bytes), tmp_path / "out")
    sizes = [group.num_rows for group in groups_of(written.files)]
    assert sum(sizes) == rows
    assert max(sizes) <= high, sizes
    assert min(sizes[:-1]) >= low, sizes
    assert len(written.files) == 1


def typed_rows(folder, rows=70):
    """Rows of every kind that a stream may hold, some of them null, as a Parquet dataset."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "pixels": datasets.Array2D((2, 3), "uint8"),
            "words": datasets.List(datasets.Value("string")),
            "frames": datasets.List(datasets.Image()),
        }
    )
    noise = np.random.default_rng(0)

    def picture():
        return Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8))

    table = datasets.Dataset.from_list(
        [
            {
                "image": picture() if row % 7 else None,
                "label": row % 2,
                "pixels": np.full((2, 3), row, np.uint8),
                "words": ["a"] * (row % 4),
                "frames": [picture()] * (row % 2),
            }
            for row in range(rows)
        ],
        features=features,
    )
    table.to_parquet(str(folder / "typed.parquet"))
    return table, Source(path="parquet", data_files=str(folder / "typed.parquet"))


def test_the_features_are_those_of_the_dataset(tmp_path):
    table, source = typed_rows(tmp_path)
    written = convert(source, tmp_path / "out")
    again = reopened(written)
    assert again.features == table.features
    assert written.input == "image"
    undecoded = [t.with_format("arrow")[:].to_pylist() for t in (again, table)]
    assert undecoded[0] == undecoded[1]


def test_images_named_by_their_path_are_put_into_the_files(tmp_path):
    noise = np.random.default_rng(0)
    for name in "abc":
        place = tmp_path / "photos" / "cat" / f"{name}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(place)
    stored = [(tmp_path / f"photos/cat/{name}.png").read_bytes() for name in "abc"]
    written = convert(Source(path=str(tmp_path / "photos")), tmp_path / "out")
    (tmp_path / "photos").rename(tmp_path / "gone")
    rows = reopened(written).with_format("arrow")[:]["image"].to_pylist()
    assert [row["bytes"] for row in rows] == stored
    assert [row["path"] for row in rows] == ["a.png", "b.png", "c.png"]


def test_only_what_shrinks_is_compressed_and_footers_hold_no_rows(tmp_path):
    _, source = typed_rows(tmp_path)
    written = convert(source, tmp_path / "out")
    (group,) = groups_of(written.files)
    columns = [group.column(number) for number in range(group.num_columns)]
    compression = {column.path_in_schema: column.compression for column in columns}
    assert compression["image.bytes"] == "UNCOMPRESSED"
    assert compression["label"] == "ZSTD"
    assert not any(column.is_stats_set for column in columns)


def test_damage_is_noticed(tmp_path):
    _, source = typed_rows(tmp_path)
    written = convert(source, tmp_path / "out")
    content = bytearray(written.files[0].read_bytes())
    content[len(content) // 2] ^= 1
    written.files[0].write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(written.files[0], page_checksum_verification=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"data.unlabeled \(json.*\): "),
        ('{"x": [1]}\n' * 100 + '{"x": [', r"data.unlabeled \(json.*reading failed"),
    ],
)
def test_a_source_that_cannot_be_read_leaves_nothing(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    source = Source(path="json", data_files=str(tmp_path / "a.jsonl"), input="x")
    with pytest.raises(DataError, match=message):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_a_source_that_fails_midway_leaves_nothing(tmp_path):
    source = json_lines(tmp_path / "in", 500, files=2)
    (tmp_path / "in" / "1.jsonl").write_text("no JSON\n")
    with pytest.raises(DataError, match=r"after row \d+, in the next 32 rows \(of .*/1.jsonl\): "):
        convert(source, tmp_path / "out", layout=Layout(4 * KIB, 20, 8 * KIB))
    assert not list((tmp_path / "out").iterdir())


def test_a_dataset_without_rows_is_refused(tmp_path):
    none = datasets.Dataset.from_dict({"x": []}, features=datasets.Features({"x": VECTOR}))
    none.to_parquet(str(tmp_path / "none.parquet"))
    source = Source(path="parquet", data_files=str(tmp_path / "none.parquet"), input="x")
    with pytest.raises(DataError, match="holds no rows"):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_lost_image_is_named(tmp_path):
    table = datasets.Dataset.from_dict({"image": [{"path": "/no/such.png", "bytes": None}]})
    table = table.cast_column("image", datasets.Image())
    pq.write_table(table.with_format("arrow")[:], tmp_path / "a.parquet")
    source = Source(path="parquet", data_files=str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"rows 0 to 0.* cannot be converted: .*/no/such.png"):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_table_is_converted_without_the_names_of_its_columns(tmp_path):
    """Training finds them, by the labelled rows and the model."""
    (tmp_path / "a.csv").write_text("age,city\n41,Ulm\n42,Rome\n")
    written = convert(Source(path="csv", data_files=str(tmp_path / "a.csv")), tmp_path / "out")
    assert (written.rows, written.input) == (2, None)
    assert "input" not in yaml.safe_load(written.yaml())["data"]["unlabeled"]
    assert reopened(written)[:] == {"age": [41, 42], "city": ["Ulm", "Rome"]}


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    source = json_lines(tmp_path / "in", 100)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(DataError, match=r"out: cannot be written: .*No space left"):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from hpdist.data import convert as module
read = module.read_blocks
def slow(*arguments, **named):
    for number, found in enumerate(read(*arguments, **named)):
        yield found
        if number == 8:
            print("reading", flush=True)
            time.sleep(60)
module.read_blocks = slow
from hpdist.data.config import Source
source = Source(path="json", data_files={files!r}, input="x")
module.convert(source, module.Path({out!r}), layout=module.Layout(4096, 20, 8192))
"""


def test_a_killed_conversion_leaves_no_file_that_looks_whole(tmp_path):
    source = json_lines(tmp_path / "in", 500)
    out = tmp_path / "out"
    script = KILLED.format(tests="tests", files=source.data_files, out=str(out))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGKILL)
    left = list(out.iterdir())
    assert left
    assert not [file for file in left if file.suffix == ".parquet"]
    written = convert(source, out)
    assert written.rows == 500
    assert list(out.iterdir()) == list(written.files)


def test_a_folder_in_use_is_refused(tmp_path):
    source = json_lines(tmp_path / "in", 5)
    written = convert(source, tmp_path / "out")
    before = written.files[0].read_bytes()
    with pytest.raises(ConfigError, match=r"--out: .*out' holds Parquet files already \(train-0"):
        convert(source, tmp_path / "out")
    assert written.files[0].read_bytes() == before
    odd = yaml.safe_load(convert(source, tmp_path / "out[1] *").yaml())["data"]["unlabeled"]
    assert len(loading.load(Unlabeled(**odd), "data.unlabeled", streaming=False)) == 5
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .*file' cannot be used: File exists"):
        convert(source, tmp_path / "file")


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.unfinished").write_text("mine")
    convert(json_lines(tmp_path / "in", 5), tmp_path / "out")
    assert (tmp_path / "out" / "notes.unfinished").read_text() == "mine"


def test_the_stream_reads_every_row_of_it_once_an_epoch(tmp_path):
    source = json_lines(tmp_path / "in", 300)
    written = convert(source, tmp_path / "out", layout=Layout(4 * KIB, 20, 4 * KIB))
    assert len(written.files) > 1
    files = {"train": [str(file) for file in written.files]}
    index = build_index(files, "train", ["n"], "converted", Retry())
    assert (int(index.rows.sum()), len(index.rows)) == (300, written.groups)
    reader = ParquetReader(index, ["n"], "converted", 0, 20)
    epoch = [reader.read(at, 20, 0, 20).table["n"].to_pylist() for at in range(0, 300, 20)]
    reader.close()
    assert sorted(row for batch in epoch for row in batch) == list(range(300))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config whose unlabelled rows are JSON lines, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    json_lines(tmp_path / "in", 50)
    Path("rows.yaml").write_text(
        """
model: {name: mlp}
data:
  labeled: {path: json, data_files: in/0.jsonl, input: x, label: n}
  unlabeled: {path: json, data_files: in/*.jsonl}
algorithm: {name: fixmatch}
steps: 10
"""
    )
    return "rows.yaml"


def test_the_command_prints_the_lines_that_read_what_it_wrote(config, tmp_path, capsys):
    assert cli.main(["convert", config, "--out", "rows", "--data.unlabeled.split", "train"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.startswith(
        "# rows: 50, row groups: 1, files: 1, together 0.0 MB\n# In place of path"
    )
    lines = yaml.safe_load(output.out)
    assert lines["data"]["unlabeled"] == {
        "path": "parquet",
        "data_files": "rows/train-*.parquet",
        "input": "x",
        "streaming": True,
    }
    values = yaml.safe_load(Path(config).read_text())
    values["data"] |= lines["data"]
    Path("new.yaml").write_text(yaml.safe_dump(values))
    source = load("new.yaml").data.unlabeled
    rows = datasets.load_dataset(source.path, data_files=source.data_files, split=source.split)
    assert rows["n"][:] == list(range(50))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows.yaml"], "ConfigError: the following arguments are required: --out"),
        (["--out", "rows"], "ConfigError: the following arguments are required: CONFIG"),
        (["no.yaml", "--out", "rows"], "ConfigError: cannot read the config 'no.yaml'"),
        (["rows.yaml", "--out=rows", "--dry-run"], "ConfigError: --dry-run: no option or setting"),
        (["rows.yaml", "--ot", "rows"], "ConfigError: --ot: no option or setting, did you mean"),
        (["rows.yaml", "--out=rows", "--data.unlabeled=null"], "ConfigError: convert reads the"),
        (
            ["rows.yaml", "--out=rows", "--data.unlabeled.data_files", "none.jsonl"],
            "DataError: data.unlabeled.data_files: nothing matches 'none.jsonl'",
        ),
        (
            ["rows.yaml", "--out=rows", "--data.unlabeled.input", "n"],
            "DataError: data.unlabeled.input: column 'n' holds",
        ),
        (
            ["rows.yaml", "--out=rows", "--data.unlabeled.split", "train[:5]"],
            "DataError: data.unlabeled.split: ",
        ),
        (["rows.yaml", "--out=in/0.jsonl"], "ConfigError: --out: 'in/0.jsonl' cannot be used"),
    ],
)
def test_a_wrong_command_is_one_clear_line(arguments, message, config, capsys):
    assert cli.main(["convert", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(f"hpdist: {message}")
    assert not list(Path().glob("rows/*"))


def test_only_one_process_converts(config, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["convert", config, "--out", "rows"]) == 2
    assert "convert runs on one process" in capsys.readouterr().err


def test_every_flag_of_convert_is_known_where_overrides_are_split_off(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    words = capsys.readouterr().out.partition("options:")[2].split()
    assert {word for word in words if word.startswith("--")} == set(cli.convert.OWN_OPTIONS)
