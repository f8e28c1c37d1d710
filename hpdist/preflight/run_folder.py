"""The check that all processes share the folder of the runs."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpdist.distributed.rendezvous import Rendezvous
from hpdist.preflight.findings import Finding


def check_run_folder(
    folder: Path, facts: Sequence[Mapping[str, Any]], peers: Rendezvous
) -> Finding:
    """Check that every process sees what the others write, and can rename it. Collective."""
    mark = folder / f".preflight-{peers.gathered(uuid.uuid4().hex)[0]}"
    rank, gathered = peers.rank, peers.gathered
    errors: list[str | None] = gathered(_try(mark.mkdir, parents=True) if rank == 0 else None)
    if errors[0]:
        return Finding("run folder", "FAILED", f"{folder}: {errors[0]} on {facts[0]['host']}")
    try:
        visible = gathered(mark.is_dir())
        temporary, final = mark / f"{rank}.tmp", mark / str(rank)
        errors = gathered(_try(_write_and_rename, temporary, final) if visible[rank] else None)
        whole = gathered(
            visible[rank] and all((mark / str(r)).exists() for r in range(len(visible)))
        )
    finally:
        if rank == 0:
            shutil.rmtree(mark, ignore_errors=True)
    hosts = [fact["host"] for fact in facts]
    blind = list(
        dict.fromkeys(
            host for host, is_visible in zip(hosts, visible, strict=True) if not is_visible
        )
    )
    if blind:
        text = (
            f"{folder.absolute()} on {', '.join(blind)} is not that of {hosts[0]}; put run.dir on "
            "a file system that all machines share"
        )
        return Finding("run folder", "FAILED", text)
    failed = {host: error for host, error in zip(hosts, errors, strict=True) if error}
    if failed or not all(whole):
        text = ", ".join(f"{error} on {host}" for host, error in failed.items())
        return Finding("run folder", "FAILED", f"{folder}: {text or 'files appear late'}")
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
