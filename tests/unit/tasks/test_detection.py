"""Boxes that move with views, pseudo-boxes, and what the losses are a mean over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hpdist.train.config  # noqa: F401  (every algorithm is known from here on)
from hpdist.algorithms import FixMatch, PseudoLabel, Supervised
from hpdist.algorithms.protocol import Attempt
from hpdist.config.component import components
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.views import ImageViewsConfig, TableViewsConfig
from hpdist.data.views.geometry import move_boxes
from hpdist.data.views.places import HIDDEN, MAPS, VISIBLE, place_of
from hpdist.errors import ConfigError
from hpdist.tasks import make_task
from hpdist.tasks.detection import Detection
from hpdist.testing import check_algorithm
from hpdist.train.micro_batch import MicroBatcher, require_maps

HEIGHT, WIDTH = 64, 96
GRID = (16, 24)
TASK = Detection(least_visible=0.5)
COLOURS = ["autocontrast", "brightness", "color", "contrast", "equalize", "posterize"]


def pictures(rows: int = 24) -> tuple[Tensor, Tensor]:
    """One white rectangle in the middle of each black picture; its box in shares, [rows, 1, 4]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(rows, 1, HEIGHT, WIDTH, dtype=torch.uint8)
    boxes = torch.zeros(rows, 1, 4)
    for row in range(rows):
        left = int(torch.randint(30, 44, (1,), generator=generator))
        top = int(torch.randint(20, 28, (1,), generator=generator))
        w, h = (int(side) for side in torch.randint(12, 20, (2,), generator=generator))
        x[row, :, top : top + h, left : left + w] = 255
        boxes[row, 0] = torch.tensor([left, top, left + w, top + h])
    return x, boxes / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])


def in_pixels(picture: Tensor) -> Tensor:
    """The box around what is bright, in shares, [4]."""
    bright = picture > picture.min() + 0.5 * (picture.max() - picture.min())
    rows, columns = bright.any(dim=1).nonzero(), bright.any(dim=0).nonzero()
    found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return found / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])


def maps_of(boxes: Tensor) -> dict[str, Tensor]:
    """Outputs that say exactly these boxes, [rows, 4], of class 1 of 2."""
    heat = torch.full((len(boxes), 2, *GRID), -9.0)
    numbers = torch.zeros(len(boxes), 4, *GRID)
    ends = torch.tensor([GRID[1], GRID[0]])
    for row, box in enumerate(boxes):
        centre, sides = (box[:2] + box[2:]) / 2 * ends, (box[2:] - box[:2]) * ends
        x, y = (int(end) for end in centre)
        heat[row, 1, y, x] = 3.0
        numbers[row, :, y, x] = torch.cat((centre - centre.floor() - 0.5, sides.log()))
    return {"heat": heat, "boxes": numbers}


def views(**strong: Any) -> Any:
    settings = {"exclude": [*COLOURS, "sharpness", "solarize"], "cutout": 0.0, **strong}
    return ImageViewsConfig(mean=[0.0], std=[1.0], weak={"shift": 0.1}, strong=settings).build(0)


def test_a_pseudo_box_goes_where_its_pixels_go() -> None:
    """Found in the weak view, it comes back to the picture, and stands in the strong view."""
    x, boxes = pictures()
    made, where = views(), {"stream": "unlabeled", "step": 3, "positions": torch.arange(len(x))}
    weak = made.weak_with_maps(x, **where)
    outputs = maps_of(torch.stack([in_pixels(row[0]) for row in weak.rows]))
    mask, labels = TASK.pseudo_labels(outputs | place_of(weak, x), 0.5)
    assert mask[:, 0].all()
    assert mask.sum() == len(x)
    assert (labels["classes"][:, 0] == 1).all()
    torch.testing.assert_close(labels["boxes"][:, :1], boxes, atol=1e-5, rtol=0)
    strong = made.strong_with_maps(x, **where)
    place = place_of(strong, x)
    moved = move_boxes(labels["boxes"][:, :1], place[MAPS], (1, 1), visible=place[VISIBLE])
    assert moved.kept.all()
    pixel = torch.tensor([1 / WIDTH, 1 / HEIGHT, 1 / WIDTH, 1 / HEIGHT])
    turned = 0
    for row in range(len(x)):
        there = in_pixels(strong.rows[row, 0])
        slack = (moved.boxes[row, 0] - there) / pixel
        turned += int(slack.abs().max() > 0.01)
        assert slack.abs().max() < 2, row
        own = {name: part[row : row + 1] for name, part in labels.items()}
        here = {name: part[row : row + 1] for name, part in place.items()}
        right, wrong = maps_of(moved.boxes[row]), maps_of(boxes[row] - 0.1)
        assert TASK.losses(right | here, own).item() < 0.1 < TASK.losses(wrong | here, own).item()
    assert turned > len(x) // 3  # the strong view did turn, shear or move them


def test_what_a_view_repeats_or_hides_is_not_background() -> None:
    """The border of a shift repeats the picture, whose objects there have no labels."""
    rows = 6
    x = torch.zeros(rows, 1, HEIGHT, WIDTH, dtype=torch.uint8)
    where = {"stream": "unlabeled", "step": 1, "positions": torch.arange(rows)}
    place = place_of(views(ops=0).weak_with_maps(x, **where), x)
    heat = torch.zeros(rows, 2, *GRID, requires_grad=True)
    labels = {
        "boxes": torch.zeros(rows, 1, 4),
        "classes": torch.zeros(rows, 1).long(),
        "there": torch.zeros(rows, 1, dtype=torch.bool),
    }
    outputs = {"heat": heat, "boxes": torch.zeros(rows, 4, *GRID), **place}
    TASK.losses(outputs, labels).sum().backward()
    assert heat.grad is not None
    left_out = 0
    for row in range(rows):
        learned = (heat.grad[row] != 0).all(dim=0)
        shown = move_boxes(place[VISIBLE][:, None], place[MAPS], (1, 1)).boxes[row, 0]
        ends = shown * torch.tensor([GRID[1], GRID[0], GRID[1], GRID[0]])
        x0, y0, x1, y1 = (round(float(end) - 0.01) for end in ends)
        expected = torch.zeros(GRID, dtype=torch.bool)
        expected[y0:y1, x0:x1] = True
        left_out += int((~learned).sum())
        assert (learned != expected).sum() <= max(GRID)  # a row or column of halves
    assert left_out > rows * max(GRID)


def test_a_box_that_is_hardly_visible_is_neither_object_nor_background() -> None:
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    box = torch.tensor([[[0.25, 0.25, 0.5, 0.5]]])
    labels = {
        "boxes": box,
        "classes": torch.zeros(1, 1).long(),
        "there": torch.ones(1, 1, dtype=torch.bool),
    }
    heat = torch.zeros(1, 1, 8, 8, requires_grad=True)
    outputs = {"heat": heat, "boxes": torch.ones(1, 4, 8, 8)}

    def learned(hidden: list[float]) -> tuple[Tensor, float]:
        place = {MAPS: torch.eye(2, 3)[None], VISIBLE: whole, HIDDEN: torch.tensor([hidden])}
        loss = TASK.losses(outputs | place, labels).sum()
        (gradient,) = torch.autograd.grad(loss, heat)
        return gradient[0, 0], loss.item()

    seen, _ = learned([0.25, 0.25, 0.5, 0.3])
    assert seen[3, 3] < 0  # its centre is an object
    lost, _ = learned([0.25, 0.25, 0.5, 0.45])
    assert not lost[2:4, 2:4].any()
    assert (lost > 0).sum() == 64 - 4


def test_a_picture_without_pseudo_boxes_teaches_nothing() -> None:
    outputs = maps_of(torch.tensor([[0.2, 0.2, 0.4, 0.4]] * 2))
    outputs["heat"][1] = -9.0
    mask, labels = TASK.pseudo_labels(outputs, 0.5)
    student = {name: torch.randn_like(each) for name, each in outputs.items()}
    losses = TASK.pseudo_label_losses(student, labels, mask)
    assert losses[0] > 0
    assert losses[1] == 0
    assert TASK.label_counts(labels).tolist() == [1, 0]
    metrics = TASK.pseudo_label_metrics(labels, mask)
    assert metrics["pseudo_boxes"].tolist() == [1, 0]


ABLE = {
    "supervised": Supervised(),
    "fixmatch": FixMatch(0.6),
    "pseudo_label": PseudoLabel(threshold=0.6),
}


@pytest.mark.slow  # tests/unit/testing holds them to it, too
@pytest.mark.parametrize("name", ABLE)
def test_an_algorithm_keeps_the_contract(name: str) -> None:
    """Among it: 1, 2 and 4 ranks, and micro-batches, have the same losses and gradients."""
    check_algorithm(ABLE[name], task="detection")


def test_other_algorithms_are_refused_by_name() -> None:
    refused = []
    for name, config in components("algorithm").items():
        algorithm = config(name=name).build(3)  # type: ignore[attr-defined]
        if name in ABLE or isinstance(algorithm, Supervised):
            continue
        with pytest.raises(ConfigError, match="has no meaning for detection"):
            algorithm.set_task(make_task("detection"))
        refused.append(name)
    assert {"mean_teacher", "freematch", "mixmatch"} <= set(refused)
    for name, config in components("addon").items():
        addon = config(name=name).build(FixMatch(), 3)  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="has no meaning for detection"):
            addon.set_task(make_task("detection"))


class Maps(torch.nn.Module):
    """Maps of fixed noise for each picture, by what it holds."""

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        small = torch.nn.functional.adaptive_avg_pool2d(inputs, GRID)
        heat = torch.cat((small, -small), dim=1) * 3
        return {"heat": heat, "boxes": heat.repeat(1, 2, 1, 1) * 0.1}


class Model:
    """What the protocol asks of a model."""

    def __init__(self) -> None:
        self.module = Maps()

    def targets(self, micros: Any) -> Any:
        return [self.module(torch.cat(list(micro.inputs.weak))) for micro in micros]

    def student(self, micro: Any) -> Any:
        return self.module(torch.cat(list(micro.inputs.parts))), None


def test_the_step_moves_boxes_and_divides_by_all_of_them() -> None:
    """One micro-batch or four: the terms add up to sums over boxes by their count."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 255, (8, 1, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)
    labels = TASK.example_labels(8, 2, generator)
    made, found = views(), []
    for parts in (1, 4):
        algorithm = FixMatch(0.7)
        algorithm.set_task(TASK)
        cutter = MicroBatcher(algorithm, made, parts, 0, 1, torch.device("cpu"), 0)
        micros = list(cutter.split(LabeledBatch(rows, labels), UnlabeledBatch(rows.flip(0)), 2))
        attempt = Attempt(algorithm, micros, Model(), parts=parts)  # type: ignore[arg-type]
        attempt.begin()
        terms = [attempt.judge(number) for number in range(parts)]
        found.append([float(sum(term.supervised for term in terms))])  # type: ignore[arg-type]
        found[-1].append(float(sum(term.unsupervised for term in terms)))  # type: ignore[arg-type]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    place = {"stream": "labeled", "step": 2, "positions": torch.arange(8)}
    viewed = made.weak_with_maps(rows, **place)
    outputs = Maps()(viewed.rows) | place_of(viewed, rows)
    total = TASK.losses(outputs, labels).sum() / labels["there"].sum()
    assert found[0][0] == pytest.approx(total.item(), rel=1e-5)
    place = {"stream": "unlabeled", "step": 2, "positions": torch.arange(8)}
    weak, strong = (
        getattr(made, f"{kind}_with_maps")(rows.flip(0), **place) for kind in ("weak", "strong")
    )
    mask, boxes = TASK.pseudo_labels(Maps()(weak.rows) | place_of(weak, rows), 0.7)
    assert mask.sum() > 8
    losses = TASK.pseudo_label_losses(Maps()(strong.rows) | place_of(strong, rows), boxes, mask)
    assert found[0][1] == pytest.approx((losses.sum() / mask.sum()).item(), rel=1e-5)


def test_views_that_do_not_say_where_pixels_go_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"views.name: labels of task detection have a place"):
        require_maps(TASK, TableViewsConfig().build(0))
    require_maps(TASK, views())
    require_maps(make_task("classification"), TableViewsConfig().build(0))


def test_outputs_that_are_no_maps_are_refused() -> None:
    good = {"heat": torch.zeros(2, 3, 4, 4), "boxes": torch.zeros(2, 4, 4, 4)}
    TASK.check_outputs(good, 2, 3, "it")
    for wrong in (
        {**good, "heat": torch.zeros(2, 2, 4, 4)},
        {**good, "boxes": torch.zeros(2, 4, 4, 5)},
        {**good, "heat": torch.zeros(2, 3)},
    ):
        with pytest.raises(ConfigError, match=r"expected heat .*center_net gives them"):
            TASK.check_outputs(wrong, 2, 3, "it")


def test_predictions_are_lists_of_any_length() -> None:
    outputs = maps_of(torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]]))
    outputs["heat"][1] = -9.0
    columns = TASK.prediction_columns(outputs, ["red", "white"])
    assert columns["label"] == [["white"], []]
    assert columns["boxes"][0][0] == pytest.approx([0.25, 0.25, 0.5, 0.5], abs=1e-6)
    assert columns["scores"][0] == pytest.approx([0.9526], abs=1e-4)
    assert columns["boxes"][1] == []
