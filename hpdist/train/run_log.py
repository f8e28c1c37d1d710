"""The log of a run's numbers: metrics.jsonl, the tracker, the console; and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.decode.spec import InputSpec
from hpdist.data.views.base import Views
from hpdist.distributed.stragglers import stragglers
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.tasks.base import TaskConfig
from hpdist.tracking.console import Console
from hpdist.tracking.environment import environment
from hpdist.tracking.examples import write_examples
from hpdist.tracking.row_examples import FILE as ROWS_FILE
from hpdist.tracking.row_examples import RowExamples
from hpdist.tracking.run_folder import RunFolder
from hpdist.tracking.tracker import Tracker
from hpdist.train.config import RunConfig
from hpdist.train.divergence import OverflowStorm


class RunLog:
    """Writes global numbers from the main process, and measures time. Collective to construct.

    Args:
        config: Of the run.
        folder: Of the run.
        done: Steps that were applied before.
        seconds: Seconds of training before.
        run_id: The tracker's id of a continued run.
        files: Whether anything is written.
        sharding: How the run shards, which the tracker gets beside the config.
        classes: Their names, for the tracker's curves of classes.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        *,
        done: int,
        seconds: float,
        run_id: str | None,
        files: bool,
        sharding: ExecutionPlan | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._files = files
        environment_facts = environment() | ({} if sharding is None else sharding.described())
        task = cast(TaskConfig, config.task).makes
        self._scores = {name: name in task.in_percent for name in task.shown or (task.headline,)}
        self._console = Console(config.steps, done, folder.main, self._scores)
        log_line = self._console.log_line
        sends = folder.main and files
        settings = config.model_dump(mode="json")
        self._tracker = Tracker(
            config.tracker,
            config.run.name,
            settings,
            folder.path,
            sends,
            run_id,
            environment_facts,
            classes,
            log_line,
        )
        self._started = self._clock = time.monotonic()
        self._before = seconds
        self._rows_shown = config.log.examples
        self._steps = 0
        self._waited: dict[str, float] = {}
        self._waited_now: dict[str, float] = {}
        self._storm = OverflowStorm()

    @property
    def run_id(self) -> str | None:
        """The tracker's name for this run."""
        return self._tracker.run_id

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._before + time.monotonic() - self._started

    def count_step(self, step: int, overflow: str | None) -> None:
        """Count an attempted step; log where it overflowed, and alert if many do."""
        self._steps += 1
        storm = self._storm.look(overflow is not None)
        if overflow is not None:
            self.log_line(f"step {step + 1} overflowed and is skipped: {overflow}")
            self._tracker.note("overflow", overflow, step)
        if storm is not None:
            self.log_line(storm)
            self.alert("overflow storm", f"{storm}; the latest: {overflow}")

    def leave_out(self, seconds: float) -> None:
        """Exclude this time from the training's."""
        self._clock += seconds

    def since_record(self, waited: Mapping[str, float]) -> dict[str, float]:
        """Return the growth since the last record of totals that count from the process's start."""
        self._waited_now = dict(waited)
        return {name: total - self._waited.get(name, 0.0) for name, total in waited.items()}

    def speed(self, rows: int, per_rank: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """Return the speed of the steps since the last record, of `rows` each.

        Examples per second of all ranks, the largest share of time that a rank has waited, and
        the slowest of several ranks.

        Args:
            rows: Of the global batch.
            per_rank: `compute_seconds` of each rank, and the values of `since_record` there.
        """
        now = time.monotonic()
        seconds = max(now - self._clock, 1e-9)
        environment_facts = dict(per_rank)
        own = environment_facts.pop("compute_seconds")
        shares = {name: max(0.0, *waits) / seconds for name, waits in environment_facts.items()}
        rate = self._steps * rows / seconds
        found = stragglers(own, rows, seconds / max(self._steps, 1))
        self._clock, self._steps, self._waited = now, 0, self._waited_now
        return {"examples_per_second": rate, **found, **shares}

    def write(self, step: int, attempt: int, record: Mapping[str, Any]) -> None:
        """Write the record of a step."""
        if self._files:
            self._folder.append_metrics({"step": step, "attempt": attempt, **record})
        self._tracker.log(record, step)
        scores = {key.rpartition("/")[2]: value for key, value in record.items() if "/" in key}
        shown = {name: scores[name] for name in self._scores if name in scores}
        self._console.show(step, {**record, **shown})

    def write_summary(
        self,
        step: int,
        summary: Mapping[str, object],
        confusions: Mapping[str, Callable[[], Mapping[str, Any]]],
    ) -> None:
        """Write the summary of the run, and the confusion matrices of the sets that have one."""
        made = {}
        if self._files or self._tracker.has_tables:
            made = {name: make() for name, make in confusions.items()}
        if self._files:
            for name, confusion in made.items():
                if not confusion:
                    continue
                self._folder.write_json(f"confusion_{name}.json", confusion, indent=None)
            self._folder.write_json("summary.json", summary)
        self._tracker.log({k: v for k, v in summary.items() if "/" in k}, step)
        self._tracker.log_confusions(made, step)

    def confusions(
        self, step: int, confusions: Mapping[str, Callable[[], Mapping[str, Any]]]
    ) -> None:
        """Send the confusion matrices of an evaluation, by the name of the set."""
        if self._tracker.has_tables:
            made = {name: make() for name, make in confusions.items()}
            self._tracker.log_confusions(made, step)

    def examples(
        self,
        views: Views,
        spec: InputSpec,
        batch: LabeledBatch | UnlabeledBatch,
        attempt: int,
    ) -> None:
        """Write views of a run's first rows; a failure has no other consequence."""
        if not (self._files and self._folder.main and self._rows_shown and attempt == 0):
            return
        start = time.monotonic()
        try:
            rows = self._rows_shown
            file = write_examples(self._folder.path, views, spec, batch, rows, attempt)
            if file is not None and file.suffix == ".png":
                self._tracker.log_picture("examples/views", file, 0)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self.log_line(f"note: no examples of the views: {why}; log.examples: 0 leaves them out")
        self.leave_out(time.monotonic() - start)

    def row_examples(self, make: Callable[[], RowExamples]) -> None:
        """Write rows that are worth a look; a failure has no other consequence."""
        if not (self._files and self._folder.main):
            return
        try:
            (self._folder.path / ROWS_FILE).parent.mkdir(parents=True, exist_ok=True)
            self._folder.write_json(ROWS_FILE, make().to_json(), indent=None)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self.log_line(f"note: no examples of rows: {why}; log.examples: 0 leaves them out")

    def log_line(self, line: str) -> None:
        """Print a line."""
        self._console.log_line(line)

    def alert(self, title: str, line: str) -> None:
        """Alert the user through the tracker."""
        self._tracker.alert(title, line)

    def close(self) -> None:
        """Flush and close tracker and console."""
        self._tracker.finish()
        self._console.close()
