"""`hpdist plan` on a GPU, against the most memory that torch's allocator gave to a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpdist.data.samples.digits import write_digits
from tests.benchmarks.gpu_memory import compare
from tests.benchmarks.memory_plan import settings
from tests.gpu.device import is_dry_run

LARGE = [("MLP", None), ("CNN", None), ("MLP", 2), ("CNN", 2)]
SMALL = [("small CNN", None), ("small MLP", 2)]
ROUNDING = 2 * 2**20
"""Bytes by which they may differ anyway: torch's allocator rounds the size of each tensor up."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize(("model", "stage"), SMALL if is_dry_run() else LARGE)
def test_the_planned_peak_is_what_was_allocated(
    digits: Path, model: str, stage: int | None, device: torch.device
) -> None:
    planned, allocated = compare(settings(digits, model, stage), stage)
    assert planned == pytest.approx(allocated, rel=0.1, abs=ROUNDING)
