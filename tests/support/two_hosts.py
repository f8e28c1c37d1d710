"""Two hosts on one machine: network namespaces joined by a line whose rate can be set."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LINE = "hpline"
"""The name of the network interface of both hosts."""
_ETC = Path("/etc/netns")
MISSING = (
    None
    if os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc") and shutil.which("unshare")
    else "network namespaces need root, iproute2 and util-linux"
)


class TwoHosts:
    """Their names and addresses; `cut` and `mend` are the line between them."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self, names: tuple[str, str]) -> None:
        self.names = names

    def on(self, host: int) -> tuple[str, ...]:
        """What a command begins with to run there, under the host's own name."""
        name = self.names[host]
        rename = ("unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name)
        return ("ip", "netns", "exec", name, *rename)

    def cut(self) -> None:
        """Take the line down."""
        _run("ip", "-n", self.names[1], "link", "set", LINE, "down")

    def mend(self) -> None:
        """Bring it up again."""
        _run("ip", "-n", self.names[1], "link", "set", LINE, "up")

    def sent(self, host: int) -> int:
        """Bytes that a host has put on the line."""
        path = f"/sys/class/net/{LINE}/statistics/tx_bytes"
        done = subprocess.run(
            [*self.on(host), "cat", path], check=True, capture_output=True, text=True
        )
        return int(done.stdout)

    def kill(self) -> None:
        """End every process on them."""
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for process in found.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)

    def limit(self, rate: str) -> None:
        """Let no more than `rate` (tc's notation, such as 100mbit) through, either way."""
        for host in (0, 1):
            words = f"dev {LINE} root tbf rate {rate} burst 256kb latency 400ms".split()
            _run(*self.on(host), "tc", "qdisc", "replace", *words)


@contextmanager
def two_hosts(prefix: str) -> Iterator[TwoHosts]:
    """Make them, and take them away again."""
    hosts = TwoHosts((f"{prefix}0", f"{prefix}1"))
    _remove(hosts)
    try:
        known = zip(["127.0.0.1", *hosts.addresses], ["localhost", *hosts.names], strict=True)
        lines = "".join(f"{address} {name}\n" for address, name in known)
        for name in hosts.names:
            _run("ip", "netns", "add", name)
            own = _ETC / name  # its files take the place of those in /etc
            own.mkdir(parents=True, exist_ok=True)
            (own / "hosts").write_text(lines)
        line = f"{LINE} netns {hosts.names[0]} type veth peer name {LINE} netns {hosts.names[1]}"
        _run("ip", "link", "add", *line.split())
        for name, address in zip(hosts.names, hosts.addresses, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", LINE)
            _run("ip", "-n", name, "link", "set", LINE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        yield hosts
    finally:
        _remove(hosts)


def _remove(hosts: TwoHosts) -> None:
    for name in hosts.names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(_ETC / name, ignore_errors=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
