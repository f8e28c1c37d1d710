"""What Python code gives `Trainer`: algorithms, models and rows as objects, or a clear refusal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from hpdist import ConfigError, FixMatch, FreeMatch
from hpdist.algorithms.fixmatch import FixMatchConfig
from hpdist.errors import CheckpointError
from hpdist.models.outputs import find_logits
from tests.support.odd_models import ROWS, Odd, Small, rows, train, trainer


class Mine(FixMatch):
    """One's own, which no name stands for."""


class NeedsMore(FixMatch):
    def __init__(self, more: int) -> None:
        super().__init__()


class NoGradient(Small):
    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs)


class Inference(Small):
    @torch.inference_mode()
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs)


class DetachedInTraining(Small):
    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        return logits.detach() if self.training else logits


class WithoutGradientInEvaluation(Small):
    def forward(self, inputs: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return super().forward(inputs)


class Named(Small):
    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"hidden": inputs, "logits": super().forward(inputs)}


class Misnamed(Small):
    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"scores": super().forward(inputs)}


class InATuple(Small):
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(inputs), inputs


class Normalised(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def features(self, inputs: Tensor) -> Tensor:
        return self.norm(super().features(inputs))


def without_addresses(value: object) -> str:
    """The name of a case: the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (FixMatch(threshold=0.9), {"name": "fixmatch", "threshold": 0.9}),
        (FreeMatch(3, fairness_weight=0.1), {"name": "freematch", "fairness_weight": 0.1}),
        (FixMatch, {"name": "fixmatch", "threshold": 0.95}),
        (FixMatchConfig(threshold=0.8), {"name": "fixmatch", "threshold": 0.8}),
        (FixMatchConfig, {"name": "fixmatch", "threshold": 0.95}),
        (Mine(threshold=0.7), {"name": "python:(given)", "type": f"{__name__}.Mine"}),
        (Mine, {"name": "python:(given)", "type": f"{__name__}.Mine"}),
    ],
    ids=without_addresses,
)
def test_an_algorithm_may_be_an_object_or_a_class(
    tmp_path: Path, given: Any, options: dict[str, Any]
) -> None:
    made = trainer(Small(), tmp_path, "run", 1, algorithm=given)
    assert options.items() <= made.config.algorithm.model_dump().items()
    if isinstance(given, Mine):
        assert made.step.algorithm is given
    made.data.close()


def test_ones_own_algorithm_is_composed_saved_and_resumed(tmp_path: Path) -> None:
    addons = [{"name": "logit_adjustment"}]
    for steps in (1, 2):
        made = train(Small, tmp_path, "run", steps, algorithm=Mine(0.5), addons=addons)
    assert isinstance(made.step.algorithm.base, Mine)
    assert made.step.applied_steps == 2
    assert f"type: {__name__}.Mine" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": None}, r"algorithm: must be a name such as 'fixmatch', .* not None$"),
        ({"algorithm": 3}, r"hpdist.FixMatch\(threshold=0.9\), not 3$"),
        ({"algorithm": NeedsMore}, "NeedsMore is a class that needs arguments"),
        ({"algorithm": FreeMatch(5)}, "made for num_classes=5, but the labelled data have 3"),
        ({"labeled": 3}, "labeled: must be a datasets.Dataset .* not 3$"),
        ({"labeled": (ROWS[0], ROWS[1], 1)}, "not a tuple of 3"),
        (
            {"labeled": datasets.DatasetDict(train=rows(), test=rows())},
            r"labeled: must be one split, .*\(train, test\); .*labeled=data\['train'\]",
        ),
        (
            {"unlabeled": torch.utils.data.TensorDataset(torch.zeros(3))},
            "unlabeled: must be .* not a torch.utils.data.dataset.TensorDataset",
        ),
    ],
    ids=without_addresses,
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(Small(), tmp_path, "run", 1, **settings)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "model: must be a torch.nn.Module, .* not 3$"),
        (Small, "not the class Small"),
        (Small().to("meta"), "first.weight, .* is on the meta device"),
        (nn.Sequential(nn.LazyLinear(3)), "0.weight, 0.bias has no shape yet"),
        (nn.DataParallel(Small()), "already wrapped in DataParallel; give the module inside"),
        (Small().requires_grad_(False), "none of the 4 parameters of Small is trained"),
        (NoGradient(), "its outputs have no gradient"),
        (Inference(), "its outputs have no gradient"),
        (DetachedInTraining(), "its outputs have no gradient"),
        (Misnamed(), "to a dict of scores, no logits, expected logits"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_model_that_cannot_be_trained_is_refused(
    tmp_path: Path, model: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(model, tmp_path, "run", 1).fit()
    assert not (tmp_path / "run" / "checkpoints").exists() or isinstance(model, DetachedInTraining)


@pytest.mark.parametrize("kind", [Named, InATuple, WithoutGradientInEvaluation])
def test_logits_are_found_in_what_a_model_gives(tmp_path: Path, kind: type[nn.Module]) -> None:
    assert train(kind, tmp_path, "run", 1).step.applied_steps == 1


def test_of_what_is_no_output_the_logits_are_not_found() -> None:
    assert find_logits(()) == ()
    assert find_logits(None) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_trains_from_fp32(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    made = trainer(Small().to(dtype), tmp_path, "run", 1)
    made.fit()
    assert {p.dtype for p in made.step.engine.module.parameters()} == {torch.float32}
    name = str(dtype).removeprefix("torch.")
    assert f"4 of the model's 4 weights and buffers came in {name}" in capfd.readouterr().err


def test_rows_may_be_a_data_frame_or_a_list(tmp_path: Path) -> None:
    table, columns = ROWS
    losses = []
    for given in (table, table.to_pandas(), table.to_list(), datasets.DatasetDict(train=table)):
        name = f"run{len(losses)}"
        made = train(Small, tmp_path, name, 1, labeled=(given, columns))
        losses.append(made.step.engine.module.last.bias.tolist())
    assert losses[1:] == losses[:1] * 3


def test_batch_normalisation_of_one_row_says_what_to_do(tmp_path: Path) -> None:
    for batch in ({"labeled": 1}, {"labeled": 2, "micro": 1}):
        settings = {"algorithm": "supervised", "unlabeled": None, "batch": batch}
        with pytest.raises(ConfigError, match=r"one row at a time, .*batch.labeled or batch"):
            trainer(Normalised(), tmp_path, f"run{len(batch)}", 1, **settings).fit()


def test_a_process_may_train_in_several_precisions(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests' runs
    Accelerator(mixed_precision="bf16", cpu=True)  # somebody's own
    for number, precision in enumerate(("fp32", "bf16", "fp32")):
        made = train(Small, tmp_path, str(number), 1, precision=precision)
        assert made.accelerator.mixed_precision == ("no" if precision == "fp32" else precision)


def test_another_optimizer_is_refused_and_another_momentum_begins_anew(tmp_path: Path) -> None:
    train(Small, tmp_path, "run", 1)
    with pytest.raises(CheckpointError, match=r"optim.name: sgd there, adamw here"):
        train(Small, tmp_path, "run", 2, optim={"name": "adamw"})
    made = train(Small, tmp_path, "run", 2, optim={"momentum": 0.0})
    assert made.step.engine.optimizer_fragments() == {}
    made = train(Small, tmp_path, "run", 3, optim={"momentum": 0.5})
    assert list(made.step.engine.optimizer_fragments()) == ["momentum_buffer"]


def test_adam_and_adamw_share_their_state(tmp_path: Path) -> None:
    train(Small, tmp_path, "run", 1, optim={"name": "adam"})
    made = train(Small, tmp_path, "run", 2, optim={"name": "adamw"})
    assert made.step.engine.optimizer_scalars() == {"step": 2.0}


def test_other_trained_parameters_are_named(tmp_path: Path) -> None:
    train(Small, tmp_path, "run", 1)
    frozen = Small()
    frozen.first.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"trained only there: first.bias, first.weight\)"):
        trainer(frozen, tmp_path, "run", 2)
    with pytest.raises(CheckpointError, match=r"trained only here: dead.bias, dead.weight, "):
        trainer(Odd(), tmp_path, "run", 2)
