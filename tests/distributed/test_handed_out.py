"""What a `Trainer` leaves to whoever gave it a module, and hands out: plain models, on any rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpdist import ConfigError
from tests.support.odd_models import ROWS, Small, trainer
from tests.support.ranks import run_ranks

CASES: dict[str, dict[str, Any]] = {
    "ddp": {"precision": "bf16"},
    "zero2": {"precision": "bf16", "zero": {"stage": 2}},
    "zero3": {"precision": "bf16", "zero": {"stage": 3}},
}


class Mixed(Small):
    """What an engine changes in a model, or may not change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.tied = nn.Linear(8, 8)
        self.tied_too = nn.Linear(8, 8)
        self.tied_too.weight = self.tied.weight
        self.register_buffer("third", torch.tensor(1 / 3))

    def features(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(super().features(inputs))
        return hidden + self.tied_too(self.tied(self.frozen(hidden)).relu()) * self.third


def inputs() -> Tensor:
    return torch.tensor([[row[name] for name in "abcd"] for row in ROWS[0]]).float()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def handed_out(folder: str, name: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    given = Mixed()
    before, parameters = state_of(given), dict(given.named_parameters())
    made = trainer(given, Path(folder), name, 3, **settings, optim={"lr": 0.1})
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items()), "not yet touched"
    made.fit()

    after = state_of(given)
    assert after.keys() == before.keys()
    assert {type(m) for m in given.modules()} == {Mixed, nn.Linear, nn.BatchNorm1d}
    assert dict(given.named_parameters()) == parameters, "the same objects"
    kept = {"third", "frozen.weight", "frozen.bias"}
    same = {key for key, value in after.items() if torch.equal(value, before[key])}
    assert same == kept, "exact, though the engine computes with what is rounded to bf16"
    assert all(v.dtype in (torch.float32, torch.int64) for v in after.values())
    assert not given.training
    assert given.tied_too.weight is given.tied.weight

    step = made.step
    masters = step.engine.layout.gather(step.engine.master_fragments())
    for key, value in masters.items():
        assert torch.equal(after[key].flatten(), value)
    teacher = made.teacher_model()
    for key, value in step.teacher.whole().items():
        if key not in kept:
            assert torch.equal(teacher.state_dict()[key], value)
    assert torch.equal(
        state_of(made.student_model())["norm.running_var"], after["norm.running_var"]
    )
    for teachers, model in ((True, teacher), (False, given)):
        with step.evaluating(teacher=teachers) as predict:
            measured = predict(inputs())
        with torch.no_grad():
            torch.testing.assert_close(
                model(step.views.plain(inputs())), measured, atol=0.03, rtol=0.03
            )
    return after | {f"teacher.{key}": value for key, value in teacher.state_dict().items()}


def all_handed_out(folder: str, names: list[str]) -> list[dict[str, Tensor]]:
    return [handed_out(folder, name, CASES[name]) for name in names]


def test_the_given_module_has_what_was_learnt_and_nothing_else_changed(tmp_path: Path) -> None:
    ranks = run_ranks(2, all_handed_out, str(tmp_path), list(CASES))
    for case, one, other in zip(CASES, *ranks, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one), case


def test_heads_of_the_training_are_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = Small()
    made = trainer(given, tmp_path, "run", 2, algorithm="simmatch")
    made.fit()
    assert {type(module) for module in given.modules()} == {Small, nn.Linear}
    weights = made.step.engine.module.get_submodule("model").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in given.state_dict().items())
    assert type(made.teacher_model()) is Small
    assert "now has the student's trained weights" in capfd.readouterr().err
    # A run that is done gives what it learnt to a module that is given later, too.
    later = Small()
    trainer(later, tmp_path, "run", 2, algorithm="simmatch").fit()
    assert all(torch.equal(value, weights[name]) for name, value in later.state_dict().items())


def test_a_model_with_a_name_is_handed_out_too(tmp_path: Path) -> None:
    made = trainer({"name": "mlp", "hidden": [5]}, tmp_path, "run", 2)
    made.fit()
    weights = made.step.teacher.whole()
    assert all(torch.equal(v, weights[k]) for k, v in made.teacher_model().state_dict().items())


class NoCopy(Small):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("it holds a socket")


def test_a_module_that_cannot_be_copied_trains_itself_and_it_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = NoCopy()
    before = state_of(given)
    made = trainer(given, tmp_path, "run", 2)
    made.fit()
    assert not torch.equal(given.state_dict()["last.weight"], before["last.weight"])
    assert "NoCopy cannot be copied (RuntimeError: it holds a socket" in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"NoCopy cannot be copied, .* name a function"):
        made.teacher_model()
