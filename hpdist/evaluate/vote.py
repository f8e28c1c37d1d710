"""Private votes: labels that teachers agree on by a noisy majority (PATE with GNMax).

    vote(["labels/hospital-1", …], Path("labels/voted"), epsilon=2.0, delta=1e-5, rows=1000)

Each teacher has learnt from rows that no other teacher saw, and has labelled the same public rows.
`gnmax` says what is released and what that costs by a bound that may be published;
`vote_dependent` computes the smaller one that depends on the votes and may not.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from hpdist.data.sources.label_files import METADATA, PRIVACY, RECORD
from hpdist.errors import CheckpointError, ConfigError, DataError, one_line, why_not_written
from hpdist.evaluate.gnmax import Answers, Check, answer, cost_of, epsilon_of, sigma_for
from hpdist.evaluate.predict.parts import to_bytes
from hpdist.evaluate.predict.plan import write_whole
from hpdist.evaluate.vote_dependent import dependent_epsilon, require_accounting

_PLACE = ("file", "row_group", "row")


@dataclass(frozen=True)
class Spent:
    """What a vote has cost, for `_predictions.json` and for a person: nothing private."""

    mechanism: str
    """GNMax, or Confident-GNMax where only clear votes are answered."""
    teachers: int
    asked: int
    """Rows whose votes were looked at, at most."""
    answers: int
    """Answers that are paid for; of rows that are checked there may be fewer."""
    sigma: float
    """Standard deviation of the noise on each count."""
    epsilon: float
    delta: float
    threshold: float | None = None
    """Teachers that must agree before a row is answered."""
    threshold_sigma: float | None = None
    """Standard deviation of the noise on the count that is compared with the threshold."""


class Voted(NamedTuple):
    """What a vote has given."""

    spent: Spent
    labels: int
    """Rows that have a label."""
    dependent_epsilon: float | None
    """What it cost by the votes themselves, if that was asked for: private, never to be published.
    """


def vote(
    teachers: Sequence[str],
    out: Path,
    *,
    epsilon: float | None = None,
    sigma: float | None = None,
    delta: float = 1e-5,
    rows: int | None = None,
    answers: int | None = None,
    check: Check | None = None,
    data_dependent: bool = False,
) -> Voted:
    """Write the labels that a noisy majority of teachers gives, and say what they cost.

    Args:
        teachers: Folders of predictions of the same rows, one of each teacher.
        out: The folder to write, in the form that `data.unlabeled.pseudo_labels` takes.
        epsilon: What all answers together may cost; or leave it out and give `sigma`.
        sigma: The noise on each count, in place of `epsilon`.
        delta: The probability with which they may cost more.
        rows: How many rows are asked for, drawn at random; by default all.
        answers: How many rows are answered at most; by default all that are asked for.
        check: Answers only rows whose vote is clear; others get no label.
        data_dependent: Also compute what it cost by the votes, which needs dp-accounting.

    The noise and the draw come from the system's randomness, so another call gives other labels and
    costs as much again. Rows that a teacher has no label for are answered like any other. Raises
    ConfigError or DataError where the teachers do not fit.
    """
    _check_arguments(teachers, epsilon, sigma, delta, check, answers)
    if data_dependent:
        require_accounting()
    if out.exists() and any(out.iterdir()):
        raise DataError(f"--out {out}: the folder is not empty; name another one")
    tables = [_read(folder) for folder in teachers]
    names, counts = _count(teachers, tables)
    generator = np.random.default_rng(secrets.randbits(256))
    asked = generator.permutation(len(counts))[: len(counts) if rows is None else rows]
    most = len(asked) if answers is None else min(answers, len(asked))
    if sigma is None:
        assert epsilon is not None
        sigma = sigma_for(epsilon, delta, most, check, len(asked))
    else:
        epsilon = epsilon_of(cost_of(sigma, most, check, len(asked)), delta)
    found = answer(counts[asked], sigma, generator, most, check)
    dependent = (
        dependent_epsilon(counts[asked], found, sigma, delta, check) if data_dependent else None
    )
    spent = _spent(len(teachers), len(asked), most, sigma, epsilon, delta, check)
    _write(out, _labels(tables[0], asked[found.rows], found, names), names, spent, teachers[0])
    return Voted(spent, len(found.rows), dependent)


def _spent(
    teachers: int,
    asked: int,
    most: int,
    sigma: float,
    epsilon: float,
    delta: float,
    check: Check | None,
) -> Spent:
    if check is None:
        return Spent("GNMax", teachers, asked, most, sigma, epsilon, delta)
    checks = (check.threshold, check.sigma)
    return Spent("Confident-GNMax", teachers, asked, most, sigma, epsilon, delta, *checks)


def _check_arguments(
    teachers: Sequence[str],
    epsilon: float | None,
    sigma: float | None,
    delta: float,
    check: Check | None,
    answers: int | None,
) -> None:
    """Raise ConfigError where an argument can have no meaning."""
    if len(teachers) < 2:
        raise ConfigError("a vote needs the labels of two teachers or more; name their folders")
    if (epsilon is None) == (sigma is None):
        raise ConfigError("a vote needs either --epsilon, what it may cost, or --sigma, its noise")
    if not ((epsilon is None or 0 < epsilon < math.inf) and 0 < delta < 1):
        raise ConfigError(f"--epsilon {epsilon} must be above 0, and --delta within 0 and 1")
    if sigma is not None and not 0 < sigma < math.inf:
        raise ConfigError(f"--sigma {sigma:g} must be above 0")
    if check is not None and not (math.isfinite(check.threshold) and 0 < check.sigma < math.inf):
        raise ConfigError(
            f"--threshold {check.threshold:g} must be a number of teachers, and --threshold-sigma "
            f"{check.sigma:g} above 0"
        )
    if answers is not None and check is None:
        raise ConfigError("--answers goes with --threshold; without one all --rows are answered")


def _labels(first: pa.Table, rows: Any, found: Answers, names: Sequence[str]) -> pa.Table:
    """Give the table of the answered rows, in their order."""
    order = np.argsort(rows)
    kept = first.take(pa.array(rows[order]))
    columns = {name: kept.column(name) for name in ("id", *_PLACE) if name in kept.schema.names}
    labels = [names[number] for number in found.classes[order]]
    return pa.table({**columns, "label": pa.array(labels, pa.string())})


def _read(folder: str) -> pa.Table:
    """Read a teacher's labels, in the order of the ids."""
    files = sorted(Path(folder).glob("*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no Parquet files; name folders that hpdist predict wrote")
    try:
        kept = [name for name in ("id", *_PLACE, "label") if name in pq.read_schema(files[0]).names]
        table = pa.concat_tables([pq.read_table(file, columns=kept) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{folder} cannot be read: {one_line(error)}") from error
    if not {"id", "label"} <= set(kept) or not pa.types.is_string(table.column("label").type):
        raise DataError(f"{folder}: needs the columns id and label, the names of classes")
    return table.sort_by("id")


def _count(teachers: Sequence[str], tables: Sequence[pa.Table]) -> tuple[list[str], Any]:
    """Count the votes, int64 [rows, classes]; raise DataError unless all are of the same rows."""
    ids = tables[0].column("id").to_numpy()
    names: set[str] = set()
    for folder, table in zip(teachers, tables, strict=True):
        if not np.array_equal(table.column("id").to_numpy(), ids):
            raise DataError(f"{folder} labels other rows than {teachers[0]}; predict the same data")
        names |= set(_names_in(folder)) or set(table.column("label").unique().to_pylist()) - {None}
    classes = sorted(names)
    counts = np.zeros((len(ids), len(classes)), np.int64)
    numbers = {name: number for number, name in enumerate(classes)}
    for table in tables:
        found = [numbers.get(label, -1) for label in table.column("label").to_pylist()]
        lines = np.flatnonzero(np.asarray(found) >= 0)
        counts[lines, np.asarray(found)[lines]] += 1
    return classes, counts


def _names_in(folder: str) -> list[str]:
    """Give the classes that a folder's files name, which do not depend on the votes."""
    file = min(Path(folder).glob("*.parquet"))
    written = (pq.read_schema(file).metadata or {}).get(METADATA)
    return list(json.loads(written).get("names", [])) if written else []


def _write(out: Path, table: pa.Table, names: list[str], spent: Spent, teacher: str) -> None:
    first = Path(teacher)
    table = table.replace_schema_metadata({METADATA: json.dumps({"names": names})})
    record: dict[str, Any] = {"privacy": asdict(spent), "names": names}
    if (first / RECORD).is_file():
        of_teacher = json.loads((first / RECORD).read_text(encoding="utf-8"))
        record |= {"parts": 1, "rows": of_teacher["rows"], "files": of_teacher["files"]}
    try:
        out.mkdir(parents=True, exist_ok=True)
        name = RECORD if "parts" in record else PRIVACY
        write_whole(out / name, (json.dumps(record, indent=2) + "\n").encode())
        write_whole(out / "part-00000000.parquet", to_bytes(table))  # last: none without its cost
    except OSError as error:
        raise CheckpointError(
            f"--out {out}: cannot be written: {why_not_written(error, out)}"
        ) from error
