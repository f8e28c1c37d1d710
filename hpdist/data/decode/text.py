"""Text as token ids: a column of strings goes through a tokenizer, once per row, as it is decoded.

A row is int64 [max_length]: the tokenizer's own beginning and end, what stands between cut off
where it is too long, and padding on the right.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from hpdist.data.decode.arrays import Arrays, check_rows
from hpdist.data.decode.encoded import Array, Unreadable
from hpdist.data.decode.spec import ArraySpec
from hpdist.errors import ConfigError
from hpdist.hub import checkpoint_folder, require_transformers
from hpdist.messages.human import counted

if TYPE_CHECKING:  # imported where it is used: it takes seconds
    from torch import Tensor

HERE = "."
"""The path of a tokenizer that is in the folder of the model."""

_EXAMPLE = ("one", "and another")
_CHARACTERS = 256  # of a token, at most, on average: what lies behind is cut off before tokenizing
_LEAST = 1 << 16  # characters that are always tokenized


@dataclass(frozen=True)
class Vocabulary:
    """What views and models must know of a tokenizer's ids."""

    size: int
    pad: int
    mask: int | None
    special: tuple[int, ...]
    """Ids that are no part of the text: padding, beginning, end, separators."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer by name, and how many tokens a row has; loaded once per process."""

    path: str  # a folder, or an id of the Hub
    max_length: int
    revision: str | None = None
    trust_remote_code: bool = False
    setting: str = "views.tokenizer"  # for messages

    @property
    def vocabulary(self) -> Vocabulary:
        """Its special ids. Raises ConfigError where it cannot be loaded."""
        return self._loaded.vocabulary

    def encode(self, texts: Sequence[str]) -> Array:
        """Token ids, int64 [texts, max_length].

        Of a text so long that the row's tokens would have over 256 characters each, the end is not
        tokenized: a tokenizer takes a hundred times a text's size in memory.
        """
        most = max(_LEAST, _CHARACTERS * self.max_length)
        return self._loaded.encode([text[:most] for text in texts], self.max_length)

    def decode(self, ids: Sequence[int]) -> str:
        """Put token ids into words again, without what only pads them."""
        return self._loaded.decode(ids)

    def save(self, folder: Path) -> None:
        """Write its files into a folder, as `transformers` reads them."""
        self._loaded.save(folder)

    def example(self, rows: int) -> Array:
        """Token ids of a few words, for a first look at a model."""
        return self.encode([_EXAMPLE[row % len(_EXAMPLE)] for row in range(rows)])

    def decode_into(self, values: Sequence[Any], out: Array) -> dict[int, str]:
        """Encode each value into its line of `out`; why, by line, for those that are no text.

        The lines of the latter are zeros.
        """
        reasons = {line: why for line, v in enumerate(values) if (why := _why_not(v)) is not None}
        good = [line for line in range(len(values)) if line not in reasons]
        out[...] = 0
        if not good:
            return reasons
        ids = self.encode([values[line] for line in good])
        special: Array = np.asarray(np.isin(ids, self.vocabulary.special))  # [texts, max_length]
        empty = [bool(line.all()) for line in special]
        for line, row, nothing in zip(good, ids, empty, strict=True):
            if nothing:
                reasons[line] = "the tokenizer finds no token in its text"
            else:
                out[line] = row
        return dict(sorted(reasons.items()))

    def decode_pairs_into(self, values: Sequence[Any], out: Array, second: str) -> dict[int, str]:
        """Do as `decode_into` does with pairs, into [values, 2, max_length].

        `second` is the column of the pairs' second texts. A value that is no pair stands for both.
        """
        pairs = [value if isinstance(value, tuple) else (value, value) for value in values]
        reasons = self.decode_into([pair[0] for pair in pairs], out[:, 0])
        for line, why in self.decode_into([pair[1] for pair in pairs], out[:, 1]).items():
            reasons.setdefault(line, f"{why}, in column {second!r}")
        out[list(reasons)] = 0
        return dict(sorted(reasons.items()))

    @property
    def _loaded(self) -> _Loaded:
        return _load(self.path, self.revision, self.trust_remote_code, self.setting)


def _why_not(value: Any) -> str | None:
    """Why a stored value is no text; None of text."""
    if value is None:
        return "the value is null"
    if isinstance(value, Unreadable):
        return value.reason
    if not isinstance(value, str):
        return f"it is {type(value).__name__}, not text"
    return None if value.strip() else "its text is empty"


class _Loaded:
    """A tokenizer of `transformers`, which several threads share."""

    def __init__(self, tokenizer: Any, setting: str) -> None:
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise ConfigError(f"{setting}: the tokenizer has neither padding nor an end token")
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        text = {tokenizer.unk_token_id, tokenizer.mask_token_id} - {tokenizer.pad_token_id}
        special = sorted(set(tokenizer.all_special_ids) - text)
        self.vocabulary = Vocabulary(
            len(tokenizer), tokenizer.pad_token_id, tokenizer.mask_token_id, tuple(special)
        )
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # a call sets the tokenizer's padding for itself

    def encode(self, texts: Sequence[str], length: int) -> Array:
        with self._lock:
            ids = self._tokenizer(
                list(texts),
                padding="max_length",
                truncation=True,
                max_length=length,
                return_attention_mask=False,  # lists of Python numbers that nothing reads
                return_token_type_ids=False,
            )["input_ids"]
        return np.asarray(ids, dtype=np.int64).reshape(len(texts), length)

    def save(self, folder: Path) -> None:
        with self._lock:
            self._tokenizer.save_pretrained(folder)

    def decode(self, ids: Sequence[int]) -> str:
        hidden = set(self.vocabulary.special)
        return str(self._tokenizer.decode([number for number in ids if number not in hidden]))


@cache
def _load(path: str, revision: str | None, trust_remote_code: bool, setting: str) -> _Loaded:
    transformers = require_transformers(setting)
    with checkpoint_folder(path, setting) as place:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code
        )
        return _Loaded(tokenizer, setting)


@dataclass(frozen=True)
class TextSpec(ArraySpec):
    """Rows are the tokens of one text, int64 [max_length]."""

    kind: ClassVar[str] = "text"
    array_dtype: ClassVar[np.dtype[Any]] = np.dtype(np.int64)
    tokenizer: Tokenizer

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Give the shape of a row."""
        return (self.tokenizer.max_length,)

    @property
    def not_for_arrays(self) -> str:
        """Say that a model of plain arrays has no use for tokens."""
        return "text; use hf:… or a model of your own"

    @property
    def view_arguments(self) -> tuple[Any, ...]:
        """Give the tokenizer's special ids. Raises ConfigError where it cannot be loaded."""
        return (self.tokenizer.vocabulary,)

    def save_files(self, folder: Path) -> dict[str, Any]:
        """Write the tokenizer into a folder, where the spec then names it."""
        self.tokenizer.save(folder)
        return replace(self, tokenizer=replace(self.tokenizer, path=HERE, revision=None)).record()

    def describe(self) -> str:
        """Say what a row is, for the opening lines of a run."""
        return f"texts of at most {counted(self.shape[-1], 'token')}"

    def example(self, rows: int) -> Tensor:
        """Give the tokens of a few words, int64 [rows, max_length]."""
        import torch

        return torch.from_numpy(self.tokenizer.example(rows))

    def decode_into(self, values: Sequence[Any], out: Arrays) -> dict[int, str]:
        """Tokenize all values at once."""
        check_rows(self.layout, len(values), out)
        return self.tokenizer.decode_into(values, cast(Array, out))


@dataclass(frozen=True)
class PairSpec(TextSpec):
    """Rows are the tokens of two texts, int64 [2, max_length]; stored values are pairs."""

    kind: ClassVar[str] = "pair"
    column: str
    """The column of the second texts."""

    @property
    def paired_column(self) -> str:
        """Name the column of the second texts."""
        return self.column

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Give the shape of a row."""
        return (2, self.tokenizer.max_length)

    def decode_into(self, values: Sequence[Any], out: Arrays) -> dict[int, str]:
        """Tokenize all pairs at once."""
        check_rows(self.layout, len(values), out)
        return self.tokenizer.decode_pairs_into(values, cast(Array, out), self.column)
