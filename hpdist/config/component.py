"""A component: the options of something chosen by its `name`, wherever it is defined."""

from __future__ import annotations

import difflib
import importlib
import operator
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from hpdist.config.descriptions import add_descriptions
from hpdist.config.section import Section, nearest, refusal, shown
from hpdist.errors import ConfigError, describe

PYTHON_PREFIX = "python:"
IN_PYTHON = "python:(given)"
"""The name of a model given as an object in Python."""
AUTO = "auto"
DEFAULT_NAMES = {"views": AUTO}
"""The name of a component that its options choose, when the config has no name."""


def by_name(values: Any) -> Any:
    """Accept a text as the `name` of a group of settings: `tracker: none`."""
    return {"name": values} if isinstance(values, str) else values


class ByName:
    """Annotates a field with a group of settings that may be given by its `name` only."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Validate what `by_name` gives."""
        return core_schema.no_info_before_validator_function(by_name, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Accept the group, or one of the names."""
        group = handler(schema)
        names = handler.resolve_ref_schema(dict(group))["properties"]["name"]["enum"]
        return {"anyOf": [group, {"type": "string", "enum": names}]}


class Component(Section):
    """The options of something chosen by name: a model, an algorithm, the views."""

    kind: ClassVar[str] = ""
    prefix: ClassVar[str] = ""
    """The prefix of such components' names, if their names are not fixed."""
    prefix_hint: ClassVar[str] = ""
    """An example of such a name, for messages."""
    comes_first: ClassVar[bool] = False
    """Whether options that fit none, and several come as close to, are taken for this one's."""
    name: str

    @classmethod
    def misfits(cls, values: Mapping[str, Any]) -> int:
        """Count the errors in settings of such a component."""
        try:
            cls.model_validate(dict(values))
        except ValidationError as error:
            return error.error_count()
        return 0

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Register the component under the default of its `name` field, or under its prefix."""
        super().__pydantic_init_subclass__(**kwargs)
        if cls.kind and cls.prefix:
            _prefixed.setdefault(cls.kind, {})[cls.prefix] = cls
        default = cls.model_fields["name"].default
        if cls.kind and isinstance(default, str):
            _components.setdefault(cls.kind, {})[default] = cls


_components: dict[str, dict[str, type[Component]]] = {}
_prefixed: dict[str, dict[str, type[Component]]] = {}


def components(kind: str) -> dict[str, type[Component]]:
    """Return the components of a kind ('model', 'algorithm', 'views') by name, sorted.

    A component is known once its module has been imported; `hpdist.train.config` imports all that
    come with hpdist.
    """
    return dict(sorted(_components.get(kind, {}).items()))


def component_names(kind: str) -> list[str]:
    """The names known for a kind of component, sorted."""
    return list(components(kind))


class PythonComponent(Component):
    """A user's own function that makes a model, called with `args`."""

    name: str = Field(pattern=f"^{PYTHON_PREFIX}")
    """`python:package.module:function`; the working directory is importable."""
    num_classes: int | None = Field(None, ge=2)
    """By default the number of classes in the labelled data."""
    features: str | None = None
    """The submodule whose output the features are, for algorithms with their own heads; by default
    the input of the last linear layer."""
    save: Literal["full", "half", "none"] = "full"
    """What the run folder's `model/` holds: the weights in fp32, in the run's half precision, or
    nothing, where there is none."""
    args: dict[str, Any] = Field({})
    """Keyword arguments, passed as they are."""


class UnreadComponent(Component):
    """A `python:…` component when a command need not import its module: unchecked settings."""

    model_config = ConfigDict(extra="allow")


_imports: ContextVar[bool] = ContextVar("imports", default=True)


@contextmanager
def nothing_imported() -> Iterator[None]:
    """Accept `python:` names without importing what they name, for a while.

    A config is code if it names modules, and inspecting one should not run it.
    """
    token = _imports.set(False)
    try:
        yield
    finally:
        _imports.reset(token)


class ComponentOf:
    """Annotates a field that holds a component: `name` decides which component it is.

    `default` is the name where settings have none.
    """

    def __init__(self, kind: str, default: str | None = None) -> None:
        self.kind = kind
        self.default = DEFAULT_NAMES.get(kind) if default is None else default

    def choose(self, values: object) -> Component:
        """Make the component that `name` or a plain name chooses. Raises ValidationError."""
        if isinstance(values, Component):
            return values
        values = {} if values is None and self.default is not None else by_name(values)
        if not isinstance(values, dict):
            raise refusal(
                ((), f"must be a name or a group of settings, not {shown(values)}; {self.hint}")
            )
        values = {"name": self.default} | values
        name = values["name"]
        if name == AUTO and self.default == AUTO:
            name = values["name"] = self.by_options(values)
        if name is None:
            raise refusal((("name",), f"missing; {self.hint}"))
        try:
            return self._class(str(name)).model_validate(values)
        except ConfigError as error:  # from importing a `python:` name
            raise refusal((("name",), str(error))) from error

    def by_options(self, values: Mapping[str, Any]) -> str:
        """Return the name of the only component with these options; `auto` if several have them.

        If none has, it is the closest one, whose error explains what is wrong: the one that
        `comes_first` if several are equally close.
        """
        options = {key: value for key, value in values.items() if key != "name"}
        wrong = {
            name: component.misfits(options | {"name": name})
            for name, component in components(self.kind).items()
            if name != AUTO
        }
        fitting = [name for name, count in wrong.items() if not count]
        if len(fitting) != 1 and fitting:
            return AUTO
        known = components(self.kind)

        def distance(name: str) -> tuple[float, ...]:
            fields = known[name].model_fields
            close = sum(bool(difflib.get_close_matches(key, fields, 1)) for key in options)
            return wrong[name], -close, not known[name].comes_first

        return fitting[0] if fitting else min(wrong, key=distance)

    @property
    def hint(self) -> str:
        """The possible names, for a message."""
        names = [*components(self.kind), *(c.prefix_hint for c in self._prefixed.values())]
        return f"known: {', '.join(names)}, or python:package.module:attribute"

    @property
    def _prefixed(self) -> dict[str, type[Component]]:
        return _prefixed.get(self.kind, {})

    def _class(self, name: str) -> type[Component]:
        if name.startswith(PYTHON_PREFIX):
            return self._python_class(name)
        known = components(self.kind)
        for prefix, component in self._prefixed.items():
            if name.startswith(prefix):
                return component
        if name not in known:
            hint = nearest(name, known)
            raise ConfigError(f"no {self.kind} is called {name!r}{hint}; {self.hint}")
        return known[name]

    def _python_class(self, name: str) -> type[Component]:
        """A user's own component: a config class, or something with one as its `Config`."""
        if not _imports.get():
            split_name(name)
            return UnreadComponent
        found = None if name == IN_PYTHON else import_object(name)
        for candidate in (found, getattr(found, "Config", None)):
            if isinstance(candidate, type) and issubclass(candidate, Component):
                if candidate.kind != self.kind:
                    raise ConfigError(f"{name} holds options of {candidate.kind or 'no kind'}")
                return candidate
        if self.kind != "model":
            raise ConfigError(f"{name} is not a config class of {self.kind} options, nor has one")
        return PythonComponent

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Validate with `choose`."""
        return core_schema.no_info_before_validator_function(self.choose, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Accept every component's options, distinguished by `name`."""
        python = {"python": PythonComponent} if self.kind == "model" else {}
        options = []
        for name, component in (components(self.kind) | self._prefixed | python).items():
            option = handler(component.__pydantic_core_schema__)
            definition = handler.resolve_ref_schema(option)
            add_descriptions(component, definition)
            if name != self.default:  # so that settings without a name match only one option
                definition["required"] = sorted({"name", *definition.get("required", [])})
            options.append(option)
        names = f"The name alone: {', '.join(components(self.kind))}, or another that is allowed."
        return {"oneOf": [*options, {"type": "string", "description": names}]}


def import_object(name: str) -> Any:
    """Import `python:package.module:attribute`; the working directory is importable.

    Raises ConfigError if it cannot be found, or the module fails.
    """
    module_name, attribute = split_name(name)
    if os.getcwd() not in sys.path:  # `python -m` adds it, the `hpdist` script does not
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything
        raise ConfigError(f"cannot import {module_name!r}: {describe(error)}") from error
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        hint = nearest(attribute, vars(module))
        raise ConfigError(f"module {module_name!r} has no {attribute!r}{hint}") from error


def split_name(name: str) -> tuple[str, str]:
    """Split a `python:` name into module and attribute. Raises ConfigError if it has none."""
    module_name, _, attribute = name.removeprefix(PYTHON_PREFIX).partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{name!r} must read python:package.module:attribute")
    return module_name, attribute
