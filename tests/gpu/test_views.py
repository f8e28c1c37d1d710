"""Views that a GPU makes are those of the CPU, up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpdist.data.decode.text import Vocabulary
from hpdist.data.views import (
    AudioViewsConfig,
    ImageViewsConfig,
    TableViewsConfig,
    TextViewsConfig,
)

ROWS = 512
FAR = 2e-4
"""Two views are apart where values are further apart than this; pixels are from -2 to 2."""
SHARE = 2e-3
"""The share of values that may be: where an operation has a threshold, rounding may decide."""
BATCH: dict[str, Any] = {"stream": "unlabeled", "step": 3, "positions": torch.arange(ROWS)}
VOCABULARY = Vocabulary(size=1000, special=(0, 1, 2), pad=0, mask=3)


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def tables() -> tuple[Any, Tensor]:
    rows = torch.randn(ROWS, 30, generator=torch.Generator().manual_seed(0))
    views = TableViewsConfig().build(0)
    views.fit([rows.numpy()], ())
    return views, rows


def sounds() -> tuple[Any, Tensor]:
    """Noise of 800, 500 and 121 samples, NaN behind it."""
    views = AudioViewsConfig(sampling_rate=8000, seconds=0.1, mels=16, hop=0.005).build(3)
    rows = 0.1 * torch.randn(ROWS, 800, generator=torch.Generator().manual_seed(0))
    rows[1::4, 500:] = rows[2::4, 121:] = float("nan")
    return views, rows


def texts() -> tuple[Any, Tensor]:
    ids = 4 + noise(ROWS, 32).long()
    ids[:, 0], ids[:, -1] = 1, 2
    return TextViewsConfig(max_length=32).build(0, VOCABULARY), ids


CASES = {
    "colour": lambda: (ImageViewsConfig().build(0), noise(ROWS, 3, 32, 32)),
    "grey": lambda: (ImageViewsConfig().build(0), noise(ROWS, 1, 28, 28)),
    "table": tables,
    "sound": sounds,
    "text": texts,
}


def apart(found: Tensor, wanted: Tensor) -> float:
    """The share of the values that are apart."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    return ((found.cpu().double() - wanted.double()).abs() > FAR).double().mean().item()


@pytest.mark.parametrize("kind", ["weak", "strong"])
@pytest.mark.parametrize("name", CASES)
def test_views_are_those_of_the_cpu(name: str, kind: str, device: torch.device) -> None:
    views, rows = CASES[name]()
    wanted = getattr(views, kind)(rows, **BATCH)
    found = getattr(views, kind)(rows.to(device), **BATCH)
    assert found.device.type == device.type
    assert apart(found, wanted) <= SHARE
    if name not in ("table", "text"):  # of which a strong view leaves many values as they are
        assert apart(getattr(views, kind)(rows, **BATCH | {"step": 4}), wanted) > 0.1


def test_plain_rows_are_those_of_the_cpu(device: torch.device) -> None:
    views, rows = ImageViewsConfig().build(0), noise(ROWS, 3, 32, 32)
    torch.testing.assert_close(
        views.plain(rows.to(device)).cpu(), views.plain(rows), rtol=0, atol=1e-6
    )


def test_maps_are_those_of_the_cpu_to_the_bit(device: torch.device) -> None:
    """They are computed on the CPU from the same numbers, and moved to the rows' device."""
    views, rows = ImageViewsConfig().build(0), noise(ROWS, 3, 32, 32)
    found, wanted = (
        views.strong_with_maps(rows.to(device), **BATCH),
        views.strong_with_maps(rows, **BATCH),
    )
    assert found.maps.device.type == device.type
    assert torch.equal(found.maps.cpu(), wanted.maps)
    assert torch.equal(found.visible.cpu(), wanted.visible)
    assert torch.equal(found.hidden.cpu(), wanted.hidden)


def test_a_row_does_not_depend_on_the_rows_beside_it(device: torch.device) -> None:
    """To the last bit, on this device, whatever the size of the batch."""
    views, rows = ImageViewsConfig().build(0), noise(ROWS, 3, 32, 32).to(device)
    whole = views.strong(rows, **BATCH)
    some = torch.arange(100, 133)
    part = views.strong(rows[100:133], **BATCH | {"positions": some})
    assert torch.equal(part, whole[100:133])
