"""`hpdist preflight`: whether these machines can train together, before they try.

Run it on every machine at the same time, by hand or by a launcher; each comes to the address of the
first one, and one that does not come is named within the timeout. Then every machine tells what it
has, all of them measure the network between them, and the first one prints a table.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from hpdist.data.config import Data, Source
from hpdist.distributed.rendezvous import TOKEN, Endpoint, Rendezvous
from hpdist.errors import HpdistError
from hpdist.preflight.network import Speed, measure, measure_apart

_PACKAGES = ("hpdist", "torch", "accelerate", "deepspeed", "datasets", "transformers", "wandb")
_GIB = 2**30
_LEAST_DISK = 5 * _GIB
_APART = 1.0  # seconds between clocks, from which on log lines are hard to compare
_NCCL_ADVICE = (
    "NCCL_DEBUG=INFO shows what it tries; set NCCL_SOCKET_IFNAME to the network interface that the "
    "machines share and NCCL_IB_HCA to their InfiniBand adapters (NCCL_IB_DISABLE=1 does without); "
    "driver, CUDA and NCCL must fit, see versions"
)

Verdict = Literal["ok", "note", "FAILED"]


@dataclass(frozen=True)
class Wanted:
    """What a run will want of the machines."""

    run_folders: Path
    """The folder that holds the run folders."""
    data: Data
    precision: str | None = None


@dataclass(frozen=True)
class Finding:
    """What came of one check."""

    check: str
    verdict: Verdict
    told: str


def preflight(wanted: Wanted | None, endpoint: Endpoint, timeout: float = 60.0) -> list[Finding]:
    """Meet the other processes and check everything; the same findings on each.

    Raises DistributedError where they do not meet in time, or one is lost on the way. Collective:
    every process must call.
    """
    started = time.monotonic()
    with Rendezvous.of(endpoint, timeout) as peers:
        return _findings(_facts(wanted), wanted, peers, timeout, started)


def _findings(
    own: Mapping[str, Any],
    wanted: Wanted | None,
    peers: Rendezvous,
    timeout: float,
    started: float,
) -> list[Finding]:
    facts = peers.gathered(own)
    findings = [_met(facts, time.monotonic() - started), _versions(facts), _devices(facts)]
    findings.append(_half(facts, wanted))
    if peers.size > 1:
        if not peers.endpoint.token:
            findings.append(_no_token(peers.endpoint))
        findings += [_network(peers, timeout), _clocks(facts, peers)]
        if all(fact["devices"] for fact in facts):
            findings.append(_nccl(facts, peers, timeout))
    findings.append(_disk(facts))
    if any(fact["builds"] is not None for fact in facts):
        findings.append(_builds(facts))
    if wanted is not None:
        findings.append(_run_folder(wanted.run_folders, facts, peers))
        findings += _data(wanted.data, facts, peers)
    return findings


def table(findings: Sequence[Finding]) -> str:
    """The findings, a line each; what goes on over several lines is indented."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        first, *rest = finding.told.splitlines()
        lines.append(f"{finding.verdict:6}  {finding.check:{width}}  {first}")
        lines += [" " * (width + 10) + line for line in rest]
    return "\n".join(lines)


def _facts(wanted: Wanted | None) -> dict[str, Any]:
    """What this process has to tell."""
    devices = [_device(number) for number in range(torch.cuda.device_count())]
    folder = _there(wanted.run_folders if wanted is not None else Path())
    return {
        "host": socket.gethostname(),
        "versions": {"Python": platform.python_version(), **_installed()},
        "devices": devices,
        "gpu": _own_gpu(len(devices)),
        "bf16": torch.cuda.is_bf16_supported() if devices else True,
        "fp16": bool(devices),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "builds": _left_builds(),
        "free": {str(path): shutil.disk_usage(path).free for path in {folder, Path("/tmp")}},
    }


def _installed() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203
            found[package] = "missing"
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _device(number: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(number)
    properties = torch.cuda.get_device_properties(number)
    return {"name": properties.name, "uuid": str(properties.uuid), "free": free, "total": total}


def _own_gpu(gpus: int) -> int | None:
    """The GPU of this process, by its number on its host where a launcher has given it one."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return int(local) % gpus if gpus else None


def _there(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _met(facts: Sequence[Mapping[str, Any]], seconds: float) -> Finding:
    hosts = list(dict.fromkeys(fact["host"] for fact in facts))
    told = f"{len(facts)} on {len(hosts)} hosts, met in {seconds:.1f} s: {', '.join(hosts)}"
    return Finding("processes", "ok", told)


def _versions(facts: Sequence[Mapping[str, Any]]) -> Finding:
    """Check for equal packages everywhere; else pickles, checkpoints or numbers may differ."""
    names = list(dict.fromkeys(name for fact in facts for name in fact["versions"]))
    wrong = []
    for name in names:
        by_host = {fact["host"]: fact["versions"].get(name, "missing") for fact in facts}
        if len(set(by_host.values())) > 1:
            told = ", ".join(f"{version} on {host}" for host, version in by_host.items())
            wrong.append(f"{name}: {told}")
    if wrong:
        return Finding("versions", "FAILED", "\n".join([*wrong, "install the same everywhere"]))
    versions = facts[0]["versions"]
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding("versions", "ok", told)


def _devices(facts: Sequence[Mapping[str, Any]]) -> Finding:
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
        lines.append("some have GPUs and some have not: they cannot train together")
        verdict = "FAILED"
    return Finding("devices", verdict, "\n".join(lines))  # type: ignore[arg-type]


def _half(facts: Sequence[Mapping[str, Any]], wanted: Wanted | None) -> Finding:
    """What every process can compute in, held against what the config wants."""
    can = [name for name in ("bf16", "fp16") if all(fact[name] for fact in facts)]
    told = ", ".join(["fp32", *can]) + " on all"
    half = wanted.precision if wanted is not None else None
    if half in ("bf16", "fp16") and half not in can:
        hosts = list(dict.fromkeys(fact["host"] for fact in facts if not fact[half]))
        return Finding("precision", "FAILED", f"no {half} on {', '.join(hosts)}; {told}")
    return Finding("precision", "ok", told)


def _no_token(endpoint: Endpoint) -> Finding:
    told = (
        f"none: whoever reached {endpoint.where} could take part; set {TOKEN} to the same secret "
        "on every machine"
    )
    return Finding("token", "note", told)


def _network(peers: Rendezvous, timeout: float) -> Finding:
    """Latency and bandwidth between the processes' CPUs. Collective."""
    with peers.process_group(timeout):
        speed = measure(None, torch.device("cpu"))
    return Finding("network", "ok", f"all-reduce over gloo: {speed}")


def _nccl(facts: Sequence[Mapping[str, Any]], peers: Rendezvous, timeout: float) -> Finding:
    """Measure the network between the GPUs, as NCCL has it, in less time than others wait.

    NCCL does not take two processes on one GPU, which is found before. Collective.
    """
    shared = _shared_gpus(facts)
    if shared:
        told = "\n".join([*shared, "NCCL needs a GPU for each process; it was not measured"])
        return Finding("NCCL", "note", told)
    gpu = facts[peers.rank]["gpu"]
    own = measure_apart("nccl", f"cuda:{gpu}", peers.endpoint, 0.8 * timeout)
    said: Any = asdict(own) if isinstance(own, Speed) else own
    outcomes = [
        Speed(**each) if isinstance(each, dict) else str(each) for each in peers.gathered(said)
    ]
    return _nccl_finding(outcomes, [fact["host"] for fact in facts])


def _shared_gpus(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every GPU that several processes would use."""
    users: dict[tuple[str, str], list[int]] = {}
    for rank, fact in enumerate(facts):
        gpu = fact["devices"][fact["gpu"]]["uuid"]
        users.setdefault((fact["host"], gpu), []).append(rank)
    return [
        f"processes {', '.join(map(str, ranks))} share GPU {facts[ranks[0]]['gpu']} of {host}"
        for (host, _), ranks in users.items()
        if len(ranks) > 1
    ]


def _nccl_finding(outcomes: Sequence[Speed | str], hosts: Sequence[str]) -> Finding:
    """What came of measuring: the slowest, or what each process says of its failure."""
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


def _clocks(facts: Sequence[Mapping[str, Any]], peers: Rendezvous) -> Finding:
    peers.gathered(None)  # all look at about the same time
    times = peers.gathered(time.time())
    apart = max(times) - min(times)
    by_host = {fact["host"]: now - times[0] for fact, now in zip(facts, times, strict=True)}
    if apart > _APART:
        told = ", ".join(f"{host} {offset:+.1f} s" for host, offset in by_host.items())
        return Finding("clocks", "note", f"apart: {told}; synchronise them (chrony, ntpd)")
    return Finding("clocks", "ok", f"within {apart:.3f} s of one another")


def _disk(facts: Sequence[Mapping[str, Any]]) -> Finding:
    lines, verdict = [], "ok"
    for fact in {fact["host"]: fact for fact in facts}.values():
        free = sorted(fact["free"].items())
        told = ", ".join(f"{size / _GIB:.1f} GiB in {path}" for path, size in free)
        lines.append(f"{fact['host']}: {told} free")
        if min(fact["free"].values()) < _LEAST_DISK:
            verdict = "note"
            lines[-1] += "; little for checkpoints or caches"
    return Finding("disk", verdict, "\n".join(lines))  # type: ignore[arg-type]


def _left_builds() -> list[str] | None:
    """Locks that a killed compilation has left here; None where nothing compiles."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    from hpdist.engines.operators import left_locks

    return [str(lock) for lock in left_locks()]


def _builds(facts: Sequence[Mapping[str, Any]]) -> Finding:
    """Whether a compilation that was killed holds up starts with DeepSpeed."""
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


def _run_folder(folder: Path, facts: Sequence[Mapping[str, Any]], peers: Rendezvous) -> Finding:
    """Every process must see what the others write there, and rename it. Collective."""
    mark = folder / f".preflight-{peers.gathered(uuid.uuid4().hex)[0]}"
    rank, gathered = peers.rank, peers.gathered
    errors: list[str | None] = gathered(_try(mark.mkdir, parents=True) if rank == 0 else None)
    if errors[0]:
        return Finding("run folder", "FAILED", f"{folder}: {errors[0]} on {facts[0]['host']}")
    try:
        seen = gathered(mark.is_dir())
        temporary, final = mark / f"{rank}.tmp", mark / str(rank)
        errors = gathered(_try(_write_and_rename, temporary, final) if seen[rank] else None)
        whole = gathered(seen[rank] and all((mark / str(r)).exists() for r in range(len(seen))))
    finally:
        if rank == 0:
            shutil.rmtree(mark, ignore_errors=True)
    hosts = [fact["host"] for fact in facts]
    blind = list(dict.fromkeys(host for host, sees in zip(hosts, seen, strict=True) if not sees))
    if blind:
        told = (
            f"{folder.absolute()} on {', '.join(blind)} is not that of {hosts[0]}; put run.dir on "
            "a file system that all machines share"
        )
        return Finding("run folder", "FAILED", told)
    failed = {host: error for host, error in zip(hosts, errors, strict=True) if error}
    if failed or not all(whole):
        told = ", ".join(f"{error} on {host}" for host, error in failed.items())
        return Finding("run folder", "FAILED", f"{folder}: {told or 'files come late'}")
    return Finding("run folder", "ok", f"{folder.absolute()}: all write, rename and see it")


def _write_and_rename(temporary: Path, final: Path) -> None:
    temporary.write_text("preflight")
    os.replace(temporary, final)


def _try(act: Callable[..., object], *args: Any, **kwargs: Any) -> str | None:
    try:
        act(*args, **kwargs)
    except OSError as error:
        return str(error.strerror or error)
    return None


def _data(data: Data, facts: Sequence[Mapping[str, Any]], peers: Rendezvous) -> list[Finding]:
    """Every host opens every dataset and takes its first row. Collective."""
    findings = []
    first = {fact["host"]: rank for rank, fact in reversed(list(enumerate(facts)))}
    for name, source in _sources(data):
        start = time.monotonic()
        told = _first_row(source, f"data.{name}") if peers.rank in first.values() else None
        errors = peers.gathered(told)
        seconds = max(peers.gathered(time.monotonic() - start))
        failed = {fact["host"]: e for fact, e in zip(facts, errors, strict=True) if e}
        if failed:
            lines = [f"{host}: {error}" for host, error in failed.items()]
            findings.append(Finding(f"data.{name}", "FAILED", "\n".join(lines)))
        else:
            told = f"{source.path}: its first row in at most {seconds:.1f} s on each host"
            findings.append(Finding(f"data.{name}", "ok", told))
    return findings


def _sources(data: Data) -> list[tuple[str, Source]]:
    """Every dataset that a config names, those that are mixed one by one."""
    found: list[tuple[str, Source]] = []
    for name in ("labeled", "unlabeled", "test", "validation"):
        source = getattr(data, name)
        mix = getattr(source, "mix", None) or ()
        found += [(f"{name}.mix.{number}", part) for number, part in enumerate(mix)]
        if isinstance(source, Source) and source.path:
            found.append((name, source))
    return found


def _first_row(source: Source, where: str) -> str | None:
    """Why the first row cannot be had, or nothing."""
    from hpdist.data.sources.loading import parquet_files

    try:
        files = parquet_files(source, where)
        found = _in_parquet(files.splits, source, where) if files else _in_stream(source, where)
    except HpdistError as error:
        return str(error)
    except Exception as error:  # datasets and Arrow raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None if found else "it has no rows"


def _in_parquet(files: Mapping[str, Sequence[str]], source: Source, where: str) -> bool:
    """Whether the files of the source's split hold a row.

    `datasets` would go on reading in Arrow's threads after the row, which can abort the process
    when it ends before they do.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    from hpdist.data.files.open import Retry, open_file, stat
    from hpdist.data.stream.index import split_files

    for path in chain.from_iterable(split_files(files, source.split, where).values()):
        with open_file(path, stat(path, Retry()), Retry()) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            if next(parquet.iter_batches(1, use_threads=False), None) is not None:
                return True
    return False


def _in_stream(source: Source, where: str) -> bool:
    from hpdist.data.sources.loading import load

    if not getattr(source, "streaming", False):  # a table's split may be a slice, a stream's not
        split = source.split.partition("+")[0].partition("[")[0].strip()
        source = source.model_copy(update={"split": split})
    return next(iter(load(source, where, streaming=True)), None) is not None
