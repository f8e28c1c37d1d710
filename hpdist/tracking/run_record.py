"""Reads a run folder in any state: of a run in progress, killed, or with damaged files.

Unreadable parts are left out and noted; only a folder without a run is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hpdist.config.section import flat
from hpdist.errors import ConfigError
from hpdist.messages.redaction import redacted_settings
from hpdist.tracking.row_examples import FILE as ROWS_FILE
from hpdist.tracking.row_examples import RowExamples
from hpdist.tracking.run_folder import CHANGES, PRIVACY, TASK

T = TypeVar("T")

_LARGEST = 1e30  # of drawn numbers: beyond it, axes overflow
_LARGEST_STEP = 2**53
_LARGEST_FILE = 256 << 20  # bytes of a confusion matrix
_FOLDER = "examples"


@dataclass(frozen=True)
class TaskRecord:
    """What a run folder says of the run's task."""

    headline: str
    """The score that the best evaluation is chosen by."""
    title: str
    """What the headline's chart is called."""
    summarized: Sequence[str]
    """Names of the scores that its summary has, the headline among them."""
    charts: Sequence[str]
    """What is drawn beside the curves."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TaskRecord:
        """Take what `hpdist.tasks.base.Task.display` gave. Raises ValueError where it did not."""
        texts: list[Any] = [values.get(key) for key in ("headline", "title")]
        lists: list[Any] = [values.get(key) for key in ("summarized", "charts")]
        named = [name for found in lists if isinstance(found, list) for name in found]
        if not all(isinstance(found, list) for found in lists):
            raise ValueError("it does not list scores and charts")
        if not all(isinstance(text, str) for text in [*texts, *named]):
            raise ValueError("it does not name scores and charts")
        return cls(*texts, *lists)


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder."""

    name: str
    settings: Mapping[str, Any]
    """By dotted name, without passwords and signatures."""
    records: Sequence[Mapping[str, Any]]
    """The records of metrics.jsonl, in order; each has a step."""
    summary: Mapping[str, Any]
    """Empty if the run has not ended."""
    confusions: Mapping[str, Mapping[str, Any]]
    """By the name of the set; each square, with integers, or of many classes the confused pairs."""
    task: TaskRecord
    classes: Sequence[str] = ()
    """Names of the classes, if they are known."""
    picture: bytes | None = None
    """PNG of examples of views."""
    texts: str | None = None
    """Examples of rows that are not pictures."""
    rows: RowExamples | None = None
    """Rows of a measured set that are worth a look."""
    privacy: Mapping[str, Any] | None = None
    """What its privately voted labels have cost: epsilon, delta, and of each folder of labels."""
    notes: Sequence[str] = ()
    """Parts that could not be read."""

    def curve(self, keys: Iterable[str]) -> tuple[list[float], list[float]]:
        """Steps and values of the first of these keys that exists, finite ones only."""
        for key in keys:
            found = [(r["step"], r[key]) for r in self.records if is_number(r.get(key))]
            if found:
                return [step for step, _ in found], [value for _, value in found]
        return [], []

    def overflows(self) -> tuple[list[float], list[float]]:
        """Steps at which the number of overflows had grown, and the loss scale there."""
        before: float = 0
        steps: list[float] = []
        scales: list[float] = []
        for record in self.records:
            count: Any = record.get("overflows", 0)
            scale: Any = record.get("loss_scale")
            if not is_number(count):
                continue
            if count > before and is_number(scale):
                steps.append(record["step"])
                scales.append(scale)
            before = count
        return steps, scales

    def per_class(self, key: str) -> tuple[list[int], list[list[float]]]:
        """Steps, and at each a list with a number for each class; NaN where there is none."""
        found = [(r["step"], r[key]) for r in self.records if r.get(key)]
        lists = [(step, values) for step, values in found if isinstance(values, list)]
        length = len(lists[-1][1]) if lists else 0
        lists = [(step, values) for step, values in lists if len(values) == length]
        numbers = [[v if is_number(v) else math.nan for v in values] for _, values in lists]
        return [step for step, _ in lists], numbers


def read_run(folder: Path) -> RunRecord:
    """Read a run folder; raises ConfigError if it holds no run."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        why = "it has no metrics.jsonl" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"report: {str(folder)!r} is not a run folder: {why}")
    notes: list[str] = []
    records: list[dict[str, Any]] = _read(metrics, _records, [], notes)
    if not records:
        notes.append("metrics.jsonl has no record")
    confusions = {}
    for file in sorted(folder.glob("confusion_*.json")):
        found = _read(file, _confusion, None, notes)
        if found is not None:
            confusions[file.stem.removeprefix("confusion_")] = found
    names = [matrix["classes"] for matrix in confusions.values()]
    classes = _read(folder / "classes.json", _names, names[0] if names else [], notes, missing=True)
    settings: dict[str, Any] = _read(folder / "config.yaml", _settings, {}, notes)
    task = _read(folder / TASK, _task, None, notes, missing=True)
    return RunRecord(
        folder.resolve().name,
        _with_changes(settings, _read(folder / CHANGES, _changes, [], notes, missing=True)),
        records,
        _read(folder / "summary.json", _mapping, {}, notes, missing=True),
        confusions,
        task or _known_task(settings),
        classes,
        _read(folder / _FOLDER / "views.png", _png, None, notes, missing=True),
        _read(folder / _FOLDER / "views.txt", _text, None, notes, missing=True),
        _read(folder / ROWS_FILE, RowExamples.of, None, notes, missing=True),
        _read(folder / PRIVACY, _privacy, None, notes, missing=True),
        notes,
    )


def is_number(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -_LARGEST < value < _LARGEST
    )


def _read(
    file: Path, parse: Callable[[bytes], T], default: T, notes: list[str], missing: bool = False
) -> T:
    """The content of a file, or the default with a note; `missing` files are not noted."""
    if missing and not file.exists():
        return default
    try:
        if file.stat().st_size > _LARGEST_FILE and file.suffix == ".json":
            raise ValueError(f"it has more than {_LARGEST_FILE >> 20} MiB")
        return parse(file.read_bytes())
    except OSError as error:
        why = error.strerror or "it cannot be read"
    except (ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200]
    notes.append(f"{file.name} is left out: {why}")
    return default


def _changes(content: bytes) -> list[tuple[int, Mapping[str, Any]]]:
    """The changed settings of a continued run, and the step of the change."""
    found = []
    for record in _records(content):
        changed = record.get("settings")
        if isinstance(changed, dict):
            now = {str(k): v.get("now") for k, v in changed.items() if isinstance(v, dict)}
            found.append((record["step"], redacted_settings(now)))
    return found


def _with_changes(
    settings: Mapping[str, Any], changes: Iterable[tuple[int, Mapping[str, Any]]]
) -> dict[str, Any]:
    """The initial settings of a run, with their changes beside them."""
    found = dict(settings)
    for step, changed in changes:
        for key, now in changed.items():
            found[key] = f"{found.get(key)}; from step {step} on {now}"
    return found


def _records(content: bytes) -> list[dict[str, Any]]:
    found = []
    for line in content.splitlines():
        record = _json_line(line)
        if isinstance(record, dict) and _is_step(record.get("step")):
            found.append(record)
    return found


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):  # an incomplete line of a killed or running process
        return None


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST_STEP


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _task(content: bytes) -> TaskRecord:
    return TaskRecord.of(_mapping(content))


def _privacy(content: bytes) -> dict[str, Any]:
    found = _mapping(content)
    labels = found["labels"]
    numbers = [found, *labels]
    if not all(is_number(one[key]) for one in numbers for key in ("epsilon", "delta")):
        raise ValueError("it names no epsilon and delta")
    return found


def _known_task(settings: Mapping[str, Any]) -> TaskRecord:
    """Give what is known of the task that settings name: a run of before did not write it down.

    It needs torch, which reading other runs does not.
    """
    from hpdist.config.component import components
    from hpdist.tasks import DEFAULT_TASK
    from hpdist.tasks.base import TaskConfig

    kind = components(TaskConfig.kind).get(str(settings.get("task.name")), DEFAULT_TASK.Config)
    known = kind.makes if issubclass(kind, TaskConfig) else type(DEFAULT_TASK)
    return TaskRecord.of(known.display())


def _mapping(content: bytes) -> dict[str, Any]:
    values = json.loads(_text(content))
    if not isinstance(values, dict):
        raise ValueError("it holds no names and values")
    return values


def _settings(content: bytes) -> dict[str, Any]:
    values = yaml.safe_load(_text(content))
    if not isinstance(values, dict):
        raise ValueError("it holds no settings")
    return flat(redacted_settings(_text_keys(values)))


def _text_keys(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {str(key): _text_keys(value) for key, value in values.items()}


def _names(content: bytes) -> list[str]:
    values = json.loads(_text(content))
    if not isinstance(values, list):
        raise ValueError("it is no list")
    return [str(value) for value in values]


def _confusion(content: bytes) -> dict[str, Any] | None:
    found = _mapping(content)
    classes = [str(name) for name in found["classes"]]
    if "most_confused" in found:
        _check_pairs(found["most_confused"], len(classes))
        return {**found, "classes": classes}
    for who in ("teacher", "student"):
        counts = found[who]
        shape = {len(row) for row in counts} | {len(counts)}
        if shape != {len(classes)} or not all(is_number(count) for row in counts for count in row):
            raise ValueError(
                f"the {who}'s matrix is not one of numbers, as wide and high as classes"
            )
    return {**found, "classes": classes}


def _check_pairs(confused: Mapping[str, Any], classes: int) -> None:
    for who in ("teacher", "student"):
        for pair in confused[who]["pairs"]:
            numbers = isinstance(pair, list) and len(pair) == 3 and all(map(is_number, pair))
            if not numbers or not all(0 <= number < classes for number in pair[:2]):
                raise ValueError(f"the {who}'s pairs are not two of the classes and a number")


def _png(content: bytes) -> bytes:
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("it is no PNG")
    return content
