"""A checkpoint under ZeRO-3: no rank has more of it in memory of its own than it keeps.

And the run is that of weights which DeepSpeed shards itself, bit by bit.
"""

from contextlib import nullcontext

import datasets
import pytest
import torch

from hpdist.algorithms import MeanTeacher
from hpdist.engines import launch, zero3
from hpdist.models import HuggingFaceConfig, build_model
from hpdist.models.stored import weights_as_stored
from hpdist.models.with_heads import with_heads
from hpdist.train import config as configuration
from hpdist.train.checks import check_model
from hpdist.train.trainer import Trainer
from tests.distributed.test_lora import forget_launch
from tests.support.memory import Peak, free_at_once, mapped
from tests.support.ranks import run_ranks
from tests.support.run_records import records
from tests.support.texts import SENTENCES, news_config, write_model
from tests.unit.models.test_hugging_face import build, spec_of

LARGE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
}
SLACK = 20  # MiB, for two more weights of 4 MiB and what DeepSpeed and the heap keep
LOADS = [("float32", "fp32"), ("several", "bf16"), ("bfloat16", "fp32"), ("bfloat16", "bf16")]


def write(folder, config=None, classes=2):
    """The same weights in fp32, in one file and in several, and in bf16 in several."""
    write_model(folder / "config", config)
    model = build(folder / "config", classes=classes, seed=5).model
    for name, dtype, shard in (
        ("float32", torch.float32, "10GB"),
        ("several", torch.float32, "30MB"),
        ("bfloat16", torch.bfloat16, "15MB"),
    ):
        write_model(folder / name, config)
        model.to(dtype).save_pretrained(folder / name, max_shard_size=shard)
    return folder


def load(folder, precision, ranks):
    """MiB of the rank's own memory that loading and sharding took at most, and of fp32 weights."""
    forget_launch()
    sharding = launch.ExecutionPlan(precision=precision, stage=3, micro_batch=1)
    accelerator = launch.make_accelerator(sharding)
    config = HuggingFaceConfig(name=f"hf:{folder}")
    spec = spec_of(folder)
    values = accelerator.state.deepspeed_plugin.deepspeed_config
    with Peak() as peak:
        with weights_as_stored(True):
            model = build_model(config, spec, 3, 0)  # whose last layer is new
        example = spec.example(2)
        check_model(model, example, 3)
        model = with_heads(model, MeanTeacher(3), example)
        zero3.partition_weights(model, values, accelerator.device)
    weights = sum(p.ds_numel for p in model.parameters()) * 4 / 2**20
    assert {p.ds_tensor.numel() for p in model.parameters()} == {
        -(-p.ds_numel // ranks) for p in model.parameters()
    }
    return model, peak.rise, weights


def loads(small, large, ranks):
    free_at_once()
    load(small / "bfloat16", "fp32", ranks)  # imports what there is to import
    kept, found = [], []
    for name, precision in LOADS:
        model, peak, weights = load(large / name, precision, ranks)
        kept.append(model)  # so that none uses memory that another has freed
        found.append((peak, weights))
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_has_its_shard_in_memory_and_little_more(tmp_path, ranks):
    small, large = write(tmp_path / "small"), write(tmp_path / "large", LARGE)
    assert len(list((large / "bfloat16").glob("*.safetensors"))) > 2
    for rank in run_ranks(ranks, loads, small, large, ranks):
        for (name, precision), (peak, weights) in zip(LOADS, rank, strict=True):
            assert weights > 95
            shard = weights / ranks * (1 if precision == "fp32" else 0.5)
            assert peak < shard + SLACK, (name, precision, peak, weights)


RUNS = {
    "teacher": (
        "bfloat16",
        "bf16",
        {"algorithm": {"name": "mean_teacher"}, "teacher": {"decay": 0.9}},
        {"layer_decay": 0.5, "freeze": ["bert.embeddings.word*"]},
    ),
    "heads": (
        "several",
        "bf16",
        {
            "algorithm": {"name": "simmatch", "width": 8, "bank": 16, "threshold": 0.5},
            "zero": {"stage": 3, "offload": "cpu"},
        },
        {},
    ),
    "lora": ("bfloat16", "fp32", {}, {"lora": {"rank": 2, "targets": ["query", "dense"]}}),
    "whole": ("float32", "fp32", {"optim": {"name": "sgd", "lr": 0.01}}, {"layer_decay": 0.5}),
}


def train(folder, saved, file, ours):
    """A short run of each kind, and what of each model is pages of files when it is sharded.

    DeepSpeed shards the weights if we do not.
    """
    seen, partition = [], zero3.partition_weights

    def look(model, *args):
        if ours:
            sizes = [(p.numel(), mapped(p)) for p in model.parameters()]
            seen.append(sum(n for n, there in sizes if there) / sum(n for n, _ in sizes))
            partition(model, *args)

    zero3.partition_weights = look
    if not ours:
        import hpdist.train.model

        hpdist.train.model.weights_as_stored = nullcontext
    rows = {"path": "parquet", "input": "text", "data_files": str(file)}
    for name, (place, precision, changes, model) in RUNS.items():
        forget_launch()
        values = news_config(
            folder,
            saved,
            **{
                "run": {"dir": str(folder), "name": name},
                "model": {"name": f"hf:{saved / place}"} | model,
                "data": {"labeled": rows, "unlabeled": rows, "test": rows},
                "algorithm": {"name": "freematch"},
                "zero": {"stage": 3},
                "precision": precision,
                "steps": 4,
            }
            | changes,
        )
        Trainer.from_config(configuration.parse(values)).fit()
    return seen


@pytest.mark.slow
def test_the_curve_is_that_of_weights_that_deepspeed_shards(tmp_path):
    saved = write(tmp_path / "saved", classes=3)  # the rows have two
    texts = [SENTENCES[row % 6] + " " + SENTENCES[(row * 5 + 1) % 6] for row in range(32)]
    rows = datasets.Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(32)]})
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for ours in (True, False):
        ranks = run_ranks(2, train, tmp_path / str(ours), saved, tmp_path / "rows.parquet", ours)
        for seen in ranks:
            assert len(seen) == (6 if ours else 0)  # two of the runs have a teacher's model
            assert all(share > 0.7 for share in seen)  # the rest is new
    for name in RUNS:
        curve, expected = (records(tmp_path / str(ours) / name) for ours in (True, False))
        assert len(curve) >= 4
        assert curve == expected, name
