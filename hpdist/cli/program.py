"""The command line: `hpdist train CONFIG [--key.sub value ...]`.

Alone, or on many processes: `accelerate launch -m hpdist train CONFIG ...`. Exit status: 0 done;
2 the user's input is wrong; 3 training failed; 4 stopped by a signal after saving, can continue.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpdist.cli import (
    algorithms,
    benchmark,
    configs,
    convert,
    evaluate,
    export,
    plan,
    predict,
    preflight,
    report,
    train,
    vote,
)
from hpdist.cli.arguments import Parser, split_settings
from hpdist.cli.commands import Command
from hpdist.cli.output import let_rank_0_speak, report_error
from hpdist.errors import HpdistError
from hpdist.messages.redaction import redact_output
from hpdist.version import __version__

_COMMANDS: dict[str, Command] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "vote": vote,
    "export": export,
    "benchmark": benchmark,
    "convert": convert,
    "preflight": preflight,
    "plan": plan,
    "report": report,
    "algorithms": algorithms,
    "configs": configs,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    redact_output()
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except HpdistError as error:
        if not report_error(error) and arguments is None:
            let_rank_0_speak()
        return error.exit_status
    except KeyboardInterrupt:
        print("hpdist: interrupted", file=sys.stderr, flush=True)
        return 130  # a shell's status for SIGINT


def _run(arguments: Sequence[str]) -> int:
    settings: list[str] = []
    command = _COMMANDS.get(arguments[0]) if arguments else None
    own_options = getattr(command, "OWN_OPTIONS", None)
    if own_options is not None:
        arguments, settings = split_settings(arguments, own_options)
    known = _parser().parse_args(arguments)
    return _COMMANDS[known.command].run(known, settings)


def _parser() -> Parser:
    parser = Parser(
        prog="hpdist",
        description="Half-precision, sharded semi-supervised training.",
        epilog="On many processes: accelerate launch [--config_file F] -m hpdist train CONFIG ...",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hpdist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS.values():
        command.add_arguments(commands)
    return parser
