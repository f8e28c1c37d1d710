"""Files of a run folder that somebody has touched: what is no record of hpdist's is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpdist.errors import CheckpointError
from hpdist.tracking import run_folder
from hpdist.tracking.run_folder import RunFolder
from hpdist.train.config import RunConfig, parse
from hpdist.train.config_history import continue_config

FOREIGN = [
    b"\xff\xfe\x00 no text",
    b"[1, 2]",
    b'"step"',
    b"{}",
    b'{"loss": 1.0}',
    b'{"step": "4"}',
    b'{"step": null}',
    b'{"step": true}',
    b'{"step": 1e400}',
    b"[" * 100_000,
    b'{"step": 4, "loss"',
    b"9" * 10_000,
]


def config(lr: float) -> RunConfig:
    values = {"model": {"name": "mlp"}, "algorithm": {"name": "supervised"}, "steps": 9}
    return parse({**values, "data": {"labeled": {"path": "digits"}}, "optim": {"lr": lr}})


@pytest.mark.parametrize("line", FOREIGN, ids=lambda line: repr(line[:20]))
def test_lines_that_are_no_records_are_passed_over(line: bytes, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": 3}\n')
    assert folder.record_of(2) == {"step": 2}
    assert folder.record_of(9) is None
    folder.drop_metrics_after(2)
    assert folder.metrics.read_bytes() == b'{"step": 1}\n' + line + b'\n{"step": 2}\n'
    folder.metrics.write_bytes(b'{"step": 1}\n{"step": 2}\n' + line)  # as a kill may leave it
    assert folder.record_of(2) == {"step": 2}
    folder.drop_metrics_after(2)
    assert folder.metrics.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def bytes_read() -> int:
    """What this process has read so far, by the kernel's count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_resume_reads_the_end_of_the_records_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    line = '{"step": %d, "values": "' + "x" * 7000 + '"}\n'
    folder.metrics.write_text("".join(line % step for step in range(2, 4002, 2)))
    whole, before = folder.metrics.stat().st_size, bytes_read()
    assert folder.record_of(3990) == json.loads(line % 3990)
    assert folder.record_of(3991) is None
    folder.drop_metrics_after(3990)
    assert whole > 13_000_000
    assert bytes_read() - before < 600_000
    assert folder.metrics.read_text().endswith("\n" + line % 3990)
    assert folder.metrics.read_text().startswith(line % 2)


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_records_are_found_wherever_a_block_ends(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_BLOCK", block)
    folder = RunFolder(tmp_path)
    text = '\n{"step": 1}\nfoo\n\n{"step": 4, "é": 1}\n{"step": 6}'
    for step, kept in ((0, ""), (1, '\n{"step": 1}\n'), (5, text[:-11]), (6, text + "\n")):
        folder.metrics.write_text(text)
        found = folder.record_of(step)
        assert found is None if step in (0, 5) else found is not None and found["step"] == step
        folder.drop_metrics_after(step)
        assert folder.metrics.read_text() == kept
        folder.drop_metrics_after(step)
        assert folder.metrics.read_text() == kept


@pytest.mark.parametrize("settings", ["", ', "settings": 3', ', "settings": {"steps": 9}'])
def test_changes_that_hpdist_did_not_note_are_passed_over(settings: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    continue_config(folder, config(0.1), 0)
    (tmp_path / "config_changes.jsonl").write_text(f'{{"step": 1{settings}}}\n')
    assert "optim.lr 0.1 -> 0.2" in (continue_config(folder, config(0.2), 5) or "")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [", b"- 1", b"{" * 5000])
def test_a_config_that_cannot_be_read_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.yaml: the run's settings cannot be"):
        continue_config(RunFolder(tmp_path), config(0.2), 5)
