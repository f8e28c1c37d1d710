"""Records of a run folder that are damaged, and names of strangers on the way to a terminal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpdist.data.batch import BadRow
from hpdist.data.decode.written import shortened
from hpdist.data.sources.duplicates import Report
from hpdist.data.stream.index import are_records
from hpdist.errors import CheckpointError, DataError, printable
from hpdist.tracking.console import Console
from hpdist.tracking.run_folder import RunFolder
from hpdist.train.input_choice import is_inputs_record

DAMAGED = [b"", b"[1, 2", b"\xff\xfe", b"[" * 100_000, b"null", b'"text"', b"7"]


@pytest.mark.parametrize("content", [*DAMAGED, b"{}", b"[1.5]", b"[true]", b"[-1]", b'["1"]'])
def test_a_damaged_choice_of_rows_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "labeled_rows.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"labeled_rows\.json: .*choose another run\.name"):
        RunFolder(tmp_path).read_labeled_rows()
    (tmp_path / "labeled_rows.json").write_text("[3, 5]")
    assert RunFolder(tmp_path).read_labeled_rows() == [3, 5]


@pytest.mark.parametrize(
    ("fits", "good", "wrong"),
    [
        (is_inputs_record, ['{"mode": "RGB"}', "{}"], ['{"mode": "CMYK"}', "[]"]),
        (are_records, ['[null, [["a", 1, 2, "x"]]]'], ['[["a"]]', '{"a": 1}', "[[[1]]]"]),
        (
            Report.fits,
            ['{"lines": ["a"], "summary": {}, "check": "auto"}'],
            ['{"lines": [1], "summary": {}, "check": "auto"}', '{"check": "auto"}', "[]"],
        ),
    ],
)
def test_other_records_are_checked(
    fits: object, good: list[str], wrong: list[str], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_json("a.json", fits) is None
    for content in good:
        (tmp_path / "a.json").write_text(content)
        assert folder.read_json("a.json", fits) is not None
    for content in [*wrong, '"text"', "7"]:
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"a\.json"):
            folder.read_json("a.json", fits)
    (tmp_path / "a.json").unlink()
    os.mkfifo(tmp_path / "a.json")  # reading it would wait for ever
    with pytest.raises(CheckpointError, match="regular file"):
        folder.read_json("a.json", fits)


def test_no_name_of_a_stranger_moves_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b]0;title\x07\x1b[2Jcat\u202e\x9b1m"
    safe = r"\x1b]0;title\x07\x1b[2Jcat\u202e\x9b1m"
    assert printable("Öl 猫 🐈 a\nb") == "Öl 猫 🐈 a\nb"
    assert printable("x" * 99, 9) == "x" * 8 + "…"
    assert shortened([name, "x" * 10_000]) == f"{safe}, {'x' * 79}…"
    assert str(DataError(f"no class {name}")) == f"no class {safe}"
    assert str(BadRow(1, name, name)) == f"{safe}: {safe}"
    Console(0, 0, True).log_line(name)
    assert capsys.readouterr().err == f"{safe}\n"
