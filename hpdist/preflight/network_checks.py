"""Checks of the connection between the machines: token, network, NCCL, clocks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from hpdist.distributed.rendezvous import TOKEN, Endpoint, Rendezvous
from hpdist.preflight.findings import Finding
from hpdist.preflight.network import Speed, measure, measure_in_process

_MOST_OFFSET = 1.0  # seconds between clocks, beyond which log lines are hard to compare
_NCCL_ADVICE = (
    "NCCL_DEBUG=INFO shows what it tries; set NCCL_SOCKET_IFNAME to the network interface that the "
    "machines share and NCCL_IB_HCA to their InfiniBand adapters (NCCL_IB_DISABLE=1 does without); "
    "driver, CUDA and NCCL must fit, see versions"
)


def note_missing_token(endpoint: Endpoint) -> Finding:
    """Note that the rendezvous has no token."""
    text = (
        f"none: anybody who can reach {endpoint.where} could join; set {TOKEN} to the same secret "
        "on every machine"
    )
    return Finding("token", "note", text)


def check_network(peers: Rendezvous, timeout: float) -> Finding:
    """Latency and bandwidth between the processes' CPUs. Collective."""
    with peers.process_group(timeout):
        speed = measure(None, torch.device("cpu"))
    return Finding("network", "ok", f"all-reduce over gloo: {speed}")


def check_nccl(facts: Sequence[Mapping[str, Any]], peers: Rendezvous, timeout: float) -> Finding:
    """Measure the network between the GPUs through NCCL, within the others' timeout.

    NCCL does not support two processes on one GPU, which is checked first. Collective.
    """
    shared = shared_gpus(facts)
    if shared:
        text = "\n".join([*shared, "NCCL needs a GPU for each process; it was not measured"])
        return Finding("NCCL", "note", text)
    gpu = facts[peers.rank]["gpu"]
    own = measure_in_process("nccl", f"cuda:{gpu}", peers.endpoint, 0.8 * timeout)
    measured: Any = asdict(own) if isinstance(own, Speed) else own
    outcomes = [
        Speed(**each) if isinstance(each, dict) else str(each) for each in peers.gathered(measured)
    ]
    return nccl_finding(outcomes, [fact["host"] for fact in facts])


def shared_gpus(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every GPU that several processes would use."""
    users: dict[tuple[str, str], list[int]] = {}
    for rank, fact in enumerate(facts):
        if not fact["devices"]:
            continue
        gpu = fact["devices"][fact["gpu"]]["uuid"]
        users.setdefault((fact["host"], gpu), []).append(rank)
    return [
        f"processes {', '.join(map(str, ranks))} share GPU {facts[ranks[0]]['gpu']} of {host}"
        for (host, _), ranks in users.items()
        if len(ranks) > 1
    ]


def nccl_finding(outcomes: Sequence[Speed | str], hosts: Sequence[str]) -> Finding:
    """The result of measuring: the slowest, or each process's failure."""
    speeds = [outcome for outcome in outcomes if isinstance(outcome, Speed)]
    if len(speeds) == len(outcomes):
        slowest = max(speeds, key=lambda speed: speed.latency)
        return Finding("NCCL", "ok", f"all-reduce between {len(speeds)} GPUs: {slowest}")
    lines = [
        f"process {rank} on {host}: {outcome}"
        for rank, (host, outcome) in enumerate(zip(hosts, outcomes, strict=True))
        if not isinstance(outcome, Speed)
    ]
    return Finding("NCCL", "FAILED", "\n".join([*lines, _NCCL_ADVICE]))


def check_clocks(facts: Sequence[Mapping[str, Any]], peers: Rendezvous) -> Finding:
    """Compare the machines' clocks. Collective."""
    peers.gathered(None)  # so that all read their clocks at about the same time
    times = peers.gathered(time.time())
    offset = max(times) - min(times)
    by_host = {fact["host"]: now - times[0] for fact, now in zip(facts, times, strict=True)}
    if offset > _MOST_OFFSET:
        text = ", ".join(f"{host} {offset:+.1f} s" for host, offset in by_host.items())
        return Finding("clocks", "note", f"apart: {text}; synchronise them (chrony, ntpd)")
    return Finding("clocks", "ok", f"within {offset:.3f} s of one another")
