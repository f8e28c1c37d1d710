"""Errors that no further attempt can mend, changed files, and what errors reveal."""

import pickle
import threading
import time

import pytest

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
from tests.support.served_file import CONTENT, NAME, QUICK, SIZE, read

pytestmark = pytest.mark.usefixtures("logged")


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
