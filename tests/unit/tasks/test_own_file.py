"""Nothing outside `hpdist/tasks` knows which tasks there are; the docs' task is one file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hpdist.train.config  # noqa: F401  (every task is known from here on)
from hpdist.algorithms import Algorithm, FixMatch, MeanTeacher, Supervised
from hpdist.algorithms.addons.base import build_algorithm
from hpdist.algorithms.addons.logit_adjustment import LogitAdjustment, LogitAdjustmentConfig
from hpdist.algorithms.fixmatch import FixMatchConfig
from hpdist.config.component import components
from hpdist.errors import ConfigError
from hpdist.tasks.base import Task, TaskConfig, able_tasks, task_letters
from hpdist.testing import check_algorithm
from tests.support.documents import files

PACKAGE = Path(__file__).parents[3] / "hpdist"
CONFIGS = components("task")
ALLOWED = {
    "algorithms/__init__.py": "gives users the tasks' classes beside the algorithms",
    "data/samples/synthetic.py": "names a data set that it writes",
    "train/estimators.py": "scikit-learn has a class of its own for each of two tasks",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith("tasks/"):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def named_in(tree: ast.Module) -> list[str]:
    """The tasks that a module names: as a text, in a message, or by importing their module."""
    homes = {config.makes.__module__ for config in CONFIGS.values()}  # type: ignore[attr-defined]
    told = re.compile(rf"task\.name: ({'|'.join(CONFIGS)})\b")
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in CONFIGS or told.search(node.value):
                found.append(node.value)
        elif isinstance(node, ast.ImportFrom) and node.module in homes:
            found.append(str(node.module))
        elif isinstance(node, ast.ImportFrom) and node.module == "hpdist.tasks":
            found += [a.name for a in node.names if f"hpdist.tasks.{a.name}" in homes]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in homes]
    return found


def test_no_module_outside_the_tasks_names_one() -> None:
    found = {name: named for name, tree in modules() if (named := named_in(tree))}
    assert found.keys() == ALLOWED.keys(), found


@pytest.mark.parametrize(
    "text",
    [
        'if task.name == "regression": pass',
        "from hpdist.tasks.multilabel import Multilabel",
        "from hpdist.tasks import regression",
        "import hpdist.tasks.classification",
        'raise ValueError("for numbers set task.name: regression")',
    ],
)
def test_the_rule_can_fail(text: str) -> None:
    assert named_in(ast.parse(text))


def test_there_is_one_file_for_each_task() -> None:
    for name, config in CONFIGS.items():
        task = config.makes  # type: ignore[attr-defined]
        assert task.__module__ == config.__module__ == f"hpdist.tasks.{name}"
        assert task.name == name
        assert task.Config is config


# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy() -> SimpleNamespace:
    """The module of the docs' task, which registers nothing under a name."""
    names: dict[str, Any] = {"__name__": "toy_ordinal"}
    exec(compile(files()["toy_ordinal.py"], "toy_ordinal.py", "exec"), names)
    assert components("task") == CONFIGS
    return SimpleNamespace(**names)


@pytest.mark.parametrize("make", [FixMatchConfig, MeanTeacher, Supervised])
def test_the_docs_task_passes_with_its_own_example_labels(toy: Any, make: Any) -> None:
    check_algorithm(make(), task=toy.Ordinal())


def test_the_docs_task_is_able_of_what_it_says(toy: Any) -> None:
    task, logits = toy.Ordinal(), torch.tensor([[3.0, 2.0, -1.0], [-4.0, 4.0, 4.0], [4.0] * 3])
    assert task.ranks(logits).tolist() == [2, 0, 3]
    mask, labels = task.pseudo_labels(logits, 0.95)
    assert mask.tolist() == [0, 1, 1]
    assert labels["rank"].tolist() == [2, 0, 3]
    assert labels["at_least"].tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    columns = task.prediction_columns(logits, ["low", "fair", "good", "best"])
    assert columns["label"] == ["good", "low", "best"]
    assert columns["at_least"].shape == (3, 3)


# ---------------------------------------------------------------------------------------------


class Unable(Task):
    name = "unable"


class NeedsBoxes(Algorithm):
    needs = frozenset({"boxes"})


def test_what_is_missing_is_said_in_words_with_the_tasks_that_fit() -> None:
    able = ", ".join(name for name in CONFIGS if name != "detection")
    with pytest.raises(ConfigError, match=r"unable, which has no predictions, only for " + able):
        MeanTeacher().set_task(Unable())
    with pytest.raises(ConfigError, match=r"FixMatch .* no pseudo-labels, only for \w+, det\w+"):
        FixMatch().set_task(Unable())
    with pytest.raises(ConfigError, match=r"has no boxes, only for none that is known"):
        NeedsBoxes().set_task(Unable())
    Supervised().set_task(Unable())
    task = CONFIGS["multilabel"](name="multilabel").build()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"LogitAdjustment .*no exclusive classes, only for cl"):
        build_algorithm(FixMatchConfig(), [LogitAdjustmentConfig()], task=task)


def test_a_task_cannot_say_that_it_is_able_of_what_it_does_not_define() -> None:
    with pytest.raises(TypeError, match="Boaster says that it has entropy: define entropy"):
        type("Boaster", (Task,), {"name": "boaster", "abilities": frozenset({"entropy"})})


def test_options_are_of_a_task_that_can_be_measured(toy: Any) -> None:
    with pytest.raises(TypeError, match="Unable must have a headline"):
        type("UnableConfig", (TaskConfig,), {"makes": Unable, "__module__": __name__})
    nothing = type("NothingConfig", (TaskConfig,), {"__module__": __name__})
    with pytest.raises(ValueError, match="NothingConfig must name in `makes` the task"):
        nothing(name="python:nothing:NothingConfig")
    scored = type("Scored", (Task,), {"name": "scored", "headline": "f1"})
    assert scored.display()["summarized"] == ["f1"]  # type: ignore[attr-defined]
    assert toy.Ordinal.Config is toy.OrdinalConfig


class Former(Algorithm):
    tasks = ("classification", "multilabel")  # type: ignore[assignment]


def test_an_algorithm_that_names_tasks_as_before_is_asked_by_that() -> None:
    several, numbers = (
        CONFIGS[name](name=name).build()  # type: ignore[attr-defined]
        for name in ("multilabel", "regression")
    )
    algorithm = Former()
    with pytest.warns(DeprecationWarning, match=r"Former.tasks names tasks; say in `needs`"):
        algorithm.set_task(several)
    assert algorithm.task is several
    with (
        pytest.warns(DeprecationWarning, match="names tasks"),
        pytest.raises(ConfigError, match="Former has no meaning for regression, only for class"),
    ):
        algorithm.set_task(numbers)


class FormerAround(LogitAdjustment):
    addon_tasks = ("classification",)


def test_an_add_on_that_names_tasks_as_before_is_asked_by_that() -> None:
    with (
        pytest.warns(DeprecationWarning, match="names tasks"),
        pytest.raises(ConfigError, match="FormerAround has no meaning for multilabel, only for c"),
    ):
        FormerAround(FixMatch()).set_task(
            CONFIGS["multilabel"](name="multilabel").build()  # type: ignore[attr-defined]
        )


def test_letters_tell_tasks_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_letters() == {
        "classification": "c",
        "detection": "d",
        "multilabel": "m",
        "regression": "r",
    }
    more = dict.fromkeys(("contrastive", "ctc", "classification", "cl"), TaskConfig)
    monkeypatch.setattr("hpdist.tasks.base.components", lambda kind: more)
    assert task_letters() == {
        "contrastive": "co",
        "ctc": "ct",
        "classification": "cla",
        "cl": "cl",
    }


def test_a_new_task_is_at_once_among_those_that_fit(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = CONFIGS | {"ordinal": toy.OrdinalConfig}
    monkeypatch.setattr("hpdist.tasks.base.components", lambda kind: more)
    assert able_tasks(FixMatch.needs) == (
        "classification",
        "detection",
        "multilabel",
        "ordinal",
    )
    assert Supervised().tasks == tuple(more)
    assert able_tasks(Algorithm.needs) == ("classification",)
