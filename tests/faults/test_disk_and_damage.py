"""Damaged checkpoints are passed over and named; a full disk costs a checkpoint and no more."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpdist.checkpoint.manifest import digest_of, hash_of
from hpdist.distributed.collectives import world_size
from hpdist.errors import CheckpointError, DivergenceError
from hpdist.train.trainer import Trainer
from tests.support.fault_table import Fault, rows_cost, steps_repeated
from tests.support.parquet_files import write_numbers
from tests.support.picture_runs import at_batch, audit_of, train, write_config
from tests.support.pictures import write_pictures
from tests.support.ranks import run_ranks

UNLABELED = 8  # rows a step


def trainer(folder: Path, steps: int, data: Path | None = None, **settings: Any) -> Trainer:
    files = {"path": "parquet", "data_files": str((data or folder) / "data/*.parquet")}
    defaults: dict[str, Any] = {
        "model": {"name": "mlp", "hidden": [8]},
        "algorithm": {"name": "fixmatch", "threshold": 0.2},
        "checkpoint": {"every": 2},
    }
    settings = defaults | settings
    return Trainer(
        settings.pop("model"),
        settings.pop("algorithm"),
        labeled={**files, "input": "x", "rows": 12},
        unlabeled={**files, "input": "x", "streaming": True, "audit": True},
        views={"name": "identity"},
        batch={"labeled": 4, "unlabeled": UNLABELED},
        optim={"lr": 0.001},
        run={"dir": str(folder), "name": "run"},
        log={"every": 1},
        tracker={"name": "none"},
        steps=steps,
        **settings,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_numbers(tmp_path / "data", [[17, 9], [40]])
    return tmp_path


def records(folder: Path) -> list[int]:
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


HARM = {flip: "has a flipped bit", cut: "is cut off", Path.unlink: "is gone"}


def cost_of(folder: Path, steps: int, output: str) -> dict[str, int]:
    """What a run's faults have cost, of rows and of steps."""
    rows = rows_cost(audit_of(folder / "run"), expected=steps * UNLABELED)
    return {**rows, "steps_repeated": steps_repeated(output)}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors", "common.safetensors"])
def test_a_damaged_file_of_any_kind_leads_to_the_one_before(
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    harm: Any,
    inject: Callable[..., Fault],
) -> None:
    trainer(folder, 4).fit()
    before = capfd.readouterr().err
    fault = inject(f"a file of the newest checkpoint {HARM[harm]}")
    harm(folder / "run/checkpoints/step-00000004" / name)
    resumed = trainer(folder, 6)
    assert resumed.step.applied_steps == 2
    told = capfd.readouterr().err
    assert "continuing from" in told
    if not (name == "manifest.json" and harm is Path.unlink):  # then it is no checkpoint at all
        assert "checkpoint step-00000004 is skipped" in told
        assert name in told
    resumed.fit()
    assert records(folder) == [1, 2, 3, 4, 5, 6]
    cost = cost_of(folder, 6, before + told + capfd.readouterr().err)
    assert (cost["rows_lost"], cost["rows_repeated"]) == (0, 0)
    fault.survived(**cost)


def test_where_none_is_whole_nothing_is_begun_anew(folder: Path) -> None:
    trainer(folder, 4).fit()
    for name in ("step-00000002", "step-00000004"):
        flip(folder / "run/checkpoints" / name / "common.safetensors")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* is whole"):
        trainer(folder, 6)
    assert records(folder) == [1, 2, 3, 4]


def test_a_checkpoint_of_the_future_or_of_another_run_is_refused(folder: Path) -> None:
    trainer(folder, 4).fit()
    with pytest.raises(
        CheckpointError, match=r"is of another run .*algorithm.name: fixmatch there"
    ):
        trainer(folder, 6, algorithm={"name": "freematch"})
    with pytest.raises(CheckpointError, match=r"is of another run .*model: "):
        trainer(folder, 6, model={"name": "mlp", "hidden": [9]})
    manifest = folder / "run/checkpoints/step-00000004/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))
    with pytest.raises(CheckpointError, match=r"has format 99.*upgrade hpdist"):
        trainer(folder, 6)


class _Harm:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_a_pickle_in_place_of_a_file_is_not_loaded(
    folder: Path, capfd: pytest.CaptureFixture[str], inject: Callable[..., Fault]
) -> None:
    trainer(folder, 4).fit()
    fault = inject("a pickle with forged hashes in place of a checkpoint's files")
    made = folder / "made by a pickle"
    path = folder / "run/checkpoints/step-00000004"
    for name in ("common.safetensors", "rank-00000.safetensors"):
        (path / name).write_bytes(pickle.dumps(_Harm(made)))
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():  # a forger would see to the hashes
        entry.update(bytes=(path / name).stat().st_size, sha256=hash_of(path / name))
    del manifest["digest"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))
    resumed = trainer(folder, 6)
    assert resumed.step.applied_steps == 2
    resumed.fit()
    assert not made.exists()
    fault.survived(**cost_of(folder, 6, capfd.readouterr().err))


def mount(disk: Path, options: str) -> Iterator[Path]:
    """A file system in memory."""
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    # Lazily: a rank that is about to end may still have a file open there.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    yield from mount(tmp_path / "disk", "size=256k")


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    """A file system for 100 files and folders, and more than enough bytes."""
    yield from mount(tmp_path / "disk", "size=16m,nr_inodes=100")


def test_a_full_disk_costs_checkpoints_and_no_training(
    folder: Path,
    small_disk: Path,
    capfd: pytest.CaptureFixture[str],
    inject: Callable[..., Fault],
) -> None:
    fault = inject("a disk that is full for a while")
    filler = small_disk / "filler"
    training = trainer(small_disk, 12, data=folder)
    fill = training.writer.save

    def save(*arguments: Any, **options: Any) -> None:
        training.writer._join()
        if training.step.applied_steps == 4:  # after the checkpoint of step 2
            filler.write_bytes(b"")
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(bytes(max(free - 4096, 0)))
        if training.step.applied_steps == 8:
            filler.unlink()
        fill(*arguments, **options)

    training.writer.save = save  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.fit()
    told = [str(w.message) for w in caught if "could not be written" in str(w.message)]
    assert told, [str(w.message) for w in caught]
    assert "No space left" in told[0]
    assert "earlier checkpoints are intact" in told[0]
    assert records(small_disk) == list(range(1, 13))  # not one is lost, not one is cut
    kept = sorted(path.name for path in (small_disk / "run/checkpoints").iterdir())
    assert kept == ["step-00000010", "step-00000012"]
    cost = cost_of(small_disk, 12, capfd.readouterr().err)
    assert cost == dict.fromkeys(cost, 0)
    fault.survived(**cost)


def test_a_disk_that_stays_full_is_an_error_at_the_end(folder: Path, small_disk: Path) -> None:
    training = trainer(small_disk, 4, data=folder)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(free - 8192))
    told = r"latest checkpoint could not be written.*No space"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match=told):
            training.fit()


def fill_inodes(disk: Path, but: int = 0) -> None:
    """Make empty files until no more, or only so many more, can be made."""
    folder = disk / "filler"
    folder.mkdir(exist_ok=True)
    made: list[Path] = []
    with suppress(OSError):
        while True:
            (folder / str(len(made))).touch()
            made.append(folder / str(len(made)))
    assert os.statvfs(disk).f_ffree == 0
    for path in made[len(made) - but :]:
        path.unlink()


def train_through_full_inodes(disk: Path, data: Path) -> list[str]:
    """On every rank: what was told of checkpoints, when the last rank finds no inode at step 4."""
    training = trainer(disk, 12, data=data)
    writer, rank, ranks = training.writer, training.step.engine.rank, world_size()
    write = writer._write_own

    def write_own(temporary: Path, *tensors: Any) -> None:
        if rank == ranks - 1 and temporary.name.startswith(".writing-00000004-"):
            while ranks > 1 and not (temporary / "note-00000.json").exists():
                time.sleep(0.01)  # so that the first rank has done its part
            fill_inodes(disk)
        write(temporary, *tensors)

    def free() -> None:
        if rank == ranks - 1:
            shutil.rmtree(disk / "filler")

    writer._write_own = write_own  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught, at_batch(6, free):
        warnings.simplefilter("always")
        training.fit()
    return [str(w.message) for w in caught if "could not be written" in str(w.message)]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_full_inodes_cost_checkpoints_and_no_training(
    folder: Path,
    few_inodes: Path,
    ranks: int,
    capfd: pytest.CaptureFixture[str],
    inject: Callable[..., Fault],
) -> None:
    fault = inject("a disk without free inodes for a while")
    if ranks == 1:
        told = train_through_full_inodes(few_inodes, folder)
    else:
        found = run_ranks(
            ranks, train_through_full_inodes, few_inodes, folder, timeout=90, fresh=True
        )
        told = [line for lines in found for line in lines]
    wanted = f"rank {ranks - 1}: the checkpoint of step 4 could not be written: "
    (line,) = [line for line in told if line.startswith(wanted)]
    assert "No space left" in line
    assert "has no free inodes" in line
    assert "the training continues, earlier checkpoints are intact" in line
    assert records(few_inodes) == list(range(1, 13))
    kept = sorted(path.name for path in (few_inodes / "run/checkpoints").iterdir())
    assert kept == ["step-00000010", "step-00000012"]
    cost = cost_of(few_inodes, 12, capfd.readouterr().err)
    assert cost == dict.fromkeys(cost, 0)
    fault.survived(**cost)


def start_with_few_inodes(config: Path, disk: Path) -> list[tuple[int, list[str]]]:
    """On every rank: how starts ended that found an inode for none, one, … of their files."""
    ended = []
    rank = int(os.environ.get("RANK", "0"))
    for free in range(4):
        if rank == 0:
            fill_inodes(disk, free)
        ended.append(train(config, f"free-{free}", f"--run.dir={disk}"))
        assert not list(disk.glob("*/metrics.jsonl"))
        if dist.is_initialized():
            dist.barrier()
        if rank == 0:
            for path in disk.iterdir():
                shutil.rmtree(path)
    return ended


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_start_without_inodes_is_one_clear_error(
    tmp_path: Path, few_inodes: Path, ranks: int
) -> None:
    (tmp_path / "pictures").mkdir()
    config = write_config(tmp_path, write_pictures(tmp_path / "pictures"))
    if ranks == 1:
        ended = [start_with_few_inodes(config, few_inodes)]
    else:
        ended = run_ranks(ranks, start_with_few_inodes, config, few_inodes)
    for free, starts in enumerate(zip(*ended, strict=True)):
        assert [status for status, _ in starts] == [2] * ranks, (free, starts)
        (line,) = [line for _, lines in starts for line in lines]
        assert line.startswith("hpdist: CheckpointError: "), line
        assert str(few_inodes) in line
        assert "has no free inodes" in line


def test_a_read_only_folder_is_refused_before_training(folder: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"cannot write to the run folder.*Read-only"):
        trainer(small_disk, 2, data=folder)


class Collapses(nn.Module):
    """Says class 0 to everything for a while."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.batches, self.first, self.last = 0, first, last

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.layer(inputs / 50)
        if self.training and torch.is_grad_enabled():
            self.batches += 1
        if self.first <= self.batches <= self.last:
            return logits * 0.01 + torch.tensor([20.0, 0.0, 0.0])
        return logits * 0 + inputs[:, :1] % torch.tensor([2.0, 3.0, 5.0]) + logits


COLLAPSE = {"collapse_share": 0.97, "collapse_steps": 3}


def test_collapsed_pseudo_labels_end_the_run_and_are_named(folder: Path) -> None:
    training = trainer(folder, 20, model=Collapses(7, 99), divergence=COLLAPSE)
    with pytest.raises(DivergenceError, match=r"collapsed: since step [78] one class has 100"):
        training.fit()


def test_a_rollback_goes_on_from_before_with_later_rows(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {**COLLAPSE, "on": "rollback"}
    summary = trainer(folder, 12, model=Collapses(7, 10), divergence=settings).fit()
    assert "back at step 6, continuing with the rows that follow" in capfd.readouterr().err
    assert records(folder) == list(range(1, 13))
    assert summary["steps"] == 12
    rows = pq.read_table(folder / "run/audit/rank-00000.parquet").to_pylist()
    used = [(row["epoch"], row["id"]) for row in rows]
    assert len(set(used)) == len(used), "no row is used twice in an epoch"
    attempts = sorted({row["attempt"] for row in rows})
    assert attempts == list(range(1, len(attempts) + 1))
    assert len(attempts) > 12


def test_without_an_earlier_checkpoint_there_is_no_going_back(folder: Path) -> None:
    settings = {**COLLAPSE, "on": "rollback"}
    training = trainer(folder, 20, model=Collapses(1, 99), divergence=settings)
    with pytest.raises(DivergenceError, match="no earlier checkpoint"):
        training.fit()
