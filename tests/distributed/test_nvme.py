"""ZeRO-3 with optimizer and parameters on NVMe, by DeepSpeed's async_io operator on CPU ranks."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from hpdist.data.samples.digits import write_digits
from hpdist.data.views import ImageViewsConfig
from hpdist.engines import launch
from hpdist.engines.config import LossScale
from hpdist.engines.operators import prepare_operators
from hpdist.engines.prepare import prepare
from hpdist.engines.zero3 import PartitionedEngine
from hpdist.models import MLP
from hpdist.train.step import SemiSupervisedStep
from tests.support.ranks import run_ranks
from tests.support.recipes import LABELED, UNLABELED, digits, make_algorithm, train

pytestmark = pytest.mark.slow  # building the operator alone takes minutes, once

STEPS = 5
PRECISIONS = ["fp32", "bf16", "fp16"]
HIDDEN = [1024, 1024]  # on 2 ranks a bf16 shard of the middle weight is the 1 MiB that is swapped


def build_operator() -> bool:
    """Whether there is a libaio to build async_io on; builds it, which takes minutes once.

    A run builds it with the same flags: with DeepSpeed's own the next rank would build it anew.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        return False
    prepare_operators([AsyncIOBuilder()], print, None)
    return True


@pytest.fixture(scope="module", autouse=True)
def _async_io() -> None:
    if not run_ranks(1, build_operator, timeout=1800)[0]:
        pytest.skip("libaio-dev is not installed, on which DeepSpeed's async_io is built")


def write_config(folder: Path, nvme: bool) -> str:
    """A DeepSpeed JSON with two sub-groups and every parameter on NVMe, none kept in memory."""
    zero: dict[str, Any] = {"stage": 3, "sub_group_size": 500_000}
    if nvme:
        place = {"device": "nvme", "nvme_path": str(folder)}
        zero["offload_optimizer"] = place
        zero["offload_param"] = place | {"max_in_cpu": 0, "buffer_size": 1_100_000}
    file = folder / f"{'nvme' if nvme else 'memory'}-{os.environ.get('RANK')}.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    return str(file)


def make_step(
    folder: Path, nvme: bool, precision: Any, algorithm: str = "fixmatch"
) -> SemiSupervisedStep:
    AcceleratorState._reset_state(reset_partial_state=True)
    ranks = int(os.environ["WORLD_SIZE"])
    sharding = launch.ExecutionPlan(
        precision=precision,
        stage=3,
        offload="nvme" if nvme else "none",
        nvme_path=str(folder) if nvme else None,
        micro_batch=(LABELED + UNLABELED) // ranks,
        loss_scale=LossScale(initial=2.0**18),  # overflows in the first steps of fp16
        deepspeed=write_config(folder, nvme),
    )
    accelerator = launch.make_accelerator(sharding)
    torch.manual_seed(0)
    replica = MLP(64, HIDDEN, 10) if algorithm == "mean_teacher" else None
    model = MLP(64, HIDDEN, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = prepare(accelerator, model, optimizer)
    return SemiSupervisedStep(
        accelerator,
        model,
        optimizer,
        make_algorithm(algorithm),
        ImageViewsConfig().build(0),
        decay=0.9,
        teacher_model=replica,
    )


@dataclass
class Trained:
    """What a run leaves, and where it kept it."""

    losses: list[float]
    applied: list[bool]
    tensors: dict[str, Tensor]
    """The whole master weights, teacher and moments."""
    outputs: list[Tensor] = field(default_factory=list)
    """Of the student, of the lent teacher, and of the student again."""
    expected: Tensor | None = None
    """What a whole model with the teacher's weights puts out."""
    swapped: list[bool] = field(default_factory=list)
    homes: dict[str, str] = field(default_factory=dict)
    files: int = 0


@torch.no_grad()
def evaluate(step: SemiSupervisedStep) -> tuple[list[Tensor], Tensor]:
    engine = step.engine
    inputs = step.views.plain(digits()[0][:32])
    engine.module.eval()
    outputs = [engine.infer(inputs)]
    with step.teacher.teacher_weights():
        outputs.append(engine.infer(inputs))
    outputs.append(engine.infer(inputs))
    whole = MLP(64, HIDDEN, 10).eval()
    whole.load_state_dict(step.teacher.whole())
    return outputs, whole(inputs)


def run(folder: Path, nvme: bool, precision: str, algorithm: str = "fixmatch") -> Trained:
    step = make_step(folder, nvme, precision, algorithm)
    curve = train(step, STEPS)
    outputs, expected = evaluate(step)
    curve += train(step, 2)  # an evaluation leaves nothing behind
    engine = step.engine
    assert isinstance(engine, PartitionedEngine)
    kept = {"master": engine.master_fragments(), "teacher": step.teacher.fragments}
    kept |= engine.optimizer_fragments()
    return Trained(
        losses=[entry["loss"] for entry in curve],
        applied=[bool(entry["applied"]) for entry in curve],
        tensors={
            f"{kind} {name}": values
            for kind, fragments in kept.items()
            for name, values in engine.layout.gather(fragments).items()
        },
        outputs=outputs,
        expected=expected,
        swapped=[engine._is_swapped(part) for part in range(len(engine._flat_parts()))],
        homes={n: str(p.ds_tensor.final_location) for n, p in engine._sharded()},
        files=len(list(folder.glob(f"zero_stage_3/**/rank{engine.rank}/*.swp"))),
    )


Runs = dict[tuple[str, str, bool], Trained]


def runs(folder: Path) -> Runs:
    found: Runs = {}
    for nvme in (False, True):
        for precision in PRECISIONS:
            found["fixmatch", precision, nvme] = run(folder, nvme, precision)
        found["mean_teacher", "bf16", nvme] = run(folder, nvme, "bf16", "mean_teacher")
    return found


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Runs]:
    folder = tmp_path_factory.mktemp("nvme")
    return run_ranks(request.param, runs, folder, timeout=1800)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_is_on_nvme(trained: list[Runs], precision: str) -> None:
    for found in trained:
        kept = found["fixmatch", precision, True]
        assert kept.swapped == [True, False], "a sub-group of each kind"
        assert "nvme" in kept.homes["features.3.weight"]
        assert kept.files >= 4, "weights, master weights and two moments"
        assert found["fixmatch", precision, False].swapped == [False, False]


CASES = [("fixmatch", precision) for precision in PRECISIONS] + [("mean_teacher", "bf16")]


@pytest.mark.parametrize(("algorithm", "precision"), CASES)
def test_every_number_is_that_of_a_run_without(
    trained: list[Runs], algorithm: str, precision: str
) -> None:
    for found in trained:
        kept, plain = found[algorithm, precision, True], found[algorithm, precision, False]
        assert kept.losses == plain.losses
        assert kept.applied == plain.applied
        assert any(kept.applied[:STEPS])
        assert all(kept.applied) == (precision != "fp16"), kept.applied
        assert len(set(kept.losses)) == STEPS + 2
        assert kept.tensors.keys() == plain.tensors.keys()
        assert {key.split(" ")[0] for key in kept.tensors} >= {"exp_avg", "exp_avg_sq", "teacher"}
        for key, values in kept.tensors.items():
            assert torch.equal(values, plain.tensors[key]), key


@pytest.mark.parametrize(("algorithm", "precision"), CASES)
def test_the_teacher_is_lent_and_the_student_comes_back(
    trained: list[Runs], algorithm: str, precision: str
) -> None:
    tolerance = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.004}[precision]
    for found in trained:
        kept = found[algorithm, precision, True]
        before, teacher, after = kept.outputs
        assert torch.equal(before, after)
        assert (teacher - kept.expected).abs().max() < tolerance
        assert (teacher - before).abs().max() > 3 * tolerance, "it is another model"


# by the trainer, with checkpoints


def fit(data: Path, folder: Path, name: str, steps: int, nvme: bool) -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as the launcher names the JSON
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = write_config(folder, nvme)
    from hpdist.train.trainer import Trainer

    files = {"path": "parquet", "data_files": {"train": f"{data}/train-*.parquet"}}
    Trainer(
        {"name": "mlp", "hidden": HIDDEN},
        "fixmatch",
        labeled=files | {"labels_per_class": 4},
        unlabeled=files,
        batch={"labeled": 8, "unlabeled": 24},
        views={"weak": {"flip": False}},
        steps=steps,
        schedule={"name": "constant"},
        optim={"name": "adamw", "lr": 1e-3},
        run={"dir": str(folder / "runs"), "name": name},
        checkpoint={"every": 3},
        tracker={"name": "none"},
    ).fit()


def test_a_checkpoint_goes_to_nvme_and_back(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits")
    run_ranks(2, fit, data, tmp_path, "whole", 6, False, timeout=900)
    run_ranks(2, fit, data, tmp_path, "stays", 3, True, timeout=900)
    shutil.copytree(tmp_path / "runs" / "stays", tmp_path / "runs" / "leaves")
    run_ranks(2, fit, data, tmp_path, "stays", 6, True, timeout=900)
    run_ranks(2, fit, data, tmp_path, "leaves", 6, False, timeout=900)
    last = tmp_path / "runs" / "{}" / "checkpoints" / "step-00000006"
    for rank in range(2):
        file = f"rank-{rank:05d}.safetensors"
        whole = load_file(Path(str(last).format("whole")) / file)
        assert {key.split("/")[0] for key in whole} >= {"master", "teacher", "optimizer.exp_avg_sq"}
        for name in ("stays", "leaves"):
            found = load_file(Path(str(last).format(name)) / file)
            assert found.keys() == whole.keys()
            for key, values in whole.items():
                assert torch.equal(values, found[key]), (name, key)
