"""Spoken digits: the same curve on any number of ranks, resumed, and in half precision."""

import json
import math

import pytest

from hpdist.errors import ConfigError, DataError
from hpdist.train import config as configuration
from hpdist.train.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.sounds import digits_config, file_of, needs_digits, table, tone, write_config

pytestmark = needs_digits

WAVES = {"name": "audio", "sampling_rate": 8000, "seconds": 0.3, "spectrogram": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("wav2vec2"))


def train(folder, changes):
    Trainer.from_config(configuration.parse(digits_config(folder, **changes))).fit()


def curve(folder, name="digits"):
    """Loss, its unsupervised part, mask rate and gradient norm of each step."""
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
    names = ("loss", "unsupervised_loss", "mask_rate", "grad_norm")
    return [[row.get(name, 0.0) for name in names] for row in rows]


def close(one, two, rel=1e-3):
    return [[pytest.approx(value, rel=rel, abs=rel) for value in step] for step in two] == one


def waveforms(model):
    fixmatch = {"name": "fixmatch", "threshold": 0.4}
    model = {"name": f"hf:{model}", "pretrained": False}
    return {"model": model, "views": WAVES, "algorithm": fixmatch}


MICRO = {"batch": {"labeled": 8, "unlabeled": 16, "micro": 12}}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("spectrograms", "waveforms")]
)
def test_the_same_curve_on_one_rank_two_ranks_and_in_micro_batches(tmp_path, model, kind):
    own = waveforms(model) if kind == "waveforms" else {}
    train(tmp_path / "one", own)
    run_ranks(2, train, tmp_path / "two", own)
    one = curve(tmp_path / "one")
    assert len(one) == 6
    assert any(0 < mask < 1 for _, _, mask, _ in one)
    assert close(one, curve(tmp_path / "two"))
    if not own:  # batch normalisation sees one micro-batch at a time
        own = {"model": {"name": "cnn", "width": 4, "norm": "group"}}
        train(tmp_path / "one", own | {"run": {"dir": str(tmp_path / "one"), "name": "group"}})
        one = curve(tmp_path / "one", "group")
    train(tmp_path / "micro", own | MICRO)
    assert close(one, curve(tmp_path / "micro"))


def test_a_resumed_run_goes_on_as_if_nothing_had_been(tmp_path):
    constant = {"schedule": {"name": "constant"}}
    train(tmp_path / "cut", {"steps": 3, **constant})
    train(tmp_path / "cut", {"steps": 6, **constant})
    train(tmp_path / "once", {"steps": 6, **constant})
    assert close(curve(tmp_path / "cut"), curve(tmp_path / "once"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_waveforms_under_zero(tmp_path, model, stage):
    """The mark of a sound's end survives half precision, and sharding changes nothing."""
    own = waveforms(model)
    train(tmp_path / "plain", own)
    run_ranks(2, train, tmp_path / "zero", own | {"zero": {"stage": stage}})
    assert close(curve(tmp_path / "plain"), curve(tmp_path / "zero"))
    if stage == 2:
        run_ranks(2, train, tmp_path / "half", own | {"zero": {"stage": 2}, "precision": "bf16"})
        half = curve(tmp_path / "half")
        assert half[0][0] == pytest.approx(curve(tmp_path / "plain")[0][0], rel=0.05)
        assert all(math.isfinite(loss) for loss, *_ in half)


def test_bad_rows_are_left_out_named_and_end_the_run_where_they_are_many(tmp_path):
    good = [file_of(tone(0.05 * k, hertz=300 + 20 * k)) for k in range(1, 9)]
    rows = table([good[0], b"rubbish", None, *good] * 4)
    settings = digits_config(tmp_path)
    rest = {k: v for k, v in settings.items() if k not in ("data", "model", "algorithm")}
    data = dict(settings["data"], labeled=table(good * 2, label=[0, 1] * 8))
    model = {"name": "cnn", "width": 4}
    trainer = Trainer(model, labeled=data["labeled"], unlabeled=rows, **rest)
    assert trainer.fit()["bad_rows"] > 5
    rest["run"] = {"dir": str(tmp_path), "name": "stops"}
    few = (rows, {"max_bad_rows": 2})
    with pytest.raises(DataError, match=r"no sound file: Format not recognised|value is null"):
        Trainer(model, labeled=data["labeled"], unlabeled=few, **rest).fit()


def test_misfits_end_before_the_training(tmp_path, model):
    with pytest.raises(ConfigError, match="does not take waveforms"):
        train(tmp_path, {"views": WAVES})
    mixing = waveforms(model) | {"algorithm": {"name": "mixmatch"}}
    with pytest.raises(ConfigError, match="MixMatch mixes inputs"):
        train(tmp_path, mixing)
    data = digits_config(tmp_path)["data"]
    data["labeled"]["input"] = "audio"
    with pytest.raises(DataError, match=r"for audio set views\.name: audio"):
        train(tmp_path, {"views": {"name": "image"}, "data": data})
