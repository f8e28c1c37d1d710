"""Maps and the labels that they move, against PIL, against pixels, and by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from hpdist.data.views import geometry as geo
from hpdist.data.views import rand_augment as ra


def drawn_maps(rows, seed=0):
    """Maps that turn, stretch, flip and shift."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.eye(2, 3).repeat(rows, 1, 1)
    maps += torch.rand(rows, 2, 3, generator=generator) * 0.6 - 0.3
    maps[:, :, 2] *= 30
    maps[::2, 0] *= -1
    return maps


def drawn_points(rows, count, seed=1):
    return torch.rand(rows, count, 2, generator=torch.Generator().manual_seed(seed)) * 40


def test_maps_are_matrices_applied_to_x_y_1():
    maps, points = drawn_maps(5), drawn_points(5, 7)
    for row in range(5):
        for point, moved in zip(points[row], geo.move_points(points, maps)[row], strict=True):
            torch.testing.assert_close(moved, maps[row] @ torch.tensor([*point.tolist(), 1.0]))


def test_compose_applies_the_first_map_first_and_invert_undoes_it():
    first, second, third = (drawn_maps(6, seed) for seed in (2, 3, 4))
    points = drawn_points(6, 4)
    expected = points
    for maps in (first, second, third):
        expected = geo.move_points(expected, maps)
    moved = geo.move_points(points, geo.compose([first, second, third]))
    torch.testing.assert_close(moved, expected)
    torch.testing.assert_close(
        geo.move_points(expected, geo.invert(third)),
        geo.move_points(points, geo.compose([first, second])),
    )
    between = geo.map_between(first, second)  # from the view that `first` made
    torch.testing.assert_close(
        geo.move_points(geo.move_points(points, first), between),
        geo.move_points(points, second),
        rtol=1e-4,
        atol=1e-4,
    )


def test_rows_do_not_depend_on_the_rows_beside_them():
    maps, points = drawn_maps(97), drawn_points(97, 3)
    boxes = torch.cat((points[:, :2], points[:, :2] + 5), dim=2)
    masks = torch.randint(9, (97, 12, 17))
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0))[:41]
    for move, labels in (
        (lambda labels, maps: geo.move_points(labels, maps), points),
        (lambda labels, maps: geo.move_boxes(labels, maps, (20, 30)).boxes, boxes),
        (lambda labels, maps: geo.move_masks(labels, maps, (20, 30)), masks),
    ):
        assert torch.equal(move(labels[order], maps[order]), move(labels, maps)[order])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = geo.compose([maps, geo.invert(maps)])
    assert torch.equal(inside, geo.compose([maps, geo.invert(maps)]))


@pytest.mark.parametrize("name", sorted(ra.WARPS))
@pytest.mark.parametrize("amount", [0.3, -0.17, 0.0])
def test_the_map_of_a_warp_is_pils_affine_matrix_inverted(name, amount):
    """PIL is told where each pixel of the result comes from, with pixel centres at 0.5."""
    amount = amount * 100 if name == "rotate" else amount
    y, x = torch.meshgrid(torch.arange(40), torch.arange(56), indexing="ij")
    image = (torch.sin(x / 5) + torch.cos(y / 7) + 2) * 60
    matrices = ra.affine_matrices([name], torch.tensor([amount]))
    ours = ra.warp(image[None, None] / 255, matrices)[0, 0] * 255
    back = geo.invert(ra.warp_maps(matrices, (40, 56)))[0].flatten().tolist()
    pil = Image.fromarray(image.numpy())
    transform, linear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    theirs = torch.from_numpy(np.array(pil.transform((56, 40), transform, back, linear)))
    inside = ra.warp(torch.ones(1, 1, 40, 56), matrices)[0, 0] == 1
    assert inside.float().mean() > 0.5
    assert (ours - theirs)[inside].abs().max() < 0.02


def test_a_resize_is_told_from_the_corners():
    sizes = torch.tensor([[480, 640], [10, 7]])
    maps = geo.resize_maps(sizes, (32, 48))
    points = torch.tensor([[[0.0, 0], [640, 480], [320, 120]], [[0.0, 0], [7, 10], [3.5, 2.5]]])
    expected = torch.tensor([[0.0, 0], [48, 32], [24, 8]]).expand(2, 3, 2)
    torch.testing.assert_close(geo.move_points(points, maps), expected)


def boxes_of(*boxes):
    return torch.tensor([[list(map(float, box)) for box in boxes]])


def turned(degrees, size):
    matrices = ra.affine_matrices(["rotate"], torch.tensor([float(degrees)]))
    return ra.warp_maps(matrices, size).float()


def test_boxes_are_clipped_and_those_that_are_gone_are_marked():
    shift = torch.tensor([[[1.0, 0, 10], [0, 1, -4]]])
    boxes = boxes_of((0, 4, 10, 14), (10, 4, 30, 24), (22, 0, 30, 8), (0, 0, 9, 4), (0, 0, 0, 0))
    moved = geo.move_boxes(boxes, shift, (16, 32))
    expected = [[10, 0, 20, 10], [20, 0, 32, 16], [0] * 4, [0] * 4, [0] * 4]
    assert moved.boxes[0].tolist() == expected
    assert moved.kept[0].tolist() == [True, True, False, False, False]
    torch.testing.assert_close(moved.share[0], torch.tensor([1, 12 * 16 / 400, 0, 0, 0]))
    strict = geo.move_boxes(boxes, shift, (16, 32), smallest_share=0.5)
    assert strict.kept[0].tolist() == [True, False, False, False, False]
    assert strict.boxes[0, 1].tolist() == [0] * 4
    with pytest.raises(ValueError, match="smallest_share must be between 0 and 1"):
        geo.move_boxes(boxes, shift, (16, 32), smallest_share=20)


def test_a_turned_box_is_the_box_around_its_corners():
    moved = geo.move_boxes(boxes_of((20, 10, 40, 30)), turned(30, (40, 60)), (40, 60))
    half = 10 * (math.cos(math.pi / 6) + math.sin(math.pi / 6))
    expected = torch.tensor([30 - half, 20 - half, 30 + half, 20 + half])
    torch.testing.assert_close(moved.boxes[0, 0], expected)
    assert moved.share.item() == pytest.approx(1)


def test_what_is_painted_over_lowers_the_share_alone():
    boxes = boxes_of((0, 0, 10, 10), (10, 0, 20, 10), (4, 4, 6, 6))
    hidden = torch.tensor([[3.0, 0, 8, 8]])
    moved = geo.move_boxes(boxes, geo.identity_maps(1), (20, 20), hidden=hidden)
    torch.testing.assert_close(moved.share[0], torch.tensor([0.6, 1, 0]))
    assert moved.kept[0].tolist() == [True, True, False]
    assert torch.equal(moved.boxes[0, :2], boxes[0, :2])
    nothing = geo.move_boxes(boxes, geo.identity_maps(1), (20, 20), hidden=torch.zeros(1, 4))
    assert torch.equal(nothing.share, torch.ones(1, 3))


def test_what_is_lost_before_the_move_is_cut_off_the_box_and_its_share():
    shift = torch.tensor([[[1.0, 0, 5], [0, 1, 0]]])
    boxes = boxes_of((0, 0, 10, 10), (2, 2, 4, 4), (6, 0, 9, 9))
    visible = torch.tensor([[5.0, 0, 20, 20]])
    moved = geo.move_boxes(boxes, shift, (20, 20), visible=visible)
    assert moved.boxes[0].tolist() == [[10, 0, 15, 10], [0] * 4, [11, 0, 14, 9]]
    assert moved.share[0].tolist() == [0.5, 0, 1]
    points = torch.tensor([[[4.0, 1], [5, 1], [16, 1], [8, 19]]])
    hidden = torch.tensor([[12.0, 18, 14, 20]])
    assert geo.points_visible(points, shift, (20, 20), visible=visible, hidden=hidden)[
        0
    ].tolist() == [*(False, True, False, False)]
    mask = torch.ones(1, 20, 20, dtype=torch.int64)
    left = geo.move_masks(mask, shift, (20, 20), fill=0, visible=visible)
    assert left[0].sum(dim=0).tolist() == [0] * 10 + [20] * 10


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_boxes_that_are_not_numbers_are_not_kept(bad):
    boxes = boxes_of((0, 0, bad, 10), (0, 0, 5, 5))
    moved = geo.move_boxes(boxes, turned(10, (20, 20)), (20, 20))
    assert moved.kept[0].tolist() == [False, True]
    assert moved.boxes.isfinite().all()
    assert moved.share.isfinite().all()


def test_masks_move_as_pixels_do():
    """Whole pixels, a flip, and a turn against `grid_sample` by the nearest pixel."""
    mask = torch.randint(7, (1, 12, 17), generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([[[1.0, 0, 3], [0, 1, -2]]])
    moved = geo.move_masks(mask, shift, (12, 17))
    assert torch.equal(moved[:, :10, 3:], mask[:, 2:, :14])
    assert (moved[:, 10:] == geo.IGNORED).all()
    assert (moved[:, :, :3] == geo.IGNORED).all()
    flip = torch.tensor([[[-1.0, 0, 17], [0, 1, 0]]])
    assert torch.equal(geo.move_masks(mask, flip, (12, 17)), mask.flip(2))
    larger = geo.move_masks(mask, geo.resize_maps(torch.tensor([[12, 17]]), (24, 51)), (24, 51))
    assert torch.equal(larger, mask.repeat_interleave(2, 1).repeat_interleave(3, 2))

    maps = turned(20, (12, 17))
    matrices = ra.affine_matrices(["rotate"], torch.tensor([20.0]))
    unit = torch.tensor([[1, 12 / 17, 2], [17 / 12, 1, 2]])
    grid = F.affine_grid(matrices * unit, [1, 1, 12, 17], align_corners=False)
    shifted = F.grid_sample(mask[:, None] + 1.0, grid, mode="nearest", align_corners=False)
    expected = torch.where(shifted == 0, -100, shifted.long() - 1)[:, 0]
    assert torch.equal(geo.move_masks(mask, maps, (12, 17), fill=-100), expected)


def test_masks_of_other_types_and_of_no_pixels():
    maps = turned(20, (12, 17))
    there = torch.ones(1, 12, 17, dtype=torch.bool)
    moved = geo.move_masks(there, maps, (12, 17), fill=False)
    assert moved.dtype == torch.bool
    assert 0.5 < moved.float().mean() < 1
    with pytest.raises(ValueError, match="bool masks have no value 255"):
        geo.move_masks(there, maps, (12, 17))
    assert (geo.move_masks(torch.zeros(1, 0, 5, dtype=torch.int64), maps, (2, 3)) == 255).all()
    flat = torch.zeros(1, 2, 3)  # it has no way back
    assert (geo.move_masks(torch.zeros(1, 4, 4, dtype=torch.int64), flat, (2, 2)) == 255).all()


def test_labels_of_other_shapes_and_rows_are_refused():
    with pytest.raises(ValueError, match=r"points must be \[rows, n, 2\].*not \[3, 2\]"):
        geo.move_points(torch.zeros(3, 2), geo.identity_maps(3))
    with pytest.raises(ValueError, match=r"boxes must be \[rows, n, 4\].*with \[2, 2, 3\]"):
        geo.move_boxes(torch.zeros(3, 1, 4), geo.identity_maps(2), (8, 8))
    with pytest.raises(ValueError, match=r"masks must be \[rows, n, n\]"):
        geo.move_masks(torch.zeros(3, 1, 4, 4), geo.identity_maps(3), (8, 8))
