"""Processes that meet at the address of the first one, and say who does not come."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from hpdist.errors import DistributedError

_SLACK = 5.0  # seconds beyond the timeout in which the first process says who came
_GRACE = 5.0  # seconds that it stays so that the others can read that

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """This process among those that meet."""

    rank: int
    size: int
    address: str = "127.0.0.1"
    port: int = 29400

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """What a launcher says: torchrun's or Accelerate's variables, else SLURM's, else alone.

        Raises DistributedError where SLURM has started several tasks and nothing says where the
        first one is.
        """
        if "WORLD_SIZE" in environment and "MASTER_ADDR" in environment:
            address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"]) + 1
            return cls(int(environment["RANK"]), int(environment["WORLD_SIZE"]), address, port)
        tasks = int(environment.get("SLURM_NTASKS", "1"))
        if tasks > 1 and "SLURM_PROCID" in environment:
            if "MAIN_IP" not in environment:
                raise DistributedError(
                    "preflight: SLURM has started several tasks, and MAIN_IP does not say where "
                    "the first one is; set it, or give --address"
                )
            port = int(environment.get("MAIN_PORT", "29399")) + 1
            return cls(int(environment["SLURM_PROCID"]), tasks, environment["MAIN_IP"], port)
        return cls(0, 1)

    @property
    def where(self) -> str:
        """Where all meet."""
        return f"{self.address}:{self.port}"

    @property
    def who(self) -> str:
        """This process, for an error."""
        return f"process {self.rank} of {self.size}, on {socket.gethostname()}"


def meet(place: Place, timeout: float) -> None:
    """Join the others in a process group of gloo.

    The first process decides who has come within `timeout` seconds and tells it to the others, so
    that every one names the same missing ones; it leaves once they know.

    Raises DistributedError, on every process, where some do not come in time or the first one is
    lost. Collective: every process must call.
    """
    if place.size == 1 or dist.is_initialized():
        return
    try:
        store, came = _receive(place, timeout) if place.rank == 0 else _come(place, timeout)
        missing = [rank for rank in range(place.size) if rank not in came]
        if missing:
            hosts = ", ".join(f"{rank} ({host})" for rank, host in came.items())
            raise DistributedError(
                f"preflight: within {timeout:g} s only {len(came)} of {place.size} processes came "
                f"to {place.where}: {hosts}; missing: {', '.join(map(str, missing))}. Look whether "
                "they were started, and whether they reach that address"
            )
        _connect(store, place, timeout)
    except DistributedError as error:
        error.rank = place.rank  # each host's log must say it
        raise


def _receive(place: Place, timeout: float) -> tuple[Any, dict[int, str]]:
    """Be the first process: wait for the others, and tell them who came."""
    deadline = time.monotonic() + timeout
    try:
        store = _open(place, timeout)
    except (OSError, RuntimeError, ValueError) as error:
        advice = "give --address one of this machine's own, and a --port that is free"
        raise _unreached(place, timeout, error, advice) from error
    came = _gather(store, range(place.size), "here", deadline)
    store.set("came", json.dumps(came))
    if len(came) < place.size:  # else the store is needed, and stays, for what follows
        _gather(store, came.keys() - {0}, "knows", time.monotonic() + _GRACE)
    return store, came


def _come(place: Place, timeout: float) -> tuple[Any, dict[int, str]]:
    """Be one of the others: go to the first process, and be told who came."""
    advice = (
        "start preflight on the first machine too, give all the address by which they reach it, "
        "and open the port"
    )
    try:
        _await_listener(place, time.monotonic() + timeout)
        store = _within(timeout, lambda: _open(place, timeout))
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreached(place, timeout, error, advice) from error
    # The first process listens, so its own time has begun and ends before this does.
    patience = timeout + _SLACK
    try:
        return store, _within(patience + 1, lambda: _told(store, place, patience))
    except (OSError, RuntimeError) as error:
        raise DistributedError(
            f"preflight: {place.who}: the first process, at {place.where}, has left or does not "
            f"answer ({_short(error)}); look at what it says, and whether its machine is up"
        ) from error


def _told(store: Any, place: Place, seconds: float) -> dict[int, str]:
    """Who came, as the first process says it."""
    store.wait(["came"], timedelta(seconds=seconds))
    came = json.loads(store.get("came"))
    store.set(f"knows/{place.rank}", "")
    return {int(rank): host for rank, host in came.items()}


def _connect(store: Any, place: Place, timeout: float) -> None:
    """Make the process group of all."""
    group = dist.PrefixStore("preflight", store)  # type: ignore[attr-defined]
    span = timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            "gloo", store=group, rank=place.rank, world_size=place.size, timeout=span
        )
    except RuntimeError as error:
        raise DistributedError(
            f"preflight: all {place.size} processes came to {place.where}, but they cannot connect "
            f"to one another ({_short(error)}); set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to "
            "the network interface that they share, and let them use any port among themselves"
        ) from error


def _open(place: Place, timeout: float) -> Any:
    """The store that all share; it says at once that this process is here."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        place.address,
        place.port,
        None,
        place.rank == 0,
        timedelta(seconds=timeout),
        wait_for_workers=False,
    )
    store.set(f"here/{place.rank}", socket.gethostname())
    return store


def _unreached(place: Place, timeout: float, error: Exception, advice: str) -> DistributedError:
    return DistributedError(
        f"preflight: {place.who}: no connection to {place.where} within {timeout:g} s "
        f"({_short(error)}); {advice}"
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _await_listener(place: Place, deadline: float) -> None:
    """Wait until the first process listens; torch's own client fills the screen instead."""
    while True:
        with socket.socket(_family(place)) as probe:
            probe.settimeout(2)
            error = probe.connect_ex((place.address, place.port))
        if not error:
            return
        if time.monotonic() > deadline:
            raise OSError(error, os.strerror(error))
        time.sleep(0.2)


def _family(place: Place) -> socket.AddressFamily:
    """IPv4 or IPv6, whichever the address is found under; raises OSError where there is none."""
    return socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)[0][0]


def _gather(store: Any, ranks: Any, name: str, deadline: float) -> dict[int, str]:
    """What each of these ranks has set under the name in time, by its rank."""
    found: dict[int, str] = {}
    while True:
        for rank in set(ranks) - found.keys():
            if store.check([f"{name}/{rank}"]):
                found[rank] = store.get(f"{name}/{rank}").decode()
        if len(found) == len(ranks) or time.monotonic() > deadline:
            return dict(sorted(found.items()))
        time.sleep(0.05)


def _within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in a thread that is given up after so long; raises OSError then.

    A store's client waits without end for a machine that has gone without a word, and hears no
    Ctrl-C meanwhile.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            results.append(function())
        except Exception as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise OSError(f"no answer within {seconds:g} s")
    return results[0]
