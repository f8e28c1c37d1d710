"""What is known of images, text, sound and tables stands with the kinds: nothing else names one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from hpdist.data import kinds

PACKAGE = Path(__file__).parents[2] / "hpdist"
ALLOWED = ("data/kinds/", "data/views/", "data/decode/", "models/")
NAMES = {"image", "images", "text", "audio", "sound", "table", "vector", "pair"}
CLASSES = {
    *("ImageViewsConfig", "TextViewsConfig", "AudioViewsConfig", "TableViewsConfig"),
    *("ImageViews", "TextViews", "AudioViews", "TableViews"),
    *("ImageSpec", "TextSpec", "AudioSpec", "VectorSpec", "PairSpec"),
    *("IMAGE", "TEXT", "AUDIO", "TABLE", "PAIR"),
}
OTHER_MEANINGS = {
    "__init__.py": "names for users of the library",
    "aliases.py": "the former name of a function",
    "algorithms/flexmatch.py": "the table of labels in a checkpoint",
    "algorithms/reference.py": "the type of an option",
    "config/section.py": "the type of a setting, and a placeholder",
    "data/samples/digits.py": "a column of the sample data",
    "data/samples/shapes.py": "a column of the sample data",
    "data/samples/tones.py": "a column of the sample data",
    "data/sources/classes.py": "the type of a label",
    "data/sources/local_files.py": "a reader of `datasets`",
    "data/stream/table.py": "rows that are read by position, in a checkpoint",
    "evaluate/export/metadata.py": "pixels are normalised outside of a file too",
    "evaluate/export/onnx_file.py": "rows of any length have a dynamic axis",
    "messages/redaction.py": "an attribute of an exception",
    "plan/memory_plan.py": "what a plan is printed as",
    "plan/stages.py": "an argument of `subprocess`",
    "preflight/child.py": "an argument of `subprocess`",
    "tasks/coco_scores.py": "a list in COCO's format",
    "tasks/multilabel.py": "how several labels of a row are written, and the type of a label",
    "train/row_examples.py": "how a row of a report is shown",
    "tracking/environment.py": "an argument of `subprocess`",
    "tracking/row_examples.py": "how a row of a report is shown",
    "tracking/tracker.py": "an argument of W&B",
}


def named(tree: ast.AST) -> Iterator[str]:
    """The kinds that a module names: in text, as arguments, or by their classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in NAMES:
            yield str(node.value)
        elif isinstance(node, ast.keyword) and node.arg in NAMES:
            yield str(node.arg)
        elif isinstance(node, ast.ImportFrom):
            yield from sorted({alias.name for alias in node.names} & CLASSES)


def test_nothing_but_the_kinds_and_what_they_are_made_of_names_one() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if not module.startswith(ALLOWED):
            names = set(named(ast.parse(path.read_text(encoding="utf-8"))))
            if names:
                found[module] = names
    assert {module: names for module, names in found.items() if module not in OTHER_MEANINGS} == {}
    assert set(found) == set(OTHER_MEANINGS), "an exception that nothing needs any more"


def test_the_rule_can_fail() -> None:
    """What names a kind looks so to the rule above."""
    text = 'from hpdist.data.views import AudioViewsConfig\nif kind == "audio": f(text=True)\n'
    assert sorted(named(ast.parse(text))) == ["AudioViewsConfig", "audio", "text"]


def test_every_kind_is_a_file_of_its_own() -> None:
    files = {path.stem for path in (PACKAGE / "data/kinds").glob("*.py")}
    ours = {kind.name for kind in kinds.kinds() if type(kind).__module__.startswith("hpdist.")}
    assert ours == {"image", "text", "audio", "table", "pair"}
    assert ours <= files
    for kind in kinds.kinds():
        assert type(kind).__module__.rpartition(".")[2] == kind.name
