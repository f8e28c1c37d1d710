"""Text: a column of strings, as the tokens of one tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

from hpdist.data.decode.recorded import restored
from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.text import HERE, PairSpec, TextSpec, Tokenizer
from hpdist.data.kinds.base import (
    Context,
    InputKind,
    Recognised,
    TableOfRows,
    UsesInputs,
    changes_refused,
)
from hpdist.data.kinds.columns import is_text
from hpdist.data.kinds.registry import register
from hpdist.data.structures import Structure
from hpdist.errors import ConfigError
from hpdist.messages.progress import working


class TextKind(InputKind):
    """Texts, which go through a tokenizer."""

    name: ClassVar[str] = "text"
    held: ClassVar[str] = "text"
    needs_own_views: ClassVar[bool] = True

    def recognise(self, feature: Any) -> Recognised | None:
        """See a text where it is the only one."""
        return Recognised("single", self.held) if is_text(feature) else None

    @working("looking at the first rows")
    def make_spec(
        self, views: Any, rows: TableOfRows, context: Context, values: Mapping[str, Any]
    ) -> TextSpec:
        """Take the tokenizer that the views name, or that comes with the model.

        Raises ConfigError where there is none, or it cannot be loaded.
        """
        tokenizer: Tokenizer | None = None
        if views.tokenizer is not None:
            tokenizer = Tokenizer(views.tokenizer, views.max_length)
        elif hasattr(context.model, "own_tokenizer"):
            tokenizer = context.model.own_tokenizer(views.max_length)
        if tokenizer is None:
            raise ConfigError(
                "views.tokenizer: name the folder or the Hub's id of a tokenizer; only a model "
                "hf:… has one of its own"
            )
        tokenizer.vocabulary  # noqa: B018  (loads it, for an error to come here)
        return TextSpec(tokenizer)

    def unlabeled_spec(self, spec: InputSpec, views: Any) -> InputSpec:
        """Read a second text of each row, where the views' settings name its column."""
        column = getattr(views, "strong_column", None)
        return spec if column is None else PairSpec(cast(TextSpec, spec).tokenizer, column)

    def recorded_spec(self, values: Mapping[str, Any], folder: Path) -> InputSpec:
        """Make the spec of texts again; a tokenizer that is in the folder is read from there."""
        tokenizer = restored(Tokenizer, values["tokenizer"])
        if tokenizer.path == HERE:  # the folder may be a stranger's: no code of it runs
            tokenizer = replace(
                tokenizer, path=str(folder), trust_remote_code=False, setting=str(folder)
            )
        return self._restored(values, tokenizer)

    def _restored(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> InputSpec:
        return TextSpec(tokenizer)

    def refuses(self, spec: InputSpec, algorithm: UsesInputs) -> str | None:
        """Refuse what changes inputs: tokens have no sum."""
        if not algorithm.changes_inputs:
            return None
        return changes_refused(algorithm, "text does not")

    def draw(self, spec: InputSpec, rows: Structure, shown: Mapping[str, Structure]) -> list[str]:
        """Put the tokens into words again."""
        tokenizer = cast(TextSpec, spec).tokenizer
        lines = []
        for row in range(len(rows)):
            for name, view in shown.items():
                tokens = cast(Any, view)[row].flatten().long().tolist()
                lines.append(f"{name:9} {tokenizer.decode(tokens)}")
            lines.append("")
        return lines[:-1]


TEXT = TextKind()
register(TEXT)
