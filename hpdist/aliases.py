"""Modules by the names that they had before, for one release.

Old checkpoints of `accelerator.save_state` name some of them, and so may users' code.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import cast

MOVED = {
    "algorithm_state": "train.algorithm_state",
    "algorithms.addon": "algorithms.addons.base",
    "algorithms.alignment": "algorithms.parts.alignment",
    "algorithms.auxiliary_balanced": "algorithms.addons.auxiliary_balanced",
    "algorithms.banks": "algorithms.parts.banks",
    "algorithms.crest": "algorithms.addons.crest",
    "algorithms.darp": "algorithms.addons.darp",
    "algorithms.debiaspl": "algorithms.addons.debiaspl",
    "algorithms.heads": "algorithms.parts.projections",
    "algorithms.logit_adjustment": "algorithms.addons.logit_adjustment",
    "algorithms.mixing": "algorithms.parts.mixing",
    "algorithms.ramps": "algorithms.parts.ramps",
    "algorithms.reconstruction": "algorithms.addons.reconstruction",
    "algorithms.resizemix": "algorithms.parts.resizemix",
    "algorithms.rotation": "algorithms.parts.rotation",
    "algorithms.tables": "algorithms.parts.tables",
    "algorithms.targets": "tasks.losses",
    "algorithms.tasks": "tasks.base",
    "bad_rows": "train.bad_rows",
    "building": "train.build",
    "checks": "train.checks",
    "claim": "train.claim",
    "closing": "cli.closing",
    "components": "train.config",
    "config_data": "data.config",
    "data.arrow_types": "data.decode.arrow_types",
    "data.audio": "data.decode.audio",
    "data.builders": "data.sources.builders",
    "data.cached_addresses": "data.files.cached_addresses",
    "data.categories": "data.decode.categories",
    "data.class_folders": "data.sources.class_folders",
    "data.classes": "data.sources.classes",
    "data.columns": "data.files.columns",
    "data.decode_process": "data.decode.processes",
    "data.decoders": "data.decode.decoders",
    "data.decode.kinds": "data.kinds.find",
    "data.digits": "data.samples.digits",
    "data.duplicates": "data.sources.duplicates",
    "data.embedding": "data.sources.embedding",
    "data.encoded": "data.decode.image",
    "data.evaluation": "data.sources.held_out",
    "data.first_rows": "data.sources.first_rows",
    "data.fitting": "data.sources.fitting",
    "data.known_types": "data.sources.known_types",
    "data.labels": "data.sources.labels",
    "data.loading": "data.sources.loading",
    "data.local_files": "data.sources.local_files",
    "data.local_tables": "data.sources.local_tables",
    "data.long_tail": "data.sources.long_tail",
    "data.named_files": "data.files.named_files",
    "data.options": "data.sources.options",
    "data.own_files": "data.sources.own_files",
    "data.partitions": "data.files.partitions",
    "data.paths": "data.files.paths",
    "data.pictures": "data.kinds.pictures",
    "data.retry": "data.files.retry",
    "data.rows": "data.files.row_names",
    "data.saved": "data.sources.saved",
    "data.sources.pictures": "data.kinds.pictures",
    "data.splits": "data.files.splits",
    "data.synthetic": "data.samples.synthetic",
    "data.targets": "data.sources.label_encoding",
    "data.text": "data.decode.text",
    "data.tones": "data.samples.tones",
    "data.transport": "data.files.transport",
    "data.unlabeled": "data.sources.unlabeled",
    "distributed.build_lock": "engines.build_lock",
    "distributed.checkpoint": "checkpoint.reader",
    "distributed.checkpoint_writer": "checkpoint.writer",
    "distributed.deepspeed_config": "engines.deepspeed_config",
    "distributed.deepspeed_sections": "engines.deepspeed_sections",
    "distributed.described": "engines.described",
    "distributed.diagnose": "engines.overflow",
    "distributed.ema": "engines.teacher",
    "distributed.engine": "engines.base",
    "distributed.gradient_layout": "engines.gradient_layout",
    "distributed.launch": "engines.launch",
    "distributed.launcher": "engines.launcher",
    "distributed.loss_scale": "engines.loss_scale",
    "distributed.manifest": "checkpoint.manifest",
    "distributed.names": "distributed.module_names",
    "distributed.network": "preflight.network",
    "distributed.operators": "engines.operators",
    "distributed.optimizer_state": "engines.optimizer_state",
    "distributed.own_time": "distributed.stragglers",
    "distributed.reach": "engines.reach",
    "distributed.reduce": "distributed.collectives",
    "distributed.zero": "engines.zero",
    "distributed.zero3": "engines.zero3",
    "distributed.zero_reach": "engines.zero_reach",
    "distributed.zero_shapes": "engines.zero_shapes",
    "divergence": "train.divergence",
    "evaluation": "evaluate.scoring",
    "generations": "train.generations",
    "given": "train.given",
    "human": "messages.human",
    "input_choice": "train.input_choice",
    "lifeline": "processes",
    "measuring": "train.measuring",
    "memory_meter": "plan.memory_meter",
    "memory_plan": "plan.memory_plan",
    "micro_batch": "train.micro_batch",
    "models.heads": "models.with_heads",
    "models.hugging_face": "models.hf.text",
    "models.hugging_face_audio": "models.hf.audio",
    "models.lora": "models.adapters",
    "models.memory": "models.activation_checkpointing",
    "models.timm_model": "models.timm",
    "opening": "train.opening",
    "optim": "train.optim",
    "outcome": "train.outcome",
    "overrides": "config.overrides",
    "progress": "messages.progress",
    "pseudo_labels": "train.pseudo_label_metrics",
    "records": "train.records",
    "redaction": "messages.redaction",
    "rehearsal": "plan.rehearsal",
    "rollback": "train.recovery",
    "run_data": "train.data",
    "run_facts": "train.facts",
    "run_guard": "train.guard",
    "run_inputs": "train.input_choice",
    "run_looks": "train.first_look",
    "run_model": "train.model",
    "run_name": "train.run_name",
    "run_state": "train.state",
    "saving": "train.saving",
    "scores": "tasks.metrics",
    "setting_docs": "config.descriptions",
    "settings": "config.component",
    "shipped": "cli.shipped",
    "step": "train.step",
    "step_state": "train.step_state",
    "tracking.config_history": "train.config_history",
    "tracking.run_log": "train.run_log",
    "train.inputs": "train.input_choice",
    "trainer": "train.trainer",
}
"""Old names to new ones, both below `hpdist`."""

MOVED_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "config": {
        "train.config": ("RunConfig", "load", "parse", "json_schema", "Run", "Batch"),
        "config.section": ("Section",),
        "config.component": (
            "Component",
            "ComponentOf",
            "PythonComponent",
            "component_names",
            "components",
            "import_object",
        ),
        "data.config": (
            "Data",
            "Duplicates",
            "LabelColumn",
            "Labeled",
            "Loading",
            "LongTail",
            "Source",
            "TaskChoice",
            "Unlabeled",
            "UnlabeledPart",
            "UnlabeledSource",
        ),
        "engines.config": ("LossScale", "Precision", "Teacher", "Zero"),
        "train.optim": ("Optim", "Schedule"),
        "train.divergence": ("Divergence",),
        "checkpoint.config": ("Checkpoint",),
        "tracking.config": ("Log", "Tracker"),
        "evaluate.config": ("Eval",),
        "distributed.config": ("Watchdog",),
    },
    "data.decode.stored_values": {"data.decode.spec": ("InputSpec",)},
    "data.stream.sequential": {"data.stream.blocks": ("read_blocks",)},
    "data.sources.unlabeled": {"data.sources.unlabeled_rows": ("row_count",)},
    "data.sources.labeled": {"data.kinds.first_rows": ("input_spec",)},
}
"""Names that a package or a module held before, by where they are now."""

_PREFIX = "hpdist."


def current_name(name: str) -> str:
    """Give the name of today for the dotted name of a module, or of something in one."""
    old = name.removeprefix(_PREFIX)
    while old:
        if old in MOVED:
            return _PREFIX + MOVED[old] + name.removeprefix(_PREFIX)[len(old) :]
        old = old.rpartition(".")[0]
    return name


def find_moved(package: str, name: str) -> object:
    """Give what a package held under a name before, with a warning that says where it is now.

    Raises AttributeError where it held no such thing.
    """
    for home, names in MOVED_NAMES.get(package.removeprefix(_PREFIX), {}).items():
        if name in names:
            warnings.warn(
                f"{package}.{name} is {_PREFIX}{home}.{name} now; the old name goes with the next "
                "release",
                DeprecationWarning,
                stacklevel=3,
            )
            value: object = getattr(importlib.import_module(_PREFIX + home), name)
            return value
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


class _Alias(importlib.abc.InspectLoader):
    """Loads the module that has another name now."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spec: importlib.machinery.ModuleSpec | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # it has run, and keeps the name that it has now

    def get_code(self, fullname: str) -> CodeType | None:
        """Give the code of the module, for `python -m`."""
        spec = importlib.util.find_spec(self._name)
        assert spec is not None
        return cast(importlib.abc.InspectLoader, spec.loader).get_code(self._name)

    def get_source(self, fullname: str) -> str | None:
        """Give none: tracebacks name the file that has it."""
        return None


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules by their old names, with a warning that names the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_PREFIX) or fullname.removeprefix(_PREFIX) not in MOVED:
            return None
        new = current_name(fullname)
        warnings.warn(
            f"{fullname} is {new} now; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return importlib.machinery.ModuleSpec(fullname, _Alias(new))


def install() -> None:
    """Have the old names found from here on; any number of times."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
