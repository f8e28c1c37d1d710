"""What a checkpoint of a thousand ranks costs one of them: counted, and timed beside each other.

    python -m tests.benchmarks.scale_checkpoint --out FOLDER [--before TREE] [--ranks 1024]

The checkpoints are written by the ranks' own writers, one rank after another, and opened as one of
them. The tensors are small: what opening costs depends on the number of fragments, and not on their
length. With `--before`, an earlier hpdist (a folder that has its package) opens the same files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hpdist.algorithms.parts.tables import BLOCK
from hpdist.checkpoint.fragment_index import FragmentIndex
from hpdist.checkpoint.manifest import MANIFEST, digest_of
from hpdist.distributed.fragments import Fragment
from tests.support import opened
from tests.support.many_ranks import KINDS, Fragments, cut_each, cut_flat, save_on, weights

# Run on its own, so that an earlier version can do it too.
OPENING = """
import json, resource, runpy, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
opened = runpy.run_path(sys.argv[2])
from hpdist.algorithms.parts.tables import LabelTable
from hpdist.checkpoint.reader import SavedRun
path, rank, ranks, table = Path(sys.argv[3]), *map(int, sys.argv[4:7])
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = most()
start = time.perf_counter()
with opened["counted"](path) as asked:
    saved = SavedRun(path, rank, ranks)
seconds = time.perf_counter() - start
peak = most() - before
begin = time.perf_counter()
if table:
    own = LabelTable(1000)
    own.rank, own.ranks = rank, ranks
    own.load(saved.whole("algorithm"))
loading = time.perf_counter() - begin
print(json.dumps({
    "seconds": seconds, "loading": loading, "peak": peak, "stats": asked.stats,
    "files": len(asked.opened), "opens": sum(asked.opened.values()),
}))
"""
HEAD = [
    "| checkpoint | opened by | s | files opened | opens | stats | memory, MB |",
    "|---|---|---|---|---|---|---|",
]
NOTE = (
    "Seconds are of a machine that had other work to do; they are to be held against each other "
    "only. Memory is how far the\nprocess's peak rose above that of its imports."
)
PARAMETERS = 10**9


def open_as(tree: Path, path: Path, rank: int, ranks: int, table: bool = False) -> dict[str, Any]:
    """What opening costs one rank, in a process of its own."""
    facts = [str(tree), opened.__file__, str(path), str(rank), str(ranks), str(int(table))]
    command = [sys.executable, "-c", OPENING, *facts]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tree)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def without_index(path: Path) -> Path:
    """Take the list of fragments out of a manifest, as earlier versions wrote none."""
    facts = json.loads((path / MANIFEST).read_text())
    del facts["digest"]
    facts.pop("fragments", None)
    (path / MANIFEST).write_text(json.dumps({**facts, "digest": digest_of(facts)}))
    return path


def line(what: str, who: str, found: dict[str, Any]) -> str:
    return (
        f"| {what} | {who} | {found['seconds']:.2f} | {found['files']} | {found['opens']} "
        f"| {found['stats']} | {found['peak'] / 1e6:.1f} |"
    )


def weights_of(options: argparse.Namespace, trees: dict[str, Path], folder: Path) -> list[str]:
    """The cost of opening weights, optimizer and teacher, cut as each engine cuts them."""
    lines, ranks = list(HEAD), options.ranks
    tensors = weights(options.tensors, 4 * ranks)
    cuts = {"ZeRO-3": cut_each, "ZeRO-1, ZeRO-2, DDP": cut_flat}
    for name, cut in cuts.items():
        start = time.perf_counter()
        path = save_on(folder / name, ranks, cut(tensors, ranks))
        size = (path / MANIFEST).stat().st_size / 1e6
        print(f"{name}: written in {time.perf_counter() - start:.0f} s", flush=True)
        what = f"{name}, {options.tensors} tensors, {ranks} ranks"
        for who, tree in trees.items():
            found = open_as(tree, path, ranks // 2, ranks)
            lines.append(line(f"{what}; manifest of {size:.2f} MB", who, found))
        found = open_as(trees["now"], without_index(path), ranks // 2, ranks)
        lines.append(line(f"{what}, written by an earlier version", "now", found))
    return lines


def labels_of(options: argparse.Namespace, trees: dict[str, Path], folder: Path) -> list[str]:
    """The cost of a rank's part of a table of labels."""
    ranks, rows = 64, options.rows
    labels = torch.arange(BLOCK).to(torch.int16)

    def of_rank(rank: int) -> Fragments:
        starts = range(rank * BLOCK, rows, ranks * BLOCK)
        return {
            "algorithm": [Fragment("labels", s, labels[: min(BLOCK, rows - s)]) for s in starts]
        }

    path = save_on(folder / "labels", ranks, of_rank)
    size = (path / MANIFEST).stat().st_size / 1e6
    lines = [
        f"A table of labels of {rows:.0e} rows, {ranks} ranks ({size:.2f} MB of manifest), on as "
        "many ranks:",
        "",
        "| opened by | opening, s | a rank's part of the table, s | files opened |",
        "|---|---|---|---|",
    ]
    for who, tree in trees.items():
        found = open_as(tree, path, ranks // 2, ranks, table=True)
        lines.append(
            f"| {who} | {found['seconds']:.2f} | {found['loading']:.2f} | {found['files']} |"
        )
    return lines


def index_of(options: argparse.Namespace, trees: dict[str, Path], folder: Path) -> list[str]:
    """The index of 10^9 elements, by their sizes alone, as the first rank puts it together."""
    ranks, names = options.ranks, 300
    size = PARAMETERS // names
    share = -(-size // ranks)
    notes = []
    for rank in range(ranks):
        index, start = FragmentIndex(), min(rank * share, size)
        for kind in KINDS:
            for number in range(names):
                run = (start, min(share, size - start), rank, 1)
                index.add(kind, f"model.layers.{number}.weight", run)
        notes.append(index.encoded())
    start = time.process_time()
    whole = FragmentIndex()
    for note in notes:
        whole.include(note, ranks)
    seconds = time.process_time() - start
    text = json.dumps(whole.encoded())
    begin = time.process_time()
    again = FragmentIndex()
    again.include(json.loads(text), ranks)
    reading = time.process_time() - begin
    count = ranks * names * len(KINDS)
    return [
        f"10^9 parameters in {names} tensors, by their sizes alone: {count:,} fragments of "
        f"{ranks} ranks under ZeRO-3 are {len(text) / 1e3:.0f} kB of index. The first rank's "
        f"writing thread needs {seconds:.2f} s of a CPU to put it together, and every rank "
        f"{reading * 1e3:.1f} ms to read it.",
    ]


PARTS: dict[str, Callable[[argparse.Namespace, dict[str, Path], Path], list[str]]] = {
    "weights": weights_of,
    "labels": labels_of,
    "index": index_of,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=200)
    parser.add_argument("--rows", type=int, default=10**9)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    trees = {"now": Path(__file__).parents[2]}
    if options.before is not None:
        trees = {"before": options.before.resolve(), **trees}
    lines = ["# A checkpoint of a thousand ranks, as one of them opens it"]
    for name in options.parts:
        with tempfile.TemporaryDirectory(dir=options.out) as folder:
            lines += ["", *PARTS[name](options, trees, Path(folder))]
        print("\n".join(lines), flush=True)
    lines += ["", NOTE]
    text = "\n".join(lines) + "\n"
    print(text)
    (options.out / "scale_checkpoint.md").write_text(text)


if __name__ == "__main__":
    main()
