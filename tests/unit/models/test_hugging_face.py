"""Hugging Face models by name: what they compute, how they are loaded, and what is refused."""

import json
import shutil

import pytest
import torch
from torch import nn

from hpdist.algorithms import FixMatch, MixMatch
from hpdist.data.decode.text import TextSpec, Tokenizer
from hpdist.errors import ConfigError
from hpdist.models import build_model
from hpdist.models.activation_checkpointing import checkpoint_activations
from hpdist.models.hf.text import HuggingFaceConfig
from hpdist.models.with_heads import Features, with_heads
from hpdist.train import config as configuration
from hpdist.train.checks import check_inputs
from hpdist.train.optim import Optim, build_optimizer
from tests.support.texts import SENTENCES, write_model

DISTILBERT = {
    "model_type": "distilbert",
    "architectures": ["DistilBertForSequenceClassification"],
    "dim": 32,
    "hidden_dim": 64,
    "n_heads": 2,
    "n_layers": 2,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "initializer_range": 0.3,
}
ROBERTA = {
    "model_type": "roberta",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 66,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
GPT = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 64,
} | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
KINDS = {"bert": {}, "distilbert": DISTILBERT, "roberta": ROBERTA, "gpt2": GPT}
VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {kind: write_model(folder / kind, config) for kind, config in KINDS.items()}
    made["vit"] = folder / "vit"
    made["vit"].mkdir()
    (made["vit"] / "config.json").write_text(json.dumps(VIT))
    return made


def spec_of(folder, length=32):
    return TextSpec(Tokenizer(str(folder), length))


def build(folder, length=32, classes=4, seed=0, **options):
    config = HuggingFaceConfig(name=f"hf:{folder}", **({"pretrained": False} | options))
    return build_model(config, spec_of(folder, length), classes, seed)


@pytest.mark.parametrize("kind", list(KINDS))
def test_padding_never_changes_what_is_said_of_a_row(folders, kind):
    model = build(folders[kind]).eval()
    spec = spec_of(folders[kind])
    wide = spec_of(folders[kind], 60)
    texts = ["Oil rose.", SENTENCES[0], *SENTENCES]
    with torch.no_grad():
        together = model(spec.decode_rows(texts, range(len(texts)), "t"))
        for row, text in enumerate(texts):
            alone = model(spec.decode(text)[None])
            padded = model.model(  # with all of its padding
                input_ids=wide.decode(text)[None],
                attention_mask=(wide.decode(text)[None] != model.pad).long(),
            ).logits
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    assert together.std(dim=0).min() > 1e-3  # the rows are told apart


def test_columns_of_padding_do_not_reach_the_model(folders):
    model = build(folders["bert"]).eval()
    spec = spec_of(folders["bert"])
    seen = []
    model.model.bert.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            kwargs.get("input_ids", args[0] if args else None).shape
        ),
        with_kwargs=True,
    )
    ids = spec.decode_rows(["Oil rose.", "No one."], [0, 1], "t")
    longest = int((ids != model.pad).sum(dim=1).max())
    model(ids)
    assert seen[0] == (2, longest)
    assert longest < 32


def test_gradients_of_padded_and_trimmed_rows_are_equal(folders):
    spec = spec_of(folders["bert"])
    ids = spec.decode_rows(SENTENCES, range(6), "t")
    found = []
    for trims in (True, False):
        model = build(folders["bert"]).eval()
        said = model(ids) if trims else model.model(ids, attention_mask=(ids != 0).long()).logits
        said.logsumexp(dim=1).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-5)


def test_no_rows_and_rows_of_padding_give_numbers(folders):
    model = build(folders["bert"]).eval()
    assert tuple(model(torch.zeros(0, 32, dtype=torch.int64)).shape) == (0, 4)
    assert model(torch.zeros(2, 32, dtype=torch.int64)).isfinite().all()
    ids = spec_of(folders["bert"]).decode("Oil rose.")[None]
    mixed = model(torch.cat([ids, torch.zeros_like(ids)]))
    torch.testing.assert_close(mixed[:1], model(ids), rtol=1e-4, atol=1e-5)


def test_random_weights_follow_from_the_seed_and_config_overrides_count(folders):
    one, two, other = (build(folders["bert"], seed=seed) for seed in (0, 0, 1))
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)
    deep = build(folders["bert"], config={"num_hidden_layers": 3})
    assert len(deep.model.bert.encoder.layer) == 3
    assert one.training
    assert {p.dtype for p in one.parameters()} == {torch.float32}


def test_a_checkpoint_is_loaded_with_a_new_last_layer_for_other_classes(folders, tmp_path):
    saved = build(folders["bert"], classes=2, seed=5)
    shutil.copytree(folders["bert"], tmp_path / "saved")
    saved.model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    same = build(tmp_path / "saved", classes=2, pretrained=True)
    for name, parameter in same.model.named_parameters():
        assert torch.equal(parameter, saved.model.state_dict()[name].float()), name
        assert parameter.dtype == torch.float32
    other = build(tmp_path / "saved", classes=4, pretrained=True)
    again = build(tmp_path / "saved", classes=4, pretrained=True)
    for (name, parameter), twin in zip(
        other.model.named_parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(parameter, twin)
        if not name.startswith("classifier"):
            assert torch.equal(parameter, saved.model.state_dict()[name].float()), name
    assert other.model.classifier.weight.shape == (4, 32)
    with pytest.raises(ConfigError, match=r"model\.config .* set model\.pretrained: false"):
        build(tmp_path / "saved", pretrained=True, config={"hidden_size": 64})


def test_an_image_model_is_chosen_by_the_input(folders):
    config = HuggingFaceConfig(name=f"hf:{folders['vit']}", pretrained=False)
    model = build_model(config, (1, 8, 8), 10, 0)
    assert tuple(model(torch.rand(3, 1, 8, 8)).shape) == (3, 10)
    with pytest.raises(ConfigError, match="takes text or images"):
        build_model(config, (13,), 10, 0)


@pytest.mark.parametrize(
    ("kind", "features"), [("bert", 32), ("distilbert", 32), ("roberta", 32), ("gpt2", None)]
)
def test_features_are_what_the_last_linear_layer_is_given(folders, kind, features):
    algorithm = configuration.ComponentOf("algorithm").choose({"name": "simmatch"}).build(4)
    example = spec_of(folders[kind]).example(2)
    if features is None:  # its last linear layer sees every token
        with pytest.raises(ConfigError, match=r"model\.features"):
            with_heads(build(folders[kind]), algorithm, example)
        return
    model = with_heads(build(folders[kind]), algorithm, example)
    ids = spec_of(folders[kind]).decode_rows(SENTENCES, range(6), "t")
    where: Features = model._features
    with where.kept(model.model) as kept:
        model.model(ids)
    assert tuple(kept[-1].shape) == (6, features)
    said = model(ids)
    assert list(said) == ["logits", *algorithm.head_names]
    assert tuple(said["logits"].shape) == (6, 4)


def test_freezing(folders):
    model = build(folders["bert"], freeze=["bert.embeddings.*", "*.layer.0.*"])
    frozen = {n for n, p in model.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(n.startswith("bert.embeddings.") or ".layer.0." in n for n in frozen)
    with pytest.raises(ConfigError, match=r"model\.freeze: no parameter is called 'bret\.\*'"):
        build(folders["bert"], freeze=["bret.*"])
    with pytest.raises(ConfigError, match=r"model\.freeze: nothing is left to train"):
        build(folders["bert"], freeze=["*"])


def test_layer_decay_scales_each_block_by_the_next(folders):
    model = build(folders["bert"], layer_decay=0.5)
    scales = {n: p.lr_scale for n, p in model.model.named_parameters()}
    assert scales["classifier.weight"] == scales["bert.pooler.dense.bias"] == 1
    assert scales["bert.encoder.layer.1.output.dense.weight"] == 0.5
    assert scales["bert.encoder.layer.0.attention.self.query.bias"] == 0.25
    assert scales["bert.embeddings.word_embeddings.weight"] == 0.125
    optimizer = build_optimizer(model, Optim(name="adamw", lr=0.1, weight_decay=0.01))
    found = {}
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"])
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.01 if parameter.dim() >= 2 else 0)
            found[parameter] = group["lr_scale"]
    assert found == {p: scales[n] for n, p in model.model.named_parameters()}
    assert len(optimizer.param_groups) == 8


def test_activations_are_recomputed(folders):
    ids = spec_of(folders["bert"]).decode_rows(SENTENCES, range(6), "t")
    plain, saving = (build(folders["bert"]) for _ in range(2))
    checkpoint_activations(saving)
    assert all(layer.gradient_checkpointing for layer in saving.model.bert.encoder.layer)
    for model in (plain, saving):
        model(ids).logsumexp(dim=1).sum().backward()
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def refused(folder, said, **options):
    with pytest.raises(ConfigError, match=said) as error:
        build(folder, **options)
    assert "\n" not in str(error.value)


def test_what_is_wrong_is_one_line(folders, tmp_path):
    bert = folders["bert"]
    refused(
        bert,
        r"model\.config\.num_hiden_layers: .* did you mean 'num_hidden_layers'",
        config={"num_hiden_layers": 2},
    )
    refused(bert, "folder '.*bert' cannot be used: .*safetensors", pretrained=True)
    refused(bert, r"views\.max_length: the model fails on 80 tokens", length=80)
    refused(bert, r"knows 50 tokens, and the tokenizer .* has", config={"vocab_size": 50})
    with pytest.raises(
        ConfigError, match=r"is a model of type vit, .* no class that classifies text"
    ):
        build_model(
            HuggingFaceConfig(name=f"hf:{folders['vit']}", pretrained=False), spec_of(bert), 4, 0
        )
    with pytest.raises(
        ConfigError, match=r"is a model of type bert, .* no class that classifies images"
    ):
        build_model(HuggingFaceConfig(name=f"hf:{bert}", pretrained=False), (1, 8, 8), 4, 0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ConfigError, match="cannot be used"):
        build_model(HuggingFaceConfig(name=f"hf:{tmp_path}", pretrained=False), spec_of(bert), 4, 0)
    with pytest.raises(ConfigError, match=r"model\.name: there is no folder '/no/such'"):
        build_model(HuggingFaceConfig(name="hf:/no/such"), spec_of(bert), 4, 0)


def test_weights_that_are_no_safetensors_are_refused(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "pickled")
    torch.save(build(folders["bert"]).model.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    refused(tmp_path / "pickled", "cannot be used: ", pretrained=True)


def test_code_of_a_checkpoint_is_not_run(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "own")
    ran = tmp_path / "ran"
    (tmp_path / "own" / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    values = json.loads((tmp_path / "own" / "config.json").read_text())
    values["model_type"] = "own"
    values["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForSequenceClassification": "own.OwnModel",
    }
    (tmp_path / "own" / "config.json").write_text(json.dumps(values))
    spec = spec_of(folders["bert"])
    with pytest.raises(ConfigError, match="trust_remote_code"):
        build_model(HuggingFaceConfig(name=f"hf:{tmp_path / 'own'}"), spec, 4, 0)
    assert not ran.exists()


def test_the_hub_that_does_not_answer_is_one_line(folders, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'nobody/nothing' is no folder here, and the Hub"):
        build_model(HuggingFaceConfig(name="hf:nobody/nothing"), spec_of(folders["bert"]), 4, 0)


def test_without_transformers_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs transformers.*pip install 'hpdist\[text\]'"):
        build_model(HuggingFaceConfig(name="hf:bert"), (1, 8, 8), 4, 0)


def test_the_name_chooses_the_options():
    values = {
        "data": {"labeled": {"path": "m"}, "unlabeled": {"path": "m"}},
        "algorithm": {"name": "fixmatch"},
        "steps": 1,
    }
    parsed = configuration.parse(
        values | {"model": {"name": "hf:some/bert", "layer_decay": 0.8}, "views": {"name": "text"}}
    )
    assert isinstance(parsed.model, HuggingFaceConfig)
    assert parsed.model.path == "some/bert"
    assert configuration.parse(parsed.model_dump()).model == parsed.model
    with pytest.raises(ConfigError, match=r"model\.layers: unknown setting"):
        configuration.parse(values | {"model": {"name": "hf:bert", "layers": 2}})
    with pytest.raises(ConfigError, match=r"known: .*hf:folder-or-id, .*or python:"):
        configuration.parse(values | {"model": {"name": "brt"}})
    assert "layer_decay" in configuration.json_schema()


def test_algorithms_that_compute_with_inputs_are_refused_for_text(folders):
    spec = spec_of(folders["bert"])
    check_inputs(FixMatch(), spec)
    with pytest.raises(ConfigError, match=r"algorithm\.name: MixMatch mixes inputs"):
        check_inputs(MixMatch(), spec)
    with pytest.raises(ConfigError, match="does not take text"):
        build_model(configuration.ComponentOf("model").choose({"name": "mlp"}), spec, 4, 0)


def test_a_wrapped_model_is_a_plain_module(folders):
    assert isinstance(build(folders["bert"]), nn.Module)
