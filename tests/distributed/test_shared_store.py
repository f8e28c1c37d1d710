"""The store that processes on several machines share: with one another, and with no stranger."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hpdist.distributed import shared_store
from hpdist.distributed.rendezvous import TOKEN, Endpoint, Rendezvous
from hpdist.distributed.shared_store import SharedStore, StoreServer, _where_to_listen
from hpdist.errors import DistributedError
from tests.distributed.test_preflight import ended, start, verdicts
from tests.support.ranks import free_port, run_ranks


@pytest.fixture
def server() -> Iterator[StoreServer]:
    with StoreServer("127.0.0.1", 0, "secret") as served:
        yield served


def client(server: StoreServer, token: str = "secret") -> SharedStore:
    return SharedStore("127.0.0.1", server.port, token)


def test_it_holds_what_any_client_sets(server: StoreServer) -> None:
    one, other = client(server), client(server)
    one.set("key", b"\x00\xff")
    assert other.get("key") == b"\x00\xff"
    assert [one.add("number", 2), other.add("number", 3)] == [2, 5]
    assert other.check(["key", "number"])
    assert not other.check(["key", "nothing"])
    assert one.delete_key("key")
    assert not other.delete_key("key")
    with pytest.raises(TimeoutError, match="nobody has set nothing"):
        one.read(["nothing"], 0.01)
    waiting = threading.Thread(target=lambda: other.get("late"))
    waiting.start()
    one.set("late", "now")  # the other thread's wait keeps nobody from asking
    waiting.join(30)
    assert not waiting.is_alive()


def test_another_token_is_told_from_no_server(server: StoreServer) -> None:
    for token in ("", "secret ", "another"):
        with pytest.raises(PermissionError, match="another token"):
            client(server, token)
    server.close()
    with pytest.raises(ConnectionError):
        client(server)


def test_a_client_is_not_taken_in_by_a_server_without_the_token() -> None:
    """What lies in wait at the address answers with a proof of its own making."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def answer() -> None:
            connection, _ = impostor.accept()
            with connection, connection.makefile("rw") as lines:
                lines.write(json.dumps({"nonce": "0"}) + "\n")
                lines.flush()
                proof = json.loads(lines.readline())["proof"]
                lines.write(json.dumps({"proof": proof}) + "\n")
                lines.flush()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(PermissionError):
            SharedStore("127.0.0.1", impostor.getsockname()[1], "secret")
        thread.join()


class Harm:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_what_a_stranger_sends_harms_nobody(server: StoreServer, tmp_path: Path) -> None:
    known = client(server)
    known.set("key", b"value")
    made = tmp_path / "made"
    sent = [
        b"",
        b"\n",
        pickle.dumps(Harm(made)) + b"\n",
        b"[" * 500_000 + b"\n",
        b"x" * 3_000_000,
        b'{"nonce": null, "proof": null}\n',
        b'{"nonce": "0", "proof": "0"}\n{"do": "set", "keys": ["key"], "value": ""}\n',
        b'{"do": "get", "keys": ["key"], "seconds": 1}\n',
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        os.urandom(4096) + b"\n",
    ]
    for data in sent:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as stranger:
            told = stranger.recv(1000)
            try:
                stranger.sendall(data)
                stranger.shutdown(socket.SHUT_WR)
                while more := stranger.recv(1000):
                    told += more
            except OSError:  # it has hung up
                pass
        assert b"value" not in told.replace(b'"value"', b"")
        assert b"proof" not in told
    assert known.get("key") == b"value"
    assert client(server).get("key") == b"value"
    assert not made.exists()


CROWDED = """
import resource, socket, time
from hpdist.distributed.shared_store import SharedStore, StoreServer
with StoreServer("127.0.0.1", 0, "secret") as server:
    known = SharedStore("127.0.0.1", server.port, "secret")
    most = len(__import__("os").listdir("/proc/self/fd")) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    crowd = []
    try:
        while True:
            crowd.append(socket.create_connection(("127.0.0.1", server.port), timeout=5))
    except OSError:
        pass
    assert len(crowd) > 5
    time.sleep(0.5)
    known.set("key", b"value")
    for stranger in crowd:
        stranger.close()
    time.sleep(1)
    assert SharedStore("127.0.0.1", server.port, "secret").get("key") == b"value"
print("all came")
"""


def test_a_crowd_of_strangers_ends_no_listening() -> None:
    """A process may have so many connections only; the server waits for room."""
    done = subprocess.run(
        [sys.executable, "-c", CROWDED], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "all came\n", done.stderr


def test_a_stranger_who_says_little_by_little_who_it_is_does_not_stay(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_store, "_HANDSHAKE", 1.0)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as stranger:
        stranger.recv(1000)
        began = time.monotonic()
        with suppress(OSError):  # it has hung up
            while time.monotonic() < began + 20:
                stranger.sendall(b" ")
                time.sleep(0.2)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "proof",
    [b'{"proof": "\xc3\xa9"}\n', b'{"proof": "\\ud800"}\n', b"[" * 4000 + b"\n", b"x" * 9000],
)
def test_a_client_says_in_one_sentence_that_somebody_else_listens(proof: bytes) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b'{"nonce": "0"}\n')
            connection.recv(1000)
            connection.sendall(proof)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(OSError, match=r"another token|does not speak as hpdist does"):
            SharedStore("127.0.0.1", listener.getsockname()[1], "secret")


def fill(store: SharedStore) -> None:
    for number in range(200):
        store.set(f"key{number}", bytes(700_000))


def test_a_known_client_cannot_fill_the_memory(server: StoreServer) -> None:
    known = client(server)
    with pytest.raises(ValueError, match="too many for one message"):
        known.set("key", bytes(2 << 20))
    with pytest.raises(OSError, match=r"closed|reset|pipe"):
        fill(known)
    client(server).set("key0", b"")  # room again


def test_it_listens_where_it_is_told(server: StoreServer) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)
    assert _where_to_listen("127.0.0.1", 1) == (socket.AF_INET, ("127.0.0.1", 1))
    assert _where_to_listen("localhost", 1)[1][0] in ("127.0.0.1", "::1")


def test_a_machine_whose_name_is_loopback_is_reached_by_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 29400))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    assert _where_to_listen("n0", 29400) == (socket.AF_INET, ("", 29400))


def exchange(port: int) -> Any:
    endpoint = Endpoint(int(os.environ["RANK"]), 3, "127.0.0.1", port, "secret")
    with Rendezvous.of(endpoint, 60) as peers:
        told = peers.gathered({"rank": endpoint.rank, "text": "ü\n"})
        with peers.process_group(60):
            total = torch.tensor([endpoint.rank + 1.0])
            dist.all_reduce(total)
        again = peers.gathered([endpoint.rank])
    return told, total.item(), again


def test_processes_exchange_json_and_have_a_group_for_a_while() -> None:
    for told, total, again in run_ranks(3, exchange, free_port()):
        assert told == [{"rank": rank, "text": "ü\n"} for rank in range(3)]
        assert total == 6.0
        assert again == [[0], [1], [2]]


def test_a_token_that_differs_is_told_on_both_sides() -> None:
    place = ["--processes", 2, "--address", "127.0.0.1", "--port", free_port(), "--timeout", 8]
    second = start(*place, "--rank", 1, **{TOKEN: "one"})
    first = start(*place, "--rank", 0, **{TOKEN: "another"})
    status, _, err = ended(second)
    assert status == 3
    assert "has another token" in err
    assert f"set {TOKEN} to the same value on every machine" in err
    status, _, err = ended(first)
    assert status == 3
    assert "missing: 1." in err
    assert "another" not in err.replace("another process", "")


def test_without_a_token_the_table_notes_it() -> None:
    place = ["--processes", 2, "--address", "127.0.0.1", "--port", free_port()]
    second = start(*place, "--rank", 1)
    status, out, _ = ended(start(*place, "--rank", 0))
    assert (status, ended(second)[0]) == (0, 0)
    assert verdicts(out)["token"] == "note"


def test_the_first_process_needs_an_address_of_its_own() -> None:
    with pytest.raises(DistributedError, match="one of this machine's own"):
        Rendezvous.of(Endpoint(0, 2, "192.0.2.1", free_port()), 1)
