"""A rank that resumes reads its part of a checkpoint, and has from the others what they read."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpdist.checkpoint.reader import SavedRun
from hpdist.engines.base import Engine
from tests.distributed.test_lora import forget_launch
from tests.support.ranks import run_ranks
from tests.support.small_runs import trainer

CASES: dict[str, dict[str, Any]] = {
    "zero2": {"zero": {"stage": 2}, "precision": "bf16"},
    "zero3": {"zero": {"stage": 3}, "precision": "bf16"},
    "zero1": {"zero": {"stage": 1}},
    "zero0": {"zero": {"stage": 0}, "precision": "bf16"},
    "ddp": {},
}


MODEL = {"name": "mlp", "hidden": [48, 32]}


def resumed(folder: Path, case: str) -> tuple[Counter[str], Counter[str], bool]:
    """Bytes of a kind that this rank reads, those of its part, and whether its weights are so."""
    forget_launch()
    read: Counter[str] = Counter()
    elements = SavedRun._elements

    def counting(saved: SavedRun, file: str, key: str, start: int, stop: int) -> Tensor:
        values = elements(saved, file, key, start, stop)
        read[key.partition("/")[0]] += values.nbytes
        return values

    SavedRun._elements = counting  # type: ignore[method-assign]
    try:
        again = trainer(folder, 3, case, model=MODEL, **CASES[case])
    finally:
        SavedRun._elements = elements  # type: ignore[method-assign]
    engine, teacher = again.step.engine, again.step.teacher
    assert teacher is not None
    kinds = {"master": engine.master_fragments(), "teacher": teacher.fragments}
    kinds |= {f"optimizer.{key}": own for key, own in engine.optimizer_fragments().items()}
    kept = Counter({k: sum(f.values.nbytes for f in own) for k, own in kinds.items()})
    as_masters = _weights_are_the_masters(engine)
    again.close()
    return read, kept, as_masters


def _weights_are_the_masters(engine: Engine) -> bool:
    masters = engine.layout.gather(engine.master_fragments())
    weights = engine.whole_parameters()
    return all(
        torch.equal(weights[name].view(-1), masters[name].to(weights[name].dtype))
        for name in weights
    )


def resumed_all(folder: Path, cases: list[str]) -> list[Any]:
    return [resumed(folder, case) for case in cases]


def check(folder: Path, ranks: int, cases: list[str]) -> None:
    """Every engine goes on from the same checkpoint."""
    trainer(folder, 2, "first", model=MODEL).fit()
    for case in cases:
        shutil.copytree(folder / "first", folder / case)
    for found in run_ranks(ranks, resumed_all, folder, cases):
        for case, (read, kept, as_masters) in zip(cases, found, strict=True):
            assert as_masters, case
            assert {"master", "teacher"} < read.keys() <= kept.keys(), case
            for kind, amount in read.items():
                assert amount <= 1.2 * kept[kind], (case, kind, amount, kept[kind])


def test_a_rank_reads_what_it_keeps(tmp_path: Path) -> None:
    check(tmp_path, 2, ["zero2", "zero3", "ddp"])


@pytest.mark.slow
def test_a_rank_of_four_reads_what_it_keeps_under_every_engine(tmp_path: Path) -> None:
    check(tmp_path, 4, list(CASES))
