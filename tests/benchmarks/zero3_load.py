"""How a checkpoint gets into ZeRO-3's shards: memory of each rank while it is loaded.

    python -m tests.benchmarks.zero3_load [--out FOLDER]

A BERT of 110 million random weights, on CPU ranks that train in fp32: as a run does, which keeps
weights as pages of the checkpoint's files until they are partitioned, one after the other; loaded
whole and then partitioned by DeepSpeed; and under `deepspeed.zero.Init`, where every weight is
partitioned as it is made.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.memory import Peak, own_memory
from tests.support.ranks import run_ranks

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
WAYS = {
    "run": "as a run does",
    "whole": "whole, then partitioned",
    "init": "under zero.Init",
}
TINY = {"hidden_size": 12, "num_hidden_layers": 1, "intermediate_size": 12}


def load(folder: str, way: str) -> Any:
    """A model whose weights are partitioned."""
    import deepspeed
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.integrations import HfDeepSpeedConfig

    from hpdist.data.decode.text import TextSpec, Tokenizer
    from hpdist.engines.zero3 import partition_weights
    from hpdist.models import HuggingFaceConfig, build_model
    from hpdist.models.stored import weights_as_stored
    from hpdist.train.checks import check_model

    if way == "run":
        spec = TextSpec(Tokenizer(folder, 32))
        with weights_as_stored(True):
            model = build_model(HuggingFaceConfig(name=f"hf:{folder}"), spec, 2, 0)
        check_model(model, spec.example(2), 2)
        partition_weights(model, CONFIG, torch.device("cpu"))
        return model
    config = CONFIG | {"train_batch_size": int(os.environ["WORLD_SIZE"])}
    kept = HfDeepSpeedConfig(config) if way == "init" else None
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True
    )
    if way == "whole":
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    del kept
    return model


def measure(tiny: str, folder: str, way: str) -> tuple[float, float, float]:
    """Peak of own memory and what is kept of it, over the start, as shares of the fp32 weights."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    load(tiny, way)  # imports what there is to import
    start = time.monotonic()
    with Peak() as peak:
        model = load(folder, way)
    seconds = time.monotonic() - start
    size = sum(p.ds_numel for p in model.parameters()) * 4 / 2**20
    return peak.rise / size, (own_memory() - peak.start) / size, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from tests.support.texts import write_tokenizer

    lines = [
        "# Loading a checkpoint under ZeRO-3",
        "",
        "A BERT of 110 million weights, CPU ranks that train in fp32: a process's own memory "
        "(without pages of files, which ranks share), over what it had before, as a share of the "
        "weights in fp32; of the rank that has most.",
        "",
        "| stored as | loaded | ranks | peak while loading | kept afterwards | seconds |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            places = []
            for name, config in (("tiny", BertConfig(**TINY)), ("large", BertConfig())):
                place = Path(folder, f"{dtype}-{name}")
                write_tokenizer(place)
                model = BertForSequenceClassification(config).to(getattr(torch, dtype))
                model.save_pretrained(place)
                places.append(str(place))
            for way, said in WAYS.items():
                for ranks in (2,) if way == "init" else (1, 2, 4):
                    found = run_ranks(ranks, measure, *places, way)
                    peak, kept, seconds = (max(values) for values in zip(*found, strict=True))
                    print(f"{dtype}, {said}, {ranks} ranks: {found}", flush=True)
                    lines.append(
                        f"| {dtype} | {said} | {ranks} | {peak:.2f} | {kept:.2f} | {seconds:.0f} |"
                    )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        (options.out / "zero3_load.md").write_text(text)


if __name__ == "__main__":
    main()
