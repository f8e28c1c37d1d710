"""Ranks started by mpirun: its variables, under the names that torchrun uses."""

from __future__ import annotations

import os

from hpdist.errors import ConfigError

_NAMES = {  # torchrun's name -> that of Open MPI, MVAPICH and Intel MPI's hydra
    "RANK": ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE"),
    "LOCAL_RANK": (
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
    ),
    "LOCAL_WORLD_SIZE": (
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        "MPI_LOCALNRANKS",
    ),
}


def adopt_mpi() -> None:
    """Use mpirun's rank and world size, unless a launcher has set them.

    Otherwise every rank would take itself for the only one. `srun` sets the PMI variables alone,
    also for a launcher's own process, so those count only beside those of a local rank.
    """
    if "WORLD_SIZE" in os.environ:
        return
    found = {}
    for name, theirs in _NAMES.items():
        values = [os.environ[their] for their in theirs if their in os.environ]
        if not values:
            return
        found[name] = values[0]
    if found["WORLD_SIZE"] == "1":
        return
    if found["LOCAL_WORLD_SIZE"] == found["WORLD_SIZE"]:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"mpirun has started {found['WORLD_SIZE']} ranks on several machines; set MASTER_ADDR "
            "to the address of that of rank 0"
        )
    os.environ.update(found)
