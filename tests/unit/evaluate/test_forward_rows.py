"""What a CPU computes at a time, and that nothing of it shows in the outputs."""

import pytest
import torch

from hpdist.data.structures import Structure
from hpdist.evaluate.forward_rows import forward_in_parts, rows_at_a_time


@pytest.mark.parametrize(
    ("rows", "most"),
    [
        (torch.zeros(9, 3, 32, 32, dtype=torch.uint8), 32),
        (torch.zeros(9, 3, 224, 224), 16),
        (torch.zeros(9, 1, 8, 8), 1536),
        (torch.zeros(9, 20), 4915),
        (torch.zeros(9, 30, dtype=torch.int64), 51),
        (torch.zeros(9, 512, dtype=torch.int64), 8),
        (torch.zeros(0, 3, 32, 32), 98_304),
        ({"one": torch.zeros(9, 3, 32, 32), "two": torch.zeros(9, 1, 8, 8)}, 32),
    ],
)
def test_fewer_rows_of_more_values(rows: Structure, most: int) -> None:
    assert rows_at_a_time(rows) == most


@pytest.mark.parametrize("count", [0, 1, 16, 17, 50])
def test_parts_are_put_together_in_order(count: int) -> None:
    rows = torch.randn(count, 3, 100, 100)
    seen: list[int] = []

    def forward(part: Structure) -> Structure:
        assert isinstance(part, torch.Tensor)
        seen.append(len(part))
        return {"logits": part.mean(dim=(2, 3)), "other": part[:, 0, 0]}

    found = forward_in_parts(forward, rows)
    assert isinstance(found, dict)
    assert torch.equal(found["logits"], rows.mean(dim=(2, 3)))
    assert torch.equal(found["other"], rows[:, 0, 0])
    assert sum(seen) == count
    assert max(seen) <= 16
    assert max(seen) - min(seen) <= 1
