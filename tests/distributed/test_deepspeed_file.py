"""What of a DeepSpeed JSON is passed on to DeepSpeed does not change what a run learns."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpdist import cli
from tests.support.picture_runs import write_config
from tests.support.pictures import write_pictures
from tests.support.ranks import run_ranks

PASSED = {
    "communication_data_type": "fp32",
    "comms_logger": {"enabled": True, "verbose": False},
    "wall_clock_breakdown": True,
    "memory_breakdown": False,
    "dump_state": True,
    "timers": {"throughput": {"enabled": True}},
    "disable_python_gc": True,
    "steps_per_print": 1,
    "zero_allow_untested_optimizer": False,
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}
ZERO = {
    1: {"overlap_comm": True, "allgather_partitions": False, "round_robin_gradients": True},
    2: {"reduce_scatter": False, "contiguous_gradients": False, "ignore_unused_parameters": False},
    3: {
        "sub_group_size": 100,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_max_live_parameters": 1000,
        "param_persistence_threshold": 100000,
        "stage3_gather_fp16_weights_on_model_save": True,
    },
}


def run(path: str, name: str, file: str | None, stage: int) -> int:
    if file is not None:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = file
    settings = ["--run.name", name, "--zero.stage", str(stage), "--precision", "bf16"]
    settings += ["--batch.micro", "7", "--steps", "4"]  # two micro-batches on each of two ranks
    return cli.main(["train", path, *settings])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_passed_on_does_no_harm(tmp_path: Path, stage: int) -> None:
    path = write_config(tmp_path, write_pictures(tmp_path))
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(PASSED | {"zero_optimization": ZERO[stage] | {"stage": stage}}))
    losses = {}
    for name, named in (("plain", None), ("file", str(file))):
        assert run_ranks(2, run, str(path), name, named, stage) == [0, 0]
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["file"]) == 4
    assert losses["file"] == pytest.approx(losses["plain"], rel=2e-2)
