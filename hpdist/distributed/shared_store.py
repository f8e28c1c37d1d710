"""A key-value store for processes on several machines, protected by a token.

with StoreServer("10.0.0.1", 29400, token) as server:            # on the first machine
    store = SharedStore("10.0.0.1", server.port, token)          # on every machine
    store.set("host/0", b"n0")

It listens only on the given address and exchanges JSON, so no received code is ever run. Both sides
prove that they know the token before anything else is sent; the token itself is never sent. Later
messages are not encrypted. `torch.distributed` accepts a `SharedStore` instead of its own store,
which listens everywhere and knows no token.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

_LONGEST = 1 << 20  # bytes of a line
_LONGEST_PROOF = 1 << 12  # bytes of a line before the sender has proven the token
_MOST_BYTES = 64 << 20  # that a server keeps
_MOST_CLIENTS = 20_000
_HANDSHAKE = 10.0  # seconds, for all of it
_PAUSE = 0.1  # seconds, until there may be room for another connection
_PATIENCE = 300.0  # seconds that a read waits for a key by default


class StoreServer:
    """Serves a store on one address, from the construction to `close`.

    Raises OSError if it cannot listen there.
    """

    def __init__(self, address: str, port: int, token: str) -> None:
        self._token = token
        self._values: dict[str, bytes] = {}
        self._bytes = 0
        self._changed = threading.Condition()
        family, where = _where_to_listen(address, port)
        self._socket = socket.socket(family)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(where)
            self._socket.listen(1024)
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        self._closed = False
        self._clients = threading.Semaphore(_MOST_CLIENTS)
        threading.Thread(target=self._accept, name="hpdist-store", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> StoreServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_PAUSE)  # all allowed connections are in use
                continue
            if not self._clients.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(
                target=self._serve, args=(connection,), name="hpdist-store-client", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            # An error in a stranger's message concerns the stranger only.
            with connection, suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                line = _Line(connection)
                if self._is_known(line):
                    while True:
                        line.send(self._answer(line.receive()))
        finally:
            self._clients.release()

    def _is_known(self, line: _Line) -> bool:
        """Prove the token to a client, and have the client prove it."""
        ours = secrets.token_hex(16)
        line.timeout(_HANDSHAKE)
        line.send({"nonce": ours})
        answer = line.receive(_LONGEST_PROOF, time.monotonic() + _HANDSHAKE)
        theirs = str(answer["nonce"])
        if not _is_proof(answer["proof"], _proof(self._token, "client", ours, theirs)):
            line.send({"refused": "another token"})
            return False
        line.send({"proof": _proof(self._token, "server", theirs, ours)})
        line.timeout(None)
        return True

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        keys = [str(key) for key in request.get("keys", [])]
        with self._changed:
            match request["do"]:
                case "set":
                    self._set(keys[0], base64.b64decode(request["value"]))
                case "add":
                    total = int(self._values.get(keys[0], b"0")) + int(request["amount"])
                    self._set(keys[0], str(total).encode())
                    return {"total": total}
                case "check":
                    return {"there": all(key in self._values for key in keys)}
                case "get":
                    seconds = min(float(request["seconds"]), 1e6)
                    found = self._changed.wait_for(
                        lambda: all(key in self._values for key in keys), seconds
                    )
                    if not found:
                        return {"missing": [key for key in keys if key not in self._values]}
                    return {"values": [_text(self._values[key]) for key in keys]}
                case "delete":
                    return {"there": self._drop(keys[0])}
                case other:
                    raise ValueError(f"no such request: {other}")
        return {}

    def _set(self, key: str, value: bytes) -> None:
        size = len(key) + len(value)
        known = self._values.get(key)
        held = self._bytes - (0 if known is None else len(key) + len(known))
        if held + size > _MOST_BYTES:
            raise ValueError("the store is full")
        self._values[key], self._bytes = value, held + size
        self._changed.notify_all()

    def _drop(self, key: str) -> bool:
        value = self._values.pop(key, None)
        if value is not None:
            self._bytes -= len(key) + len(value)
        return value is not None


class SharedStore(dist.Store):  # type: ignore[misc, name-defined]
    """A client of a `StoreServer`; `torch.distributed` calls it from any of its threads.

    Raises OSError if the server is not there, and PermissionError if it has another token.
    """

    def __init__(self, address: str, port: int, token: str, seconds: float = _PATIENCE) -> None:
        super().__init__()
        self._where = (address, port)
        self._token = token
        self._seconds = seconds
        self._lines = threading.local()
        self._line()

    def set(self, key: str, value: bytes | str) -> None:
        """Set a value."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._ask({"do": "set", "keys": [key], "value": _text(data)})

    def get(self, key: str) -> bytes:
        """Read a value, once it is there. Raises OSError if it does not arrive in time."""
        return self.read([key], self._seconds)[0]

    def read(self, keys: Sequence[str], seconds: float) -> list[bytes]:
        """Read several values, once all are there. Raises OSError if one is not there in time."""
        request = {"do": "get", "keys": list(keys), "seconds": seconds}
        found = self._ask(request, seconds)
        if "missing" in found:
            raise TimeoutError(f"nobody has set {found['missing'][0]} within {seconds:g} s")
        return [base64.b64decode(value) for value in found["values"]]

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which begins at 0; return the sum."""
        return int(self._ask({"do": "add", "keys": [key], "amount": amount})["total"])

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of these keys are there."""
        return bool(self._ask({"do": "check", "keys": list(keys)})["there"])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all of these keys are there. Raises OSError if one does not arrive in time."""
        self.read(keys, self._seconds if timeout is None else timeout.total_seconds())

    def delete_key(self, key: str) -> bool:
        """Remove a key; return whether it was there."""
        return bool(self._ask({"do": "delete", "keys": [key]})["there"])

    def _ask(self, request: dict[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        line = self._line()
        line.timeout(seconds + _HANDSHAKE)
        line.send(request)
        return line.receive()

    def _line(self) -> _Line:
        """This thread's connection: a thread that waits for a key must not block the others."""
        found: _Line | None = getattr(self._lines, "line", None)
        if found is None:
            found = self._lines.line = self._connect()
        return found

    def _connect(self) -> _Line:
        line = _Line(socket.create_connection(self._where, timeout=_HANDSHAKE))
        try:
            end = time.monotonic() + _HANDSHAKE
            theirs = str(line.receive(_LONGEST_PROOF, end)["nonce"])
            ours = secrets.token_hex(16)
            line.send({"nonce": ours, "proof": _proof(self._token, "client", theirs, ours)})
            answer = line.receive(_LONGEST_PROOF, end)
        except (KeyError, ValueError, RecursionError) as error:
            raise OSError(f"what listens there does not speak as hpdist does ({error})") from error
        if not _is_proof(answer.get("proof"), _proof(self._token, "server", ours, theirs)):
            raise PermissionError("it has another token")
        return line


def wait_for_listener(address: str, port: int, deadline: float) -> None:
    """Wait until something listens there. Raises OSError at a deadline of the monotonic clock."""
    while True:
        try:
            socket.create_connection((address, port), timeout=2).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _where_to_listen(address: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """The address itself, or all addresses if this machine's name resolves to none of its own.

    Many systems resolve their own name to the loopback address, which no other machine reaches.
    """
    family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    named = not address.replace(".", "").isdigit() and ":" not in address
    if named and address != "localhost" and ipaddress.ip_address(where[0]).is_loopback:
        return socket.AF_INET, ("", port)
    return family, where


class _Line:
    """Sends and receives JSON objects, a line each."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._received = b""

    def timeout(self, seconds: float | None) -> None:
        """Set how long to wait for the next message."""
        self._connection.settimeout(seconds)

    def send(self, values: dict[str, Any]) -> None:
        """Send an object. Raises OSError, and ValueError if it is too long."""
        data = json.dumps(values).encode() + b"\n"
        if len(data) > _LONGEST:
            raise ValueError(f"{len(data):,} bytes are too many for one message")
        self._connection.sendall(data)

    def receive(self, longest: int = _LONGEST, end: float = float("inf")) -> dict[str, Any]:
        """Receive an object of limited size, until a time of the monotonic clock.

        Raises OSError if the other side leaves or is late, and ValueError if it is not JSON.
        """
        while b"\n" not in self._received:
            if len(self._received) > longest:
                raise ValueError("a line without an end")
            if end != float("inf"):  # each piece may arrive in time, but not the whole
                left = end - time.monotonic()
                if left <= 0:
                    raise TimeoutError("it takes too long to say who it is")
                self._connection.settimeout(left)
            data = self._connection.recv(1 << 16)
            if not data:
                raise ConnectionError("the connection was closed")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        return values


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _is_proof(answer: object, proof: str) -> bool:
    return hmac.compare_digest(str(answer).encode(errors="replace"), proof.encode())


def _proof(token: str, side: str, first: str, second: str) -> str:
    """The proof that this side knows the token, for two numbers that are used once."""
    message = f"hpdist/{side}/{first}/{second}"
    return hmac.new(token.encode(), message.encode(), hashlib.sha256).hexdigest()
