"""Kinds of input, one file each: images, text, sound, tables, pairs of texts."""

from hpdist.data.kinds.audio import AUDIO
from hpdist.data.kinds.base import (
    Context,
    Facts,
    FoundInput,
    InputKind,
    Recognised,
    TableOfRows,
)
from hpdist.data.kinds.find import (
    DEFAULT_KIND,
    find_input,
    kind_of_input,
    kind_of_type,
    kind_of_views,
    only_certain,
    usable_kind,
)
from hpdist.data.kinds.first_rows import first_spec, input_spec, spec_of_value
from hpdist.data.kinds.image import IMAGE
from hpdist.data.kinds.pair import PAIR
from hpdist.data.kinds.registry import kind_named, kind_names, kinds, register
from hpdist.data.kinds.table import TABLE
from hpdist.data.kinds.text import TEXT

__all__ = [
    "AUDIO",
    "DEFAULT_KIND",
    "IMAGE",
    "PAIR",
    "TABLE",
    "TEXT",
    "Context",
    "Facts",
    "FoundInput",
    "InputKind",
    "Recognised",
    "TableOfRows",
    "find_input",
    "first_spec",
    "input_spec",
    "kind_named",
    "kind_names",
    "kind_of_input",
    "kind_of_type",
    "kind_of_views",
    "kinds",
    "only_certain",
    "register",
    "spec_of_value",
    "usable_kind",
]
