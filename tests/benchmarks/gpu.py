"""All measurements on a GPU: speed, memory, training.

    python -m tests.benchmarks.gpu [--minutes 8] [--parts speed memory training] [--data FOLDER]
    python -m tests.benchmarks.gpu --dry-run

Each part (`gpu_speed`, `gpu_memory`, `gpu_training`) is a process of its own with a time of its
own, so that one that fails costs the others nothing. Writes `results/gpu.md`, with the names of the
card and of the versions; of parts that are not measured this time, that page keeps what it has. A
dry run does all parts on the CPU with tiny models, prints the same tables and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.gpu.device import begin_dry_run
from tests.gpu.timed import run_within

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "gpu.md"
PARTS = {
    "speed": "Speed against a bare loop",
    "memory": "Peak memory against `hpdist plan`",
    "training": "CIFAR-10 with 250 labels",
}
"""The parts and their headings."""
SHARES = {"speed": 0.25, "memory": 0.12}
"""Of the time; training has the rest."""
MOST = {"speed": 100, "memory": 45, "training": 360}
"""Seconds of a part, if training is among them."""
AROUND_TRAINING = 60  # seconds for the imports, the trial and the evaluation
LATE, LATE_DRY = 90, 600  # seconds by which a part may take longer than it was given
PLACES = (Path("shared/data/cifar10"), Path("../shared/data/cifar10"))


def data_folder(given: Path | None) -> Path | None:
    """The folder of CIFAR-10: the given one, else one where it is looked for, else None."""
    test_data = os.environ.get("HPDIST_TEST_DATA")
    places = [Path(test_data) / "cifar10"] if test_data else []
    places += [ROOT / place for place in PLACES]
    return given or next((place for place in places if list(place.glob("train-*.parquet"))), None)


def seconds_of(parts: Sequence[str], minutes: float) -> dict[str, float]:
    """Divide the time; what parts do not use is left unused."""
    whole = 60 * minutes
    found = {part: SHARES[part] * whole for part in parts if part in SHARES}
    if "training" in parts:
        found = {part: min(seconds, MOST[part]) for part, seconds in found.items()}
        left = whole - sum(found.values()) - AROUND_TRAINING
        found["training"] = min(max(left, 10.0), MOST["training"])
    elif found:  # they have the time of training, too
        scale = whole / sum(found.values())
        found = {part: scale * seconds for part, seconds in found.items()}
    return found


def device_name(dry_run: bool) -> str:
    """The name of the card, or what stands in for it."""
    return "cpu (dry run)" if dry_run else torch.cuda.get_device_name(0)


def heading(name: str) -> str:
    """The head of the page: the device and the versions."""
    cuda = torch.version.cuda or "none"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else "none"
    return (
        "# On a GPU\n\n`make gpu`; what is measured and how: [the GPU kit](../../../docs/gpu.md).\n"
        f"\nDevice: {name}; torch {torch.__version__}, CUDA {cuda}, cuDNN {cudnn}; Python "
        f"{platform.python_version()}, {os.cpu_count()} cores.\n"
    )


def page(name: str, sections: Mapping[str, str]) -> str:
    """The whole page: its head and the parts that there are, in their order."""
    texts = [
        f"## {PARTS[part]}\n\n{sections[part].strip()}\n" for part in PARTS if part in sections
    ]
    return "\n".join([heading(name), *texts])


def kept_sections(text: str, name: str) -> dict[str, str]:
    """The parts of a page that has the same head: device and versions; none of another's."""
    if not text.startswith(heading(name)):
        return {}
    by_heading = dict(re.findall(r"^## (.+)\n\n((?:(?!^## ).*\n?)*)", text, re.MULTILINE))
    return {part: by_heading[title] for part, title in PARTS.items() if title in by_heading}


def write(sections: Mapping[str, str], dry_run: bool, results: Path = RESULTS) -> str:
    """Write the page unless this is a dry run, and return it."""
    name = device_name(dry_run)
    if dry_run:
        return page(name, sections)
    before = results.read_text(encoding="utf-8") if results.exists() else ""
    text = page(name, kept_sections(before, name) | dict(sections))
    results.write_text(text, encoding="utf-8")
    return text


def run_part(part: str, seconds: float, arguments: Sequence[str]) -> tuple[str, bool]:
    """Run a part in a process of its own; its Markdown, and whether it went well."""
    command = [sys.executable, "-m", f"tests.benchmarks.gpu_{part}", "--seconds", f"{seconds:.0f}"]
    late = LATE_DRY if "--dry-run" in arguments else LATE
    out, problem = run_within(1.3 * seconds + late, [*command, *arguments], captured=True)
    lines = "\n".join(line for line in out.splitlines() if line.startswith("|"))
    if problem:
        return f"{lines}\n\nNot complete: {problem}.", False
    return lines, True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="of all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run:
        begin_dry_run()
    elif not torch.cuda.is_available():
        print(
            "tests.benchmarks.gpu needs a CUDA device, and none is visible; --dry-run does all of "
            "it on the CPU, tiny",
            file=sys.stderr,
        )
        return 2
    sections, well = {}, True
    for part, seconds in seconds_of(options.parts, options.minutes).items():
        arguments = ["--dry-run"] if options.dry_run else []
        if part == "training" and not options.dry_run:
            data = data_folder(options.data)
            if data is None:
                sections[part] = "Not measured: no data was found; `--data FOLDER` names it."
                continue
            arguments = ["--data", str(data)]
        sections[part], done = run_part(part, seconds, arguments)
        well = well and done
    print(write(sections, options.dry_run))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
