"""An option is declared once; constructor, attribute, config, schema and page follow from it."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError

from hpdist.algorithms import AddOn, Algorithm, FixMatch, FreeMatch, MeanTeacher, Views
from hpdist.algorithms.options import argument, option, share_of_run
from hpdist.algorithms.reference import reference
from hpdist.config.component import components
from tests.support.documents import ROOT


class Toy(Algorithm):
    """One that declares an option of each kind."""

    views = Views(weak=1)
    defaults: ClassVar[str] = "Chosen for a test."

    num_classes: int = argument(kw_only=False)
    sharpness: float = option(default=2.0, kw_only=False, gt=0, le=8)
    """How sharp it is."""
    rise_steps: int = share_of_run(setting="rise", share=0.25, default=0, at_least=1, ge=0, le=1)
    """Share of the run over which it rises."""
    weights: tuple[float, ...] = option(default=[1.0], annotation=list[float], min_length=1)

    def start(self, device: torch.device | str) -> None:
        """Make the state from what has been declared."""
        self.state = {"mean": torch.full((self.num_classes,), self.sharpness, device=device)}


def test_the_constructor() -> None:
    toy = Toy(3, 4.0, rise_steps=7)
    assert (toy.num_classes, toy.sharpness, toy.rise_steps, toy.weights) == (3, 4.0, 7, [1.0])
    assert toy.state["mean"].tolist() == toy.pending["mean"].tolist() == [4.0] * 3
    assert list(inspect.signature(Toy).parameters) == [
        "num_classes",
        "sharpness",
        "device",
        "rise_steps",
        "weights",
    ]
    assert not hasattr(toy, "device"), "its state may be moved"


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        ((), {}, r"Toy\(\): missing a required argument: 'num_classes'"),
        ((3,), {"sharp": 1.0}, r"Toy\(\): got an unexpected keyword argument 'sharp'"),
        ((3, 1.0, 2), {}, r"Toy\(\): too many positional arguments"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], values: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Toy(*arguments, **values)


def test_the_config_makes_the_object() -> None:
    made = Toy.Config(name="toy", sharpness=3, weights=[2, 1]).build(5, steps=10)
    assert isinstance(made, Toy)
    assert (made.num_classes, made.sharpness, made.rise_steps) == (5, 3.0, 2)
    assert made.weights == [2.0, 1.0]
    assert Toy.Config(name="toy", rise=0).build(5, steps=10).rise_steps == 1


def test_the_config_refuses_what_is_out_of_bounds() -> None:
    with pytest.raises(ValidationError, match="must be greater than 0 and at most 8, not 9"):
        Toy.Config(name="toy", sharpness=9)
    with pytest.raises(ValidationError, match="unknown setting, did you mean 'sharpness'"):
        Toy.Config(name="toy", sharpnes=1)


def test_the_schema() -> None:
    schema = Toy.Config.model_json_schema()
    assert schema["description"] == "Chosen for a test."
    assert list(schema["properties"]) == ["name", "sharpness", "rise", "weights"]
    described = {"exclusiveMinimum": 0, "maximum": 8, "description": "How sharp it is."}
    assert described.items() <= schema["properties"]["sharpness"].items()
    rise = schema["properties"]["rise"]
    assert (rise["default"], rise["description"]) == (0.25, "Share of the run over which it rises.")


def test_a_subclass_inherits_and_overrides() -> None:
    class Sharper(Toy):
        sharpness: float = option(default=6.0, kw_only=False, ge=5)

    assert (Sharper(2).sharpness, Toy(2).sharpness) == (6.0, 2.0)
    assert Sharper(2, rise_steps=3).rise_steps == 3
    assert isinstance(Sharper.Config(name="s").build(2), Sharper)


def test_a_constructor_of_ones_own() -> None:
    class Own(FixMatch):
        def __init__(self, sure: bool) -> None:
            super().__init__(0.99 if sure else 0.5)

    assert Own(True).threshold == 0.99
    assert Own.Config is None, "nothing says how to make it from options"
    with pytest.raises(TypeError, match="Further declares more, but Own has its own constructor"):
        type("Further", (Own,), {"more": option(default=1)})


def test_every_algorithm_declares_its_options() -> None:
    """So that no config has a `build` of its own that an option could be forgotten in."""
    for kind in ("algorithm", "addon"):
        for name, config in components(kind).items():
            if config.__module__.startswith("hpdist.algorithms."):
                made: Any = config.declared_by  # type: ignore[attr-defined]
                assert made is not None, name
                assert "build" not in vars(config), name
                settings = {
                    d.setting or key for key, d in made.declared.items() if d.setting is not None
                }
                assert settings == set(config.model_fields) - {"name"}, name


def test_constructors_keep_their_order() -> None:
    assert (FixMatch(0.9).threshold, FixMatch(0.9, 2.0).unsupervised_weight) == (0.9, 2.0)
    assert FreeMatch(10, momentum=0.5).momentum == FreeMatch(num_classes=10, momentum=0.5).momentum
    assert (MeanTeacher(5.0, 7).unsupervised_weight, MeanTeacher(5.0, 7).ramp_steps) == (5.0, 7)


def test_the_page_is_what_the_declarations_say() -> None:
    page = (ROOT / "docs/algorithm-options.md").read_text(encoding="utf-8")
    assert page == reference(), "python -m hpdist.algorithms.reference > docs/algorithm-options.md"


NOT_HANDED_ON = {
    "Config": "each class has its own",
    "arguments": "of the class's own declarations",
    "config_base": "add-ons have another",
    "declared": "of each class",
    "defaults": "of each class",
    "first_arguments": "of each class",
    "from_config": "an add-on is made by its own config",
    "settings": "of the object's own options",
    "start": "called by each object's constructor",
    "tasks": "computed from `needs`, which an add-on adds its own to",
}
"""What an add-on need not take from the algorithm inside, and why."""


def public(kind: type) -> set[str]:
    """The public names of a class and those above it, and what its objects have."""
    names = {name for base in kind.__mro__ if base is not object for name in vars(base)}
    return {name for name in names if not name.startswith("_")}


def forgotten(algorithm: type[Algorithm], addon: type[AddOn]) -> set[str]:
    """What an algorithm has that an add-on neither hands on nor has a reason not to."""
    inside = FixMatch()
    around = addon(inside)
    attributes = public(algorithm) | {n for n in vars(inside) if n in vars(Algorithm())}
    own = {name for name in vars(addon) if not name.startswith("_")} | set(vars(around))
    return {name for name in attributes if name not in own and name not in NOT_HANDED_ON}


def test_an_addon_forgets_no_hook() -> None:
    assert forgotten(Algorithm, AddOn) == set()
    assert set(NOT_HANDED_ON) <= public(Algorithm), "a reason for what is no longer there"


def test_a_new_hook_is_noticed() -> None:
    class More(Algorithm):
        scale: float = 1.0

        def after_epoch(self) -> None:
            """Do something that add-ons know nothing of."""

    assert forgotten(More, AddOn) == {"scale", "after_epoch"}
