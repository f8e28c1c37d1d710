"""The manifest of a checkpoint, and which folders are checkpoints at all.

Anybody may have changed the content of a run folder, so nothing in it is trusted before it is
checked: only names that hpdist writes count, only regular files directly in a checkpoint's folder
are opened (reading a device or a pipe might never end), and a manifest must have hpdist's types.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hpdist.errors import CheckpointError

VERSION = 2
MANIFEST = "manifest.json"
COMMON = "common.safetensors"

_STEP = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"rank-(\d{5,})\.safetensors|common\.safetensors")
_MOST_BYTES = 256 << 20  # of a manifest: 100,000 ranks need 20 MB

Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class LaterFormatError(CheckpointError):
    """A checkpoint written by a later version of hpdist."""


class _File(BaseModel):
    """The facts of one file."""

    model_config = ConfigDict(strict=True)

    bytes: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Manifest(BaseModel):
    """The facts in every manifest; a run adds its own."""

    model_config = ConfigDict(strict=True, extra="allow")

    version: Count
    step: Count
    world_size: Annotated[Count, Field(ge=1)]
    files: dict[str, _File]
    fragments: dict[str, dict[str, str]] | None = None  # earlier versions wrote none


def folder_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint of this name; None if hpdist does not use such names."""
    found = _STEP.fullmatch(name)
    step = None if found is None else int(found[1])
    return step if step is not None and folder_name(step) == name else None


def file_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def rank_of(name: str) -> int:
    """The rank whose file has this name; 0 for what all have in common, which it writes."""
    found = _FILE.fullmatch(name)
    return int(found[1]) if found is not None and found[1] else 0


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, newest first: folders with hpdist's names, or links to them."""
    steps = {path: step_of(path.name) for path in folder.glob("step-*")}
    found = [p for p, step in steps.items() if step is not None and (p / MANIFEST).exists()]
    return sorted(found, key=lambda path: steps[path] or 0, reverse=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check the manifest of the checkpoint at `path`.

    Raises CheckpointError if it is damaged, has other types or names files that hpdist does not
    write, and LaterFormatError if a later version of hpdist wrote it.
    """
    file = path / MANIFEST
    try:
        size = regular_size(file)
        if size > _MOST_BYTES:
            raise CheckpointError(f"{file} has {size:,} bytes, more than a manifest ever has")
        facts: Any = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{file} cannot be read: it holds no object")
    version = facts.get("version")
    if isinstance(version, int) and version > VERSION:
        raise LaterFormatError(
            f"{path} has format {version}, this hpdist knows up to {VERSION}; upgrade hpdist"
        )
    if facts.pop("digest", None) != digest_of(facts):
        raise CheckpointError(f"{file} is damaged: its digest differs")
    check_types(_Manifest, facts, file)
    if version != VERSION:
        raise CheckpointError(f"{path} has format {version}, which is no longer read")
    if step_of(path.name) not in (None, facts["step"]):
        raise CheckpointError(f"{file} is of step {facts['step']}, and its folder's name is not")
    foreign = [name for name in facts["files"] if not _FILE.fullmatch(name)]
    if foreign or COMMON not in facts["files"]:
        named = f"names {foreign[0]!r}" if foreign else f"names no {COMMON}"
        raise CheckpointError(f"{file} {named}, which is not what hpdist writes")
    return facts


def check_types(model: type[BaseModel], facts: Mapping[str, Any], file: Path) -> None:
    """Raise CheckpointError if facts of a manifest do not have a model's types."""
    try:
        model.model_validate(facts)
    except (ValidationError, RecursionError) as error:
        what = "it is nested too deeply"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CheckpointError(f"{file} is not what hpdist writes: {what}") from error


def regular_size(file: Path) -> int:
    """The size of a regular file.

    Raises CheckpointError if it is missing or anything else: a link out of the folder, a device
    or a pipe, whose reading might never end.
    """
    try:
        found = file.lstat()
    except OSError as error:
        raise CheckpointError(f"{file} is missing: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{file} is no regular file, and hpdist only writes those")
    return found.st_size


def digest_of(facts: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's content."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def hash_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()
