"""GlobalBatchNorm: torch's on one rank, the same on many, and tied to the optimizer step."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpdist.distributed.batch_norm import GlobalBatchNorm, batch_norms, global_batch_norm
from hpdist.distributed.normalisation.moments import moments_of, statistics_of
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
    torch.testing.assert_close(ours.running_var, theirs.running_var)


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


CALLS = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter")


def far_from_zero(ranks: int) -> Tensor:
    """Means about 10^4 and deviations of 10^-2: squares that fp32 cannot tell apart."""
    generator = torch.Generator().manual_seed(1)
    means = 1e4 + torch.arange(4.0, dtype=torch.float64).view(1, 4, 1, 1)
    noise = torch.randn(8 * ranks, 4, 16, 16, generator=generator, dtype=torch.float64)
    return (means + 1e-2 * noise).float()


def sent_and_variance() -> tuple[int, Tensor, Tensor]:
    """The bytes that one forward hands to collectives, and the statistics of rows far from zero."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sent = 0

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            tensors = [t for one in args for t in (one if isinstance(one, list) else [one])]
            sent += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(dist, name, counted(getattr(dist, name)))
    norm = GlobalBatchNorm(4, momentum=1.0)
    norm(far_from_zero(ranks).chunk(ranks)[rank])
    norm.commit()
    return sent, norm.running_mean, norm.running_var


@pytest.mark.parametrize("ranks", [2, 4])
def test_one_small_reduction_keeps_a_variance_far_from_zero(ranks: int) -> None:
    """Its bytes do not grow with the ranks; means are rounded to fp32 by each rank, no more."""
    x = far_from_zero(ranks).double()
    for sent, mean, variance in run_ranks(ranks, sent_and_variance):
        assert sent == 8 * (2 * 4 + 1)  # sums, squares and a count, in float64
        torch.testing.assert_close(mean, x.mean((0, 2, 3)).float(), rtol=1e-7, atol=0)
        expected = x.var((0, 2, 3)).float()
        torch.testing.assert_close(variance, expected, rtol=1e-2, atol=0)


def test_moments_are_added_without_loss_of_precision() -> None:
    """Of sixty-four ranks, each of whose own means and variances are exact."""
    x = far_from_zero(64).double()
    parts = [part.transpose(0, 1).flatten(1) for part in x.chunk(64)]
    own = [moments_of(p.mean(1), p.var(1, correction=0), p.shape[1]) for p in parts]
    whole = torch.stack(own).sum(dim=0)
    _, variance = statistics_of(whole)
    expected = x.var((0, 2, 3), correction=0).float()
    torch.testing.assert_close(variance, expected, rtol=1e-3, atol=0)
    assert whole[-1].item() == x.numel() // 4
