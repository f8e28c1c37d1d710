"""What `accelerate launch` says and what hpdist's config says: agreement, or one clear line."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from hpdist.data.samples.digits import write_digits
from hpdist.engines import launch
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.errors import ConfigError
from hpdist.train.compose import execution_request
from tests.support.launched import config, forget_launcher
from tests.support.ranks import free_port

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
BY_DEEPSPEED = [path for path in CONFIGS if path.name.startswith("zero")]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about a device without fp16")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_launcher(monkeypatch)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Sets what `accelerate launch` would; the DeepSpeed JSON's path, if one is given."""

    def set_up(
        file: object = None, mixed_precision: str = "no", deepspeed: bool = True, **inline: object
    ) -> str:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed_precision)
        path = tmp_path / "ds.json"
        if deepspeed:
            monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        if file is not None:
            path.write_text(file if isinstance(file, str) else json.dumps(file))
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
        for name, value in inline.items():
            prefix = "" if name == "gradient_clipping" else "DEEPSPEED_"
            monkeypatch.setenv(f"ACCELERATE_{prefix}{name.upper()}", str(value))
        return str(path)

    return set_up


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        launch.resolve(execution_request(config(**settings)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# precision


def test_precision_by_default_is_fp32_without_deepspeed() -> None:
    assert launch.resolve(execution_request(config())) == ExecutionPlan()


@pytest.mark.parametrize("ours", [None, "bf16"])
def test_precision_from_the_launcher(launcher: Any, ours: str | None) -> None:
    launcher(mixed_precision="bf16", deepspeed=False)
    assert launch.resolve(execution_request(config(precision=ours))).precision == "bf16"


def test_precision_from_the_config(launcher: Any) -> None:
    launcher(mixed_precision="no", deepspeed=False)
    sharding = launch.resolve(execution_request(config(precision="bf16")))
    assert (sharding.precision, sharding.stage) == ("bf16", None)


def test_precision_that_differs_names_both_places(launcher: Any) -> None:
    launcher(mixed_precision="bf16", deepspeed=False)
    message = refusal(precision="fp32")
    assert "precision: fp32 in hpdist's config" in message
    assert "mixed_precision: bf16 in accelerate's config" in message


def test_precision_that_hpdist_has_not(launcher: Any) -> None:
    launcher(mixed_precision="fp8", deepspeed=False)
    assert "mixed_precision is 'fp8'; use no, bf16 or fp16" in refusal()


def test_precision_from_the_json(launcher: Any) -> None:
    path = launcher({"bf16": {"enabled": True}, "fp16": {"enabled": "auto"}})
    assert launch.resolve(execution_request(config())).precision == "bf16"
    message = refusal(precision="fp32")
    assert "precision: fp32 in hpdist's config" in message
    assert f"bf16.enabled: true in {path}" in message


def test_precision_that_differs_within_the_launcher(launcher: Any) -> None:
    path = launcher({"fp16": {"enabled": True}}, mixed_precision="bf16")
    message = refusal()
    assert "mixed_precision: bf16 in accelerate's config" in message
    assert f"fp16.enabled: true in {path}" in message


@on_cpu
def test_fp16_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(precision="fp16")
    assert "precision: fp16 needs a GPU" in message
    assert "use bf16" in message
    monkeypatch.setenv(launch.ALLOW_CPU_FP16, "1")
    with pytest.warns(UserWarning, match="tests and trials only"):
        assert launch.resolve(execution_request(config(precision="fp16"))).precision == "fp16"


@pytest.mark.parametrize("scale", [1000, 0.75, 3])
def test_an_initial_loss_scale_that_is_no_power_of_2(scale: float) -> None:
    with pytest.raises(ConfigError, match=r"loss_scale\.initial: .*must be a power of 2"):
        config(loss_scale={"initial": scale})


# DeepSpeed, from accelerate's own config


def test_deepspeed_from_accelerates_config(launcher: Any) -> None:
    launcher(zero_stage=3, offload_optimizer_device="cpu", gradient_clipping=0.5)
    expected = ExecutionPlan(stage=3, offload="cpu", grad_clip=0.5)
    assert launch.resolve(execution_request(config())) == expected
    settings = {"zero": {"stage": 3, "offload": "cpu"}, "optim": {"grad_clip": 0.5}}
    assert launch.resolve(execution_request(config(**settings))) == expected


def test_what_accelerates_config_leaves_open(launcher: Any) -> None:
    launcher(gradient_clipping="auto", offload_optimizer_device="none")
    settings = {"zero": {"offload": "cpu"}, "optim": {"grad_clip": 2.0}}
    expected = ExecutionPlan(stage=2, offload="cpu", grad_clip=2.0)
    assert launch.resolve(execution_request(config(**settings))) == expected


@pytest.mark.parametrize(
    ("settings", "ours", "theirs"),
    [
        ({"zero": {"stage": 2}}, "zero.stage: 2", "zero_stage: 3"),
        ({"zero": {"offload": "none"}}, "zero.offload: none", "offload_optimizer_device: cpu"),
        ({"optim": {"grad_clip": 1}}, "optim.grad_clip: 1.0", "gradient_clipping: 0.5"),
    ],
)
def test_conflicts_with_accelerates_config(
    launcher: Any, settings: dict[str, Any], ours: str, theirs: str
) -> None:
    launcher(zero_stage=3, offload_optimizer_device="cpu", gradient_clipping=0.5)
    message = refusal(**settings)
    assert f"{ours} in hpdist's config" in message
    assert f"{theirs} in accelerate's config" in message


@pytest.mark.parametrize(
    ("inline", "message"),
    [
        ({"zero_stage": "two"}, "zero_stage: 'two' in accelerate's config must be a number"),
        ({"gradient_clipping": "x"}, "gradient_clipping: 'x' in accelerate's config must be"),
        (
            {"zero_stage": 3, "offload_param_device": "cpu"},
            "offload_param_device: cpu in accelerate's config without the same",
        ),
    ],
)
def test_what_accelerates_config_cannot_say(
    launcher: Any, inline: dict[str, Any], message: str
) -> None:
    launcher(**inline)
    assert message in refusal()


def test_both_offloads_in_accelerates_config(launcher: Any) -> None:
    launcher(zero_stage=3, offload_optimizer_device="cpu", offload_param_device="cpu")
    assert launch.resolve(execution_request(config())).offload == "cpu"


# DeepSpeed, from the JSON


def test_deepspeed_from_the_json(launcher: Any) -> None:
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}, "offload_param": None}
    path = launcher({"zero_optimization": zero, "gradient_clipping": 0.5})
    expected = ExecutionPlan(stage=1, offload="cpu", grad_clip=0.5, deepspeed=path)
    assert launch.resolve(execution_request(config())) == expected
    settings = {"zero": {"stage": 1, "offload": "cpu"}, "optim": {"grad_clip": 0.5}}
    assert launch.resolve(execution_request(config(**settings))) == expected


@pytest.mark.parametrize("file", [{}, {"zero_optimization": None, "gradient_clipping": "auto"}])
def test_what_the_json_leaves_open(launcher: Any, file: dict[str, Any]) -> None:
    path = launcher(file)
    found = launch.resolve(execution_request(config(precision="bf16", optim={"grad_clip": 2})))
    assert found == ExecutionPlan("bf16", stage=0, grad_clip=2, deepspeed=path)


@pytest.mark.parametrize(
    ("settings", "ours", "theirs"),
    [
        ({"zero": {"stage": 2}}, "zero.stage: 2", "zero_optimization.stage: 1"),
        ({"zero": {"offload": "none"}}, "zero.offload: none", "offload_optimizer.device: cpu"),
        ({"optim": {"grad_clip": 1}}, "optim.grad_clip: 1.0", "gradient_clipping: 0.0"),
    ],
)
def test_conflicts_with_the_json(
    launcher: Any, settings: dict[str, Any], ours: str, theirs: str
) -> None:
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    path = launcher({"zero_optimization": zero, "gradient_clipping": 0.0})
    message = refusal(**settings)
    assert f"{ours} in hpdist's config" in message
    assert f"{theirs} in {path}" in message


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("{", "cannot read the DeepSpeed config"),
        ("[1]", "must hold an object"),
        ({"zero_optimization": 2}, "zero_optimization: 2 in"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage: 'auto' in"),
        ({"fp16": True}, "fp16: True in"),
        ({"gradient_clipping": "x"}, "gradient_clipping: 'x' in"),
    ],
)
def test_a_json_that_is_wrong_is_named(launcher: Any, file: Any, message: str) -> None:
    path = launcher(file)
    found = refusal()
    assert message in found
    assert path in found


def test_a_json_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "/nowhere/ds.json")
    message = refusal()
    assert "'/nowhere/ds.json'" in message
    assert "there is no such file" in message


@pytest.mark.parametrize(
    ("key", "clash"), [("train_micro_batch_size_per_gpu", 8), ("gradient_accumulation_steps", 2)]
)
def test_batch_sizes_in_the_json(launcher: Any, key: str, clash: int) -> None:
    path = launcher({"zero_optimization": {"stage": 2}, key: clash})
    sharding = launch.resolve(execution_request(config()))
    with pytest.raises(ConfigError) as caught:
        launch.with_batch(sharding, 16, 4, 1)
    ours = {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4}[key]
    assert str(caught.value).startswith(f"{key}: {clash} in {path}, but")
    assert str(ours) in str(caught.value)
    launcher({"zero_optimization": {"stage": 2}, key: "auto"})
    found = launch.with_batch(launch.resolve(execution_request(config())), 16, 4, 1)
    assert (found.micro_batch, found.accumulation) == (16, 4)


# what cannot work


@pytest.mark.parametrize("package", ["deepspeed", "transformers"])
def test_zero_without_what_it_needs(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    message = refusal(zero={"stage": 2})
    assert f"zero.stage: 2 needs {package}, which is not installed" in message
    assert "hpdist[deepspeed]" in message
    assert launch.resolve(execution_request(config())).stage is None


# NVMe offload itself is not tried: DeepSpeed builds its aio operator only where libaio's headers
# are. What it would do without a good path is refused long before.
@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 0, "offload": "cpu"}, "offload: cpu needs stage 1, 2 or 3"),
        ({"stage": 2, "offload": "nvme", "nvme_path": "/"}, "offload: nvme needs stage 3"),
        ({"stage": 3, "offload": "nvme"}, "offload: nvme needs nvme_path"),
    ],
)
def test_offload_that_the_config_rules_out(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="zero: .*" + message):
        config(zero=zero)


@pytest.mark.parametrize("path", [None, "/nowhere/nvme", __file__])
def test_nvme_without_a_folder(launcher: Any, path: str | None) -> None:
    inline = {} if path is None else {"offload_optimizer_nvme_path": path}
    launcher(zero_stage=3, offload_optimizer_device="nvme", **inline)
    assert f"zero.nvme_path: {path!r} is no folder" in refusal()


def test_nvme_for_parameters_without_a_folder(launcher: Any) -> None:
    path = launcher({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}})
    message = f"zero_optimization.offload_param.nvme_path in {path}: None is no folder"
    assert message in refusal()


def test_nvme_with_a_folder(launcher: Any, tmp_path: Path) -> None:
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    launcher({"zero_optimization": {"stage": 3, "offload_optimizer": nvme}})
    found = launch.resolve(execution_request(config()))
    assert (found.offload, found.nvme_path) == ("nvme", str(tmp_path))


@pytest.mark.parametrize(
    ("stage", "device", "message"),
    [
        (0, "cpu", "zero.offload: cpu needs zero.stage 1, 2 or 3"),
        (2, "nvme", "zero.offload: nvme needs zero.stage 3, not 2"),
    ],
)
def test_offload_that_the_stage_rules_out(
    launcher: Any, stage: int, device: str, message: str
) -> None:
    launcher(zero_stage=stage)
    zero = {"offload": device} | ({"nvme_path": "/"} if device == "nvme" else {})
    assert refusal(zero=zero) == message


def test_offload_without_deepspeed() -> None:
    assert "zero.offload: cpu needs zero.stage" in refusal(zero={"offload": "cpu"})


# the files in configs/


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_every_config(path: Path) -> None:
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= 1
    if path in BY_DEEPSPEED:
        assert loaded.distributed_type == "DEEPSPEED"
        assert loaded.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
        json_file = Path(loaded.deepspeed_config["deepspeed_config_file"])
        assert json_file == Path("configs/deepspeed", path.stem + ".json")
        assert (ROOT / json_file).exists()
    else:
        assert path.stem.endswith(str(loaded.mixed_precision))


def test_no_deepspeed_json_is_left_over() -> None:
    files = {path.stem for path in (ROOT / "configs" / "deepspeed").glob("*.json")}
    assert files == {path.stem for path in BY_DEEPSPEED}


def test_nvme_without_libaio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from hpdist.engines.deepspeed_plugin import make_plugin

    monkeypatch.setattr(type(AsyncIOBuilder()), "is_compatible", lambda self: False)
    with pytest.raises(ConfigError, match=r"zero.offload: nvme needs libaio.* install libaio-dev"):
        make_plugin(ExecutionPlan(stage=3, offload="nvme", nvme_path=str(tmp_path)))


@pytest.mark.parametrize("path", BY_DEEPSPEED, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:HPDIST_ALLOW_CPU_FP16=1")
def test_deepspeed_takes_every_json(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.setenv(launch.ALLOW_CPU_FP16, "1")
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig

    from hpdist.engines.deepspeed_plugin import make_plugin

    kind = type(get_accelerator())
    monkeypatch.setattr(kind, "is_fp16_supported", kind.is_fp16_supported)  # put back at the end
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    file = f"configs/deepspeed/{path.stem}.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", file)
    stage, _, precision = path.stem.removeprefix("zero").replace("_offload", "").partition("_")
    sharding = launch.with_batch(launch.resolve(execution_request(config())), 4, 2, 1)
    assert (sharding.stage, sharding.precision) == (int(stage), precision)
    assert sharding.offload == ("cpu" if "offload" in path.stem else "none")
    values = dict(make_plugin(sharding).deepspeed_config)
    assert values.pop("train_batch_size") == "auto"
    made = DeepSpeedConfig(values)
    assert made.zero_config.stage == sharding.stage
    for part in (made.zero_config.offload_optimizer, made.zero_config.offload_param):
        assert (part.device if part else "none") == sharding.offload
    assert (made.float16_config.enabled, made.bfloat16_config.enabled) == (
        precision == "fp16",
        precision == "bf16",
    )
    assert (made.train_micro_batch_size_per_gpu, made.gradient_accumulation_steps) == (4, 2)


def test_nulls_in_a_json_are_as_if_left_out(launcher: Any) -> None:
    from hpdist.engines.deepspeed_plugin import make_plugin

    for file in ({"zero_optimization": None}, {"zero_optimization": {"offload_optimizer": None}}):
        launcher(file | {"fp16": None})
        values = make_plugin(launch.resolve(execution_request(config()))).deepspeed_config
        assert values["zero_optimization"]["stage"] == 0
        assert not values["fp16"]["enabled"]


# the real launcher


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def accelerate(digits: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with ZeRO-2 in fp16 on two CPU ranks."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "configs/accelerate/zero2_fp16.yaml", "--num_processes", "2"]
    command += ["--main_process_port", str(free_port())]
    command += ["-m", "hpdist", "train", "configs/digits.yaml", "--dry-run"]
    command += ["--model.width", "8", "--batch.labeled", "8", "--batch.unlabeled", "16"]
    for source, name in (("labeled", "train"), ("unlabeled", "train"), ("test", "test")):
        files = {name: str(digits / f"{name}-*.parquet")}
        command += [f"--data.{source}.data_files", json.dumps(files)]
    return subprocess.run(
        [*command, "--run.dir", str(digits / "runs"), *overrides],
        cwd=ROOT,
        env=kept | {launch.ALLOW_CPU_FP16: "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@on_cpu
def test_a_launch_for_real(digits: Path) -> None:
    done = accelerate(digits)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "dry run:" in line]
    assert "one step, loss" in line
    assert not (digits / "runs").exists()


@on_cpu
@pytest.mark.slow
def test_a_launch_that_disagrees(digits: Path) -> None:
    done = accelerate(digits, "--precision", "bf16")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "Error: precision" in line]
    assert line == (
        "hpdist: ConfigError: precision: bf16 in hpdist's config, but fp16.enabled: true in "
        "configs/deepspeed/zero2_fp16.json; make them agree, or leave hpdist's out"
    )
    # No traceback of ours; torchrun's own, of another package's files, is not ours to stop.
    assert f"{ROOT / 'hpdist'}{os.sep}" not in done.stderr
