"""Checks that an algorithm respects global-batch semantics and skipped steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from hpdist.algorithms.addons.base import AddOnConfig, build_algorithm
from hpdist.algorithms.base import Algorithm, AlgorithmConfig
from hpdist.algorithms.exchange import StudentOutputs
from hpdist.algorithms.fixmatch import FixMatchConfig
from hpdist.algorithms.protocol import join_shards
from hpdist.config.component import components
from hpdist.errors import ConfigError
from hpdist.tasks import DEFAULT_TASK
from hpdist.tasks.base import Task, TaskConfig
from hpdist.testing.imitation import GlobalBatch, Ran, global_batch, run_step, with_nan

_STEPS = 4  # per check
_RUN_STEPS = 8  # length of the run for ramps
_EXACT = {torch.float32, torch.float64, torch.int16, torch.int32, torch.int64, torch.bool}


class AlgorithmError(AssertionError):
    """An algorithm violates the contract; the message has a line for each violation."""


def check_algorithm(
    algorithm: AlgorithmConfig | AddOnConfig | Algorithm | Callable[[], Algorithm],
    task: str | Task = DEFAULT_TASK,
    *,
    addons: Sequence[AddOnConfig] = (),
    num_classes: int = 5,
    run_steps: int = _RUN_STEPS,
) -> None:
    """Check an algorithm as every algorithm of the catalogue is checked.

    It does steps on small random batches with a linear model, on the CPU, in about a second, and
    starts no process. It checks:

    - 2 and 4 ranks, each with its own algorithm, and 2 and 4 micro-batches give the losses,
    gradients and state of one rank; also if ranks have no valid row.
    - A skipped step leaves everything unchanged, and so does a NaN in any view.
    - Without a valid unlabelled row there is no unsupervised loss, and the state is unchanged.
    - The state passes through `state_dict` and `load_state_dict` and is not in half precision.
    - A second call of `loss` gives the same, and nothing is changed in place.
    - Every view of the student gets a gradient, and the targets get none.

    Args:
        algorithm: A config of an algorithm, or of an add-on, which then wraps FixMatch; or an
            algorithm that has done no step, which is copied; or a function that makes one.
        task: The task of its outputs, or the name of one that is known. Its own example labels
            are used.
        addons: The configs of add-ons that wrap a config's algorithm, the innermost first.
        num_classes: Classes or targets of the labels.
        run_steps: The length of the run for a config's ramps.

    Raises AlgorithmError, which lists all violations, and ConfigError if the algorithm has no
    meaning for the task.
    """
    made = _task(task)
    made.example_outputs(num_classes)  # else every check would fail for one reason
    width = made.output_size(num_classes)
    make = _maker(algorithm, made, addons, width, run_steps)
    checks = _Checks(make, num_classes, width)
    wrong = [f"{check.__name__[1:].replace('_', ' ')}: {line}" for check, line in checks.run()]
    if wrong:
        name = type(checks.make()).__name__
        lines = "\n".join(f"- {line}" for line in dict.fromkeys(wrong))
        raise AlgorithmError(f"{name} violates the contract of an algorithm:\n{lines}")


def _task(task: str | Task) -> Task:
    if isinstance(task, Task):
        return task
    known = components(TaskConfig.kind)
    if task not in known:
        raise ConfigError(f"task: {task!r} is none of {', '.join(known)}")
    return cast(TaskConfig, known[task](name=task)).build()


def _maker(
    algorithm: AlgorithmConfig | AddOnConfig | Algorithm | Callable[[], Algorithm],
    task: Task,
    addons: Sequence[AddOnConfig],
    num_classes: int,
    run_steps: int,
) -> Callable[[], Algorithm]:
    if isinstance(algorithm, AddOnConfig):
        addons, algorithm = [algorithm], FixMatchConfig(name="fixmatch")
    if isinstance(algorithm, AlgorithmConfig):
        config = algorithm
        return lambda: build_algorithm(config, addons, num_classes, steps=run_steps, task=task)
    if addons:
        raise ConfigError("addons: they are put around a config's algorithm only")
    given = cast(Algorithm | Callable[[], Algorithm], algorithm)

    def make() -> Algorithm:
        made = copy.deepcopy(given) if isinstance(given, Algorithm) else given()
        made.set_task(task)
        return made

    return make


class _Checks:
    """The checks of an algorithm; each yields a line for each violation."""

    def __init__(self, make: Callable[[], Algorithm], num_classes: int, width: int) -> None:
        self._make = make
        self._classes = num_classes
        self._width = width
        algorithm = make()
        self._views = algorithm.views
        mixes = algorithm.groups is not None
        self._labeled, self._unlabeled = (32, 32) if mixes else (8, 16)
        groups = algorithm.groups
        whole = groups is None or groups == "auto"
        self._slices = [n for n in (2, 4) if whole or int(groups or n) % n == 0]

    def run(self) -> Iterator[tuple[Callable[[], Iterator[str]], str]]:
        """Return each line with its check; an error that a check raises is a line too."""
        for check in (
            self._one_step,
            self._ranks,
            self._micro_batches,
            self._skipped_step,
            self._not_finite,
            self._no_valid_row,
            self._state,
            self._gradient,
        ):
            yield from ((check, line) for line in _lines(check))

    def make(self) -> Algorithm:
        """Make an algorithm that knows the data and has done no step."""
        algorithm = self._make()
        rows = 2 * self._unlabeled
        algorithm.rows = rows
        algorithm.class_counts = torch.arange(1.0, self._classes + 1)
        if algorithm.generations > 1 and algorithm.generation == 0:
            ids = torch.arange(rows)
            probabilities = (ids[:, None] * (1 + torch.arange(self._width))).sin().softmax(dim=1)
            algorithm.take_labels(ids, probabilities)
            algorithm.begin_generation()
        return algorithm

    def _batch(self, algorithm: Algorithm, step: int, unusable: Sequence[int] = ()) -> GlobalBatch:
        """Make a batch; the model's confidence grows with the step."""
        batch = global_batch(
            algorithm,
            step,
            labeled=self._labeled,
            unlabeled=self._unlabeled,
            classes=self._classes,
            unusable=unusable,
        )
        sharpness = 1 + step % 3
        return replace(batch, student=batch.student * sharpness, target=batch.target * sharpness)

    def _one_step(self) -> Iterator[str]:
        algorithm = self.make()
        for step in range(_STEPS):
            ran = run_step([algorithm], self._batch(algorithm, step))
            yield from ran.problems
            if not all(map(math.isfinite, ran.losses.values())):
                yield f"a loss is not finite: {ran.losses}"

    def _ranks(self) -> Iterator[str]:
        for ranks in self._slices:
            yield from self._compared(ranks, 1, f"on {ranks} ranks")
        if 4 in self._slices:
            yield from self._compared(2, 2, "on 2 ranks with 2 micro-batches each")

    def _micro_batches(self) -> Iterator[str]:
        if self.make().uses_student_statistics is False:
            algorithm = self.make()
            if _gives_student_statistics(algorithm, self._batch(algorithm, 0)):
                yield "`student_statistics` gives sums, and `uses_student_statistics` is False"
        for micro_batches in self._slices:
            yield from self._compared(1, micro_batches, f"in {micro_batches} micro-batches")

    def _compared(self, ranks: int, micro_batches: int, where: str) -> Iterator[str]:
        quarter = self._unlabeled // 4
        some, slice_, every = (0, 3, 4, 5, 13), range(quarter, 2 * quarter), range(self._unlabeled)
        one = self.make()
        many = [self.make() for _ in range(ranks)]
        for rank, algorithm in enumerate(many):
            if ranks > 1:
                algorithm.bind_rank(rank, ranks)
        for step, unusable in enumerate([(), some, slice_, every, ()]):
            batch = self._batch(one, step, unusable)
            wanted, found = run_step([one], batch), run_step(many, batch, micro_batches)
            wrong = list(_differences(found, wanted, self._names()))
            alone = self.make()
            alone.load_state_dict(
                join_shards(many[0].state_dict(), [algorithm.shards() for algorithm in many])
            )
            wrong += _state_differences(alone.state_dict(), one.state_dict())
            if wrong:
                yield from (f"{where} {line} on one rank" for line in wrong)
                return

    def _skipped_step(self) -> Iterator[str]:
        skipping, plain = self.make(), self.make()
        for step in range(_STEPS):
            before = _snapshot(skipping)
            run_step([skipping], self._batch(skipping, step + 100), commit=False)
            yield from (f"it changes {name}" for name in _changed(before, skipping))
            batch = self._batch(plain, step)
            losses = [run_step([one], batch).losses for one in (skipping, plain)]
            if wrong := _unequal(*losses):
                yield (
                    f"it changes the {wrong} of the next step: something is stored outside "
                    "`pending`, or `commit` and `discard` leave out a part"
                )
                return

    def _not_finite(self) -> Iterator[str]:
        algorithm = self.make()
        run_step([algorithm], self._batch(algorithm, 0))
        before = _snapshot(algorithm)
        if self._views.weak:
            run_step([algorithm], with_nan(self._batch(algorithm, 1)))
            yield from (
                f"a NaN in a weak view changes {name}" for name in _changed(before, algorithm)
            )
        for kind in ("student_weak", "strong", "strong_labeled"):
            batch = self._batch(algorithm, 2)
            for view in getattr(batch, kind):
                view[0] = float("nan")
            run_step([algorithm], batch, commit=False)  # its gradients are not finite
            yield from (f"a NaN in a {kind} view changes {n}" for n in _changed(before, algorithm))
        losses = run_step([algorithm], self._batch(algorithm, 3)).losses
        if not all(map(math.isfinite, losses.values())):
            yield f"after a NaN in a view the next step's losses are {losses}"

    def _no_valid_row(self) -> Iterator[str]:
        if not self._views.uses_unlabeled:
            return
        algorithm = self.make()
        run_step([algorithm], self._batch(algorithm, 1))
        before = _snapshot(algorithm)
        ran = run_step([algorithm], self._batch(algorithm, 0, range(self._unlabeled)))
        if ran.losses["unsupervised_loss"] != 0:
            yield f"the unsupervised loss is {ran.losses['unsupervised_loss']:.7g}, not 0"
        if not all(map(math.isfinite, ran.losses.values())):
            yield f"a loss is not finite: {ran.losses}"
        if not (ran.gradients[0].isfinite().all() and ran.gradients[0].any()):
            yield "the labelled rows have no gradient, or one that is not finite"
        yield from (f"it changes {name}" for name in _changed(before, algorithm))

    def _state(self) -> Iterator[str]:
        algorithm, other = self.make(), self.make()
        for step in range(3):
            run_step([algorithm], self._batch(algorithm, step))
        state = _snapshot(algorithm)
        for name, value in state.items():
            if name in algorithm.state and value.dtype not in _EXACT:
                yield f"{name} is {value.dtype}: averages do not move in half precision"
            if not value.isfinite().all():
                yield f"{name} is not finite"
        other.load_state_dict({name: value.clone() for name, value in state.items()})
        yield from (f"{name} is lost when it is loaded" for name in _changed(state, other))
        for step in (3, 4):
            batch = self._batch(algorithm, step)
            losses = [run_step([one], batch).losses for one in (other, algorithm)]
            if wrong := _unequal(*losses):
                yield f"after loading it the {wrong} differs: `state_dict` is incomplete"
                return
        yield from (
            f"{name} differs after loading" for name in _changed(_snapshot(algorithm), other)
        )
        try:
            other.load_state_dict(state | {"nonsense": torch.zeros(1)})
        except KeyError:
            return
        yield "a state with other names is loaded without a KeyError"

    def _gradient(self) -> Iterator[str]:
        algorithm = self.make()
        reached: list[bool] = []
        others = [*algorithm.task.example_outputs(self._classes)][1:]
        heads: dict[str, bool] = dict.fromkeys([*others, *algorithm.head_names], False)
        for step in range(2 * _STEPS):
            ran = run_step([algorithm], self._batch(algorithm, step))
            for name, parts in ran.head_gradients.items():
                heads[name] = heads[name] or any(bool(part.any()) for part in parts)
            views = zip(ran.gradients, *ran.head_gradients.values(), strict=True)
            now = [any(bool(part.any()) for part in view) for view in views]
            reached = [a or b for a, b in zip(reached or now, now, strict=True)]
        names = self._names() + [f"further input {number}" for number in range(len(reached))]
        for name, there in zip(names, reached, strict=False):
            if not there:
                yield f"none reaches the {name}, which the student runs on"
        for name, there in heads.items():
            if not there:
                kind = "output" if name in others else "head"
                yield f"none reaches the {kind} {name}"

    def _names(self) -> list[str]:
        """Name the parts of the student's inputs."""
        views = self._views
        kinds = {
            "weak view for the student": views.student_weak,
            "strong view": views.strong,
            "strong view of the labelled rows": views.strong_labeled,
        }
        numbered = [f"{kind} {number}" for kind, count in kinds.items() for number in range(count)]
        return ["labelled rows", *numbered]


def _lines(check: Callable[[], Iterator[str]]) -> Iterator[str]:
    try:
        yield from check()
    except Exception as error:
        yield f"{type(error).__name__}: {error}"


def _gives_student_statistics(algorithm: Algorithm, batch: GlobalBatch) -> bool:
    given: list[bool] = []
    ask = algorithm.student_statistics

    def watched(outputs: StudentOutputs) -> dict[str, Tensor]:
        sums = ask(outputs)
        given.append(bool(sums))
        return sums

    algorithm.student_statistics = watched  # type: ignore[method-assign]
    run_step([algorithm], batch)
    return any(given)


def _snapshot(algorithm: Algorithm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in algorithm.state_dict().items()}


def _changed(before: dict[str, Tensor], algorithm: Algorithm) -> list[str]:
    """Name the parts of the state that changed, bit for bit."""
    after = algorithm.state_dict()
    names = list(dict.fromkeys([*before, *after]))
    return [
        f"the state {name!r}"
        for name in names
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    ]


def _unequal(found: dict[str, float], wanted: dict[str, float]) -> str:
    """Name the terms that are not equal numbers, or NaN in both."""
    if found.keys() != wanted.keys():
        return "set of terms"
    return ", ".join(
        name
        for name, value in wanted.items()
        if found[name] != value and not (math.isnan(value) and math.isnan(found[name]))
    )


def _differences(found: Ran, wanted: Ran, names: list[str]) -> Iterator[str]:
    """Describe what is not equal up to rounding."""
    if found.losses.keys() != wanted.losses.keys():
        yield f"the terms are {sorted(found.losses)}, and {sorted(wanted.losses)}"
        return
    for name, value in wanted.losses.items():
        if not math.isclose(found.losses[name], value, rel_tol=1e-5, abs_tol=1e-6):
            yield f"the {name} is {found.losses[name]:.7g}, and {value:.7g}"
    names = names + [f"further input {number}" for number in range(len(wanted.inputs))]
    pairs = {
        "inputs": (found.inputs, wanted.inputs),
        "gradient": (found.gradients, wanted.gradients),
        **{
            f"gradient to {name}": (found.head_gradients[name], parts)
            for name, parts in wanted.head_gradients.items()
        },
    }
    for what, (many, one) in pairs.items():
        if len(many) != len(one):
            yield f"there are {len(many)} {what}, and {len(one)}"
            continue
        for name, a, b in zip(names, many, one, strict=False):
            if not _close(a, b, 1e-4):
                yield f"the {what} of the {name} is another than"


def _state_differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    if found.keys() != wanted.keys():
        return [f"the state holds {sorted(found)}, and {sorted(wanted)}"]
    return [
        f"the state {name!r} is another than"
        for name, value in wanted.items()
        if not _close(found[name], value, 1e-5)
    ]


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return torch.allclose(found, wanted, rtol=tolerance, atol=1e-6, equal_nan=True)
