"""What one process finds out about pictures and labels holds for all, and so does its refusal."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import datasets

from hpdist.errors import HpdistError
from hpdist.train.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.unit.data.decode.test_picture_modes import pictures


def outcomes(folder: str) -> list[Any]:
    """What a rank makes of some sets: the shape of its inputs and what it said, or its error."""
    datasets.disable_progress_bars()
    mixed, grey = pictures(["L", "RGB", "RGB", "L"]), pictures(["L", "L"])
    cases: list[tuple[Any, Any]] = [
        (mixed, mixed),
        (grey, mixed),
        (pictures(["L", "L"], mode="F"), None),
        (mixed, (mixed, {"label": "image"})),
    ]
    found: list[Any] = []
    for number, (labeled, test) in enumerate(cases):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                made = Trainer(
                    {"name": "cnn", "width": 8},
                    "fixmatch",
                    labeled=labeled,
                    unlabeled=labeled,
                    test=test,
                    steps=1,
                    batch={"labeled": 2, "unlabeled": 2},
                    run={"dir": folder, "name": str(number)},
                    tracker={"name": "none"},
                )
            except HpdistError as error:
                found.append(str(error))
                continue
        made.data.close()
        lines = [line for line in said.getvalue().splitlines() if line.startswith("pictures")]
        found.append((made.data.spec.shape, lines))
    return found


def test_all_ranks_decode_alike_and_are_told_the_same(tmp_path: Path) -> None:
    first, second = run_ranks(2, outcomes, str(tmp_path))
    assert [case[0] for case in first[:2]] == [case[0] for case in second[:2]] == [(3, 8, 8)] * 2
    assert [len(case[1]) for case in first[:2]] == [1, 1]  # said once, by one rank
    assert [len(case[1]) for case in second[:2]] == [0, 0]
    assert first[2:] == second[2:]
    assert "is to be decoded in mode 'F'" in first[2]
    assert "labels are classes: integers or strings" in first[3]
