"""`hpdist preflight` where there is a GPU, and NCCL with one process."""

from __future__ import annotations

import re
import subprocess
import sys

import torch
import torch.distributed as dist

from hpdist.preflight.network import Speed, measure
from hpdist.preflight.network_checks import nccl_finding
from tests.gpu.device import on_ranks, the_device


def reduced() -> Speed:
    """What an all-reduce by NCCL takes with one process; in a dry run by gloo."""
    device = the_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return measure(None, device)


def test_nccl_reduces(device: torch.device) -> None:
    (found,) = on_ranks(reduced, 1)
    assert found.processes == 1
    assert 0 < found.latency < 1
    assert found.size >= 64 << 20
    finding = nccl_finding([found], ["here"])
    assert finding.verdict == "ok"
    assert "between 1 GPUs" in finding.text


def test_the_device_is_named(device: torch.device) -> None:
    command = [sys.executable, "-m", "hpdist", "preflight", "--timeout", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"^FAILED", done.stdout, re.MULTILINE), done.stdout
    if device.type == "cuda":
        assert torch.cuda.get_device_name(0) in done.stdout
        assert str(torch.version.cuda) in done.stdout
