"""Adapters on one rank, under DDP, ZeRO-2, ZeRO-3 and FSDP2: one curve, and a base that stays."""

import os

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from hpdist.train import config as configuration
from hpdist.train.trainer import Trainer
from tests.distributed.test_text import close, curve
from tests.support.ranks import run_ranks
from tests.support.texts import SENTENCES, news_config, write_model
from tests.unit.models.test_hugging_face import build

STAGES = (None, 2, 3, "fsdp2")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    model = write_model(folder / "bert")
    build(model, classes=2, seed=5).model.save_pretrained(model)
    texts = [SENTENCES[row % 6] + " " + SENTENCES[(row * 5 + 1) % 6] for row in range(32)]
    rows = datasets.Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(32)]})
    rows.to_parquet(str(folder / "rows.parquet"))
    return model, folder / "rows.parquet"


def config(folder, places, stage, steps=4):
    model, file = places
    rows = {"path": "parquet", "input": "text", "data_files": str(file)}
    return news_config(
        folder,
        model,
        model={"name": f"hf:{model}", "lora": {"rank": 2, "targets": ["query", "dense"]}},
        data={"labeled": rows, "unlabeled": rows, "test": rows},
        algorithm={"name": "fixmatch", "threshold": 0.5},
        **sharded(stage),
        schedule={"name": "constant"},
        steps=steps,
    )


def sharded(stage):
    if stage == "fsdp2":
        return {"shard": {"engine": stage, "min_parameters": 0}}
    return {"zero": {"stage": stage}}


def train(folder, places, stages):
    """Train in each stage, the last one resumed; how far the base's weights have moved in each."""
    moved = {}
    for stage in stages:
        for steps in (2, 4) if stage in (3, "fsdp2") else (4,):
            forget_launch()
            values = config(folder / str(stage), places, stage, steps)
            trainer = Trainer.from_config(configuration.parse(values))
            summary = trainer.fit()
        assert summary["steps"] == 4
        assert 0 <= summary["test/accuracy"] <= 1
        moved[stage] = change(trainer.step.engine.module.model, places[0])
    return moved


def forget_launch():
    """Let a process start a run of another stage."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        del os.environ[key]


def change(model, folder):
    """The largest change of any weight that is not trained, and how many there are."""
    stored = load_file(folder / "model.safetensors")
    largest, seen = 0.0, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        values = stored[name.replace(".base_layer", "")]
        if hasattr(parameter, "ds_tensor"):  # this rank's part
            own = parameter.ds_tensor.detach().flatten()
            start = torch.distributed.get_rank() * len(own)
            values = values.flatten()[start : start + len(own)]
            parameter = own[: len(values)]
        if isinstance(parameter, DTensor):  # likewise
            own = parameter.to_local()
            rows = torch.distributed.get_rank() * -(-len(values) // parameter.device_mesh.size())
            values, parameter = values[rows : rows + len(own)], own
        if len(values):
            largest = max(largest, float((parameter.detach() - values).abs().max()))
        seen += 1
    return largest, seen


@pytest.mark.slow
def test_the_same_curve_on_one_and_two_ranks_under_ddp_and_zero(tmp_path, places):
    (alone,) = [train(tmp_path / "one", places, [None])]
    for ranks in run_ranks(2, train, tmp_path / "two", places, STAGES):
        assert set(ranks) == set(STAGES)
        assert all(largest == 0 and seen > 20 for largest, seen in ranks.values())
    assert alone[None][0] == 0
    one = curve(tmp_path / "one" / "None")
    assert any(mask > 0 for _, _, mask, _ in one)
    for stage in STAGES:
        assert close(one, curve(tmp_path / "two" / str(stage)), rel=1e-3), stage
