"""Views that are not chosen yet: the columns of the labelled rows will tell which they are."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from hpdist.config.component import Component
from hpdist.errors import ConfigError


class AutoViewsConfig(Component):
    """The views that the labelled rows ask for: image, text, audio or table, with these options."""

    model_config = ConfigDict(extra="allow")
    kind: ClassVar[str] = "views"
    name: Literal["auto"] = "auto"

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, which several views have."""
        return dict(self.model_extra or {})

    def build(self, seed: int) -> Any:
        """Refuse: there is nothing to build before the rows are known."""
        raise ConfigError("views.name: auto is chosen by the rows of a run; name the views")
