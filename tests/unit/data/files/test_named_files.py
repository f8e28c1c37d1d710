"""Files that rows name: what belongs to the data is read, and nothing else is opened."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hpdist.data.config import Duplicates, LabelColumn, Labeled, Loading, Source, Unlabeled
from hpdist.data.convert import convert
from hpdist.data.decode.decoders import Decoder
from hpdist.data.decode.spec import InputSpec
from hpdist.data.files.named_files import NamedFile, PathRule, server_of
from hpdist.data.kinds import input_spec, spec_of_value
from hpdist.data.kinds.pictures import PictureCounts
from hpdist.data.sources.duplicates import find_duplicates
from hpdist.data.sources.labeled import open_test
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.stream import BatchStream
from hpdist.errors import DataError
from tests.support.fault_server import FaultServer
from tests.support.labeled import open_labeled

SECRET = "the data's own folder"


def picture(number: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Paths that rows of the set in `tmp_path / "set"` must not have opened, by their kind."""
    own, other = tmp_path / "set", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    (other / "secret.png").write_bytes(picture(99))
    os.mkfifo(own / "pipe")
    (own / "folder").mkdir()
    (own / "link.png").symlink_to(other / "secret.png")
    (own / "linked").symlink_to(other)
    (own / ".hidden.png").write_bytes(picture(98))
    with (own / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    (own / "empty.png").touch()
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(own)  # a socket's path is short
        listening.bind("socket")
    secret = str(other / "secret.png")
    return {
        "absolute": secret,
        "above": f"{own}/../other/secret.png",
        "relative": "../other/secret.png",
        "address": f"file://{secret}",
        "capitals": f"FILE://{secret}",
        "chained": f"simplecache::file://{secret}",
        "in an archive": f"zip://secret.png::file://{secret}",
        "link": f"{own}/link.png",
        "linked folder": f"{own}/linked/secret.png",
        "hidden": f"{own}/.hidden.png",
        "device": "/dev/zero",
        "kernel": "/proc/self/environ",
        "pipe": f"{own}/pipe",
        "socket": f"{own}/socket",
        "folder": f"{own}/folder",
        "sparse": f"{own}/sparse.png",
        "empty": f"{own}/empty.png",
        "ftp": "ftp://127.0.0.1:1/secret.png",
        "another host": "http://127.0.0.1:1/secret.png",
        "metadata service": "http://169.254.169.254/latest/",
        "the Hub": "hf://datasets/user/name/secret.png",
        "zero byte": "a\0.png",
        "gone": f"{own}/gone.png",
    }


def table(rows: list[dict[str, Any]]) -> pa.Table:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array([row["image"] for row in rows], kind)}
    if "label" in rows[0]:
        columns["label"] = pa.array([row["label"] for row in rows])
    return pa.table(columns)


def naming(path: str) -> dict[str, Any]:
    return {"image": {"bytes": None, "path": path}}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    pq.write_table(table(rows), folder / f"{name}.parquet", row_group_size=8)
    return {"path": "parquet", "data_files": str(folder / f"{name}.parquet")}


@pytest.fixture
def labeled(tmp_path: Path) -> tuple[Any, InputSpec]:
    rows = [{"image": {"bytes": picture(n), "path": None}, "label": n % 2} for n in range(4)]
    like = open_labeled(Labeled(**write(tmp_path / "labeled", "train", rows)), 0)
    return like, input_spec(like)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_row_that_names_another_file_is_a_bad_one(
    streaming: bool, tmp_path: Path, outside: dict[str, str], labeled: Any
) -> None:
    like, spec = labeled
    own = tmp_path / "set"
    (own / "good").mkdir()
    (own / "good" / "1.png").write_bytes(picture(1))
    good = [str(own / "good" / "1.png"), f"file://{own}/good/1.png", f"{own}/good/../good/1.png"]
    paths = [*good, *outside.values()]
    source = write(own, "rows", [naming(path) for path in paths])
    rows = open_unlabeled(Unlabeled(**source, streaming=streaming), like, spec)
    batches: Iterator[Any] = BatchStream(rows, len(paths), 0, 1, 0, spec)
    batch = next(batches)
    reasons = {row.id: row.reason for row in batch.bad}
    assert sorted(set(range(len(paths))) - reasons.keys()) == [0, 1, 2]
    assert batch.inputs[batch.valid][:, 0, 0, 0].tolist() == [1, 1, 1]
    assert not batch.inputs[~batch.valid].any()
    told = dict(zip(outside, (reasons[place + 3] for place in range(len(outside))), strict=True))
    for kind in ("absolute", "above", "address", "link", "linked folder", "device", "kernel"):
        assert SECRET in told[kind], kind
        assert "data.loading.paths" in told[kind], kind
    for kind in ("ftp", "another host", "metadata service", "the Hub", "chained", "capitals"):
        assert "the data's own server" in told[kind], kind
    for kind, why in {
        "pipe": "a pipe",
        "socket": "a socket",
        "folder": "a folder",
        "sparse": "most_bytes",
        "empty": "empty",
        "gone": "No such file",
    }.items():
        assert why in told[kind], kind


def test_processes_decode_by_the_same_rule(tmp_path: Path, outside: dict[str, str]) -> None:
    own = tmp_path / "set"
    (own / "1.png").write_bytes(picture(1))
    rule = PathRule((str(own.resolve()),))
    spec = spec_of_value(picture(), None)
    paths = [str(own / "1.png"), *outside.values()]
    with Decoder(spec, processes=1) as decoder:
        out, reasons = decoder.decode([NamedFile(path, rule) for path in paths])
    assert sorted(reasons) == list(range(1, len(paths)))
    assert out[0, 0, 0, 0] == 1
    assert not out[1:].any()
    assert all(
        "is not opened here" in why
        for why in spec.decode_valid(
            [{"bytes": None, "path": path} for path in paths], out
        ).values()
    )  # without a rule nothing is


def test_a_labelled_or_measured_row_is_refused_by_name(
    tmp_path: Path, outside: dict[str, str], labeled: Any
) -> None:
    like, spec = labeled
    rows = [{**naming(outside["absolute"]), "label": n} for n in range(2)]
    source = write(tmp_path / "set", "rows", rows)
    with pytest.raises(DataError, match=r"row 0.*tells no input shape: it names the file"):
        input_spec(open_labeled(Labeled(**source), 0))
    with pytest.raises(DataError, match=r"row 0 .*cannot be decoded: it names the file"):
        open_test(LabelColumn(**source), like, spec)
    allowed = Loading(paths=[str(tmp_path / "other")])
    assert input_spec(open_labeled(Labeled(**source), 0, loading=allowed)).shape == (3, 4, 4)
    assert len(open_test(LabelColumn(**source), like, spec, loading=Loading(paths="any"))) == 2


def test_headers_and_duplicates_are_looked_for_in_no_other_file(
    tmp_path: Path, outside: dict[str, str], labeled: Any
) -> None:
    like, spec = labeled
    counts, rule = PictureCounts(), PathRule((str((tmp_path / "set").resolve()),))
    for path in outside.values():
        counts.add(NamedFile(path, rule))
    assert counts.pictures == 0
    secret = [{"image": {"bytes": picture(99), "path": None}, "label": 0}]
    held = {"test": open_test(LabelColumn(**write(tmp_path / "t", "test", secret)), like, spec)}
    good = {"image": {"bytes": picture(3), "path": None}}
    source = write(tmp_path / "set", "rows", [good, *map(naming, outside.values())])
    for loading, found in ((Loading(), 0), (Loading(paths=[str(tmp_path / "other")]), 1)):
        rows = open_unlabeled(Unlabeled(**source), like, spec, loading=loading)
        report = find_duplicates(Duplicates(), held, {"unlabeled": rows})
        assert report.summary["test/duplicates_in_unlabeled"] == found


@pytest.mark.parametrize("nested", [False, True])
def test_no_other_file_is_converted(nested: bool, tmp_path: Path, outside: dict[str, str]) -> None:
    own = tmp_path / "set"
    data = table([{"image": {"bytes": picture(), "path": None}}, naming(outside["absolute"])])
    features: dict[str, Any] = {"image": datasets.Image()}
    if nested:
        lists = pa.array([[row] for row in data["image"].to_pylist()])
        data = pa.table({"image": data["image"][:1].combine_chunks().take([0, 0]), "more": lists})
        features["more"] = datasets.List(datasets.Image())
    schema = datasets.Features(features).arrow_schema
    pq.write_table(data.cast(schema), own / "rows.parquet")
    source = Source(path="parquet", data_files=str(own / "rows.parquet"))
    with pytest.raises(DataError, match="cannot be converted: it names the file"):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    written = convert(source, tmp_path / "out", loading=Loading(paths=[str(tmp_path / "other")]))
    held = pq.read_table(written.files[0])["more" if nested else "image"].to_pylist()[1]
    assert (held[0] if nested else held) == {"bytes": picture(99), "path": "secret.png"}


def test_what_a_listed_folder_links_to_is_the_user_s_own(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "pictures"
    for place in (elsewhere / "dog", folder / "cat"):
        place.mkdir(parents=True)
    (elsewhere / "cat.png").write_bytes(picture(1))
    (elsewhere / "dog" / "1.png").write_bytes(picture(2))
    (folder / "cat" / "1.png").symlink_to(elsewhere / "cat.png")
    (folder / "dog").symlink_to(elsewhere / "dog")
    rows = open_labeled(Labeled(path=str(folder)), 0)
    spec = input_spec(rows)
    assert [spec.decode(value)[0, 0, 0].item() for value in rows.read_split([0, 1])] == [1, 2]
    patterns = Unlabeled(path="imagefolder", data_files=[f"{folder}/*/*.png"], streaming=True)
    batch = next(BatchStream(open_unlabeled(patterns, rows, spec), 2, 0, 1, 0, spec))
    assert sorted(batch.inputs[:, 0, 0, 0].tolist()) == [1, 2]


def test_objects_of_python_name_any_file_but_no_device(
    tmp_path: Path, outside: dict[str, str]
) -> None:
    good = [outside["absolute"], outside["link"]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})

    def opened(path: str, **settings: Any) -> InputSpec:
        made = datasets.Dataset.from_dict(
            {"image": [naming(path)["image"]] * 2, "label": [0, 1]}, features=features
        )
        return input_spec(
            open_labeled(Labeled(path="given"), 0, dataset=made, loading=Loading(**settings))
        )

    for path in good:
        assert opened(path).shape == (3, 4, 4)
        with pytest.raises(DataError, match=SECRET):
            opened(path, paths=[str(tmp_path / "set")])
    for kind in ("device", "pipe", "socket", "kernel", "sparse", "ftp", "chained"):
        with pytest.raises(DataError, match=r"it names|data.loading.most_bytes"):
            opened(outside[kind])


def test_rows_of_a_server_name_what_is_there_and_no_more(tmp_path: Path, labeled: Any) -> None:
    like, spec = labeled
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "1.png").write_bytes(picture(1))
    with FaultServer(folder) as server:
        host = server.url("")
        paths = [
            server.url("1.png"),
            host.replace("http://", "http://a.b@") + "1.png",
            host.replace("127.0.0.1", "localhost") + "1.png",
            str(folder / "1.png"),
            f"file://{folder}/1.png",
        ]
        pq.write_table(table([naming(path) for path in paths]), folder / "rows.parquet")
        config = Unlabeled(path="parquet", data_files=server.url("rows.parquet"), streaming=True)
        rows = open_unlabeled(config, like, spec)
        batch = next(BatchStream(rows, len(paths), 0, 1, 0, spec))
    good = [int(i) for i, fine in zip(batch.ids, batch.valid, strict=True) if fine]
    assert good == [0]


@pytest.mark.parametrize(
    ("address", "server", "below", "beside"),
    [
        ("https://h.org/a/b.parquet", "https://h.org", "https://h.org/x", "https://h.org.evil/x"),
        ("https://h.org/a", "https://h.org", "https://H.org/x", "http://h.org/x"),
        ("s3://bucket/a/b", "s3://bucket", "s3://bucket/c", "s3://bucket2/c"),
        (
            "hf://datasets/user/name@1f0a/a.parquet",
            "hf://datasets/user/name",
            "hf://datasets/user/name@main/i.png",
            "hf://datasets/user/name2/i.png",
        ),
        (
            "hf://datasets/user/name/a",
            "hf://datasets/user/name",
            "zip://i.png::hf://datasets/user/name/i.zip",
            "hf://datasets/user/name/../other/i.png",
        ),
        (
            "https://h.org/a",
            "https://h.org",
            "https://h.org/a b".replace(" ", "%20"),
            "https://h.org\\@e/x",
        ),
    ],
)
def test_addresses_of_a_server(address: str, server: str, below: str, beside: str) -> None:
    assert server_of(address) == server
    rule = PathRule(servers=(server,))
    rule.check_address(below)
    with pytest.raises(ValueError, match="own server"):
        rule.check_address(beside)
    with pytest.raises(ValueError, match="own server"):
        rule.check_address(f"file:///etc/passwd::{below}")


def test_the_whole_disk_is_nobody_s_own_folder(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture())
    with pytest.raises(ValueError, match=SECRET):
        PathRule(("/",), ("/",)).local_path(str(tmp_path / "1.png"))


def test_a_server_has_so_many_seconds_however_little_it_sends(tmp_path: Path) -> None:
    """Each piece is progress, so that by itself it would be waited for without end."""
    (tmp_path / "1.png").write_bytes(bytes(1_000_000))
    with FaultServer(tmp_path) as server:
        server.trickle(16_000)
        rule = PathRule(servers=(server.url(""),), patience=1.0)
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"1\.png' did not come within 1 s"):
            NamedFile(server.url("1.png"), rule).read()
        assert time.monotonic() - began < 20  # all of it takes a minute
        server.heal()
        server.stall()
        with pytest.raises((ValueError, DataError), match=r"did not come|could not be read"):
            NamedFile(server.url("1.png"), rule).read()
