"""Small real training set-ups that several tests share."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hpdist.algorithms import Algorithm, FixMatch, FreeMatch, Ladder, MeanTeacher, Supervised
from hpdist.data.batch import LabeledBatch, StoredTensors, UnlabeledBatch
from hpdist.data.views import ImageViewsConfig
from hpdist.distributed.batch_norm import global_batch_norm
from hpdist.engines import launch
from hpdist.engines.config import LossScale, Shard
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.engines.prepare import prepare
from hpdist.models import CNN, LadderMLP
from hpdist.models.with_heads import with_heads
from hpdist.train.step import SemiSupervisedStep

LABELED, UNLABELED = 16, 48


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Real scans: uint8 [1797, 1, 8, 8] and labels [1797]."""
    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None]
    return images, torch.from_numpy(data.target).long()


def make_algorithm(name: str) -> Algorithm:
    """An algorithm whose thresholds let some rows pass from the first steps on."""
    if name == "supervised":
        return Supervised()
    if name == "fixmatch":
        return FixMatch(threshold=0.15)
    if name == "mean_teacher":
        return MeanTeacher(unsupervised_weight=5.0)
    return FreeMatch(10, momentum=0.9, fairness_weight=0.05)


def global_batches(step: int) -> tuple[LabeledBatch, UnlabeledBatch]:
    """The global batches of a step, the same on every rank."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(1000 + step)
    rows = torch.randperm(len(images), generator=generator)[: LABELED + UNLABELED]
    x, u = rows[:LABELED], rows[LABELED:]
    return LabeledBatch(images[x], labels[x], x), UnlabeledBatch(images[u], u, stored=stored(u))


def stored(ids: Tensor) -> StoredTensors:
    """Labels of rows as if some models had predicted them; every seventh row has none."""
    there = (ids % 7 != 3).float()
    probabilities = (ids[:, None] * (1 + torch.arange(10))).sin().mul(3).softmax(dim=1)
    probabilities = probabilities * there[:, None]
    return StoredTensors(
        probabilities=probabilities,
        confidence=probabilities.amax(dim=1),
        agreement=(1 + ids % 2) / 2 * there,
    )


def slice_of(batch: Any, rank: int, ranks: int) -> Any:
    """A rank's contiguous slice of a global batch."""
    part = len(batch) // ranks
    return batch.narrow(rank * part, part)


def make_model(
    algorithm: Algorithm, norm: str = "group", smooth: bool = False, width: int = 8
) -> nn.Module:
    """A small CNN for digits, or a ladder network, with the heads that the algorithm wants.

    A smooth one has SiLU in place of ReLU, whose gradient jumps where rounding decides of a sign.
    """
    torch.manual_seed(0)
    if isinstance(algorithm, Ladder):
        model: nn.Module = LadderMLP(64, [32], 10, noise=0.0)
    else:
        cnn = CNN(1, width, 10, norm)  # type: ignore[arg-type]
        if smooth:
            for number, layer in enumerate(cnn.features):
                if isinstance(layer, nn.ReLU):
                    cnn.features[number] = nn.SiLU()
        model = global_batch_norm(cnn)
    return with_heads(model, algorithm, torch.zeros(2, 1, 8, 8))


def sharded_by(stage: int | str | None, offload: Any = "none") -> dict[str, Any]:
    """The settings of an execution plan for a ZeRO stage, or FSDP2, which every block is a unit of.

    `fsdp2` releases weights after each forward, and `fsdp2 whole` does not.
    """
    if not isinstance(stage, str):
        return {"stage": stage, "offload": offload}
    engine, _, whole = stage.partition(" ")
    shard = Shard(engine=engine, reshard_after_forward=not whole, min_parameters=0, offload=offload)
    return {"shard": shard}


def make_step(
    algorithm: str | Algorithm,
    *,
    norm: str = "group",
    smooth: bool = False,
    width: int = 8,
    micro_batches: int = 1,
    precision: Any = "fp32",
    stage: int | str | None = None,
    offload: Any = "none",
    lr: float = 0.01,
    optimizer: str = "sgd",
    accelerator: Accelerator | None = None,
    **options: Any,
) -> SemiSupervisedStep:
    """A step on a small CNN for digits, on however many ranks were launched."""
    plan: ExecutionPlan | None = None
    if accelerator is None:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        plan = ExecutionPlan(
            precision=precision,
            **sharded_by(stage, offload),
            grad_clip=options.get("grad_clip"),
            loss_scale=options.get("loss_scale") or LossScale(),
            micro_batch=(LABELED + UNLABELED) // ranks // micro_batches,
            accumulation=micro_batches,
        )
        AcceleratorState._reset_state(reset_partial_state=True)  # of a step made before
        accelerator = launch.make_accelerator(plan)
    if isinstance(algorithm, str):
        algorithm = make_algorithm(algorithm)
    model = make_model(algorithm, norm, smooth, width)
    if optimizer == "sgd":
        made: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=0.9, nesterov=True
        )
    else:
        made = torch.optim.AdamW(model.parameters(), lr=lr)
    model, made = prepare(accelerator, model, made, plan)
    return SemiSupervisedStep(
        accelerator,
        model,
        made,
        algorithm,
        ImageViewsConfig().build(0),
        micro_batches=micro_batches,
        precision=precision,
        **options,
    )


def train(step: SemiSupervisedStep, steps: int) -> list[dict[str, float]]:
    """Train on the digits; the metrics of every step."""
    engine = step.engine
    curve = []
    for number in range(steps):
        batches = [slice_of(b, engine.rank, engine.world_size) for b in global_batches(number)]
        outcome = step(*batches, measure=True)
        curve.append(dict(outcome.metrics) | {"applied": outcome.applied})
    return curve
