"""Checks that compare what the machines have: packages, GPUs, precision, disks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpdist.preflight.facts import Requirements
from hpdist.preflight.findings import Finding

_GIB = 2**30
_LEAST_DISK = 5 * _GIB


def check_versions(facts: Sequence[Mapping[str, Any]]) -> Finding:
    """Check for equal packages everywhere; else pickles, checkpoints or numbers may differ."""
    names = list(dict.fromkeys(name for fact in facts for name in fact["versions"]))
    wrong = []
    for name in names:
        by_host = {fact["host"]: fact["versions"].get(name, "missing") for fact in facts}
        if len(set(by_host.values())) > 1:
            text = ", ".join(f"{version} on {host}" for host, version in by_host.items())
            wrong.append(f"{name}: {text}")
    if wrong:
        return Finding("versions", "FAILED", "\n".join([*wrong, "install the same everywhere"]))
    versions = facts[0]["versions"]
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding("versions", "ok", text)


def check_devices(facts: Sequence[Mapping[str, Any]]) -> Finding:
    """List the GPUs and their free memory; machines with and without GPUs cannot mix."""
    lines, verdict = [], "ok"
    for fact in {fact["host"]: fact for fact in facts}.values():
        if not fact["devices"]:
            lines.append(f"{fact['host']}: no GPU, {fact['cores']} CPU cores")
            continue
        for number, device in enumerate(fact["devices"]):
            free, total = device["free"] / _GIB, device["total"] / _GIB
            memory = f"{free:.1f} of {total:.1f} GiB free"
            lines.append(f"{fact['host']}, GPU {number}: {device['name']}, {memory}")
            if free < 0.9 * total:
                verdict = "note"
                lines[-1] += "; another process holds the rest"
    if len({bool(fact["devices"]) for fact in facts}) > 1:
        lines.append("some have GPUs and others do not: they cannot train together")
        verdict = "FAILED"
    return Finding("devices", verdict, "\n".join(lines))  # type: ignore[arg-type]


def check_precision(
    facts: Sequence[Mapping[str, Any]], requirements: Requirements | None
) -> Finding:
    """The precisions of all processes, compared with the config's."""
    can = [name for name in ("bf16", "fp16") if all(fact[name] for fact in facts)]
    text = ", ".join(["fp32", *can]) + " on all"
    half = requirements.precision if requirements is not None else None
    if half in ("bf16", "fp16") and half not in can:
        hosts = list(dict.fromkeys(fact["host"] for fact in facts if not fact[half]))
        return Finding("precision", "FAILED", f"no {half} on {', '.join(hosts)}; {text}")
    return Finding("precision", "ok", text)


def check_sharding(facts: Sequence[Mapping[str, Any]]) -> Finding:
    """Whether torch can shard by FSDP2 on every host."""
    lacking = {f["host"]: f["versions"]["torch"] for f in facts if not f["fsdp2"]}
    if lacking:
        text = ", ".join(f"{version} on {host}" for host, version in lacking.items())
        advice = "shard.engine: fsdp2 needs torch 2.13 or newer; or shard by zero.stage"
        return Finding("sharding", "FAILED", f"torch {text}: {advice}")
    return Finding("sharding", "ok", "torch shards by FSDP2 on all")


def check_disk(facts: Sequence[Mapping[str, Any]]) -> Finding:
    """List the free space of every host's disks."""
    lines, verdict = [], "ok"
    for fact in {fact["host"]: fact for fact in facts}.values():
        free = sorted(fact["free"].items())
        text = ", ".join(f"{size / _GIB:.1f} GiB in {path}" for path, size in free)
        lines.append(f"{fact['host']}: {text} free")
        if min(fact["free"].values()) < _LEAST_DISK:
            verdict = "note"
            lines[-1] += "; little for checkpoints or caches"
    return Finding("disk", verdict, "\n".join(lines))  # type: ignore[arg-type]


def check_builds(facts: Sequence[Mapping[str, Any]]) -> Finding:
    """Whether a killed compilation blocks starts with DeepSpeed."""
    left = {fact["host"]: fact["builds"] for fact in facts if fact["builds"]}
    if not left:
        return Finding(
            "compiling", "ok", "no compilation of DeepSpeed's operators was left halfway"
        )
    lines = [
        f"{host}: {lock} was left by a start that was killed; hpdist removes it when it starts, "
        "others wait for it for ever"
        for host, locks in left.items()
        for lock in locks
    ]
    return Finding("compiling", "note", "\n".join(lines))
