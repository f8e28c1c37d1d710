"""What an optimizer step is can be read on one screen."""

from __future__ import annotations

import ast
from pathlib import Path

from hpdist.train import step

MOST_LINES = 40


def body_lines(source: str, owner: str, name: str) -> int:
    """Count a method's lines, without its signature and docstring."""
    (cls,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == owner)
    (method,) = (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == name)
    first = method.body[1 if ast.get_docstring(method) else 0]
    assert method.end_lineno is not None
    return method.end_lineno - first.lineno + 1


def test_a_step_reads_on_one_screen() -> None:
    source = Path(step.__file__).read_text(encoding="utf-8")
    assert body_lines(source, "SemiSupervisedStep", "__call__") <= MOST_LINES


def test_lines_are_counted_without_signature_and_docstring() -> None:
    lines = ("class A:", "    def f(", "        self", "    ):", '        """Doc."""')
    source = "\n".join([*lines, "        a = 1", "", "        return a"])
    assert body_lines(source, "A", "f") == 3
