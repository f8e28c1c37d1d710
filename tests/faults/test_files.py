"""Reading ranges of files over connections that fail: a real server, real files."""

import io
import logging
import multiprocessing
import pickle
import random
import subprocess
import sys
import threading
import time

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpdist.data.files import retry as retrying
from hpdist.data.files.open import (
    FileChangedError,
    FileLostError,
    FileVersion,
    Retry,
    UnreachableError,
    is_remote,
    open_file,
    read_range,
    redacted,
    stat,
)
from hpdist.errors import DataError, HpdistError
from tests.support.fault_server import FaultServer, blob_id

SIZE = 1_000_000
CONTENT = random.Random(0).randbytes(SIZE)
QUICK = Retry(deadline=4, first_wait=0.05, max_wait=0.2, stall=0.5)
NAME = "a.bin"


@pytest.fixture
def server(tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    with FaultServer(tmp_path) as server:
        yield server


@pytest.fixture(autouse=True)
def _logged(caplog):
    caplog.set_level(logging.INFO)
    retrying._noticed.clear()


def read(server, start=0, end=SIZE, retry=QUICK, **kwargs):
    return read_range(server.url(NAME), start, end, retry, **kwargs)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hpdist.data"]


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


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_final(server, status):
    server.fail(status, path=NAME)
    for call in (lambda: read(server), lambda: stat(server.url(NAME), QUICK)):
        with pytest.raises(FileLostError, match=f"HTTP {status}") as caught:
            call()
        assert caught.value.path == server.url(NAME)
        assert str(status) in caught.value.reason
        assert not isinstance(caught.value, HpdistError)
    assert server.requests[NAME] == 2


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "hf://a/b", "gopher:x"]
)
def test_a_redirect_off_the_web_is_final(server, target, inject):
    fault = inject("a server: a redirect to what is no web address")
    server.fail(302, path=NAME, headers={"Location": target})
    before = time.monotonic()
    for ask in (lambda: stat(server.url(NAME), Retry(60)), lambda: read(server, retry=Retry(60))):
        with pytest.raises(FileLostError, match="redirects to"):
            ask()
    assert time.monotonic() - before < 30  # and not the patience
    assert server.requests[NAME] == 2
    fault.survived()


def test_a_redirect_in_circles_is_final(server):
    server.fail(302, path=NAME, headers={"Location": server.url(NAME)})
    with pytest.raises(FileLostError, match="redirects"):
        stat(server.url(NAME), Retry(60))
    server.heal()
    server.fail(302, path=NAME, headers={"Location": server.url("other.bin")}, count=1)
    (server.folder / "other.bin").write_bytes(b"there")
    assert stat(server.url(NAME), QUICK).size == 5


def test_a_lost_file_does_not_take_others_with_it(server, tmp_path):
    (tmp_path / "b.bin").write_bytes(b"other")
    server.lose(NAME)
    with pytest.raises(FileLostError):
        read(server)
    assert read_range(server.url("b.bin"), 0, 5, QUICK) == b"other"


def test_a_file_that_ends_before_the_range_is_lost(server):
    with pytest.raises(FileLostError, match=f"ends at byte {SIZE}"):
        read(server, SIZE - 10, SIZE + 10)
    with pytest.raises(FileLostError, match=f"ends at byte {SIZE}"):
        read(server, SIZE, SIZE + 10)


def test_a_server_without_ranges_serves_small_files(server):
    server.ignore_ranges()
    assert read(server, 300_000, 300_100) == CONTENT[300_000:300_100]
    assert read(server) == CONTENT
    server.short(count=2)
    assert read(server, 400_000, SIZE) == CONTENT[400_000:]


def test_a_server_without_ranges_is_refused_large_files(server, monkeypatch):
    monkeypatch.setattr("hpdist.data.files.web._WHOLE", SIZE - 1)
    server.ignore_ranges()
    with pytest.raises(DataError, match="serves no byte ranges"):
        read(server, 10, 20)
    assert read(server) == CONTENT  # all of it needs no ranges


def test_another_size_or_tag_is_a_change(server):
    version = stat(server.url(NAME), QUICK)
    assert read(server, 0, 10, expected=version) == CONTENT[:10]
    server.retag('"other"')
    with pytest.raises(FileChangedError) as caught:
        read(server, 0, 10, expected=version)
    assert (caught.value.expected, caught.value.found.tag) == (version, "other")
    server.heal()
    server.replace(NAME, CONTENT + b"more")
    with pytest.raises(FileChangedError) as caught:
        read(server, 0, 10, expected=version)
    assert caught.value.found.size == SIZE + 4
    server.replace(NAME, CONTENT[:100])
    with pytest.raises(FileChangedError):
        read(server, 500, 510, expected=version)


def test_a_weak_tag_or_none_is_no_change(server):
    version = stat(server.url(NAME), QUICK)
    for tag in (f'W/"{version.tag}"', ""):
        server.heal()
        server.retag(tag)
        assert read(server, 0, 10, expected=version) == CONTENT[:10]


class Between(threading.Event):
    """A `stop` that does something in each wait between two attempts."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def wait(self, timeout=None):
        self.act()
        return super().wait(timeout)


def test_a_change_in_the_middle_of_a_read_is_never_mixed_in(server):
    server.short(count=1)
    with pytest.raises(FileChangedError):  # although no version was expected
        read(server, stop=Between(lambda: server.replace(NAME, CONTENT[::-1])))


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


def test_no_secret_of_a_url_is_told(server, caplog):
    server.fail(503, count=1)
    port = server.port
    url = f"http://user:PASSWORD@127.0.0.1:{port}/{NAME}?X-Sig=SECRET"
    assert read_range(url, 0, 10, QUICK) == CONTENT[:10]
    server.fail(403)
    with pytest.raises(FileLostError) as caught:
        read_range(url, 0, 10, QUICK)
    with pytest.raises(FileChangedError) as changed:
        raise FileChangedError(url, FileVersion(1, ""), FileVersion(2, ""))
    told = caplog.text + str(caught.value) + repr(caught.value) + repr(changed.value)
    assert f"http://REDACTED@127.0.0.1:{port}/{NAME}?REDACTED" in told
    assert "HTTP Request" in told  # httpx's own lines are among them
    assert "SECRET" not in told
    assert "PASSWORD" not in told


def test_redacted_paths():
    assert redacted("https://u:p@h.org/a.parquet?t#x") == (
        "https://REDACTED@h.org/a.parquet?REDACTED#REDACTED"
    )
    assert redacted("hf://datasets/u/n@main/x.parquet") == "hf://datasets/u/n@main/x.parquet"
    assert redacted("zip://a.parquet::https://u:p@h/x.zip?t") == (
        "zip://a.parquet::https://REDACTED@h/x.zip?REDACTED"
    )
    assert redacted("/data/what?.parquet") == "/data/what?.parquet"
    assert redacted("s3://bucket/hf_abcdefghijk/x") == "s3://bucket/REDACTED/x"
    assert [is_remote(p) for p in ("/a", "file:///a", "s3://a", "https://a")] == [0, 0, 1, 1]


def test_errors_travel_between_processes():
    for error in (
        FileLostError("https://h/x?t=1", "HTTP 404"),
        FileChangedError("https://h/x?t=1", FileVersion(1, "a"), FileVersion(2, "b")),
        UnreachableError("x"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


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


@pytest.fixture
def table(tmp_path):
    rng = random.Random(1)
    table = pa.table(
        {
            "image": [rng.randbytes(1000) for _ in range(4000)],
            "label": pa.array([row % 10 for row in range(4000)], pa.int32()),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=500, use_dictionary=False)
    return table


def opened(server, name="t.parquet"):
    version = stat(server.url(name), QUICK)
    server.requests.clear()
    return open_file(server.url(name), version, QUICK)


def test_parquet_reads_alike_from_here_and_from_there(server, table):
    with opened(server) as file:
        parquet = pq.ParquetFile(file)
        assert parquet.read() == table
        for group in (7, 0, 3):
            rows = table.slice(group * 500, 500)
            assert parquet.read_row_group(group) == rows
    assert file.closed
    with opened(server) as file:
        assert pq.read_table(file, pre_buffer=True) == table


def test_footer_and_one_column_of_a_row_group_take_two_requests(server, table):
    with opened(server) as file:
        parquet = pq.ParquetFile(file)
        assert server.requests["t.parquet"] == 1
        rows = parquet.read_row_group(2, columns=["image"])
        assert rows == table.select(["image"]).slice(1000, 500)
        assert server.requests["t.parquet"] == 2
        assert parquet.read_row_group(3, columns=["label"]).num_rows == 500
        assert server.requests["t.parquet"] == 3


def test_parquet_survives_every_second_answer_failing(server, table):
    with opened(server) as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            server.fail(503, count=1)
            server.short(count=1)
            server.reset(count=1)
            assert parquet.read_row_group(group) == table.slice(group * 500, 500)


def test_a_remote_file_seeks_and_reads_as_a_local_one(server):
    version = stat(server.url(NAME), QUICK)
    rng = random.Random(2)
    with open_file(server.url(NAME), version, QUICK) as file:
        local = io.BytesIO(CONTENT)
        for _ in range(200):
            size = rng.choice([0, 1, 10, 1000, 70_000, 200_000])
            at = rng.choice([rng.randrange(SIZE), SIZE - 10, SIZE - (64 << 10) - 5, SIZE, SIZE + 9])
            assert file.seek(at) == local.seek(at)
            assert file.read(size) == local.read(size)
            assert file.tell() == local.tell()
        assert file.seek(-100, io.SEEK_END) == SIZE - 100
        assert file.read() == CONTENT[-100:]
        assert file.seek(0) == 0
        buffer = bytearray(50)
        assert file.readinto(buffer) == 50
        assert bytes(buffer) == CONTENT[:50]
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_small_reads_side_by_side_share_a_request(server):
    version = stat(server.url(NAME), QUICK)
    server.requests.clear()
    with open_file(server.url(NAME), version, QUICK) as file:
        assert b"".join(file.read(1000) for _ in range(60)) == CONTENT[:60_000]
        assert server.requests[NAME] == 1
        for last in (8, 1000, 60_000):
            file.seek(-last, io.SEEK_END)
            assert file.read() == CONTENT[-last:]
        assert server.requests[NAME] == 2


def test_an_open_file_that_changes_is_noticed(server):
    version = stat(server.url(NAME), QUICK)
    with open_file(server.url(NAME), version, QUICK) as file:
        assert file.read(10) == CONTENT[:10]
        server.replace(NAME, CONTENT[::-1])
        file.seek(500_000)
        with pytest.raises(FileChangedError):
            file.read(10)
    with open_file(server.url(NAME), version, QUICK) as file, pytest.raises(FileChangedError):
        file.read(10)


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
