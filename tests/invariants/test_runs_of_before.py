"""What an earlier hpdist wrote still opens, and goes on as it did then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpdist.cli import main
from tests.invariants import recorded_curves, runs_of_before

SLOW = {"zero1", "zero2_fp16", "zero3"}  # DeepSpeed's start
CASES = [
    pytest.param(
        kind,
        marks=[
            pytest.mark.skipif(
                not (runs_of_before.FOLDER / kind / "continued.json").exists(),
                reason="not written yet: python -m tests.invariants.runs_of_before --all",
            ),
            *([pytest.mark.slow] if kind in SLOW else []),
        ],
    )
    for kind in runs_of_before.KINDS
]
# Half precision rounds to three digits, wherever a sum's last bit falls otherwise.
HALF = recorded_curves.Tolerance(relative=0.03, floor=0.01, state=0.02)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPDIST_ALLOW_CPU_FP16", "1")


@pytest.mark.parametrize("kind", CASES)
def test_a_run_goes_on_as_it_did_then(kind: str) -> None:
    runs_of_before.prepare(kind)
    before = Path("runs", kind, "metrics.jsonl").read_text()
    found = runs_of_before.go_on(kind)
    after = Path("runs", kind, "metrics.jsonl").read_text()
    assert after.startswith(before), "it resumed, and did not begin anew"
    allowed = recorded_curves.tolerance()
    if "precision" in runs_of_before.KINDS[kind] and allowed is recorded_curves.COMMITTED:
        allowed = HALF
    wrong = recorded_curves.differences(found, runs_of_before.continued(kind), allowed)
    assert not wrong, "\n".join(wrong[:20])


def test_a_loop_of_ones_own_goes_on_as_it_did_then() -> None:
    folder = runs_of_before.FOLDER / runs_of_before.STATE / "run"
    first, last = runs_of_before.FIRST, runs_of_before.LAST
    losses = runs_of_before.own_loop(folder, first, last, save=False)
    allowed = recorded_curves.tolerance().relative
    assert losses == pytest.approx(runs_of_before.continued(runs_of_before.STATE), rel=allowed)


@pytest.mark.parametrize("kind", CASES)
def test_a_report_is_made_of_a_run(kind: str) -> None:
    runs_of_before.prepare(kind)
    assert main(["report", f"runs/{kind}", "--out", "report.html"]) == 0
    page = Path("report.html").read_text()
    assert kind in page
    assert "<svg" in page or "<img" in page


@pytest.mark.parametrize("kind", CASES)
def test_a_fixture_is_small_and_tells_of_no_machine(kind: str) -> None:
    folder = runs_of_before.FOLDER / kind
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 150_000
    manifest = json.loads(next(folder.rglob("manifest.json")).read_text())
    assert manifest["step"] == runs_of_before.FIRST
    assert manifest["world_size"] == runs_of_before.RANKS.get(kind, 1)
