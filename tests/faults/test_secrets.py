"""Files behind a password and a signature: neither gets into anything that a run writes or says."""

import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem

from hpdist import cli
from hpdist.data.config import Source
from hpdist.data.sources.loading import load
from tests.support.fault_server import FaultServer
from tests.support.picture_runs import write_config
from tests.support.pictures import write_pictures

USER, PASSWORD, SIGNATURE = "Us3rUs3rUs3r", "P4ss'w%2Fo-rdP4ssword", "S1gnatureS1gnature"
LOGIN = f"{USER}:P4ss'w/o-rdP4ssword"
SECRETS = [
    *(secret.encode() for secret in (USER, PASSWORD, "rdP4ssword", SIGNATURE)),
    b64encode(LOGIN.encode()),
]


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    write_pictures(tmp_path / "served", [[60], [60]])
    with FaultServer(tmp_path / "served", login=LOGIN, sig=SIGNATURE) as server:
        yield server


def address(server: FaultServer, name: str, password: str = PASSWORD) -> str:
    return f"http://{USER}:{password}@127.0.0.1:{server.port}/{name}?sp=r&sig={SIGNATURE}"


def leaks(*folders: Path, text: str = "") -> list[str]:
    """Where a secret stands in clear, in base64, or percent-encoded."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    lines = [f"output: {line}" for line in text.splitlines() if _has_secret(line.encode())]
    contents = (f"{file}\n".encode() + file.read_bytes() for file in files)
    found = zip(files, contents, strict=True)
    return lines + [str(file) for file, content in found if _has_secret(content)]


def _has_secret(content: bytes) -> bool:
    return any(secret in content for secret in SECRETS)


def start(config: Path, cache: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, whose command line has the secrets too."""
    environment = os.environ | {"HF_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    environment |= {"WANDB_DIR": str(cache), "WANDB_CONFIG_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, "-m", "hpdist", "train", str(config), *overrides],
        env=environment,
        cwd=cache.parent,
        umask=0o022,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("tracker", ["wandb", pytest.param("tensorboard", marks=pytest.mark.slow)])
def test_no_secret_is_in_anything_that_a_run_leaves(server, tmp_path, capfd, tracker):
    bad = {7: b"no image"}
    write_pictures(server.folder, [[60], [60]], values=bad)
    files = [address(server, f"train-0000{n}.parquet") for n in (0, 1)]
    config = write_config(tmp_path, [], rows=120, max_bad_rows=3)
    cache = tmp_path / "cache"
    cache.mkdir()
    given = [
        f"--data.unlabeled.data_files={json.dumps(files)}",
        f"--tracker.name={tracker}",
        "--steps=6",
        "--checkpoint.every=3",
        "--run.name=run",
    ]
    server.fail(503, count=1, path="train-00001.parquet")  # something to log
    done = start(config, cache, *given)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "run"
    assert cli.main(["report", str(run)]) == 0
    assert leaks(run, cache, text=done.stdout + done.stderr) == []
    assert list(cache.rglob("*.npz"))  # the index is kept
    written = (run / "config.yaml").read_text()
    assert f"http://REDACTED@127.0.0.1:{server.port}/train-00000.parquet?REDACTED" in written

    again = start(config, cache, *given, "--steps=8")  # the settings are given anew
    assert again.returncode == 0, again.stderr
    assert "at step 6" in again.stderr
    assert leaks(run, cache, text=again.stdout + again.stderr) == []
    capfd.readouterr()
    assert cli.main(["train", str(run / "config.yaml"), "--run.name=copy"]) == 2
    refusal = capfd.readouterr().err
    assert "data.unlabeled.data_files: a password or signature was replaced" in refusal
    assert {file.stat().st_mode & 0o077 for file in run.rglob("*")} == {0o044, 0o055}  # the umask's


class LockedFiles(AbstractFileSystem):
    """Local files by addresses with a password, which are their names as web addresses are."""

    protocol = "locked"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def info(self, path: str, **options: object) -> dict[str, object]:
        if not os.path.exists(self._own(path)):
            raise FileNotFoundError(path)
        return {"name": path, "type": "file", "size": os.path.getsize(self._own(path))}

    def ls(self, path: str, detail: bool = True, **options: object) -> list[object]:
        return [self.info(path)] if detail else [path]

    def glob(self, path: str, detail: bool = False, **options: object) -> object:
        return {path: self.info(path)} if detail else [path]

    def _open(self, path: str, mode: str = "rb", **options: object) -> object:
        return open(self._own(path), mode)

    def _own(self, path: str) -> str:
        return path.partition("@")[2]


def test_the_cache_of_datasets_keeps_no_secret(tmp_path, monkeypatch):
    """What it downloads it notes with the address."""
    fsspec.register_implementation("locked", LockedFiles, clobber=True)
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(cache / "downloads"))
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "a.parquet")
    url = f"locked://{USER}:{PASSWORD}@{tmp_path}/a.parquet"
    for _ in range(2):  # the second time from the cache
        table = load(Source(path="parquet", data_files=[url]), "data.labeled", streaming=False)
        assert table["x"] == [1, 2]
        assert leaks(cache) == []
    (note,) = cache.glob("downloads/*.json")
    assert json.loads(note.read_text())["url"] == f"locked://REDACTED@{tmp_path}/a.parquet"


ERRORS = {
    "password": ({}, "401|login or a token"),
    "no file": ({}, "404"),
    "columns": ({}, "has other columns"),
    "damaged": ({}, "no Parquet file"),
    "split": ({"split": "nowhere"}, "Unknown split"),
    "table": ({"streaming": False}, "cannot be loaded|404|401"),
    "csv": ({"path": "csv", "streaming": True}, "."),
    "json": ({"path": "json", "streaming": False}, "."),
    "chain": ({"path": "csv", "streaming": True}, "."),
    "unknown setting": ({"data_file": "x"}, "unknown setting"),
    "no setting": ({"data_files": 3}, "."),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_no_error_tells_a_secret(server, tmp_path, capfd, monkeypatch, kind):
    settings, expected = ERRORS[kind]
    names = ["train-00000.parquet", "train-00001.parquet"]
    if kind == "columns":
        pq.write_table(pa.table({"other": [1]}), server.folder / names[1])
    if kind == "damaged":
        (server.folder / names[1]).write_bytes(b"x" * 1000)
    if kind in ("csv", "json", "chain"):
        (server.folder / names[0]).write_bytes(b'"\\x00\xff{,\n"')
    missing = kind in ("no file", "table")
    wrong = "Wr0ngP4ssword" if kind == "password" else PASSWORD
    urls = [address(server, "none.parquet" if missing else name, wrong) for name in names]
    if kind == "chain":
        urls = [f"zip://a.csv::{url}" for url in urls]
    values = {"path": "parquet", "data_files": urls, "streaming": True, **settings}
    config = write_config(tmp_path, [], rows=120)
    overrides = [f"--data.unlabeled={json.dumps(values)}", "--data.loading.patience=1"]
    if kind == "no setting":
        overrides.append(f"--steps={urls[0]}")
    status = cli.main(["train", str(config), "--run.name=run", *overrides, "--print-config"])
    if status == 0:
        status = cli.main(["train", str(config), "--run.name=run", *overrides])
    said = "".join(capfd.readouterr())
    assert status == 2, said
    assert re.search(expected, said), said
    assert leaks(tmp_path / "runs", text=said) == []
    assert "Wr0ngP4ssword" not in said


PROGRAM = """
import sys
import fsspec
from tests.faults.test_secrets import LockedFiles
fsspec.register_implementation("locked", LockedFiles)
from hpdist import Trainer
url, builder, streaming, labeled, runs = sys.argv[1:]
Trainer(
    "mlp",
    labeled={"path": "parquet", "data_files": labeled},
    unlabeled={"path": builder, "data_files": [url], "streaming": streaming == "streaming"},
    batch={"labeled": 4, "unlabeled": 4}, steps=1, run={"dir": runs}, tracker={"name": "none"},
).fit()
"""


@pytest.mark.sampled(rows="builder", columns="streaming", share=0.5)
@pytest.mark.parametrize("builder", ["parquet", "csv", "text"])
@pytest.mark.parametrize("streaming", ["streaming", "table"])
def test_no_traceback_of_a_users_own_program_shows_a_secret(tmp_path, builder, streaming):
    """Python shows what an error was raised from, and libraries word theirs with the address."""
    write_config(tmp_path, [])
    url = f"locked://{USER}:{PASSWORD}@{tmp_path}/none.{builder}"
    paths = [str(tmp_path / "labeled.parquet"), str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, url, builder, streaming, *paths],
        env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert f"FileNotFoundError: locked://REDACTED@{tmp_path}/none" in done.stderr
    assert leaks(tmp_path / "runs", text=done.stdout + done.stderr) == []
