"""Batch normalisation over the global batch, on a GPU: torch's own, and the CPU's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hpdist.distributed.batch_norm import GlobalBatchNorm

CHANNELS = 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def pair(device: torch.device) -> tuple[nn.BatchNorm2d, GlobalBatchNorm]:
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(CHANNELS)
    nn.init.uniform_(theirs.weight, 0.5, 2)
    nn.init.uniform_(theirs.bias)
    ours = GlobalBatchNorm(CHANNELS)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(device), ours.to(device)


def rows(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(64, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    return (3 + 2 * drawn).to(device, dtype).requires_grad_()


def trained(norm: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and running statistics of one step, on the CPU in fp32."""
    out = norm(x)
    (out.float() * out.detach().float().sin()).sum().backward()
    if isinstance(norm, GlobalBatchNorm):
        norm.commit()
    found = [out, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    assert all(part.device == x.device for part in found)
    assert found[-1].dtype == found[-2].dtype == torch.float32
    return [part.detach().float().cpu() for part in found]


def test_is_torchs_on_this_device(device: torch.device) -> None:
    theirs, ours = pair(device)
    for found, wanted in zip(
        trained(ours, rows(device)), trained(theirs, rows(device)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    x = rows(device).detach()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_is_that_of_the_cpu(dtype: torch.dtype, device: torch.device) -> None:
    """Rows of half precision are normalised in fp32; the CPU is given the same rounded rows."""
    own = rows(device, dtype)
    cpu = own.detach().cpu().float().requires_grad_()
    found = trained(pair(device)[1], own)
    wanted = trained(pair(torch.device("cpu"))[1], cpu)
    for name, one, other in zip(
        ("output", "rows", "weight", "bias", "mean", "variance"), found, wanted, strict=True
    ):
        gap = (one - other).norm() / other.norm()
        assert gap <= TOLERANCE[dtype], f"{name}: {gap:.2g}"
