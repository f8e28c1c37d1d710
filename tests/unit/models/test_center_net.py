"""The small detector: the shapes of its maps, what it takes, and that it learns a picture."""

from __future__ import annotations

import pytest
import torch

from hpdist.errors import ConfigError
from hpdist.models.center_net import CenterNetConfig
from hpdist.tasks import make_task


@pytest.mark.parametrize(("depth", "classes", "norm"), [(1, 1, "batch"), (3, 5, "group")])
def test_maps_are_at_a_quarter_of_the_sides(depth: int, classes: int, norm: str) -> None:
    config = CenterNetConfig(width=8, depth=depth, norm=norm)  # type: ignore[arg-type]
    model = config.build((3, 32, 64), classes)
    found = model(torch.randn(2, 3, 32, 64))
    assert {name: tuple(maps.shape) for name, maps in found.items()} == {
        "heat": (2, classes, 8, 16),
        "boxes": (2, 4, 8, 16),
    }
    assert found["heat"].detach().sigmoid().mean() < 0.3  # nearly all is background at first


def test_sides_that_do_not_halve_are_refused_with_one_that_does() -> None:
    with pytest.raises(ConfigError, match=r"multiples of 32, not 100 x 90; set views.size, .* 96"):
        CenterNetConfig().build((3, 100, 90), 2)
    with pytest.raises(ConfigError, match="takes images"):
        CenterNetConfig().build((10,), 2)


def test_it_learns_the_boxes_of_one_picture() -> None:
    """A disc and a square, by the task's own loss, and found again with their classes."""
    torch.manual_seed(0)
    model = CenterNetConfig(width=8, depth=2).build((1, 32, 32), 2)
    picture = torch.zeros(1, 1, 32, 32)
    picture[:, :, 2:12, 4:14], picture[:, :, 18:30, 14:30] = 1, -1
    boxes = torch.tensor([[[4, 2, 14, 12], [14, 18, 30, 30]]]) / 32
    labels = {
        "boxes": boxes,
        "classes": torch.tensor([[1, 0]]),
        "there": torch.ones(1, 2, dtype=torch.bool),
    }
    task = make_task("detection")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        task.losses(model(picture), labels).sum().backward()
        optimizer.step()
    with torch.no_grad():
        found = task.detections(model(picture))  # type: ignore[attr-defined]
    first = found.classes[0, :2].argsort(descending=True)
    assert found.scores[0, :2].min() > 0.5 > found.scores[0, 2]
    assert found.classes[0, first].tolist() == [1, 0]
    torch.testing.assert_close(found.boxes[0, first], boxes[0], atol=0.04, rtol=0)
