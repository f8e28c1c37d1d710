import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hpdist import cli
from hpdist.tracking.report import read_run
from tests.support.picture_runs import train, write_config
from tests.support.pictures import write_pictures

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


def test_a_page_says_what_voted_labels_cost(made, tmp_path):
    spent = [{"folder": "<a>", "mechanism": "GNMax", "epsilon": 2.5, "delta": 1e-5, "sigma": 40.0}]
    total = {"labels": spent, "epsilon": 2.5, "delta": 1e-5}
    (made / "privacy.json").write_text(json.dumps(total))
    page = report(made, "--out", tmp_path / "page.html")
    assert "Together epsilon 2.5 at delta 1e-05" in page
    assert "<td>&lt;a&gt;</td><td>GNMax</td><td>-</td><td>-</td><td>40</td>" in page
    (made / "privacy.json").write_text(json.dumps(total | {"epsilon": "<b>"}))
    page = report(made, "--out", tmp_path / "page.html")
    assert "privacy.json is left out: it names no epsilon and delta" in page


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


HOSTILE = '<script>alert("x")</script>'
NAMES = [
    "$x_1^$",
    "a$b",
    HOSTILE,
    "line\nbreak",
    "",
    "_",
    "\u732b\ud800",
    "--><b>&amp;",
    "x" * 300,
    "$",
]


def matrix(names: list[str]) -> dict:
    counts = [[3 * (true == said) for said in names] for true in names]
    return {"classes": names, "teacher": counts, "student": counts}


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A run folder whose texts are all markup, mathematics and broken characters."""
    folder = tmp_path / "_$run$"
    (folder / "examples").mkdir(parents=True)
    records = [
        {"step": step, "loss": 1 / step, "thresholds": [0.1] * len(NAMES), "bad_rows": HOSTILE}
        for step in (1, 2, 3)
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "config.yaml").write_text(
        yaml.safe_dump({HOSTILE: {"a": HOSTILE, 1: NAMES}, "run": {"name": HOSTILE}})
    )
    (folder / "summary.json").write_text(json.dumps({"test/accuracy": HOSTILE, "steps": 10**300}))
    (folder / "confusion_test.json").write_text(json.dumps(matrix(NAMES)))
    (folder / f"confusion_{HOSTILE.replace('/', '')}.json").write_text(json.dumps(matrix(["a"])))
    (folder / "examples" / "views.txt").write_text(HOSTILE)
    return folder


def test_no_text_of_a_run_becomes_markup_or_mathematics(hostile, tmp_path):
    page = report(hostile, hostile, "--out", tmp_path / "page.html")
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    found: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append(tag)
            assert not any(name.startswith("on") for name, _ in attributes)

    Tags().feed(page)
    assert {"script", "b", "iframe", "a", "object"}.isdisjoint(found)
    assert found.count("html") == 1
    assert page.count("Threshold of each class") == 2
    assert page.count("<figcaption>_$run$, test set, teacher</figcaption>") == 2


LINES = [
    "",
    "5",
    "null",
    "[1, 2]",
    '"text"',
    "{}",
    '{"loss": 1}',
    '{"step": null, "loss": 1}',
    '{"step": "1", "loss": 1}',
    '{"step": true, "loss": 1}',
    '{"step": 1e999, "loss": 1}',
    f'{{"step": {10**30}, "loss": 1}}',
    '{"step": 2, "loss": NaN, "lr": Infinity, "grad_norm": -Infinity}',
    f'{{"step": 3, "loss": {10**400}, "lr": 1e308, "grad_norm": -1e308}}',
    '{"step": 4, "loss": "x", "lr": null, "grad_norm": [1], "mask_rate": {"a": 1}, "epoch": true}',
    '{"step": 5, "loss_scale": 0, "overflows": 1}',
    '{"step": 6, "loss_scale": -4, "overflows": "2"}',
    '{"step": 7, "overflows": 3}',
    '{"step": 8, "loss_scale": 1e300, "overflows": 5}',
    '{"step": 9, "thresholds": [0.1, 0.2], "pseudo_labels": "abc"}',
    '{"step": 10, "thresholds": [0.1, "x", null], "pseudo_labels": [NaN, NaN]}',
    '{"step": 11, "thresholds": [[1], 2, 1e308], "pseudo_labels": {"a": 1}}',
    '{"step": 12, "thresholds": [], "pseudo_labels": [-1, -2]}',
    "[" * 100_000,
    '{"step": 12, "lo',
]


def test_a_page_is_made_of_whatever_a_metrics_file_holds(tmp_path):
    """Every line alone, and all of them together, side by side on one page."""
    for number, lines in enumerate([*([line] for line in LINES), LINES]):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "metrics.jsonl").write_text("\n".join(lines))
    runs = [tmp_path / f"run{number}" for number in range(len(LINES) + 1)]
    page = report(*runs, "--out", tmp_path / "page.html")
    assert page.count("metrics.jsonl has no record") == 14
    assert "</body></html>" in page


GARBAGE = [
    b"",
    b"\x00\xff\xfe\x80" * 500,
    b"{",
    b"[1]",
    b"nothing",
    b"!!python/object:os.system {}",
]


NAMED = [
    *("config.yaml", "summary.json", "confusion_test.json", "classes.json", "task.json"),
    "examples/views.png",
]


@pytest.mark.parametrize("content", GARBAGE)
def test_files_that_are_damaged_cost_what_they_say_and_no_more(made, content):
    (made / "examples").mkdir()
    for name in (*NAMED, "examples/views.txt"):
        (made / name).write_bytes(content)
    page = report(made, "--out", made / "page.html")
    for name in NAMED:
        if (name, content) != ("classes.json", b"[1]"):
            assert f"{name.rpartition('/')[2]} is left out: " in page
    assert "Loss</figcaption>" in page
    (made / "metrics.jsonl").write_bytes(content)
    assert "metrics.jsonl has no record" in report(made, "--out", made / "page.html")


def test_files_that_are_missing_are_no_fault_but_the_settings_are_named(made):
    page = report(made, "--out", made / "page.html")
    assert "config.yaml is left out: No such file or directory" in page
    assert page.count("is left out") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": ["a", "b"], "teacher": [[1, 2]], "student": [[1, 2], [3, 4]]},
        {"classes": ["a", "b"], "teacher": [[1, 2], [3]], "student": [[1, 2], [3, 4]]},
        {"classes": ["a", "b"], "teacher": [[1, "x"], [3, 4]], "student": [[1, 2], [3, 4]]},
        {"classes": ["a", "b"], "teacher": [[1, 2], [3, 4]]},
        {"classes": 3, "teacher": 3, "student": 3},
    ],
)
def test_a_matrix_that_is_none_is_left_out(made, wrong):
    (made / "confusion_test.json").write_text(json.dumps(wrong))
    page = report(made, "--out", made / "page.html")
    assert "confusion_test.json is left out: " in page
    assert "Confusion matrices" not in page


def test_many_classes_and_records_make_no_huge_page(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    thresholds = [number / 21_841 for number in range(21_841)]
    lines = [json.dumps({"step": step, "thresholds": thresholds}) for step in range(1, 12)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    names = [f"class {number}" for number in range(300)]
    (folder / "confusion_test.json").write_text(json.dumps(matrix(names)))
    page = report(folder, "--out", folder / "page.html")
    assert len(page) < 2_000_000


@pytest.mark.parametrize("named", [True, False])
def test_the_headline_of_a_run_that_did_not_write_its_task_down(made, named):
    """Earlier runs say it in their settings; a config may name none."""
    name, headline, title = ("regression", "rmse", "Root mean squared error")
    if not named:
        name, headline, title = (None, "accuracy", "Accuracy")
    settings = {"task": {"labels": "auto", "threshold": 0.5, "name": name}} if named else {}
    (made / "config.yaml").write_text(yaml.safe_dump(settings or {"steps": 5}))
    records = [json.dumps({"step": step, f"eval/test/{headline}": 1 / step}) for step in (1, 2)]
    (made / "metrics.jsonl").write_text("\n".join(records))
    (made / "summary.json").write_text(json.dumps({f"test/{headline}_student": 0.25}))
    page = report(made, "--out", made / "page.html")
    assert f"<figcaption>{title}</figcaption>" in page
    assert f"<th>test/{headline}_student</th>" in page


def test_many_classes_have_a_table_of_the_most_confused(made):
    pairs = {"pairs": [[0, 1, 7], [1, 0, 2]], "complete": False}
    confused = {"classes": ["<cat>", "dog"], "most_confused": {"teacher": pairs, "student": pairs}}
    (made / "confusion_test.json").write_text(json.dumps(confused))
    page = report(made, "--out", made / "page.html")
    assert "<tr><td>&lt;cat&gt;</td><td>dog</td><td>7</td></tr>" in page
    assert "the rows are at least so many" in page
    pairs["pairs"].append([0, 2, 1])
    (made / "confusion_test.json").write_text(json.dumps(confused))
    page = report(made, "--out", made / "page.html")
    assert "confusion_test.json is left out: " in page


def test_what_the_folder_says_of_the_task_is_drawn(made):
    task = {"headline": "rank_error", "title": "Error <in> ranks", "summarized": [], "charts": []}
    (made / "task.json").write_text(json.dumps(task))
    (made / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval/test/rank_error": 2.0}))
    (made / "confusion_test.json").write_text(json.dumps(matrix(["a", "b"])))
    page = report(made, "--out", made / "page.html")
    assert "<figcaption>Error &lt;in&gt; ranks</figcaption>" in page
    assert "Confusion matrices" not in page
    (made / "task.json").write_text(json.dumps({**task, "charts": [1]}))
    page = report(made, "--out", made / "page.html")
    assert "task.json is left out: it does not name scores and charts" in page
    assert "Confusion matrices" in page


def test_classes_are_called_by_their_names(made):
    (made / "classes.json").write_text(json.dumps(["ant", "bee"]))
    assert read_run(made).classes == ["ant", "bee"]
    page = report(made, "--out", made / "page.html")
    assert "<!-- ant -->" in page  # how a figure notes the text that it draws


def test_a_page_shows_the_views_and_no_password_of_an_older_run(made):
    (made / "examples").mkdir()
    Image.new("RGB", (4, 4)).save(made / "examples" / "views.png")
    url = "https://me:S3cretS3cret@host.org/a.parquet?sig=S3cretS3cret"
    (made / "config.yaml").write_text(yaml.safe_dump({"data": {"data_files": [url]}}))
    page = report(made, "--out", made / "page.html")
    assert "S3cret" not in page
    assert "https://REDACTED@host.org/a.parquet?REDACTED" in page
    assert '<img class="views" alt="" src="data:image/png;base64,' in page


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
