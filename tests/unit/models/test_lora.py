"""Adapters: what is trained, what never changes, and what is refused."""

import datasets
import pytest
import torch
from safetensors.torch import load_file

from hpdist.checkpoint.manifest import list_checkpoints
from hpdist.checkpoint.reader import SavedRun
from hpdist.errors import ConfigError
from hpdist.models import HuggingFaceConfig, build_model
from hpdist.models.with_heads import with_heads
from hpdist.train import config as configuration
from hpdist.train.trainer import Trainer
from tests.support.texts import SENTENCES, write_model
from tests.unit.models.test_hugging_face import DISTILBERT, build, spec_of

LORA = {"rank": 2, "alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BERT with saved weights."""
    place = write_model(tmp_path_factory.mktemp("bert"))
    build(place, classes=2, seed=5).model.save_pretrained(place)
    return place


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_only_adapters_and_the_classifier_are_trained(folder):
    model = build(folder, pretrained=True, lora=LORA | {"targets": ["query", "*.layer.1.*.value"]})
    names = trained(model.model)
    adapters = {name for name in names if "lora_" in name}
    assert names - adapters == {"classifier.weight", "classifier.bias"}
    assert {name.rpartition(".lora_")[0] for name in adapters} == {
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.self.value",
    }
    shapes = {p.shape for n, p in model.model.named_parameters() if n in adapters}
    assert shapes == {(2, 32), (32, 2)}
    again = build(folder, pretrained=True, lora=LORA | {"targets": ["query", "*.layer.1.*.value"]})
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_at_first_the_model_is_what_it_was(folder):
    ids = spec_of(folder).decode_rows(SENTENCES, range(6), "t")
    plain = build(folder, classes=2, pretrained=True).eval()
    model = build(folder, classes=2, pretrained=True, lora=LORA).eval()
    assert torch.equal(plain(ids), model(ids))


def test_gpt_2_too_whose_layers_are_turned_round(tmp_path):
    from tests.unit.models.test_hugging_face import GPT

    model = build(write_model(tmp_path, GPT), lora=LORA).train()
    assert {name.rpartition(".")[2] for name in trained(model)} == {"weight"}
    assert all("lora_" in name or "score" in name for name in trained(model))
    ids = spec_of(tmp_path).decode_rows(SENTENCES, range(6), "t")
    model(ids).logsumexp(dim=1).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_the_checkpoint_lacks_is_trained_as_well(folder, tmp_path):
    from transformers import AutoModel

    place = write_model(tmp_path)
    AutoModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(place)
    names = trained(build(place, pretrained=True, lora=LORA).model)
    assert "bert.pooler.dense.weight" in names
    assert "bert.embeddings.word_embeddings.weight" not in names


def test_heads_and_layer_decay_go_with_them(folder):
    model = build(folder, pretrained=True, lora=LORA, layer_decay=0.5)
    scales = {n: p.lr_scale for n, p in model.model.named_parameters() if p.requires_grad}
    assert scales["bert.encoder.layer.0.attention.self.query.lora_A.default.weight"] == 0.25
    algorithm = configuration.ComponentOf("algorithm").choose({"name": "simmatch"}).build(4)
    whole = with_heads(model, algorithm, spec_of(folder).example(2))
    assert whole._features.module == "model.classifier"


def run(tmp_path, folder, **changes):
    rows = datasets.Dataset.from_dict({"text": SENTENCES * 2, "label": [0, 1] * 6})
    trainer = Trainer(
        {"name": f"hf:{folder}", "lora": LORA},
        {"name": "fixmatch", "threshold": 0.5},
        labeled=rows,
        unlabeled=rows,
        test=rows,
        views={"name": "text", "max_length": 32},
        batch={"labeled": 4, "unlabeled": 8},
        optim={"name": "adamw", "lr": 0.01},
        schedule={"name": "constant"},
        teacher={"decay": 0.9},
        run={"dir": str(tmp_path), "name": "run"},
        tracker={"name": "none"},
        **({"steps": 4} | changes),
    )
    return trainer, trainer.fit()


def test_the_base_never_changes_and_a_checkpoint_gives_the_same_model_again(tmp_path, folder):
    stored = load_file(folder / "model.safetensors")
    trainer, summary = run(tmp_path, folder, steps=2)
    trainer, summary = run(tmp_path, folder)  # goes on from the checkpoint
    assert summary["steps"] == 4
    module = trainer.step.engine.module
    seen = 0
    for name, parameter in module.model.named_parameters():
        name = name.replace(".base_layer", "")
        if not parameter.requires_grad:
            assert torch.equal(parameter, stored[name]), name
            seen += 1
        elif name in stored:
            assert not torch.equal(parameter, stored[name]), name
        elif "lora_B" in name:
            assert parameter.abs().max() > 0, name
    assert seen > 20
    # The checkpoint's teacher in a model that is built anew says what the run's teacher says.
    newest = max(list_checkpoints(tmp_path / "run" / "checkpoints"))
    teacher = SavedRun(newest).whole("teacher")
    assert set(teacher) == trained(module)
    config = HuggingFaceConfig(name=f"hf:{folder}", lora=LORA)
    fresh = build_model(config, spec_of(folder), 2, seed=9)
    named = dict(fresh.named_parameters())
    with torch.no_grad():
        for name, values in teacher.items():
            named[name].copy_(values.view(named[name].shape))
    ids = spec_of(folder).decode_rows(SENTENCES, range(6), "t")
    module.eval()
    with trainer.step.teacher.teacher_weights(), torch.no_grad():
        expected = module(ids)
        torch.testing.assert_close(fresh.eval()(ids), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(module(ids), expected)


def test_what_is_wrong_is_one_line(folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no linear layer is called 'qery', did you mean 'query"):
        build(folder, lora=LORA | {"targets": ["qery"]})
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: peft has no default for a"):
        build(write_model(tmp_path, DISTILBERT), lora=LORA)
    with pytest.raises(ConfigError, match=r"model\.lora\.rank: must be .*greater than 0, not 0"):
        build_config({"rank": 0})
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"model\.lora needs peft.*pip install 'hpdist\[lora\]'"):
        build(folder, lora=LORA)


def build_config(lora):
    return configuration.parse(
        {
            "model": {"name": "hf:m", "lora": lora},
            "data": {"labeled": {"path": "m"}},
            "algorithm": {"name": "supervised"},
            "steps": 1,
        }
    )
