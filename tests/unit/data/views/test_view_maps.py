"""The maps that views give along: points that are drawn into pictures are found where they say."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hpdist.data.decode.pixels import ImageSpec
from hpdist.data.views import (
    IdentityViewsConfig,
    ImageViewsConfig,
    MappedViews,
    TableViewsConfig,
)
from hpdist.data.views import geometry as geo
from hpdist.data.views import rand_augment as ra

SIZES = [(32, 32), (24, 40), (8, 8), (64, 48)]
BACKGROUND = 128  # nearly as grey as what a warp uncovers
COPIES = ["identity", *(name for name in ra.STRENGTHS if name not in ra.WARPS)][1:]


def drawn_points(rows, size, seed=0, margin=0.2):
    """One point in every picture, [rows, 1, 2]."""
    drawn = torch.rand(rows, 1, 2, generator=torch.Generator().manual_seed(seed))
    return (margin + drawn * (1 - 2 * margin)) * torch.tensor([float(size[1]), float(size[0])])


def width_of(size):
    """The blobs' standard deviation, in pixels."""
    return 0.9 if min(size) < 16 else 1.5


def blobs(points, size, channels=3):
    """Pictures with a bright Gaussian at each row's point, uint8 [rows, channels, *size]."""
    x, y = torch.arange(size[1]) + 0.5, (torch.arange(size[0]) + 0.5)[:, None]
    away = (x - points[:, :, 0:1]) ** 2 + (y - points[:, :, 1:2]) ** 2  # [rows, *size]
    bright = torch.exp(-away / (2 * width_of(size) ** 2))
    picture = (BACKGROUND + (255 - BACKGROUND) * bright).round().to(torch.uint8)
    return picture[:, None].repeat(1, channels, 1, 1)


def found(picture, near, radius):
    """Where the blob is, [2], among the pixels within a radius of a place; None where none is."""
    x, y = torch.arange(picture.shape[1]) + 0.5, (torch.arange(picture.shape[0]) + 0.5)[:, None]
    away = (picture - picture.median()).abs()
    away = away * (((x - near[0]) ** 2 + (y - near[1]) ** 2) <= radius**2)
    if away.max() < 0.02:
        return None
    weight = (away - away.max() / 2).clamp(min=0)
    return torch.stack(((weight * x).sum(), (weight * y).sum())) / weight.sum()


def built(**settings):
    return ImageViewsConfig(mean=[0.0], std=[1.0], **settings).build(0)


def view(kind, views, x, **changed):
    where = {"stream": "unlabeled", "step": 3, "positions": torch.arange(len(x)), **changed}
    return getattr(views, kind)(x, **where)


def check_points(mapped, points, x, least, hidden=False):
    """Compare moved points with the blobs in the pixels, to half a pixel.

    Points near the border, near what a warp uncovered, or under the grey square are passed over;
    at least this share must be left.
    """
    size = tuple(x.shape[2:])
    moved = geo.move_points(points, mapped.maps)[:, 0]
    uncovered = geo.move_masks(
        torch.zeros(len(x), *size, dtype=torch.int64), mapped.maps, size, visible=mapped.visible
    )
    radius = 2.5 * width_of(size) + 1
    worst, compared = 0.0, 0
    y, x_at = torch.meshgrid(
        torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij"
    )
    for row, place in enumerate(moved):
        near = ((x_at - place[0]) ** 2 + (y - place[1]) ** 2) <= (radius + 1) ** 2
        inside = (place > width_of(size)).all()
        inside &= (place < torch.tensor([size[1], size[0]]) - width_of(size)).all()
        if not inside or uncovered[row][near].any():
            continue
        if hidden:
            x0, y0, x1, y1 = mapped.hidden[row]
            if (near & (x_at > x0) & (x_at < x1) & (y > y0) & (y < y1)).any():
                continue
        where = found(mapped.rows[row].mean(dim=0), place, radius)
        if where is None:
            continue
        compared += 1
        worst = max(worst, float((where - place).abs().max()))
    assert compared >= least * len(x), f"{compared} of {len(x)} compared"
    assert worst < 0.5
    return worst


def only(name, **strong):
    """Views with one operation and nothing beside it."""
    exclude = [other for other in ra.STRENGTHS if other != name]
    still = {"shift": 0, "flip": False}
    return built(weak=still, strong={"ops": 1, "exclude": exclude, "cutout": 0, **strong})


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_weak_views_tell_their_shift_and_flip(size, channels):
    points = drawn_points(64, size)
    x = blobs(points, size, channels)
    mapped = view("weak_with_maps", built(weak={"shift": 0.25}), x)
    check_points(mapped, points, x, 0.2 if size == (8, 8) else 0.5)
    assert len(mapped.maps.unique(dim=0)) > 20
    assert not mapped.hidden.any()


@pytest.mark.parametrize("magnitude", [0.3, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", list(ra.STRENGTHS))
def test_every_operation_alone(name, size, magnitude):
    points = drawn_points(48, size, margin=0.3)
    x = blobs(points, size)
    mapped = view("strong_with_maps", only(name, magnitude=magnitude), x)
    check_points(mapped, points, x, 0.4)
    moves = (mapped.maps != geo.identity_maps(48)).flatten(1).any(dim=1)
    assert moves.all() if name in ra.WARPS else not moves.any()


@pytest.mark.parametrize("operations", [1, 2, 3])
@pytest.mark.parametrize(("size", "channels"), [((32, 32), 3), ((24, 40), 1), ((64, 48), 4)])
def test_strong_views_tell_all_that_moved_in_its_order(size, channels, operations):
    points = drawn_points(200, size, margin=0.3)
    x = blobs(points, size, channels)
    exclude = ["equalize", "posterize"]  # after others they may leave nothing of a blob
    views = built(strong={"cutout": 0.2, "exclude": exclude})
    mapped = view("graded_with_maps", views, x, operations=operations)
    check_points(mapped, points, x, 0.25, hidden=True)


@pytest.mark.parametrize(("size", "rows"), [((8, 8), 200), ((224, 224), 24)])
def test_strong_views_of_small_and_of_large_pictures(size, rows):
    points = drawn_points(rows, size, margin=0.35)
    x = blobs(points, size)
    views = built(strong={"ops": 2, "cutout": 0, "exclude": COPIES, "magnitude": 0.5})
    check_points(view("strong_with_maps", views, x), points, x, 0.2)


def test_a_picture_of_its_own_coordinates_says_where_every_pixel_came_from():
    """Three operations that all move pixels, not every time, of every pixel."""
    height, width = 60, 90
    x, y = torch.arange(width) * 2 + 20, torch.arange(height)[:, None] * 2 + 20
    picture = torch.stack((x.expand(height, width), y.expand(height, width)))
    rows = picture.to(torch.uint8).expand(100, 2, height, width)
    views = built(strong={"ops": 3, "probability": 0.7, "exclude": COPIES, "cutout": 0, "shift": 0})
    mapped = view("strong_with_maps", views, rows)
    visible = (mapped.rows * 255 - 20) / 2 + 0.5  # [rows, 2, H, W], where each pixel came from
    back = geo.invert(mapped.maps)
    at_x, at_y = torch.arange(width) + 0.5, (torch.arange(height) + 0.5)[:, None]
    told = (
        back[:, :, 0, None, None] * at_x
        + back[:, :, 1, None, None] * at_y
        + back[:, :, 2, None, None]
    )
    told_x, told_y = told.unbind(1)
    frame = torch.zeros(100, height, width, dtype=torch.int64)
    inside = geo.move_masks(frame, mapped.maps, (height, width), visible=mapped.visible) == 0
    inside &= (told_x > 3) & (told_x < width - 3) & (told_y > 3) & (told_y < height - 3)
    apart = (visible - told).abs().amax(dim=1)[inside]
    assert inside.float().mean() > 0.5
    assert (apart < 0.02).float().mean() > 0.97  # the rest are corners that a turn pushed out
    assert len(mapped.maps.unique(dim=0)) > 90


def test_what_one_operation_pushed_out_is_not_seen_when_the_next_moves_back():
    """Every pixel that a shift and two translations left is told, and no other."""
    x = torch.full((200, 1, 20, 30), 255, dtype=torch.uint8)
    exclude = [name for name in ra.STRENGTHS if not name.startswith("translate")]
    views = built(strong={"ops": 2, "exclude": exclude, "cutout": 0, "shift": 0, "flip": True})
    mapped = view("strong_with_maps", views, x)
    ones = torch.ones(200, 20, 30, dtype=torch.int64)
    told = geo.move_masks(ones, mapped.maps, (20, 30), fill=0, visible=mapped.visible) == 1
    shown = mapped.rows[:, 0]
    clear = (shown < 0.51) | (shown > 0.99)  # not on the seam
    assert torch.equal(told[clear], (shown > 0.99)[clear])
    without = geo.move_masks(ones, mapped.maps, (20, 30), fill=0) == 1
    back = (without & ~told).flatten(1).any(dim=1)
    assert 0.05 < back.float().mean() < 0.6
    whole = torch.tensor([[[0.0, 0, 30, 20]]] * 200)
    boxes = geo.move_boxes(whole, mapped.maps, (20, 30), visible=mapped.visible)
    torch.testing.assert_close(boxes.share[:, 0], told.float().mean(dim=(1, 2)), rtol=0, atol=0.06)
    centre = torch.tensor([[[0.5, 10], [15, 10]]] * 200)
    lines, columns = geo.move_points(centre, mapped.maps).floor().long().flip(2).unbind(2)
    found_in = (lines >= 0) & (lines < 20) & (columns >= 0) & (columns < 30)
    expected = found_in & told[torch.arange(200)[:, None], lines.clamp(0, 19), columns.clamp(0, 29)]
    visible = geo.points_visible(centre, mapped.maps, (20, 30), visible=mapped.visible)
    assert (visible == expected).float().mean() > 0.97


@pytest.mark.parametrize("size", [(48, 48), (96, 64), (20, 30)])
@pytest.mark.parametrize("target", [32, 64])
def test_pictures_that_are_resized_as_they_are_read(size, target):
    """`views.size` resizes in the decoder; labels follow by `resize_maps`, then by the view's."""
    points = drawn_points(16, size, margin=0.3)
    spec = ImageSpec((3, target, target), "encoded", mode="RGB", size=target)
    rows = []
    for picture in blobs(points, size):
        file = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "png")
        rows.append(spec.decode({"bytes": file.getvalue(), "path": None}))
    x = torch.stack(rows)
    resized = geo.resize_maps(torch.tensor([size] * 16), (target, target))
    mapped = view("weak_with_maps", built(weak={"shift": 0.1}), x)
    whole = geo.compose([resized, mapped.maps])
    moved = geo.move_points(points, whole)[:, 0]
    for picture, place in zip(mapped.rows, moved, strict=True):
        where = found(picture.mean(dim=0), place, 6)
        assert where is not None
        assert (where - place).abs().max() < 0.5


def test_pseudo_labels_go_from_the_weak_view_to_the_strong_one():
    size = (48, 64)
    points = drawn_points(100, size, margin=0.35)
    x = blobs(points, size)
    views = built(strong={"ops": 2, "exclude": COPIES, "cutout": 0, "magnitude": 0.5})
    weak, strong = view("weak_with_maps", views, x), view("strong_with_maps", views, x)
    visible = geo.move_points(points, weak.maps)
    in_strong = geo.move_points(visible, geo.map_between(weak.maps, strong.maps))
    torch.testing.assert_close(in_strong, geo.move_points(points, strong.maps), rtol=0, atol=1e-3)
    check_points(strong, points, x, 0.5)


def test_moved_boxes_and_masks_lie_on_what_they_mark():
    """A filled square's mask and box, moved, against the square's own pixels in the view."""
    masks = torch.zeros(60, 40, 56, dtype=torch.int64)
    masks[:, 14:26, 20:36] = 1
    x = (masks * 127 + 128).to(torch.uint8)[:, None]
    views = built(strong={"ops": 2, "exclude": COPIES, "cutout": 0, "magnitude": 0.6})
    mapped = view("strong_with_maps", views, x)
    shown = mapped.rows[:, 0] > 0.75
    moved = geo.move_masks(masks, mapped.maps, (40, 56), fill=0, visible=mapped.visible) == 1
    both, either = (shown & moved).sum(dim=(1, 2)), (shown | moved).sum(dim=(1, 2))
    box = torch.tensor([[[20.0, 14, 36, 26]]] * 60)
    boxes = geo.move_boxes(box, mapped.maps, (40, 56), visible=mapped.visible)
    assert boxes.kept.all()
    clear = boxes.share[:, 0] == 1
    assert clear.float().mean() > 0.5
    assert (both / either)[clear].min() > 0.8  # an edge between two lines is blurred by two warps
    assert (both / either)[clear].mean() > 0.97
    for pixels, box in zip(shown[clear], boxes.boxes[clear, 0], strict=True):
        lines, columns = pixels.nonzero().unbind(1)
        ends = [columns.min(), lines.min(), columns.max() + 1, lines.max() + 1]
        assert (torch.tensor(ends) - box).abs().max() < 1.6  # sharp corners are rounded off


# What belongs to a view.


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (9, 1), (2, 2)])
@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_rows_are_those_of_the_view_without_maps_to_the_last_bit(size, probability):
    x = torch.randint(256, (50, 3, *size), dtype=torch.uint8)
    views = ImageViewsConfig(strong={"probability": probability}).build(5)
    assert torch.equal(views.plain_with_maps(x).rows, views.plain(x))
    assert torch.equal(views.plain_with_maps(x).maps, geo.identity_maps(50))
    for kind, more in (("weak", {}), ("strong", {}), ("graded", {"operations": 3})):
        mapped = view(f"{kind}_with_maps", views, x, copy=1, **more)
        assert torch.equal(mapped.rows, view(kind, views, x, copy=1, **more))
        assert mapped.maps.shape == (50, 2, 3)
        assert mapped.maps.dtype == mapped.hidden.dtype == torch.float32
        assert mapped.maps.isfinite().all()
    assert view("strong_with_maps", views, x[:0], positions=torch.arange(0)).maps.shape[0] == 0


@pytest.mark.parametrize("kind", ["weak_with_maps", "strong_with_maps"])
def test_a_map_does_not_depend_on_the_rows_beside_it(kind):
    """As any rank and micro-batch gets it; every name of the noise changes it."""
    x = torch.randint(256, (97, 3, 24, 40), dtype=torch.uint8)
    whole = view(kind, built(), x)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    for rows in (order, *torch.arange(97).split([1, 3, 40, 53])):
        part = view(kind, built(), x[rows], positions=rows)
        assert torch.equal(part.maps, whole.maps[rows])
        assert torch.equal(part.hidden, whole.hidden[rows])
        assert torch.equal(part.visible, whole.visible[rows])
    for change in ({"copy": 1}, {"step": 4}, {"stream": "labeled"}):
        other = view(kind, built(), x, **change)
        assert (other.maps != whole.maps).flatten(1).any(dim=1).float().mean() > 0.7


def test_hidden_squares_are_the_grey_ones():
    x = torch.zeros(300, 1, 20, 32, dtype=torch.uint8)
    still = {"shift": 0, "flip": False}
    mapped = view("strong_with_maps", built(weak=still, strong={"ops": 0}), x)
    rows = torch.arange(20)[:, None] + 0.5, torch.arange(32) + 0.5
    x0, y0, x1, y1 = (side[:, None, None] for side in mapped.hidden.unbind(1))
    told = (rows[0] > y0) & (rows[0] < y1) & (rows[1] > x0) & (rows[1] < x1)
    assert torch.equal(told, mapped.rows[:, 0] == ra.GREY)
    none = view("strong_with_maps", built(strong={"cutout": 0}), x)
    assert not none.hidden.any()


def test_other_views_say_whether_they_have_maps():
    x = torch.arange(6).view(2, 3)
    identity = IdentityViewsConfig().build(0)
    assert isinstance(identity, MappedViews)
    assert isinstance(built(), MappedViews)
    assert not isinstance(TableViewsConfig().build(0), MappedViews)
    for kind, more in (("weak", {}), ("strong", {}), ("graded", {"operations": 3})):
        mapped = view(f"{kind}_with_maps", identity, x, **more)
        assert torch.equal(mapped.rows, x.float())
        assert torch.equal(mapped.maps, geo.identity_maps(2))
    assert np.allclose(identity.plain_with_maps(x).hidden, 0)
