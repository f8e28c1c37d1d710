"""Views of vectors, such as a table's rows: noise, and features replaced by those of other rows.

What noise and features are measured by (mean, standard deviation, a sample of rows) is fitted once,
on the training rows alone. All noise is drawn from the counter-based generator by a row's place in
the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hpdist.config.component import Component
from hpdist.config.section import Section
from hpdist.data import random
from hpdist.data.decode.encoded import Array
from hpdist.data.structures import sent
from hpdist.data.views.base import check_positions
from hpdist.errors import DataError

_KEPT_ROWS = 1024  # of the training rows, from which features are replaced
_SAMPLE = 0x7AB1E  # keeps the draw of those rows apart from everything else the seed feeds


class WeakTable(Section):
    """The weak view."""

    noise: float = Field(default=0.1, ge=0)
    """Standard deviation of the Gaussian noise, in standard deviations of each feature."""


class StrongTable(Section):
    """The strong view: features replaced, then noise."""

    corruption: float = Field(default=0.3, ge=0, le=1)
    """Share of the features replaced by the same feature of another row; SCARF takes 0.6."""
    noise: float | None = Field(default=None, ge=0)
    """As the weak view's, and by default equal to it."""


class TableViewsConfig(Component):
    """Weak and strong views of vectors: noise, and features replaced as in SCARF."""

    kind: ClassVar[str] = "views"
    input_kind: ClassVar[str] = "table"
    name: Literal["table"] = "table"
    standardize: bool = True
    """Bring every feature to mean 0 and standard deviation 1, as the training rows have them."""
    missing: Literal["refuse", "mean"] = "refuse"
    """What NaN and null in a row are: refuse makes it a bad row, mean fills in the feature's."""
    weak: WeakTable = WeakTable()
    strong: StrongTable = StrongTable()

    def build(self, seed: int, groups: Sequence[int] = ()) -> TableViews:
        """Build the views, with noise from this seed; `fit` or `load_state` comes next.

        `groups` says of every feature which column it comes from, where several come from one.
        """
        return TableViews(self, seed, groups)


class TableViews:
    """The `FittedViews` of vectors: float32 [B, features] to the same.

    SCARF: Bahri et al. 2021, arXiv:2106.15147. It replaces a fixed number of features; here each
    is replaced independently, by its value in a row of the sample, drawn anew for each feature. The
    features of one column, such as those of its categories, are replaced together, by one row's.
    """

    def __init__(self, config: TableViewsConfig, seed: int, groups: Sequence[int] = ()) -> None:
        weak, strong = config.weak, config.strong
        self.config = config
        self.seed = seed
        self.strong_noise = weak.noise if strong.noise is None else strong.noise
        self._columns = max(groups, default=-1) + 1
        self._groups = {torch.device("cpu"): torch.tensor(groups, dtype=torch.int64)}
        self._state: dict[str, Tensor] = {}
        self._numbers: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def fit(self, parts: Iterable[Array], names: Sequence[str] = ()) -> None:
        """Measure training rows, [rows, features] at a time; `names` of the features, for messages.

        Missing values count for nothing. Raises DataError where a feature has no value at all.
        """
        sums, sample = _Sums(), _Sample(self.seed)
        for part in parts:
            sums.add(part)
            sample.add(part)
        if not sums.rows:
            raise DataError("views.name: table: there are no training rows to measure")
        empty = np.flatnonzero(sums.count == 0)
        if len(empty):
            name = repr(names[empty[0]]) if names else f"number {empty[0]}"
            raise DataError(f"feature {name} is missing in every training row; leave it out")
        self.load_state(
            {
                "mean": torch.from_numpy(sums.mean),
                "std": torch.from_numpy(sums.std),
                "rows": torch.from_numpy(sample.rows),
            }
        )

    def state(self) -> dict[str, Tensor]:
        """What was fitted: mean and std, float64 [features], and rows, float32 [kept, features]."""
        return dict(self._state)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what was fitted before. A std of 0 marks a feature that never changes."""
        self._state = {name: state[name].cpu() for name in ("mean", "std", "rows")}
        self._numbers = {}

    def plain(self, x: Tensor) -> Tensor:
        """Fill in and standardise the rows. See `Views`."""
        mean, std, _ = self._fitted(x)
        return self._standardized(x, mean, std)

    def weak(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> Tensor:
        """Fill in and standardise the rows, and add little noise. See `Views`."""
        mean, std, _ = self._fitted(x)
        names = ("weak", stream, str(copy))
        noise = self._noise(names, self.config.weak.noise, std, step, _at(x, positions))
        return self._standardized(x, mean, std) + noise

    def strong(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> Tensor:
        """Replace features, fill in and standardise the rows, and add noise. See `Views`."""
        mean, std, rows = self._fitted(x)
        names, at = ("strong", stream, str(copy)), _at(x, positions)
        columns = self._columns or x.shape[1]
        which = random.stream_id(*names, "which")
        replaced = random.uniform(self.seed, which, step, at, columns)
        from_row = random.stream_id(*names, "row")
        source = random.integers(self.seed, from_row, step, at, columns, len(rows))
        if self._columns:  # [B, columns] to [B, features]
            groups = self._groups_on(x.device)
            replaced, source = replaced[:, groups], source[:, groups]
        x = torch.where(replaced < self.config.strong.corruption, rows.gather(0, source), x)
        noise = self._noise(names, self.strong_noise, std, step, at)
        return self._standardized(x, mean, std) + noise

    def _fitted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, std and rows as float32 on the device of `x`, after a look at `x`."""
        if not self._state:
            raise RuntimeError("the views have measured no rows yet: call fit or load_state")
        features = len(self._state["mean"])
        if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != features:
            raise DataError(
                f"table views of {features} features take float32 rows [B, {features}], not "
                f"{x.dtype} {list(x.shape)}"
            )
        if x.device not in self._numbers:
            mean, std, rows = (value.to(x.device).float() for value in self._state.values())
            self._numbers[x.device] = (mean, std, rows)
        return self._numbers[x.device]

    def _groups_on(self, device: torch.device) -> Tensor:
        """Which column every feature comes from, int64 [features]."""
        if device not in self._groups:
            self._groups[device] = self._groups[torch.device("cpu")].to(device)
        return self._groups[device]

    def _standardized(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if self.config.missing == "mean":
            x = torch.where(x.isnan(), mean, x)
        if not self.config.standardize:
            return x
        return (x - mean) / torch.where(std > 0, std, 1.0)

    def _noise(
        self, names: tuple[str, ...], size: float, std: Tensor, step: int, positions: Tensor
    ) -> Tensor:
        """Gaussian noise [B, features]; none on a feature that never changes."""
        drawn = random.normal(self.seed, random.stream_id(*names), step, positions, len(std))
        return drawn * (size * ((std > 0) if self.config.standardize else std))


class _Sums:
    """Mean and standard deviation of every feature, in float64, from parts that are not kept."""

    def __init__(self) -> None:
        self.rows = 0
        self.count = self.mean = self._squares = np.zeros(0)
        self._low = self._high = np.zeros(0)

    @property
    def std(self) -> Array:
        """Zero where all values are equal, however they round."""
        std = np.sqrt(self._squares / self.count)
        changes = (self._low < self._high) & (std.astype(np.float32) > 0)
        return np.where(changes, std, 0.0)

    def add(self, part: Array) -> None:
        """Add rows: Chan's way to join means and sums of squares."""
        if not len(part):
            return
        if not self.rows:
            self.count, self.mean, self._squares = np.zeros((3, part.shape[1]))
            self._low = np.full(part.shape[1], np.inf)
            self._high = -self._low
        self.rows += len(part)
        there = ~np.isnan(part)
        values = np.where(there, part, 0).astype(np.float64)
        count = there.sum(axis=0)
        mean = values.sum(axis=0) / np.maximum(count, 1)
        squares = (np.square(values - mean) * there).sum(axis=0)
        total = np.maximum(self.count + count, 1)
        delta = mean - self.mean
        self._squares = self._squares + squares + np.square(delta) * self.count * count / total
        self.mean = self.mean + delta * count / total
        self.count = self.count + count
        self._low = np.minimum(self._low, np.where(there, part, np.inf).min(axis=0))
        self._high = np.maximum(self._high, np.where(there, part, -np.inf).max(axis=0))


class _Sample:
    """Rows drawn from all that are added, each as likely as the others: those of lowest lots."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng([seed, _SAMPLE])
        self._lots = np.zeros(0)
        self.rows: Array = np.zeros((0, 0), np.float32)

    def add(self, part: Array) -> None:
        """Add rows; no more than the sample are kept."""
        if not len(part):
            return
        lots = np.concatenate([self._lots, self._generator.random(len(part))])
        part = part.astype(np.float32)
        rows = np.concatenate([self.rows, part]) if len(self.rows) else part
        lowest = np.sort(np.argsort(lots)[:_KEPT_ROWS])
        self._lots, self.rows = lots[lowest], rows[lowest]


def _at(x: Tensor, positions: Tensor) -> Tensor:
    """Put the rows' places where the rows are: the same numbers are drawn on every device."""
    check_positions(x, positions)
    return sent(positions, x.device)
