"""`hpdist preflight`: whether these machines can train together, before they try.

Run it on every machine at the same time, by hand or by a launcher; all connect to the address of
the first one, and missing ones are named within the timeout. Then every machine reports what it
has, all of them measure the network between them, and the first one prints a table.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hpdist.aliases import find_moved
from hpdist.distributed.rendezvous import Endpoint, Rendezvous
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.preflight.datasets import check_data
from hpdist.preflight.facts import Requirements, own_facts
from hpdist.preflight.findings import Finding
from hpdist.preflight.gradients import check_engine, is_worth_checking
from hpdist.preflight.machines import (
    check_builds,
    check_devices,
    check_disk,
    check_precision,
    check_sharding,
    check_versions,
)
from hpdist.preflight.network_checks import (
    check_clocks,
    check_nccl,
    check_network,
    note_missing_token,
    shared_gpus,
)
from hpdist.preflight.run_folder import check_run_folder


def preflight(
    requirements: Requirements | None, endpoint: Endpoint, timeout: float = 60.0
) -> list[Finding]:
    """Meet the other processes and check everything; the same findings on each.

    Raises DistributedError if they do not meet in time, or one is lost meanwhile. Collective:
    every process must call.
    """
    started = time.monotonic()
    with Rendezvous.of(endpoint, timeout) as peers:
        return _findings(own_facts(requirements), requirements, peers, timeout, started)


def _findings(
    own: Mapping[str, Any],
    requirements: Requirements | None,
    peers: Rendezvous,
    timeout: float,
    started: float,
) -> list[Finding]:
    facts = peers.gathered(own)
    findings = [
        _met(facts, time.monotonic() - started),
        check_versions(facts),
        check_devices(facts),
    ]
    findings.append(check_precision(facts, requirements))
    if requirements is not None and requirements.fsdp2:
        findings.append(check_sharding(facts))
    if peers.size > 1:
        if not peers.endpoint.token:
            findings.append(note_missing_token(peers.endpoint))
        findings += [check_network(peers, timeout), check_clocks(facts, peers)]
        if all(fact["devices"] for fact in facts):
            findings.append(check_nccl(facts, peers, timeout))
        findings += _engine_findings(requirements, facts, peers, timeout)
    findings.append(check_disk(facts))
    if any(fact["builds"] is not None for fact in facts):
        findings.append(check_builds(facts))
    if requirements is not None:
        findings.append(check_run_folder(requirements.run_folders, facts, peers))
        findings += check_data(requirements.data, facts, peers)
    return findings


def _engine_findings(
    requirements: Requirements | None,
    facts: Sequence[Mapping[str, Any]],
    peers: Rendezvous,
    timeout: float,
) -> list[Finding]:
    """What a step on the config's engine gives; nothing where it is not checked. Collective."""
    engine = None if requirements is None else requirements.engine
    reasons = [text for text in peers.gathered(engine if isinstance(engine, str) else None) if text]
    if reasons:
        return [Finding("engine", "FAILED", reasons[0])]
    on_gpu = all(fact["devices"] for fact in facts)
    if not isinstance(engine, ExecutionPlan) or shared_gpus(facts):
        return []
    return (
        [check_engine(engine, facts, peers, timeout)] if is_worth_checking(engine, on_gpu) else []
    )


def _met(facts: Sequence[Mapping[str, Any]], seconds: float) -> Finding:
    hosts = list(dict.fromkeys(fact["host"] for fact in facts))
    text = f"{len(facts)} on {len(hosts)} hosts, met in {seconds:.1f} s: {', '.join(hosts)}"
    return Finding("processes", "ok", text)


def __getattr__(name: str) -> object:
    """Find names that have moved from here."""
    return find_moved(__name__, name)
