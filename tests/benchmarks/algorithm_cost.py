"""What every algorithm and add-on costs: state, collectives, time; FlexMatch's update by rows.

    python -m tests.benchmarks.algorithm_cost [--rounds 15]

Times are of a step of a small CNN on digits, one process of one thread; all take turns, and a ratio
is that of a round. Collectives are counted on two processes, DDP's own gradients left out.
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
from hpdist.algorithms.addon import AddOnConfig, build_algorithm
from hpdist.algorithms.base import Places
from hpdist.config import component_names, components
from tests.benchmarks.stream_files import spread
from tests.ranks import run_ranks
from tests.recipes import digits, global_batches, make_model, make_step, slice_of

CLASSES, BATCH = 10, 448
BASE = "fixmatch"
SIZES = (50_000, 1_000_000, 10_000_000)


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


def prepared(name: str) -> Callable[[int], None]:
    """A function that does step number so and so."""
    algorithm = build(name)
    options: dict[str, Any] = {}
    if algorithm.views.teacher:
        options["teacher_model"] = make_model(algorithm)
    step = make_step(algorithm, **options)
    engine = step.engine

    def run(number: int) -> None:
        batches = [slice_of(b, engine.rank, engine.world_size) for b in global_batches(number)]
        step(*batches)

    return run


def count() -> dict[str, tuple[int, int]]:
    """Collectives of one step, and the numbers that are summed; on this rank."""
    calls: list[int] = []
    inner = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return inner(tensor, *args, **kwargs)

    found = {}
    for name in names():
        run = prepared(name)
        run(0)
        calls.clear()
        dist.all_reduce = counted
        try:
            run(1)
        finally:
            dist.all_reduce = inner
        found[name] = (len(calls), sum(calls))
    return found


def timed(rounds: int) -> dict[str, list[float]]:
    """Seconds of a step, round by round."""
    runs = {name: prepared(name) for name in names()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            runs[name](number)
            if number >= 2:  # the first warm up
                found[name].append(time.perf_counter() - start)
    return found


def state_bytes(name: str) -> int:
    """Of the algorithm's state after a step, without weights of heads or teacher."""
    algorithm = build(name)
    step = make_step(algorithm)
    step(*global_batches(0))
    return sum(value.numel() * value.element_size() for value in algorithm.state_dict().values())


def costs(rounds: int) -> None:
    """The first table."""
    collectives = run_ranks(2, count, timeout=1200)[0]
    seconds = timed(rounds)
    print(
        f"CNN of width 8, 16 + 48 digits a step, {rounds} rounds. Time: median (quartiles) of the "
        f"ratio to the labels alone and to {BASE}.\n"
    )
    print(f"| | state, bytes | collectives | numbers summed | time | time by {BASE} |")
    print("|---|---|---|---|---|---|")
    for name in names():
        calls, numbers = collectives[name]
        ratios = [
            spread([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])
            for base in ("supervised", BASE)
        ]
        told = name.replace(" ", " + ")
        print(f"| {told} | {state_bytes(name):,} | {calls} | {numbers:,} | {' | '.join(ratios)} |")
    print()


def update(algorithm: FlexMatch, rows: int, seed: int) -> float:
    """Seconds that a step's part in the table takes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(rows, (BATCH,), generator=generator)
    logits = 5 * torch.randn(BATCH, CLASSES, generator=generator)
    places = Places(torch.arange(1), torch.arange(BATCH), 1, BATCH, 0, seed)
    weak = WeakOutputs(logits, ids, places=places)
    start = time.perf_counter()
    algorithm.observe(algorithm.statistics(weak), torch.tensor(float(BATCH)))
    algorithm.commit()
    return time.perf_counter() - start


def flexmatch(rounds: int) -> None:
    """The second table."""
    made = {}
    for rows in SIZES:
        made[rows] = FlexMatch(CLASSES, threshold=0.8)
        made[rows].rows = rows
        update(made[rows], rows, 0)
    found: dict[int, list[float]] = {rows: [] for rows in SIZES}
    for number in range(1, 20 * rounds + 1):
        for rows, algorithm in made.items():
            found[rows].append(update(algorithm, rows, number))
    print(f"FlexMatch's update for {BATCH} rows, {20 * rounds} rounds.\n")
    print("| rows of the table | table, bytes | ms | by the smallest |")
    print("|---|---|---|---|")
    for rows in SIZES:
        ratio = spread([a / b for a, b in zip(found[rows], found[SIZES[0]], strict=True)])
        size = sum(v.numel() * v.element_size() for v in made[rows].state_dict().values())
        print(f"| {rows:,} | {size:,} | {1e3 * statistics.median(found[rows]):.2f} | {ratio} |")


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
