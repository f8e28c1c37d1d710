"""A Parquet stream from servers that fail in every way: waited for, masked, or the one error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from hpdist.data.files.open import Retry, UnreachableError
from hpdist.data.sources.unlabeled_rows import ParquetRows
from hpdist.data.stream.plan import Plan
from hpdist.errors import DataError
from hpdist.train.data import RunData
from tests.support.fault_server import FaultServer
from tests.support.fault_table import Fault, batches_cost, rows_cost
from tests.support.parquet_files import index_of
from tests.support.picture_runs import (
    EPOCH,
    assert_once_an_epoch,
    at_batch,
    audit_of,
    steps_saved,
    train,
    write_config,
)
from tests.support.pictures import (
    GROUPS,
    assert_same,
    assert_same_but_masked,
    opened,
    rows_of,
    stream_of,
    take,
    write_pictures,
)
from tests.support.ranks import run_ranks

QUICK = Retry(deadline=10, first_wait=0.05, max_wait=0.2, stall=0.5)
NAMES = [f"train-{number:05d}.parquet" for number in range(len(GROUPS))]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home))  # of the processes that a test starts


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_pictures(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def local(paths: list[Path]) -> ParquetRows:
    return opened(paths, shuffle_window=1)


@pytest.fixture
def server(paths: list[Path]) -> Iterator[FaultServer]:
    with FaultServer(paths[0].parent) as server:
        yield server


def remote(server: FaultServer, names: list[str] = NAMES, retry: Retry = QUICK) -> ParquetRows:
    rows = opened([server.url(name) for name in names], shuffle_window=1)
    return replace(rows, retry=retry)


def all_faults(server: FaultServer) -> None:
    for name in NAMES:
        server.fail(503, path=name, count=1)
        server.short(path=name, count=1)
        server.reset(path=name, count=1)
        server.fail(429, path=name, count=1)


FAULTS = {
    "none": lambda server: None,
    "503 for a while": lambda server: server.fail(503, for_seconds=1.5),
    "resets": lambda server: server.reset(count=8),
    "silence": lambda server: server.stall(count=3),
    "short bodies": lambda server: server.short(count=8),
    "smaller ranges": lambda server: server.partial(count=8),
    "a trickle": lambda server: server.trickle(1000, count=2),
    "slow": lambda server: server.trickle(60_000),
    "all of them": all_faults,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_rows_are_those_of_an_undisturbed_local_run(
    server: FaultServer, local: ParquetRows, fault: str, inject: Callable[..., Fault]
) -> None:
    stream = stream_of(remote(server))
    injected = inject(f"a server: {fault}") if fault != "none" else None
    FAULTS[fault](server)
    batches = list(islice(stream, EPOCH + 1))
    stream.close()
    expected = take(local, EPOCH + 1)
    assert_same(batches, expected)
    if injected is not None:
        injected.survived(**batches_cost(batches, expected))


def test_an_outage_at_the_start_is_waited_for(server: FaultServer, local: ParquetRows) -> None:
    server.fail(503, for_seconds=1)
    server.short(count=2)
    assert_same(take(remote(server), 3), take(local, 3))


@pytest.mark.slow
def test_two_minutes_of_503_are_survived_as_a_run_is_set_up(
    server: FaultServer, local: ParquetRows, inject: Callable[..., Fault]
) -> None:
    fault = inject("a server: 503 for two minutes")
    stream = stream_of(remote(server, retry=Retry()))
    batches = [next(stream)]
    server.fail(503, for_seconds=120)
    began = time.monotonic()
    batches += islice(stream, 2 * EPOCH - 1)
    stream.close()
    assert 120 <= time.monotonic() - began < 150
    expected = take(local, 2 * EPOCH)
    assert_same(batches, expected)
    fault.survived(**batches_cost(batches, expected))


def test_a_file_that_is_lost_for_good_is_masked_and_named(
    server: FaultServer, local: ParquetRows, inject: Callable[..., Fault]
) -> None:
    fault = inject("a server: a file is gone for good")
    stream = stream_of(remote(server))
    batches = list(islice(stream, 2))
    server.lose(NAMES[2])
    batches += islice(stream, 3 * EPOCH - 2)
    stream.close()
    expected = take(local, 3 * EPOCH)
    assert set(assert_same_but_masked(batches[:EPOCH], expected[:EPOCH])) <= rows_of(2)
    masked = assert_same_but_masked(batches[EPOCH:], expected[EPOCH:])
    assert sorted(masked) == sorted([*rows_of(2)] * 2)
    bad = next(bad for batch in batches for bad in batch.bad)
    assert str(bad).startswith(f"{server.url(NAMES[2])}, row group ")
    assert str(bad).endswith("HTTP 404")
    fault.survived(**batches_cost(batches, expected))


def test_a_file_that_another_replaces_is_refused_by_name(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    with FaultServer(tmp_path) as server:
        stream = stream_of(remote(server))
        next(stream)
        (other,) = write_pictures(tmp_path / "other", [[40, 10, 15]])
        server.replace(NAMES[2], other.read_bytes())
        with pytest.raises(DataError, match=rf"{server.url(NAMES[2])}: the file changed, from "):
            list(islice(stream, 2 * EPOCH))
        stream.close()


def test_past_the_patience_the_error_is_clear_and_the_stream_goes_on_later(
    server: FaultServer, local: ParquetRows
) -> None:
    rows = remote(server, retry=Retry(1.0, first_wait=0.05, max_wait=0.2))
    stream = stream_of(rows)
    batches = list(islice(stream, 2))
    server.fail(503)
    with pytest.raises(UnreachableError) as caught:
        batches.extend(islice(stream, EPOCH))
    for part in (server.endpoint, "could not be read for ", "HTTP 503", "start again"):
        assert part in str(caught.value)
    with pytest.raises(UnreachableError):
        next(stream)
    position = stream.state_dict()["position"]
    assert position == 24 * len(batches)
    stream.close()
    server.heal()
    batches += take(rows, EPOCH, position=position)
    assert_same(batches, take(local, len(batches)))


def test_a_silence_longer_than_the_patience_ends_with_it(server: FaultServer) -> None:
    rows = opened([server.url(name) for name in NAMES], patience=1.0, shuffle_window=1)
    stream = stream_of(rows)
    server.stall()
    began = time.monotonic()
    with pytest.raises(UnreachableError):
        list(islice(stream, EPOCH))
    assert time.monotonic() - began < 25  # and not the 30 s that a patient read waits
    stream.close()


def test_each_footer_is_asked_for_once_and_never_again(server: FaultServer) -> None:
    def footers() -> list[int]:
        """How often each file was asked for its last byte."""
        asked = [(seen.path, str(seen.range).partition("-")[2]) for seen in server.seen]
        server.seen.clear()
        return [asked.count((name, str(sizes[name] - 1))) for name in NAMES]

    sizes = {name: (server.folder / name).stat().st_size for name in NAMES}
    urls = [server.url(name) for name in NAMES]
    first = index_of(urls, column="image")
    assert footers() == [1] * len(NAMES)
    assert [server.requests[name] for name in NAMES] == [2] * len(NAMES)
    server.requests.clear()
    assert index_of(urls, column="image").fingerprint == first.fingerprint
    assert footers() == [0] * len(NAMES)
    assert [server.requests[name] for name in NAMES] == [1] * len(NAMES)  # has it changed?
    assert remote(server).index.fingerprint == first.fingerprint
    assert sum(footers()) <= 3  # of the files whose rows are tried
    index_of(urls[::-1], column="image")
    assert footers() == [1] * len(NAMES)  # in another order they are another dataset


HUB = """
import json, os, sys
import datasets
from hpdist.data.config import Loading, Unlabeled
from hpdist.data.kinds import input_spec
from hpdist.data.unlabeled import open_unlabeled
from tests.support.pictures import labeled, take
config = Unlabeled(path="user/name", streaming=True, shuffle_window=1)
spec = input_spec(labeled())
rows = open_unlabeled(config, labeled(), spec, loading=Loading(patience=20))
batches = take(rows, int(sys.argv[1]))
print(json.dumps([[b.ids.tolist(), b.inputs.flatten().tolist()] for b in batches]))
"""


def test_a_dataset_of_the_hub_is_read_through_faults(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "data")
    expected = take(opened(paths, shuffle_window=1), EPOCH)
    with FaultServer(tmp_path, hub="user/name", signature="SECRETSIGNATURE") as hub:
        for path in paths:
            name = f"data/{path.name}"
            hub.fail(503, path=name, count=2)
            hub.short(path=name, count=1)
            hub.reset(path=name, count=1)
        ran = subprocess.run(
            [sys.executable, "-c", HUB, str(EPOCH)],
            env={**os.environ, "HF_ENDPOINT": hub.endpoint},
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    for (ids, pixels), batch in zip(found, expected, strict=True):
        assert ids == batch.ids.tolist()
        assert pixels == batch.inputs.flatten().tolist()


def a_run_that_loses_a_file(config: Path, endpoint: str, name: str) -> list[object]:
    """On every rank: how the run ended, whose trouble it was, what it saved; and how it went on."""
    seen = []
    prefetch = RunData.prefetch

    def told(self: RunData, *given: Any) -> Any:
        seen.append(prefetch(self, *given))
        return seen[-1]

    def switch(order: str, **args: object) -> None:
        if os.environ["RANK"] == "0":
            httpx.post(f"{endpoint}/_fault", json={"name": order, "args": args})

    RunData.prefetch = told  # type: ignore[method-assign]
    with at_batch(0, lambda: switch("fail", status=503, path=name)):
        first = train(config, "run", "--data.loading.patience=2")
    saved = steps_saved(config.parent / "runs/run")
    torch.distributed.barrier()
    switch("heal")
    return [first, any(seen), saved, train(config, "run", "--data.loading.patience=2")]


def test_one_rank_s_trouble_stops_all_after_a_checkpoint(
    tmp_path: Path, inject: Callable[..., Fault]
) -> None:
    fault = inject("a server: down for one rank, which stops a run until it is back")
    groups = [[15]] * 24  # each in a window of its own
    paths = write_pictures(tmp_path / "served", groups)
    rows = opened(paths, shuffle_window=40_000)
    order = rows.reader(0, 24).order()
    assert order["lanes"] > 2
    plan = Plan(rows.index.rows, 0, order["lanes"], order["groups_per_window"])
    window = plan.window_at(0, order["lanes"] - 1, plan.lane_rows(0, order["lanes"] - 1) - 1)
    lost = paths[window.segments[-1].group].name  # the last that the last rank reads in the epoch
    with FaultServer(tmp_path / "served") as server:
        urls = [server.url(path.name) for path in paths]
        config = write_config(tmp_path, urls, 360, shuffle_window=40_000)
        ended = run_ranks(2, a_run_that_loses_a_file, config, server.endpoint, lost)
        asked = [seen.path for seen in server.seen if seen.range == "bytes=0-0"]
    firsts, troubles, saved, again = zip(*ended, strict=True)
    assert [status for status, _ in firsts] == [2, 2]
    assert troubles == (False, True)
    (line,) = [line for _, lines in firsts for line in lines]
    assert line.startswith(f"hpdist: UnreachableError: {server.url(lost)}: could not be read for ")
    assert "HTTP 503" in line
    assert 0 < saved[0][0] < 15  # within the first epoch, which has 15 steps
    assert again == ((0, []), (0, []))
    assert sorted(asked) == sorted([path.name for path in paths] * 2)  # by one rank, at two starts
    assert_once_an_epoch(tmp_path / "runs/run", 360)
    fault.survived(**rows_cost(audit_of(tmp_path / "runs/run"), expected=2 * 360))


INTERRUPTED = """
import sys, threading, time
from hpdist import cli
status = cli.main(["train", sys.argv[1], "--run.name=interrupted"])
names = [thread.name for thread in threading.enumerate() if thread.name.startswith("hpdist")]
print(status, time.monotonic(), *names, flush=True)
"""


@pytest.mark.parametrize("moment", ["start", "middle"])
def test_ctrl_c_ends_a_run_that_waits_for_a_silent_server(
    tmp_path: Path, server: FaultServer, moment: str
) -> None:
    config = write_config(tmp_path, [server.url(name) for name in NAMES])
    config.write_text(config.read_text().replace("steps: 18", "steps: 100000"))
    if moment == "start":
        server.stall(after=0)
    command = [sys.executable, "-c", INTERRUPTED, str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if moment == "middle":
                metrics = tmp_path / "runs/interrupted/metrics.jsonl"
                wait_for(metrics.exists)
                server.stall()
            wait_for(lambda: server.stalled)
            time.sleep(0.5)  # so that it has nothing left to do but wait
            children = psutil.Process(process.pid).children(recursive=True)
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
            process.wait(15)  # the silence itself would be waited for 30 s
            assert process.stdout is not None
            last = process.stdout.read().split()
        finally:
            process.kill()
    # While it is built there is nothing to save.
    assert last[0] == {"start": "130", "middle": "4"}[moment]
    assert float(last[1]) - sent < 2
    assert set(last[2:]) <= {"hpdist-read"}  # sits in the silent socket, and holds up nothing
    assert not psutil.wait_procs(children, 5)[1]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
