"""Rows turned each by its own angle, and the inputs that cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hpdist.algorithms import ReMixMatch
from hpdist.algorithms.exchange import StudentInputs
from hpdist.algorithms.parts.rotation import add_rotated, rotated
from hpdist.algorithms.positions import BatchPositions
from hpdist.errors import ConfigError


def inputs(rows: int, step: int = 0) -> StudentInputs:
    none = torch.zeros(0)
    places = BatchPositions(torch.arange(0), torch.arange(rows), 0, rows, seed=1, step=step)
    return StudentInputs(none, none.long(), (), (), (), (), places, extra_inputs=(none,))


def test_each_row_is_turned_by_its_own_angle() -> None:
    images, turns = torch.randn(9, 2, 3, 3), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 1])
    for image, number, found in zip(images, turns, rotated(images, turns), strict=True):
        expected = np.rot90(image.numpy(), int(number), axes=(1, 2))
        np.testing.assert_array_equal(found.numpy(), expected)
    assert rotated(images[:0], turns[:0]).shape == (0, 2, 3, 3)


def test_angles_are_drawn_evenly_and_anew_in_each_step() -> None:
    images = torch.randn(4000, 1, 2, 2)
    found = [add_rotated(inputs(4000, step), images, "a") for step in (0, 1)]
    counts = found[0].context["turns"].bincount(minlength=4)
    assert counts.sum() == 4000
    assert (counts - 1000).abs().max() < 4.5 * (4000 * 3 / 16) ** 0.5
    assert not torch.equal(found[0].context["turns"], found[1].context["turns"])
    other = add_rotated(inputs(4000), images, "b")
    assert not torch.equal(found[0].context["turns"], other.context["turns"])
    assert len(found[0].extra_inputs) == 2
    assert torch.equal(found[0].extra_inputs[1], rotated(images, found[0].context["turns"]))


@pytest.mark.parametrize("rows", [torch.zeros(2, 6), torch.zeros(2, 1, 4, 6), torch.zeros(2, 9, 9)])
def test_what_is_no_square_image_is_refused(rows: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"square images .* algorithm\.rotation_weight to 0"):
        add_rotated(inputs(2), rows, "remixmatch")


def test_without_weight_there_is_neither_head_nor_row() -> None:
    algorithm = ReMixMatch(3, rotation_weight=0.0)
    assert algorithm.head_names == ()
    assert algorithm.heads(torch.Size([4])) == {}
