"""The least config of a run, and an environment that no launcher has set: tests of launching."""

from __future__ import annotations

import os
from typing import Any

import pytest

from hpdist.train.config import RunConfig, parse


def config(**settings: Any) -> RunConfig:
    """Parse a config that names what it must, one step long, with these settings."""
    data = {"labeled": {"path": "parquet"}}
    least = {"model": {"name": "cnn"}, "data": data, "algorithm": {"name": "supervised"}}
    return parse(least | {"steps": 1} | settings)


def forget_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what a launcher, or an earlier test, has set."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "HPDIST_", "FSDP_")) or name in ("RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name)
