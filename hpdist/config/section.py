"""A group of settings: the base of all sections of the config.

Pydantic validates; this rewords its errors such that they name the setting, its value and what is
allowed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import (
    CoreSchema,
    ErrorDetails,
    InitErrorDetails,
    PydanticCustomError,
    PydanticKnownError,
)

from hpdist.config.descriptions import add_descriptions
from hpdist.messages.redaction import redacted_settings

Location: TypeAlias = tuple[int | str, ...]


class Section(BaseModel):
    """A group of settings. Unknown keys are refused; a docstring under a field describes it."""

    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler, /
    ) -> dict[str, Any]:
        """Describe the settings by the docstrings under them."""
        found = handler(schema)
        add_descriptions(cls, handler.resolve_ref_schema(found))
        return found

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `steps: true`, which Python would treat as 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            raise PydanticKnownError("int_type")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, validate: ModelWrapValidatorHandler[Section]) -> Section:
        """Reword pydantic's errors such that they name what is allowed."""
        try:
            return validate(values)
        except ValidationError as error:
            raise refusal(*_findings(cls, error)) from None


def refusal(*findings: tuple[Location, str]) -> ValidationError:
    """A ValidationError of (location, message) pairs, which pydantic adds to the others."""
    details: list[InitErrorDetails] = [
        {"type": PydanticCustomError(_OURS, "{text}", {"text": text}), "loc": loc, "input": None}
        for loc, text in findings
    ]
    return ValidationError.from_exception_data("config", details)


_OURS = "hpdist"  # marks errors that are already in our words
_BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
_BOUND_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
_NOUNS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a group of settings",
}


def _findings(section: type[BaseModel], error: ValidationError) -> list[tuple[Location, str]]:
    """Pydantic's errors about a section as (location, message)."""
    found = {}
    for detail in error.errors():
        loc, kind = detail["loc"], detail["type"]
        field = section.model_fields.get(str(loc[0])) if loc else None
        if kind == _OURS:
            found[loc] = detail["msg"]
        elif len(loc) > 1 and isinstance(loc[1], str) and field is not None:  # branches of a union
            nouns = [_NOUNS.get(getattr(a, "__name__", "")) for a in get_args(field.annotation)]
            allowed = " or ".join(noun for noun in nouns if noun)
            found.setdefault(loc[:1], f"must be {allowed}, not {shown(detail['input'])}")
        else:
            found[loc] = _in_words(section, field, detail)
    return list(found.items())


def _in_words(section: type[BaseModel], field: FieldInfo | None, detail: ErrorDetails) -> str:
    """Reword one of pydantic's errors: what is allowed, and what was found."""
    kind, loc, message, value = detail["type"], detail["loc"], detail["msg"], detail["input"]
    if kind == "extra_forbidden":
        hint = nearest(str(loc[-1]), section.model_fields)
        return f"unknown setting{hint or '; known here: ' + ', '.join(section.model_fields)}"
    if kind == "missing":
        if len(loc) > 1:
            return f"missing, in {shown(value)}"
        hints = [m.hint for m in field.metadata if hasattr(m, "hint")] if field else []
        return f"missing; give its name; {hints[0]}" if hints else "missing"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind.startswith("model_"):
        return (
            f"must be a group of settings ({', '.join(section.model_fields)}), not {shown(value)}"
        )
    bounds = _bounds(field) if field is not None and len(loc) == 1 else ""
    if kind in _BOUND_ERRORS and bounds:
        message = f"must be {bounds}"
    elif kind.endswith(("_type", "_parsing", "_from_float")):
        message = f"must be {_NOUNS.get(kind.partition('_')[0], kind)} {bounds}".rstrip()
    message = re.sub(r"^\w+ should", "must", message).replace(" after validation", "")
    return message if ", not " in message else f"{message}, not {shown(value)}"


def _bounds(field: FieldInfo) -> str:
    """The range a field allows: 'at least 0 and less than 1'."""
    pairs = (
        (words, getattr(m, key, None)) for m in field.metadata for key, words in _BOUNDS.items()
    )
    return " and ".join(f"{words} {limit}" for words, limit in pairs if limit is not None)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the most similar known name, if there is one."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """Format a value as in YAML, shortened."""
    value = redacted_settings(value)  # first: a truncated URL would hide where a password ends
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings into dotted keys, with values that any tracker takes."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, (bool, int, float, str))
            found[prefix + key] = value if plain else str(value)
    return found
