"""Weights left as a half-precision checkpoint stores them: no copy, and nothing else is changed."""

import json
from pathlib import Path

import pytest
import torch

from hpdist.algorithms import SimMatch
from hpdist.models import HuggingFaceConfig, build_model
from hpdist.models.outputs import on_trial
from hpdist.models.stored import weights_as_stored
from hpdist.models.with_heads import with_heads
from tests.support.memory import mapped
from tests.support.sounds import write_config
from tests.support.texts import SENTENCES, write_model
from tests.unit.models.test_hugging_face import GPT, VIT, spec_of
from tests.unit.models.test_hugging_face_audio import PICTURES, WAVES, WHISPER

RESNET = {
    "model_type": "resnet",
    "num_channels": 1,
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
KINDS = ("bert", "gpt2", "vit", "resnet", "wav2vec2", "whisper")
TEXTS = {"bert": None, "gpt2": GPT}
OTHERS = {"vit": VIT, "resnet": RESNET, "whisper": WHISPER}


def write(folder: Path, kind: str) -> Path:
    if kind in TEXTS:
        return write_model(folder, TEXTS[kind])
    if kind == "wav2vec2":
        return write_config(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OTHERS[kind]))
    return folder


def inputs_of(folder, kind):
    """What the model is for, and rows of it."""
    generator = torch.Generator().manual_seed(0)
    if kind in TEXTS:
        spec = spec_of(folder)
        return spec, spec.decode_rows(SENTENCES, range(6), "t")
    spec = {"wav2vec2": WAVES, "whisper": PICTURES}.get(kind, (1, 8, 8))
    shape = spec if isinstance(spec, tuple) else spec.model_input_shape
    return spec, torch.rand(6, *shape, generator=generator)


@pytest.fixture(scope="module", params=KINDS)
def saved(tmp_path_factory, request):
    """A checkpoint in bf16 of several files, with three classes."""
    kind, folder = request.param, tmp_path_factory.mktemp("saved") / request.param
    spec, inputs = inputs_of(write(folder, kind), kind)
    model = build_model(HuggingFaceConfig(name=f"hf:{folder}", pretrained=False), spec, 3, 1)
    for buffer in model.buffers():  # statistics that bf16 cannot hold
        if buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape) / 3)
    kept = {name: buffer.clone() for name, buffer in model.model.named_buffers()}
    model.model.bfloat16()
    for name, buffer in model.model.named_buffers():
        buffer.data = kept[name]
    model.model.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return kind, folder, spec, inputs


def load(saved, stored, **options):
    _, folder, spec, _ = saved
    with weights_as_stored(stored):
        return build_model(HuggingFaceConfig(name=f"hf:{folder}", **options), spec, 4, seed=2)


def test_the_weights_are_pages_of_the_files_and_what_is_new_is_as_ever(saved):
    whole, stored = load(saved, False), load(saved, True)
    new = set()
    for (name, one), (_, two) in zip(
        whole.named_parameters(), stored.named_parameters(), strict=True
    ):
        assert one.dtype == torch.float32
        assert not mapped(one)
        assert two.requires_grad
        assert torch.equal(one, two.float()), name
        if two.dtype == torch.float32:
            new.add(name.split(".")[1])
        else:
            assert mapped(two), name
    assert new in ({"classifier"}, {"score"})  # of other classes
    for (name, one), (_, two) in zip(whole.named_buffers(), stored.named_buffers(), strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two), name


def test_a_trial_is_that_of_the_model_in_fp32(saved):
    whole, stored = load(saved, False), load(saved, True)
    inputs = saved[-1]
    with on_trial(whole), on_trial(stored):
        one, two = whole(inputs), stored(inputs)
    assert two.dtype == torch.float32
    assert torch.equal(one, two)
    assert any(p.dtype == torch.bfloat16 for p in stored.parameters())


@pytest.mark.parametrize("saved", [kind for kind in KINDS if kind != "gpt2"], indirect=True)
def test_heads_are_those_of_the_model_in_fp32(saved):
    made = []
    for stored in (False, True):
        model = load(saved, stored)
        torch.manual_seed(5)
        made.append(with_heads(model, SimMatch(4), saved[-1]))
    one, two = (model.heads.state_dict() for model in made)
    assert one.keys() == two.keys()
    assert all(two[name].dtype == torch.float32 for name in two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("saved", TEXTS, indirect=True)
def test_adapters_are_those_of_the_model_in_fp32(saved):
    whole, stored = (load(saved, stored, lora={"rank": 2}) for stored in (False, True))
    adapters = 0
    for (name, one), (_, two) in zip(
        whole.named_parameters(), stored.named_parameters(), strict=True
    ):
        assert one.requires_grad == two.requires_grad
        assert torch.equal(one, two.float()), name
        if "lora_" in name:
            adapters += 1
            assert two.dtype == torch.float32
        elif not name.endswith(("classifier.weight", "classifier.bias", "score.weight")):
            assert mapped(two), name
    assert adapters


def test_a_checkpoint_in_fp32_is_pages_of_its_file_anyway(tmp_path):
    folder = write_model(tmp_path / "bert")
    build_model(
        HuggingFaceConfig(name=f"hf:{folder}", pretrained=False), spec_of(folder), 4, 1
    ).model.save_pretrained(folder)
    saved = (None, folder, spec_of(folder), None)
    for stored in (False, True):
        parameters = list(load(saved, stored).parameters())
        assert all(mapped(p) for p in parameters)
        assert all(p.dtype == torch.float32 for p in parameters)
