"""Marks what lies here `gpu`, and skips it where there is no GPU, unless the run is a rehearsal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.device import WHY_SKIPPED, begin_dry_run, exactly, is_dry_run, the_device

HERE = Path(__file__).parent

if is_dry_run():
    begin_dry_run()


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = not is_dry_run() and not torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=WHY_SKIPPED))


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU, without TF32; in a dry run the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    exactly()
    yield the_device()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
