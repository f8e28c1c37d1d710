"""Object detection: a picture has any number of boxes, of a class each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpdist.data.views.geometry import invert, move_boxes
from hpdist.data.views.places import HIDDEN, MAPS, VISIBLE, unmoved
from hpdist.errors import ConfigError, DataError
from hpdist.tasks.base import PSEUDO_LABELS, Task, TaskConfig
from hpdist.tasks.boxes import BadBoxes, Boxes, categories_of
from hpdist.tasks.centers import (
    Detections,
    box_loss,
    cells_in,
    decode,
    focal_loss,
    heat_targets,
)
from hpdist.tasks.coco_scores import MOST, CocoScores, require_coco
from hpdist.tasks.metrics import Meter

if TYPE_CHECKING:
    from hpdist.data.decode.encoded import Array
    from hpdist.data.sources.classes import Classes, StoredLabels
    from hpdist.data.sources.label_encoding import Encoding

_VIEW = (1, 1)
"""Height and width of a view, whose places are shares of it."""


class Detection(Task):
    """Boxes by their centres: a map of centres for each class, and a box for each cell.

    Labels are those of `hpdist.tasks.boxes`, outputs those of `hpdist.tasks.centers`; the loss is
    that of "Objects as Points" (arXiv:1904.07850), a mean over the boxes of the global batch.
    Pseudo-labels are the peaks of a view that reach the threshold, carried back to the picture.

    Args:
        bad_boxes: Whether boxes that cannot be used are refused or dropped.
        least_visible: The share of a box that must be seen in a view for it to be learned there.
        box_weight: Weight of the four numbers' loss beside that of the map.
        least_score: The score that a box needs to be written by `predict`.
        class_names: By default those of the labels, once they are read.
    """

    name = "detection"
    abilities = frozenset({PSEUDO_LABELS})
    headline = "map"
    headline_title = "Mean average precision (COCO)"
    shown = ("map", "map_50")
    summarized = ("map", "map_50", "map_75")
    outputs = ("heat", "boxes")
    labels_have_places = True
    counts_labels = True
    always_written = ("label", "boxes", "scores")

    def __init__(
        self,
        bad_boxes: BadBoxes = "refuse",
        least_visible: float = 0.3,
        box_weight: float = 1.0,
        least_score: float = 0.3,
        class_names: Sequence[str] = (),
    ) -> None:
        self.bad_boxes = bad_boxes
        self.least_visible = least_visible
        self.box_weight = box_weight
        self.least_score = least_score
        self.class_names = tuple(class_names)

    # ------------------------------------------------------------------ labels and outputs

    def find_encoding(
        self, stored: StoredLabels, num_classes: int | None, recorded: Sequence[str] | None = None
    ) -> Encoding:
        """Read the column as objects: boxes in pixels, of a class each."""
        from hpdist.data.sources.classes import list_classes

        require_coco()
        classes = list_classes(categories_of(stored), num_classes, recorded)
        if not len(classes):
            raise DataError(
                f"{stored.where}.label: column {stored.column!r} has no object in any row, and "
                "does not say which classes there are; store the classes as a ClassLabel"
            )
        return Boxes(classes, self.bad_boxes)

    def recorded_encoding(
        self, classes: Classes, facts: Mapping[str, Any], state: Mapping[str, Array]
    ) -> Encoding | None:
        """Read boxes by the classes of the labelled rows."""
        return Boxes(classes, self.bad_boxes) if facts.get("class") == Boxes.__name__ else None

    def fitted(self, encoding: Encoding) -> Detection:
        """Give the task with the names of the classes."""
        return self._named(encoding.classes.names)

    def _named(self, names: Sequence[str]) -> Detection:
        """Give the same task with these names of the classes."""
        options = (self.bad_boxes, self.least_visible, self.box_weight, self.least_score)
        return Detection(*options, names)

    def check_outputs(self, outputs: Any, rows: int, num_classes: int, description: str) -> None:
        """Raise ConfigError unless there are a map of each class and four numbers of each cell."""
        heat, boxes = (outputs[name] for name in self.outputs)
        fits = heat.dim() == 4 and heat.shape[:2] == (rows, num_classes)
        if not (fits and boxes.shape == (rows, 4, *heat.shape[2:])):
            raise ConfigError(
                f"model: {description}, expected heat [{rows}, {num_classes}, height, width] and "
                f"boxes [{rows}, 4, height, width]; model.name: center_net gives them"
            )

    # ------------------------------------------------------------------ what trains

    def losses(self, logits: Any, labels: Any) -> Tensor:
        """Sum the losses of a picture's boxes and of its background, [rows]."""
        heat, place = logits["heat"], _place(logits)
        there = labels["there"]
        boxes = torch.where(there[..., None], labels["boxes"], 0.0)
        moved = move_boxes(boxes, place[MAPS], _VIEW, visible=place[VISIBLE], hidden=place[HIDDEN])
        learned = moved.kept & (moved.share >= self.least_visible)
        targets = heat_targets(moved.boxes, labels["classes"], learned, heat.shape[1:])
        unknown = cells_in(moved.boxes, moved.kept & ~learned, heat.shape[2:])
        weight = (_shown(place, heat.shape[2:]) & ~unknown).to(heat.dtype)
        centres = focal_loss(heat, targets, weight)
        return centres + self.box_weight * box_loss(logits["boxes"], moved.boxes, learned)

    def label_counts(self, labels: Any) -> Tensor:
        """Count the boxes of each picture."""
        counts: Tensor = labels["there"].sum(dim=1).float()
        return counts

    def pseudo_labels(self, logits: Any, threshold: float) -> tuple[Tensor, Any]:
        """Find the boxes of a view, [rows, most], and carry them back to the picture."""
        found, place = self.detections(logits), _place(logits)
        back = move_boxes(
            found.boxes, invert(place[MAPS]), _VIEW, smallest_share=self.least_visible
        )
        there = back.kept & (found.scores >= threshold)
        return there.float(), {"boxes": back.boxes, "classes": found.classes, "there": there}

    def pseudo_label_losses(self, logits: Any, labels: Any, mask: Tensor) -> Tensor:
        """Sum the losses of a picture's pseudo-boxes; a picture without any teaches nothing."""
        return self.losses(logits, labels) * (mask > 0).any(dim=1)

    def pseudo_label_metrics(self, labels: Any, mask: Tensor) -> dict[str, Tensor]:
        """Count the pseudo-boxes of each picture, and the pictures that have some."""
        count = mask.sum(dim=1)
        return {"pseudo_boxes": count, "pictures_with_pseudo_boxes": (count > 0).float()}

    def detections(self, outputs: Any) -> Detections:
        """Give the best boxes of each row, as shares of the view."""
        return decode(outputs["heat"], outputs["boxes"], MOST)

    # ------------------------------------------------------------------ what is measured and said

    def meter(self, outputs: Any) -> Meter:
        """Gather the boxes of all ranks, which average precision needs."""
        names = self.class_names or tuple(map(str, range(outputs["heat"].shape[1])))
        return CocoScores(self._named(names), outputs["heat"].device)

    def prediction_columns(self, outputs: Any, names: Sequence[str]) -> dict[str, Any]:
        """Give the classes, boxes and scores of the boxes of each row that reach `least_score`.

        Boxes are x0, y0, x1, y1 as shares of the picture's width and height, best first.
        """
        found = self.detections({name: outputs[name].float().cpu() for name in self.outputs})
        columns: dict[str, list[Any]] = {"label": [], "boxes": [], "scores": []}
        for boxes, scores, classes in zip(*found, strict=True):
            kept = scores >= self.least_score
            columns["label"].append([names[number] for number in classes[kept].tolist()])
            columns["boxes"].append(boxes[kept].tolist())
            columns["scores"].append(scores[kept].tolist())
        return columns

    def prediction_types(self) -> dict[str, Any]:
        """Give the types of the lists, which may be empty."""
        import pyarrow as pa  # type: ignore[import-untyped]

        return {
            "label": pa.list_(pa.string()),
            "boxes": pa.list_(pa.list_(pa.float32())),
            "scores": pa.list_(pa.float32()),
        }

    def example_labels(self, rows: int, num_classes: int, generator: torch.Generator) -> Any:
        """Draw up to three boxes for each row."""
        low = torch.rand((rows, 3, 2), generator=generator) * 0.6
        sides = 0.1 + torch.rand((rows, 3, 2), generator=generator) * 0.3
        return {
            "boxes": torch.cat((low, low + sides), dim=2),
            "classes": torch.randint(num_classes, (rows, 3), generator=generator),
            "there": torch.rand((rows, 3), generator=generator) < 0.7,
            "size": torch.full((rows, 2), 64.0),
        }

    def example_outputs(self, num_classes: int) -> dict[str, tuple[int, ...]]:
        """Give maps of 4 x 6 cells."""
        return {"heat": (num_classes, 4, 6), "boxes": (4, 4, 6)}


class DetectionConfig(TaskConfig):
    """Boxes in pictures, of a class each."""

    makes = Detection
    name: Literal["detection"] = "detection"
    bad_boxes: BadBoxes = "refuse"
    """refuse: a labelled box without area, outside its picture, of no known class, of a crowd or
    with numbers that are not finite is an error that names it; drop: such boxes are left out, and
    counted."""
    least_visible: float = Field(0.3, ge=0, le=1)
    """The share of a box that must be seen in a view for it to be learned there; of one that is
    seen less, the cells are left out of the loss."""
    box_weight: float = Field(1.0, ge=0)
    """Weight of the loss of a box's place and size beside that of the map of centres."""
    least_score: float = Field(0.3, ge=0, le=1)
    """The score that a box needs for `predict` to write it."""


def _place(outputs: Any) -> Mapping[str, Tensor]:
    """Give where the pixels of rows went; outputs for rows as they are come without that."""
    if MAPS in outputs:
        place: Mapping[str, Tensor] = outputs
        return place
    heat = outputs["heat"]
    return unmoved(len(heat), heat.device)


def _shown(place: Mapping[str, Tensor], size: Sequence[int]) -> Tensor:
    """Return which cells show a part of the picture that labels are known of.

    bool [rows, height, width]: not what the border of a view repeats, or fills up.
    """
    height, width = size
    maps = place[MAPS]
    x = (torch.arange(width, device=maps.device) + 0.5) / width
    y = ((torch.arange(height, device=maps.device) + 0.5) / height)[:, None]
    back = invert(maps)[:, :, :, None, None]  # [rows, 2, 3, 1, 1]
    source = back[:, :, 0] * x + back[:, :, 1] * y + back[:, :, 2]  # [rows, 2, height, width]
    visible = place[VISIBLE][:, :, None, None]
    return ((source >= visible[:, :2]) & (source < visible[:, 2:])).all(dim=1)
