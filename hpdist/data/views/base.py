"""What the trainer asks of views, and the views of rows that are not to be changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from hpdist.config.component import Component
from hpdist.data.structures import Rows, Structure, as_dtype, row_count
from hpdist.data.views.geometry import identity_maps


class Views(Protocol):
    """How a batch of raw rows becomes what the model sees.

    The noise of a row depends on (seed, stream, view, copy, step, position), never on the rows
    beside it: whatever ranks and micro-batches the global batch is split into, the views are equal.

    `x` is a batch of raw rows on any device, one tensor or tensors by name; the result, one or the
    other too, is float32 on the same, but for whole numbers such as tokens. `stream` says which
    batch it is, "labeled" or "unlabeled"; `step` counts optimizer steps; `positions`, int64 [B] on
    the CPU, are the rows' places in that step's global batch; `copy` numbers views of one kind.
    """

    def plain(self, x: Any) -> Any:
        """Return the rows without noise, as evaluation sees them."""
        ...

    def weak(self, x: Any, *, stream: str, step: int, positions: Tensor, copy: int = 0) -> Any:
        """Return the rows with little noise, from which pseudo-labels are made."""
        ...

    def strong(self, x: Any, *, stream: str, step: int, positions: Tensor, copy: int = 0) -> Any:
        """Return the rows with much noise, on which the student must agree with pseudo-labels."""
        ...


@runtime_checkable
class GradedViews(Views, Protocol):
    """Views whose strong ones can be made milder or stronger for an algorithm."""

    def graded(
        self,
        x: Any,
        *,
        operations: int,
        stream: str,
        step: int,
        positions: Tensor,
        copy: int = 0,
    ) -> Any:
        """Return a strong view of so many operations, unless the views' config says how many."""
        ...


@dataclass(frozen=True)
class ViewedRows:
    """A view, with what moves labels along: boxes, masks, points (see `geometry`)."""

    rows: Tensor
    """What the model sees, float32 [rows, …]."""
    maps: Tensor
    """From a row's pixels to its view's, float32 [rows, 2, 3] on the device of the rows."""
    visible: Tensor
    """The area of a row's pixels that is left in its view: x0, y0, x1, y1, float32 [rows, 4]. What
    one operation pushed over the edge stays lost where the next one moves back."""
    hidden: Tensor
    """The area of a view that was painted over: x0, y0, x1, y1, float32 [rows, 4] on the device of
    the rows; zeros where there is none."""


@runtime_checkable
class MappedViews(Views, Protocol):
    """Views of which it is known where every place of a row went.

    Each method returns the same rows, bit for bit, as that of `Views` or `GradedViews` with the
    same arguments, and the maps that these rows were made with. Views without these methods, as
    those of audio, text and tables, have rows in which labels have no place.
    """

    def plain_with_maps(self, x: Tensor) -> ViewedRows:
        """Return the plain view and its maps."""
        ...

    def weak_with_maps(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> ViewedRows:
        """Return the weak view and its maps."""
        ...

    def strong_with_maps(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> ViewedRows:
        """Return the strong view and its maps."""
        ...

    def graded_with_maps(
        self,
        x: Tensor,
        *,
        operations: int,
        stream: str,
        step: int,
        positions: Tensor,
        copy: int = 0,
    ) -> ViewedRows:
        """Return a strong view of so many operations, where that can be chosen, and its maps."""
        ...


@runtime_checkable
class FittedViews(Views, Protocol):
    """Views that measure the training rows, once, before the training.

    What they measured is in every checkpoint, beside the weights that were trained with it.
    """

    def fit(self, parts: Iterable[Any], names: Sequence[str] = ()) -> None:
        """Measure training rows, arrays [rows, *] or these by name; `names` are the features'.

        Called on one process, which tells the others. Raises DataError.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """What was measured."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what was measured."""
        ...


def unmixable(views: Views) -> str | None:
    """What the views make that has no sum, such as token ids; None where a sum has a meaning.

    Views say so by an attribute of this name.
    """
    found: str | None = getattr(views, "unmixable", None)
    return found


def check_positions(x: Structure, positions: Tensor) -> None:
    """Raise ValueError unless the places are one for each row, and on the CPU."""
    rows = row_count(x)
    if positions.device.type != "cpu" or positions.shape != (rows,):
        raise ValueError(
            f"positions must be one per row, [{rows}], on the CPU, "
            f"not {list(positions.shape)} on {positions.device}"
        )


class IdentityViewsConfig(Component):
    """Rows as they are, in float32: for tables and for rows with views of their own."""

    kind: ClassVar[str] = "views"
    name: Literal["identity"] = "identity"
    input_kind: str | None = None
    """The kind of input: image, table, or one of your own, python:module:Class; by default what the
    column tells."""

    def build(self, seed: int) -> IdentityViews:
        """Build the views; they draw nothing, so the seed is not used."""
        return IdentityViews()


class IdentityViews:
    """The `Views` that change nothing but the dtype.

    Of tensors by name, whole numbers (tokens, masks) stay what they are.
    """

    def plain(self, x: Rows) -> Rows:
        """Return the rows in float32."""
        if isinstance(x, Tensor):
            return cast(Rows, x.to(torch.float32))
        return as_dtype(x, torch.float32)

    def weak(self, x: Rows, *, stream: str, step: int, positions: Tensor, copy: int = 0) -> Rows:
        """Return the rows in float32."""
        return self.plain(x)

    def strong(self, x: Rows, *, stream: str, step: int, positions: Tensor, copy: int = 0) -> Rows:
        """Return the rows in float32."""
        return self.plain(x)

    def plain_with_maps(self, x: Tensor) -> ViewedRows:
        """Return the rows in float32, and maps that move nothing."""
        visible = torch.tensor([0.0, 0.0, x.shape[-1], x.shape[-2] if x.dim() > 2 else 1.0])
        return ViewedRows(
            self.plain(x),
            identity_maps(len(x), device=x.device),
            visible.to(x.device).repeat(len(x), 1),
            torch.zeros(len(x), 4, device=x.device),
        )

    def weak_with_maps(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> ViewedRows:
        """Return the rows in float32, and maps that move nothing."""
        return self.plain_with_maps(x)

    def strong_with_maps(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> ViewedRows:
        """Return the rows in float32, and maps that move nothing."""
        return self.plain_with_maps(x)

    def graded_with_maps(
        self,
        x: Tensor,
        *,
        operations: int,
        stream: str,
        step: int,
        positions: Tensor,
        copy: int = 0,
    ) -> ViewedRows:
        """Return the rows in float32, and maps that move nothing."""
        return self.plain_with_maps(x)
