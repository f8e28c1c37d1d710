"""`hpdist export`: write a trained model as one file, verified on real rows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from hpdist.cli.commands import Commands
from hpdist.cli.evaluate import step_of, test_settings
from hpdist.cli.output import begin_warnings, print_text
from hpdist.errors import ConfigError

OWN_OPTIONS = (
    *("--help", "--format", "--precision", "--out", "--tolerance", "--which", "--checkpoint"),
)
"""Options of the command; `--data.test.…` are settings of the set that it verifies on."""


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "export",
        help="write a trained model as a file for other programs, verified on real rows",
        usage=(
            "hpdist export MODEL [DATA] --out FILE [--format onnx|safetensors|openvino|executorch] "
            "[--precision fp32|bf16|fp16|int8] [--tolerance SHARE] [--data.test.key value ...]"
        ),
        description=(
            "Write MODEL as FILE and compare both on DATA, or on the run's test set; a file that "
            "differs by more than the tolerance is not kept."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="run folder, its model/, or a checkpoint")
    parser.add_argument("data", nargs="?", metavar="DATA", help="a path of labelled rows")
    parser.add_argument("--out", metavar="FILE", required=True)
    parser.add_argument(
        "--format",
        help="default: what FILE ends in: .onnx, .safetensors, .xml (openvino), .pte (executorch)",
    )
    parser.add_argument("--precision", default="fp32", help="default: fp32")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="largest difference of an output, as a share of the largest output "
        "(default: 1e-4 in fp32, 1e-2 in fp16, 5e-2 in bf16, 0.25 in int8)",
    )
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher")
    parser.add_argument("--checkpoint", metavar="STEP", help="best, last, or a step")


def run(known: argparse.Namespace, settings: Sequence[str]) -> int:
    """Write the file, and say what the verification has found."""
    from hpdist.evaluate.export.read import files_of
    from hpdist.evaluate.export.verify import lines
    from hpdist.evaluate.export.write import check_export, write_file
    from hpdist.evaluate.load import load
    from hpdist.evaluate.measure import open_measured
    from hpdist.messages.human import size

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("export runs in one process; start it without accelerate launch")
    if known.tolerance is not None and not known.tolerance >= 0:
        raise ConfigError(f"--tolerance: {known.tolerance} must be at least 0")
    out, overrides = Path(known.out), test_settings(settings, "export")
    check_export(out, known.format, known.precision)
    begin_warnings()
    loaded = load(known.model, known.which, step_of(known.checkpoint), device="cpu")
    if loaded.model is None:
        raise ConfigError(f"{known.model} is an exported file already; name its run")
    rows = open_measured(loaded, known.data, overrides)
    found = write_file(
        loaded,
        out,
        rows,
        file_format=known.format,
        precision=known.precision,
        tolerance=known.tolerance,
    )
    for line in lines(found, loaded.task.in_percent):
        print_text(line)
    files = files_of(out)
    total = sum(file.stat().st_size for file in files)
    print_text(f"written to {' and '.join(map(str, files))}: {size(total)}, {known.precision}")
    return 0
