"""Parquet files that are damaged, cut off, gone, rewritten or odd: masked and named, or refused."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hpdist.data.sources.unlabeled_rows import ParquetRows
from hpdist.errors import DataError
from tests.support.fault_table import Fault, batches_cost, rows_cost
from tests.support.picture_runs import (
    assert_once_an_epoch,
    at_batch,
    audit_of,
    records_of,
    row_of,
    summary_of,
    train,
    write_config,
)
from tests.support.pictures import (
    GROUPS,
    ROWS,
    assert_same_but_masked,
    damage_page,
    opened,
    picture,
    rewrite,
    rows_of,
    stream_of,
    take,
    write_pictures,
)
from tests.support.ranks import run_ranks

EPOCH = ROWS // 24  # batches
SMALL = {"shuffle_window": 1}  # bytes: windows of one row group, one lane


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ParquetRows:
    return opened(write_pictures(tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("body", {"compression": "none", "write_page_checksum": True}),
        ("body", {"compression": "snappy", "write_page_checksum": True}),
        ("body", {"compression": "zstd", "write_page_checksum": True, "data_page_version": "2.0"}),
        ("header", {"compression": "snappy"}),
        ("header", {"compression": "none"}),
    ],
)
def test_a_damaged_page_masks_its_row_group_and_nothing_else(
    tmp_path: Path,
    whole: ParquetRows,
    where: str,
    options: dict[str, object],
    ranks: int,
    inject: Callable[..., Fault],
) -> None:
    paths = write_pictures(tmp_path, **options)
    rows = opened(paths)
    damage_page(paths[2], 1, where)
    fault = inject("a damaged page of a Parquet file")
    found, seen, expected = [], [], []
    for rank in range(ranks):
        batches = take(rows, 2 * EPOCH, rank, ranks)
        undisturbed = take(whole, 2 * EPOCH, rank, ranks)
        found += assert_same_but_masked(batches, undisturbed)
        seen += batches
        expected += undisturbed
        for bad in (bad for batch in batches for bad in batch.bad):
            row = bad.id - min(rows_of(2, 1))
            assert bad.where == f"{paths[2]}, row group 1, row {row}"
            assert bad.reason.startswith("its row group cannot be read: ")
    assert sorted(found) == sorted([*rows_of(2, 1)] * 2)  # once in each of two epochs
    fault.survived(**batches_cost(seen, expected))


def test_a_run_starts_where_any_row_group_is_sound(tmp_path: Path, whole: ParquetRows) -> None:
    paths = write_pictures(tmp_path, write_page_checksum=True)
    sound = [path.read_bytes() for path in paths]
    every = [(file, group) for file, sizes in enumerate(GROUPS) for group in range(len(sizes))]
    for file, group in every:
        damage_page(paths[file], group, "body")
    with pytest.raises(DataError, match="cannot be decoded: its row group cannot be read: "):
        opened(paths)
    damaged = [path.read_bytes() for path in paths]
    for file in range(len(GROUPS)):
        rewrite(paths[file], sound[file])
        batches = take(opened(paths), EPOCH)
        masked = assert_same_but_masked(batches, take(whole, EPOCH))
        assert set(masked) == set(range(ROWS)) - rows_of(file)
        rewrite(paths[file], damaged[file])


BAD_IMAGE = "an image that is damaged or null"


def test_a_damaged_image_in_a_page_that_nothing_checks_is_masked_alone(
    tmp_path: Path, whole: ParquetRows, inject: Callable[..., Fault]
) -> None:
    fault = inject(BAD_IMAGE, 2)
    paths = write_pictures(tmp_path, compression="none", use_dictionary=False)
    rows = opened(paths)
    content = paths[1].read_bytes()
    image = picture(60)
    at = content.index(image) + image.index(b"IDAT") + 4
    rewrite(paths[1], content[:at] + b"\xff\xff\xff" + content[at + 3 :])
    content = paths[3].read_bytes()
    rewrite(paths[3], content.replace(b"150.png", b"1\xff0.png"))
    batches = take(rows, EPOCH)
    assert sorted(assert_same_but_masked(batches, take(whole, EPOCH))) == [60, 150]
    reasons = {bad.id: bad.reason for batch in batches for bad in batch.bad}
    assert reasons[150] == "it holds text that is not UTF-8"
    fault.survived(**batches_cost(batches, take(whole, EPOCH)))


def test_images_that_are_none_and_nulls_are_masked(
    tmp_path: Path, whole: ParquetRows, inject: Callable[..., Fault]
) -> None:
    values = {3: b"no image", 77: None, 130: picture(130)[:60], 215: b""}
    fault = inject(BAD_IMAGE, len(values))
    batches = take(opened(write_pictures(tmp_path, values=values)), EPOCH)
    expected = take(whole, EPOCH)
    masked = assert_same_but_masked(batches, expected)
    assert sorted(masked) == sorted(values)
    reasons = {bad.id: bad.reason for batch in batches for bad in batch.bad}
    assert reasons[3] == "it is not an image that Pillow knows"
    assert reasons[77] == "the value is null"
    fault.survived(**batches_cost(batches, expected))


@pytest.mark.parametrize("fault", ["cut", "gone"])
def test_a_file_that_is_lost_while_the_stream_is_open(
    tmp_path: Path, whole: ParquetRows, fault: str, inject: Callable[..., Fault]
) -> None:
    injected = inject("a data file that is cut off or gone under the stream")
    paths = write_pictures(tmp_path)
    rows = opened(paths, **SMALL)
    whole = opened([file.path for file in whole.index.files], **SMALL)
    stream = stream_of(rows)
    batches = list(islice(stream, 2))
    if fault == "cut":
        os.truncate(paths[2], paths[2].stat().st_size // 2)
        reason = r"the file was cut off: \d+ bytes of \d+|.* cannot be read: File too short: .*"
    else:
        paths[2].unlink()
        reason = "No such file or directory"
    batches += list(islice(stream, 3 * EPOCH - 2))
    stream.close()
    expected = take(whole, 3 * EPOCH)
    assert set(assert_same_but_masked(batches[:EPOCH], expected[:EPOCH])) <= rows_of(2)
    masked = assert_same_but_masked(batches[EPOCH:], expected[EPOCH:])
    assert sorted(masked) == sorted([*rows_of(2)] * 2)
    for bad in (bad for batch in batches for bad in batch.bad):
        assert re.fullmatch(reason, bad.reason)
        assert bad.where.startswith(f"{paths[2]}, row group ")
    injected.survived(**batches_cost(batches, expected))


def test_a_file_that_was_cut_before_the_start_is_refused_by_name(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path)
    for size in (paths[1].stat().st_size - 9, 3, 0):
        os.truncate(paths[1], size)
        with pytest.raises(DataError, match=rf"{paths[1]}: is no Parquet file, or its end is dam"):
            opened(paths)
    paths[1].unlink()
    with pytest.raises(DataError, match=rf"nothing matches '{paths[1]}'"):
        opened(paths)


@pytest.mark.parametrize("groups", [[[20, 10]], [[30, 21, 4]], [[8]]])  # larger, or smaller
def test_a_file_that_is_rewritten_under_the_stream_is_refused_by_name(
    tmp_path: Path, groups: list[list[int]]
) -> None:
    paths = write_pictures(tmp_path)
    rows = opened(paths, **SMALL)
    stream = stream_of(rows)
    next(stream)
    (other,) = write_pictures(tmp_path / "other", groups)
    other.replace(paths[3])
    with pytest.raises(DataError, match=rf"{paths[3]}: the file changed, .* needs the same data"):
        list(islice(stream, 3 * EPOCH))  # this epoch's windows may have been read before
    stream.close()


def test_an_empty_shard_changes_nothing(tmp_path: Path, whole: ParquetRows) -> None:
    paths = write_pictures(tmp_path, [GROUPS[0], [], [0], *GROUPS[1:]])
    batches = take(opened(paths), EPOCH)
    assert {row for batch in batches for row in batch.ids.tolist()} == set(range(ROWS))
    assert all(batch.valid is None for batch in batches)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (pa.schema({"image": pa.string()}), "'image' is string, not struct<bytes: binary, path:"),
        (pa.schema({"picture": pa.binary()}), "'image' is missing"),
    ],
)
def test_a_file_with_another_column_is_refused_by_name(
    tmp_path: Path, schema: pa.Schema, message: str
) -> None:
    paths = write_pictures(tmp_path)
    pq.write_table(pa.table([pa.array(["x", "y"], schema[0].type)], schema=schema), paths[3])
    with pytest.raises(DataError) as caught:
        opened(paths)
    assert f"{paths[3]} has other columns than {paths[0]}: {message}" in str(caught.value)


def test_further_columns_and_nullability_may_differ(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path)
    table = pq.read_table(paths[3]).append_column("more", pa.array(range(40)))
    strict = pa.schema([table.schema[0].with_nullable(False), *list(table.schema)[1:]])
    pq.write_table(table.cast(strict), paths[3])
    assert all(batch.valid is None for batch in take(opened(paths), EPOCH))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda paths: write_pictures(paths[0].parent, [*GROUPS, [4]]), "train-00005.parquet is n"),
        (lambda paths: paths[4].unlink(), r"train-00004.parquet is gone"),
        (
            lambda paths: write_pictures(paths[0].parent, [*GROUPS[:4], [35]]),
            r"train-00004.parquet was rewritten: 36 rows in \d+ bytes, now 35 in \d+; restore it",
        ),
        (
            lambda paths: write_pictures(paths[0].parent, values={0: picture(999)}),
            "train-00000.parquet was rewritten: 50 rows",
        ),
    ],
)
def test_another_set_of_shards_is_refused_on_resuming_by_name(
    tmp_path: Path, change: object, message: str
) -> None:
    paths = write_pictures(tmp_path)
    before = opened(paths)
    stream = stream_of(before)
    next(stream)
    state = stream.state_dict()
    stream.close()
    change(paths)  # type: ignore[operator]
    after = opened(sorted(tmp_path.glob("*.parquet")))
    stream = stream_of(replace(after, recorded=before.index.record()))
    with pytest.raises(DataError, match=f"the data is not that of the saved run: {message}"):
        stream.load_state_dict(state)
    stream.close()


def test_shards_of_one_name_in_several_folders_are_told_apart(tmp_path: Path) -> None:
    paths = [write_pictures(tmp_path / name, [[size]])[0] for name, size in [("a", 9), ("b", 8)]]
    before = opened(paths)
    write_pictures(tmp_path / "b", [[7]])
    assert opened(paths).index.changes(before.index.record()).startswith(f"{paths[1]} was rewritte")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("size", [1, 5])
def test_a_dataset_smaller_than_a_batch_comes_whole_in_every_epoch(
    tmp_path: Path, size: int, ranks: int
) -> None:
    rows = opened(write_pictures(tmp_path, [[size]]))
    shares = [take(rows, 5, rank, ranks) for rank in range(ranks)]
    epochs: dict[int, list[int]] = {}
    for batch in (batch for share in shares for batch in share):
        assert batch.epochs is not None
        for epoch, row in zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True):
            epochs.setdefault(epoch, []).append(row)
    assert [sorted(epochs[number]) for number in range(120 // size)] == [[*range(size)]] * (
        120 // size
    )


def test_a_dataset_without_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.unlabeled \(parquet.*\): holds no rows"):
        opened(write_pictures(tmp_path, [[], [0]]))


LOST = rows_of(2, 1)


def keep(row: dict[str, dict[str, bytes]]) -> bool:
    return row_of(row["image"]["bytes"]) not in LOST


def runs_on_damaged_data(
    damaged: Path, whole: Path, file: Path
) -> dict[str, tuple[int, list[str]]]:
    """On every rank: what each of these runs ended with."""
    ended = {"few": train(damaged, "masked", "--data.unlabeled.max_bad_rows=4")}
    ended["more"] = train(damaged, "masked", "--data.unlabeled.max_bad_rows=10")
    module = "python:tests.faults.test_damaged_data:keep"
    ended["filtered"] = train(whole, "filtered", f"--data.unlabeled.filter={module}")
    content, time = file.read_bytes(), file.stat().st_mtime_ns
    main = os.environ.get("RANK", "0") == "0"

    with at_batch(2, lambda: file.write_bytes(content) if main else None):
        ended["rewritten"] = train(whole, "rewritten")
    if main:
        os.utime(file, ns=(time, time))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    ended["restored"] = train(whole, "rewritten")
    return ended


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_masks_counts_and_stops_at_the_limit_on_real_ranks(
    tmp_path: Path, ranks: int, inject: Callable[..., Fault]
) -> None:
    fault = inject("a run stopped by too many bad rows, then allowed more")
    whole = write_config(tmp_path / "whole", write_pictures(tmp_path / "whole"))
    paths = write_pictures(tmp_path / "damaged", write_page_checksum=True)
    damage_page(paths[2], 1, "body")
    damaged = write_config(tmp_path / "damaged", paths)
    changed = tmp_path / "whole/train-00003.parquet"
    if ranks == 1:
        ended = [runs_on_damaged_data(damaged, whole, changed)]
    else:
        ended = run_ranks(ranks, runs_on_damaged_data, damaged, whole, changed)
    statuses = {name: {rank[name][0] for rank in ended} for name in ended[0]}
    assert statuses == {"few": {2}, "more": {0}, "filtered": {0}, "rewritten": {2}, "restored": {0}}

    masked = tmp_path / "damaged/runs/masked"
    (line,) = [line for rank in ended for line in rank["few"][1]]
    assert re.match(
        r"hpdist: DataError: data\.unlabeled\.max_bad_rows: \d+ rows of epoch 0 could not be "
        rf"used, and 4 are allowed; among them: {paths[2]}, row group 1, row \d: "
        "its row group cannot be read: ",
        line,
    )
    assert summary_of(masked)["bad_rows"] == 2 * len(LOST)
    assert_once_an_epoch(masked)
    cost = rows_cost(audit_of(masked), expected=2 * ROWS)
    invalid = [row for row in audit_of(masked) if not row["valid"]]
    assert sorted(row["id"] for row in invalid) == sorted([*LOST] * 2)
    assert all("cannot be read" in row["reason"] for row in invalid)

    filtered = tmp_path / "whole/runs/filtered"
    assert summary_of(filtered)["bad_rows"] == 0
    keys = ("step", "loss", "unsupervised_loss", "mask_rate")
    ours, theirs = records_of(masked, *keys), records_of(filtered, *keys)
    assert len(ours) == 18
    for values, wanted in zip(ours, theirs, strict=True):
        assert values == pytest.approx(wanted, rel=1e-5)

    (line,) = [line for rank in ended for line in rank["rewritten"][1]]
    assert f"{changed}: the file changed, from " in line
    assert_once_an_epoch(tmp_path / "whole/runs/rewritten")
    fault.survived(**cost)


def test_a_shard_that_was_rewritten_between_runs_is_named_at_every_start(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "data")
    config = write_config(tmp_path, paths)
    with at_batch(2, paths[1].unlink):
        assert train(config, "run", "--data.unlabeled.max_bad_rows=0")[0] == 2  # it is lost
    (other,) = write_pictures(tmp_path / "other", [[24, 1]])
    other.replace(paths[1])
    for _ in range(2):
        status, (line,) = train(config, "run")
        assert status == 2
        assert "the data is not that of the saved run: train-00001.parquet was rewritten: " in line
