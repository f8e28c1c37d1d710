"""Checkpoints that people have touched: what is not as hpdist writes it is passed over, or kept."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpdist.checkpoint.manifest import digest_of, list_checkpoints
from hpdist.errors import CheckpointError, DataError
from hpdist.train.trainer import Trainer
from tests.support.fault_table import Fault
from tests.support.parquet_files import write_numbers


def trainer(folder: Path, steps: int) -> Trainer:
    files = {"path": "parquet", "data_files": str(folder / "data/*.parquet"), "input": "x"}
    return Trainer(
        {"name": "mlp", "hidden": [4]},
        {"name": "fixmatch", "threshold": 0.2},
        labeled={**files, "rows": 12},
        unlabeled={**files, "streaming": True},
        views={"name": "identity"},
        batch={"labeled": 4, "unlabeled": 8},
        optim={"lr": 0.001},
        run={"dir": str(folder), "name": "run"},
        tracker={"name": "none"},
        checkpoint={"every": 2, "keep": 2},
        steps=steps,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    write_numbers(folder / "data", [[17, 9], [40]])
    trainer(folder, 4).fit()
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def newest_of(folder: Path) -> Path:
    return folder / "run/checkpoints/step-00000004"


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest as a forger would, with a digest that fits."""
    facts = json.loads((path / "manifest.json").read_text())
    del facts["digest"]
    change(facts)
    digest = digest_of(facts)
    (path / "manifest.json").write_text(json.dumps({**facts, "digest": digest}))


def names_a_file(name: str) -> Callable[[Path], None]:
    """Have the manifest name one more file, with the size and hash of an empty one."""
    entry = {
        "bytes": 0,
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    return lambda path: rewrite(path, lambda facts: facts["files"].update({name: entry}))


def replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Have something else lie in a file's place."""

    def harm(path: Path) -> None:
        (path / name).rename(path.parent.parent / f"moved-{name}")
        make(path / name)

    return harm


def link_out(path: Path) -> None:
    path.symlink_to(path.parent.parent.parent / f"moved-{path.name}")


def set_fact(keys: str, value: Any) -> Callable[[Path], None]:
    def change(facts: dict[str, Any]) -> None:
        *outer, last = keys.split("/")
        for key in outer:
            facts = facts[key]
        facts[last] = value

    return lambda path: rewrite(path, change)


def write_manifest(text: str) -> Callable[[Path], None]:
    return lambda path: (path / "manifest.json").write_text(text) and None


DEEP = "[" * 100_000 + "]" * 100_000
RANK = "rank-00000.safetensors"
HARMS = {
    "a list": write_manifest("[1, 2]"),
    "a string": write_manifest('"manifest"'),
    "no text": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00") and None,
    "nested deeply": write_manifest(DEEP),
    "nested deeply inside": write_manifest('{"version": 2, "step": 4, "files": ' + DEEP + "}"),
    "a huge number": write_manifest("9" * 10_000),
    "a version of text": set_fact("version", "2"),
    "a version of a list": set_fact("version", [2]),
    "no version": set_fact("version", None),
    "a step of text": set_fact("step", "4"),
    "another step": set_fact("step", 2),
    "a negative step": set_fact("step", -4),
    "a list of files": set_fact("files", [RANK]),
    "no files": set_fact("files", {}),
    "a file without a size": set_fact(f"files/{RANK}", {"sha256": "0" * 64}),
    "a file with a size of text": set_fact(f"files/{RANK}/bytes", "10"),
    "a hash of a number": set_fact(f"files/{RANK}/sha256", 5),
    "a path outside": names_a_file("../../../data/secret"),
    "an absolute path": names_a_file("/etc/hostname"),
    "a device": names_a_file("/dev/null"),
    "a file of another name": names_a_file("notes.txt"),
    "attempts of text": set_fact("attempts", "7"),
    "infinite seconds": set_fact("seconds", float("inf")),
    "an optimizer of a list": set_fact("optimizer", []),
    "streams of a number": set_fact("streams", 3),
    "a stream without a position": set_fact("streams/unlabeled", {}),
    "a position of text": set_fact("streams/unlabeled/position", "9"),
    "data of nothing": set_fact("data", {}),
    "an identity of a list": set_fact("identity", ["model"]),
    "a manifest that is a pipe": replace("manifest.json", os.mkfifo),
    "a manifest that is a folder": replace("manifest.json", Path.mkdir),
    "a manifest that is a link": replace("manifest.json", link_out),
    "weights that are a pipe": replace(RANK, os.mkfifo),
    "weights that are a device": replace(RANK, lambda path: path.symlink_to("/dev/zero")),
    "weights that are a folder": replace(RANK, Path.mkdir),
    "weights that are a link": replace(RANK, link_out),
}


@pytest.mark.parametrize("kind", HARMS)
def test_what_hpdist_did_not_write_leads_to_the_one_before(
    folder: Path, kind: str, capfd: pytest.CaptureFixture[str], inject: Callable[..., Fault]
) -> None:
    fault = inject("a checkpoint whose manifest or files somebody has changed")
    HARMS[kind](newest_of(folder))
    resumed = trainer(folder, 6)
    assert resumed.step.applied_steps == 2
    resumed.data.close()
    told = capfd.readouterr().err
    (line,) = [line for line in told.splitlines() if "is skipped" in line]
    assert line.startswith("checkpoint step-00000004 is skipped: ")
    assert len(line) < 1000
    fault.survived(steps_repeated=2)


@pytest.mark.parametrize("value", [{}, [1], "text", -1, 10**12, None])
def test_a_stream_whose_order_is_wrong_is_one_clear_error(folder: Path, value: Any) -> None:
    manifest = json.loads((newest_of(folder) / "manifest.json").read_text())
    for key, was in manifest["streams"]["unlabeled"]["order"].items():
        set_fact(f"streams/unlabeled/order/{key}", value)(newest_of(folder))
        with pytest.raises(
            (CheckpointError, DataError), match=r"cannot continue|no usable position"
        ):
            trainer(folder, 6)
        set_fact(f"streams/unlabeled/order/{key}", was)(newest_of(folder))


def test_only_names_that_hpdist_gives_are_checkpoints(folder: Path) -> None:
    checkpoints = folder / "run/checkpoints"
    others = ["step-00000004.bak", "step-99", "step-best", "step-00000004 (copy)", "step-0000000x"]
    for name in others:
        shutil.copytree(newest_of(folder), checkpoints / name)
    (checkpoints / "step-00000099").write_text("a file")
    names = [path.name for path in list_checkpoints(checkpoints)]
    assert names == ["step-00000004", "step-00000002"]
    trainer(folder, 8).fit()
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {*others, "step-00000099", "step-00000006", "step-00000008"}
    for name in others:
        assert (checkpoints / name / RANK).exists()


def test_steps_of_more_digits_are_the_newer_ones(tmp_path: Path) -> None:
    for name in ("step-99999998", "step-100000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100000000", "step-99999998"]


def test_a_checkpoint_that_is_a_link_is_read_and_never_removed(folder: Path) -> None:
    """Somebody moved it to another disk."""
    elsewhere = folder / "archive"
    shutil.move(newest_of(folder), elsewhere)
    newest_of(folder).symlink_to(elsewhere)
    resumed = trainer(folder, 8)
    assert resumed.step.applied_steps == 4
    resumed.fit()
    left = {path.name for path in (folder / "run/checkpoints").iterdir()}
    assert left == {"step-00000004", "step-00000006", "step-00000008"}
    assert (elsewhere / RANK).exists()


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == "step-00000002":
            raise PermissionError(13, "Permission denied", str(path))
        remove(path, *args, **kwargs)

    monkeypatch.setattr("hpdist.checkpoint.reader.shutil.rmtree", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, 6).fit()
    told = [str(w.message) for w in caught if "could not be removed" in str(w.message)]
    assert told
    assert "step-00000002" in told[0]
    assert newest_of(folder).with_name("step-00000006").exists()
