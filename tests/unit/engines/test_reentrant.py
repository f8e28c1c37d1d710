"""A reentrant checkpoint is found in the graph of an output."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpdist.engines.reentrant import is_reentrant


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_old_way_is_told_from_the_new_one(reentrant: bool) -> None:
    first, second, last = (nn.Linear(2, 2) for _ in range(3))
    hidden = checkpoint(second, first(torch.ones(1, 2)), use_reentrant=reentrant)
    assert is_reentrant([torch.ones(1), last(hidden).float()]) == reentrant
