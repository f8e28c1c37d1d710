"""Where the pixels of a row went in its view, in shares of the picture and of the view.

    place = place_of(views.weak_with_maps(x, …), x)

A task whose labels have a place in the row, such as boxes, is given this beside a model's outputs
for a view. Shares do not depend on the sizes of picture, view and output: (0, 0) is the corner at
the top left, (1, 1) the one at the bottom right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from hpdist.data.views.base import ViewedRows
from hpdist.data.views.geometry import identity_maps

MAPS, VISIBLE, HIDDEN = "view maps", "view visible", "view hidden"

Place: TypeAlias = Mapping[str, Tensor]
"""`MAPS` float32 [rows, 2, 3], from the picture to the view; `VISIBLE` [rows, 4], the area of the
picture that is left in the view, and `HIDDEN` [rows, 4], the area of the view that was painted
over: x0, y0, x1, y1 each. All in shares."""


def place_of(viewed: ViewedRows, x: Tensor) -> dict[str, Tensor]:
    """Give the place of a view of pictures `x`, [rows, channels, height, width]."""
    before, after = _ends(x), _ends(viewed.rows)
    maps = viewed.maps.clone()
    maps[:, :, :2] *= before  # what one share of the picture is in pixels
    maps /= after[:, None]
    return {
        MAPS: maps,
        VISIBLE: viewed.visible / before.repeat(2),
        HIDDEN: viewed.hidden / after.repeat(2),
    }


def unmoved(rows: int, device: torch.device | str) -> dict[str, Tensor]:
    """Give the place of views that show the pictures as they are."""
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).to(device)
    return {
        MAPS: identity_maps(rows, device=device),
        VISIBLE: whole.repeat(rows, 1),
        HIDDEN: torch.zeros(rows, 4, device=device),
    }


def _ends(x: Tensor) -> Tensor:
    """Give width and height of pictures, float32 [2] on their device."""
    return torch.tensor([x.shape[-1], x.shape[-2]], dtype=torch.float32).to(x.device)
