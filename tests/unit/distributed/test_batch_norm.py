"""GlobalBatchNorm: torch's on one rank, the same on many, and tied to the optimizer step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpdist.distributed.batch_norm import GlobalBatchNorm, batch_norms, global_batch_norm
from hpdist.distributed.normalisation import cpu, gpu
from hpdist.distributed.normalisation.function import _Traced
from hpdist.distributed.normalisation.moments import into_statistics, moments_of, statistics_of
from hpdist.distributed.normalisation.running import RunningStatistics
from hpdist.errors import ConfigError
from tests.benchmarks.dispatch_count import DispatchCounter
from tests.support.ranks import run_ranks
from tests.support.sync_batch_norm import register_reference_kernels


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
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return passed(rows().chunk(ranks)[rank])


def passed(part: Tensor) -> tuple[Tensor, ...]:
    """What comes of this rank's rows in a forward, a backward and a commit."""
    _, ours = pair()
    x = part.clone().requires_grad_()
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


def moved(norm: GlobalBatchNorm) -> tuple[Tensor, Tensor]:
    """The running statistics after a commit."""
    norm.commit()
    return norm.running_mean, norm.running_var


def test_a_paused_pass_leaves_nothing_behind() -> None:
    _, ours = pair()
    ours.momentum = 1.0
    ours(rows())
    with RunningStatistics([ours]).paused():
        ours(rows() * torch.inf)
    mean, _ = moved(ours)
    torch.testing.assert_close(mean, rows().mean((0, 2, 3)))


def test_numbers_that_are_not_finite_do_not_outlive_their_step() -> None:
    _, ours = pair()
    ours.momentum = 1.0
    for forget in (ours.discard, ours.commit):
        ours(rows() * torch.inf)
        forget()
        ours.running_mean.zero_()
        ours.running_var.zero_()
        ours(rows())
        assert all(bool(each.isfinite().all()) for each in moved(ours))


def pooled(passes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of passes [rows, channels], by their rows; each with its unbiased one."""
    shares = torch.tensor([float(len(x)) for x in passes]).view(-1, 1) / sum(map(len, passes))
    means = torch.stack([x.mean(0) for x in passes])
    mean = (shares * means).sum(0)
    variances = torch.stack([x.var(0) for x in passes])
    return mean, (shares * (variances + (means - mean).square())).sum(0)


def test_a_commit_takes_a_handful_of_operations_for_any_number_of_layers() -> None:
    """Layers of several sizes and momenta, every third of which runs twice."""
    torch.manual_seed(0)
    layers = [GlobalBatchNorm(3 + n % 4, momentum=(0.1, 0.2, 1.0, None)[n % 4]) for n in range(20)]
    together = RunningStatistics(layers)
    for _ in range(2):  # in the first the plan is made
        before = [(n.running_mean.clone(), n.running_var.clone()) for n in layers]
        passes: list[list[Tensor]] = [[] for _ in layers]
        for number in [*range(20), *range(0, 20, 3)]:
            rows = 3 + number + 2 * len(passes[number])
            passes[number].append(torch.randn(rows, layers[number].num_features))
            layers[number](passes[number][-1])
        with DispatchCounter() as counter:
            together.commit()
        for norm, (mean, variance), inputs in zip(layers, before, passes, strict=True):
            momentum = 0.1 if norm.momentum is None else norm.momentum
            for own, old, new in zip(
                (norm.running_mean, norm.running_var), (mean, variance), pooled(inputs), strict=True
            ):
                torch.testing.assert_close(own, old.lerp(new, momentum))
    assert counter.operations.total() <= 30
    assert all(norm.num_batches_tracked == 2 for norm in layers)


def test_a_layer_that_does_not_run_stays_as_it_is() -> None:
    used, unused = GlobalBatchNorm(4, momentum=1.0), GlobalBatchNorm(3)
    used(rows())
    RunningStatistics([unused, used]).commit()
    assert unused.running_mean.eq(0).all()
    assert unused.running_var.eq(1).all()
    assert (unused.num_batches_tracked, used.num_batches_tracked) == (0, 1)
    torch.testing.assert_close(used.running_var, rows().var((0, 2, 3)))


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 6), (3, 4, 6, 5), (2, 4, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_the_kernels_for_gpus_and_cpus_and_compilers_agree(
    shape: tuple[int, ...], dtype: torch.dtype, affine: bool
) -> None:
    """Those for GPUs run here on reference implementations, with the same signatures."""
    register_reference_kernels()
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    if len(shape) == 4:
        x, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad))
    weight, bias = (torch.rand(4, generator=generator) + 0.5 if affine else None for _ in range(2))
    found = []
    for kernels in (cpu, gpu):
        moments, buffer = kernels.moments(x)
        mean, variance, _ = into_statistics(moments, buffer).split((4, 4, 1))
        out = kernels.normalised(x, weight, bias, mean, variance, 1e-5)
        inputs = (grad, x, weight, mean, variance, moments, 1e-5, False)
        found.append((moments, out, *kernels.gradients(*inputs)))
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    out, moments = _Traced.apply(*leaves, 1e-5, False)
    out.backward(grad)
    found.append((moments, out, *(None if leaf is None else leaf.grad for leaf in leaves)))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            if other is not None:
                assert one.dtype == other.dtype
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def on_a_rank_with_few_rows() -> tuple[Tensor, ...]:
    dist.init_process_group("gloo")
    return passed(rows().split([0, 1, 7])[dist.get_rank()])


def in_one_process() -> tuple[Tensor, ...]:
    theirs, _ = pair()
    x = rows().requires_grad_()
    out = theirs(x)
    (out * out.detach().sin()).sum().backward()
    grads = torch.stack([theirs.weight.grad, theirs.bias.grad])
    return out.detach(), x.grad, grads, theirs.running_mean, theirs.running_var


def test_ranks_without_rows_or_with_one_take_part() -> None:
    out, grad, *same = in_one_process()
    results = run_ranks(3, on_a_rank_with_few_rows)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), out)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), grad)
    for result in results:
        torch.testing.assert_close(list(result[2:]), same)


def by_rank() -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """With statistics of each rank: outputs, running statistics, and the collectives of each."""
    dist.init_process_group("gloo")
    model = global_batch_norm(nn.Sequential(nn.BatchNorm2d(4, momentum=1.0)), statistics="rank")
    parts = [rows()[:1, :, :1, :1], rows()]  # the first is a single value
    x = parts[dist.get_rank()].clone().requires_grad_()
    with DispatchCounter() as counter:
        out = model(x)
        out.sum().backward()
    passes = counter.collectives.total()
    with DispatchCounter() as counter:
        RunningStatistics(batch_norms(model)).commit()
    (norm,) = batch_norms(model)
    commits = counter.collectives.total()
    return out.detach(), x.detach(), norm.running_mean, norm.running_var, passes, commits


def test_statistics_of_each_rank_need_no_collective_but_the_commits() -> None:
    """The running statistics are those of all ranks' values, and the same on every rank."""
    results = run_ranks(2, by_rank)
    values = torch.cat([x.transpose(0, 1).flatten(1) for _, x, *_ in results], dim=1)
    for out, x, mean, variance, passes, commits in results:
        expected = nn.BatchNorm2d(4)(x) if len(x) > 1 else torch.zeros_like(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)  # of one value: 0
        torch.testing.assert_close(mean, values.mean(1))
        torch.testing.assert_close(variance, values.var(1), rtol=1e-2, atol=0)
        assert (passes, commits) == (0, 1)


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
