"""The table that `hpdist algorithms` prints, measured on algorithms as configs build them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from hpdist.algorithms.addons.base import AddOnConfig
from hpdist.algorithms.base import Algorithm, AlgorithmConfig
from hpdist.algorithms.exchange import StudentInputs
from hpdist.algorithms.fixmatch import FixMatch
from hpdist.algorithms.positions import BatchPositions
from hpdist.algorithms.protocol import Attempt, MicroBatch
from hpdist.config.component import components
from hpdist.data.batch import STORED, StoredTensors
from hpdist.data.structures import Structure
from hpdist.tasks.base import able_tasks, task_letters

# Two values of each size: a number that follows both is a multiple of it.
_CLASSES = (5, 7)
_BATCHES = (11, 13)  # unlabelled rows of the global batch
_LABELED = (17, 19)  # labelled ones
_ROWS = (101, 103)  # unlabelled rows in all
_NAMES = {_CLASSES: "C", _ROWS: "N"}
_FEATURES = torch.Size([3])
_EXTRA_INPUTS = 2  # inputs that an algorithm may add
_HEADER = ("name", "paper", "tasks", "views", "state", "reduced per step")
_ADDON_HEADER = ("add-on", "paper", "tasks", "heads", "state", "reduced per step")


def catalogue() -> list[str]:
    """Return the tables of all algorithms and add-ons as lines, measured on built objects."""
    configs = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
    addons = cast(dict[str, type[AddOnConfig]], components("addon"))
    return [
        *_table([_HEADER, *(_row(name, config) for name, config in configs.items())]),
        "",
        *_table([_ADDON_HEADER, *(_addon_row(name, config) for name, config in addons.items())]),
        "",
        f"Tasks (task.name) that it supports: {_letter_key()}.",
        "Views: of an unlabelled row, unless labelled rows are named. C: number of classes.",
        "N: number of unlabelled rows, or largest row id. / ranks: each rank holds a part; all",
        "else is on every rank. Reduced: floats summed over the ranks per optimizer step, besides",
        "the gradients and three counts of rows; 'per row': of the unlabelled global batch, 'per",
        "labelled row': of the labelled one; 'then' begins a second collective. An add-on, in the",
        "config's addons, wraps any algorithm; its state and sums are added to the algorithm's.",
    ]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = (zip(row, widths, strict=True) for row in rows)
    return ["  ".join(text.ljust(width) for text, width in line).rstrip() for line in cells]


def _row(name: str, config: type[AlgorithmConfig]) -> tuple[str, ...]:
    small, large = (config(name=name).build(classes) for classes in _CLASSES)
    state, reduced = _sizes(small, large)
    views = ", ".join(_views(small)) or "none"
    return name, small.paper or "-", _letters(small.needs), views, state, reduced


def _addon_row(name: str, config: type[AddOnConfig]) -> tuple[str, ...]:
    """Add-ons around FixMatch, which has no state and reduces nothing."""
    small, large = (config(name=name).build(FixMatch(), classes) for classes in _CLASSES)
    state, reduced = _sizes(small, large)
    heads = [
        f"{head}, which predicts" if head == small.predicts else head for head in small.head_names
    ]
    paper, tasks = small.addon_paper or "-", _letters(small.addon_needs)
    return name, paper, tasks, ", ".join(heads) or "none", state, reduced


def _letters(needs: frozenset[str]) -> str:
    """Give the tasks that have these abilities, by their first letters."""
    letters = task_letters()
    return " ".join(letters[task] for task in able_tasks(needs))


def _letter_key() -> str:
    """Say which letters stand for which task."""
    return ", ".join(f"{letters} {name}" for name, letters in task_letters().items())


def _sizes(small: Algorithm, large: Algorithm) -> tuple[str, str]:
    """The state of an algorithm and the sums that it reduces, from two instances of other sizes."""
    reduced = [_reduced(small, 0), _reduced(large, 1)]
    for algorithm in (small, large):
        algorithm.commit()  # brings every part of the state to its final size
    before, after = small.state_dict(), large.state_dict()
    for algorithm, (sums, _) in zip((small, large), reduced, strict=True):
        algorithm.bind_rank(0, 2)
        sums += algorithm.rank_statistics().values()
        if algorithm.recalls:
            ids = torch.zeros(_BATCHES[algorithm is large], 2)
            sums += [ids, *algorithm.recall(ids).values()]
    own = small.state_dict()  # of one of two ranks
    state = [
        f"{key} [{_shape(before[key], after[key])}{'' if key in own else ' / ranks'}]"
        for key in before
    ]
    totals = [_total(*sums) for sums in zip(*reduced, strict=True)]
    return (
        ", ".join(state) or "none",
        ", then ".join(total for total in totals if total) or "0",
    )


def _views(algorithm: Algorithm) -> list[str]:
    views = algorithm.views
    names = {
        "weak": "weak",
        "student_weak": "weak for the student",
        "strong": "strong",
        "strong_labeled": "strong of a labelled row",
    }
    counts = {kind: getattr(views, field) for field, kind in names.items()}
    needs = [f"{count} {kind}" for kind, count in counts.items() if count]
    needs += ["targets of labelled rows too"] if views.labeled_targets else []
    needs += ["stored labels"] if views.stored_labels else []
    needs += ["targets by the teacher"] if views.teacher else []
    needs += ["mixed"] if algorithm.groups is not None else []
    needs += ["perturbed"] if views.needs_gradient_probe else []
    return needs + [f"{name} head" for name in algorithm.head_names]


class _Zeros:
    """A model that predicts zeros for every row, with untrained heads."""

    def __init__(self, algorithm: Algorithm, classes: int) -> None:
        algorithm.input_shape = _FEATURES
        self.views = algorithm.views
        self.row = {"logits": torch.zeros(1, classes)}
        for name, head in algorithm.heads(_FEATURES).items():
            with torch.no_grad():
                self.row[name] = head(torch.zeros(1, *_FEATURES))
        for name in algorithm.head_names:  # heads of the model itself, which need no features
            self.row.setdefault(name, torch.zeros(1, 1))

    def targets(self, micros: Sequence[MicroBatch]) -> list[Structure | None]:
        """Give the outputs of the weak views, and of the labelled rows if they are needed too."""
        return [self._targets(micro.inputs) for micro in micros]

    def _targets(self, inputs: StudentInputs) -> Structure | None:
        parts = [*inputs.weak, *([inputs.labeled] if self.views.labeled_targets else [])]
        return self._outputs(parts) if inputs.weak else None

    def student(self, micro: MicroBatch) -> tuple[Structure, None]:
        """Give the outputs of the student's rows."""
        return self.preview(micro), None

    def preview(self, micro: MicroBatch) -> Structure:
        """Give the outputs of the student's rows."""
        return self._outputs(micro.inputs.parts)

    def probe(self, inputs: Tensor) -> Structure:
        """Give the outputs of other inputs."""
        return self._outputs([inputs])

    def _outputs(self, parts: Iterable[Tensor]) -> Structure:
        rows = sum(len(part) for part in parts)
        return {name: value.expand(rows, -1) for name, value in self.row.items()}


def _reduced(algorithm: Algorithm, number: int) -> tuple[list[Tensor], list[Tensor]]:
    """The sums that the algorithm reduces: of the weak views, and of the student's outputs."""
    classes, rows, labeled_rows = _CLASSES[number], _BATCHES[number], _LABELED[number]
    algorithm.rows = _ROWS[number]
    algorithm.class_counts = torch.ones(classes)
    views = algorithm.views
    labeled, unlabeled = torch.zeros(labeled_rows, *_FEATURES), torch.zeros(rows, *_FEATURES)
    at, u_at = torch.arange(labeled_rows), torch.arange(rows)
    inputs = StudentInputs(
        labeled,
        torch.zeros(labeled_rows).long(),
        (unlabeled,) * views.student_weak,
        (unlabeled,) * views.strong,
        (labeled,) * views.strong_labeled,
        (unlabeled,) * views.weak,
        BatchPositions(at, u_at, labeled_rows, rows, seed=0, step=0),
        ids=u_at,
        context=_no_stored_labels(rows, classes) if views.stored_labels else {},
        extra_inputs=(unlabeled,) * _EXTRA_INPUTS,
    )
    attempt = Attempt(algorithm, [MicroBatch(inputs, u_at, at, rows)], _Zeros(algorithm, classes))
    attempt.collect()
    sums = attempt.observe()
    outputs = attempt.student_outputs(0, attempt.model.preview(attempt.micros[0]))
    student = algorithm.student_statistics(outputs) if algorithm.uses_student_statistics else {}
    return list(sums.values()), list(student.values())


def _no_stored_labels(rows: int, classes: int) -> dict[str, Tensor]:
    """Give what an algorithm is given of stored labels where no row has one."""
    none = torch.zeros(rows)
    found = StoredTensors(probabilities=torch.zeros(rows, classes), confidence=none, agreement=none)
    return {STORED + name: cast(Tensor, kept) for name, kept in found.items()}


def _shape(small: Tensor, large: Tensor) -> str:
    """A shape in terms of C and N: 'C x 3'."""
    pairs = zip(small.shape, large.shape, strict=True)
    return " x ".join(_NAMES.get(pair, str(pair[0])) for pair in pairs)


def _total(small: Iterable[Tensor], large: Iterable[Tensor]) -> str:
    """The size of several tensors in terms of C and of the batches: '2C + 1 + 3 per row'."""
    # The number of elements, by powers of the labelled batch, of the unlabelled one, and of C.
    sizes: Counter[tuple[int, int, int]] = Counter()
    for a, b in zip(small, large, strict=True):
        dims = list(zip(a.shape, b.shape, strict=True))
        named = (_LABELED, _BATCHES, _CLASSES)
        plain = math.prod(x for x, y in dims if (x, y) not in named)
        labeled, rows, classes = (dims.count(pair) for pair in named)
        sizes[labeled, rows, -classes] += plain
    return " + ".join(_term(count, *powers) for powers, count in sorted(sizes.items()))


def _term(count: int, per_labeled_row: int, per_row: int, classes: int) -> str:
    power = {0: "", -1: "C"}.get(classes, f"C^{-classes}")
    each = " per row" * per_row + " per labelled row" * per_labeled_row
    return f"{count if count > 1 or not power else ''}{power}{each}"
