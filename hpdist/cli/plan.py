"""`hpdist plan`: print what every ZeRO stage and FSDP2 need, and which fits."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from hpdist.cli.arguments import load_config
from hpdist.cli.commands import Commands
from hpdist.cli.output import print_text
from hpdist.errors import ConfigError

OWN_OPTIONS = ("--help", "--gpus", "--gpu-memory", "--reserve", "--deepspeed", "--stage")
"""Options of the command; every other one is a setting of the config."""

_STAGES: dict[str, Any] = {"none": None, "1": 1, "2": 2, "3": 3, "fsdp2": "fsdp2"}


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "plan",
        help="print what each ZeRO stage and FSDP2 need of a GPU's memory, and which fits",
        usage="hpdist plan CONFIG --gpus N --gpu-memory GIB [--key.sub value ...]",
        description=(
            "Rehearse every stage in one process, as the first of N GPUs: a few steps on real rows "
            "and some evaluation. It needs a GPU, or else enough memory on this machine, and time."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="on all machines")
    parser.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="of each")
    parser.add_argument(
        "--reserve",
        type=float,
        default=2.0,
        metavar="GIB",
        help="of it, not for tensors: CUDA's context, NCCL's buffers (default: 2)",
    )
    parser.add_argument(
        "--stage",
        choices=tuple(_STAGES),
        help="rehearse this one alone: none is DDP (default: all)",
    )
    parser.add_argument(
        "--deepspeed", metavar="JSON", help="the file that Accelerate's config names, if any"
    )


def run(known: argparse.Namespace, settings: Sequence[str]) -> int:
    """Print what every ZeRO stage and FSDP2 need, and which fits; status 3 if none does."""
    from hpdist.plan.memory_plan import make_plan, table
    from hpdist.plan.stages import STAGES

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("plan runs on one process; start it without a launcher")
    found = make_plan(
        load_config(known.config, settings).model_dump(mode="json"),
        known.gpus,
        known.gpu_memory,
        reserve=known.reserve,
        deepspeed=known.deepspeed,
        stages=STAGES if known.stage is None else (_STAGES[known.stage],),
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print_text(table(found))
    return 0 if found.fitting is not None else 3
