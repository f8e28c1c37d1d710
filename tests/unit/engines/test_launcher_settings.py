"""Settings of accelerate's config that hpdist does not honour are refused or named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open

from hpdist.engines import launch
from hpdist.errors import ConfigError
from hpdist.train.compose import execution_request
from tests.support.launched import config
from tests.support.picture_runs import train, write_config
from tests.support.pictures import write_pictures
from tests.support.ranks import free_port

ROOT = Path(__file__).parents[3]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about CPU ranks")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    theirs = ("ACCELERATE_", "HPDIST_", "PARALLELISM_", "OMPI_", "MASTER_")
    for name in list(os.environ):
        if name.startswith(theirs) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"USE_MEGATRON_LM": "true"}, "distributed_type: MEGATRON_LM.*DEEPSPEED"),
        (
            {"USE_SAGEMAKER": "true", "SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL"},
            "AMAZON_SAGEMAKER",
        ),
        ({"MIXED_PRECISION": "fp8"}, "mixed_precision is 'fp8'; use no, bf16 or fp16"),
        ({"DYNAMO_BACKEND": "NONSENSE"}, "dynamo_backend: NONSENSE .* does not have this backend"),
        (
            {"DYNAMO_BACKEND": "EAGER", "DYNAMO_USE_REGIONAL_COMPILATION": "True"},
            "dynamo_use_regional_compilation",
        ),
        ({"GRADIENT_ACCUMULATION_STEPS": "many"}, "gradient_accumulation_steps: 'many'"),
        ({"TORCH_DEVICE": "xpu:0"}, "ACCELERATE_TORCH_DEVICE=xpu:0"),
    ],
)
def test_what_hpdist_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ConfigError, match=named):
        launch.resolve(execution_request(config()))


@pytest.mark.parametrize("size", ["DP_SHARD_SIZE", "TP_SIZE", "CP_SIZE", "SP_SIZE"])
def test_other_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    (note,) = launch.resolve(execution_request(config())).notes
    assert "hpdist does not use parallelism_config (" in note
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size}", "2")
    with pytest.raises(ConfigError, match=f"parallelism_config_{size.lower()}: 2 in accelerate"):
        launch.resolve(execution_request(config()))


@on_cpu
def test_what_changes_nothing_is_named_on_one_line_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("DEEPSPEED_ZERO3_INIT", "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "USE_IPEX"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")  # no number for Accelerate
    monkeypatch.setenv("ACCELERATE_DEBUG_MODE", "true")
    sharding = launch.resolve(execution_request(config()))
    launch.make_accelerator(sharding)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "accelerate's" in line]
    for told in ("zero3_init_flag (", "zero3_save_16bit_model (", "ipex (", "debug ("):
        assert told in line
    assert os.environ["ACCELERATE_USE_IPEX"] == "true"  # for whoever comes after
    monkeypatch.setenv("RANK", "1")
    launch.make_accelerator(sharding)
    assert capsys.readouterr().err == ""


def test_a_compiled_models_weights_keep_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled by the launcher's config, and resumed without it."""
    AcceleratorState._reset_state(True)  # else Accelerate would keep to an earlier test's
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    sharding = launch.resolve(execution_request(config()))
    assert sharding.compile == {"backend": "eager"}
    (note,) = sharding.notes
    assert note.startswith("dynamo_backend: EAGER in accelerate's config: hpdist compiles")
    path = write_config(tmp_path, write_pictures(tmp_path))
    status, errors = train(path, "compiled", "--steps=2")
    assert status == 0, errors
    names: list[str] = []
    for path_of in (tmp_path / "runs/compiled/checkpoints/step-00000002").glob("*.safetensors"):
        with safe_open(path_of, "pt") as file:
            names += file.keys()
    assert "master/classifier.weight@0" in names
    assert not [name for name in names if "_orig_mod" in name]
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    status, errors = train(path, "compiled", "--steps=4")
    assert status == 0, errors


def test_how_a_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.resolve(execution_request(config())).compile is None
    assert launch.resolve(execution_request(config(compile=True))).compile == {}
    variables = {
        "BACKEND": "INDUCTOR",
        "MODE": "max-autotune",
        "USE_FULLGRAPH": "True",
        "USE_DYNAMIC": "False",
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    expected = {"backend": "inductor", "mode": "max-autotune", "fullgraph": True}
    assert launch.resolve(execution_request(config())).compile == expected


@on_cpu
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"mode": "reduce-overhead"}, r"compile: mode reduce-overhead records CUDA graphs, and no"),
        ({"backend": "eager", "mode": "max-autotune"}, r"mode max-autotune is inductor's, not"),
        ({"backend": "nvfuser"}, r"compile.backend: torch has no 'nvfuser'; it has"),
    ],
)
def test_a_compilation_that_cannot_work_is_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        launch.resolve(execution_request(config(compile=settings)))


def test_weights_that_zero3_moves_are_in_no_cuda_graph() -> None:
    chosen = config(compile={"mode": "max-autotune"}, zero={"stage": 3})
    with pytest.raises(ConfigError, match=r"zero.stage 3 moves them"):
        launch.resolve(execution_request(chosen))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("fast", r"compile: must be true, false, or settings such as"),
        ({"mod": "default"}, r"compile.mod: "),
        ({"mode": "quick"}, r"compile.mode: "),
    ],
)
def test_settings_of_the_compiler_are_checked(value: object, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config(compile=value)


def test_accumulation_in_accelerates_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    sharding = launch.resolve(execution_request(config()))
    assert launch.with_batch(sharding, 8, 4, 1).accumulation == 4
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps: 4 in accelerate.* it 2;"):
        launch.with_batch(sharding, 8, 2, 1)


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("DEEPSPEED_ZERO_STAGE", "3", "zero_stage: 3 .*but zero_optimization.stage: 1 in "),
        ("GRADIENT_CLIPPING", "2.0", "gradient_clipping: 2.0 .*but gradient_clipping: 1 in "),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "nvme", "offload_optimizer_device: nvme .*cpu in "),
        ("MIXED_PRECISION", "fp16", "mixed_precision: fp16 .*but bf16.enabled: true in "),
    ],
)
def test_a_file_that_differs_from_the_config_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, named: str
) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    said = {"zero_optimization": zero, "gradient_clipping": 1, "bf16": {"enabled": True}}
    file.write_text(json.dumps(said))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert launch.resolve(execution_request(config())).stage == 1
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ConfigError, match=named):
        launch.resolve(execution_request(config()))
    file.write_text("{}")  # which leaves it open
    if variable == "DEEPSPEED_ZERO_STAGE":
        assert launch.resolve(execution_request(config())).stage == 3


def test_an_old_deepspeed_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tmp_path / "deepspeed-0.18.2.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.2\n")
    assert launch.resolve(execution_request(config(zero={"stage": 2}))).stage == 2
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs deepspeed 0\.19\.8 or newer, and 0\.18\.2 is"):
        launch.resolve(execution_request(config(zero={"stage": 2})))
    assert launch.resolve(execution_request(config())).stage is None


@on_cpu
def test_one_process_in_place_of_several_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch --cpu --num_processes 2` starts it."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert launch.resolve(execution_request(config())).notes == ()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    (note,) = launch.resolve(execution_request(config())).notes
    assert "accelerate has started one process, although several were requested" in note


MPI = """
from hpdist.train.config import parse
from hpdist.train.compose import execution_request
from hpdist.engines import launch
from hpdist.distributed.collectives import gathered, leave_group
import os
run = {"model": {"name": "cnn"}, "data": {"labeled": {"path": "x"}},
       "algorithm": {"name": "supervised"}, "steps": 1}
accelerator = launch.make_accelerator(launch.resolve(execution_request(parse(run))))
print(accelerator.num_processes, gathered(accelerator.process_index), os.environ["WORLD_SIZE"])
leave_group()
"""


@on_cpu
def test_ranks_of_mpirun_are_one_training() -> None:
    """They would otherwise each train the whole batch by themselves, into one run folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    port = str(free_port())
    started = []
    for rank in ("0", "1"):
        theirs = {f"OMPI_COMM_WORLD_{name}RANK": rank for name in ("", "LOCAL_")}
        theirs |= {f"OMPI_COMM_WORLD_{name}SIZE": "2" for name in ("", "LOCAL_")}
        environment = kept | theirs | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", MPI]
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        )
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert output.split("\n")[-2] == "2 [0, 1] 2"


def test_pmi_variables_of_srun_alone_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    launch.resolve(execution_request(config()))
    assert "WORLD_SIZE" not in os.environ
