"""What every algorithm and add-on costs: state, collectives, time; FlexMatch's update by rows.

    python -m tests.benchmarks.algorithm_cost [--rounds 15]

Times are of a step of a small CNN on digits, one process of one thread; all take turns, and a ratio
is that of a round. Collectives and state are those of two processes: DDP's own gradients, weights
of heads and teacher are left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hpdist.algorithms import Algorithm, AlgorithmConfig, FlexMatch, WeakOutputs
from hpdist.algorithms.addons.base import AddOnConfig, build_algorithm
from hpdist.algorithms.positions import BatchPositions
from hpdist.config.component import component_names, components
from tests.benchmarks.stream_files import spread
from tests.support.ranks import run_ranks
from tests.support.recipes import digits, global_batches, make_model, make_step, slice_of

CLASSES, BATCH = 10, 448
BASE = "fixmatch"
SIZES = (50_000, 1_000_000, 10_000_000)
RANKS = (1, 8)


def names() -> list[str]:
    """Every algorithm, and every add-on around one."""
    return [*component_names("algorithm"), *(f"{BASE} {name}" for name in component_names("addon"))]


def build(name: str) -> Algorithm:
    """With its defaults, but for what the batch of the digits cannot be divided into."""
    algorithms = cast(dict[str, type[AlgorithmConfig]], components("algorithm"))
    addons = cast(dict[str, type[AddOnConfig]], components("addon"))
    first, *others = name.split()
    options: dict[str, Any] = {"strong_views": 2} if first == "remixmatch" else {}
    made = build_algorithm(
        algorithms[first](name=first, **options),
        [addons[other](name=other) for other in others],
        CLASSES,
        steps=1000,
    )
    made.rows = len(digits()[0])
    made.class_counts = digits()[1].bincount(minlength=CLASSES).float()
    return made


def prepared(name: str) -> tuple[Callable[[int], None], Algorithm]:
    """A function that does step number so and so, and the algorithm."""
    algorithm = build(name)
    options: dict[str, Any] = {}
    if algorithm.views.teacher:
        options["teacher_model"] = make_model(algorithm)
    step = make_step(algorithm, **options)
    engine = step.engine

    def run(number: int) -> None:
        batches = [slice_of(b, engine.rank, engine.world_size) for b in global_batches(number)]
        step(*batches)

    return run, algorithm


def count() -> dict[str, tuple[int, int, int]]:
    """Collectives of one step, the numbers that are summed, bytes of state; on this rank."""
    calls: list[int] = []
    inner = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return inner(tensor, *args, **kwargs)

    found = {}
    for name in names():
        run, algorithm = prepared(name)
        run(0)
        calls.clear()
        dist.all_reduce = counted
        try:
            run(1)
        finally:
            dist.all_reduce = inner
        found[name] = (len(calls), sum(calls), state_bytes(algorithm))
    return found


def timed(rounds: int) -> dict[str, list[float]]:
    """Seconds of a step, round by round."""
    runs = {name: prepared(name)[0] for name in names()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            runs[name](number)
            if number >= 2:  # the first warm up
                found[name].append(time.perf_counter() - start)
    return found


def state_bytes(algorithm: Algorithm) -> int:
    """Of what this rank holds of the state."""
    shards = algorithm.shards()
    held = [value for name, value in algorithm.state_dict().items() if name not in shards]
    held += [part for parts in shards.values() for _, part in parts]
    return sum(value.numel() * value.element_size() for value in held)


def costs(rounds: int) -> None:
    """The first table."""
    counted = run_ranks(2, count, timeout=1200)
    seconds = timed(rounds)
    print(
        f"CNN of width 8, 16 + 48 digits a step, {rounds} rounds. Time: median (quartiles) of the "
        f"ratio to the labels alone and to {BASE}.\n"
    )
    print(f"| | state of a rank, bytes | collectives | numbers summed | time | time by {BASE} |")
    print("|---|---|---|---|---|---|")
    for name in names():
        calls, numbers, _ = counted[0][name]
        held = max(found[name][2] for found in counted)
        ratios = [
            spread([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])
            for base in ("supervised", BASE)
        ]
        told = name.replace(" ", " + ")
        print(f"| {told} | {held:,} | {calls} | {numbers:,} | {' | '.join(ratios)} |")
    print()


def update(algorithm: FlexMatch, rows: int, seed: int) -> float:
    """Seconds that a step's part in the table takes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(rows, (BATCH,), generator=generator)
    logits = 5 * torch.randn(BATCH, CLASSES, generator=generator)
    positions = BatchPositions(torch.arange(1), torch.arange(BATCH), 1, BATCH, 0, seed)
    weak = WeakOutputs(logits, ids, positions=positions)
    start = time.perf_counter()
    sums = algorithm.statistics(weak) | algorithm.rank_statistics()
    algorithm.observe(sums, torch.tensor(float(BATCH)))
    algorithm.commit()
    return time.perf_counter() - start


def flexmatch(rounds: int) -> None:
    """The second table."""
    made = {}
    for shape in ((ranks, rows) for ranks in RANKS for rows in SIZES):
        made[shape] = FlexMatch(CLASSES, threshold=0.8, rows=shape[1])
        made[shape].bind_rank(0, shape[0])
        update(made[shape], shape[1], 0)
    found: dict[tuple[int, int], list[float]] = {shape: [] for shape in made}
    for number in range(1, 20 * rounds + 1):
        for shape, algorithm in made.items():
            found[shape].append(update(algorithm, shape[1], number))
    print(
        f"FlexMatch's update for {BATCH} rows on the first of some ranks, {20 * rounds} rounds.\n"
    )
    print("| ranks | rows of the table | state of the rank, bytes | ms | by the first line |")
    print("|---|---|---|---|---|")
    first = found[RANKS[0], SIZES[0]]
    for (ranks, rows), seconds in found.items():
        ratio = spread([a / b for a, b in zip(seconds, first, strict=True)])
        size = state_bytes(made[ranks, rows])
        median = 1e3 * statistics.median(seconds)
        print(f"| {ranks} | {rows:,} | {size:,} | {median:.2f} | {ratio} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", nargs="+", default=["costs", "flexmatch"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if "costs" in options.parts:
        costs(options.rounds)
    if "flexmatch" in options.parts:
        flexmatch(options.rounds)


if __name__ == "__main__":
    main()
