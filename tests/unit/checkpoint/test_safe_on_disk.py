"""A checkpoint gets its name once all of it would survive a power cut, and keeps the name then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hpdist.checkpoint.writer import CheckpointWriter
from hpdist.distributed.fragments import Fragment


def test_everything_is_on_the_disk_before_the_name_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, rename = os.fsync, os.rename
    synced: dict[int, tuple[int, int]] = {}  # by inode: bytes, and when they were written
    named: list[Path] = []

    def state(path: Path) -> tuple[int, int]:
        return path.stat().st_size, path.stat().st_mtime_ns

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        facts = os.fstat(descriptor)
        synced[facts.st_ino] = facts.st_size, facts.st_mtime_ns

    def watched_rename(source: Path, target: Path) -> None:
        for path in (source, *source.iterdir()):
            assert synced.get(path.stat().st_ino) == state(path), f"{path.name} is not safe yet"
        assert len(list(source.iterdir())) == 3
        synced.clear()
        rename(source, target)
        named.append(target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    writer = CheckpointWriter(tmp_path, 0, 1, keep=2, background=False)
    weight = torch.arange(4.0)
    writer.save(4, {"master": [Fragment("w", 0, weight)]}, {"count": weight}, {"run": "x"})
    writer.finish()
    assert [path.name for path in named] == ["step-00000004"]
    assert synced[tmp_path.stat().st_ino] == state(tmp_path)
