"""Where a run's numbers go: metrics.jsonl, the tracker, the console; and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.decode.spec import InputSpec
from hpdist.data.views.base import Views
from hpdist.distributed.stragglers import stragglers
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.tracking.console import HEADLINES, Console
from hpdist.tracking.environment import environment
from hpdist.tracking.examples import write_examples
from hpdist.tracking.run_folder import RunFolder
from hpdist.tracking.tracker import Tracker
from hpdist.train.config import RunConfig
from hpdist.train.divergence import OverflowStorm


class RunLog:
    """Writes global numbers from the main process, and keeps the time. Collective to construct.

    Args:
        config: Of the run.
        folder: Of the run.
        done: Steps that were applied before.
        seconds: That were trained before.
        run_id: The tracker's, of the run that goes on.
        files: Whether anything is written.
        sharding: How the run shards, which the tracker is told beside the config.
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
        told = environment() | ({} if sharding is None else sharding.described())
        self._console = Console(config.steps, done, folder.main)
        say = self._console.say
        sends = folder.main and files
        settings = config.model_dump(mode="json")
        self._tracker = Tracker(
            config.tracker,
            config.run.name,
            settings,
            folder.path,
            sends,
            run_id,
            told,
            classes,
            say,
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
        """Count an attempted step; of one that overflowed, say where, and alert where many do."""
        self._steps += 1
        storm = self._storm.look(overflow is not None)
        if overflow is not None:
            self.say(f"step {step + 1} overflowed and is skipped: {overflow}")
            self._tracker.note("overflow", overflow, step)
        if storm is not None:
            self.say(storm)
            self.alert("overflow storm", f"{storm}; the latest: {overflow}")

    def leave_out(self, seconds: float) -> None:
        """Do not count this time as the training's."""
        self._clock += seconds

    def since_record(self, waited: Mapping[str, float]) -> dict[str, float]:
        """What has been added to seconds, which count from the process's beginning."""
        self._waited_now = dict(waited)
        return {name: total - self._waited.get(name, 0.0) for name, total in waited.items()}

    def speed(self, rows: int, per_rank: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """How fast the steps since the last record were, of `rows` each.

        Examples per second of all ranks, the largest share of time that a rank has waited, and
        which of several ranks is the slowest.

        Args:
            rows: Of the global batch.
            per_rank: `compute_seconds` of each rank, and what `since_record` has given there.
        """
        now = time.monotonic()
        seconds = max(now - self._clock, 1e-9)
        told = dict(per_rank)
        own = told.pop("compute_seconds")
        shares = {name: max(0.0, *waits) / seconds for name, waits in told.items()}
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
        shown = {name: scores[name] for name in HEADLINES if name in scores}
        self._console.show(step, {**record, **shown})

    def write_summary(
        self, step: int, summary: Mapping[str, object], confusions: Mapping[str, Any]
    ) -> None:
        """Write what came of the run, and the confusion matrices of the sets that have one."""
        if self._files:
            for name, confusion in confusions.items():
                if not confusion:
                    continue
                self._folder.write_json(f"confusion_{name}.json", confusion, indent=None)
            self._folder.write_json("summary.json", summary)
        self._tracker.log({k: v for k, v in summary.items() if "/" in k}, step)
        self._tracker.log_confusions(confusions, step)

    def confusions(self, step: int, confusions: Mapping[str, Any]) -> None:
        """Send the confusion matrices of an evaluation, by the name of the set."""
        self._tracker.log_confusions(confusions, step)

    def examples(
        self,
        views: Views,
        spec: InputSpec,
        batch: LabeledBatch | UnlabeledBatch,
        attempt: int,
    ) -> None:
        """Write what the views make of a run's first rows; a failure costs nothing but them."""
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
            self.say(f"note: no examples of the views: {why}; log.examples: 0 leaves them out")
        self.leave_out(time.monotonic() - start)

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.say(line)

    def alert(self, title: str, line: str) -> None:
        """Tell whoever watches the run by the tracker."""
        self._tracker.alert(title, line)

    def close(self) -> None:
        """Flush and close tracker and console."""
        self._tracker.finish()
        self._console.close()
