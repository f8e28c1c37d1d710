"""Holds runs against one another step by step, each step from the same state.

Two runs that should be the same drift apart by rounding: a step amplifies what came before, a row
that lies on a threshold passes in one and not in the other, and how soon is the processor's choice.
So one run is recorded, the whole state before some of its steps and all that comes of them; every
other run takes over such a state, does that one step, and must get the same, closely.

Where rounding alone would decide something (a row on a threshold, two classes alike), there is no
same to get. Each recorded step is therefore done again from weights that differ by ten times what
rounding does, both ways; where that shows, the step is not `firm` and nothing is held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hpdist.algorithms import Algorithm
from hpdist.distributed.fragments import Fragment, WholeTensors
from hpdist.engines.optimizer_state import SavedOptimizer
from hpdist.train.algorithm_state import whole_state
from hpdist.train.step import SemiSupervisedStep
from tests.support.recipes import global_batches, slice_of

TOLERANCE = 5e-5  # of a metric, and of the length of an update; other ranks make it 1e-6
_NUDGE = 2e-6  # of a weight; fp32 rounds to 6e-8, and a sum of many adds some to that
_NUDGES = 2  # each way
_ROUNDING = 3e-7  # of what is updated: an update cannot be known better

Kinds = dict[str, dict[str, Tensor]]  # kind -> name -> values, whole
GiveBatches = Callable[[int], Sequence[Any]]  # the global batches of a step
Build = Callable[[], Algorithm]


@dataclass(frozen=True)
class State:
    """All that a step goes by, from every rank."""

    kinds: Kinds
    scalars: dict[str, float]  # of the optimizer
    attempts: int
    applied: int
    updates: int  # of the teacher


@dataclass(frozen=True)
class Step:
    """A step: where it began, what it told, and where it ended."""

    before: State
    metrics: dict[str, float]
    after: State
    firm: bool = True


@dataclass
class Recorded:
    """A run on one process."""

    steps: dict[int, Step] = field(default_factory=dict)  # those to be held against, by number
    curve: list[dict[str, float]] = field(default_factory=list)  # the metrics of all

    @property
    def firm(self) -> dict[int, Step]:
        return {number: step for number, step in self.steps.items() if step.firm}


def state_of(step: SemiSupervisedStep, build: Build | None = None) -> State:
    """Take the state down. Collective: every rank must call.

    Several ranks may hold a step's changes beside the counts that they belong to. With `build`,
    which makes the step's algorithm anew, the algorithm's state is what one rank has that takes
    theirs over.
    """
    engine, teacher = step.engine, step.teacher
    assert teacher is not None
    gather = engine.layout.gather
    kinds = {"weights": gather(engine.master_fragments())}
    kinds["buffers"] = {name: b.detach().clone() for name, b in engine.module.named_buffers()}
    for key, fragments in engine.optimizer_fragments().items():
        kinds[f"optimizer {key}"] = gather(fragments)
    kinds["teacher"] = gather(teacher.fragments)
    kinds["teacher's buffers"] = {name: b.clone() for name, b in teacher.buffers.items()}
    state = whole_state(step.algorithm)
    if build is not None:
        alone = build()
        alone.load_state_dict(state)
        state = alone.state_dict()
    kinds["algorithm"] = {name: v.clone() for name, v in state.items()}
    return State(
        kinds, engine.optimizer_scalars(), step.attempts, step.applied_steps, teacher.updates
    )


@torch.no_grad()
def put(step: SemiSupervisedStep, state: State) -> None:
    """Put a run into a state, whatever it did before."""
    engine, teacher, kinds = step.engine, step.teacher, state.kinds
    assert teacher is not None
    engine.load_master(WholeTensors(kinds["weights"]))
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(kinds["buffers"][name])
    keys = [kind.removeprefix("optimizer ") for kind in kinds if kind.startswith("optimizer ")]

    def moment(key: str, fragment: Fragment) -> Tensor:
        return _part(kinds[f"optimizer {key}"], fragment)

    def holds(key: str, name: str) -> bool:
        return name in kinds.get(f"optimizer {key}", {})

    engine.load_optimizer(SavedOptimizer(keys, state.scalars, {}, holds, moment))
    averaged = [f.like(_part(kinds["teacher"], f)) for f in teacher.fragments]
    teacher.load(averaged, kinds["teacher's buffers"], state.updates)
    step.algorithm.load_state_dict(kinds["algorithm"])
    step.attempts, step.applied_steps = state.attempts, state.applied


def _part(whole: dict[str, Tensor], fragment: Fragment) -> Tensor:
    end = fragment.start + len(fragment.values)
    return whole[fragment.name].view(-1)[fragment.start : end]


def do(
    step: SemiSupervisedStep, number: int, batches: GiveBatches = global_batches
) -> dict[str, float]:
    """Do a step of a run, on this rank's slices; its metrics."""
    engine = step.engine
    own = [slice_of(batch, engine.rank, engine.world_size) for batch in batches(number)]
    outcome = step(*own, measure=True)
    assert outcome.applied
    return dict(outcome.metrics) | {"grad_norm": outcome.grad_norm or 0.0}


def record(
    step: SemiSupervisedStep,
    numbers: Iterable[int],
    batches: GiveBatches = global_batches,
    tolerance: float = TOLERANCE,
    build: Build | None = None,
) -> Recorded:
    """Do all steps up to the last of these numbers, and record these. Collective."""
    found, numbers = Recorded(), set(numbers)
    for number in range(max(numbers) + 1):
        if number not in numbers:
            found.curve.append(do(step, number, batches))
            continue
        before = state_of(step, build)
        nudged = []
        for kinds in _nudged(before.kinds, number):
            start = replace(before, kinds=kinds)
            put(step, start)
            nudged.append(Step(start, do(step, number, batches), state_of(step, build)))
        put(step, before)
        found.curve.append(do(step, number, batches))
        done = Step(before, found.curve[-1], state_of(step, build))
        firm = not any(
            differences(_with_teacher(other, done), done, tolerance / 2) for other in nudged
        )
        found.steps[number] = replace(done, firm=firm)
    assert 2 * len(found.firm) > len(found.steps), "most steps hang on rounding; change settings"
    return found


def _with_teacher(step: Step, other: Step) -> Step:
    """The step as if its teacher had been updated as another's; else it shows the nudge itself."""
    before, after = ({"teacher": s.kinds["teacher"]} for s in (other.before, other.after))
    return replace(
        step,
        before=replace(step.before, kinds=step.before.kinds | before),
        after=replace(step.after, kinds=step.after.kinds | after),
    )


def _nudged(kinds: Kinds, seed: int) -> Iterable[Kinds]:
    """The same with other weights, as rounding might have left them, in pairs."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_NUDGES):
        ways = {n: torch.randn(w.shape, generator=generator) for n, w in kinds["weights"].items()}
        for size in (_NUDGE, -_NUDGE):
            yield kinds | {
                kind: {
                    name: values * (1 + size * ways[name]) for name, values in kinds[kind].items()
                }
                for kind in ("weights", "teacher")
            }


def follow(
    step: SemiSupervisedStep,
    recorded: Recorded,
    batches: GiveBatches = global_batches,
    tolerance: float = TOLERANCE,
    build: Build | None = None,
) -> dict[int, list[str]]:
    """Do the firm steps of a recorded run from their states; by number, how the outcome differs.

    Collective: every rank must call, and all get the same.
    """
    firm = recorded.firm
    if 0 in firm:  # no state is put in its place before it is seen that the run begins with it
        assert not differences_of_kinds(state_of(step, build).kinds, firm[0].before.kinds)
    found = {}
    for number, wanted in firm.items():
        put(step, wanted.before)
        metrics = do(step, number, batches)
        done = Step(wanted.before, metrics, state_of(step, build))
        found[number] = differences(done, wanted, tolerance)
    return {number: told for number, told in found.items() if told}


def differences_of_kinds(found: Kinds, wanted: Kinds) -> list[str]:
    """The names of what is not equal, bit for bit."""
    return [
        f"{kind} {name}"
        for kind, values in wanted.items()
        for name, value in values.items()
        if not torch.equal(found[kind][name], value)
    ]


def differences(found: Step, wanted: Step, tolerance: float = TOLERANCE) -> list[str]:
    """A line for every metric and every part of the state that the steps disagree on."""
    lines = []
    if found.metrics.keys() != wanted.metrics.keys():
        lines.append(f"metrics {sorted(found.metrics)}, not {sorted(wanted.metrics)}")
    for name, value in wanted.metrics.items():
        gap = abs(found.metrics.get(name, value) - value)
        if not gap <= tolerance * abs(value) + tolerance / 50:  # NaN is a difference too
            lines.append(f"{name} {found.metrics[name]:.7g}, not {value:.7g}")
    for kind, values in wanted.after.kinds.items():
        # Of the weights together: a bias before a normalisation has a gradient of rounding alone.
        names = [[name] for name in values] if kind == "algorithm" else [list(values)]
        for part in names:
            whole = [name for name in part if not values[name].is_floating_point()]
            if any(not torch.equal(found.after.kinds[kind][n], values[n]) for n in whole):
                lines.append(f"{kind} {', '.join(whole)}")
            floats = [name for name in part if values[name].is_floating_point()]
            told = _apart(found, wanted, kind, floats, tolerance) if floats else None
            lines += (
                [f"{kind} {', '.join(floats) if len(part) == 1 else ''}: {told}"] if told else []
            )
    counts = [(s.after.attempts, s.after.applied, s.after.updates) for s in (found, wanted)]
    return lines if counts[0] == counts[1] else [*lines, f"counters {counts[0]}, not {counts[1]}"]


def _apart(found: Step, wanted: Step, kind: str, names: list[str], tolerance: float) -> str | None:
    """How far two updates are apart, where that is too far."""
    ends = [_flat(step.after.kinds[kind], names) for step in (found, wanted)]
    if len(ends[0]) != len(ends[1]):
        return f"{len(ends[0])} numbers, not {len(ends[1])}"
    starts = [
        _flat(step.before.kinds[kind], names) if kind in step.before.kinds else 0 * end
        for step, end in zip((found, wanted), ends, strict=True)
    ]
    grown = len(starts[1]) != len(ends[1])  # such as a table of the rows seen
    updates = [end if grown else end - start for start, end in zip(starts, ends, strict=True)]
    gap, length = (updates[0] - updates[1]).norm(), updates[1].norm()
    if gap <= tolerance * length + _ROUNDING * ends[1].norm():
        return None
    return f"updates {gap:.3g} apart, {length:.3g} long"


def _flat(values: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([values[name].double().view(-1) for name in names])
