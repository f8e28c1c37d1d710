"""Killed and resumed on other numbers of ranks, a run uses every row exactly once an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hpdist.data.stream.parquet import ParquetReader
from tests.support.fault_table import Fault
from tests.support.parquet_files import index_of
from tests.support.slow_run import BATCH, SlowRun

GROUPS = [[37, 20], [64, 1, 30], [], [50, 43], [55]]
ROWS, EPOCHS = 300, 2
STEPS = EPOCHS * ROWS // BATCH
KILLS = [(2, 6), (3, 12), (1, 17)]  # ranks, and the step after which all of them are killed
LAST = 4


def test_every_row_once_an_epoch_whatever_is_killed(
    tmp_path: Path, inject: Callable[..., Fault]
) -> None:
    assert sum(map(sum, GROUPS)) == ROWS
    run = SlowRun(tmp_path, GROUPS)
    fault = inject("all ranks killed, then other numbers of ranks", len(KILLS))
    for ranks, step in KILLS:
        process = run.fork(ranks, STEPS)
        run.await_step(process, step)
        process.kill()
        assert run.records()[-1]["step"] < STEPS, "the kill came too late to say anything"
    assert run.fork(LAST, STEPS).wait(timeout=300) == 0, run.output

    assert run.output.count("continuing from") == len(KILLS)
    audit = run.audit()
    used = {epoch: Counter[int]() for epoch in range(EPOCHS)}
    for row in audit:
        assert row["valid"]
        used[row["epoch"]][row["id"]] += 1
    for epoch, counts in used.items():
        assert counts == dict.fromkeys(range(ROWS), 1), f"epoch {epoch}"

    reader = ParquetReader(
        index_of(run.files), ["x"], "data", 0, BATCH
    )  # one that nothing disturbed
    for step in range(STEPS):
        wanted = reader.read(step * BATCH, BATCH, 0, BATCH).ids.tolist()
        found = [row["id"] for row in audit if row["attempt"] == step + 1]
        assert sorted(found) == sorted(wanted), f"step {step + 1}"
    reader.close()
    assert [record["step"] for record in run.records()] == list(range(1, STEPS + 1))
    fault.survived(**run.cost(STEPS))
