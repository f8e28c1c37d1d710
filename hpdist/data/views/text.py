"""Weak and strong views of text: noise on token ids, batched on their device.

Weak: some tokens are left out. Strong: a span is kept, tokens are left out, neighbours change
places, tokens are masked. All noise is drawn on the CPU from the counter-based generator, the same
for any length of the text; nothing is read back from the device.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpdist.config.component import Component
from hpdist.config.section import Section
from hpdist.data import random
from hpdist.data.decode.text import Vocabulary
from hpdist.data.structures import sent
from hpdist.data.views.base import check_positions
from hpdist.errors import ConfigError, DataError

_PER_TOKEN = 4  # numbers: which token stays at least, left out, changes places, masked
_PER_ROW = 3  # numbers: the kept span's length and start, where pairs of neighbours begin


class Weak(Section):
    """The weak view."""

    drop: float = Field(default=0.05, ge=0, lt=1)
    """Chance of a token to be left out."""
    mask: float = Field(default=0.0, ge=0, lt=1)
    """Chance of a token to be replaced by the mask token."""
    swap: float = Field(default=0.0, ge=0, le=1)
    """Chance of two neighbours to change places."""
    crop: float = Field(default=0.0, ge=0, lt=1)
    """Largest share of the tokens that is cut off, at both ends together."""


class Strong(Weak):
    """The strong view."""

    drop: float = Field(default=0.1, ge=0, lt=1)
    """Chance of a token to be left out."""
    mask: float = Field(default=0.15, ge=0, lt=1)
    """Chance of a token to be replaced by the mask token."""
    swap: float = Field(default=0.2, ge=0, le=1)
    """Chance of two neighbours to change places."""
    crop: float = Field(default=0.3, ge=0, lt=1)
    """Largest share of the tokens that is cut off, at both ends together."""


class TextViewsConfig(Component):
    """Weak and strong views of text."""

    kind: ClassVar[str] = "views"
    input_kind: ClassVar[str] = "text"
    name: Literal["text"] = "text"
    max_length: int = Field(default=128, ge=4)
    """Tokens of a row; longer text is cut off, shorter text padded."""
    tokenizer: str | None = None
    """The folder or the Hub's id of a tokenizer; by default that of a model `hf:...`."""
    strong_column: str | None = None
    """A column of the unlabelled rows that is their strong view, such as a back-translation; the
    weak view and everything labelled stay those of the input."""
    weak: Weak = Weak()
    strong: Strong | None = None
    """The strong view's noise; where it is left out, there is none on top of `strong_column`."""

    def build(self, seed: int, vocabulary: Vocabulary) -> TextViews:
        """Build the views of a tokenizer's ids, with noise from this seed.

        Raises ConfigError where tokens are to be masked and there is no mask token.
        """
        for setting, view in (("weak", self.weak), ("strong", self.strong or Strong())):
            if view.mask and vocabulary.mask is None:
                raise ConfigError(
                    f"views.{setting}.mask: the tokenizer has no mask token; set it to 0"
                )
        return TextViews(self, seed, vocabulary)


class TextViews:
    """The `Views` of text: int64 [B, T] to int64 [B, T], padded on the right.

    Rows with a strong view of their own are [B, 2, T], that view behind the input. Special tokens
    (beginning, end, padding) stay; at least one other token does too, unmasked.
    """

    unmixable = "token ids"

    def __init__(self, config: TextViewsConfig, seed: int, vocabulary: Vocabulary) -> None:
        self.config = config
        self.seed = seed
        self.vocabulary = vocabulary
        self._special = torch.zeros(vocabulary.size, dtype=torch.bool)
        self._special[list(vocabulary.special)] = True

    def plain(self, x: Tensor) -> Tensor:
        """Return the tokens as they are. See `Views`."""
        return _part(x, 0)

    def weak(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> Tensor:
        """Change a few tokens. See `Views`."""
        names = ("text weak", stream, str(copy))
        return self._view(_part(x, 0), self.config.weak, names, step, positions)

    def strong(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> Tensor:
        """Change many tokens; a strong view that came with the row only by config. See `Views`."""
        names = ("text strong", stream, str(copy))
        if x.dim() == 3 and self.config.strong is None:
            return _part(x, 1)
        strong = self.config.strong or Strong()
        return self._view(_part(x, 1), strong, names, step, positions)

    def _view(
        self, x: Tensor, view: Weak, names: tuple[str, ...], step: int, positions: Tensor
    ) -> Tensor:
        check_positions(x, positions)
        tokens = x.shape[1]
        count = _PER_ROW + _PER_TOKEN * tokens
        noise = random.uniform(self.seed, random.stream_id(*names), step, positions, count)
        noise = sent(noise, x.device)
        row, token = noise[:, :_PER_ROW], noise[:, _PER_ROW:].unflatten(1, (_PER_TOKEN, tokens))
        self._special = self._special.to(x.device)
        text = ~self._special[x]  # [B, T]
        kept = span(text, row[:, 0], row[:, 1], view.crop)
        # Of all that the span holds, one token is sure to stay.
        safe = one_of(kept, token[:, 0])
        kept = kept & (safe | (token[:, 1] >= view.drop))
        masked = kept & ~safe & (token[:, 3] < view.mask)
        if self.vocabulary.mask is not None:
            x = x.masked_fill(masked, self.vocabulary.mask)
        x, text = compacted(x, text, kept | ~text, self.vocabulary.pad)
        return swapped(x, text, row[:, 2], token[:, 2] < view.swap)


def span(text: Tensor, length: Tensor, start: Tensor, most: float) -> Tensor:
    """Mark a run of the tokens of text, bool [B, T]: all but at most a share `most` of them.

    `text` is bool [B, T]; `length` and `start`, uniform in [0, 1) [B], are its noise.
    """
    count = text.sum(dim=1)  # [B]
    cut = (length * most * count).long()
    first = (start * (cut + 1)).long()  # of the run, counted in tokens of text
    number = text.long().cumsum(dim=1) - 1
    return text & (number >= first[:, None]) & (number < (first + count - cut)[:, None])


def one_of(among: Tensor, noise: Tensor) -> Tensor:
    """Mark one place of each row, bool [B, T], of those that are marked; none where none is."""
    chosen = torch.where(among, noise, -1.0).argmax(dim=1, keepdim=True)
    return torch.zeros_like(among).scatter(1, chosen, True) & among


def compacted(x: Tensor, text: Tensor, kept: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Move what is kept to the left and pad, [B, T]; and where tokens of text are now."""
    order = (~kept).byte().argsort(dim=1, stable=True)
    there = torch.arange(x.shape[1], device=x.device) < kept.sum(dim=1, keepdim=True)
    x = torch.where(there, x.gather(1, order), pad)
    return x, text.gather(1, order) & there


def swapped(x: Tensor, text: Tensor, start: Tensor, drawn: Tensor) -> Tensor:
    """Exchange the tokens of some pairs of neighbours, [B, T]; no token moves twice.

    Args:
        x: Token ids [B, T].
        text: Which of them may move, bool [B, T].
        start: Uniform in [0, 1) [B]: whether pairs begin at even or at odd places.
        drawn: bool [B, T], for each pair at the place of its first token.

    """
    place = torch.arange(x.shape[1], device=x.device)
    first = (place + (start < 0.5).long()[:, None]) % 2 == 0  # [B, T]
    first = first & drawn & text
    first[:, :-1] &= text[:, 1:]
    first[:, -1] = False
    second = first.roll(1, dims=1)
    source = place + first.long() - second.long()
    return x.gather(1, source)


def _part(x: Tensor, number: int) -> Tensor:
    """Give the first or second text of rows that hold two, [B, 2, T]; of others the only one."""
    text = x[:, number] if x.dim() == 3 else x
    _check_tokens(text)
    return text


def _check_tokens(x: Tensor) -> None:
    if x.dtype != torch.int64 or x.dim() != 2:
        raise DataError(
            f"text views take int64 token ids [B, T], not {x.dtype} {list(x.shape)}; "
            "for rows that are no text set views.name to image, table or identity"
        )
