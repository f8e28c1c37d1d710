"""Audio models of Hugging Face: padding, which models take what, and what is refused."""

import json

import pytest
import torch

from hpdist.algorithms import CRMatch, FixMatch, MixMatch
from hpdist.data.decode.audio import AudioSpec, Sampling
from hpdist.errors import ConfigError
from hpdist.models import build_model
from hpdist.models.cnn import CNNConfig
from hpdist.models.hf.audio import cut
from hpdist.models.hf.text import HuggingFaceConfig
from hpdist.models.mlp import MLPConfig
from hpdist.models.wide_resnet import WideResNetConfig
from hpdist.models.with_heads import with_heads
from hpdist.train.checks import check_inputs, check_model
from tests.support.sounds import rows_of, write_config

HUBERT = {"model_type": "hubert", "feat_proj_layer_norm": True}
AST = {
    "model_type": "audio-spectrogram-transformer",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_mel_bins": 16,
    "max_length": 20,
    "patch_size": 8,
    "frequency_stride": 4,
    "time_stride": 4,
    "hidden_dropout_prob": 0.0,
}
WHISPER = {
    "model_type": "whisper",
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 10,
    "classifier_proj_size": 16,
}
SAMPLING = Sampling(8000, 800)
WAVES = AudioSpec(SAMPLING, (800,))
PICTURES = AudioSpec(SAMPLING, (1, 16, 20))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {"wav2vec2": write_config(folder / "wav2vec2")}
    made["hubert"] = write_config(folder / "hubert", HUBERT)
    made["group"] = write_config(
        folder / "group", {"feat_extract_norm": "group", "do_stable_layer_norm": False}
    )
    for name, values in (("ast", AST), ("whisper", WHISPER)):
        made[name] = folder / name
        made[name].mkdir()
        (made[name] / "config.json").write_text(json.dumps(values))
    return made


def build(folder, spec=WAVES, classes=4, seed=0, **options):
    config = HuggingFaceConfig(name=f"hf:{folder}", **({"pretrained": False} | options))
    return build_model(config, spec, classes, seed)


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_padding_never_changes_what_is_said_of_a_row(folders, kind):
    model = build(folders[kind]).eval()
    rows = torch.from_numpy(rows_of(800, 640, 500, 400, 250, 107))
    with torch.no_grad():
        together = model(rows)
        for row, length in enumerate((800, 640, 500, 400, 250, 107)):
            bare = model.model(input_values=rows[row : row + 1, :length]).logits[0]
            alone = model(rows[row : row + 1])[0]
            torch.testing.assert_close(together[row], bare, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(alone, bare, rtol=1e-4, atol=1e-5)
        longer = torch.nn.functional.pad(rows, (0, 400), value=torch.nan)
        torch.testing.assert_close(model(longer), together, rtol=1e-4, atol=1e-5)
    assert together.std(dim=0).max() > 1e-3  # the rows are told apart


def test_a_model_that_normalises_over_time_sees_zeros_in_every_batch_as_many(folders):
    model = build(folders["group"]).eval()
    rows = torch.from_numpy(rows_of(800, 250))
    assert not model.masked
    with torch.no_grad():
        together = model(rows)
        alone = model(rows[1:])
        zeros = model.model(input_values=rows[1:].nan_to_num(0)).logits
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, zeros)


def test_gradients_do_not_depend_on_the_padding(folders):
    found = []
    for padding in (0, 450):
        model = build(folders["wav2vec2"])
        rows = torch.from_numpy(rows_of(350, 250, samples=350 + padding))
        model(rows).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(grad is not None and grad.isfinite().all() for grad in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_batch_is_cut_to_one_of_few_lengths(folders):
    lengths = {cut(longest, 16000) for longest in range(1, 16001)}
    assert len(lengths) == 9
    assert all(cut(longest, 16000) >= longest for longest in range(1, 16001, 7))
    assert all(cut(longest, 16000) < 1.5 * longest for longest in range(1000, 16001, 7))
    model = build(folders["wav2vec2"]).eval()
    seen = []
    model.model.wav2vec2.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or [kwargs["input_values"]])[0].shape[1]),
        with_kwargs=True,
    )
    with torch.no_grad():
        for length in (800, 401, 399, 300, 5):
            model(torch.from_numpy(rows_of(length, 5)))
    assert seen == [800, 565, 400, 400, 100]


def test_no_rows_and_rows_of_nothing_give_numbers(folders):
    model = build(folders["wav2vec2"])
    for mode in (model.train(), model.eval()):
        assert tuple(mode(torch.zeros(0, 800)).shape) == (0, 4)
        assert mode(torch.full((2, 800), torch.nan)).isfinite().all()
        assert mode(torch.from_numpy(rows_of(1, 20))).isfinite().all()


def test_the_models_own_noise_is_off_unless_it_is_asked_for(folders):
    model = build(folders["wav2vec2"]).train()
    rows = torch.from_numpy(rows_of(800, 300))
    torch.testing.assert_close(model(rows), model.eval()(rows))
    assert all("masked_spec_embed" not in name for name, _ in model.named_parameters())
    own = build(folders["wav2vec2"], config={"layerdrop": 0.5, "mask_time_prob": 0.1})
    assert own.model.config.layerdrop == 0.5
    assert any("masked_spec_embed" in name for name, _ in own.named_parameters())


@pytest.mark.parametrize("kind", ["ast", "whisper"])
def test_spectrograms_are_turned_as_the_model_takes_them(folders, kind):
    model = build(folders[kind], PICTURES).eval()
    x = torch.randn(3, 1, 16, 20)
    with torch.no_grad():
        given = x[:, 0].mT if kind == "ast" else x[:, 0]
        expected = model.model(**{model.model.main_input_name: given}).logits
        torch.testing.assert_close(model(x), expected)
    check_model(model, x, 4)


@pytest.mark.parametrize("config", [CNNConfig(), WideResNetConfig(depth=10, width=1), MLPConfig()])
def test_built_in_models_take_spectrograms_of_one_channel_and_no_waveforms(config):
    model = build_model(config, PICTURES, 4, 0)
    check_model(model, torch.zeros(2, 1, 16, 20), 4)
    with pytest.raises(ConfigError, match=r"not take waveforms; set views\.spectrogram: true"):
        build_model(config, WAVES, 4, 0)


def test_features_are_what_the_last_linear_layer_is_given(folders):
    model, example = build(folders["wav2vec2"]), WAVES.example(2)
    wrapped = with_heads(model, CRMatch(), example)
    with torch.no_grad():
        found = wrapped.train()(example)
    assert all(len(tensor) == 2 for tensor in found.values())
    assert {"logits", *CRMatch().head_names} <= found.keys()


def test_algorithms_that_compute_with_inputs_are_refused_for_waveforms():
    check_inputs(FixMatch(), WAVES)
    check_inputs(MixMatch(), PICTURES)
    with pytest.raises(ConfigError, match=r"MixMatch mixes .* set views\.spectrogram: true"):
        check_inputs(MixMatch(), WAVES)


@pytest.mark.parametrize(
    ("kind", "spec", "said"),
    [
        ("wav2vec2", PICTURES, r"takes waveforms; set views\.spectrogram: false"),
        ("ast", WAVES, r"takes spectrograms; set views\.spectrogram: true and views\.mels: 16"),
        ("whisper", WAVES, r"takes spectrograms; set views\.spectrogram: true"),
        ("ast", AudioSpec(SAMPLING, (1, 8, 20)), r"views\.mels: 8, and .* takes 16"),
        ("ast", AudioSpec(SAMPLING, (1, 16, 30)), r"its 30 frames are not the 20 that"),
        ("whisper", AudioSpec(SAMPLING, (1, 16, 30)), r"30 frames are not the 20"),
        ("wav2vec2", AudioSpec(Sampling(8000, 50), (50,)), r"50 samples, and .* needs 85"),
    ],
)
def test_what_does_not_fit_is_refused(folders, kind, spec, said):
    with pytest.raises(ConfigError, match=said):
        build(folders[kind], spec)


def test_models_that_classify_no_audio_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match=r"of type bert, for which transformers has no .* audio"):
        build(tmp_path)


def test_a_checkpoint_of_another_sampling_rate_is_refused(folders, tmp_path):
    build(folders["wav2vec2"], classes=3).model.save_pretrained(tmp_path)
    loaded = build(tmp_path, classes=5, pretrained=True).eval()
    assert loaded(WAVES.example(2)).shape == (2, 5)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 16000}))
    with pytest.raises(ConfigError, match=r"views\.sampling_rate: 8000 Hz, .* at 16000 Hz"):
        build(tmp_path, classes=5, pretrained=True)
