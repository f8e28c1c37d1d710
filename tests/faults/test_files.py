"""Reading ranges of files over connections that fail: a real server, real files."""

import multiprocessing
import subprocess
import sys
import threading
import time

import httpx
import pytest

from hpdist.data.files.open import (
    FileVersion,
    Retry,
    UnreachableError,
    read_range,
    stat,
)
from hpdist.errors import DataError
from tests.support.fault_server import FaultServer, blob_id
from tests.support.served_file import CONTENT, NAME, QUICK, SIZE, lines, read

pytestmark = pytest.mark.usefixtures("logged")


def test_a_range_of_a_healthy_server_takes_one_request(server, caplog):
    assert read(server, 1000, 250_000) == CONTENT[1000:250_000]
    assert (server.requests[NAME], server.bytes_sent[NAME]) == (1, 249_000)
    assert read(server, 7, 7) == b""
    assert server.requests[NAME] == 1
    assert lines(caplog) == []


def test_requests_share_a_connection(server):
    stat(server.url(NAME), QUICK)
    read(server, 0, 100_000)
    read(server, 5, 10)
    assert len({seen.peer for seen in server.seen}) == 1


def test_stat_names_size_and_tag_in_one_request(server):
    assert stat(server.url(NAME), QUICK) == FileVersion(SIZE, blob_id(CONTENT))
    assert (server.requests[NAME], server.bytes_sent[NAME]) == (1, 1)
    server.retag("")
    assert stat(server.url(NAME), QUICK) == FileVersion(SIZE, "")
    server.ignore_ranges()
    assert stat(server.url(NAME), QUICK).size == SIZE
    server.replace(NAME, b"")
    server.heal()
    assert stat(server.url(NAME), QUICK).size == 0


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_an_overloaded_server_is_asked_again(server, status):
    server.fail(status, count=3)
    assert read(server) == CONTENT
    assert server.requests[NAME] == 4


def test_an_outage_is_waited_for_told_once_and_its_end(server, caplog):
    server.fail(503, for_seconds=1.5)
    assert read(server, 5, 500) == CONTENT[5:500]
    address = server.url(NAME)
    assert lines(caplog)[0] == f"{address}: HTTP 503; trying again for up to 4 s"
    assert lines(caplog)[1].startswith(f"{address}: reads again after ")
    assert len(lines(caplog)) == 2
    assert [record.levelname for record in caplog.records if record.name == "hpdist.data"] == [
        "WARNING",
        "INFO",
    ]


def test_stat_waits_too(server):
    server.fail(503, for_seconds=1)
    assert stat(server.url(NAME), QUICK).size == SIZE


def test_a_server_that_is_not_there_yet_is_waited_for(tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    with FaultServer(tmp_path) as gone:
        port = gone.port
    found = []
    url = f"http://127.0.0.1:{port}/{NAME}"
    reader = threading.Thread(target=lambda: found.append(read_range(url, 0, SIZE, QUICK)))
    reader.start()
    time.sleep(1)
    with FaultServer(tmp_path, port=port) as back:
        reader.join(10)
        assert found == [CONTENT]
        assert back.requests[NAME] == 1


def test_after_the_deadline_the_error_says_what_how_long_why_and_what_to_do(server):
    server.fail(503)
    began = time.monotonic()
    retry = Retry(deadline=2, first_wait=0.05, max_wait=0.2)
    with pytest.raises(UnreachableError) as caught:
        read_range(server.url(NAME) + "?sig=SECRET", 0, 10, retry)
    assert 1.9 < time.monotonic() - began < 60
    message = str(caught.value)
    for part in (server.url(NAME), "2 s", "HTTP 503", "check the network", "resumed"):
        assert part in message
    assert "SECRET" not in message
    assert isinstance(caught.value, DataError)
    with pytest.raises(UnreachableError, match="HTTP 503"):
        stat(server.url(NAME), Retry(deadline=0.5, first_wait=0.05))


def test_the_deadline_starts_anew_when_bytes_come(server):
    # Each attempt brings half of the rest after 0.5 s of silence: 3 s in all, deadline 1.5 s.
    server.stall(count=6)
    retry = Retry(deadline=1.5, first_wait=0.05, max_wait=0.1, stall=0.5)
    began = time.monotonic()
    assert read(server, retry=retry) == CONTENT
    assert time.monotonic() - began > 2.5


def test_retry_after_is_honoured_up_to_the_deadline(server):
    server.fail(429, count=1, headers={"Retry-After": "1"})
    read(server, 0, 10)
    first, second = server.seen
    assert 1 <= second.at - first.at < 60
    server.fail(429, headers={"Retry-After": "3600"})
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="HTTP 429"):
        read(server, 0, 10, Retry(deadline=1, first_wait=0.05))
    assert 0.9 < time.monotonic() - began < 600


def test_the_hub_s_own_rate_limit_header_is_honoured(server):
    server.fail(429, count=1, headers={"RateLimit": '"resolvers";r=0;t=1'})
    read(server, 0, 10)
    assert server.seen[1].at - server.seen[0].at >= 1


@pytest.mark.parametrize("fault", ["reset", "short"])
def test_what_came_before_a_cut_is_kept(server, fault):
    getattr(server, fault)(count=3)
    assert read(server) == CONTENT
    starts = [int(seen.range.removeprefix("bytes=").split("-")[0]) for seen in server.seen]
    assert starts == sorted(set(starts))
    assert len(starts) == 4
    assert server.bytes_sent[NAME] < 1.1 * SIZE


def test_an_answer_with_less_than_was_asked_for_is_continued(server):
    server.partial(count=3)
    assert read(server) == CONTENT
    assert (server.requests[NAME], server.bytes_sent[NAME]) == (4, SIZE)


def test_silence_counts_as_failure(server):
    server.stall(count=1)
    began = time.monotonic()
    assert read(server) == CONTENT
    assert 0.5 < time.monotonic() - began < 60
    assert server.requests[NAME] == 2


def test_silence_before_the_first_byte_too(server):
    server.stall(count=1, after=0)
    assert read(server) == CONTENT


def test_a_trickle_counts_as_failure_and_not_as_progress(server):
    server.trickle(500, count=1)
    assert read(server) == CONTENT
    assert server.requests[NAME] == 2
    server.trickle(500)
    with pytest.raises(UnreachableError, match="too slow"):
        read(server, retry=Retry(deadline=2, first_wait=0.05, max_wait=0.1, stall=0.5))


def test_a_slow_but_steady_transfer_is_left_alone(server):
    server.trickle(40_000)
    assert read(server, 0, 60_000) == CONTENT[:60_000]
    assert server.requests[NAME] == 1


def test_a_server_without_ranges_serves_small_files(server):
    server.ignore_ranges()
    assert read(server, 300_000, 300_100) == CONTENT[300_000:300_100]
    assert read(server) == CONTENT
    server.short(count=2)
    assert read(server, 400_000, SIZE) == CONTENT[400_000:]


@pytest.mark.parametrize("fault", ["stall", "fail"])
def test_stop_ends_a_read_at_once(server, fault):
    getattr(server, fault)(**({"headers": {"Retry-After": "60"}} if fault == "fail" else {}))
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    began = time.monotonic()
    with pytest.raises(InterruptedError):
        read(server, retry=Retry(), stop=stop)
    assert time.monotonic() - began < 30  # and not the 60 s that the server asks for
    with pytest.raises(InterruptedError):
        stat(server.url(NAME), Retry(), stop)


def test_many_failing_reads_of_a_host_are_told_once(server, caplog):
    server.fail(503, for_seconds=1)
    found = []
    readers = [threading.Thread(target=lambda: found.append(read(server))) for _ in range(16)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == [CONTENT] * 16
    assert sum("trying again" in line for line in lines(caplog)) == 1


def _forked(url, connection):
    connection.send(read_range(url, 10, 20, QUICK))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_process_reads_over_connections_of_its_own(server, method):
    read(server, 0, 10)  # leaves an open connection behind
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=_forked, args=(server.url(NAME), theirs))
    child.start()
    assert ours.poll(20)
    assert ours.recv() == CONTENT[10:20]
    child.join()
    assert server.seen[1].peer != server.seen[0].peer
    assert read(server, 20, 30) == CONTENT[20:30]


def test_the_server_runs_in_a_process_of_its_own(tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    command = [sys.executable, "-m", "tests.support.fault_server", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            endpoint = process.stdout.readline().strip()
            order = b'{"name": "fail", "args": {"status": 503, "count": 2}}'
            assert httpx.post(f"{endpoint}/_fault", content=order).status_code == 200
            assert read_range(f"{endpoint}/{NAME}", 0, 10, QUICK) == CONTENT[:10]
            assert httpx.get(f"{endpoint}/_counts").json()["requests"] == {NAME: 3}
        finally:
            process.terminate()


@pytest.mark.slow
def test_two_minutes_of_503_are_survived_as_it_comes(server, caplog):
    server.fail(503, for_seconds=120)
    began = time.monotonic()
    assert read(server, retry=Retry()) == CONTENT
    assert 120 <= time.monotonic() - began < 150
    assert 2 <= sum("trying again" in line for line in lines(caplog)) <= 5
    assert server.requests[NAME] < 40
