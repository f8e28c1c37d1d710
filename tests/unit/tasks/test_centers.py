"""The map of centres against a reference cell by cell, and boxes that come back from it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpdist.tasks.centers import (
    box_loss,
    cells_in,
    decode,
    focal_loss,
    gaussian_radius,
    heat_targets,
)

HEIGHT, WIDTH, CLASSES = 60, 80, 3


def drawn_boxes(rows: int = 3, most: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """More than are drawn at once, many large enough to overlap; one row has none."""
    generator = torch.Generator().manual_seed(3)
    low = torch.rand(rows, most, 2, generator=generator) * 0.3
    boxes = torch.cat((low, low + 0.05 + torch.rand(rows, most, 2, generator=generator) * 0.65), 2)
    there = torch.rand(rows, most, generator=generator) < 0.6
    there[-1] = False
    return boxes, torch.randint(CLASSES, (rows, most), generator=generator), there


def iou(one: Any, other: Any) -> float:
    sides = [min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1)]
    both = max(0.0, sides[0]) * max(0.0, sides[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


@pytest.mark.parametrize(("width", "height"), [(10.0, 10.0), (30.0, 4.0), (3.0, 50.0), (0.5, 0.5)])
def test_corners_that_are_off_by_the_radius_leave_the_overlap(width: float, height: float) -> None:
    r = gaussian_radius(torch.tensor(width).double(), torch.tensor(height).double()).item()
    box = (0.0, 0.0, width, height)
    moved = [
        (-r, -r, width + r, height + r),
        (r, r, width - r, height - r),
        (r, r, width + r, height + r),
    ]
    assert r > 0
    assert min(iou(box, other) for other in moved) == pytest.approx(0.7)


def reference_heat(boxes: Any, classes: Any, there: Any) -> Any:
    """Cell by cell, as the paper writes it."""
    heat = np.zeros((CLASSES, HEIGHT, WIDTH))
    for box, number, is_there in zip(boxes, classes, there, strict=True):
        if not is_there:
            continue
        x0, y0, x1, y1 = (float(end) for end in box)
        w, h = (x1 - x0) * WIDTH, (y1 - y0) * HEIGHT
        column, row = int((x0 + x1) / 2 * WIDTH), int((y0 + y1) / 2 * HEIGHT)
        radius = math.floor(gaussian_radius(torch.tensor(w), torch.tensor(h)).item())
        sigma = (2 * radius + 1) / 6
        for y in range(HEIGHT):
            for x in range(WIDTH):
                bell = math.exp(-((x - column) ** 2 + (y - row) ** 2) / (2 * sigma**2))
                heat[number, y, x] = max(heat[number, y, x], bell)
    return heat


def test_the_targets_are_those_of_the_paper() -> None:
    boxes, classes, there = drawn_boxes()
    found = heat_targets(boxes, classes, there, (CLASSES, HEIGHT, WIDTH))
    for row in range(len(boxes)):
        own = (part[row].tolist() for part in (boxes, classes, there))
        np.testing.assert_allclose(found[row], reference_heat(*own), atol=1e-6)
    assert found[0].max() == 1
    assert ((found[0] > 0.1) & (found[0] < 1)).sum() > 50  # the bells are wider than a cell
    assert not found[-1].any()


def test_the_focal_loss_is_equation_1() -> None:
    generator = torch.Generator().manual_seed(0)
    heat = torch.randn(3, CLASSES, HEIGHT, WIDTH, generator=generator) * 3
    targets = heat_targets(*drawn_boxes(), (CLASSES, HEIGHT, WIDTH))
    weight = (torch.rand(3, HEIGHT, WIDTH, generator=generator) < 0.8).float()
    found = focal_loss(heat, targets, weight)
    for row in range(3):
        total = 0.0
        for c, y, x in np.ndindex(CLASSES, HEIGHT, WIDTH):
            p = 1 / (1 + math.exp(-heat[row, c, y, x].item()))
            target = targets[row, c, y, x].item()
            if target == 1:
                total -= (1 - p) ** 2 * math.log(p)
            elif weight[row, y, x]:
                total -= (1 - target) ** 4 * p**2 * math.log(1 - p)
        assert found[row].item() == pytest.approx(total, rel=1e-5)


def test_logits_far_out_have_a_finite_loss_and_gradient() -> None:
    heat = torch.tensor([[[[90.0, -90.0]]]], requires_grad=True)
    targets = torch.tensor([[[[0.0, 1.0]]]])
    loss = focal_loss(heat, targets).sum()
    loss.backward()
    assert loss.item() == pytest.approx(180)
    assert heat.grad is not None
    assert heat.grad.isfinite().all()


def test_the_loss_of_boxes_is_that_of_their_cells() -> None:
    boxes, _, there = drawn_boxes()
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(3, 4, HEIGHT, WIDTH, generator=generator)
    found = box_loss(numbers, boxes, there)
    for row in range(3):
        total = 0.0
        for box, is_there in zip(boxes[row].tolist(), there[row].tolist(), strict=True):
            if not is_there:
                continue
            x, y = (box[0] + box[2]) / 2 * WIDTH, (box[1] + box[3]) / 2 * HEIGHT
            wanted = [
                x - int(x) - 0.5,
                y - int(y) - 0.5,
                math.log((box[2] - box[0]) * WIDTH),
                math.log((box[3] - box[1]) * HEIGHT),
            ]
            for number, value in enumerate(wanted):
                error = abs(numbers[row, number, int(y), int(x)].item() - value)
                total += error - 0.05 if error >= 0.1 else error**2 / 0.2
        assert found[row].item() == pytest.approx(total, rel=1e-4)


def perfect(boxes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Maps that say exactly these boxes, [n, 4], of one row."""
    heat = torch.full((1, CLASSES, HEIGHT, WIDTH), -9.0)
    numbers = torch.zeros(1, 4, HEIGHT, WIDTH)
    ends = torch.tensor([WIDTH, HEIGHT])
    for place, (box, number) in enumerate(zip(boxes, classes.tolist(), strict=True)):
        centre, sides = (box[:2] + box[2:]) / 2 * ends, (box[2:] - box[:2]) * ends
        x, y = (int(end) for end in centre)
        heat[0, number, y, x] = 3.0 - place
        numbers[0, :, y, x] = torch.cat((centre - torch.tensor([x, y]) - 0.5, sides.log()))
    return heat, numbers


def test_boxes_come_back_from_maps_best_first() -> None:
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.3], [0.5, 0.5, 0.9, 1.0], [0.0, 0.7, 0.1, 0.8]])
    classes = torch.tensor([2, 0, 2])
    maps = perfect(boxes, classes)
    found = decode(*maps, most=3)
    torch.testing.assert_close(found.boxes[0], boxes, atol=1e-6, rtol=0)
    assert found.classes[0].tolist() == [2, 0, 2]
    assert found.scores[0].tolist() == pytest.approx([1 / (1 + math.exp(-z)) for z in (3, 2, 1)])
    loss = box_loss(maps[1], boxes[None], torch.ones(1, 3, dtype=torch.bool))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_a_cell_beside_a_larger_one_of_its_class_is_no_peak() -> None:
    heat = torch.full((1, 2, 4, 4), -5.0)
    heat[0, 0, 1, 1], heat[0, 0, 1, 2], heat[0, 1, 1, 2] = 2.0, 1.9, 1.0
    found = decode(heat, torch.zeros(1, 4, 4, 4), most=8)
    best = [
        (c, round(s, 3))
        for c, s in zip(found.classes[0, :3].tolist(), found.scores[0, :3].tolist(), strict=True)
    ]
    assert best[:2] == [(0, 0.881), (1, 0.731)]
    assert best[2][1] < 0.01
    assert decode(heat, torch.zeros(1, 4, 4, 4), most=100).scores.shape == (1, 32)


def test_one_class_and_no_boxes_are_legal() -> None:
    boxes, classes, there = torch.zeros(2, 1, 4), torch.zeros(2, 1).long(), torch.zeros(2, 1).bool()
    targets = heat_targets(boxes, classes, there, (1, 4, 4))
    assert targets.shape == (2, 1, 4, 4)
    assert not targets.any()
    numbers = torch.randn(2, 4, 4, 4, requires_grad=True)
    loss = focal_loss(torch.zeros(2, 1, 4, 4), targets) + box_loss(numbers, boxes, there)
    torch.testing.assert_close(loss, torch.full((2,), 16 * 0.25 * math.log(2)))
    loss.sum().backward()
    assert numbers.grad is not None
    assert not numbers.grad.any()


def test_cells_with_their_middle_in_a_box() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.24], [0.75, 0.75, 1.0, 1.0]]])
    both = cells_in(boxes, torch.tensor([[True, True]]), (4, 4))
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, :2], expected[3, 3] = True, True
    assert torch.equal(both[0], expected)
    first = cells_in(boxes, torch.tensor([[False, True]]), (4, 4))
    assert first.sum() == 1
