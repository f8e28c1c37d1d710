"""The plan of the house: which room may import which, read off every import there is."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hpdist"

FLOORS = (  # a room imports only what stands before it
    *("version", "messages", "errors", "processes", "hub", "aliases", "config"),
    *("data", "distributed", "checkpoint", "models", "tasks", "tracking"),
    *("engines", "preflight", "algorithms", "evaluate", "testing", "train", "plan", "cli"),
)
DATA_FLOORS = (
    *("random", "structures", "batch", "config", "files", "decode", "kinds", "stream", "sources"),
    *("views", "samples", "convert"),
)
MAY_KNOW_THE_WHOLE_CONFIG = ("train", "cli")

Imports = dict[str, dict[str, set[str]]]


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(root: Path) -> Imports:
    """Every module's imports from the package, those in functions and for types among them."""
    files = {module_of(path, root): path for path in sorted((root / "hpdist").rglob("*.py"))}
    found: Imports = {}
    for module, path in files.items():
        names: dict[str, set[str]] = defaultdict(set)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "hpdist":
                assert node.level == 0, f"{module}: relative imports hide where an arrow points"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    names[whole if whole in files else str(node.module)].add(alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "hpdist":
                        names[alias.name].add("")
        names.pop(module, None)
        found[module] = dict(names)
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward(imports: Imports) -> list[str]:
    """The arrows that run to a floor above, or to a room that no floor has."""
    found = []
    for module, targets in imports.items():
        here = room_of(module)
        if here in ("", "__main__"):  # the door: it leads anywhere
            continue
        for target in targets:
            there = room_of(target)
            if not there or FLOORS.index(there) > FLOORS.index(here):
                found.append(f"{module} -> {target}")
            elif here == there == "data" and module.count(".") > 1 and target.count(".") > 1:
                parts = module.split(".")[2], target.split(".")[2]
                if DATA_FLOORS.index(parts[1]) > DATA_FLOORS.index(parts[0]):
                    found.append(f"{module} -> {target}")
    return found


def circles(imports: Imports) -> list[list[str]]:
    """The groups of modules that import one another: Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in imports.get(module, {}):
            if target not in imports:
                continue
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in imports:
        if module not in index:
            visit(module)
    return found


def knows_the_whole_config(imports: Imports) -> list[str]:
    return [
        module
        for module, targets in imports.items()
        if any("RunConfig" in names for names in targets.values())
        and room_of(module) not in (*MAY_KNOW_THE_WHOLE_CONFIG, "")
    ]


IMPORTS = read_imports(ROOT)


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(module) for module in IMPORTS} - {"", "__main__"}
    assert rooms <= set(FLOORS)


def test_no_arrow_runs_upward() -> None:
    assert upward(IMPORTS) == []


def test_no_circle() -> None:
    assert circles(IMPORTS) == []


def test_the_whole_config_is_known_at_the_top_alone() -> None:
    assert knows_the_whole_config(IMPORTS) == []


def test_algorithms_do_not_communicate() -> None:
    """They say what is to be summed; only lower rooms may talk to other ranks or to DeepSpeed."""
    for path in (PACKAGE / "algorithms").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for package in ("torch.distributed", "accelerate", "deepspeed"):
            assert f"import {package}" not in text, path
            assert f"from {package}" not in text, path


def test_deepspeed_is_imported_by_engines_alone() -> None:
    for path in PACKAGE.rglob("*.py"):
        if "engines" not in path.parts:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                assert not [n for n in names if n.split(".")[0] == "deepspeed"], path


def test_nothing_needs_pytest_to_be_imported() -> None:
    """Also what is there for tests can be used by those who test with something else."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("pytest", "tests")], path


def test_the_rules_can_fail(tmp_path: Path) -> None:
    """What a circle, an arrow upward and a whole config look like to the rules above."""
    files = {
        "data/files/open.py": "from hpdist.train.config import RunConfig\n",
        "data/decode/image.py": "from hpdist.data.decode import text\n",
        "data/decode/text.py": "def f():\n    from hpdist.data.decode.image import g\n",
        "data/batch.py": "import hpdist.data.stream.plan\n",
        "data/stream/plan.py": "",
        "train/config.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "hpdist" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    imports = read_imports(tmp_path)
    assert upward(imports) == [
        "hpdist.data.batch -> hpdist.data.stream.plan",
        "hpdist.data.files.open -> hpdist.train.config",
    ]
    assert circles(imports) == [["hpdist.data.decode.image", "hpdist.data.decode.text"]]
    assert knows_the_whole_config(imports) == ["hpdist.data.files.open"]


def docstrings(path: Path) -> list[str]:
    """Every docstring of a file, those under attributes among them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node) or "")
        body = getattr(node, "body", [])
        for before, text in pairwise(body if isinstance(body, list) else []):
            if (
                isinstance(before, (ast.Assign, ast.AnnAssign))
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found.append(text.value.value.strip())
    return found


def test_docstrings_are_sentences_with_a_subject() -> None:
    begin = ("Of ", "Likewise", "The same ")
    wrong = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in PACKAGE.rglob("*.py")
        for text in docstrings(path)
        if text.startswith(begin)
    ]
    assert wrong == []


FORBIDDEN = (  # words of a dialect: what each of them stood for has a name in the field
    *("told", "tell", "tells", "said", "say", "says", "heed", "aside", "beside", "spread", "alike"),
    *("apart", "unsent", "lent", "lend", "sweep", "survey", "surveyed", "beat", "culprit", "story"),
    *(
        "seen",
        "sees",
        "sound",
        "sounds",
        "filled",
        "meet",
        "meeting",
        "examine",
        "probed",
        "further",
    ),
)
PUBLIC = {  # names that users, configs or saved files know
    *("normalizes_apart", "optimizer_apart", "culprit"),
    "spread",  # an argument of a former function
    "tell",  # of Python's files
}


def identifiers(path: Path) -> set[str]:
    """The names that a file makes: of functions, classes, arguments, variables and attributes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def words_of(name: str) -> set[str]:
    """The words of an identifier, in whatever case it is written."""
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def test_identifiers_are_the_words_of_the_field() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in sorted(identifiers(path) - PUBLIC)
        if words_of(name) & set(FORBIDDEN)
    ]
    assert wrong == []


def test_words_of_identifiers(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "class ToldTwice:\n def _say(self, seen_rows):\n  self.beat, _APART = 1, 2\n  read(told)\n"
    )
    found = {word for name in identifiers(tmp_path / "a.py") for word in words_of(name)}
    assert found & set(FORBIDDEN) == {"told", "say", "seen", "beat", "apart"}
