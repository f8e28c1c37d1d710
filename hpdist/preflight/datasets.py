"""The check that every host can read every dataset of a config."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from hpdist.data.config import Data, Source
from hpdist.distributed.rendezvous import Rendezvous
from hpdist.errors import HpdistError
from hpdist.preflight.findings import Finding


def check_data(data: Data, facts: Sequence[Mapping[str, Any]], peers: Rendezvous) -> list[Finding]:
    """Have every host open every dataset and read its first row. Collective."""
    findings = []
    first = {fact["host"]: rank for rank, fact in reversed(list(enumerate(facts)))}
    for name, source in _sources(data):
        start = time.monotonic()
        text = _first_row(source, f"data.{name}") if peers.rank in first.values() else None
        errors = peers.gathered(text)
        seconds = max(peers.gathered(time.monotonic() - start))
        failed = {fact["host"]: e for fact, e in zip(facts, errors, strict=True) if e}
        if failed:
            lines = [f"{host}: {error}" for host, error in failed.items()]
            findings.append(Finding(f"data.{name}", "FAILED", "\n".join(lines)))
        else:
            text = f"{source.path}: its first row in at most {seconds:.1f} s on each host"
            findings.append(Finding(f"data.{name}", "ok", text))
    return findings


def _sources(data: Data) -> list[tuple[str, Source]]:
    """Every dataset that a config names; mixed ones one by one."""
    found: list[tuple[str, Source]] = []
    for name in ("labeled", "unlabeled", "test", "validation"):
        source = getattr(data, name)
        mix = getattr(source, "mix", None) or ()
        found += [(f"{name}.mix.{number}", part) for number, part in enumerate(mix)]
        if isinstance(source, Source) and source.path:
            found.append((name, source))
    return found


def _first_row(source: Source, where: str) -> str | None:
    """Why the first row cannot be read; None if it can."""
    from hpdist.data.sources.loading import parquet_files

    try:
        files = parquet_files(source, where)
        found = _in_parquet(files.splits, source, where) if files else _in_stream(source, where)
    except HpdistError as error:
        return str(error)
    except Exception as error:  # datasets and Arrow may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None if found else "it has no rows"


def _in_parquet(files: Mapping[str, Sequence[str]], source: Source, where: str) -> bool:
    """Whether the files of the source's split hold a row.

    `datasets` would continue reading in Arrow's threads after the row, which can abort the
    process if it ends before they do.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    from hpdist.data.files.open import Retry, open_file, stat
    from hpdist.data.stream.index_build import split_files

    for path in chain.from_iterable(split_files(files, source.split, where).values()):
        with open_file(path, stat(path, Retry()), Retry()) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            if next(parquet.iter_batches(1, use_threads=False), None) is not None:
                return True
    return False


def _in_stream(source: Source, where: str) -> bool:
    from hpdist.data.sources.loading import load

    if not getattr(source, "streaming", False):  # a table's split may be a slice, a stream's not
        split = source.split.partition("+")[0].partition("[")[0].strip()
        source = source.model_copy(update={"split": split})
    return next(iter(load(source, where, streaming=True)), None) is not None
