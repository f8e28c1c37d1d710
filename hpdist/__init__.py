"""Half-precision, sharded semi-supervised training for Hugging Face Accelerate and DeepSpeed."""

import importlib
from typing import TYPE_CHECKING

from hpdist.aliases import install as _find_old_names
from hpdist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DistributedError,
    HpdistError,
    PrecisionError,
)
from hpdist.version import __version__

if TYPE_CHECKING:
    from hpdist.algorithms import Algorithm, FixMatch, FreeMatch, Supervised
    from hpdist.data.batch import LabeledBatch, UnlabeledBatch
    from hpdist.data.views import IdentityViewsConfig, ImageViewsConfig, TableViewsConfig
    from hpdist.distributed.batch_norm import global_batch_norm
    from hpdist.engines.fsdp2_shard import fully_shard
    from hpdist.evaluate.load import load
    from hpdist.evaluate.predictor import Predictor
    from hpdist.models.with_heads import with_heads
    from hpdist.train.algorithm_state import whole_state
    from hpdist.train.config import RunConfig
    from hpdist.train.estimators import SemiSupervisedClassifier, SemiSupervisedRegressor
    from hpdist.train.step import SemiSupervisedStep, StepOutcome
    from hpdist.train.trainer import Trainer

__all__ = [
    "Algorithm",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DistributedError",
    "FixMatch",
    "FreeMatch",
    "HpdistError",
    "IdentityViewsConfig",
    "ImageViewsConfig",
    "LabeledBatch",
    "PrecisionError",
    "Predictor",
    "RunConfig",
    "SemiSupervisedClassifier",
    "SemiSupervisedRegressor",
    "SemiSupervisedStep",
    "StepOutcome",
    "Supervised",
    "TableViewsConfig",
    "Trainer",
    "UnlabeledBatch",
    "__version__",
    "fully_shard",
    "global_batch_norm",
    "load",
    "whole_state",
    "with_heads",
]

_find_old_names()

_HOMES = {  # imported when first used, so that `import hpdist` stays light
    "Algorithm": "hpdist.algorithms",
    "FixMatch": "hpdist.algorithms",
    "FreeMatch": "hpdist.algorithms",
    "IdentityViewsConfig": "hpdist.data.views",
    "ImageViewsConfig": "hpdist.data.views",
    "LabeledBatch": "hpdist.data.batch",
    "Predictor": "hpdist.evaluate.predictor",
    "RunConfig": "hpdist.train.config",
    "SemiSupervisedClassifier": "hpdist.train.estimators",
    "SemiSupervisedRegressor": "hpdist.train.estimators",
    "SemiSupervisedStep": "hpdist.train.step",
    "StepOutcome": "hpdist.train.step",
    "Supervised": "hpdist.algorithms",
    "TableViewsConfig": "hpdist.data.views",
    "Trainer": "hpdist.train.trainer",
    "UnlabeledBatch": "hpdist.data.batch",
    "fully_shard": "hpdist.engines.fsdp2_shard",
    "global_batch_norm": "hpdist.distributed.batch_norm",
    "load": "hpdist.evaluate.load",
    "whole_state": "hpdist.train.algorithm_state",
    "with_heads": "hpdist.models.with_heads",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
