"""Pictures of mixed modes: one number of channels for all sets, chosen by all labelled pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from hpdist.data.decode.decoders import Decoder
from hpdist.data.decode.pixels import ImageSpec
from hpdist.data.files.named_files import NamedFile, PathRule
from hpdist.data.kinds import spec_of_value
from hpdist.data.kinds.pictures import PictureCounts, has_colour, has_transparency
from hpdist.errors import CheckpointError, ConfigError, DataError
from hpdist.train.trainer import Trainer

SIDE = 8


def picture(mode: str, row: int = 0, side: int = SIDE) -> Image.Image:
    """A picture of a mode, with colours where it has any."""
    pixels = np.random.default_rng(row).integers(0, 256, (side, side, 3), np.uint8)
    whole = Image.fromarray(pixels)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode == "grey P":
        grey = whole.convert("L").convert("P")
        grey.putpalette(bytes(value for level in range(256) for value in (level,) * 3))
        return grey
    if mode == "transparent P":
        clear = whole.convert("P", palette=Image.Palette.ADAPTIVE)
        clear.info["transparency"] = 0
        return clear
    return whole.convert(mode)


def stored(image: Image.Image, kind: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind or ("JPEG" if image.mode == "CMYK" else "PNG"))
    return buffer.getvalue()


def pictures(modes: Sequence[str], mode: str | None = None) -> datasets.Dataset:
    """Rows of pictures, with two classes, to be decoded in `mode`."""
    values = [{"bytes": stored(picture(m, row)), "path": None} for row, m in enumerate(modes)]
    features = datasets.Features(
        {"image": datasets.Image(mode=mode), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    labels = [row % 2 for row in range(len(modes))]
    return datasets.Dataset.from_dict({"image": values, "label": labels}, features=features)


def trainer(labeled: Any, unlabeled: Any = None, test: Any = None, **settings: Any) -> Trainer:
    views = {"name": "image", **settings.pop("views", {})}
    return Trainer(
        {"name": "cnn", "width": 8},
        "fixmatch",
        labeled=labeled,
        unlabeled=labeled if unlabeled is None else unlabeled,
        test=test,
        views=views,
        steps=settings.pop("steps", 1),
        batch={"labeled": 2, "unlabeled": 2},
        run={"dir": settings.pop("dir", "runs"), "name": "modes"},
        tracker={"name": "none"},
        **settings,
    )


HEADERS = {
    "1": (False, False),
    "L": (False, False),
    "LA": (False, True),
    "I;16": (False, False),
    "grey P": (False, False),
    "P": (True, False),
    "transparent P": (True, True),
    "RGB": (True, False),
    "RGBA": (True, True),
    "CMYK": (True, False),
}


@pytest.mark.parametrize("mode", HEADERS)
def test_what_a_header_tells(mode: str, tmp_path: Path) -> None:
    data = stored(picture(mode))
    image = Image.open(io.BytesIO(data))
    assert (has_colour(image), has_transparency(image)) == HEADERS[mode]
    (tmp_path / "a.png").write_bytes(data)
    counts = PictureCounts()
    file, rule = str(tmp_path / "a.png"), PathRule((str(tmp_path.resolve()),))
    for value in (data, {"bytes": data, "path": None}, NamedFile(file, rule)):
        counts.add(value)
    counts.add(b"no picture")
    colour, transparent = HEADERS[mode]
    assert (counts.pictures, counts.colour, counts.transparent) == (3, 3 * colour, 3 * transparent)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_palettes_of_other_formats(kind: str) -> None:
    assert has_colour(Image.open(io.BytesIO(stored(picture("P"), kind))))


MIXED: list[tuple[list[str], int, str]] = [
    (["L", "RGB", "RGB"], 3, "of the 3 labelled pictures that were looked at 2 in colour, 1 grey"),
    (["RGB", "L", "1"], 3, "1 in colour, 2 grey"),
    (["L", "1", "I;16", "grey P"], 1, "the 4 labelled pictures that were looked at are grey"),
    (["L", "P"], 3, "1 in colour, 1 grey"),
    (["RGB", "RGBA", "LA"], 3, "2 in colour, 1 grey, 2 with transparency"),
    (["L", "LA"], 1, "2 grey, 1 with transparency"),
    (["RGBA", "transparent P"], 4, "are with transparency"),
    (["CMYK", "P"], 3, "are in colour"),
]


@pytest.mark.parametrize("case", range(len(MIXED)))
def test_all_labelled_pictures_choose_the_channels(
    case: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    modes, channels, line = MIXED[case]
    made = trainer(pictures(modes), dir=str(tmp_path))
    assert made.data.spec.shape == (channels, SIDE, SIDE)
    (said,) = [told for told in capfd.readouterr().err.splitlines() if told.startswith("pictures")]
    assert said.split()[:2] == ["pictures:", str(channels)]
    assert line in said
    made.data.close()


def test_rows_that_are_not_used_do_not_choose(tmp_path: Path) -> None:
    data = pictures(["RGB", "L", "L", "L"])
    made = trainer((data, {"indices": [1, 2]}), data.select([1, 2]), dir=str(tmp_path))
    assert made.data.spec.shape[0] == 1
    made.data.close()


def test_datasets_and_the_setting_come_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def chosen(labeled: Any, **settings: Any) -> tuple[str | None, str]:
        made = trainer(labeled, dir=str(tmp_path), **settings)
        made.data.close()
        return made.data.spec.mode, capfd.readouterr().err

    grey = pictures(["L", "L"])
    assert chosen(pictures(["L", "L"], mode="RGB"))[0] == "RGB"
    mode, said = chosen(pictures(["RGB", "RGB"], mode="L"))
    assert mode == "L"
    assert "1 channel (L), as the column of data.labeled is cast; colour becomes grey" in said
    mode, said = chosen(grey, views={"channels": 3})
    assert mode == "RGB"
    assert "3 channels (RGB), by views.channels" in said
    mode, said = chosen(pictures(["RGB", "RGB"]), views={"channels": 1})
    assert mode == "L"
    assert "by views.channels; colour becomes grey" in said
    assert chosen(grey, views={"channels": 4})[0] == "RGBA"
    mode, said = chosen(pictures(["RGB"] * 2), test=pictures(["RGB"] * 2, mode="L"))
    assert mode == "RGB"
    assert "note: data.test: its column is cast to L, and decoded in RGB" in said
    with pytest.raises(ConfigError, match=r"views.channels"):
        chosen(grey, views={"channels": 2})
    with pytest.raises(DataError, match=r"is to be decoded in mode 'F', which views cannot take"):
        chosen(pictures(["L", "L"], mode="F"))


@pytest.mark.parametrize("kind", ["table", "stream", "parquet", "test"])
def test_colour_in_another_set_counts_where_the_labelled_one_is_grey(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    grey, colour = pictures(["L", "L"]), pictures(["L", "RGB", "L"])
    unlabeled: Any = colour if kind == "table" else grey
    if kind == "stream":
        unlabeled = colour.to_iterable_dataset()
    if kind == "parquet":
        colour.to_parquet(str(tmp_path / "u.parquet"))
        files = {"path": "parquet", "data_files": str(tmp_path / "u.parquet"), "streaming": True}
        unlabeled = files
    made = trainer(grey, unlabeled, colour if kind == "test" else None, dir=str(tmp_path))
    assert made.data.spec.shape == (3, SIDE, SIDE)
    name = "test" if kind == "test" else "unlabeled"
    assert f"pictures of data.{name} that were looked at 1 in colour" in capfd.readouterr().err
    made.fit()
    assert trainer(grey, grey, dir=str(tmp_path / "b")).data.spec.shape[0] == 1


def test_a_run_that_goes_on_keeps_its_channels(tmp_path: Path) -> None:
    data = pictures(["L", "RGB", "RGB", "RGB"])
    trainer(data, dir=str(tmp_path)).fit()
    record = tmp_path / "modes" / "inputs.json"
    assert '"RGB"' in record.read_text()
    settings = yaml.safe_load((tmp_path / "modes" / "config.yaml").read_text())
    assert settings["views"]["channels"] == 3
    again = trainer(data, dir=str(tmp_path), steps=2)
    assert again.data.spec.mode == "RGB"
    again.data.close()
    with pytest.raises(CheckpointError, match=r"views.channels: 1, but the run that goes on began"):
        trainer(data, dir=str(tmp_path), steps=2, views={"channels": 1})


def test_a_run_without_a_record_goes_on_by_its_first_picture(tmp_path: Path) -> None:
    grey_first = pictures(["L", "RGB", "RGB", "RGB"])
    # What a run of an earlier version made of it: one channel, and no record.
    trainer(grey_first, dir=str(tmp_path), views={"channels": 1}).fit()
    (tmp_path / "modes" / "inputs.json").unlink()
    again = trainer(grey_first, dir=str(tmp_path), steps=2)
    assert again.data.spec.mode == "L"
    again.fit()
    assert '"L"' in (tmp_path / "modes" / "inputs.json").read_text()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_every_mode_is_decoded_as_pillow_converts_it(mode: str) -> None:
    side = 128  # from which on threads are used
    sources = [picture(kind, row, side) for row, kind in enumerate(HEADERS)]
    values = [stored(source) for source in sources]
    first = spec_of_value(values[1], None)
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    spec = ImageSpec((channels, side, side), first.stored, mode)
    with Decoder(spec) as alone, Decoder(spec, threads=2) as threads:
        plain, reasons = alone.decode(values)
        assert reasons == {}
        assert (threads.decode(values)[0] == plain).all()
    for source, value, row in zip(sources, values, plain, strict=True):
        kept = Image.open(io.BytesIO(value))
        if source.mode == "I;16":
            kept = Image.fromarray((np.asarray(kept) >> 8).astype(np.uint8))  # scaled, not clipped
        elif "transparency" in kept.info:
            kept = kept.convert("RGBA")
        expected = np.asarray(kept.convert(mode)).reshape(side, side, channels)
        assert np.array_equal(row.numpy(), expected.transpose(2, 0, 1)), source.mode


def test_processes_decode_as_threads_do() -> None:
    values = [stored(picture(kind, row)) for row, kind in enumerate(HEADERS)]
    spec = ImageSpec((3, SIDE, SIDE), "encoded", "RGB")
    with Decoder(spec) as alone, Decoder(spec, processes=1) as processes:
        assert (processes.decode(values)[0] == alone.decode(values)[0]).all()


def test_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = {"x": np.zeros((2, SIDE, SIDE), np.uint8).tolist(), "label": [0, 1]}
    data = datasets.Dataset.from_dict(rows)
    with pytest.raises(ConfigError, match=r"views.channels: 3, but column 'x' holds arrays of 1"):
        trainer(
            (data, {"input": "x"}), (data, {"input": "x"}), dir=str(tmp_path), views={"channels": 3}
        )
