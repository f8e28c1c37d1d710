"""Checkpoint files: cut and put together anywhere, verified, never half there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hpdist.checkpoint import reader as checkpoint
from hpdist.checkpoint.manifest import list_checkpoints
from hpdist.checkpoint.writer import CheckpointWriter
from hpdist.distributed.fragments import Fragment, Partition, partition
from hpdist.errors import CheckpointError


def save(folder: Path, step: int, keep: int = 2) -> Path:
    weights = {"a": torch.arange(10.0), "b": torch.arange(6.0).view(2, 3)}
    fragments = Partition(weights, 0, 1).cut(weights)
    common = {"state": torch.tensor(3.0)}
    writer = CheckpointWriter(folder, 0, 1, keep=keep, background=step % 2 == 0)
    writer.save(step, {"master": fragments}, common, {"note": "x"})
    writer.finish()
    return folder / f"step-{step:08d}"


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 20])
def test_parts_cover_everything_once(ranks: int) -> None:
    sizes = [7, 1, 0, 12]
    covered = [
        (index, element)
        for rank in range(ranks)
        for index, start, stop in partition(sizes, rank, ranks)
        for element in range(start, stop)
    ]
    assert covered == [(i, e) for i, size in enumerate(sizes) for e in range(size)]


def test_any_cut_can_be_read(tmp_path: Path) -> None:
    saved = checkpoint.SavedRun(save(tmp_path, 5))
    assert saved.facts["step"] == 5
    assert saved.facts["note"] == "x"
    assert saved.common["state"] == 3.0
    assert saved.kinds() == {"master"}
    part = saved.read("master", Fragment("a", 3, torch.empty(4)))
    assert part.tolist() == [3, 4, 5, 6]
    assert saved.whole("master")["b"].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(CheckpointError, match="no master of 'c'"):
        saved.whole("master")["c"]


def test_parts_are_read_from_many_fragments_of_integers(tmp_path: Path) -> None:
    values = torch.arange(-50, 50, dtype=torch.int16)
    starts = [8, 0, 4, 20, 16, 99]  # 12 to 16 is missing
    fragments = [Fragment("labels", at, values[at : at + 4]) for at in starts]
    writer = CheckpointWriter(tmp_path, 0, 1, keep=1)
    writer.save(1, {"algorithm": fragments}, {}, {})
    writer.finish()
    whole = checkpoint.SavedRun(tmp_path / "step-00000001").whole("algorithm")
    assert whole.size("labels") == 100
    assert whole.size("nothing") == 0
    for start, stop in ((0, 12), (3, 9), (4, 8), (7, 8), (16, 24), (21, 23), (99, 100)):
        part = whole.read("labels", start, stop)
        assert part.dtype == torch.int16
        assert torch.equal(part, values[start:stop])
    for start, stop, gap in ((0, 16, "12 to 16"), (13, 14, "13 to 14"), (23, 30, "24 to 30")):
        with pytest.raises(CheckpointError, match=f"'labels' lacks elements {gap}"):
            whole.read("labels", start, stop)


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    file = path / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is damaged"):
        checkpoint.SavedRun(path)


def test_a_missing_or_short_file_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    file = path / "common.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.SavedRun(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.SavedRun(path)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(CheckpointError, match=r"format 99.*upgrade"):
        checkpoint.SavedRun(path)


def test_old_ones_go_and_unfinished_ones_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000009").mkdir()  # without a manifest
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-00000003", "step-00000002"]
