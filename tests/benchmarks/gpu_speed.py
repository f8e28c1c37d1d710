"""Images per second of hpdist and of a bare loop with the same maths, and how busy the device is.

    python -m tests.benchmarks.gpu_speed [--seconds 120] [--dry-run]

A part of `tests.benchmarks.gpu`. FixMatch; the two take turns, in blocks of steps at whose ends the
device is waited for, and a ratio is that of two blocks of one round. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpdist.data.views import ImageViewsConfig
from hpdist.engines.config import Precision
from hpdist.models import WideResNet
from tests.benchmarks.plain_loop import PlainLoop, hpdist_loop
from tests.benchmarks.step_time import CLASSES
from tests.gpu.device import begin_dry_run, wait_for

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
BLOCK = 0.4  # seconds, about
LEAST_ROUNDS, MOST_ROUNDS = 3, 40
PROFILED = 5  # steps
Loop = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Case:
    """A model and a batch for it."""

    name: str
    model: Callable[[], nn.Module]
    side: int
    labeled: int
    unlabeled: int

    def batch(self, pinned: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Labelled rows, their labels and unlabelled rows, on the CPU as a stream gives them."""
        rows = [
            torch.randint(256, (count, 3, self.side, self.side), dtype=torch.uint8)
            for count in (self.labeled, self.unlabeled)
        ]
        labels = torch.randint(CLASSES, (self.labeled,))
        batch = (rows[0], labels, rows[1])
        return tuple(part.pin_memory() for part in batch) if pinned else batch  # type: ignore[return-value]


class VisionTransformer(nn.Module):
    """ViT with patches of 16 x 16, from `transformers`, without trained weights."""

    def __init__(self, side: int, width: int, layers: int) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            image_size=side,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            num_labels=CLASSES,
        )
        self.vit = ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [rows, classes] of images [rows, 3, side, side]."""
        logits: Tensor = self.vit(images).logits
        return logits


def cases(tiny: bool) -> list[Case]:
    """The cases; the tiny ones have the same names and kinds."""
    if tiny:
        return [
            Case("WRN-28-2", lambda: WideResNet(3, CLASSES, 10, 1), 8, 2, 4),
            Case("WRN-28-10", lambda: WideResNet(3, CLASSES, 10, 1), 8, 2, 4),
            Case("ViT-B/16", lambda: VisionTransformer(32, 64, 1), 32, 2, 4),
        ]
    return [
        Case("WRN-28-2", lambda: WideResNet(3, CLASSES, 28, 2), 32, 64, 448),
        Case("WRN-28-10", lambda: WideResNet(3, CLASSES, 28, 10), 32, 64, 448),
        Case("ViT-B/16", lambda: VisionTransformer(224, 768, 12), 224, 16, 112),
    ]


def block_seconds(loop: Loop, batch: Sequence[Any], steps: int, device: torch.device) -> float:
    """Seconds of some steps, from an idle device to an idle device."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(steps):
        loop(*batch)
    wait_for(device)
    return time.perf_counter() - start


def rounds_of(
    loops: Sequence[Loop], batch: Sequence[Any], seconds: float, device: torch.device
) -> Iterator[list[float]]:
    """Seconds of a step of each loop, round by round, until the time is up."""
    ends = time.monotonic() + seconds
    for loop in loops:
        block_seconds(loop, batch, 3, device)  # warms up
    step = max(block_seconds(loop, batch, 1, device) for loop in loops)
    steps = min(max(round(BLOCK / step), 1), 50)
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.monotonic() > ends:
            return
        order = list(enumerate(loops))[:: 1 if number % 2 else -1]
        taken = {at: block_seconds(loop, batch, steps, device) / steps for at, loop in order}
        yield [taken[at] for at in range(len(loops))]


def busy_share(loop: Loop, batch: Sequence[Any], device: torch.device) -> float | None:
    """The share of a few steps' time in which the device computes or copies; None if unknown.

    It is known where torch's profiler is given the device's own events.
    """
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        block_seconds(loop, batch, PROFILED, device)
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        return None
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return covered(spans)


def covered(spans: Sequence[tuple[int, int]]) -> float | None:
    """The share of the time from the first beginning to the last end that is in any span."""
    if not spans:
        return None
    ordered = sorted(spans)
    busy, reached = 0, ordered[0][0]
    for begin, end in ordered:
        busy += max(end - max(begin, reached), 0)
        reached = max(reached, end)
    whole = reached - ordered[0][0]
    return busy / whole if whole else None


def measure(case: Case, precision: Precision, seconds: float, device: torch.device) -> str:
    """A line of the table."""
    torch.manual_seed(0)
    model, views = case.model(), ImageViewsConfig().build(0)
    head = f"| {case.name} | {case.labeled} + {case.unlabeled} | {precision} "
    try:
        bare: Loop = PlainLoop(copy.deepcopy(model), views, precision=precision)
        ours: Loop = hpdist_loop(model, views, precision)
        batch = case.batch(pinned=device.type == "cuda")
        times = list(rounds_of([ours, bare], batch, seconds, device))
        shares = [busy_share(loop, batch, device) for loop in (ours, bare)]
    except torch.OutOfMemoryError as error:
        return f"{head}| out of memory: {str(error).splitlines()[0][:80]} | | | | |"
    rows = case.labeled + case.unlabeled
    speeds = [rows / statistics.median(times_of) for times_of in zip(*times, strict=True)]
    ratios = [own / other for own, other in times]
    ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    busy = " | ".join("-" if share is None else f"{share:.0%}" for share in shares)
    return f"{head}| {speeds[0]:,.0f} | {speeds[1]:,.0f} | {ratio} | {len(times)} | {busy} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run:
        begin_dry_run()
    device = torch.device("cpu" if options.dry_run else "cuda")
    print(
        "| model | rows a step | precision | hpdist, images/s | bare loop, images/s | "
        "time of hpdist / bare loop: median (min to max) | rounds | "
        "device busy, hpdist | bare loop |\n|---|---|---|---|---|---|---|---|---|"
    )
    wanted = [(case, precision) for case in cases(options.dry_run) for precision in PRECISIONS]
    ends = time.monotonic() + options.seconds
    for number, (case, precision) in enumerate(wanted):
        left = (ends - time.monotonic()) / (len(wanted) - number)
        print(measure(case, precision, 0.7 * left, device), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
