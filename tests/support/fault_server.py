"""A real HTTP server over a folder that fails on request, and a small stand-in for the Hub.

    with FaultServer(folder) as server:
        server.fail(503, for_seconds=5)
        read_range(server.url("a.parquet"), 0, 100, Retry())
        assert server.requests["a.parquet"] == 1

In a process of its own, with the same faults switched by POST /_fault {"name": "fail", "args": …}:

    python -m tests.support.fault_server FOLDER --port 0 [--hub user/name]

With `hub="user/name"` the folder is that dataset on the Hub: set HF_ENDPOINT to `server.endpoint`
before huggingface_hub is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from base64 import b64encode
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"  # the one commit of the Hub's dataset
_CHUNK = 16 << 10
_CONTROLS = ("fail", "reset", "stall", "release", "short", "partial", "trickle", "ignore_ranges")
_CONTROLS += ("retag", "unlink", "lose", "heal")


@dataclass
class Fault:
    """What goes wrong, with which file (None: all), how often and until when."""

    kind: str
    path: str | None = None
    count: int | None = None
    until: float = float("inf")
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    rate: float = 0.0  # bytes a second
    after: float = 0.5  # the part of the body that is sent before the fault
    tag: str = ""


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str
    peer: int  # the port of the connection that it came over
    at: float


class FaultServer:
    """Serves a folder on 127.0.0.1 with ranges, ETags and HEAD, and fails as it is told."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        port: int = 0,
        hub: str | None = None,
        token: str | None = None,
        signature: str | None = None,
        login: str | None = None,
        sig: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.hub = hub
        self.token = token  # the Hub answers 401 without it
        self.signature = signature  # the Hub sends the reader to another host, with it in the query
        self.login = login  # user:password, without which plain files are answered by 401
        self.sig = sig  # what their queries must have, or else 403
        self.requests: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.seen: list[Seen] = []
        self.stalled = 0  # answers that have stopped midway
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._httpd = _Server(("127.0.0.1", port), _Handler)
        self._httpd.faults = self
        self.port = self._httpd.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.heal()
        self._httpd.shutdown()
        self._httpd.server_close()

    def wait(self) -> None:
        """Serve until interrupted."""
        while self._thread.is_alive():
            self._thread.join(1)

    def url(self, path: str) -> str:
        return f"{self.endpoint}/{quote(path)}"

    def fail(
        self,
        status: int = 503,
        *,
        for_seconds: float | None = None,
        count: int | None = None,
        path: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer with a status: for some seconds, some requests, or from now on."""
        until = time.monotonic() + for_seconds if for_seconds is not None else float("inf")
        self._add(Fault("fail", path, count, until, status=status, headers=headers or {}))

    def lose(self, path: str) -> None:
        """Answer 404 for one file for good."""
        self.fail(404, path=path)

    def reset(self, *, path: str | None = None, count: int | None = None, after: float = 0.5):
        """Reset the connection in the middle of the body."""
        self._add(Fault("reset", path, count, after=after))

    def stall(self, *, path: str | None = None, count: int | None = None, after: float = 0.5):
        """Send a part of the body, then nothing until `release`."""
        self._released.clear()
        self._add(Fault("stall", path, count, after=after))

    def release(self) -> None:
        """Let what stalls go on."""
        self._released.set()

    def short(self, *, path: str | None = None, count: int | None = None, after: float = 0.5):
        """Close the connection before the promised bytes are sent."""
        self._add(Fault("short", path, count, after=after))

    def partial(self, *, path: str | None = None, count: int | None = None):
        """Answer with a smaller range than was asked for, as a server may."""
        self._add(Fault("partial", path, count))

    def trickle(self, rate: float, *, path: str | None = None, count: int | None = None):
        """Send this many bytes a second."""
        self._add(Fault("trickle", path, count, rate=rate))

    def ignore_ranges(self, *, path: str | None = None, count: int | None = None):
        """Answer 200 with the whole file, whatever range is asked for."""
        self._add(Fault("ignore_ranges", path, count))

    def retag(self, tag: str, *, path: str | None = None):
        """Name another ETag from now on; an empty one: none."""
        self._add(Fault("retag", path, tag=tag))

    def unlink(self, *, path: str | None = None):
        """Let the Hub send a reader to its store without saying what is there."""
        self._add(Fault("unlink", path))

    def replace(self, path: str, content: bytes) -> None:
        """Serve other content from now on."""
        scratch = self.folder / f".{Path(path).name}.new"
        scratch.write_bytes(content)
        scratch.replace(self.folder / path)

    def heal(self) -> None:
        """Take all faults back."""
        with self._lock:
            self._faults.clear()
        self._released.set()

    def _add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def take(self, path: str, *kinds: str) -> Fault | None:
        """Take the first fault of these kinds that applies to a file now."""
        with self._lock:
            for fault in self._faults:
                if fault.kind not in kinds or fault.path not in (None, path):
                    continue
                if fault.count == 0 or time.monotonic() > fault.until:
                    continue
                if fault.count is not None:
                    fault.count -= 1
                return fault
        return None

    def record(self, seen: Seen) -> None:
        with self._lock:
            self.requests[seen.path] += 1
            self.seen.append(seen)

    def sent(self, path: str, size: int) -> None:
        with self._lock:
            self.bytes_sent[path] += size


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    faults: FaultServer

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is part of the tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/_fault":
            order = json.loads(body)
            if order["name"] not in _CONTROLS:
                return self._say(400, {"error": f"no fault {order['name']!r}"})
            getattr(self.server.faults, order["name"])(**order.get("args", {}))
            return self._say(200, {})
        return self._answer(body)

    def _answer(self, body: bytes = b"") -> None:
        faults = self.server.faults
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if path == "_counts":
            counts = {"requests": faults.requests, "bytes_sent": faults.bytes_sent}
            return self._say(200, counts)
        name = self._resolved(path)
        faults.record(
            Seen(
                self.command,
                name,
                self.headers.get("Range"),
                self.headers.get("Authorization"),
                self.headers.get("Host", ""),
                self.client_address[1],
                time.monotonic(),
            )
        )
        if fault := faults.take(name, "fail"):
            return self._say(fault.status, {"error": "fault"}, fault.headers)
        if (status := self._forbidden()) is not None:
            return self._say(status, {"error": "not for you"})
        if faults.hub is not None and not path.startswith("cdn/"):
            return self._hub(path, name, body)
        return self._file(name)

    def _forbidden(self) -> int | None:
        faults = self.server.faults
        if faults.login is not None:
            basic = b64encode(faults.login.encode()).decode()
            if self.headers.get("Authorization") != f"Basic {basic}":
                return 401
        query = parse_qs(urlsplit(self.path).query)
        return 403 if faults.sig is not None and query.get("sig") != [faults.sig] else None

    def _file(self, name: str, headers: dict[str, str] | None = None) -> None:
        faults = self.server.faults
        file = faults.folder / name
        if not file.is_file():
            return self._say(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        fault = faults.take(name, "retag")
        tag = f'"{blob_id(content)}"' if fault is None else fault.tag
        headers = {**({"ETag": tag} if tag else {}), "Accept-Ranges": "bytes", **(headers or {})}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found is None or faults.take(name, "ignore_ranges"):
            return self._send(200, headers, content, name)
        first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return self._say(416, {}, {"Content-Range": f"bytes */{len(content)}"})
        if faults.take(name, "partial"):
            last = (first + last) // 2
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, headers, content[first : last + 1], name)

    def _send(self, status: int, headers: dict[str, str], body: bytes, name: str) -> None:
        faults = self.server.faults
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        fault = faults.take(name, "reset", "stall", "short", "trickle")
        if fault is None:
            return self._write(name, body)
        if fault.kind == "trickle":
            return self._trickle(name, body, fault.rate)
        part = int(len(body) * fault.after)
        self._write(name, body[:part])
        if fault.kind == "stall":
            faults.stalled += 1
            faults._released.wait()
            return self._write(name, body[part:])
        self.close_connection = True
        if fault.kind == "reset":
            time.sleep(0.05)  # what was sent arrives first; a reset throws unread bytes away
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())
        return None

    def _write(self, name: str, body: bytes) -> None:
        for start in range(0, len(body), _CHUNK):
            # Counted first, or a reader that has it all may ask too early.
            self.server.faults.sent(name, min(_CHUNK, len(body) - start))
            self.wfile.write(body[start : start + _CHUNK])

    def _trickle(self, name: str, body: bytes, rate: float) -> None:
        step = max(1, int(rate * 0.05))
        for start in range(0, len(body), step):
            self._write(name, body[start : start + step])
            time.sleep(0.05)

    def _say(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        head = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for key, value in {**head, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # The Hub: what huggingface_hub's file system and `datasets` ask of it.

    def _resolved(self, path: str) -> str:
        """The file in the folder that a path of the Hub or of its store stands for."""
        if self.server.faults.hub is None:
            return path
        found = re.match(rf"(?:cdn|datasets/{self.server.faults.hub}/resolve/[^/]+)/(.+)", path)
        return found[1] if found else path

    def _hub(self, path: str, name: str, body: bytes) -> None:
        faults = self.server.faults
        if faults.token and self.headers.get("Authorization") != f"Bearer {faults.token}":
            error = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return self._say(401, {"error": "Repository not found"}, error)
        if name != path:
            return self._resolve(path, name)
        api = f"api/datasets/{faults.hub}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{SHA}"):
            return self._say(200, self._repo())
        if found := re.fullmatch(rf"{api}/tree/[^/]+(?:/(.+))?", path):
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0]
            return self._tree(found[1] or "", recursive in ("True", "true", "1"))
        if re.fullmatch(rf"{api}/paths-info/[^/]+", path):
            asked = (
                json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            )
            found_files = [file for file in asked if (faults.folder / file).is_file()]
            return self._say(200, [self._entry(faults.folder / file) for file in found_files])
        missing = "RepoNotFound" if not path.startswith(api) else "EntryNotFound"
        return self._say(404, {"error": "not found"}, {"X-Error-Code": missing})

    def _resolve(self, path: str, name: str) -> None:
        faults = self.server.faults
        file = faults.folder / name
        if faults.signature is None or not file.is_file():
            return self._file(name, {"X-Repo-Commit": SHA})
        linked = {
            "X-Repo-Commit": SHA,
            "X-Linked-Size": str(file.stat().st_size),
            "X-Linked-ETag": f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"',
            # another name for this host: another origin, where a token must not go
            "Location": f"http://localhost:{faults.port}/cdn/{quote(name)}?Sig={faults.signature}",
        }
        if faults.take(name, "unlink"):
            del linked["X-Linked-ETag"]
        return self._say(302, {}, linked)

    def _repo(self) -> dict[str, object]:
        hub, folder = self.server.faults.hub, self.server.faults.folder
        files = [file.relative_to(folder).as_posix() for file in _files(folder)]
        return {
            "_id": "1",
            "id": hub,
            "sha": SHA,
            "private": self.server.faults.token is not None,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": file} for file in files],
        }

    def _tree(self, under: str, recursive: bool) -> None:
        folder = self.server.faults.folder
        if not (folder / under).is_dir():
            return self._say(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
        inside = _files(folder / under)
        folders = {parent for file in inside for parent in file.parents} - {folder / under}
        folders = {found for found in folders if found.is_relative_to(folder / under)}
        listed = [self._entry(path) for path in [*inside, *sorted(folders)]]
        depth = under.count("/") + 1 if under else 0
        return self._say(
            200, [entry for entry in listed if recursive or str(entry["path"]).count("/") == depth]
        )

    def _entry(self, path: Path) -> dict[str, object]:
        name = path.relative_to(self.server.faults.folder).as_posix()
        commit = {"id": SHA, "title": "all", "date": "2026-01-01T00:00:00.000Z"}
        if path.is_dir():
            oid = hashlib.sha1(name.encode()).hexdigest()
            return {"type": "directory", "oid": oid, "size": 0, "path": name, "lastCommit": commit}
        content = path.read_bytes()
        entry = {"type": "file", "oid": blob_id(content), "size": len(content), "path": name}
        if self.server.faults.signature is not None:
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return {**entry, "lastCommit": commit}


def blob_id(content: bytes) -> str:
    """The id that git, and so the Hub, gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name[0] != ".")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.fault_server", description=__doc__
    )
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--hub", help="serve the folder as this dataset of the Hub: user/name")
    parser.add_argument("--token", help="what the Hub asks for")
    parser.add_argument("--signature", help="serve the Hub's files from another host, signed so")
    given = parser.parse_args()
    with FaultServer(
        given.folder, port=given.port, hub=given.hub, token=given.token, signature=given.signature
    ) as server:
        print(server.endpoint, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()


if __name__ == "__main__":
    main()
