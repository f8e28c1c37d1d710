"""The state of a run, to and from a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpdist.algorithms.saved_state import Shards
from hpdist.checkpoint import reader as checkpoint
from hpdist.checkpoint.writer import CheckpointWriter
from hpdist.data.config import CHOICES
from hpdist.distributed.fragments import Fragment
from hpdist.distributed.module_names import named_buffers, shortened
from hpdist.engines.optimizer_state import optimizer_of, saved_optimizer
from hpdist.errors import CheckpointError, describe
from hpdist.tasks import DEFAULT_TASK
from hpdist.train.config import RunConfig
from hpdist.train.data import RunData
from hpdist.train.optim import state_keys
from hpdist.train.step import SemiSupervisedStep
from hpdist.train.step_state import common_of, facts_of, fragments_of, load_step


class RunState:
    """Model, optimizer, teacher, algorithm, loss scale, counters and the positions in the data.

    The model's own noise needs no state: it is seeded anew for every step.
    """

    def __init__(
        self,
        step: SemiSupervisedStep,
        data: RunData,
        config: RunConfig,
    ) -> None:
        self.step = step
        self.data = data
        self.identity = self._identity(config)
        self._optimizer_keys = state_keys(config.optim)
        self.overflows = 0
        self.best: tuple[float, int] | None = None
        """The best score on the validation set, and its step."""

    def note_validation(self, score: float) -> None:
        """Keep the best evaluation, by the task's headline; NaN does not count."""
        if math.isnan(score):
            return
        sign = 1 if self.step.algorithm.task.larger_is_better else -1
        if self.best is None or sign * score > sign * self.best[0]:
            self.best = (score, self.step.applied_steps)

    def save(self, writer: CheckpointWriter, facts: Mapping[str, Any]) -> None:
        """Give a checkpoint to the writer; `load` returns `facts`. Every rank must call."""
        step, engine = self.step, self.step.engine
        shards = step.algorithm.shards()
        writer.save(
            step.applied_steps,
            self._fragments(shards),
            self._common(shards),
            {
                **facts_of(step),
                "overflows": self.overflows,
                "best": self.best,
                "optimizer": engine.optimizer_scalars(),
                "optimizer_apart": engine.optimizer_scalars_by_parameter(),
                "streams": {name: s.state_dict() for name, s in self.data.streams.items()},
                "data": self.data.state(),
                "identity": self.identity,
                **facts,
            },
            before=self.data.take_audit(),
        )

    @torch.no_grad()
    def load(self, saved: checkpoint.SavedRun, *, data: bool = True) -> dict[str, Any]:
        """Load everything from a checkpoint; return its facts.

        Without `data`, the rows used since stay used: the streams keep their positions, and the
        attempts, which key the views' noise, count on. Raises CheckpointError if it is of another
        run.
        """
        facts, step, engine = saved.facts, self.step, self.step.engine
        self._check_identity(saved)
        engine.load_master(saved.whole("master"))
        engine.load_optimizer(saved_optimizer(saved, self._optimizer_keys))
        for name, buffer in named_buffers(engine.module):
            buffer.copy_(saved.common[f"buffer/{name}"])
        load_step(step, saved)
        self.overflows = facts["overflows"]
        self.best = tuple(facts["best"]) if facts["best"] else None
        if data:
            step.attempts = facts["attempts"]
            self._load_streams(saved)
            self.data.load_state(facts["data"], facts["attempts"])
        return facts

    def _load_streams(self, saved: checkpoint.SavedRun) -> None:
        states, name = saved.facts["streams"], ""
        try:
            for name, stream in self.data.streams.items():
                stream.load_state_dict(states[name])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{saved.path} has no usable position of the {name} rows: {describe(error)}"
            ) from error

    def _fragments(self, shards: Shards) -> dict[str, list[Fragment]]:
        """This rank's share of everything sharded, by kind."""
        fragments = {"master": self.step.engine.master_fragments()}
        for key, pieces in self.step.engine.optimizer_fragments().items():
            fragments[f"optimizer.{key}"] = pieces
        return fragments | fragments_of(self.step, shards)

    def _common(self, shards: Shards) -> dict[str, Tensor]:
        """What is equal on every rank."""
        buffers = named_buffers(self.step.engine.module)
        common = {f"buffer/{name}": buffer for name, buffer in buffers}
        return common | common_of(self.step, shards) | self.data.fitted

    def _identity(self, config: RunConfig) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that continues from it."""
        shapes = self.step.engine.parameter_shapes()
        return {
            "model": config.model.model_dump(mode="json", exclude={"save"}),
            "task.name": config.task.name,
            "algorithm.name": config.algorithm.name,
            "addons": [addon.name for addon in config.addons],
            "classes": list(self.data.labeled.classes.names),
            "run.seed": config.run.seed,
            "batch.labeled": config.batch.labeled,
            "batch.unlabeled": config.batch.unlabeled,
            **{f"data.labeled.{name}": value for name, value in _choice(config).items()},
            "optim.name": config.optim.name,
            "parameters": {name: list(shape) for name, shape in shapes.items()},
        }

    def _check_identity(self, saved: checkpoint.SavedRun) -> None:
        chosen = {key: value for key, value in self.identity.items() if key.startswith("data.")}
        # Earlier versions did not record it.
        theirs = {
            "task.name": DEFAULT_TASK.name,
            "optim.name": optimizer_of(saved, self.identity["optim.name"]),
            **chosen,
            **saved.facts["identity"],
        }
        different = [
            _difference(key, theirs.get(key), value)
            for key, value in self.identity.items()
            if theirs.get(key) != value and not _same_state(key, theirs.get(key), value)
        ]
        if different:
            raise CheckpointError(
                f"{saved.path} is of another run ({'; '.join(different)}); "
                "choose another run.name, or make the settings agree"
            )


def _choice(config: RunConfig) -> dict[str, Any]:
    """Which of the labelled rows are used: they stay the same over a run."""
    labeled = config.data.labeled
    found = {name: getattr(labeled, name) for name in (*CHOICES, "imbalance")}
    if found["indices"] is not None:
        digest = hashlib.sha256(json.dumps(sorted(found["indices"])).encode()).hexdigest()
        found["indices"] = f"{len(found['indices'])} rows, digest {digest[:12]}"
    return found


def _difference(key: str, there: Any, here: Any) -> str:
    """Describe the difference between a checkpoint and the run that would continue from it."""
    if key == "parameters" and isinstance(there, Mapping):
        return "; ".join(_parameters_differ(there, here))
    return f"{key}: {_short(there)} there, {_short(here)} here"


def _parameters_differ(there: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> list[str]:
    """The parameters that are trained only there or only here, or have another shape."""
    only = {"there": there.keys() - here.keys(), "here": here.keys() - there.keys()}
    found = [
        f"parameters trained only {where}: {shortened(sorted(names))}"
        for where, names in only.items()
        if names
    ]
    shapes = [
        f"{name} {there[name]} there, {here[name]} here"
        for name in here
        if name in there and list(there[name]) != list(here[name])
    ]
    if shapes:
        found.append(f"parameters of another shape: {shortened(shapes)}")
    return found or ["parameters: in another order"]


def _same_state(key: str, there: Any, here: Any) -> bool:
    """Whether a different setting leaves the meaning of all state unchanged."""
    return key == "optim.name" and {there, here} == {"adam", "adamw"}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
