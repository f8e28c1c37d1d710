"""Puts beside a model's outputs for a view where the row's pixels went in it.

Only a task whose labels have a place asks for that (`Task.labels_have_places`). Its outputs then
hold, under the names of `hpdist.data.views.places`, what moves labels between picture and view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hpdist.algorithms.exchange import HeadOutputs, ViewPlaces
from hpdist.data.views.places import Place


def attach(outputs: Any, place: Place) -> Any:
    """Put a view's place beside the outputs for it."""
    return {**outputs, **place}


def attach_all(outputs: Sequence[Any], places: Sequence[Place]) -> tuple[Any, ...]:
    """Put the places of several views beside the outputs for each."""
    return tuple(attach(*pair) for pair in zip(outputs, places, strict=True))


def placed(views: HeadOutputs[Any], places: ViewPlaces | None) -> HeadOutputs[Any]:
    """Put the places of the student's views beside its outputs, where there are any."""
    if places is None:
        return views
    return replace(
        views,
        labeled=attach(views.labeled, places.labeled),
        student_weak=attach_all(views.student_weak, places.student_weak),
        strong=attach_all(views.strong, places.strong),
        strong_labeled=attach_all(views.strong_labeled, places.strong_labeled),
    )
