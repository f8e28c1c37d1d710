"""The unlabelled and the held-out sets of a run: opened, and checked before it trains."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hpdist.config.component import Component
from hpdist.data.config import Data, Duplicates, Loading, Unlabeled
from hpdist.data.decode.spec import InputSpec
from hpdist.data.kinds import kind_named
from hpdist.data.sources import label_privacy
from hpdist.data.sources.duplicates import Report, find_duplicates
from hpdist.data.sources.labeled import LabeledRows, open_test
from hpdist.data.sources.stored_labels import (
    StoredLabels,
    lay_out_labels,
    open_stored_labels,
)
from hpdist.data.sources.unlabeled import DatasetIndex, open_unlabeled, scan_metadata
from hpdist.data.sources.unlabeled_rows import AnyUnlabeled, MixedRows, ParquetRows, SequentialRows
from hpdist.data.stream.index import are_records
from hpdist.distributed.collectives import call_on_all_ranks, run_on_main
from hpdist.errors import DataError
from hpdist.messages.progress import working
from hpdist.tracking.run_folder import PRIVACY, RunFolder
from hpdist.train.first_look import look_at_held_out, look_at_labeled
from hpdist.train.shared_index import share_index

_FILES = "unlabeled_files.json"
_DUPLICATES = "duplicates.json"
_STORED = "pseudo_labels.json"

_log = logging.getLogger("hpdist.data")


def unlabeled_spec(views: Component, spec: InputSpec) -> InputSpec:
    """Return how unlabelled rows are decoded: like others, unless their kind says otherwise."""
    return kind_named(spec.kind).unlabeled_spec(spec, views)


@working("opening data.unlabeled")
def open_unlabeled_set(
    source: Unlabeled,
    spec: InputSpec,
    labeled: LabeledRows,
    folder: RunFolder,
    *,
    loading: Loading,
    seed: int,
    dataset: Any,
    resumed: bool,
) -> AnyUnlabeled:
    """Open the unlabelled set; the main process finds its files for all. Collective.

    Where it is the labelled table's rows without a label, `source` and `dataset` are that table's.
    Raises DataError or ConfigError, the same on every rank.
    """
    found, ids = None, labeled.unlabeled_ids
    if dataset is None and ids is None:

        def scan() -> DatasetIndex:
            recorded = folder.read_json(_FILES, are_records) if resumed else None
            return scan_metadata(source, labeled, spec, loading, recorded)

        found = share_index(scan)
    rows = call_on_all_ranks(
        lambda: open_unlabeled(
            source,
            labeled,
            spec,
            dataset=dataset,
            found=found,
            where="data.unlabeled" if ids is None else "data.labeled",
            loading=loading,
            seed=seed,
            ids=ids,
        )
    )
    if isinstance(rows, SequentialRows) and folder.main:
        _log.warning("%s", rows.warning)
    return rows


def open_stored_set(
    paths: Sequence[str],
    rows: AnyUnlabeled,
    names: Sequence[str],
    folder: RunFolder,
    resumed: bool,
) -> StoredLabels:
    """Join stored labels to the unlabelled rows; one process of each machine does. Collective.

    Raises DataError, the same on every rank, where they do not fit the rows, or are not those that
    the run began with.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        call_on_all_ranks(lambda: lay_out_labels(paths, rows, names))
    else:
        call_on_all_ranks(lambda: None)
    stored = call_on_all_ranks(lambda: open_stored_labels(paths, rows, names))
    recorded = run_on_main(lambda: folder.read_json(_STORED, _is_content) if resumed else None)
    if recorded is not None and recorded["content"] != stored.content:
        raise DataError(
            f"data.unlabeled.pseudo_labels: {', '.join(paths)} do not hold what the run began "
            "with; restore them, or start a new run"
        )
    if folder.main:
        _log.info("%d unlabelled rows have a stored label", stored.count)
        if stored.privacy:
            _log.info("%s", label_privacy.describe(label_privacy.add_up(stored.privacy)))
    return stored


def _is_content(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("content"), str)


def open_held_out(
    config: Data, spec: InputSpec, labeled: LabeledRows, datasets: Mapping[str, Any]
) -> dict[str, LabeledRows | None]:
    """Open the sets for evaluation, by name; None for one that is not configured.

    `datasets` are those that Python code gave, by the same names. Collective; raises DataError or
    ConfigError, the same on every rank.
    """
    return call_on_all_ranks(
        lambda: {
            name: _open_held_out(config, spec, labeled, name, dataset)
            for name, dataset in datasets.items()
        }
    )


def _open_held_out(
    config: Data, spec: InputSpec, labeled: LabeledRows, name: str, dataset: Any
) -> LabeledRows | None:
    source = getattr(config, name)
    if source is None:
        return None
    loading, where = config.loading, f"data.{name}"
    with working(f"opening {where}"):
        return open_test(source, labeled, spec, dataset=dataset, where=where, loading=loading)


@working("looking for rows that cannot be read")
def look_through(
    labeled: LabeledRows, held_out: Mapping[str, LabeledRows | None], spec: InputSpec
) -> tuple[list[str], dict[str, set[int]]]:
    """Decode labelled and held-out rows before the training. Collective.

    Returns messages, and the ids of the held-out rows in them, by set.
    """
    lines = [look_at_labeled(labeled, spec)]
    named: dict[str, set[int]] = {}
    for rows in held_out.values():
        if rows is not None:
            line, ids = look_at_held_out(rows, spec)
            lines.append(line)
            named[rows.name] = ids
    return [line for line in lines if line is not None], named


def find_repeated(
    config: Duplicates,
    labeled: LabeledRows,
    unlabeled: AnyUnlabeled | None,
    held_out: Mapping[str, LabeledRows | None],
    folder: RunFolder,
    *,
    resumed: bool,
) -> Report:
    """Find held-out rows that are also training rows; a continued run has already done so.

    For the main process only, which informs the others.
    """
    kept = folder.read_json(_DUPLICATES, Report.fits) if resumed else None
    if kept is not None and kept["check"] == config.check:
        return Report(**kept)
    held = {name: rows for name, rows in held_out.items() if rows is not None}
    pools = {"labeled": labeled, "unlabeled": unlabeled}
    used = {name: rows for name, rows in pools.items() if rows is not None}
    return find_duplicates(config, held, used)


def record_other_sets(
    folder: RunFolder,
    duplicates: Report,
    unlabeled: AnyUnlabeled | None,
    stored: StoredLabels | None = None,
) -> None:
    """Record what was found, so that a continued run finds the same."""
    folder.write_json(_DUPLICATES, duplicates.to_json())
    parts = unlabeled.parts if isinstance(unlabeled, MixedRows) else [unlabeled]
    if any(isinstance(part, ParquetRows) for part in parts):
        files = [p.index.record() if isinstance(p, ParquetRows) else None for p in parts]
        folder.write_json(_FILES, files)
    if stored is not None:
        folder.write_json(_STORED, {"content": stored.content})
        if stored.privacy:
            folder.write_json(PRIVACY, label_privacy.add_up(stored.privacy))
