"""A DeepSpeed JSON says nothing that a run does not do: agreed, passed on, named or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hpdist.engines import launch
from hpdist.engines.deepspeed_plugin import make_plugin
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.errors import ConfigError
from hpdist.plan.memory_plan import make_plan
from hpdist.train.compose import execution_request
from tests.support import launched
from tests.support.launched import forget_launcher

ON = {"stage": 1}
Resolve = Callable[..., ExecutionPlan]
config = partial(launched.config, steps=100)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Resolve:
    """Resolves a config beside a DeepSpeed JSON, `{file}` in a message being its path."""
    forget_launcher(monkeypatch)
    if not torch.cuda.is_available():
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.setenv(launch.ALLOW_CPU_FP16, "1")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    path = tmp_path / "ds.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))

    def found(file: dict[str, Any] | str, **settings: Any) -> ExecutionPlan:
        path.write_text(file if isinstance(file, str) else json.dumps(file))
        return launch.resolve(execution_request(config(**settings)))

    return found


def refusal(resolve: Resolve, file: dict[str, Any] | str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(file, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation in {file}.*'zero_optimization'"),
        ({"train_batchsize": 8}, "train_batchsize in {file}.*did you mean 'train_batch_size'"),
        ({"nonsense_xyz": 8}, "nonsense_xyz in {file}.*take it out"),
        (
            {"zero_optimization": ON | {"overlap_com": True}},
            r"zero_optimization\.overlap_com in {file}.*'overlap_comm'",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucketsize": 1}},
            "'stage3_prefetch_bucket_size'",
        ),
        (
            {"zero_optimization": ON | {"offload_optimizer": {"devise": "cpu"}}},
            r"zero_optimization\.offload_optimizer\.devise in {file}.*'device'",
        ),
        (
            {"zero_optimization": ON | {"offload_optimizer": {"device": "gpu"}}},
            r"zero_optimization\.offload_optimizer\.device: 'gpu' in {file}",
        ),
        ({"fp16": {"enabled": True, "los_scale": 1}}, r"fp16\.los_scale in {file}.*'loss_scale'"),
        ({"bf16": {"enabled": True, "loss_scale": 0}}, r"bf16\.loss_scale in {file}"),
        ({"bf16": {"enabled": "yes"}}, r"bf16\.enabled: 'yes' in {file} must be true, false"),
        ({"aio": {"blok_size": 1}}, r"aio\.blok_size in {file}.*'block_size'"),
        ({"aio": {"thread_count": 1}}, r"aio\.thread_count in {file}.*intra_op_parallelism"),
        ({"timers": {"throughput": {"enable": True}}}, r"timers\.throughput\.enable in {file}"),
        ({"comms_logger": {"enable": True}}, r"comms_logger\.enable in {file}.*'enabled'"),
        ({"zero_optimization": {"stage": 2.5}}, "2.5 in {file} must be a whole number"),
        ({"zero_optimization": {"stage": True}}, "True in {file} must be a whole number"),
        ({"zero_optimization": {"stage": 4}}, "zero.stage: 4 must be"),
        ({"zero_optimization": {"reduce_bucket_size": "much"}}, "reduce_bucket_size: 'much'"),
        ({"gradient_clipping": -1}, "gradient_clipping: -1 in {file}"),
        ('{"bf16": {}, "bf16": {}}', "bf16 occurs twice"),
        ({"bf16": {}, "bfloat16": {}}, "bf16 and bfloat16 in {file} are the same"),
    ],
)
def test_what_is_misspelt_or_wrong_is_named(
    resolve: Resolve, tmp_path: Path, file: Any, named: str
) -> None:
    message = refusal(resolve, file)
    assert re.search(named.replace("{file}", re.escape(str(tmp_path / "ds.json"))), message), (
        message
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("amp", {"enabled": True, "opt_level": "O1"}),
        ("torch_autocast", {"enabled": True, "dtype": "bfloat16"}),
        ("prescale_gradients", True),
        ("gradient_predivide_factor", 2.0),
        ("gradient_allreduce_op", "sum"),
        ("managed_gradient_accumulation", False),
        ("sparse_gradients", True),
        ("compression_training", {"weight_quantization": {"shared_parameters": {"enabled": True}}}),
        ("curriculum_learning", {"enabled": True}),
        ("data_efficiency", {"enabled": True}),
        ("elasticity", {"enabled": True}),
        ("progressive_layer_drop", {"enabled": True}),
        ("quantize_training", {"enabled": True}),
        ("sparse_attention", {"mode": "fixed"}),
        ("autotuning", {"enabled": True}),
        ("hybrid_engine", {"enabled": True}),
        ("compile", {"deepcompile": True}),
        ("tensor_parallel", {"autotp_size": 2}),
        ("sequence_parallel_size", 2),
        ("fp32_allreduce", True),
        ("disable_allgather", True),
        ("communication_data_type", "fp16"),
        ("data_types.grad_accum_dtype", "bf16"),
        ("data_types.keep_in_fp32_modules", ["norm"]),
        ("bf16.check_grad_overflow", False),
        ("fp16.fp16_master_weights_and_grads", True),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}),
        ("zero_optimization.zero_hpz_partition_size", 8),
        ("zero_optimization.zero_quantized_weights", True),
        ("zero_optimization.zero_quantized_gradients", True),
        ("zero_optimization.compute_grad_norm", False),
        ("zero_optimization.cpu_offload", True),
        ("zero_optimization.mics_shard_size", 8),
        ("zero_optimization.offload_optimizer.ratio", 0.5),
        ("zero_optimization.offload_optimizer.super_offload", True),
    ],
)
def test_what_would_break_a_promise_is_refused_by_name(
    resolve: Resolve, tmp_path: Path, key: str, value: Any
) -> None:
    file: Any = value
    for part in reversed(key.split(".")):
        file = {part: file}
    assert refusal(resolve, file).startswith(f"{key}")


BF16_STATE = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def test_bf16_state_is_the_files_or_the_configs(resolve: Resolve) -> None:
    zero, half = {"zero_optimization": ON}, {"bf16": {"enabled": True}}
    in_file = resolve(zero | {"bf16": {"enabled": True, **BF16_STATE}})
    in_config = resolve(zero | half, zero=BF16_STATE)
    for plan in (in_file, in_config):
        assert plan.bf16_state
        values = make_plugin(plan).deepspeed_config["bf16"]
        assert values == {"enabled": True, **BF16_STATE}
    assert not resolve(zero | half).bf16_state


@pytest.mark.parametrize(
    ("file", "zero", "text"),
    [
        ({"bf16": {"bf16_optimizer_states": True}}, {}, "without zero.bf16_master_weights"),
        ({"bf16": BF16_STATE}, {"bf16_optimizer_states": False}, "make them agree"),
        ({"bf16": {"enabled": False}}, BF16_STATE, "needs precision: bf16, not fp32"),
        ({"zero_optimization": {"stage": 0}}, BF16_STATE, "stage 0 keeps whole master weights"),
        ({}, BF16_STATE | {"offload": "cpu"}, "by its own Adam"),
    ],
)
def test_bf16_state_that_deepspeed_cannot_keep_is_refused(
    resolve: Resolve, file: dict[str, Any], zero: dict[str, Any], text: str
) -> None:
    least = {"zero_optimization": ON, "bf16": {"enabled": True}}
    assert text in refusal(resolve, least | file, zero=zero)


@pytest.mark.parametrize("off", [None, False, "auto", {}, {"enabled": False}, {"enabled": "auto"}])
def test_what_is_turned_off_is_as_if_left_out(resolve: Resolve, off: Any) -> None:
    keys = ("amp", "torch_autocast", "sparse_gradients", "curriculum_learning", "tensorboard")
    sharding = resolve({"zero_optimization": ON, **dict.fromkeys(keys, off)})
    assert sharding.notes == ()
    assert set(sharding.base) == {"zero_optimization"}


def test_both_precisions(resolve: Resolve) -> None:
    both = {"fp16": {"enabled": True}, "bf16": {"enabled": True}}
    assert refusal(resolve, both).startswith("fp16.enabled and bf16.enabled are both true")


def test_a_precision_that_the_file_turns_off(resolve: Resolve) -> None:
    file = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    assert resolve(file).precision == "fp32"
    assert "bf16.enabled: false" in refusal(resolve, file, precision="bf16")
    assert resolve({"bf16": {"enabled": "auto"}}, precision="bf16").precision == "bf16"


def test_the_old_name_of_bf16(resolve: Resolve) -> None:
    assert resolve({"bfloat16": {"enabled": True}}).precision == "bf16"


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("train_batch_size", 96, 999),
        ("train_micro_batch_size_per_gpu", 16, 96),
        ("gradient_accumulation_steps", 3, True),
    ],
)
def test_batch_sizes_agree(resolve: Resolve, key: str, right: int, wrong: int) -> None:
    for value in (right, "auto", None):
        launch.with_batch(resolve({key: value}), 16, 3, 2)
    with pytest.raises(ConfigError, match=rf"{key}: {wrong} in .*ds\.json.* make it {right}"):
        launch.with_batch(resolve({key: wrong}), 16, 3, 2)


AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
ADAMW = {"name": "adamw", "lr": 1e-3}


def test_an_optimizer_section_agrees_or_says_what_to_set(resolve: Resolve) -> None:
    published = {"type": "AdamW", "params": AUTO}
    message = refusal(resolve, {"optimizer": published})
    assert "optimizer in" in message
    assert "set optim.name: adamw (now sgd)" in message
    exact = {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "torch_adam": True}}
    for section in (published, exact):  # DeepSpeed's Adam decouples the decay by default
        sharding = resolve({"optimizer": section}, optim=ADAMW)
        assert "optimizer" not in sharding.base
        assert "optimizer (hpdist's own setting agrees)" in sharding.notes[0]
    message = refusal(resolve, {"optimizer": exact}, optim=ADAMW | {"lr": 0.5})
    assert "optim.lr: 0.001 (now 0.5)" in message
    plain = {"type": "Adam", "params": {"adam_w_mode": False}}
    assert "optim.name: adam (now adamw)" in refusal(resolve, {"optimizer": plain}, optim=ADAMW)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"type": "Lamb"}, "optimizer.type: Lamb"),
        ({"type": "AdamW", "params": {"amsgrad": True}}, "optimizer.params.amsgrad: True"),
        ({"type": "AdamW", "params": {"learning_rate": 1}}, "optimizer.params.learning_rate"),
        ({"typ": "AdamW"}, "optimizer.typ in .*did you mean 'type'"),
        ({"params": {}}, "optimizer in .* must have a type"),
    ],
)
def test_an_optimizer_that_hpdist_has_not(resolve: Resolve, section: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        resolve({"optimizer": section}, optim=ADAMW)


def test_a_scheduler_section_agrees_or_says_what_to_set(resolve: Resolve) -> None:
    auto = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
    published = {"type": "WarmupDecayLR", "params": auto | {"total_num_steps": 1000}}
    message = refusal(resolve, {"scheduler": published}, schedule={"name": "cosine"})
    assert "set schedule.name: linear (now cosine), steps: 1000 (now 100) there" in message
    sharding = resolve({"scheduler": published}, schedule={"name": "linear"}, steps=1000)
    assert "scheduler" not in sharding.base
    assert "scheduler.type: OneCycle" in refusal(resolve, {"scheduler": {"type": "OneCycle"}})


def test_what_is_not_used_is_said_on_one_line(resolve: Resolve) -> None:
    file = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1e5},
        "steps_per_print": 2000,
        "wandb": {"enabled": True},
        "activation_checkpointing": {"partition_activations": True},
        "zero_force_ds_cpu_optimizer": True,
        "fp16": {"enabled": True, "hysteresis": 2},
        "_comment": "as published",
    }
    with pytest.warns(UserWarning, match="tests and trials only"):
        (note,) = resolve(file).notes
    assert note.count("\n") == 0
    for key in file.keys() - {"zero_optimization", "fp16", "_comment"}:
        assert f" {key} (" in note
    assert "fp16.hysteresis" in note
    assert "stage3_param_persistence_threshold (always 0 here)" in note


@pytest.mark.filterwarnings("ignore:HPDIST_ALLOW_CPU_FP16=1")
def test_the_loss_scale_of_the_file_and_of_the_config(resolve: Resolve) -> None:
    fp16 = {"enabled": True, "initial_scale_power": 12, "loss_scale_window": "auto"}
    scale = resolve({"fp16": fp16}).loss_scale
    assert (scale.initial, scale.growth_interval, scale.static) == (4096, 1000, None)
    assert resolve({"fp16": fp16}, loss_scale={"initial": 4096}).loss_scale.initial == 4096
    message = refusal(resolve, {"fp16": fp16}, loss_scale={"initial": 1024})
    assert message.startswith("loss_scale.initial: 1024.0 in hpdist's config, but")
    assert "fp16.initial_scale_power: 12" in message


def test_a_published_file_reaches_deepspeed_whole(resolve: Resolve) -> None:
    """What Hugging Face publishes for ZeRO-3: nothing of it may be left "auto" by then."""
    from deepspeed.runtime.config import DeepSpeedConfig

    zero = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "max_reuse_distance": 1e7,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    file = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2},
        "optimizer": {"type": "AdamW", "params": AUTO},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": zero,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    sharding = resolve(file, optim=ADAMW, schedule={"name": "constant"}, precision="bf16")
    values = dict(make_plugin(launch.with_batch(sharding, 4, 2, 1)).deepspeed_config)
    assert values.pop("train_batch_size") == "auto"
    assert '"auto"' not in json.dumps(values)
    made = DeepSpeedConfig(values)
    assert made.zero_config.stage == 3
    assert made.zero_config.max_reuse_distance == 1e7
    assert made.zero_config.param_persistence_threshold == 0
    assert (made.bfloat16_config.enabled, made.float16_config.enabled) == (True, False)


def test_a_plan_reads_the_file_as_a_run_does(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimisation": ON}))
    with pytest.raises(ConfigError, match=r"zero_optimisation in .*'zero_optimization'"):
        make_plan(config().model_dump(mode="json"), 2, 80.0, deepspeed=str(file))
