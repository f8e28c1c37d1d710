"""Real ranks for a user's own tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator

from hpdist.testing import RankError, run_ranks


def add_up(value: int) -> tuple[str, float]:
    accelerator = Accelerator(cpu=True)
    own = torch.tensor(float(value + accelerator.process_index))
    return os.environ["RANK"], float(accelerator.reduce(own, "sum"))


def fail_on_rank_one() -> None:
    Accelerator(cpu=True)
    if os.environ["RANK"] == "1":
        raise ValueError("this is why")
    torch.distributed.barrier()


def sleep() -> None:
    time.sleep(600)


def test_every_rank_is_real() -> None:
    assert run_ranks(add_up, 2, 10) == [("0", 21.0), ("1", 21.0)]


def test_the_first_error_is_shown() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2\n(.|\n)*ValueError: this is why"):
        run_ranks(fail_on_rank_one, 2, timeout=120)


def test_ranks_that_hang_are_ended() -> None:
    with pytest.raises(RankError, match="2 ranks did not finish within 3 s"):
        run_ranks(sleep, 2, timeout=3)


def test_it_does_not_need_pytest() -> None:
    code = "import hpdist.testing, sys; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
