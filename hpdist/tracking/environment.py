"""The environment of a run for its tracker: versions of the code, hosts, devices."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import subprocess
from pathlib import Path

import torch

from hpdist.distributed.collectives import gathered_on_main, world_size
from hpdist.version import __version__

_PACKAGES = ("torch", "accelerate", "deepspeed", "datasets", "transformers")


def environment() -> dict[str, object]:
    """Values by name, beside the config's; the hosts are known on rank 0. Collective."""
    found: dict[str, object] = {
        "world_size": world_size(),
        "hosts": _hosts(hosts_and_devices()),
        "python": platform.python_version(),
        "hpdist": __version__,
        **{package: version for package in _PACKAGES if (version := _version(package))},
    }
    folders = {"git_commit": Path.cwd(), "hpdist_commit": _own_repository()}
    commits = {name: _commit(folder) for name, folder in folders.items() if folder is not None}
    found |= {name: commit for name, commit in commits.items() if commit is not None}
    return found


def hosts_and_devices() -> list[tuple[str, str]]:
    """Every rank's host and device, on rank 0; none on the others.

    Collective: every rank must call.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return gathered_on_main((socket.gethostname(), device)) or []


def _hosts(hosts_and_devices: list[tuple[str, str]]) -> str:
    """Every host with its ranks and their devices."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, host_and_device in enumerate(hosts_and_devices):
        ranks.setdefault(host_and_device, []).append(rank)
    return ", ".join(
        f"{host} ({'rank' if len(own) == 1 else 'ranks'} {_span(own)}: {device})"
        for (host, device), own in ranks.items()
    )


def _span(ranks: list[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] + 1 == len(ranks):
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_repository() -> Path | None:
    """The checkout that hpdist runs from, if it is one."""
    root = Path(__file__).parents[2]
    return root if (root / ".git").exists() else None


def _commit(folder: Path) -> str | None:
    """The commit of a folder, `-dirty` if it has changes; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
