"""Models of runs with an input kind and a task of one's own, as the pages of the docs have them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from torch import nn

from hpdist.errors import ConfigError
from hpdist.evaluate.build import built
from hpdist.models import HuggingFaceConfig
from tests.support.documents import files
from tests.support.ranks import run_ranks
from tests.support.signals import write_signals


def of_kind(folder: str) -> tuple[Any, Any]:
    """Train the page's config; the scores of the run, and those of its loaded model."""
    import hpdist
    from hpdist import cli

    os.chdir(folder)
    assert cli.main(["train", "signals.yaml", "--run.name", "own"]) == 0
    summary = json.loads(Path("runs/own/summary.json").read_text())
    return summary, [hpdist.load(place).evaluate() for place in places("own")]


def of_task(folder: str) -> tuple[Any, Any]:
    """Train the page's task; the scores of the run, and those of its loaded model."""
    import datasets

    import hpdist
    from hpdist import Trainer

    os.chdir(folder)
    sys.path.insert(0, folder)
    rows = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
    grades = np.digitize(rows[:, 0], [-0.5, 0.5]) * 2
    table = datasets.Dataset.from_dict({"x": rows.tolist(), "grade": grades.tolist()})
    sets = {name: (table, {"input": "x", "label": "grade"}) for name in ("labeled", "test")}
    trainer = Trainer(
        {"name": "mlp", "hidden": [8]},
        "fixmatch",
        unlabeled=(table, {"input": "x"}),
        task={"name": "python:toy_ordinal:OrdinalConfig", "cutoff": 0.4},
        views={"name": "table"},
        batch={"labeled": 4, "unlabeled": 8},
        schedule={"name": "constant"},
        tracker={"name": "none"},
        run={"name": "own"},
        steps=3,
        **sets,
    )
    summary = trainer.fit()
    found = []
    for place in places("own"):
        predictor = hpdist.load(place)
        assert predictor.task.cutoff == 0.4  # type: ignore[attr-defined]
        assert set(predictor.predict(table.remove_columns("grade"))) <= {"0", "2", "4"}
        found.append(predictor.evaluate((table, {"input": "x", "label": "grade"})))
    return dict(summary), found


def places(name: str) -> list[Path]:
    run = Path("runs") / name
    return [run, max((run / "checkpoints").iterdir())]


@pytest.mark.parametrize(
    ("train", "scores"), [(of_kind, ["accuracy"]), (of_task, ["mean_distance", "accuracy"])]
)
def test_scores_are_those_of_the_run(train: Any, scores: list[str], tmp_path: Path) -> None:
    write_signals(tmp_path / "signals")
    for name in ("series.py", "signals.yaml", "toy_ordinal.py"):
        (tmp_path / name).write_text(files()[name], encoding="utf-8")
    ((summary, found),) = run_ranks(1, train, str(tmp_path))
    for measured in found:
        for name in scores:
            assert measured[name] == pytest.approx(summary[f"test/{name}"], abs=1e-6)


def test_code_of_the_hub_that_a_checkpoint_names_is_not_run():
    section = HuggingFaceConfig(name="hf:somebody/theirs", trust_remote_code=True)
    with pytest.raises(ConfigError, match=r"needs code of the Hub .*load\(path, model=module\)"):
        built(section, cast(Any, None), cast(Any, None), None)
    module = nn.Linear(2, 2)
    assert built(section, cast(Any, None), cast(Any, None), module) is module
