"""Private votes: labels that teachers agree on by a noisy majority (PATE with GNMax).

    vote(["labels/hospital-1", …], Path("labels/voted"), epsilon=2.0, delta=1e-5, rows=1000)

Each teacher has learnt from rows that no other teacher saw, and has labelled the same public rows.
Of a row only argmax_c (n_c + N(0, sigma^2)) is released, with n_c the teachers whose label is c.
One private row changes one teacher, so two of the counts by 1 each: by proposition 8 of Papernot et
al. 2018 (arXiv:1802.08908) an answer is (lambda, lambda / sigma^2) Rényi differentially private for
every lambda. k answers are (lambda, k lambda / sigma^2), which is (epsilon, delta) differentially
private with epsilon = k lambda / sigma^2 + log(1 / delta) / (lambda - 1) (theorem 5 there). Over
lambda its least is

    epsilon = k / sigma^2 + 2 sqrt(k log(1 / delta)) / sigma.

This bound does not depend on the votes, so it may be published. The smaller one that does is a
function of private data itself, and is not computed here.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from hpdist.data.sources.label_files import METADATA, RECORD
from hpdist.errors import CheckpointError, ConfigError, DataError, one_line, why_not_written
from hpdist.evaluate.predict.parts import to_bytes
from hpdist.evaluate.predict.plan import write_whole

_PLACE = ("file", "row_group", "row")

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spent:
    """What a vote has cost, for `_predictions.json` and for a person."""

    mechanism: str
    teachers: int
    answers: int
    sigma: float
    """Standard deviation of the noise on each count."""
    epsilon: float
    delta: float


def sigma_for(epsilon: float, delta: float, answers: int) -> float:
    """Give the least noise with which so many answers cost no more than (epsilon, delta)."""
    logarithm = math.log(1 / delta)
    rate = epsilon / (math.sqrt(logarithm + epsilon) + math.sqrt(logarithm))  # sqrt(k) / sigma
    return math.sqrt(answers) / rate


def epsilon_of(sigma: float, delta: float, answers: int) -> float:
    """Give the epsilon that so many answers cost with this noise."""
    rate = math.sqrt(answers) / sigma
    return rate * rate + 2 * rate * math.sqrt(math.log(1 / delta))


def noisy_argmax(counts: npt.NDArray[Any], sigma: float, generator: np.random.Generator) -> Numbers:
    """Give the class with the most votes after noise, int64 [rows], of counts [rows, classes]."""
    found: Numbers = (counts + generator.normal(0.0, sigma, counts.shape)).argmax(axis=1)
    return found


def vote(
    teachers: Sequence[str],
    out: Path,
    *,
    epsilon: float,
    delta: float = 1e-5,
    rows: int | None = None,
) -> Spent:
    """Write the labels that a noisy majority of teachers gives, and say what they cost.

    Args:
        teachers: Folders of predictions of the same rows, one of each teacher.
        out: The folder to write, in the form that `data.unlabeled.pseudo_labels` takes.
        epsilon: What all answers together may cost.
        delta: The probability with which they may cost more.
        rows: How many rows are answered, drawn at random; by default all.

    The noise and the draw come from the system's randomness, so another call gives other labels and
    costs as much again. Rows that a teacher has no label for are answered like any other. Raises
    ConfigError or DataError where the teachers do not fit.
    """
    if len(teachers) < 2:
        raise ConfigError("a vote needs the labels of two teachers or more; name their folders")
    if not (epsilon > 0 and 0 < delta < 1):
        raise ConfigError(f"--epsilon {epsilon:g} must be above 0, and --delta within 0 and 1")
    if out.exists() and any(out.iterdir()):
        raise DataError(f"--out {out}: the folder is not empty; name another one")
    tables = [_read(folder) for folder in teachers]
    names, counts = _count(teachers, tables)
    generator = np.random.default_rng(secrets.randbits(256))
    answers = len(counts) if rows is None else min(rows, len(counts))
    chosen = np.sort(generator.permutation(len(counts))[:answers])
    sigma = sigma_for(epsilon, delta, answers)
    labels = noisy_argmax(counts[chosen], sigma, generator)
    spent = Spent("GNMax", len(teachers), answers, sigma, epsilon, delta)
    first = tables[0].take(pa.array(chosen))
    columns = {name: first.column(name) for name in ("id", *_PLACE) if name in first.schema.names}
    columns["label"] = pa.array([names[number] for number in labels], pa.string())
    _write(out, pa.table(columns), names, spent, Path(teachers[0]))
    return spent


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


def _write(out: Path, table: pa.Table, names: list[str], spent: Spent, first: Path) -> None:
    table = table.replace_schema_metadata({METADATA: json.dumps({"names": names})})
    record: dict[str, Any] = {"privacy": asdict(spent), "names": names}
    if (first / RECORD).is_file():
        of_teacher = json.loads((first / RECORD).read_text(encoding="utf-8"))
        record |= {"parts": 1, "rows": of_teacher["rows"], "files": of_teacher["files"]}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "part-00000000.parquet", to_bytes(table))
        if "parts" in record:
            write_whole(out / RECORD, (json.dumps(record, indent=2) + "\n").encode())
        else:
            write_whole(out / "_privacy.json", (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        raise CheckpointError(
            f"--out {out}: cannot be written: {why_not_written(error, out)}"
        ) from error
