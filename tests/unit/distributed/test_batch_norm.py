"""GlobalBatchNorm: torch's on one rank, the same on many, and tied to the optimizer step."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpdist.distributed.batch_norm import GlobalBatchNorm, batch_norms, global_batch_norm
from hpdist.errors import ConfigError
from tests.support.ranks import run_ranks


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 + 2 * torch.randn(8, 4, 5, 5, generator=generator)


def pair() -> tuple[nn.BatchNorm2d, GlobalBatchNorm]:
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(4)
    nn.init.uniform_(theirs.weight, 0.5, 2)
    nn.init.uniform_(theirs.bias)
    ours = GlobalBatchNorm(4)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_equals_torch_in_training_and_evaluation() -> None:
    theirs, ours = pair()
    x, y = rows().requires_grad_(), rows().requires_grad_()
    theirs(x).square().sum().backward()
    ours(y).square().sum().backward()
    ours.commit()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(theirs.weight.grad, ours.weight.grad)
    torch.testing.assert_close(theirs.running_mean, ours.running_mean)
    torch.testing.assert_close(theirs.running_var, ours.running_var)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(y))


def on_a_rank() -> tuple[Tensor, ...]:
    dist.init_process_group("gloo")
    _, ours = pair()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = rows().chunk(ranks)[rank].clone().requires_grad_()
    out = ours(x)
    (out * out.detach().sin()).sum().backward()
    ours.commit()
    grads = torch.stack([ours.weight.grad, ours.bias.grad])
    dist.all_reduce(grads)
    return out.detach(), x.grad, grads, ours.running_mean, ours.running_var


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_torch_on_the_global_batch(ranks: int) -> None:
    theirs, _ = pair()
    x = rows().requires_grad_()
    expected = theirs(x)
    (expected * expected.detach().sin()).sum().backward()
    results = run_ranks(ranks, on_a_rank)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), expected.detach())
    torch.testing.assert_close(torch.cat([r[1] for r in results]), x.grad)
    for _, _, grads, mean, variance in results:
        torch.testing.assert_close(grads, torch.stack([theirs.weight.grad, theirs.bias.grad]))
        torch.testing.assert_close(mean, theirs.running_mean)
        torch.testing.assert_close(variance, theirs.running_var)


def test_two_passes_move_the_running_statistics_once_towards_all_rows() -> None:
    theirs, ours = pair()
    x = rows()
    ours(x[:2])
    ours(x[2:])
    ours.commit()
    theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=2e-2, atol=0)


def test_segments_equal_separate_passes() -> None:
    _, one = pair()
    _, two = pair()
    x = rows()
    two.virtual_batches = (3, 5)
    torch.testing.assert_close(torch.cat([one(x[:3]), one(x[3:])]), two(x))
    one.commit()
    two.commit()
    torch.testing.assert_close(one.running_var, two.running_var)


def test_a_skipped_step_moves_nothing() -> None:
    _, ours = pair()
    before = ours.running_mean.clone()
    ours(rows())
    ours.discard()
    ours.commit()
    assert torch.equal(before, ours.running_mean)


def test_running_statistics_stay_fp32_in_a_half_precision_model() -> None:
    model = global_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).half()
    (norm,) = batch_norms(model)
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert norm.weight.dtype == torch.float16
    out = norm(rows().half())
    assert out.dtype == torch.float16
    norm.commit()
    torch.testing.assert_close(norm.running_mean, 0.1 * rows().mean((0, 2, 3)), rtol=1e-2, atol=0)


def test_replaces_every_kind_and_keeps_values() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm3d(5)))
    model[0].running_mean.fill_(7.0)
    converted = global_batch_norm(model.eval())
    assert len(list(batch_norms(converted))) == 3
    assert converted[0].running_mean[0] == 7.0
    assert not converted[0].training
    assert converted[0](torch.zeros(2, 3)).shape == (2, 3)


class Scaled(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_batch_norm_that_computes_something_else_is_refused() -> None:
    assert isinstance(global_batch_norm(nn.SyncBatchNorm(4)), GlobalBatchNorm)
    with pytest.raises(ConfigError, match=r"Scaled is a BatchNorm with its own forward"):
        global_batch_norm(nn.Sequential(Scaled(4)))


def test_the_compiler_leaves_out_what_is_remembered() -> None:
    _, ours = pair()
    model = nn.Sequential(nn.Conv2d(4, 4, 1), pickle.loads(pickle.dumps(ours)))
    explained = torch._dynamo.explain(model)(rows())
    assert any("disable" in found.reason for found in explained.break_reasons)
    (norm,) = batch_norms(model)
    assert len(norm._passes) == 1
