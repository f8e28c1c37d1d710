"""Operations and collectives that a training step dispatches, against the same step in plain torch.

    python -m tests.benchmarks.dispatch_count [--depth 28] [--width 2] [--rows 8] [--by-name]

FixMatch on a WideResNet with mu 7, on one process and on two ranks. Each operation that
reaches a kernel counts as one, whatever its size; views of memory do not count, and collectives
count apart. On two ranks the plain loop is DDP around torch's own SyncBatchNorm. Its fused kernels
exist for GPUs only, so on a CPU each is replaced by a reference implementation that counts as one.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpdist.data.views import ImageViewsConfig
from hpdist.models import WideResNet
from tests.benchmarks.plain_loop import Loop, PlainLoop, hpdist_loop, several_ranks
from tests.support.ranks import run_ranks

BATCH, MU, CLASSES = 8, 7, 10
_COUNTED_FROM = 2  # steps that make buffers and the optimizer's state come first


@dataclass(frozen=True)
class Dispatched:
    """What one step dispatches, by name."""

    operations: Counter[str]
    collectives: Counter[str]


class DispatchCounter(TorchDispatchMode):
    """Counts what is dispatched inside, except views of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count one operation, and do it."""
        if function.namespace == "c10d":
            self.collectives[str(function)] += 1
        elif function.namespace == "aten" and not function.is_view:
            self.operations[str(function)] += 1
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Compared:
    """What a step dispatches by hpdist and by the plain loop, on this rank."""

    ours: Dispatched
    plain: Dispatched
    difference: float
    """The largest difference between their weights after these steps, of all weights."""


def count(depth: int, width: int, rows: int = BATCH) -> Compared:
    """Do the same steps in both loops, and count the last. Collective, if there are ranks."""
    torch.manual_seed(0)
    model = WideResNet(3, CLASSES, depth, width)
    own, theirs = copy.deepcopy(model), model
    views = ImageViewsConfig().build(0)
    ours = hpdist_loop(own, views)  # joins the ranks
    plain = PlainLoop(theirs, views, "synced" if several_ranks() else "torch")
    torch.manual_seed(plain.rank)
    x = torch.randint(256, (rows, 3, 32, 32), dtype=torch.uint8)
    y = torch.randint(CLASSES, (rows,))
    u = torch.randint(256, (rows * MU, 3, 32, 32), dtype=torch.uint8)
    counted = [_counted(loop, x, y, u) for loop in (ours, plain)]
    with torch.no_grad():
        pairs = zip(own.parameters(), theirs.parameters(), strict=True)
        difference = max(float((a - b).abs().max()) for a, b in pairs)
    return Compared(*counted, difference)


def _counted(loop: Loop, x: Tensor, y: Tensor, u: Tensor) -> Dispatched:
    for _ in range(_COUNTED_FROM):
        loop(x, y, u)
    with DispatchCounter() as counter:
        loop(x, y, u)
    return Dispatched(counter.operations, counter.collectives)


def table(found: dict[int, Compared]) -> str:
    """Return the counts by number of ranks, as Markdown."""
    lines = [
        "| ranks | hpdist, operations | plain torch | ratio | hpdist, collectives | plain torch |",
        "|---|---|---|---|---|---|",
    ]
    for ranks, compared in found.items():
        ours, plain = compared.ours, compared.plain
        own, theirs = ours.operations.total(), plain.operations.total()
        sent = f"{ours.collectives.total()} | {plain.collectives.total()}"
        lines.append(f"| {ranks} | {own:,} | {theirs:,} | {own / theirs:.3f} | {sent} |")
    return "\n".join(lines)


def differences(ours: Dispatched, plain: Dispatched) -> str:
    """Return the counts by name where they differ, the largest difference first."""
    own = ours.operations + ours.collectives
    theirs = plain.operations + plain.collectives
    names = sorted(own.keys() | theirs.keys(), key=lambda name: -abs(own[name] - theirs[name]))
    lines = ["| operation | hpdist | plain torch |", "|---|---|---|"]
    changed = [name for name in names if own[name] != theirs[name]]
    return "\n".join([*lines, *(f"| {n} | {own[n]} | {theirs[n]} |" for n in changed)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--rows", type=int, default=BATCH, help="labelled ones per rank")
    parser.add_argument("--by-name", action="store_true", help="also what differs, by name")
    options = parser.parse_args()
    size = options.depth, options.width, options.rows
    found = {1: count(*size), 2: run_ranks(2, count, *size, fresh=True)[0]}
    rows = f"{options.rows} + {options.rows * MU} rows per rank"
    print(f"FixMatch on WRN-{options.depth}-{options.width}, {rows}.\n")
    print(table(found))
    if options.by_name:
        for ranks, compared in found.items():
            print(f"\n{ranks} ranks\n\n{differences(compared.ours, compared.plain)}")


if __name__ == "__main__":
    main()
