"""Parameters of every shape and fate train, save and resume, alone, under DDP and under ZeRO."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpdist.errors import ConfigError, HpdistError
from tests.support.odd_models import (
    Alternating,
    ByRank,
    Complex,
    Leaving,
    Odd,
    Unreached,
    differing,
    saved,
    train,
)
from tests.support.ranks import run_ranks

ADAMW = {"name": "adamw", "lr": 0.01}
DDP: dict[str, Any] = {"ddp": {}, "ddp-adamw": {"optim": ADAMW}}
ZERO: dict[str, Any] = {
    "zero0": {"zero": {"stage": 0}, "optim": ADAMW, "precision": "bf16"},
    "zero2": {"zero": {"stage": 2}},
    "zero3": {"zero": {"stage": 3}, "optim": ADAMW},
}
MORE: dict[str, Any] = {
    "zero1": {"zero": {"stage": 1}, "optim": ADAMW, "precision": "fp16"},
    "zero2-fp16": {"zero": {"stage": 2}, "precision": "fp16"},
    "zero3-fp16": {"zero": {"stage": 3}, "precision": "fp16"},
    "zero0-fp16": {"zero": {"stage": 0}, "precision": "fp16"},
    "zero1-sgd": {"zero": {"stage": 1}},
    "zero2-offload": {"zero": {"stage": 2, "offload": "cpu"}},
    "zero3-offload": {"zero": {"stage": 3, "offload": "cpu"}},
    "bf16": {"precision": "bf16"},
}


def _begin() -> None:
    os.environ["HPDIST_ALLOW_CPU_FP16"] = "1"
    warnings.simplefilter("ignore")


def _resumed(folder: Path, settings: dict[str, Any]) -> dict[str, list[str]]:
    """Train in one go and in two; what then differs, by the name of the settings."""
    _begin()
    found = {}
    for name, each in settings.items():
        train(Odd, folder, f"{name}-whole", 4, **each)
        train(Odd, folder, f"{name}-halves", 2, **each)
        train(Odd, folder, f"{name}-halves", 4, **each)
        found[name] = differing(folder, f"{name}-whole", f"{name}-halves", 4)
    return found


def _by_name(folder: Path, name: str, kind: str) -> dict[str, torch.Tensor]:
    """A checkpoint's fragments of a kind, put together by the parameter's name."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for key, values in saved(folder, name, 4).items():
        found, _, place = key.partition("/")[2].partition("/")
        if found == kind and "@" in place:  # not a buffer
            parameter, _, start = place.rpartition("@")
            parts.setdefault(parameter, []).append((int(start), values))
    return {n: torch.cat([v for _, v in sorted(p, key=lambda x: x[0])]) for n, p in parts.items()}


def _on_two_ranks(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"differing": _resumed(folder, DDP | ZERO)}
    micro = {"batch": {"labeled": 4, "unlabeled": 8, "micro": 3}}
    train(Unreached, folder, "ddp-micro", 4, **micro)
    train(ByRank, folder, "by-rank-found", 4, find_unused_parameters=True)
    train(ByRank, folder, "by-rank-whole", 4)
    found["by DDP itself"] = differing(folder, "by-rank-found", "by-rank-whole", 4)
    # From DDP to ZeRO and back, and from ranks that differ in what they reach.
    train(Odd, folder, "moves", 2, optim=ADAMW)
    train(Odd, folder, "moves", 3, optim=ADAMW, zero={"stage": 3})
    train(Odd, folder, "moves", 4, optim=ADAMW)
    by_rank = train(ByRank, folder, "by-rank", 4, **micro)
    alternating = train(Alternating, folder, "alternating", 4, **micro)
    leaving = train(Leaving, folder, "leaving", 4)
    found["shared"] = leaving.step.engine._usage.shared
    by_rank_zero = train(ByRank, folder, "by-rank-zero", 4, zero={"stage": 1}, **micro)
    all_made = {
        "by rank": by_rank,
        "by rank, ZeRO-1": by_rank_zero,
        "alternating": alternating,
        "leaving": leaving,
    }
    for name, made in all_made.items():
        found[name] = [p.detach() for p in made.step.engine.module.parameters()]
    found["complex"] = train(Complex, folder, "complex", 4).step.teacher.whole()["phase"]
    found["refusal of Complex"] = _refused_by_zero(Complex, folder)
    found["refusal of ByRank"] = _refused_by_zero(ByRank, folder)
    return found


def _refused_by_zero(kind: type[nn.Module], folder: Path) -> str:
    with pytest.raises(HpdistError) as caught:
        train(kind, folder, f"{kind.__name__}-zero", 1, zero={"stage": 2})
    return f"{caught.type.__name__}: {caught.value}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, _on_two_ranks, folder)


def test_a_resumed_run_is_the_uninterrupted_one(two_ranks: list[dict[str, Any]]) -> None:
    assert two_ranks[0]["differing"] == {name: [] for name in [*DDP, *ZERO]}


@pytest.mark.slow
def test_so_it_is_in_every_stage_and_precision(tmp_path: Path) -> None:
    found = run_ranks(2, _resumed, tmp_path, MORE)
    assert found[0] == {name: [] for name in MORE}


def test_ranks_and_micro_batches_train_what_one_process_trains(
    folder: Path, two_ranks: list[dict[str, Any]]
) -> None:
    micro = {"labeled": 4, "unlabeled": 8, "micro": 6}
    with pytest.warns(UserWarning, match="does not reach dead"):
        train(Odd, folder, "one", 4)
    with pytest.warns(UserWarning, match="does not reach dead"):
        train(Unreached, folder, "one-micro", 4, batch=micro)
    for kind in ("master", "teacher", "optimizer.momentum_buffer"):
        for alone, name in (("one", "ddp-whole"), ("one-micro", "ddp-micro")):
            one, other = _by_name(folder, alone, kind), _by_name(folder, name, kind)
            assert one.keys() == other.keys()
            for parameter, values in one.items():
                torch.testing.assert_close(other[parameter], values, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    initial = dict(Odd().named_parameters())
    trained = _by_name(folder, "ddp-whole", "master")
    state = _by_name(folder, "ddp-whole", "optimizer.momentum_buffer")
    for name in ("dead.weight", "dead.bias", "dead_scalar"):
        assert torch.equal(trained[name], initial[name].detach().view(-1))  # weight decay neither
        assert name not in state
    for name in ("temperature", "now_and_then.weight", "tied.weight"):
        assert not torch.equal(trained[name], initial[name].detach().view(-1))
        assert name in state


def test_a_run_moves_between_engines_and_numbers_of_ranks(
    folder: Path, two_ranks: list[dict[str, Any]]
) -> None:
    with pytest.warns(UserWarning, match="does not reach"):
        made = train(Odd, folder, "moves", 5, optim=ADAMW)
    assert made.step.applied_steps == 5
    assert made.step.engine.optimizer_scalars() == {"step": 5.0}


def test_what_only_some_ranks_or_steps_reach_is_the_same_on_all_ranks(
    two_ranks: list[dict[str, Any]],
) -> None:
    for name in ("by rank", "by rank, ZeRO-1", "alternating", "leaving"):
        for one, other in zip(*(rank[name] for rank in two_ranks), strict=True):
            assert torch.equal(one, other)
    assert [rank["shared"] for rank in two_ranks] == [True, True]
    for one, other in zip(two_ranks[0]["by rank"], two_ranks[0]["by rank, ZeRO-1"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_zero2_refuses_what_only_some_ranks_reach_by_name(two_ranks: list[dict[str, Any]]) -> None:
    refusal = two_ranks[0]["refusal of ByRank"]
    assert refusal.startswith(f"{ConfigError.__name__}: model: in the first step the losses of")
    assert "reach of_first.bias, of_first.weight, those of others do not" in refusal
    assert two_ranks[1]["refusal of ByRank"] == refusal


def test_complex_weights_train_under_ddp_and_zero_refuses_them_by_name(
    folder: Path, two_ranks: list[dict[str, Any]]
) -> None:
    one = train(Complex, folder, "complex-one", 4).step.teacher.whole()["phase"]
    assert one.imag.abs().min() > 0.1
    torch.testing.assert_close(two_ranks[0]["complex"], one, rtol=1e-4, atol=1e-5)
    refusal = two_ranks[0]["refusal of Complex"]
    assert refusal.startswith(f"{ConfigError.__name__}: model: phase is complex, which DeepSpeed")
    assert two_ranks[1]["refusal of Complex"] == refusal


def test_ddp_may_look_for_unused_parameters_itself(two_ranks: list[dict[str, Any]]) -> None:
    assert [found["by DDP itself"] for found in two_ranks] == [[], []]


def test_under_zero_there_is_no_ddp_to_look_for_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"find_unused_parameters: DDP's, .* \(ZeRO stage 2\)"):
        train(Odd, tmp_path, "refused", 1, find_unused_parameters=True, zero={"stage": 2})
