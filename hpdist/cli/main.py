"""The command line: `hpdist train CONFIG [--key.sub value ...]`.

Alone, or on many processes: `accelerate launch -m hpdist train CONFIG ...`. Exit status: 0 done;
2 the user's input is wrong; 3 training failed; 4 stopped by a signal after saving, ready to go on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hpdist import __version__
from hpdist.errors import CheckpointError, ConfigError, DataError, DistributedError, HpdistError
from hpdist.messages.redaction import redact_output, redacted_text

if TYPE_CHECKING:
    from hpdist.train.config import RunConfig
    from hpdist.train.trainer import Trainer

_FLAGS = ("--help", "--dry-run", "--print-config", "--print-schema")
_CONVERT_FLAGS = ("--help", "--out")
_PREFLIGHT_FLAGS = ("--help", "--processes", "--rank", "--address", "--port", "--timeout")
_PLAN_FLAGS = ("--help", "--gpus", "--gpu-memory", "--reserve", "--deepspeed")
_OVERRIDES = """\
Any setting of CONFIG can be overridden by its dotted name, and the command line wins:

  hpdist train configs/digits.yaml --algorithm.name freematch --optim.lr 0.01
  hpdist train configs/digits.yaml --batch.unlabeled=112 --views.mean "[0.5]" --zero.stage null

Values are read as YAML. Another name for the model, the algorithm or the views drops the options
that the file gives the old one. --print-config shows what comes of it, --print-schema every
setting there is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    redact_output()
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except HpdistError as error:
        if not _report(error) and arguments is None:
            _let_speak()
        return error.exit_status
    except KeyboardInterrupt:
        print("hpdist: interrupted", file=sys.stderr, flush=True)
        return 130  # what a shell says of SIGINT


def _run(arguments: Sequence[str]) -> int:
    overrides: list[str] = []
    flags = {
        "train": _FLAGS,
        "convert": _CONVERT_FLAGS,
        "preflight": _PREFLIGHT_FLAGS,
        "plan": _PLAN_FLAGS,
    }
    if arguments and arguments[0] in flags:
        arguments, overrides = _split(arguments, flags[arguments[0]])
    known = _parser().parse_args(arguments)
    if known.command == "train":
        return train(known, overrides)
    if known.command == "convert":
        return convert(known, overrides)
    if known.command == "preflight":
        return preflight(known, overrides)
    if known.command == "plan":
        return plan(known, overrides)
    if known.command == "configs":
        return configs(known)
    return report(known) if known.command == "report" else algorithms()


def train(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Train as a config says."""
    from hpdist.train import config as configuration

    if known.print_schema:
        _print(configuration.json_schema())
        return 0
    if known.config is None:
        raise ConfigError("train needs a config file: hpdist train CONFIG [--key.sub value ...]")
    if known.print_config:
        config = _load(known.config, overrides, run_code=False)
        _print(config.to_yaml().rstrip())
        return 0
    config = _load(known.config, overrides)
    from hpdist.cli.closing import summary_lines
    from hpdist.distributed.collectives import leave_group
    from hpdist.train.trainer import Trainer

    _begin_warnings()
    trainer = Trainer.from_config(config, files=not known.dry_run)
    summary = _fit(trainer, known.dry_run)
    for line in summary_lines(summary, config.run.folder):
        _print(line)
    leave_group()
    return 0


def _fit(trainer: Trainer, dry_run: bool) -> dict[str, object]:
    try:
        if not dry_run:
            return trainer.fit()
        trainer.dry_run()
        return {}
    except (CheckpointError, DataError, DistributedError) as error:
        if not error.everywhere:
            error.rank = _rank()  # the others may know nothing of it
        raise


def convert(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write the unlabelled rows of a config as Parquet, and print how to read them."""
    from tqdm import tqdm

    from hpdist.data.convert import convert as write

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("convert runs on one process; start it without a launcher")
    data = _load(known.config, overrides, run_code=False).data
    if data.unlabeled is None or not data.unlabeled.path:
        raise ConfigError("convert reads the dataset that data.unlabeled.path names; set it")
    with tqdm(unit=" rows", dynamic_ncols=True, disable=None) as bar:
        written = write(
            data.unlabeled,
            Path(known.out),
            input=data.labeled.input,
            loading=data.loading,
            bar=bar,
        )
    _print(
        f"# rows: {written.rows:,}, row groups: {written.groups:,}, files: {len(written.files)}, "
        f"together {written.bytes / 1e6:,.1f} MB\n"
        "# In place of path, name, data_files, revision, split and input:\n"
        f"{written.yaml().rstrip()}"
    )
    return 0


def preflight(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Check whether the processes that meet can train together."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else it tells every attempt to connect
    from hpdist.distributed.rendezvous import TOKEN, Endpoint
    from hpdist.preflight.checks import preflight, table

    config = _load(known.config, overrides, run_code=False) if known.config else None
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
    findings = preflight(config, endpoint, known.timeout)
    failed = [finding.check for finding in findings if finding.verdict == "FAILED"]
    if endpoint.rank == 0:
        _print(table(findings))
    if failed:
        error = DistributedError(f"preflight: not ready to train: {', '.join(failed)}; see above")
        error.everywhere = True
        raise error
    return 0


def plan(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Say what every ZeRO stage needs, and which fits; status 3 where none does."""
    from hpdist.plan.memory_plan import make_plan, table

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("plan runs on one process; start it without a launcher")
    found = make_plan(
        _load(known.config, overrides),
        known.gpus,
        known.gpu_memory,
        reserve=known.reserve,
        deepspeed=known.deepspeed,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    _print(table(found))
    return 0 if found.fitting is not None else 3


def report(known: argparse.Namespace) -> int:
    """Write the page of one or several runs."""
    from hpdist.tracking.report import write_report

    runs = [Path(run) for run in known.runs]
    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    out = Path(known.out) if known.out else default
    write_report(runs, out)
    _print(str(out))
    return 0


def algorithms() -> int:
    """List the algorithms."""
    from hpdist.algorithms import catalogue

    for line in catalogue():
        _print(line)
    return 0


def configs(known: argparse.Namespace) -> int:
    """List the configs that come with hpdist, or copy them."""
    from hpdist.cli.shipped import copy_shipped, list_configs

    if known.copy is None:
        _print("\n".join(list_configs()))
        return 0
    written = copy_shipped(Path(known.copy))
    _print(f"{len(written)} files written into configs/ and launch/ of {known.copy}")
    return 0


def _load(given: str, overrides: Sequence[str], *, run_code: bool = True) -> RunConfig:
    """Read a config by path or name; what a name stands for is said once.

    Without `run_code` nothing that it names is imported, and nothing can be built from it.
    """
    from hpdist.train import config as configuration
    from hpdist.cli.shipped import find_config

    path = find_config(given)
    if path != Path(given) and _rank() == 0:
        line = f"config {given}: {path}; its first lines say where its data come from"
        print(line, file=sys.stderr, flush=True)
    return configuration.load(path, overrides, run_code=run_code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _begin_warnings() -> None:
    """Have a warning of one of several processes say whose it is, and not stand behind a bar."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    whose = f"rank {_rank()}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    plain, own = warnings.formatwarning, str(Path(__file__).parent)

    def told(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        text = plain(message, category, filename, lineno, line)
        if category is UserWarning and filename.startswith(own):
            text = f"warning: {message}\n"  # hpdist's own sentences, without a line of its code
        return f"{clear}{whose}{text}"

    warnings.formatwarning = told


def _print(text: str) -> None:
    """Print to stdout, once whatever the number of ranks."""
    if _rank() != 0:
        return
    try:
        print(redacted_text(text), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; keep Python from failing again on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: HpdistError) -> bool:
    """Say once what is wrong; what only one rank knows, that rank says. Give whether this did."""
    where = ""
    if error.rank is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        where = f"rank {error.rank}: "
    if where or _rank() == 0:
        print(f"hpdist: {where}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return True
    return False


def _let_speak() -> None:
    """Wait, as a rank that says nothing, for rank 0 to say it and end.

    A launcher ends all processes once one has ended, and rank 0 may come to the error later: much
    later where the ranks have not met.
    """
    from hpdist.distributed.collectives import world_size

    time.sleep(1 if world_size() > 1 else 10)


def _split(arguments: Sequence[str], flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell `--key.sub value` and `--key=value` from what argparse knows.

    Raises ConfigError for a key that begins with no section of the config.
    """
    from hpdist.train.config import RunConfig
    from hpdist.config.section import nearest

    others, overrides = [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument.partition("=")[0] in flags:
            others.append(argument)
            continue
        section = argument[2:].partition("=")[0].partition(".")[0]
        if section not in RunConfig.model_fields:
            known = [*(flag[2:] for flag in flags), *RunConfig.model_fields]
            raise ConfigError(f"--{section}: no option or setting{nearest(section, known)}")
        overrides.append(argument)
        if "=" not in argument and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return others, overrides


class _Parser(argparse.ArgumentParser):
    """Reports what is wrong as every other error of the user's input."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hpdist",
        description="Half-precision, sharded semi-supervised training.",
        epilog="On many processes: accelerate launch [--config_file F] -m hpdist train CONFIG ...",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hpdist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "train",
        help="train as a config says; continues by itself where a checkpoint is",
        usage="hpdist train CONFIG [--key.sub value ...] [--dry-run | --print-config]",
        description="Train as CONFIG says, and continue where its run folder holds a checkpoint.",
        epilog=_OVERRIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file, or a name that hpdist configs lists"
    )
    run.add_argument("--dry-run", action="store_true", help="build everything, one step, no files")
    run.add_argument("--print-config", action="store_true", help="print the resolved YAML and stop")
    run.add_argument("--print-schema", action="store_true", help="print the JSON Schema and stop")
    rewrite = commands.add_parser(
        "convert",
        help="write a config's unlabelled rows as Parquet that a stream reads from any place",
        usage="hpdist convert CONFIG --out FOLDER [--key.sub value ...]",
        description="Read data.unlabeled of CONFIG once and write it as Parquet files into FOLDER.",
        allow_abbrev=False,
    )
    rewrite.add_argument("config", metavar="CONFIG", help="YAML file")
    rewrite.add_argument("--out", metavar="FOLDER", required=True, help="where to; made if need be")
    check = commands.add_parser(
        "preflight",
        help="check whether machines can train together: network, versions, run folder, data",
        usage="hpdist preflight [CONFIG] [--processes N --rank R --address A] [--key.sub value]",
        description=(
            "Start it on every machine at the same time. A launcher's variables, or SLURM's with "
            "MAIN_IP, say who is who; by hand the options do."
        ),
        allow_abbrev=False,
    )
    check.add_argument("config", nargs="?", metavar="CONFIG", help="also its run folder and data")
    check.add_argument("--processes", type=int, metavar="N", help="how many meet")
    check.add_argument("--rank", type=int, metavar="R", help="which of them this is, from 0")
    check.add_argument("--address", metavar="A", help="of the one of rank 0, as all reach it")
    check.add_argument("--port", type=int, default=29400, help="there (default: 29400)")
    check.add_argument(
        "--timeout", type=float, default=60.0, help="seconds to wait for the others (default: 60)"
    )
    need = commands.add_parser(
        "plan",
        help="say what each ZeRO stage needs of a GPU's memory, and which fits",
        usage="hpdist plan CONFIG --gpus N --gpu-memory GIB [--key.sub value ...]",
        description=(
            "Rehearse every stage in one process, as the first of N GPUs: a few steps on real rows "
            "and some of evaluation. It needs a GPU, or else this machine's memory and patience."
        ),
        allow_abbrev=False,
    )
    need.add_argument("config", metavar="CONFIG", help="YAML file")
    need.add_argument("--gpus", type=int, required=True, metavar="N", help="on all machines")
    need.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="of each")
    need.add_argument(
        "--reserve",
        type=float,
        default=2.0,
        metavar="GIB",
        help="of it, for what is not tensors: CUDA's context, NCCL's buffers (default: 2)",
    )
    need.add_argument(
        "--deepspeed", metavar="JSON", help="the file that Accelerate's config names, if any"
    )
    page = commands.add_parser(
        "report",
        help="write one HTML page of the curves of one run, or of several side by side",
        usage="hpdist report RUN [RUN ...] [--out FILE]",
        description="Write a page that needs nothing beside it, from what run folders hold.",
        allow_abbrev=False,
    )
    page.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    page.add_argument(
        "--out", metavar="FILE", help="default: report.html, of one run in its own folder"
    )
    commands.add_parser("algorithms", help="list every algorithm", allow_abbrev=False)
    shipped = commands.add_parser(
        "configs", help="list the configs that come with hpdist, or copy them", allow_abbrev=False
    )
    shipped.add_argument(
        "--copy", metavar="FOLDER", help="write configs/ and launch/ there, to launch with them"
    )
    return parser
