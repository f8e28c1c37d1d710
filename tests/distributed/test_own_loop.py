"""`SemiSupervisedStep` in an ordinary Accelerate loop, as a user writes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hpdist
from hpdist.algorithms import Algorithm
from hpdist.algorithms.flexmatch import FlexMatch
from hpdist.algorithms.simmatch import SimMatch
from hpdist.algorithms.temporal_ensembling import TemporalEnsembling
from hpdist.errors import ConfigError, DistributedError
from tests.support.ranks import run_ranks
from tests.support.recipes import digits, global_batches, make_step, slice_of


def loop(precision: str) -> tuple[list[float], torch.Tensor, float]:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    images, labels = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())
    model.append(nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    few = DataLoader(TensorDataset(images[:40], labels[:40], torch.arange(40)), 10, shuffle=True)
    many = DataLoader(TensorDataset(images[40:1400], torch.arange(40, 1400)), 40, shuffle=True)
    model, optimizer, few, many = accelerator.prepare(
        hpdist.global_batch_norm(model), optimizer, few, many
    )
    views = hpdist.ImageViewsConfig(weak={"flip": False}).build(seed=0)
    step = hpdist.SemiSupervisedStep(
        accelerator, model, optimizer, hpdist.FixMatch(threshold=0.8), views
    )
    losses = []
    for _ in range(4):
        for (x, y, ids), (u, u_ids) in zip(
            (batch for _ in range(9) for batch in few), many, strict=False
        ):
            labeled = hpdist.LabeledBatch(x, y, ids)
            outcome = step(labeled, hpdist.UnlabeledBatch(u, u_ids), measure=True)
            losses.append(outcome.metrics["supervised_loss"])
    weights = torch.cat([p.detach().view(-1) for p in step.engine.module.parameters()])
    with step.evaluating() as predict:
        logits = predict(images[1400:])
    accuracy = (logits.argmax(dim=1) == labels[1400:]).float().mean().item()
    return losses, weights, accuracy


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_of_ones_own(precision: str) -> None:
    (losses, weights, accuracy), (other_losses, other_weights, _) = run_ranks(2, loop, precision)
    assert losses == other_losses, "global values are the same on every rank"
    assert torch.equal(weights, other_weights)
    assert losses[-1] < 0.3 * losses[0]
    assert accuracy > 0.6


def ranks_apart() -> str:
    torch.distributed.init_process_group("gloo")
    accelerator = Accelerator()
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    views = hpdist.ImageViewsConfig().build(seed=0)
    with pytest.raises(DistributedError) as caught:
        hpdist.SemiSupervisedStep(accelerator, model, optimizer, hpdist.Supervised(), views)
    return str(caught.value)


def test_ranks_that_train_apart_are_refused() -> None:
    assert "cpu=True" in run_ranks(2, ranks_apart)[0]


def test_missing_or_indivisible_rows_are_refused() -> None:
    step = make_step("fixmatch", micro_batches=3)
    labeled, unlabeled = global_batches(0)
    with pytest.raises(ConfigError, match="needs unlabelled rows"):
        step(labeled)
    with pytest.raises(ConfigError, match="16 labelled rows per rank do not divide into 3"):
        step(labeled, unlabeled)


def without_ids(number: int) -> tuple[hpdist.LabeledBatch, hpdist.UnlabeledBatch]:
    labeled, unlabeled = global_batches(number)
    valid = torch.arange(len(unlabeled)) % 5 != 0
    return (
        hpdist.LabeledBatch(labeled.inputs, labeled.labels),
        hpdist.UnlabeledBatch(unlabeled.inputs, valid=valid),
    )


def test_rows_need_no_ids_where_no_algorithm_remembers_them() -> None:
    curves = []
    for with_ids in (True, False):
        step = make_step("freematch", micro_batches=2)
        curves.append([])
        for number in range(2):
            labeled, unlabeled = without_ids(number)
            if with_ids:
                labeled = replace(labeled, ids=torch.arange(len(labeled)))
                unlabeled = replace(unlabeled, ids=torch.arange(len(unlabeled)))
            curves[-1].append(step(labeled, unlabeled, measure=True).metrics["loss"])
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (FlexMatch(10), r"remembers unlabelled rows .*hpdist.UnlabeledBatch\(…, ids=…\)"),
        (TemporalEnsembling(10), "remembers unlabelled rows"),
        (SimMatch(10, bank=64), r"remembers labelled rows .*hpdist.LabeledBatch\("),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_algorithm_that_remembers_rows_asks_for_their_ids(
    algorithm: Algorithm, message: str
) -> None:
    step = make_step(algorithm)
    with pytest.raises(ConfigError, match=message):
        step(*without_ids(0))


def collectives() -> dict[str, list[int]]:
    """Elements of every collective that the step adds to the engine's own."""
    counted: dict[str, list[int]] = {}
    original = torch.distributed.all_reduce
    for name in ("supervised", "fixmatch", "freematch"):
        step = make_step(name)
        sizes: list[int] = []

        def counting(tensor, *args, sizes=sizes, **kwargs):  # type: ignore[no-untyped-def]
            sizes.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        engine = step.engine
        batches = [slice_of(b, engine.rank, engine.world_size) for b in global_batches(0)]
        step(*batches)  # the first one also asks which parameters any rank reaches
        torch.distributed.all_reduce = counting
        try:
            step(*batches)
        finally:
            torch.distributed.all_reduce = original
        counted[name] = sizes
    return counted


def test_a_step_adds_one_small_collective_and_one_for_the_fairness_term() -> None:
    classes = 10
    counted = run_ranks(2, collectives)[0]
    assert [len(counted[n]) for n in ("supervised", "fixmatch", "freematch")] == [1, 1, 2]
    assert all(size <= 3 * classes + 8 for sizes in counted.values() for size in sizes)
