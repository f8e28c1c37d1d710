"""How a checkpoint gets into ZeRO-3's shards: memory of each rank while it is loaded.

    python -m tests.benchmarks.zero3_load [--out FOLDER]

A BERT of 110 million random weights, on CPU ranks: loaded whole and then partitioned, which is what
a run does, and under `deepspeed.zero.Init`, where every weight is partitioned as it is made.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.ranks import run_ranks

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def resident() -> dict[str, float]:
    """MiB of this process: its own memory, and pages of files, which processes share."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {"own": int(found["RssAnon"]) / 1024, "file": int(found["RssFile"]) / 1024}


class Peak:
    """The most memory of a process's own, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.start = self.most = resident()["own"]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, resident()["own"])

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, resident()["own"])


def load(folder: str, sharded: bool) -> tuple[float, float, float]:
    """Peak of own memory and what is kept of it, over the start, as shares of the fp32 weights."""
    import deepspeed
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo")
    config = CONFIG | {"train_batch_size": torch.distributed.get_world_size()}
    kept = HfDeepSpeedConfig(config) if sharded else None
    start = time.monotonic()
    with Peak() as peak:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
        if not sharded:
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
    seconds = time.monotonic() - start
    del kept
    size = sum(p.ds_numel for p in model.parameters()) * 4 / 2**20
    return (peak.most - peak.start) / size, (resident()["own"] - peak.start) / size, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from transformers import BertConfig, BertForSequenceClassification

    lines = [
        "# Loading a checkpoint under ZeRO-3",
        "",
        "A BERT of 110 million weights, CPU ranks: a process's own memory (without pages of files, "
        "which ranks share), over what it had before, as a share of the weights in fp32; of the "
        "rank that has most.",
        "",
        "| stored as | loaded | ranks | peak while loading | kept afterwards | seconds |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = BertForSequenceClassification(BertConfig(num_labels=2))
        for dtype in ("float32", "bfloat16"):
            import torch

            place = str(Path(folder, dtype))
            model.to(getattr(torch, dtype)).save_pretrained(place)
            for sharded in (False, True):
                for ranks in (1, 2):
                    found = run_ranks(ranks, load, place, sharded)
                    peak, kept, seconds = (max(values) for values in zip(*found, strict=True))
                    way = "under zero.Init" if sharded else "whole, then partitioned"
                    print(f"{dtype}, {way}, {ranks} ranks: {found}", flush=True)
                    lines.append(
                        f"| {dtype} | {way} | {ranks} | {peak:.2f} | {kept:.2f} | {seconds:.0f} |"
                    )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        (options.out / "zero3_load.md").write_text(text)


if __name__ == "__main__":
    main()
