"""Sound files become samples: what is decoded, what is refused, and how a run reads it."""

import datasets
import numpy as np
import pytest
import soundfile
import torch

from hpdist.data.config import LabelColumn, Labeled, Unlabeled
from hpdist.data.convert import convert
from hpdist.data.decode import audio
from hpdist.data.decode.audio import AudioSpec, Sampling
from hpdist.data.decode.decoders import Decoder
from hpdist.data.decode.encoded import Unreadable
from hpdist.data.files.named_files import NamedFile, PathRule
from hpdist.data.kinds import AUDIO
from hpdist.data.sources.labeled import open_test
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.stream import BatchStream
from hpdist.errors import ConfigError, DataError
from tests.support.labeled import open_labeled
from tests.support.sounds import file_of, table, tone

SPEC = AudioSpec(Sampling(8000, 4000), (4000,))
GOOD = [file_of(tone(0.1 * k, hertz=300 + 50 * k)) for k in range(1, 7)]


def test_a_row_is_cut_off_where_it_is_long_and_nan_behind_its_end():
    short, long = SPEC.decode(file_of(tone(0.25))), SPEC.decode(file_of(tone(0.75)))
    assert short.dtype == torch.float32
    assert tuple(short.shape) == tuple(long.shape) == (4000,)
    np.testing.assert_allclose(short[:2000], tone(0.25), atol=1e-4)
    assert short[2000:].isnan().all()
    np.testing.assert_allclose(long, tone(0.5), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "FLOAT", 1e-6),
        ("WAV", "PCM_U8", 1e-2),
        ("FLAC", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 5e-2),
        ("MP3", None, 5e-2),
    ],
)
def test_every_format_gives_the_sound(kind, subtype, error):
    data = file_of(tone(0.5), kind=kind, subtype=subtype)
    for value in (data, {"bytes": data, "path": "a.wav"}):
        row = SPEC.decode(value).numpy()
        inside = slice(400, 3600)  # MP3 fades in and out
        np.testing.assert_allclose(row[inside], tone(0.5)[inside], atol=error)


def test_channels_are_averaged():
    wave = np.stack([tone(0.5), np.zeros(4000), tone(0.5) * 2], axis=1)
    np.testing.assert_allclose(SPEC.decode(file_of(wave, subtype="FLOAT")), tone(0.5), atol=1e-6)


@pytest.mark.parametrize("rate", [4000, 11025, 16000, 22050, 44100, 48000, 44101])
def test_other_rates_are_resampled(rate):
    """A tone keeps its pitch, and one beyond half the rate vanishes."""
    row = SPEC.decode(file_of(tone(1, rate), rate, subtype="FLOAT")).numpy()
    assert not np.isnan(row).any()
    np.testing.assert_allclose(row[100:], tone(0.5)[100:], atol=4e-3)  # also at the row's end
    if rate > 16000:
        high = SPEC.decode(file_of(tone(1, rate, 6000), rate)).numpy()
        assert np.abs(high[100:]).max() < 0.01


def test_only_what_a_row_holds_is_read(monkeypatch):
    asked = []
    read = soundfile.SoundFile.read

    def spy(self, frames=-1, **options):
        asked.append(frames)
        return read(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    SPEC.decode(file_of(tone(5, 16000), 16000))
    assert asked[0] < 0.6 * 16000


def test_what_is_no_sound_is_named_and_leaves_zeros():
    nan = file_of(np.array([0.0, np.nan]), subtype="FLOAT")
    values = [GOOD[0], None, b"", b"RIFF rubbish", GOOD[0][:30], file_of(np.zeros(0)), nan]
    values += [np.zeros(3), "text", {"bytes": None, "path": None}, Unreadable("torn"), GOOD[1]]
    out = torch.full((len(values), 4000), 7.0)
    reasons = SPEC.decode_valid(values, out)
    unknown = "it is no sound file: Format not recognised."
    assert {line: why for line, why in reasons.items() if line != 4} == {
        1: "the value is null",
        2: "it holds no bytes",
        3: unknown,
        5: "it holds no samples",
        6: "it holds NaN or infinity",
        7: "it is ndarray, not sound",
        8: "it is str, not sound",
        9: "it has neither bytes nor a path",
        10: "torn",
    }
    assert "0x" not in reasons[4]  # an address, which is another in every run
    assert not out[1:11].any()
    assert torch.equal(out[0].nan_to_num(9), SPEC.decode(GOOD[0]).nan_to_num(9))
    assert torch.equal(out[11].nan_to_num(9), SPEC.decode(GOOD[1]).nan_to_num(9))


def test_a_path_is_read(tmp_path):
    (tmp_path / "a.flac").write_bytes(file_of(tone(0.5), kind="FLAC"))
    rule = PathRule((str(tmp_path.resolve()),))
    value = NamedFile(str(tmp_path / "a.flac"), rule)
    np.testing.assert_allclose(SPEC.decode(value), tone(0.5), atol=1e-4)
    (reason,) = SPEC.decode_valid(
        [NamedFile(str(tmp_path / "gone.wav"), rule)], torch.ones(1, 4000)
    ).values()
    assert "gone.wav" in reason


def test_a_decoder_gives_the_same_with_threads_and_processes(monkeypatch):
    monkeypatch.setattr(audio, "_THREADS_PAY_BYTES", 0)
    values = [*GOOD, None, b"rubbish"] * 6
    expected, why = Decoder(SPEC).decode(values)
    assert len(why) == 12
    for threads, processes in ((3, 0), (1, 2)):
        with Decoder(SPEC, threads, processes) as decoder:
            found, reasons = decoder.decode(values)
            again, _ = decoder.decode(values[:5])
        assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))
        assert torch.equal(again.nan_to_num(9), expected[:5].nan_to_num(9))
        assert reasons == why


def test_the_only_column_of_sound_is_found_and_the_other_sets_follow():
    rows = open_labeled(
        Labeled(path="m"), 0, dataset=table(GOOD, label=[0, 1] * 3, name=["x"] * 6), kind=AUDIO
    )
    assert rows.column == "audio"
    test = open_test(LabelColumn(path="m"), rows, SPEC, dataset=table(GOOD, label=[0, 1] * 3))
    assert test.kind is AUDIO
    plain = datasets.Dataset.from_dict({"wave": GOOD, "n": [1] * 6})
    assert open_unlabeled(Unlabeled(path="m"), rows, SPEC, dataset=plain).column == "wave"
    with pytest.raises(DataError, match=r"data\.unlabeled\.input: column 'n' .* not audio"):
        open_unlabeled(Unlabeled(path="m", input="n"), rows, SPEC, dataset=plain)
    with pytest.raises(DataError, match="a list of columns is no audio"):
        open_unlabeled(Unlabeled(path="m", input=["n"]), rows, SPEC, dataset=plain)
    two = plain.add_column("again", GOOD)
    with pytest.raises(
        DataError, match=r"2 columns hold audio.* wave \(bytes\), n \(numbers\), again"
    ):
        open_unlabeled(Unlabeled(path="m"), rows, SPEC, dataset=two)


def test_a_column_of_sound_needs_the_views_of_audio():
    with pytest.raises(DataError, match=r"neither images .*; for audio set views\.name: audio"):
        open_labeled(Labeled(path="m", input="audio"), 0, dataset=table(GOOD, label=[0, 1] * 3))


def test_bad_rows_hold_their_place_and_say_why():
    rows = open_labeled(Labeled(path="m"), 0, dataset=table(GOOD, label=[0, 1] * 3), kind=AUDIO)
    values = [*GOOD, None, b"rubbish", *GOOD]
    unlabeled = open_unlabeled(Unlabeled(path="m"), rows, SPEC, dataset=table(values))
    stream = BatchStream(unlabeled, len(values), 0, 1, 0, SPEC)
    batch = next(stream)
    stream.close()
    bad = {int(row) for row, valid in zip(batch.ids, batch.valid, strict=True) if not valid}
    assert bad == {6, 7}
    assert {row.id: row.reason for row in batch.bad} == {
        6: "the value is null",
        7: "it is no sound file: Format not recognised.",
    }
    assert len(batch.only_valid()[0]) == 12


def test_a_labelled_row_without_sound_is_an_error():
    values = table([GOOD[0], b""], label=[0, 1])
    rows = open_labeled(Labeled(path="m"), 0, dataset=values, kind=AUDIO)
    stream = BatchStream(rows, 2, 0, 1, 0, SPEC)
    with pytest.raises(DataError, match=r"row 1 cannot be decoded: it holds no bytes"):
        next(stream)
    stream.close()


def test_a_folder_of_sounds_is_read_and_converted(tmp_path):
    for number, data in enumerate(GOOD):
        place = tmp_path / "sounds" / ("low", "high")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.wav").write_bytes(data)
    folder = str(tmp_path / "sounds")
    written = convert(Unlabeled(path=folder, input="audio"), tmp_path / "out")
    assert (written.rows, written.input) == (6, "audio")
    files = str(written.files[0])
    rows = open_labeled(Labeled(path="parquet", data_files=files), 0, kind=AUDIO)
    assert rows.classes.names == ("high", "low")
    source = Unlabeled(path="parquet", data_files=files, streaming=True)
    stream = BatchStream(open_unlabeled(source, rows, SPEC), 6, 0, 1, 0, SPEC)
    batch = next(stream)
    stream.close()
    assert batch.valid is None
    lengths = sorted((~batch.inputs.isnan()).sum(dim=1).tolist())
    assert lengths == [800, 1600, 2400, 3200, 4000, 4000]


def test_without_soundfile_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ConfigError, match=r"pip install 'hpdist\[audio\]'"):
        SPEC.sampling.require()


def test_wav_whose_end_is_missing_is_as_long_as_what_is_there():
    data = file_of(tone(0.5))
    row = SPEC.decode(data[: len(data) // 2])
    assert 1900 < int((~row.isnan()).sum()) < 2000
