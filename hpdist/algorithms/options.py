"""Options that an algorithm or add-on declares on itself, once.

`threshold: float = option(default=0.95, ge=0, le=1)` in the body of a class, with a docstring under
it, is an argument of the constructor, an attribute of the object, and a setting of the config with
its bounds, its default and its description in the JSON Schema and in the reference. The constructor
and the config class, `Config`, are made from the declarations.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from typing import Any, ClassVar, Literal, cast, dataclass_transform

from pydantic import Field, create_model

from hpdist.config.component import Component
from hpdist.config.descriptions import attribute_docstrings

REQUIRED: Any = Parameter.empty
_RUN = ("num_classes", "device", "steps")


@dataclass(frozen=True)
class Declaration:
    """The declaration of one attribute by `option`, `share_of_run` or `argument`."""

    default: Any
    """Default of the constructor; `REQUIRED` if there is none."""
    kw_only: bool
    setting: str | None = ""
    """The setting of the config: empty if named like the attribute, None if there is none."""
    share: float | None = None
    """The config's default, if the setting is a share of the run and the attribute steps."""
    at_least: int = 0
    """The smallest number of steps that such a share gives."""
    annotation: Any = None
    """The type of the setting, if it is not the attribute's."""
    bounds: Mapping[str, Any] = field(default_factory=dict)
    last: bool = False

    def value(self, config: Component, name: str, run: Mapping[str, Any]) -> Any:
        """The argument of the constructor for a config and a run."""
        value = getattr(config, self.setting or name)
        if self.share is None:
            return value
        return max(self.at_least, round(value * run["steps"]))


def option(
    *, default: Any, kw_only: bool = True, annotation: Any = None, last: bool = False, **bounds: Any
) -> Any:
    """Declare an option: an argument, an attribute and a setting of one name.

    `bounds` are those of `pydantic.Field` (ge, gt, le, lt, min_length). `annotation` is the type
    of the setting if it is narrower than the attribute's; `last` puts it after the subclasses'.
    """
    return Declaration(default, kw_only, annotation=annotation, bounds=bounds, last=last)


def share_of_run(
    *,
    setting: str,
    share: float,
    default: Any = REQUIRED,
    at_least: int = 0,
    kw_only: bool = True,
    **bounds: Any,
) -> Any:
    """Declare a number of steps that the config gives as a share of the run.

    The constructor takes steps (by default `default`), the config takes `setting` (by default
    `share`).
    """
    return Declaration(default, kw_only, setting, share, at_least, float, bounds)


def argument(*, default: Any = REQUIRED, kw_only: bool = True) -> Any:
    """Declare an argument and attribute that the config does not have.

    A config's `build` passes `num_classes` and `steps`, and leaves others at their defaults.
    """
    return Declaration(default, kw_only, setting=None)


@dataclass_transform(kw_only_default=True, field_specifiers=(option, share_of_run, argument))
class WithOptions:
    """The base of classes that declare options.

    Making an object sets the attributes and then calls `start`. A class with its own constructor
    has no `Config`, and its subclasses declare nothing, unless its `first_arguments` names those
    of the declared arguments that the constructor takes.
    """

    Config: ClassVar[Any] = None
    """The config class of the declared options; its `build` makes the object."""
    config_base: ClassVar[type[DeclaredConfig]]
    defaults: ClassVar[str] = ""
    """The source of the options' defaults; part of the description of `Config`."""
    declared: ClassVar[Mapping[str, Declaration]] = {}
    """The declarations of the class and its bases, in order."""
    first_arguments: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        """Collect the declarations, and make the constructor and the config, known as `name`."""
        super().__init_subclass__(**kwargs)
        own = {key: value for key, value in vars(cls).items() if isinstance(value, Declaration)}
        for key, declaration in own.items():
            if declaration.default is REQUIRED or key == "device":  # which state may leave
                delattr(cls, key)
            else:
                setattr(cls, key, declaration.default)
        inherited: dict[str, Declaration] = {}
        for base in reversed(cls.__mro__[1:]):
            inherited |= vars(base).get("declared", {})
        merged = inherited | own
        cls.declared = dict(sorted(merged.items(), key=lambda item: item[1].last))
        written = _written_constructor(cls)
        if "first_arguments" not in vars(written):
            if own:
                raise TypeError(
                    f"{cls.__name__} declares {', '.join(own)}, but {written.__name__} has its own "
                    "constructor, which does not know them; remove that constructor and override "
                    "start() instead"
                )
            if "Config" not in vars(cls):
                cls.Config = None
            return
        if "__init__" not in vars(cls):
            cls.__init__ = _constructor(cls, written)  # type: ignore[method-assign]
            if "Config" not in vars(cls):
                cls.Config = _config(cls, name)

    def start(self, device: Any) -> None:
        """Make the state on `device`; called when all declared attributes are set."""

    def settings(self) -> dict[str, Any] | None:
        """The object's options, as the config has them.

        None if it was given steps that the config can only express as shares of a run.
        """
        declared = {name: d for name, d in self.declared.items() if d.setting is not None}
        if any(declaration.share is not None for declaration in declared.values()):
            return None
        return {name: getattr(self, name) for name in declared}

    @classmethod
    def arguments(cls, config: Component, **run: Any) -> dict[str, Any]:
        """The constructor's arguments that follow from a config and a run."""
        values_of = {
            name: declaration.value(config, name, run)
            for name, declaration in cls.declared.items()
            if declaration.setting is not None
        }
        return values_of | {name: run[name] for name in _RUN if name in cls.declared}


class DeclaredConfig(Component):
    """The base of configs whose options may be declared on the class that they build."""

    declared_by: ClassVar[Any] = None
    """The class that declares the options; `build` makes an object of it."""

    @classmethod
    def setting_docstrings(cls) -> dict[str, str]:
        """The object whose docstrings describe the settings."""
        declared = {} if cls.declared_by is None else option_docstrings(cls.declared_by)
        return declared | attribute_docstrings(cls)


def option_docstrings(kind: type[WithOptions]) -> dict[str, str]:
    """The docstring under every declaration that the config has, by setting."""
    texts = attribute_docstrings(kind)
    return {
        declaration.setting or name: texts[name]
        for name, declaration in kind.declared.items()
        if declaration.setting is not None and name in texts
    }


def _written_constructor(cls: type) -> type:
    """The nearest class with a constructor that is not made from declarations."""
    return next(
        base
        for base in cls.__mro__
        if "__init__" in vars(base) and not hasattr(vars(base)["__init__"], "made")
    )


def _constructor(cls: type[WithOptions], written: Any) -> Callable[..., None]:
    """Make the constructor of a class from its declarations."""
    parameters = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY if d.kw_only else Parameter.POSITIONAL_OR_KEYWORD,
            default=d.default,
        )
        for name, d in cls.declared.items()
    ]
    parameters.sort(
        key=lambda p: (
            p.kind,
            p.kind == Parameter.POSITIONAL_OR_KEYWORD and p.default is not REQUIRED,
        )
    )
    signature = Signature(parameters)

    def construct(self: Any, *args: Any, **values: Any) -> None:
        try:
            bound = signature.bind(*args, **values)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}(): {error}") from None
        bound.apply_defaults()
        given = dict(bound.arguments)
        written.__init__(self, *(given.pop(name) for name in written.first_arguments))
        device = given.pop("device")
        for name, value in given.items():
            setattr(self, name, value)
        self.start(device)
        self.discard()

    myself = Parameter("self", Parameter.POSITIONAL_ONLY)
    construct.__signature__ = Signature([myself, *parameters])  # type: ignore[attr-defined]
    construct.__qualname__ = f"{cls.__qualname__}.__init__"
    construct.__module__ = cls.__module__
    construct.made = True  # type: ignore[attr-defined]
    construct.__name__ = "__init__"
    return construct


def _config(cls: type[WithOptions], name: str | None) -> type[DeclaredConfig]:
    """Make the config class for the declarations of a class, known under `name` if given."""
    fields: dict[str, Any] = {}
    if name is not None:
        fields["name"] = (Literal[name], name)
    for attribute, declaration in cls.declared.items():
        if declaration.setting is None:
            continue
        default = declaration.default if declaration.share is None else declaration.share
        kind = declaration.annotation or _annotation(cls, attribute)
        setting = declaration.setting or attribute
        fields[setting] = (kind, Field(default, **declaration.bounds))
    config = cast(
        Any,
        create_model(
            f"{cls.__name__}Config",
            __base__=cls.config_base,
            __module__=cls.__module__,
            __doc__=cls.defaults or None,
            **fields,
        ),
    )
    config.declared_by = cls
    return cast(type[DeclaredConfig], config)


def _annotation(cls: type, attribute: str) -> Any:
    """The type annotation of an attribute in a class or its bases."""
    owner = next(base for base in cls.__mro__ if attribute in inspect.get_annotations(base))
    found = inspect.get_annotations(owner)[attribute]
    if not isinstance(found, str):
        return found
    try:
        return eval(found, vars(sys.modules[owner.__module__]), dict(vars(owner)))
    except NameError as error:
        raise TypeError(f"{owner.__name__}.{attribute}: {found}: {error}") from error
