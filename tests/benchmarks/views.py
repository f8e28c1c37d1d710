"""How fast the views of each modality are made, and what share of a FixMatch step they take.

    python -m tests.benchmarks.views [--rounds 7] [--maps]

Of each modality a FixMatch step is timed whole, in turns with its views alone (a weak view of the
labelled rows, a weak and a strong one of the unlabelled rows), and with each kind of view alone.
Prints Markdown and writes `results/views.md`. With `--maps`, only image views are timed, in turns
with and without the maps that they applied, and `results/view_maps.md` is written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpdist.algorithms import FixMatch
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.decode.text import Vocabulary
from hpdist.data.views import ImageViewsConfig, TableViewsConfig, TextViewsConfig
from hpdist.distributed.batch_norm import global_batch_norm
from hpdist.models import MLP, WideResNet
from hpdist.train.step import SemiSupervisedStep

RESULTS = Path(__file__).parent / "results" / "views.md"
MAPS = RESULTS.with_name("view_maps.md")
CLASSES, FEATURES, TOKENS = 10, 30, 64
LIMIT = 0.20
VOCABULARY = Vocabulary(size=1000, special=(0, 1, 2), pad=0, mask=3)


@dataclass(frozen=True)
class Case:
    """A modality with a model of its own."""

    name: str
    model: Callable[[], nn.Module]
    views: Any
    rows: Callable[[int], Tensor]
    labeled: int
    unlabeled: int


def images(side: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randint(256, (rows, 3, side, side), dtype=torch.uint8)


def tokens(rows: int) -> Tensor:
    ids = torch.randint(4, VOCABULARY.size, (rows, TOKENS))
    ids[:, 0], ids[:, -1] = 1, 2
    return ids


class Bert(nn.Module):
    """A small BERT: 4 layers of width 256."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=VOCABULARY.size,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            num_labels=CLASSES,
        )
        self.bert = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.bert(ids, attention_mask=(ids != VOCABULARY.pad).long()).logits
        return logits


def cases() -> list[Case]:
    table = TableViewsConfig().build(0)
    table.fit([torch.randn(1000, FEATURES).numpy()], ())
    text = TextViewsConfig(max_length=TOKENS).build(0, VOCABULARY)
    image = ImageViewsConfig().build(0)
    mlp = lambda: MLP(FEATURES, [256, 256], CLASSES)  # noqa: E731
    wrn = lambda: global_batch_norm(WideResNet(3, CLASSES))  # noqa: E731
    return [
        Case("image 32 px, WRN-28-2", wrn, image, images(32), 8, 56),
        Case("image 224 px, WRN-28-2", wrn, image, images(224), 1, 7),
        Case(f"text {TOKENS} tokens, BERT 4 x 256", Bert, text, tokens, 8, 56),
        Case(
            f"table {FEATURES} features, MLP 256 + 256",
            mlp,
            table,
            lambda rows: torch.randn(rows, FEATURES),
            64,
            448,
        ),
    ]


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds by round: of a whole step, of its views, and of each kind of view on its own."""
    torch.manual_seed(0)
    accelerator = Accelerator()
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    step = SemiSupervisedStep(accelerator, prepared, optimizer, FixMatch(0.3), case.views)
    x, u = case.rows(case.labeled), case.rows(case.unlabeled)
    x_at, u_at = torch.arange(len(x)), torch.arange(len(u))
    labels = torch.randint(CLASSES, (len(x),))
    device = accelerator.device
    own_x, own_u = x.to(device), u.to(device)

    @torch.no_grad()
    def weak_labeled() -> object:
        return case.views.weak(own_x, stream="labeled", step=0, positions=x_at)

    @torch.no_grad()
    def weak() -> object:
        return case.views.weak(own_u, stream="unlabeled", step=0, positions=u_at)

    @torch.no_grad()
    def strong() -> object:
        return case.views.strong(own_u, stream="unlabeled", step=0, positions=u_at)

    calls: dict[str, Callable[[], object]] = {
        "step": lambda: step(LabeledBatch(x, labels, x_at), UnlabeledBatch(u, u_at)),
        "views": lambda: (weak_labeled(), weak(), strong()),
        "weak": weak,
        "strong": strong,
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            taken = seconds(call)
            if number:  # the first warms up
                found[name].append(taken)
    return found


@torch.no_grad()
def measure_maps(rounds: int) -> str:
    """What a view takes with its maps, as a ratio to the view without them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    views = ImageViewsConfig().build(0)
    lines = ["| | rows | view | view, ms | with maps / without |", "|---|---|---|---|---|"]
    for side, rows in ((32, 448), (224, 16)):
        x, at = images(side)(rows).to(device), torch.arange(rows)
        for kind in ("weak", "strong"):
            plain, mapped = getattr(views, kind), getattr(views, f"{kind}_with_maps")
            taken: list[tuple[float, float]] = []
            for step in range(rounds + 1):
                calls = [
                    partial(f, x, stream="unlabeled", step=step, positions=at)
                    for f in (plain, mapped)
                ]
                taken.append((seconds(calls[0], clock), seconds(calls[1], clock)))
            ratios = [second / first for first, second in taken[1:]]  # the first warms up
            middle = statistics.median(first for first, _ in taken[1:]) * 1000
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(f"| image {side} px | {rows} | {kind} | {middle:.1f} | {spread} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--maps", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.maps:
        text = (
            "# Views with their maps\n\n`python -m tests.benchmarks.views --maps`, "
            f"{'GPU' if torch.cuda.is_available() else 'CPU time of one thread'}, medians of "
            f"{options.rounds} rounds in which both take turns. Views without maps make none.\n\n"
            + measure_maps(options.rounds)
        )
        MAPS.write_text(text, encoding="utf-8")
        print(text)
        return
    where = "GPU" if torch.cuda.is_available() else "CPU, one thread"
    lines = [
        "# Views",
        "",
        f"`python -m tests.benchmarks.views`, {where}, fp32, medians of {options.rounds} rounds in "
        "which step and views take turns. The share is that of all views in the whole step, by "
        f"round; of a WRN-28-2 step on 32 px it may be at most {LIMIT:.0%}.",
        "",
        "| | rows a step | weak, rows/s | strong, rows/s | step, s | share of views in it |",
        "|---|---|---|---|---|---|",
    ]
    shares = {}
    for case in cases():
        found = measure(case, options.rounds)
        by_round = [a / b for a, b in zip(found["views"], found["step"], strict=True)]
        middle = {name: statistics.median(times) for name, times in found.items()}
        shares[case.name] = statistics.median(by_round)
        lines.append(
            f"| {case.name} | {case.labeled} + {case.unlabeled} "
            f"| {case.unlabeled / middle['weak']:,.0f} "
            f"| {case.unlabeled / middle['strong']:,.0f} | {middle['step']:.4f} "
            f"| {shares[case.name]:.1%} ({min(by_round):.1%} to {max(by_round):.1%}) |"
        )
    first, share = next(iter(shares.items()))
    kept = "kept" if share <= LIMIT else "NOT kept"
    lines += ["", f"{first}: {share:.1%} of the step, the limit of {LIMIT:.0%} is {kept}."]
    text = "\n".join(lines) + "\n"
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
