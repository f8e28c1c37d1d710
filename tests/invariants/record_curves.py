"""Puts loss curves on record, one file each in `tests/invariants/curves`.

    python -m tests.invariants.record_curves NAME…      those curves
    python -m tests.invariants.record_curves --all      all of them
    python -m tests.invariants.record_curves --missing  those that have no file yet

A curve belongs to one behaviour of the code: record it anew only where a change of numbers is
meant, and say so in the commit. Before a change that must change no number, and after it, compare
on one machine with HPDIST_CURVES_EXACT=1 (see `test_recorded_curves.py`). Files of curves that
`curve_settings.py` no longer names are removed by --all.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.invariants import recorded_curves
from tests.invariants.curve_settings import CURVES


def main() -> None:
    """Record the curves that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", metavar="NAME", help="a curve of curve_settings.py")
    parser.add_argument("--all", action="store_true", help="record every curve")
    parser.add_argument("--missing", action="store_true", help="record those that have no file")
    parser.add_argument(
        "--disturbed", type=int, default=3, metavar="N", help="runs that measure a curve's margin"
    )
    given = parser.parse_args()
    names = list(CURVES) if given.all or given.missing else given.names
    if given.missing:
        names = [name for name in names if not recorded_curves.path_of(name).exists()]
    unknown = sorted(set(names) - set(CURVES))
    if unknown or not (names or given.missing):
        parser.error(f"no such curve: {', '.join(unknown)}" if unknown else "name a curve or --all")
    if given.all:
        for path in recorded_curves.FOLDER.glob("*.json"):
            if path.stem not in CURVES:
                path.unlink()
    with tempfile.TemporaryDirectory() as data:
        for name in names:
            start = time.monotonic()
            try:
                found = recorded_curves.record(name, Path(data), given.disturbed)
            except AssertionError as error:
                print(error, flush=True)
                continue
            recorded_curves.write(name, found)
            took = time.monotonic() - start
            print(
                f"{name}: seed {found['seed']}, compared {found['compared']} steps, "
                f"margin {found['margin']:g}, {took:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
