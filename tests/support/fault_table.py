"""What the fault tests have injected, and what it cost, as they counted it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpdist.data.batch import UnlabeledBatch

COSTS = {
    "rows_lost": "rows lost",
    "rows_repeated": "rows repeated",
    "rows_masked": "rows masked",
    "steps_repeated": "steps repeated after resume",
}


@dataclass
class Fault:
    """One or more faults of a kind, injected together."""

    kind: str
    count: int
    overcome: bool = False
    costs: dict[str, int] = field(default_factory=dict)

    def survived(self, **costs: int) -> None:
        """Note, once all that a test asserts has held, what it has counted: keys of `COSTS`."""
        assert costs.keys() <= COSTS.keys()
        self.overcome, self.costs = True, costs


class FaultTable:
    """The faults of a session."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def inject(self, kind: str, count: int = 1) -> Fault:
        """Note that so many faults have been, or are about to be, injected."""
        self.faults.append(Fault(kind, count))
        return self.faults[-1]

    def lines(self) -> list[str]:
        """The table as Markdown, a row for each kind; `-` where nothing was counted."""
        rows = [["fault", "injected", "survived", *COSTS.values()]]
        rows.append(["---"] * len(rows[0]))
        for kind in dict.fromkeys(fault.kind for fault in self.faults):
            faults = [fault for fault in self.faults if fault.kind == kind]
            costs = sum((Counter(fault.costs) for fault in faults), Counter())
            counted = {name for fault in faults for name in fault.costs}
            injected = sum(fault.count for fault in faults)
            survived = sum(fault.count for fault in faults if fault.overcome)
            cells = [str(costs[name]) if name in counted else "-" for name in COSTS]
            rows.append([kind, str(injected), str(survived), *cells])
        return [f"| {' | '.join(row)} |" for row in rows]


TABLE = FaultTable()
"""What this process has injected, and in the end what its workers have."""


def rows_cost(audit: Iterable[Mapping[str, Any]], expected: int) -> dict[str, int]:
    """What an audit says of the rows, of which so many should have been used, each once."""
    rows = list(audit)
    used = {(row["epoch"], row["id"]) for row in rows}
    return {
        "rows_lost": expected - len(used),
        "rows_repeated": len(rows) - len(used),
        "rows_masked": sum(not row["valid"] for row in rows),
    }


def batches_cost(
    found: Sequence[UnlabeledBatch], expected: Sequence[UnlabeledBatch]
) -> dict[str, int]:
    """The same of batches, against those of a stream that nothing disturbs."""
    ours, theirs = _uses(found), _uses(expected)
    return {
        "rows_lost": (theirs - ours).total(),
        "rows_repeated": (ours - theirs).total(),
        "rows_masked": sum(len(batch.bad) for batch in found),
    }


def _uses(batches: Sequence[UnlabeledBatch]) -> Counter[tuple[int, int]]:
    """How often each row was used in each epoch."""
    uses: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        assert batch.epochs is not None
        uses.update(zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True))
    return uses


def steps_repeated(output: str) -> int:
    """How many of the steps that a run and those that continued it have told were done again."""
    steps = re.findall(r"^step (\d+)/", output, re.MULTILINE)
    return len(steps) - len(set(steps))
