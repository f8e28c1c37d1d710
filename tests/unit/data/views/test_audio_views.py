"""Views of sound: the spectrogram's formula, what each option does, and what a row depends on."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from hpdist.data.views.audio import AudioViewsConfig, StrongAudio, WeakAudio, moved, split
from hpdist.data.views.spectrum import bands_of, frames_of, log_mel, mel_bands, runs, without_bands
from hpdist.errors import ConfigError, DataError
from hpdist.train import config as configuration
from tests.support.sounds import rows_of, tone

CONFIGS = Path(__file__).parents[4] / "configs"
QUIET = {"shift": 0.0, "gain": 0.0, "snr": None}
STILL = QUIET | {"speed": 0.0, "time_masks": 0, "frequency_masks": 0}
SOUNDS = torch.from_numpy(rows_of(800, 500, 121, 40, 9, 800))


def views(strong=None, weak=None, **options):
    options = {"sampling_rate": 8000, "seconds": 0.1, "mels": 16, "hop": 0.005} | options
    weak, strong = WeakAudio(**QUIET | (weak or {})), StrongAudio(**STILL | (strong or {}))
    return AudioViewsConfig(**options, weak=weak, strong=strong).build(3)


def made(made_by, x=SOUNDS, kind="strong", stream="unlabeled", step=0, copy=0, positions=None):
    positions = torch.arange(len(x)) if positions is None else positions
    return getattr(made_by, kind)(x, stream=stream, step=step, positions=positions, copy=copy)


@pytest.mark.parametrize(
    ("rate", "window", "hop"), [(8000, 256, 80), (8000, 200, 80), (16000, 400, 160)]
)
def test_the_spectrogram_is_the_formula_frame_by_frame(rate, window, hop):
    """Against a plain computation in float64, and the bands of `transformers`."""
    from transformers.audio_utils import mel_filter_bank

    rng = np.random.default_rng(0)
    sound = 0.1 * rng.standard_normal(4000)
    size = 256 if window <= 256 else 512
    bands = mel_bands(40, size, rate, 50.0, rate / 2)
    theirs = mel_filter_bank(size // 2 + 1, 40, 50.0, rate / 2, rate, norm=None, mel_scale="htk")
    np.testing.assert_allclose(bands.numpy(), theirs.T, atol=1e-5)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    padded = np.pad(sound, size)
    expected = []
    for frame in range(-(-4000 // hop)):
        first = size + frame * hop - window // 2
        power = np.abs(np.fft.rfft(padded[first : first + window] * hann, n=size)) ** 2
        expected.append(np.log(np.maximum(theirs.T @ power, 1e-7)))
    found = log_mel(torch.from_numpy(sound).float()[None], window, hop, bands)[0]
    assert found.shape == (40, frames_of(4000, hop))
    np.testing.assert_allclose(found.numpy(), np.stack(expected, axis=1), rtol=1e-3, atol=1e-3)


def test_a_tone_is_in_the_band_of_its_frequency():
    x = torch.from_numpy(tone(0.1, hertz=1500.0)).float()[None]
    bands = mel_bands(16, 256, 8000, 0.0, 4000.0)
    loudest = int(views().plain(x)[0, 0].mean(dim=1).argmax())
    near = torch.linspace(0, 4000, 129)[bands[loudest] > 0]
    assert near.min() <= 1500 <= near.max()


def test_rows_are_standardised_by_their_own_sound_and_zero_behind_it():
    found = views().plain(SOUNDS)
    assert tuple(found.shape) == (6, 1, 16, 20)
    for row, length in zip(found[:, 0], (800, 500, 121, 40, 9, 800), strict=True):
        frames = -(-length // 40)
        inside = row[:, :frames]
        assert abs(inside.mean()) < 1e-3
        assert inside.std(correction=0) == pytest.approx(1, abs=1e-3)
        assert not row[:, frames:].any()
    fixed = views(mean=-7.0, std=2.0).plain(SOUNDS)[0, 0]
    bands = mel_bands(16, 256, 8000, 0.0, 4000.0)
    raw = log_mel(SOUNDS[:1], 200, 40, bands)[0]
    torch.testing.assert_close(fixed, (raw + 7) / 2)


def test_silence_gives_numbers():
    silent = torch.zeros(2, 800)
    for spectrogram in (True, False):
        wild = views(StrongAudio().model_dump(), spectrogram=spectrogram)
        for kind in ("weak", "strong"):
            assert made(wild, silent, kind).nan_to_num(0).isfinite().all()
        assert wild.plain(silent).isfinite().all()


def test_waveforms_keep_their_length_and_are_standardised():
    for found in (views(spectrogram=False).plain(SOUNDS), made(views(spectrogram=False))):
        assert torch.equal(found.isnan(), SOUNDS.isnan())
        assert found.nanmean(dim=1).abs().max() < 1e-5
        for row in found:
            assert row[~row.isnan()].std(correction=0) == pytest.approx(1, abs=1e-3)
    raw = views(spectrogram=False, mean=0.0, std=1.0).plain(SOUNDS)
    assert torch.equal(raw.nan_to_num(9), SOUNDS.nan_to_num(9))


def test_without_noise_nothing_changes():
    quiet = views()
    plain = quiet.plain(SOUNDS)
    assert torch.equal(made(quiet), plain)
    assert torch.equal(made(quiet, kind="weak"), plain)


def test_gain_is_within_its_decibels_and_different_for_each_row():
    raw = {"spectrogram": False, "mean": 0.0, "std": 1.0}
    x = torch.from_numpy(rows_of(*[800] * 200))
    factor = (made(views({"gain": 6.0}, **raw), x) / x).median(dim=1).values
    decibels = 20 * factor.log10()
    assert decibels.abs().max() <= 6.001
    assert decibels.std() == pytest.approx(6 / 3**0.5, rel=0.15)


def test_noise_has_its_share_of_the_power_and_none_behind_the_sound():
    raw = {"spectrogram": False, "mean": 0.0, "std": 1.0}
    x = torch.from_numpy(rows_of(*[800, 400] * 100))
    found = made(views({"snr": 10.0}, **raw), x)
    assert torch.equal(found.isnan(), x.isnan())
    (noise, _), (sound, _) = split(found - x), split(x)
    ratio = 10 * (sound.square().sum(dim=1) / noise.square().sum(dim=1)).log10()  # dB
    assert ratio.min() > 9
    assert ratio.max() < 31
    assert ratio.mean() == pytest.approx(20, abs=1.5)
    assert (noise[0] / noise[0].std() - noise[2] / noise[2].std()).std() > 1  # not the same stretch
    noisy = views({"snr": 10.0})
    changed, length = noisy._changed(
        sound, (~x.isnan()).sum(dim=1), noisy.config.strong, torch.rand(200, 5)
    )
    assert length.tolist() == [800, 400] * 100
    assert changed[1, :400].all()
    assert not changed[1, 400:].any()  # which the last frame of a spectrogram would hear


def test_sound_is_moved_and_at_least_three_quarters_stay():
    x, length = split(torch.from_numpy(rows_of(800, 400, 400, 8)))
    found, new = moved(x, length, torch.tensor([-100, 300, -200, 799]), None)
    assert new.tolist() == [700, 700, 300, 800]
    assert torch.equal(found[0, :700], x[0, 100:])
    assert torch.equal(found[1, 300:700], x[1, :400])
    assert not found[1, :300].any()
    assert torch.equal(found[2, :300], x[2, 100:400])
    assert torch.equal(found[3, 794:], x[3, :6])  # of 8
    assert not found[0, 700:].any()


def test_speed_changes_pitch_and_length():
    sound = torch.from_numpy(tone(0.05, hertz=500.0)).float()
    x = torch.nn.functional.pad(sound, (0, 400))[None].repeat(3, 1)
    rate = torch.tensor([0.8, 1.0, 1.25])
    found, new = moved(x, torch.tensor([400] * 3), torch.tensor([0] * 3), rate)
    assert new.tolist() == [500, 400, 320]
    assert torch.equal(found[1], x[1])
    for row, speed, length in zip(found, rate.tolist(), new.tolist(), strict=True):
        expected = tone(0.1, hertz=500.0 * speed)[: length - 2]
        np.testing.assert_allclose(row[: length - 2], expected, atol=0.03)
        assert not row[length:].any()


def test_masks_hide_shares_of_the_sound_anywhere_in_it():
    size = torch.tensor([10, 20, 0] * 300)
    noise = torch.rand(900, 1, 2, generator=torch.Generator().manual_seed(0))
    found = runs(noise, size, 0.5, 24)
    for row, most in zip(found, size.tolist(), strict=True):
        places = row.nonzero().flatten()
        assert len(places) <= most // 2
        if len(places):
            assert places[-1] < most
            assert len(places) == places[-1] - places[0] + 1
    share = found[1::3].sum(dim=0) / 300
    assert found[1::3].sum(dim=1).unique().tolist() == list(range(11))
    assert share[:20].min() > 0.03
    assert not share[20:].any()


def test_masks_are_at_the_mean_of_a_spectrogram():
    x = torch.from_numpy(rows_of(*[800] * 100))
    both = {"time_masks": 1, "time_mask": 0.5, "frequency_masks": 1, "frequency_mask": 0.5}
    found, plain = made(views(both), x)[:, 0], views().plain(x)[:, 0]
    hidden = found == 0
    assert torch.equal(found[~hidden], plain[~hidden])
    times, bands = hidden.all(dim=1), hidden.all(dim=2)
    assert torch.equal(hidden, times[:, None] | bands[:, :, None])
    assert 0.1 < times.float().mean() < 0.4
    assert 0.1 < bands.float().mean() < 0.4


def test_frequencies_are_taken_out_of_waveforms():
    both = torch.from_numpy(tone(0.1, hertz=500.0) + tone(0.1, hertz=2500.0)).float()[None]
    bands = bands_of(800, 8000, 16, 0.0, 4000.0)
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, bands[250]] = True  # 2500 Hz
    found = without_bands(both, hidden, bands)[0]
    np.testing.assert_allclose(found, tone(0.1, hertz=500.0), atol=1e-3)
    masked = made(views({"frequency_masks": 2, "frequency_mask": 0.5}, spectrogram=False))
    assert torch.equal(masked.isnan(), SOUNDS.isnan())


@pytest.mark.parametrize("spectrogram", [True, False])
@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_a_row_depends_on_its_place_alone(kind, spectrogram):
    wild = views(StrongAudio().model_dump(), WeakAudio().model_dump(), spectrogram=spectrogram)
    together = made(wild, kind=kind)
    for row in range(len(SOUNDS)):
        alone = made(wild, SOUNDS[row : row + 1], kind, positions=torch.tensor([row]))
        torch.testing.assert_close(alone[0], together[row], equal_nan=True, atol=1e-4, rtol=1e-4)
    turned = made(wild, SOUNDS.flip(0), kind, positions=torch.arange(len(SOUNDS)).flip(0))
    torch.testing.assert_close(turned.flip(0), together, equal_nan=True, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_every_name_changes_the_noise(kind):
    wild = views(StrongAudio().model_dump(), WeakAudio().model_dump())
    x = SOUNDS[:1].repeat(3, 1)
    first = made(wild, x, kind)
    assert not torch.equal(first[0], first[1])
    for change in ({"step": 1}, {"copy": 1}, {"stream": "labeled"}):
        assert not torch.equal(made(wild, x, kind, **change), first)
    assert not torch.equal(made(wild, x, "weak"), made(wild, x, "strong"))
    assert torch.equal(made(wild, x, kind), first)


def test_what_does_not_fit_is_refused():
    for wrong in (torch.zeros(2, 800, dtype=torch.float64), torch.zeros(2, 799), torch.zeros(800)):
        with pytest.raises(DataError, match=r"audio views take float32 rows \[B, 800\]"):
            views().plain(wrong)
    with pytest.raises(ValueError, match="positions must be one per row"):
        made(views(), positions=torch.arange(2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mean": 1.0}, "mean and std go together"),
        ({"high": 9000}, "low 0 and high 9000 Hz must be a range within 0 to half"),
        ({"low": 5000, "high": 4000}, "low 5000 and high 4000 Hz must be a range"),
        ({"hop": 1e-5}, "hop: 1e-05 is less than one sample"),
        ({"seconds": 0.01}, r"window: 0\.025 seconds is more than the row's"),
        ({"mels": 500}, "bands, number .* hold nothing; lower mels, or raise window"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        AudioViewsConfig(**{"sampling_rate": 16000, "seconds": 1.0} | options)


def test_without_rows_seconds_must_be_given():
    with pytest.raises(ConfigError, match=r"views\.seconds: missing"):
        AudioViewsConfig().build(0)


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("*.yaml")))
def test_the_configs_that_come_with_the_project_are_valid(name):
    config = configuration.load(CONFIGS / name)
    again = configuration.parse(yaml.safe_load(config.to_yaml()), name)
    assert again == config
    if config.views.name == "audio":
        assert all(side > 0 for side in config.views.output_shape)
