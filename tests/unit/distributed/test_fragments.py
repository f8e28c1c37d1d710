"""Fragments of all ranks, put together piece by piece."""

from __future__ import annotations

import random

import pytest
import torch

from hpdist.distributed import fragments
from hpdist.distributed.fragments import Fragment, Layout, fragment_spans, partition


class OneProcess(Layout):
    """Gives what an all-gather would, of fragments of all ranks that this process has itself."""

    def __init__(self, ranks: list[list[Fragment]]) -> None:
        super().__init__(ranks[0], spans=[fragment_spans(own) for own in ranks])
        flat = [torch.cat([f.values for f in own] or [torch.empty(0)]) for own in ranks]
        self.flat = [torch.nn.functional.pad(own, (0, self._longest - len(own))) for own in flat]
        self.exchanged = 0

    def _exchange(self, piece: torch.Tensor, length: int) -> list[torch.Tensor]:
        begin, self.exchanged = self.exchanged, self.exchanged + length
        received = [own[begin : self.exchanged] for own in self.flat]
        assert torch.equal(received[0][: len(piece)], piece)
        return received


@pytest.mark.parametrize("seed", range(40))
def test_pieces_of_any_size_give_whole_tensors(seed, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr(fragments, "_PIECE", draw.choice([1, 3, 7, 1000]))
    torch.manual_seed(seed)
    whole = {f"p{k}": torch.randn(draw.randint(1, 20)) for k in range(draw.randint(1, 5))}
    names, sizes = list(whole), [len(values) for values in whole.values()]
    count = draw.randint(2, 4)
    ranks = [
        [
            Fragment(names[k], start, whole[names[k]][start:stop])
            for k, start, stop in partition(sizes, rank, count)
        ]
        for rank in range(count)
    ]
    if draw.random() < 0.3:
        ranks.append([])  # a rank that owns nothing
    layout = OneProcess(ranks)
    assert layout.sizes == dict(zip(names, sizes, strict=True))
    found = layout.gather(ranks[0])
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert layout.exchanged == layout._longest

    halves = {name: torch.zeros(len(values), 1).half() for name, values in whole.items()}
    layout.exchanged = 0
    layout.gather_into(ranks[0], halves)
    assert all(torch.equal(halves[name][:, 0], whole[name].half()) for name in whole)
