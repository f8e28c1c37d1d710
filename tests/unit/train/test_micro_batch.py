"""The strong views that a micro-batch gets: as strong as the algorithm's authors have them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hpdist.algorithms import FixMatch, LogitAdjustment, SequenceMatch
from hpdist.algorithms.base import Algorithm
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.views import IdentityViewsConfig, ImageViewsConfig, Views
from hpdist.train.micro_batch import MicroBatcher

IMAGES = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
IDS = torch.arange(8)


def strong_views(algorithm: Algorithm, views: Views) -> tuple[Tensor, ...]:
    """Those of the unlabelled rows of one step."""
    cutter = MicroBatcher(algorithm, views, 1, 0, 1, torch.device("cpu"), 0)
    batches = LabeledBatch(IMAGES, IDS % 4, IDS), UnlabeledBatch(IMAGES, IDS)
    (micro,) = cutter.split(*batches, 5)
    return micro.inputs.strong


def test_sequencematch_sees_one_and_three_operations() -> None:
    plain, two = (ImageViewsConfig(strong=o).build(0) for o in ({}, {"ops": 2}))
    graded = partial(plain.graded, IMAGES, stream="unlabeled", step=5, positions=IDS)
    for algorithm in (SequenceMatch(4), LogitAdjustment(SequenceMatch(4))):
        medium, strong = strong_views(algorithm, plain)
        assert torch.equal(medium, graded(operations=1))
        assert torch.equal(strong, graded(operations=3, copy=1))
    medium, strong = strong_views(SequenceMatch(4), two)  # the run's own number goes first
    assert torch.equal(medium, graded(operations=2))
    assert torch.equal(strong, graded(operations=2, copy=1))
    assert torch.equal(strong_views(FixMatch(), plain)[0], graded(operations=2))
    assert not torch.equal(medium, graded(operations=1))
    medium, strong = strong_views(SequenceMatch(4), IdentityViewsConfig().build(0))
    assert torch.equal(medium, strong)  # views that cannot be graded are asked for a strong one
