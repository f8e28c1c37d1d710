"""`hpdist report`: one or several runs as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hpdist.errors import ConfigError
from hpdist.tracking.privacy import privacy_html
from hpdist.tracking.row_examples import row_examples_html
from hpdist.tracking.run_record import RunRecord, read_run

__all__ = ["RunRecord", "read_run", "render", "write_report"]

_HEADLINES = "headlines"
"""Stands for a chart of the headline of every task that the runs have."""
_CHARTS: dict[str, list[tuple[str, list[str]]]] = {
    "Training": [
        ("Loss", ["loss"]),
        ("Supervised loss", ["supervised_loss"]),
        ("Unsupervised loss", ["unsupervised_loss"]),
        (_HEADLINES, []),
        ("Learning rate", ["lr"]),
        ("Gradient norm", ["grad_norm"]),
        ("Teacher decay", ["teacher_decay"]),
    ],
    "Pseudo-labels": [
        ("Share of unlabelled rows in the loss (mask rate)", ["mask_rate"]),
        ("Mean confidence", ["confidence"]),
        ("Share of the most frequent class", ["pseudo_label_top_share"]),
    ],
    "Precision": [("Loss scale; crosses are overflows", ["loss_scale"])],
    "Stream and system": [
        ("Examples per second, all ranks", ["examples_per_second"]),
        ("Share of a step that the others wait for the slowest rank", ["slowest_rank_lag"]),
        ("Share of time waited for data", ["data_wait"]),
        ("Share of time waited for checkpoints", ["checkpoint_wait"]),
        ("Rows that could not be used", ["bad_rows"]),
    ],
}
_LOGARITHMIC = {"loss_scale"}
_DULL = {"loss_scale": 1.0, "bad_rows": 0.0, "checkpoint_wait": 0.0}  # drawn if ever different
_SUMMARY = [
    "steps",
    "skipped_steps",
    "bad_rows",
    "seconds",
    "world_size",
    "precision",
    "zero_stage",
    "shard_engine",
    "peak_memory_bytes",
]
_PER_CLASS = {
    "thresholds": "Threshold of each class",
    "pseudo_labels": "Share of pseudo-labels of each class",
}
_MOST_NUMBERS = 20  # classes whose confusions are written into the picture
_MOST_DRAWN = 500  # classes, and records, that a picture of numbers of each class has lines for
_LONGEST_NAME = 24  # characters of a name in a picture
_LONGEST_TEXT = 20_000  # characters of examples
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px;
       padding: 0 1rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(350px, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; color: #444; }
figure svg, figure img { width: 100%; height: auto; display: block; }
img.views { max-width: 100%; } pre { overflow-x: auto; font-size: .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
.wide { overflow-x: auto; } td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd;
       text-align: left; vertical-align: top; } td { overflow-wrap: anywhere; min-width: 3.5rem; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
.note { color: #666; } h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; }
.groups { display: grid; gap: 0 1rem;
       grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); }
.groups .whole { grid-column: 1 / -1; } .rows figure { max-width: 340px; }
.rows { display: flex; flex-wrap: wrap; gap: .8rem; }
.rows img { width: auto; height: 112px; }
.rows audio { width: 220px; height: 32px; display: block; }
.rows pre { white-space: pre-wrap; max-height: 10rem; overflow: auto; margin: 0; padding: .4rem;
       background: #f6f6f6; } .right { color: #1a7f37; } .wrong { color: #c5221f; }
"""


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page of these runs.

    Raises ConfigError if one is no run, matplotlib is missing, or the file cannot be written.
    """
    page = render([read_run(folder) for folder in folders])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8", errors="replace")  # names may be invalid text
    except OSError as error:
        raise ConfigError(f"report: {str(out)!r} cannot be written: {error.strerror}") from error


def render(runs: Sequence[RunRecord]) -> str:
    """The page as HTML: tables, curves of all runs in common charts, and matrices of each."""
    plot = _pyplot()
    # A name is not mathematics, whatever characters it has, and may lack glyphs.
    literal = {"text.parse_math": False, "text.usetex": False}
    with plot.rc_context(literal), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        return _page(plot, runs)


def _page(plot: Any, runs: Sequence[RunRecord]) -> str:
    colors = [_hex(plot, number) for number in range(len(runs))]
    names = ", ".join(run.name for run in runs)
    parts = [f"<h1>{html.escape(names)}</h1>", _summaries(runs, colors), _settings(runs)]
    parts += [privacy_html(run.privacy, run.name) for run in runs if run.privacy is not None]
    parts += [_examples(run) for run in runs]
    for title, charts in _CHARTS.items():
        drawn = [one for chart in charts for one in _with_headlines(chart, runs)]
        figures = [_chart(plot, runs, colors, caption, keys) for caption, keys in drawn]
        if title == "Pseudo-labels":
            figures += [_classes(plot, run, key) for run in runs for key in _PER_CLASS]
        found = [figure for figure in figures if figure]
        if found:
            parts.append(f'<h2>{title}</h2><div class="charts">{"".join(found)}</div>')
    matrices = [
        _matrix(plot, run, name, who)
        for run in runs
        if "confusion" in run.task.charts
        for name in run.confusions
        for who in ("teacher", "student")
    ]
    if matrices:
        parts.append(f'<h2>Confusion matrices</h2><div class="charts">{"".join(matrices)}</div>')
    parts += [row_examples_html(run.rows, run.name) for run in runs if run.rows is not None]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(names)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            'report needs matplotlib, which is missing; pip install "hpdist[report]"'
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    return plot


def _hex(plot: Any, number: int) -> str:
    from matplotlib.colors import to_hex

    return str(to_hex(plot.colormaps["tab10"](number % 10)))


def _summaries(runs: Sequence[RunRecord], colors: Sequence[str]) -> str:
    wanted = dict.fromkeys([key for run in runs for key in _scores(run)] + _SUMMARY)
    keys = [key for key in wanted if any(key in run.summary for run in runs)]
    rows = ["".join(f"<th>{html.escape(key)}</th>" for key in ["run", *keys])]
    for run, color in zip(runs, colors, strict=True):
        swatch = f'<span class="swatch" style="background:{color}"></span>'
        cells = "".join(f"<td>{html.escape(_formatted(run.summary.get(key)))}</td>" for key in keys)
        last = f"at step {run.records[-1]['step']}" if run.records else "no record yet"
        remarks = [] if run.summary else [f"not ended, {last}"]
        note_text = html.escape("; ".join([*remarks, *run.notes]))
        note = f' <span class="note">{note_text}</span>' if note_text else ""
        rows.append(f"<td>{swatch}{html.escape(run.name)}{note}</td>{cells}")
    return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _scores(run: RunRecord) -> list[str]:
    """Give the keys of a summary that its task's scores have."""
    headline = run.task.headline
    others = [name for name in run.task.summarized if name != headline]
    names = [headline, f"{headline}_student", *others]
    return [*(f"test/{name}" for name in names), f"validation/best_{headline}"]


def _with_headlines(
    chart: tuple[str, list[str]], runs: Sequence[RunRecord]
) -> list[tuple[str, list[str]]]:
    """Give a chart, or in the place of the headlines one for each that the runs' tasks have."""
    if chart[0] != _HEADLINES:
        return [chart]
    titles = {run.task.headline: run.task.title for run in runs}
    sets = ("validation", "test")
    return [
        (title, [f"eval/{name}/{headline}" for name in sets]) for headline, title in titles.items()
    ]


def _examples(run: RunRecord) -> str:
    """The examples of views."""
    title = f"<h2>Views of the first rows: {html.escape(run.name)}</h2>"
    if run.picture is not None:
        data = base64.b64encode(run.picture).decode()
        return f'{title}<img class="views" alt="" src="data:image/png;base64,{data}">'
    if run.texts:
        return f"{title}<pre>{html.escape(run.texts[:_LONGEST_TEXT])}</pre>"
    return ""


def _settings(runs: Sequence[RunRecord]) -> str:
    """All settings; with several runs, first those that differ."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    differ = [key for key in keys if len({str(run.settings.get(key)) for run in runs}) > 1]
    parts = []
    if len(runs) > 1:
        parts.append(f"<h2>Settings that differ</h2>{_setting_table(runs, differ)}")
    table = _setting_table(runs[:1], [key for key in keys if key not in differ])
    parts.append(f"<details><summary>Settings{' in common' * (len(runs) > 1)}</summary>{table}")
    return "".join(parts) + "</details>"


def _setting_table(runs: Sequence[RunRecord], keys: Sequence[str]) -> str:
    rows = []
    if len(runs) > 1:
        rows.append("<th></th>" + "".join(f"<th>{html.escape(run.name)}</th>" for run in runs))
    for key in keys:
        cells = "".join(
            f"<td>{html.escape(_formatted(run.settings.get(key)))}</td>" for run in runs
        )
        rows.append(f"<th>{html.escape(key)}</th>{cells}")
    return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _chart(
    plot: Any, runs: Sequence[RunRecord], colors: Sequence[str], caption: str, keys: list[str]
) -> str:
    """One curve per run; nothing if no run has any."""
    curves = [run.curve(keys) for run in runs]
    if _LOGARITHMIC.intersection(keys):
        curves = [_positive(curve) for curve in curves]
    if all(value == _DULL.get(keys[0]) for _, values in curves for value in values):
        return ""
    figure, axes = plot.subplots(figsize=(4.4, 2.7), layout="constrained")
    for run, color, (steps, values) in zip(runs, colors, curves, strict=True):
        alone = {"marker": "o", "markersize": 4} if len(steps) == 1 else {}
        axes.plot(steps, values, color=color, linewidth=1.3, label=_short(run.name), **alone)
        if keys[0] == "loss_scale":
            axes.plot(*_positive(run.overflows()), "x", color=color, markersize=6)
    if _LOGARITHMIC.intersection(keys):
        axes.set_yscale("log", base=2)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        axes.legend(fontsize=7, frameon=False)
    return _svg(plot, figure, caption)


def _classes(plot: Any, run: RunRecord, key: str) -> str:
    """Numbers of each class over the steps, as a picture of classes by records."""
    steps, values = run.per_class(key)
    if not steps:
        return ""
    every, classes = -(-len(steps) // _MOST_DRAWN), len(values[0])
    figure, axes = plot.subplots(figsize=(4.4, 2.7), layout="constrained")
    columns = _lines(values[::every])
    drawn = [value for column in columns for value in column if math.isfinite(value)]
    limits = {"vmin": min(0, *drawn), "vmax": max(drawn)} if drawn else {"vmin": 0, "vmax": 1}
    extent = (steps[0], max(steps[-1], steps[0] + 1), classes - 0.5, -0.5)
    image = axes.imshow(columns, aspect="auto", extent=extent, interpolation="nearest", **limits)
    figure.colorbar(image).ax.tick_params(labelsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("class", fontsize=8)
    axes.tick_params(labelsize=8)
    if len(run.classes) == classes <= _MOST_NUMBERS:
        axes.set_yticks(range(classes), [_short(name) for name in run.classes], fontsize=7)
    return _svg(plot, figure, f"{_PER_CLASS[key]}: {run.name}")


def _lines(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Numbers by class and record; with many classes each line is the mean of some."""
    classes = len(values[0])
    size = -(-classes // _MOST_DRAWN)
    spans = [slice(*ends) for ends in pairwise([*range(0, classes, size), classes])]
    return [[sum(row[span]) / len(row[span]) for row in values] for span in spans]


def _positive(curve: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    """Whether a logarithmic axis can show a value."""
    kept = [(step, value) for step, value in zip(*curve, strict=True) if value > 0]
    return [step for step, _ in kept], [value for _, value in kept]


def _matrix(plot: Any, run: RunRecord, name: str, who: str) -> str:
    """A confusion matrix, each row as shares of a class."""
    confusion = run.confusions[name]
    if "most_confused" in confusion:
        return _confused_pairs(run, name, who)
    counts, classes = confusion[who], confusion["classes"]
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    few = len(classes) <= _MOST_NUMBERS
    figure, axes = plot.subplots(figsize=(4.6, 4.2), layout="constrained")
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    if few:
        places = range(len(classes))
        names = [_short(name) for name in classes]
        axes.set_xticks(places, names, rotation=90, fontsize=7)
        axes.set_yticks(places, names, fontsize=7)
        for y, row in enumerate(counts):
            for x, count in enumerate(row):
                if count:
                    shade = "white" if shares[y][x] > 0.5 else "black"
                    size = 7 if len(classes) <= 10 else 5
                    axes.text(x, y, count, ha="center", va="center", color=shade, fontsize=size)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("class", fontsize=8)
    if few:
        return _svg(plot, figure, f"{run.name}, {name} set, {who}")
    return _png(plot, figure, f"{run.name}, {name} set, {who}: {len(classes)} classes")


def _confused_pairs(run: RunRecord, name: str, who: str) -> str:
    """A table of the pairs of classes that are confused most often, where there is no matrix."""
    confusion = run.confusions[name]
    classes, found = confusion["classes"], confusion["most_confused"][who]
    rows = [
        f"<tr><td>{html.escape(_short(classes[int(true)]))}</td>"
        f"<td>{html.escape(_short(classes[int(predicted)]))}</td><td>{count}</td></tr>"
        for true, predicted, count in found["pairs"][:_MOST_NUMBERS]
    ]
    head = "<tr><th>class</th><th>predicted</th><th>rows</th></tr>"
    bound = "" if found.get("complete", True) else "; the rows are at least so many"
    caption = f"{run.name}, {name} set, {who}: most confused pairs of {len(classes)} classes{bound}"
    return _figure(f'<div class="wide"><table>{head}{"".join(rows)}</table></div>', caption)


def _svg(plot: Any, figure: Any, caption: str) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    plot.close(figure)
    drawing = stream.getvalue()
    return _figure(drawing[drawing.index("<svg") :], caption)


def _png(plot: Any, figure: Any, caption: str) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    plot.close(figure)
    data = base64.b64encode(stream.getvalue()).decode()
    return _figure(f'<img alt="" src="data:image/png;base64,{data}">', caption)


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _short(name: str) -> str:
    """A name on one line of a picture; a leading _ would hide it in a legend."""
    line = "".join(sign if sign.isprintable() else " " for sign in name)
    line = line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 1]}…"
    return f" {line}" if line.startswith("_") else line


def _formatted(value: Any) -> str:
    """Format a value for a reader."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
