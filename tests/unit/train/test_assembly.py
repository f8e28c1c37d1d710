"""How a run is assembled: its parts are finished when they are made, and modules hold no state."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[3] / "hpdist" / "train"
FINISHED = (  # what they set outside `__init__` are flags and counters that are declared there
    *("trainer.py", "loop.py", "build.py", "data.py", "sets.py", "labeled_inputs.py"),
    *("other_sets.py", "fitting.py", "given.py", "model.py", "claim.py", "saving.py"),
    *("recovery.py", "records.py", "measuring.py", "generations.py", "guard.py"),
)
MAKERS = ("__init__", "__post_init__")
WHAT_THEY_HOLD = {  # parts that wait for one moment of a run, and what is there until then
    ("claim.py", "_lock"): "the folder's lock, once it is taken",
    ("measuring.py", "_latest"): "what was measured last",
    ("measuring.py", "_outcomes"): "what became of each row in the evaluation at the end",
    ("guard.py", "received"): "the signal that came",
    ("guard.py", "_before"): "the handlers while the guard is entered",
    ("saving.py", "_saved_at"): "a time",
}


def targets(node: ast.AST) -> list[str]:
    """The attributes of `self` that a statement sets."""
    if isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        found = [node.target]
    elif isinstance(node, ast.Assign):
        found = [part for target in node.targets for part in ast.walk(target)]  # type: ignore[misc]
    else:
        return []
    return [
        target.attr
        for target in found
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    ]


def is_plain(value: ast.expr | None) -> bool:
    """Whether it is a number or a flag."""
    if isinstance(value, ast.UnaryOp):
        value = value.operand
    return isinstance(value, ast.Constant) and isinstance(value.value, (bool, int, float))


def set_late(text: str) -> list[str]:
    """What the classes of a module set outside `__init__`, but for flags declared in it."""
    found = []
    for kind in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)):
        methods = [node for node in kind.body if isinstance(node, ast.FunctionDef)]
        plain, late = set(), []
        for method in methods:
            for node in ast.walk(method):
                if method.name not in MAKERS:
                    late += targets(node)
                elif is_plain(getattr(node, "value", None)):
                    plain |= set(targets(node))
        found += [name for name in late if name not in plain]
    return found


def state_of_module(text: str) -> list[str]:
    """The names of a module that hold something which can change."""
    found = []
    for node in ast.parse(text).body:
        value = getattr(node, "value", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(
            value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.Call)
        ):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            if name != "_log":
                found.append(name)
    changed = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Global)]
    return found + [name for node in changed for name in node.names]


@pytest.mark.parametrize("name", FINISHED)
def test_nothing_is_set_outside_init_and_no_module_has_state(name: str) -> None:
    text = (TRAIN / name).read_text(encoding="utf-8")
    assert {(name, late) for late in set_late(text)} <= WHAT_THEY_HOLD.keys()
    assert state_of_module(text) == []
    assert text.count("\n") <= 400


def test_the_trainer_itself_makes_no_exception() -> None:
    for name in ("trainer.py", "loop.py", "build.py", "data.py", "sets.py"):
        assert not [where for where in WHAT_THEY_HOLD if where[0] == name]


def test_the_rules_can_fail() -> None:
    text = """
class Half:
    def __init__(self):
        self.count = 0
        self.part = None
    def build(self):
        self.count += 1
        self.part, self.other = make(), 1
        self.third: int = 3
"""
    assert set_late(text) == ["part", "other", "third"]
    assert state_of_module("_kept = []\nA: dict = {}\nB = 1\n_log = get('a')\n") == ["_kept", "A"]
    assert state_of_module("B = 1\ndef f():\n    global B\n    B = 2\n") == ["B"]
