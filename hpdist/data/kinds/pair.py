"""Pairs of texts: unlabelled rows with a strong view of their own, such as a back-translation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hpdist.data.decode.recorded import restored
from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.text import PairSpec, Tokenizer
from hpdist.data.kinds.base import Recognised, UsesInputs
from hpdist.data.kinds.columns import is_text
from hpdist.data.kinds.registry import register
from hpdist.data.kinds.text import TextKind
from hpdist.errors import ConfigError


class PairKind(TextKind):
    """Texts with a second one in the column that `views.strong_column` names.

    No column is taken for one by itself: `TextKind.unlabeled_spec` says where there are pairs.
    """

    name: ClassVar[str] = "pair"

    def recognise(self, feature: Any) -> Recognised | None:
        """See nothing: a pair is named."""
        return None

    def fits(self, feature: Any) -> bool:
        """Take text."""
        return is_text(feature)

    def paired_columns(self, spec: InputSpec, features: Any, where: str) -> Sequence[str]:
        """Give the column of second texts; raises ConfigError where it is no text."""
        column = str(spec.paired_column)
        texts = ", ".join(name for name in features if is_text(features[name])) or "none"
        setting = f"views.strong_column: in {where}"
        if column not in features:
            raise ConfigError(
                f"{setting} there is no column {column!r}; there are {', '.join(features)} "
                f"(of text: {texts})"
            )
        if not is_text(features[column]):
            raise ConfigError(
                f"{setting} column {column!r} holds {features[column]}, not text; of text: {texts}"
            )
        return (column,)

    def _restored(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> InputSpec:
        return restored(PairSpec, values, tokenizer=tokenizer)

    def refuses(self, spec: InputSpec, algorithm: UsesInputs) -> str | None:
        """Refuse also what makes no strong view of unlabelled rows."""
        if algorithm.views.uses_unlabeled and not algorithm.views.strong:
            return super().refuses(spec, algorithm) or (
                f"views.strong_column: {type(algorithm).__name__} makes no strong view of "
                "unlabelled rows; leave it out, or choose an algorithm that does, such as fixmatch"
            )
        return super().refuses(spec, algorithm)


PAIR = PairKind()
register(PAIR)
