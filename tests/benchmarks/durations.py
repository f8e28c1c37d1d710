"""How long the default tests take: the whole, by folder, and the slowest files and tests.

    make test PYTEST_ADDOPTS="-p tests.support.cpu_seconds --cpu-seconds=/tmp/seconds.jsonl"
    python -m tests.benchmarks.durations /tmp/seconds.jsonl [--out FOLDER]

CPU seconds are those of a test and of all processes that it starts; the first test of a worker that
starts ranks is charged with the imports of the server of warm ranks. Collecting is not in them.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def folder_of(test: str) -> str:
    """Return the room of the tests: `tests/faults`, or `tests/unit/data` of unit tests."""
    parts = test.split("::")[0].split("/")[:-1]
    return "/".join(parts[:3])


def table(title: str, lines: Iterable[Line], key: Any, most: int) -> list[str]:
    """Return the rows of a table: CPU seconds, wall seconds and tests by `key`, most first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for line in lines:
        entry = sums[key(line["test"])]
        entry[0] += line["seconds"]
        entry[1] += line["ended"] - line["began"]
        entry[2] += 1
    rows = sorted(sums.items(), key=lambda item: -item[1][0])[:most]
    return [
        f"| {title} | CPU s | wall s | tests |",
        "|---|---|---|---|",
        *(f"| `{name}` | {cpu:.1f} | {wall:.1f} | {n} |" for name, (cpu, wall, n) in rows),
        "",
    ]


def report(lines: list[Line]) -> str:
    """Return the page."""
    cpu = sum(line["seconds"] for line in lines)
    wall = max(line["ended"] for line in lines) - min(line["began"] for line in lines)
    return "\n".join(
        [
            "# How long the default tests take",
            "",
            f"{len(lines):,} tests: {cpu:,.0f} CPU seconds in {wall:,.0f} s, collecting aside.",
            "`python -m tests.benchmarks.durations` says how this page is made.",
            "",
            *table("folder", lines, folder_of, 100),
            *table("file", lines, lambda test: test.split("::")[0], 30),
            *table("test", lines, lambda test: test, 20),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = report([json.loads(line) for line in options.seconds.read_text().splitlines()])
    print(text)
    if options.out:
        (options.out / "test_durations.md").write_text(text)


if __name__ == "__main__":
    main()
