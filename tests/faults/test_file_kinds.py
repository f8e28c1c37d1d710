"""Reading ranges of local files, of object stores and of the Hub, while they fail."""

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
import zipfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from hpdist.data.files.open import (
    FileChangedError,
    FileLostError,
    FileVersion,
    Retry,
    open_file,
    read_range,
    stat,
)
from hpdist.errors import DataError
from tests.support.fault_server import FaultServer, blob_id

SIZE = 1_000_000
CONTENT = random.Random(0).randbytes(SIZE)
QUICK = Retry(deadline=4, first_wait=0.05, max_wait=0.2, stall=0.5)
NAME = "a.bin"


def test_local_files(tmp_path):
    file = tmp_path / NAME
    file.write_bytes(CONTENT)
    for path in (str(file), f"file://{file}"):
        version = stat(path, QUICK)
        assert version == FileVersion(SIZE, str(file.stat().st_mtime_ns))
        assert read_range(path, 10, 500, QUICK, version) == CONTENT[10:500]
        with open_file(path, version, QUICK) as opened:
            assert opened.read() == CONTENT
    for lost in (tmp_path / "none", tmp_path, file / "below", tmp_path / ("x" * 300)):
        with pytest.raises(FileLostError):
            stat(str(lost), QUICK)
        with pytest.raises(FileLostError):
            read_range(str(lost), 0, 1, QUICK)
    with pytest.raises(FileLostError, match="ends at byte"):
        read_range(str(file), 0, SIZE + 1, QUICK)


def test_a_local_file_that_changed(tmp_path):
    file = tmp_path / NAME
    file.write_bytes(CONTENT)
    version = stat(str(file), QUICK)
    os.utime(file, ns=(0, 1))
    for call in (
        lambda: read_range(str(file), 0, 1, QUICK, version),
        lambda: open_file(str(file), version, QUICK),
    ):
        with pytest.raises(FileChangedError):
            call()
    file.write_bytes(CONTENT[:-1])  # damaged: for Parquet to find out
    with open_file(str(file), version, QUICK) as opened:
        assert len(opened.read()) == SIZE - 1
    with pytest.raises(FileChangedError):
        read_range(str(file), 0, 1, QUICK, version)


def test_a_local_file_system_that_fails_for_a_while(tmp_path, monkeypatch):
    file = tmp_path / NAME
    file.write_bytes(CONTENT)
    failures = [OSError(116, "Stale file handle")] * 3
    real = os.stat

    def stale(path, *args, **kwargs):
        if str(path) == str(file) and failures:
            raise failures.pop()
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stale)
    assert read_range(str(file), 0, 10, QUICK) == CONTENT[:10]
    assert not failures


class FlakyStore(MemoryFileSystem):
    """An object store that fails a few times, then sends too little, then all."""

    protocol = "flaky"
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    faults = []  # noqa: RUF012
    calls = 0
    etag = "one"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky:/"))

    def info(self, path, **kwargs):
        return {**super().info(path), "ETag": f'"{type(self).etag}"'}

    def cat_file(self, path, start=None, end=None, **kwargs):
        type(self).calls += 1
        fault = type(self).faults.pop() if type(self).faults else None
        if isinstance(fault, Exception):
            raise fault
        if fault == "hang":
            time.sleep(10)
        data = super().cat_file(path, start, end)
        return data[: len(data) // 2] if fault == "short" else data


@pytest.fixture
def store():
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    FlakyStore.calls, FlakyStore.etag, FlakyStore.faults = 0, "one", []
    FlakyStore().pipe_file("/bucket/a.bin", CONTENT)
    return FlakyStore


def test_an_object_store_is_read_through_its_faults(store):
    path = "flaky://bucket/a.bin"
    version = stat(path, QUICK)
    assert version == FileVersion(SIZE, "one")

    class OwnError(Exception):
        pass

    store.faults = ["short", ConnectionError("reset"), OwnError("slow down"), TimeoutError()]
    assert read_range(path, 10, SIZE, QUICK, version) == CONTENT[10:]
    assert store.calls == 5
    store.etag = "two"
    with pytest.raises(FileChangedError):
        read_range(path, 0, 10, QUICK, version)


def test_an_object_store_that_hangs(store, monkeypatch):
    monkeypatch.setattr("hpdist.data.files.stores._INNER", 0.0)
    store.faults = ["hang"]
    began = time.monotonic()
    assert read_range("flaky://bucket/a.bin", 0, 10, QUICK) == CONTENT[:10]
    assert time.monotonic() - began < 8  # and not as long as it hangs
    store.faults = ["hang"]
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(InterruptedError):
        read_range("flaky://bucket/a.bin", 0, 10, Retry(), stop=stop)


def test_an_object_store_s_large_ranges_come_in_pieces(store, monkeypatch):
    monkeypatch.setattr("hpdist.data.files.stores._PIECE", 100_000)
    store.faults = [None, ConnectionError("reset"), None, None]
    assert read_range("flaky://bucket/a.bin", 50, SIZE, QUICK) == CONTENT[50:]
    assert store.calls == 11


def test_an_object_store_s_refusals_are_final(store):
    store.faults = [PermissionError("Forbidden")]
    with pytest.raises(FileLostError, match="Forbidden"):
        read_range("flaky://bucket/a.bin", 0, 10, QUICK)
    for path in ("flaky://bucket/none", "flaky://bucket"):
        with pytest.raises(FileLostError):
            stat(path, QUICK)
    with pytest.raises(FileLostError, match="ends at byte"):
        read_range("flaky://bucket/a.bin", SIZE - 1, SIZE + 1, QUICK)
    with pytest.raises(DataError, match="cannot be opened"):
        stat("nosuchprotocol://bucket/a.bin", QUICK)


def test_a_file_in_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("in/a.bin", CONTENT)
    path = f"zip://in/a.bin::{tmp_path}/all.zip"
    version = stat(path, QUICK)
    assert version.size == SIZE
    with open_file(path, version, QUICK) as file:
        file.seek(SIZE - 100)
        assert file.read() == CONTENT[-100:]


TOKEN = "hf_SECRETSECRETSECRETSECRET"
HUB = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
import datasets
from hpdist.data.files.open import *
retry = Retry(deadline=6, first_wait=0.05, max_wait=0.2, stall=1)
paths = list(datasets.load_dataset_builder("user/name").config.data_files["train"])
print("PATHS", *paths)
for path in paths:
    version = stat(path, retry)
    print("VERSION", version.size, version.tag)
    print("BYTES", read_range(path, 0, version.size, retry, version).hex())
loose = paths[0].replace("0123456789abcdef0123456789abcdef01234567", "main")
version = stat(loose, retry)
print("LOOSE", version.tag, len(read_range(loose, 0, 4, retry, version)))
try:
    read_range(loose, 0, 4, retry, FileVersion(version.size, "other"))
except FileChangedError as error:
    print("CHANGED", error.found.tag)
import httpx
order = {"name": "retag", "args": {"tag": "other"}}
httpx.post(datasets.config.HF_ENDPOINT + "/_fault", json=order)
known = stat(paths[0], retry)
print("PINNED", len(read_range(paths[0], 0, 4, retry, known)))
httpx.post(datasets.config.HF_ENDPOINT + "/_fault", json={"name": "unlink"})
if sys.argv[1:]:  # what the store behind the Hub says of itself does not count
    print("UNLINKED", len(read_range(loose, 0, 4, retry, version)))
for gone in (paths[0] + "x", "hf://datasets/user/gone/a.parquet"):
    for call in (lambda: stat(gone, retry), lambda: read_range(gone, 0, 4, retry)):
        try:
            call()
        except FileLostError as error:
            print("LOST", error)
"""


@pytest.mark.parametrize("signature", [None, "SECRETSIGNATURE"], ids=["direct", "linked"])
def test_the_hub_s_files_are_read_with_a_token_that_nobody_is_told(tmp_path, signature):
    data = tmp_path / "data"
    data.mkdir()
    for shard in range(2):
        rows = pa.table({"x": range(50), "label": [shard] * 50})
        pq.write_table(rows, data / f"train-0000{shard}-of-00002.parquet")
    files = sorted(data.iterdir())
    with FaultServer(tmp_path, hub="user/name", token=TOKEN, signature=signature) as hub:
        hub.short(path=f"data/{files[0].name}", count=2)
        hub.fail(503, path=f"data/{files[1].name}", count=3)
        home = tmp_path.parent / f"{tmp_path.name}-home"
        env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
        ran = subprocess.run(
            [sys.executable, "-c", HUB, *filter(None, [signature])],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ran.returncode == 0, ran.stderr
    told = {}
    for line in ran.stdout.splitlines():
        key, *values = line.split(" ")
        told.setdefault(key, []).append(values)
    assert told["PATHS"][0] == [
        f"hf://datasets/user/name@0123456789abcdef0123456789abcdef01234567/data/{file.name}"
        for file in files
    ]
    assert told["BYTES"] == [[file.read_bytes().hex()] for file in files]
    sizes = [file.stat().st_size for file in files]
    assert [int(size) for size, _ in told["VERSION"]] == sizes
    tag = told["VERSION"][0][1]
    content = files[0].read_bytes()
    assert tag == (blob_id(content) if signature is None else hashlib.sha256(content).hexdigest())
    assert told["LOOSE"] == [[tag, "4"]]
    assert told["CHANGED"] == [[tag]]
    assert told["PINNED"] == [["4"]]
    assert told.get("UNLINKED") == ([["4"]] if signature else None)
    assert len(told["LOST"]) == 4
    for secret in (TOKEN, "SECRETSIGNATURE"):
        assert secret not in ran.stdout + ran.stderr
    assert all(
        (seen.authorization == f"Bearer {TOKEN}") == seen.host.startswith("127.0.0.1")
        for seen in hub.seen
        if seen.path.endswith(".parquet")
    )
