"""`hpdist preflight`: check whether the processes that meet can train together."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpdist.cli.arguments import load_config
from hpdist.cli.commands import Commands
from hpdist.cli.output import print_text
from hpdist.errors import ConfigError, DistributedError

if TYPE_CHECKING:
    from hpdist.engines.execution_plan import ExecutionPlan
    from hpdist.train.config import RunConfig

OWN_OPTIONS = ("--help", "--processes", "--rank", "--address", "--port", "--timeout")
"""Options of the command; every other one is a setting of the config."""


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "preflight",
        help="check whether machines can train together: network, versions, run folder, data",
        usage="hpdist preflight [CONFIG] [--processes N --rank R --address A] [--key.sub value]",
        description=(
            "Start it on every machine at the same time. A launcher's variables, or SLURM's with "
            "MAIN_IP, give each process its rank; by hand the options do."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="also checks its folder, data")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes")
    parser.add_argument("--rank", type=int, metavar="R", help="rank of this process, from 0")
    parser.add_argument("--address", metavar="A", help="of rank 0, as all can reach it")
    parser.add_argument("--port", type=int, default=29400, help="at that address (default: 29400)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds to wait for the others (default: 60)"
    )


def run(known: argparse.Namespace, settings: Sequence[str]) -> int:
    """Check whether the processes that meet can train together."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else it logs every connection attempt
    from hpdist.distributed.rendezvous import TOKEN, Endpoint
    from hpdist.preflight.checks import preflight
    from hpdist.preflight.facts import Requirements
    from hpdist.preflight.findings import table

    config = load_config(known.config, settings, run_code=False) if known.config else None
    given = (known.processes, known.rank, known.address)
    if any(value is not None for value in given):
        if None in given:
            raise ConfigError("preflight: --processes, --rank and --address go together")
        if not 0 <= known.rank < known.processes:
            raise ConfigError(
                f"preflight: --rank {known.rank} is not one of {known.processes} processes, "
                f"0 to {known.processes - 1}"
            )
        token = os.environ.get(TOKEN, "")
        endpoint = Endpoint(known.rank, known.processes, known.address, known.port, token)
    else:
        endpoint = Endpoint.from_environment()
    requirements = None
    if config is not None:
        by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        requirements = Requirements(
            Path(config.run.dir),
            config.data,
            config.precision,
            fsdp2=config.shard.engine is not None or by_launcher,
            engine=_engine_of(config),
        )
    findings = preflight(requirements, endpoint, known.timeout)
    failed = [finding.check for finding in findings if finding.verdict == "FAILED"]
    if endpoint.rank == 0:
        print_text(table(findings))
    if failed:
        error = DistributedError(f"preflight: not ready to train: {', '.join(failed)}; see above")
        error.everywhere = True
        raise error
    return 0


def _engine_of(config: RunConfig) -> ExecutionPlan | str:
    """How the run computes and shards, or why it cannot."""
    from hpdist.engines.launch import resolve
    from hpdist.train.compose import execution_request

    try:
        return resolve(execution_request(config))
    except ConfigError as error:
        return str(error)
