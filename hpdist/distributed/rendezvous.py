"""Processes that meet at the address of the first one, and report which are missing.

with Rendezvous.of(Endpoint.from_environment(), timeout=60) as peers:
    hosts = peers.gathered(socket.gethostname())        # JSON, so no received code is run
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from hpdist.distributed.shared_store import SharedStore, StoreServer, wait_for_listener
from hpdist.errors import DistributedError

TOKEN = "HPDIST_PREFLIGHT_TOKEN"
"""The environment variable of a secret that only the processes of one run know."""
_SLACK = 5.0  # seconds beyond the timeout in which the first process reports who came
_GRACE = 5.0  # seconds that it stays so that the others can read that
_LATE = 120.0  # seconds that the others may take for a check

T = TypeVar("T")


@dataclass(frozen=True)
class Endpoint:
    """This process among those that meet, and their address."""

    rank: int
    size: int
    address: str = "127.0.0.1"
    port: int = 29400
    token: str = field(default="", repr=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Endpoint:
        """Read the variables of torchrun, Accelerate or SLURM; without them there is one process.

        Raises DistributedError if SLURM has started several tasks and the address of the first is
        unknown.
        """
        token = environment.get(TOKEN, "")
        if "WORLD_SIZE" in environment and "MASTER_ADDR" in environment:
            address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"]) + 1
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            return cls(rank, size, address, port, token)
        tasks = int(environment.get("SLURM_NTASKS", "1"))
        if tasks > 1 and "SLURM_PROCID" in environment:
            if "MAIN_IP" not in environment:
                raise DistributedError(
                    "preflight: SLURM has started several tasks, and MAIN_IP does not say where "
                    "the first one is; set it, or give --address"
                )
            port = int(environment.get("MAIN_PORT", "29399")) + 1
            rank = int(environment["SLURM_PROCID"])
            return cls(rank, tasks, environment["MAIN_IP"], port, token)
        return cls(0, 1)

    @property
    def where(self) -> str:
        """The address at which all meet."""
        return f"{self.address}:{self.port}"

    @property
    def who(self) -> str:
        """This process, for a message."""
        return f"process {self.rank} of {self.size}, on {socket.gethostname()}"


class Rendezvous:
    """The processes that have met; they can exchange JSON and wait for one another."""

    def __init__(
        self, endpoint: Endpoint, store: SharedStore | None, server: StoreServer | None
    ) -> None:
        self.endpoint = endpoint
        self._store = store
        self._server = server
        self._round = 0

    @classmethod
    def of(cls, endpoint: Endpoint, timeout: float) -> Rendezvous:
        """Meet the others.

        The first process decides who has come within `timeout` seconds and informs the others, so
        that all name the same missing ones; it leaves once they know.

        Raises DistributedError, on every process, if some do not come in time or the first one is
        lost. Collective: every process must call.
        """
        if endpoint.size == 1:
            return cls(endpoint, None, None)
        server = None
        try:
            if endpoint.rank == 0:
                server, store, came = _receive(endpoint, timeout)
            else:
                store, came = _come(endpoint, timeout)
            missing = [rank for rank in range(endpoint.size) if rank not in came]
            if missing:
                hosts = ", ".join(f"{rank} ({host})" for rank, host in came.items())
                raise DistributedError(
                    f"preflight: within {timeout:g} s only {len(came)} of {endpoint.size} "
                    f"processes came to {endpoint.where}: {hosts}; missing: "
                    f"{', '.join(map(str, missing))}. Check whether they were started, and whether "
                    "they can reach that address"
                )
        except DistributedError as error:
            if server is not None:
                server.close()
            error.rank = endpoint.rank  # each host's log must have it
            raise
        return cls(endpoint, store, server)

    @property
    def size(self) -> int:
        """The number of processes that met."""
        return self.endpoint.size

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self.endpoint.rank

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in rank order, after a round trip through JSON.

        Raises DistributedError if a process is lost. Collective: every process must call.
        """
        if self._store is None:
            return [value]
        self._round += 1
        keys = [f"gathered/{self._round}/{rank}" for rank in range(self.size)]
        try:
            self._store.set(keys[self.rank], json.dumps(value))
            return [json.loads(received) for received in self._store.read(keys, _LATE)]
        except OSError as error:
            raise self._lost(error) from error

    @contextmanager
    def process_group(self, timeout: float) -> Iterator[None]:
        """Provide a gloo process group for a while; torch's own groups have no token.

        Raises DistributedError if the processes cannot connect to one another, or one is lost.
        Collective: every process must call.
        """
        if self._store is None:
            yield
            return
        span = timedelta(seconds=timeout)
        try:
            dist.init_process_group(
                "gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=span
            )
        except (OSError, RuntimeError) as error:
            raise DistributedError(
                f"preflight: all {self.size} processes came to {self.endpoint.where}, but they "
                f"cannot connect to one another ({_short(error)}); set GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME to the network interface that they share, and let them use any "
                "port among themselves"
            ) from error
        try:
            yield
        except RuntimeError as error:  # raised by collectives
            raise self._lost(error) from error
        self.gathered(None)  # no process leaves while another one measures
        dist.destroy_process_group()

    def close(self) -> None:
        """Leave; the first process stays until the others have what they need."""
        if self._store is None:
            return
        with suppress(OSError):  # a lost process has already been reported
            if self._server is None:
                self._store.set(f"leaves/{self.rank}", b"")
                return
            self._store.read([f"leaves/{rank}" for rank in range(1, self.size)], _GRACE)
        if self._server is not None:
            self._server.close()

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _lost(self, error: Exception) -> DistributedError:
        lost = DistributedError(
            f"preflight: {self.endpoint.who}: lost another process during the checks "
            f"({_short(error)}); look at the others' output, and whether their machines are up"
        )
        lost.rank = self.rank
        return lost


def _receive(endpoint: Endpoint, timeout: float) -> tuple[StoreServer, SharedStore, dict[int, str]]:
    """Be the first process: wait for the others, and tell them who came."""
    deadline = time.monotonic() + timeout
    try:
        server = StoreServer(endpoint.address, endpoint.port, endpoint.token)
    except OSError as error:
        advice = "give --address one of this machine's own addresses, and --port a free port"
        raise _unreached(endpoint, timeout, error, advice) from error
    store = _open(endpoint)
    came = _gather(store, range(endpoint.size), "here", deadline)
    store.set("came", json.dumps(came))
    if len(came) < endpoint.size:  # otherwise the store stays, for what follows
        _gather(store, came.keys() - {0}, "knows", time.monotonic() + _GRACE)
    return server, store, came


def _come(endpoint: Endpoint, timeout: float) -> tuple[SharedStore, dict[int, str]]:
    """Be one of the others: connect to the first process, and learn who came."""
    advice = (
        "start preflight on the first machine too, give all machines its address, and open the port"
    )
    try:
        wait_for_listener(endpoint.address, endpoint.port, time.monotonic() + timeout)
        store = _open(endpoint)
    except PermissionError as error:
        advice = f"set {TOKEN} to the same value on every machine"
        raise _unreached(endpoint, timeout, error, advice) from error
    except OSError as error:
        raise _unreached(endpoint, timeout, error, advice) from error
    # The first process is listening, so its timeout began, and ends, before this one's.
    try:
        (received,) = store.read(["came"], timeout + _SLACK)
        store.set(f"knows/{endpoint.rank}", b"")
    except OSError as error:
        raise DistributedError(
            f"preflight: {endpoint.who}: the first process, at {endpoint.where}, has left or does "
            f"not answer ({_short(error)}); look at its output, and whether its machine is up"
        ) from error
    return store, {int(rank): host for rank, host in json.loads(received).items()}


def _open(endpoint: Endpoint) -> SharedStore:
    """The store that all share; it says at once that this process is here."""
    store = SharedStore(endpoint.address, endpoint.port, endpoint.token)
    store.set(f"here/{endpoint.rank}", socket.gethostname())
    return store


def _unreached(
    endpoint: Endpoint, timeout: float, error: Exception, advice: str
) -> DistributedError:
    return DistributedError(
        f"preflight: {endpoint.who}: no connection to {endpoint.where} within {timeout:g} s "
        f"({_short(error)}); {advice}"
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _gather(store: SharedStore, ranks: Any, name: str, deadline: float) -> dict[int, str]:
    """What each of these ranks has set under the name in time, by its rank."""
    found: dict[int, str] = {}
    while True:
        for rank in set(ranks) - found.keys():
            if store.check([f"{name}/{rank}"]):
                found[rank] = store.get(f"{name}/{rank}").decode()
        if len(found) == len(ranks) or time.monotonic() > deadline:
            return dict(sorted(found.items()))
        time.sleep(0.05)
