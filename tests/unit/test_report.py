import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hpdist import cli
from hpdist.tracking.report import read_run
from tests.picture_runs import train, write_config
from tests.pictures import write_pictures

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two real runs that differ in one setting."""
    folder = tmp_path_factory.mktemp("report")
    config = write_config(folder, write_pictures(folder))
    test = {"path": "parquet", "data_files": str(folder / "labeled.parquet"), "split": "train"}
    for name, lr in (("slow", "0.01"), ("fast", "0.1")):
        overrides = [f"--optim.lr={lr}", f"--data.test={json.dumps(test)}", "--steps=10"]
        status, errors = train(config, name, *overrides)
        assert status == 0, errors
    return [folder / "runs" / "slow", folder / "runs" / "fast"]


@pytest.fixture
def made(tmp_path) -> Path:
    """A run folder with an overflow and numbers of each class, as one that was killed leaves it."""
    folder = tmp_path / "<made> & more"
    folder.mkdir()
    records = [
        {
            "step": step,
            "loss": 1 / step,
            "loss_scale": 1024.0 if step < 3 else 512.0,
            "overflows": int(step >= 3),
            "thresholds": [0.1 * step, 0.2],
            "pseudo_labels": [0.25, 0.75],
            "grad_norm": float("nan"),
        }
        for step in range(1, 6)
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    return folder


def report(*arguments: str | Path) -> str:
    assert cli.main(["report", *map(str, arguments)]) == 0
    return Path(arguments[-1]).read_text()


def test_a_page_of_two_runs_has_their_numbers_and_what_sets_them_apart(runs, tmp_path, capsys):
    page = report(*runs, "--out", tmp_path / "both.html")
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.html")
    differ = page[page.index("Settings that differ") : page.index("<details>")]
    assert "<th>optim.lr</th><td>0.01</td><td>0.1</td>" in differ
    assert "batch.labeled" not in differ
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert f"<td>{summary['test/accuracy']:.4g}</td>" in page
    assert page.count("<svg") >= 8 + 4  # curves, and a matrix of teacher and student of each


def test_a_page_loads_nothing(runs, tmp_path):
    page = report(runs[0], "--out", tmp_path / "one.html")
    for tag in ("<script", "<link", "@import", 'src="http', "url(http"):
        assert tag not in page


def test_one_run_has_its_page_in_its_folder(runs, capsys):
    assert cli.main(["report", str(runs[0])]) == 0
    assert (runs[0] / "report.html").read_text().startswith("<!doctype html>")
    (runs[0] / "report.html").unlink()


def test_curves_are_those_of_the_metrics_file(runs):
    run = read_run(runs[0])
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert run.curve(["loss"]) == (
        [record["step"] for record in records],
        [record["loss"] for record in records],
    )
    assert run.curve(["nothing", "lr"])[1] == [record["lr"] for record in records]
    assert run.settings["algorithm.threshold"] == 0.2
    assert run.summary["steps"] == len(records)


def test_a_run_that_was_killed_is_shown_as_far_as_it_came(made, tmp_path):
    run = read_run(made)
    assert [record["step"] for record in run.records] == [1, 2, 3, 4, 5]
    assert run.overflows() == ([3], [512.0])
    assert run.curve(["grad_norm"]) == ([], [])  # no finite number, no curve
    assert run.per_class("thresholds")[1][1] == [0.2, 0.2]
    page = report(made, "--out", tmp_path / "made.html")
    assert "not ended, at step 5" in page
    assert "&lt;made&gt; &amp; more" in page
    assert "<made>" not in page
    assert "Threshold of each class" in page
    assert "Gradient norm" not in page


@pytest.mark.parametrize(
    ("name", "why"),
    [("nowhere", "there is no such folder"), ("empty", "it has no metrics.jsonl")],
)
def test_a_folder_without_a_run_is_refused(tmp_path, capsys, name, why):
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"is not a run folder: {why}")


def test_a_page_that_cannot_be_written_is_a_clear_error(made, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(made), "--out", str(tmp_path / "file" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_reading_a_run_needs_neither_torch_nor_accelerate():
    code = "import sys, hpdist.tracking.report; print({'torch', 'accelerate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_the_page(runs, made, tmp_path):
    report(*runs, made, "--out", tmp_path / "page.html")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    done = subprocess.run(
        [
            str(CHROMIUM),
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1200,3000",
            f"--screenshot={tmp_path / 'page.png'}",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1200, 3000)
        colors = picture.convert("RGB").getcolors(1 << 24)
    assert len(colors) > 200  # text, curves and matrices, not a blank page


def test_settings_that_a_run_went_on_with_stand_beside_the_first(made):
    (made / "config.yaml").write_text("optim: {lr: 0.1, name: sgd}\n")
    changes = [(3, 0.2), (4, 0.3)]
    lines = [
        json.dumps({"step": step, "settings": {"optim.lr": {"was": 0, "now": lr}}})
        for step, lr in changes
    ]
    (made / "config_changes.jsonl").write_text("\n".join(lines) + "\n")
    settings = read_run(made).settings
    assert settings["optim.lr"] == "0.1; from step 3 on 0.2; from step 4 on 0.3"
    assert settings["optim.name"] == "sgd"
