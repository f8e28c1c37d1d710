"""A small tokenizer and random models for text, and real news where they are at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

NEWS = Path(__file__).parents[3] / "shared" / "data" / "ag_news"
needs_news = pytest.mark.skipif(not NEWS.is_dir(), reason=f"needs the AG News files in {NEWS}")

SENTENCES = [
    "The cat sat on the mat and looked at the moon.",
    "Stocks fell on Wall Street as oil prices rose again.",
    "The team won the final after extra time.",
    "A new probe will look for water on the red planet.",
    "No one could say why the market was closed.",
    "Scientists found a star far away.",
]
BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,  # so that some pseudo-labels are confident
}


def write_tokenizer(folder: Path, sentences: list[str] | None = None, size: int = 400) -> int:
    """Write a WordPiece tokenizer like BERT's into a folder; how many tokens it has."""
    from tokenizers import BertWordPieceTokenizer, processors
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(sentences or SENTENCES, vocab_size=size, min_frequency=1)
    ends = [(token, trained.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    trained._tokenizer.post_processor = processors.BertProcessing(*ends)
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        **{f"{key}_token": token for key, token in names.items()},
    )
    fast.save_pretrained(folder)
    return len(fast)


def write_model(
    folder: Path, config: dict[str, Any] | None = None, sentences: list[str] | None = None
) -> Path:
    """Write a tokenizer and the config of a small BERT, without weights, into a folder."""
    size = write_tokenizer(folder, sentences)
    values = BERT | (config or {}) | {"vocab_size": size}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def news_config(folder: Path, source: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a short FixMatch run on news."""
    train = {"path": "parquet", "data_files": str(NEWS / "train-*.parquet")}
    values: dict[str, Any] = {
        "run": {"dir": str(folder), "name": "news"},
        "model": {"name": f"hf:{source}", "pretrained": False},
        "views": {"name": "text", "max_length": 48},
        "data": {
            "labeled": {**train, "labels_per_class": 4},
            "unlabeled": {**train, "streaming": True},
            "test": {
                "path": "parquet",
                "data_files": str(NEWS / "test-*.parquet"),
                "split": "train[:64]",
            },
        },
        "batch": {"labeled": 8, "unlabeled": 16},
        "algorithm": {"name": "fixmatch", "threshold": 0.6},
        "optim": {"name": "adamw", "lr": 0.001},
        "log": {"every": 1},
        "steps": 6,
        "tracker": {"name": "none"},
    }
    return values | changes


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
