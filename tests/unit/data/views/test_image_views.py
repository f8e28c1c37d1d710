"""Views of images: each operation against PIL, and rows that know nothing of one another."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from hpdist.config.component import component_names
from hpdist.data.views import GradedViews, IdentityViewsConfig, ImageViewsConfig
from hpdist.data.views import image as image_views
from hpdist.data.views import rand_augment as ra
from hpdist.errors import ConfigError, DataError

SHAPES = [(3, 32, 32), (1, 8, 8), (1, 28, 28), (3, 64, 48), (4, 9, 1), (13, 1, 7), (2, 2, 2)]


def pixels(batch, channels=3, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def smooth(height, width):
    """An RGB image without edges, uint8 [3, H, W]: interpolation by any rule gives the same."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(x / 5 + c) + torch.cos(y / 7 - c) for c in range(3)]
    return ((torch.stack(waves) + 2) * 60).to(torch.uint8)


def to_pil(image):
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])


def from_pil(image):
    array = torch.from_numpy(np.array(image))
    return (array.permute(2, 0, 1) if array.dim() == 3 else array[None]).float()


def views(seed=0, **settings):
    return ImageViewsConfig(**settings).build(seed)


def view(kind, built, x, **changed):
    where = {"stream": "unlabeled", "step": 3, "positions": torch.arange(len(x)), **changed}
    return getattr(built, kind)(x, **where)


def pixelwise(name, image, strength):
    """One operation on one uint8 image, in levels of 0 to 255."""
    return ra.PIXELWISE[name](image[None] / 255, torch.tensor(strength).view(1, 1, 1, 1))[0] * 255


# Each operation against PIL. PIL works in whole levels, so where it rounds, so much is allowed.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (100, 120)])
def test_equalize_is_pils(channels, size):
    image = (pixels(1, channels, *size)[0].float() ** 2 / 400).to(torch.uint8)  # uneven, not full
    expected = from_pil(ImageOps.equalize(to_pil(image)))
    assert (expected - image.float()).abs().max() > 20
    torch.testing.assert_close(pixelwise("equalize", image, 0.0), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("level", [0, 7, 255])
def test_flat_and_small_images_stay(level):
    flat = torch.full((3, 32, 32), level, dtype=torch.uint8)
    small = pixels(1, 3, 8, 8)[0]
    assert torch.equal(pixelwise("equalize", flat, 0.0).round(), flat.float())
    assert torch.equal(pixelwise("autocontrast", flat, 0.0).round(), flat.float())
    assert torch.equal(from_pil(ImageOps.equalize(to_pil(small))), small.float())
    assert torch.equal(pixelwise("equalize", small, 0.0).round(), small.float())


def test_autocontrast_is_pils_for_each_channel():
    image = torch.stack([pixels(1, 1)[0, 0] // divisor + 9 * divisor for divisor in (2, 3, 5)])
    expected = from_pil(ImageOps.autocontrast(to_pil(image)))
    torch.testing.assert_close(pixelwise("autocontrast", image, 0.0), expected, rtol=0, atol=1.01)


@pytest.mark.parametrize("dropped", [0, 1, 2, 3, 4])
def test_posterize_is_pils(dropped):
    image = pixels(1)[0]
    expected = from_pil(ImageOps.posterize(to_pil(image), 8 - dropped))
    for strength in (dropped, dropped + 0.99):
        result = pixelwise("posterize", image, float(strength))
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("threshold", [256, 255, 128, 64, 0])
def test_solarize_is_pils(threshold):
    image = pixels(1)[0]
    expected = from_pil(ImageOps.solarize(to_pil(image), threshold))
    result = pixelwise("solarize", image, 1 - threshold / 256)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.4, 0.95])
@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("color", ImageEnhance.Color),
        ("contrast", ImageEnhance.Contrast),
        ("sharpness", ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_pils(name, enhancer, strength):
    image = pixels(1, 3, 24, 32)[0]
    expected = from_pil(enhancer(to_pil(image)).enhance(1 - strength))
    result = pixelwise(name, image, strength)
    torch.testing.assert_close(result, expected, rtol=0, atol=1.6)  # PIL rounds twice


@pytest.mark.parametrize("amount", [30.0, -12.0])
def test_rotation_is_pils(amount):
    image = smooth(40, 56)
    expected = from_pil(to_pil(image).rotate(amount, Image.Resampling.BILINEAR))
    assert_warped("rotate", amount, image, expected)


@pytest.mark.parametrize("amount", [0.3, -0.17])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y"])
def test_shears_and_translations_are_pils(name, amount):
    """RandAugment in PIL shears about a corner; here, and in the matrix below, about the centre."""
    image = smooth(40, 56)
    y, x = (side / 2 for side in image.shape[1:])
    matrix = {
        "shear_x": (1, amount, -amount * y, 0, 1, 0),
        "shear_y": (1, 0, 0, amount, 1, -amount * x),
        "translate_x": (1, 0, amount * 56, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, amount * 40),
    }[name]
    pil = to_pil(image)
    expected = pil.transform(pil.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    assert_warped(name, amount, image, from_pil(expected))


def assert_warped(name, amount, image, expected):
    """Equal to PIL's inside, grey where PIL's is black; PIL's seam between the two is sharper."""
    matrices = ra.affine_matrices([name], torch.tensor([amount]))
    result = ra.warp(image[None] / 255, matrices)[0] * 255
    inside = ra.warp(torch.ones(1, 1, *image.shape[1:]), matrices)[0].expand_as(result) == 1
    outside = ra.warp(torch.zeros(1, 1, *image.shape[1:]), matrices)[0].expand_as(result) == 0.5
    assert 0.5 < inside.float().mean() < 0.97
    assert (result[inside] - expected[inside]).abs().max() < 2
    assert outside.any()
    assert (result[outside] == 127.5).all()
    assert (expected[outside] == 0).all()


def test_translation_by_whole_pixels_moves_pixels():
    image = pixels(1, 3, 10, 20)
    matrices = ra.affine_matrices(["translate_x"], torch.tensor([0.25]))
    moved = ra.warp(image / 255, matrices)
    torch.testing.assert_close(moved[..., :15], image[..., 5:] / 255)
    assert (moved[..., 15:] == ra.GREY).all()


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_colour_operations_without_rgb(channels):
    """Grey is the channels' mean; contrast rounds it to levels before it averages, as PIL does."""
    image = pixels(1, channels)[0]
    mean = image.float().mean(dim=0, keepdim=True)
    expected = image * 0.4 + mean * 0.6
    torch.testing.assert_close(pixelwise("color", image, 0.6), expected, rtol=0, atol=1e-3)
    expected = image * 0.4 + image.float().mean() * 0.6
    torch.testing.assert_close(pixelwise("contrast", image, 0.6), expected, rtol=0, atol=0.31)


# The policy.


def draws(names, strength, sign=0.0):
    """Noise [B, 1, DRAWS] that chooses row b's operation to be names[b]."""
    ordered = sorted(ra.STRENGTHS, key=lambda name: name in ra.WARPS)
    which = [(ordered.index(name) + 0.5) / len(ordered) for name in names]
    return torch.tensor([[[choice, strength, sign]] for choice in which])


def test_each_row_gets_its_own_operation_and_no_other():
    names = list(ra.STRENGTHS) * 2
    images = pixels(len(names)) / 500 + 0.2
    result = ra.rand_augment(images.clone(), draws(names, 0.5), list(ra.STRENGTHS), 1.0)
    for name, image, changed in zip(names, images, result, strict=True):
        low, high = ra.STRENGTHS[name]
        strength = torch.tensor([(low + high) / 2])
        if name in ra.WARPS:
            expected = ra.warp(image[None], ra.affine_matrices([name], -strength))[0]
        elif name == "identity":
            expected = image
        else:
            expected = ra.PIXELWISE[name](image[None], strength.view(1, 1, 1, 1))[0]
        assert torch.equal(changed, expected), name
        assert torch.equal(changed, image) == (name == "identity"), name


def test_magnitude_scales_strength_and_the_third_draw_is_the_sign():
    images = smooth(32, 32)[None] / 255
    for sign, draw in ((-1, 0.2), (1, 0.7)):
        noise = draws(["rotate"], 0.8, draw)
        result = ra.rand_augment(images.clone(), noise, list(ra.STRENGTHS), 0.5)
        angle = torch.tensor([sign * 30 * 0.8 * 0.5])
        torch.testing.assert_close(result, ra.warp(images, ra.affine_matrices(["rotate"], angle)))


def test_magnitude_zero_leaves_all_but_the_histogram_operations():
    names = [name for name in ra.STRENGTHS if name not in ("autocontrast", "equalize")]
    images = pixels(len(names)) / 255
    result = ra.rand_augment(images.clone(), draws(names, 0.9), list(ra.STRENGTHS), 0.0)
    torch.testing.assert_close(result, images, rtol=0, atol=1e-5)


def test_operations_are_drawn_equally_often_and_excluded_ones_never():
    kept = ["rotate", "solarize", "identity", "posterize"]
    exclude = [name for name in ra.STRENGTHS if name not in kept]
    built = views(strong={"ops": 1, "exclude": exclude, "cutout": 0, "shift": 0, "flip": False})
    assert sorted(built.operations) == sorted(kept)
    x = pixels(2000, 1, 8, 8)
    changed = (view("strong", built, x) != built.plain(x)).flatten(1).any(dim=1)
    identity = 0.25 * (1 + 1 / 5 + 1 / 70)  # itself, posterize of no bit, solarize of no pixel
    share = 1 - changed.float().mean()
    assert abs(share - identity) < 4 * math.sqrt(identity * (1 - identity) / 2000)


# Shift, flip, cutout.


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (5, 40)])
def test_shift_is_reflect_padding_and_crop(height, width):
    x = pixels(300, 2, height, width)
    top, left = height // 4, width // 4
    noise = torch.rand(300, 3, generator=torch.Generator().manual_seed(1))
    result = image_views.shift_and_flip(x, noise, 0.25, flip=True)
    places = set()
    for row, (u, v, w) in enumerate(noise.tolist()):
        image = x[row].flip(-1) if w < 0.5 else x[row]
        padded = np.pad(image.numpy(), ((0, 0), (top, top), (left, left)), mode="reflect")
        y, z = int(u * (2 * top + 1)), int(v * (2 * left + 1))
        crop = torch.from_numpy(padded[:, y : y + height, z : z + width])
        assert torch.equal(result[row], crop)
        places.add((y, z))
    assert len(places) > min(300, (2 * top + 1) * (2 * left + 1)) / 2


def test_shift_beyond_the_side_is_reflected_again():
    x = torch.arange(3, dtype=torch.uint8).view(1, 1, 1, 3)
    noise = torch.tensor([[0.0, 0.999, 0.9]])  # as far as it goes: 3 pixels
    assert image_views.shift_and_flip(x, noise, 1.0, flip=True).flatten().tolist() == [1, 0, 1]


def test_weak_flips_half_the_rows():
    x = pixels(1000)
    built = views(weak={"shift": 0})
    weak, plain = view("weak", built, x), built.plain(x)
    flipped = (weak == plain.flip(-1)).flatten(1).all(1)
    assert ((weak == plain).flatten(1).all(1) | flipped).all()
    assert 430 < flipped.sum() < 570
    assert torch.equal(view("weak", views(weak={"shift": 0, "flip": False}), x), plain)


def test_cutout_is_one_grey_square_clipped_at_the_border():
    images = torch.zeros(400, 3, 20, 32)
    noise = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
    result = image_views.cutout(images, noise, 0.5)
    assert set(result.unique().tolist()) == {0.0, ra.GREY}
    assert torch.equal(result[:, :1].expand_as(result), result)
    rows = result[:, 0].amax(dim=2).gt(0).sum(dim=1)  # how high the square is, how wide
    columns = result[:, 0].amax(dim=1).gt(0).sum(dim=1)
    assert torch.equal(result[:, 0].gt(0).sum(dim=(1, 2)), rows * columns)
    assert rows.max() == columns.max() == 10  # half of the shorter side
    assert rows.min() == columns.min() == 5
    assert (rows == 10).float().mean() == pytest.approx(11 / 20, abs=0.1)


def test_strong_takes_shift_and_flip_from_weak_unless_it_has_its_own():
    x = pixels(64)
    bare = {"ops": 0, "cutout": 0}
    still = views(weak={"shift": 0, "flip": False}, strong=bare)
    assert torch.equal(view("strong", still, x), still.plain(x))
    own = views(weak={"shift": 0, "flip": False}, strong={**bare, "flip": True})
    assert not torch.equal(view("strong", own, x), own.plain(x))
    assert not torch.equal(view("strong", own, x), view("weak", own, x))


# Rows know nothing of one another.


@pytest.mark.parametrize("kind", ["weak", "strong"])
@pytest.mark.parametrize(("channels", "height", "width"), SHAPES)
def test_a_row_does_not_depend_on_its_batch(kind, channels, height, width):
    x = pixels(97, channels, height, width)
    built = views(strong={"ops": 3})
    whole = view(kind, built, x)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    assert torch.equal(view(kind, built, x[order], positions=order), whole[order])
    positions = torch.arange(97)
    parts = [view(kind, built, x[part], positions=part) for part in positions.split([1, 3, 40, 53])]
    assert torch.equal(torch.cat(parts), whole)


def test_autocast_changes_nothing():
    x = pixels(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = view("strong", views(), x)
    assert torch.equal(inside, view("strong", views(), x))


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_every_name_changes_the_noise(kind):
    x = pixels(1).repeat(50, 1, 1, 1)
    base = view(kind, views(), x)
    others = [
        view(kind, views(), x, stream="labeled"),
        view(kind, views(), x, step=4),
        view(kind, views(), x, copy=1),
        view(kind, views(), x, positions=torch.arange(50, 100)),
        view(kind, views(seed=1), x),
    ]
    assert torch.equal(view(kind, views(), x), base)
    for other in others:
        same = (other == base).flatten(1).all(dim=1).sum()
        assert same <= 5  # a weak view has 9 * 9 * 2 outcomes


# Shapes, types, settings.


@pytest.mark.parametrize(("channels", "height", "width"), SHAPES)
def test_results_are_finite_float32_in_range_and_inputs_stay(channels, height, width):
    x = pixels(200, channels, height, width)
    x[:20] = 0
    x[20:40] = 255
    before = x.clone()
    built = views(mean=[0.0], std=[1.0], strong={"ops": 4})
    for kind in ("weak", "strong"):
        result = view(kind, built, x)
        assert result.shape == x.shape
        assert result.dtype == torch.float32
        assert result.device == x.device
        assert result.isfinite().all()
        assert result.min() >= 0
        assert result.max() <= 1
    assert torch.equal(x, before)


def test_plain_normalises_each_channel():
    x = pixels(5)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    expected = (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(views(mean=mean, std=std).plain(x), expected)


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_batches_of_none_and_of_other_strides(kind):
    assert view(kind, views(), pixels(0)).shape == (0, 3, 32, 32)
    x = pixels(16)
    strided = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(view(kind, views(), strided), view(kind, views(), x))


def test_wrong_rows_and_settings_are_refused():
    with pytest.raises(DataError, match="identity"):
        views().plain(torch.rand(2, 3, 8, 8))
    with pytest.raises(DataError, match="uint8"):
        view("weak", views(), pixels(1)[0])
    with pytest.raises(ValueError, match="one per row"):
        view("weak", views(), pixels(3), positions=torch.arange(2))
    with pytest.raises(ConfigError, match=r"views\.mean has 2 values"):
        views(mean=[0.5, 0.5]).plain(pixels(1))
    with pytest.raises(ValueError, match=r"rotat.*known: identity, autocontrast"):
        ImageViewsConfig(strong={"exclude": ["rotat"]})
    with pytest.raises(ValueError, match=r"views\.strong\.ops"):
        ImageViewsConfig(strong={"exclude": list(ra.STRENGTHS)})
    with pytest.raises(ValueError, match="greater than 0"):
        ImageViewsConfig(std=[0.0])


def test_identity_views_change_only_the_dtype():
    built = IdentityViewsConfig().build(0)
    x = torch.arange(6).view(2, 3)
    for result in (built.plain(x), view("weak", built, x), view("strong", built, x)):
        assert result.dtype == torch.float32
        assert torch.equal(result, x.float())


def test_views_are_known_components():
    assert {"identity", "image"} <= set(component_names("views"))


def test_an_algorithm_can_ask_for_milder_and_for_stronger_views():
    x = pixels(64)
    kwargs = {"stream": "unlabeled", "step": 3, "positions": torch.arange(64)}
    plain, three = views(), views(strong={"ops": 3})
    usual = plain.strong(x, **kwargs)
    assert torch.equal(usual, plain.graded(x, operations=2, **kwargs))
    assert torch.equal(usual, views(strong={"ops": 2}).strong(x, **kwargs))
    assert torch.equal(plain.graded(x, operations=3, **kwargs), three.strong(x, **kwargs))
    assert torch.equal(three.graded(x, operations=1, **kwargs), three.strong(x, **kwargs))
    assert isinstance(plain, GradedViews)


def test_operations_are_applied_with_their_probability():
    """Each by itself: as many images as expected have both, and those are as they always were."""
    x = pixels(2000, 3, 8, 8)
    kwargs = {"stream": "unlabeled", "step": 0, "positions": torch.arange(2000)}

    def strong(**changes):
        return views(strong={"exclude": ["identity"], "cutout": 0.0, **changes}).strong(x, **kwargs)

    always, never, half = strong(), strong(ops=0), strong(probability=0.5)
    assert torch.equal(strong(probability=0.0), never)

    def share(one, other):
        return (one == other).flatten(1).all(dim=1).float().mean().item()

    alike, inert = share(half, always), share(always, never)
    assert inert < 0.1
    assert 0.2 < alike - inert < 0.3 + inert  # 1/4 of the images, or operations that change nothing
    assert 0.2 < share(half, never) < 0.3 + 2 * inert
    rows = torch.arange(1000, 2000)
    second = views(strong={"exclude": ["identity"], "cutout": 0.0, "probability": 0.5})
    part = second.strong(x[rows], **{**kwargs, "positions": rows})
    assert torch.equal(part, half[1000:])
