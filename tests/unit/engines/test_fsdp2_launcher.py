"""FSDP2 by accelerate's config and by hpdist's: agreement, or one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hpdist.engines import launch
from hpdist.engines.config import Shard
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.errors import ConfigError
from hpdist.train.compose import execution_request
from tests.support.launched import config, forget_launcher
from tests.support.ranks import free_port

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs/accelerate").glob("fsdp2_*.yaml"))


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_launcher(monkeypatch)


def asked(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Set what `accelerate launch` sets for FSDP2 by default, and these."""
    launched = {
        "VERSION": "2",
        "SHARDING_STRATEGY": "FULL_SHARD",
        "RESHARD_AFTER_FORWARD": "true",
        "OFFLOAD_PARAMS": "false",
        "MIN_NUM_PARAMS": "100000000",
        "CPU_RAM_EFFICIENT_LOADING": "true",
        "ACTIVATION_CHECKPOINTING": "false",
        "ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    }
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in (launched | variables).items():
        monkeypatch.setenv(f"FSDP_{name}", value)


def resolved(**settings: Any) -> ExecutionPlan:
    return launch.resolve(execution_request(config(**settings)))


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {}),
        ({"RESHARD_AFTER_FORWARD": "false"}, {"reshard_after_forward": False}),
        ({"OFFLOAD_PARAMS": "true"}, {"offload": "cpu"}),
        ({"AUTO_WRAP_POLICY": "NO_WRAP"}, {"units": []}),
        (
            {"AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "MIN_NUM_PARAMS": "1000"},
            {"min_parameters": 1000},
        ),
        ({"AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, {}),
        ({"TRANSFORMER_CLS_TO_WRAP": "BertLayer, Other"}, {"units": ["BertLayer", "Other"]}),
    ],
)
def test_accelerates_config_and_hpdists_ask_for_the_same(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: dict[str, Any]
) -> None:
    values = {"engine": "fsdp2", **expected}
    assert resolved(shard=values).shard == Shard(**values)
    asked(monkeypatch, **variables)
    assert resolved() == ExecutionPlan(shard=Shard(**values))
    assert resolved(shard=values).shard == Shard(**values)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"VERSION": "1"}, "fsdp_version: 1 in accelerate's config: .* write fsdp_version: 2"),
        ({"RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "must be true or false"),
        ({"AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "MIN_NUM_PARAMS": "1e8"}, "a whole number"),
        ({"AUTO_WRAP_POLICY": "ALL"}, "fsdp_auto_wrap_policy: ALL .* NO_WRAP"),
        ({"ACTIVATION_CHECKPOINTING": "true"}, "set activation_checkpointing: true in hpdist's"),
        ({"ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "does not offload activations"),
        ({"IGNORED_MODULES": "head"}, "fsdp_ignored_modules: head"),
    ],
)
def test_what_hpdist_cannot_do_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    asked(monkeypatch, **variables)
    with pytest.raises(ConfigError, match=message):
        resolved()


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"zero": {"stage": 2}}, ["shard.engine: fsdp2", "zero.stage: 2 in hpdist's config"]),
        ({"zero": {"offload": "cpu"}}, ["zero.offload: cpu"]),
        ({"compile": True}, ["compile: true", "shard.engine: fsdp2"]),
        ({"find_unused_parameters": True}, ["find_unused_parameters", "FSDP2"]),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    settings: dict[str, Any], messages: list[str]
) -> None:
    message = refusal(shard={"engine": "fsdp2"}, **settings)
    assert all(part in message for part in messages), message


def test_both_places_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "shard.offload: it needs shard.engine: fsdp2" in refusal(shard={"offload": "cpu"})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    message = refusal(shard={"engine": "fsdp2"})
    assert "shard.engine: fsdp2 in hpdist's config, but also zero_stage: 2 in" in message
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    asked(monkeypatch, RESHARD_AFTER_FORWARD="false", STATE_DICT_TYPE="SHARDED_STATE_DICT")
    message = refusal(zero={"stage": 3})
    assert "distributed_type: FSDP in accelerate's config, but also zero.stage: 3 in" in message
    message = refusal(shard={"reshard_after_forward": True})
    assert "shard.reshard_after_forward: True in hpdist's config, but" in message
    assert "fsdp_reshard_after_forward: false in accelerate's config" in message
    (note,) = resolved().notes
    assert "does not use fsdp_state_dict_type (" in note


def test_how_a_run_is_described() -> None:
    plan = resolved(shard={"engine": "fsdp2", "offload": "cpu"}, precision="bf16")
    found = plan.described()
    assert (found["shard_engine"], found["zero_stage"], found["offload"]) == (
        "fsdp2",
        "none",
        "cpu",
    )
    assert plan.name == "FSDP2"


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed.fsdp.FSDPModule, "set_reduce_scatter_unused_params")
    assert "shard.engine: fsdp2 needs torch 2.13 or newer" in refusal(shard={"engine": "fsdp2"})


def test_there_is_a_file_for_each_half() -> None:
    assert [path.stem for path in CONFIGS] == ["fsdp2_bf16", "fsdp2_fp16"]


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_launch_shards_by_its_file(tmp_path: Path, path: Path) -> None:
    """On CPU ranks too, where Accelerate itself would leave the model whole."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from hpdist.engines import launch\n"
        "from hpdist.engines.config import ExecutionRequest\n"
        "from hpdist.engines.prepare import make_engine, prepare\n"
        "import torch\n"
        "plan = launch.resolve(ExecutionRequest())\n"
        "accelerator = launch.make_accelerator(plan)\n"
        "model = torch.nn.Linear(4, 4)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "model, optimizer = prepare(accelerator, model, optimizer, plan)\n"
        "engine = make_engine(accelerator, model, optimizer)\n"
        "held = sum(len(part) for part in engine.master_parts())\n"
        "assert (type(engine).__name__, held) == ('ShardedEngine', 10), held\n"
        "print(plan.precision, accelerator.num_processes)\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    command += ["--num_processes", "2", "--main_process_port", str(free_port()), str(script)]
    environment = os.environ | {"HPDIST_ALLOW_CPU_FP16": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert sorted(run.stdout.split()) == sorted(2 * [path.stem[-4:], "2"])
