"""Estimators in scikit-learn's way: y = -1, or NaN, marks the rows without a label.

    model = hpdist.SemiSupervisedClassifier(steps=500, random_state=0).fit(X, y)
    model.predict(X_test), model.predict_proba(X_test), model.score(X_test, y_test)

A fit is a run of `hpdist.Trainer` on this process that writes nothing. It needs scikit-learn.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hpdist.data.sources.arrays import INPUT, LABEL, array_table
from hpdist.data.sources.in_memory import IN_MEMORY
from hpdist.errors import ConfigError
from hpdist.messages.progress import muted
from hpdist.train.build import build_run
from hpdist.train.config import parse
from hpdist.train.fitted_model import FittedModel
from hpdist.train.given import InMemoryInputs, algorithm_given, model_given
from hpdist.train.loop import RunLoop

try:
    from sklearn.base import (  # type: ignore[import-untyped]
        BaseEstimator,
        ClassifierMixin,
        RegressorMixin,
    )
    from sklearn.utils import check_random_state  # type: ignore[import-untyped]
    from sklearn.utils.multiclass import (  # type: ignore[import-untyped]
        check_classification_targets,
    )
    from sklearn.utils.validation import (  # type: ignore[import-untyped]
        check_is_fitted,
        validate_data,
    )

    from hpdist.train.estimator_labels import (
        checked_labels,
        checked_numbers,
        plain_labels,
        unlabeled_rows,
    )
except ImportError as error:
    raise ConfigError(
        f"the estimators need scikit-learn 1.6 or later ({error}): pip install 'hpdist[demo]'"
    ) from error

Array: TypeAlias = npt.NDArray[Any]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

_SEEDS = 2**31 - 1
_FOR_NUMBERS = {"name": "mean_teacher", "unsupervised_weight": 1.0}


class SemiSupervisedEstimator(BaseEstimator):  # type: ignore[misc]
    """What both estimators share.

    Args:
        model: A name or the settings of a run's `model` section, or a `torch.nn.Module`, of which a
            copy trains.
        algorithm: An algorithm's name, settings or object, as `hpdist.Trainer` takes it; None for
            the usual one: `fixmatch` for classes, `mean_teacher` for numbers.
        steps: Optimizer steps of a fit.
        labeled_batch: Labelled rows of a step.
        unlabeled_batch: Unlabelled rows of a step.
        settings: Further sections of a run's config by name, such as `{"optim": {"lr": 0.01}}`;
            they are laid over those that the other arguments make.
        random_state: An integer, a generator of NumPy or None, as scikit-learn takes it. With an
            integer a fit gives the same model every time.
        verbose: Whether a fit prints what a run prints.

    After `fit`, `model_` is a plain module with the teacher's weights, in evaluation mode and fp32.
    """

    _usual_algorithm: ClassVar[Any] = "fixmatch"

    def __init__(
        self,
        model: Any = "mlp",
        algorithm: Any = None,
        *,
        steps: int = 300,
        labeled_batch: int = 32,
        unlabeled_batch: int = 96,
        settings: Mapping[str, Any] | None = None,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.algorithm = algorithm
        self.steps = steps
        self.labeled_batch = labeled_batch
        self.unlabeled_batch = unlabeled_batch
        self.settings = settings
        self.random_state = random_state
        self.verbose = verbose

    def _train(self, X: Any, labels: Array, labeled: BoolArray, task: str) -> None:
        """Fit on rows of which some have `labels`, those of `labeled` in their order."""
        without = ~labeled if not labeled.all() else labeled
        objects = InMemoryInputs(
            labeled=array_table("X, y", _rows(X, labeled), labels),
            unlabeled=array_table("X", _rows(X, without)),
        )
        columns = {} if hasattr(X, "columns") else {"input": INPUT}
        config = parse(self._values(objects, task, columns), "fit")
        quiet = nullcontext() if self.verbose else muted()
        with _own_random_numbers(), _one_thread(getattr(X, "ndim", 2) == 2), quiet:
            loop = RunLoop(build_run(config, objects, files=False))
            loop.fit()
            self.model_ = loop.run.model.teacher(loop.step)
        self._fitted = FittedModel.of(loop, self.model_)

    def _values(
        self, objects: InMemoryInputs, task: str, columns: Mapping[str, str]
    ) -> dict[str, Any]:
        """Make the settings of the run; a given module and a given algorithm stay as they are."""
        algorithm = self._usual_algorithm if self.algorithm is None else self.algorithm
        values: dict[str, Any] = {
            "model": model_given(copy.deepcopy(self.model), objects),
            "algorithm": algorithm_given(copy.deepcopy(algorithm), objects),
            "data": {
                "labeled": {"path": IN_MEMORY, "label": LABEL, **columns},
                "unlabeled": {"path": IN_MEMORY, **columns},
                "duplicates": {"check": "never"},
            },
            "task": {"name": task},
            "batch": {"labeled": self.labeled_batch, "unlabeled": self.unlabeled_batch},
            "optim": {"name": "adamw", "lr": 3e-3},
            "steps": self.steps,
            "log": {"every": max(1, self.steps)},
            "tracker": {"name": "none"},
            "run": {
                "name": "fit",
                "seed": int(check_random_state(self.random_state).randint(_SEEDS)),
            },
        }
        return _laid_over(values, self.settings or {})

    def _inputs(self, X: Any, *, reset: bool) -> Any:
        """Check inputs as scikit-learn does: an array, or a frame whose columns are not numbers."""
        if hasattr(X, "columns") and not all(kind.kind in "biuf" for kind in X.dtypes):
            return validate_data(self, X, reset=reset, skip_check_array=True)
        pictures = getattr(X, "ndim", 2) > 2 and getattr(X, "dtype", None) == np.uint8
        kept = np.uint8 if pictures else np.float64
        array = validate_data(self, X, reset=reset, dtype=kept, allow_nd=pictures)
        return array if pictures else array.astype(np.float32)

    def _outputs(self, X: Any) -> torch.Tensor:
        check_is_fitted(self)
        return self._fitted.outputs(self._inputs(X, reset=False))


class SemiSupervisedClassifier(ClassifierMixin, SemiSupervisedEstimator):  # type: ignore[misc]
    """A classifier that also learns from rows without a label; see `SemiSupervisedEstimator`.

    In y, -1, NaN and None mark such rows. -1 is a class where other labels are negative too, or
    where it stands beside one other label alone.
    """

    def fit(self, X: Any, y: Any) -> SemiSupervisedClassifier:
        """Train on rows X [rows, features], or a DataFrame or images, with labels y [rows].

        Raises ValueError where X or y do not fit, or y has fewer than two classes; ConfigError or
        DataError for settings that do not.
        """
        X = self._inputs(X, reset=True)
        y = checked_labels(self, X, y)
        labeled = ~unlabeled_rows(y)
        labels = plain_labels(y[labeled])
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        count = len(self.classes_)
        if count < 2:
            raise ValueError(
                f"y has {'1 class' if count == 1 else f'{count} classes'} in its rows with a "
                "label; a classifier needs two or more"
            )
        self._train(X, codes, labeled, "classification")
        return self

    def predict_proba(self, X: Any) -> Array:
        """Give the probability of each class, float64 [rows, classes], in the order of classes_."""
        probabilities: Array = self._outputs(X).double().softmax(dim=-1).numpy()
        return probabilities

    def predict(self, X: Any) -> Array:
        """Give the likeliest class of each row, [rows]."""
        numbers = self.predict_proba(X).argmax(axis=1)
        found: Array = self.classes_[numbers]
        return found


class SemiSupervisedRegressor(RegressorMixin, SemiSupervisedEstimator):  # type: ignore[misc]
    """A regressor that also learns from rows without a label; see `SemiSupervisedEstimator`.

    In y, NaN and None mark such rows. y may have several targets, [rows, targets]. By default the
    algorithm is `mean_teacher`, with a weight of 1, since numbers have no bounds.
    """

    _usual_algorithm = _FOR_NUMBERS

    def fit(self, X: Any, y: Any) -> SemiSupervisedRegressor:
        """Train on rows X [rows, features], or a DataFrame or images, with numbers y.

        Raises ValueError where X or y do not fit, or no row has a number; ConfigError or DataError
        for settings that do not.
        """
        X = self._inputs(X, reset=True)
        y = checked_numbers(self, X, y)
        labeled = ~np.isnan(y).reshape(len(y), -1).all(axis=1)
        if not labeled.any():
            raise ValueError("y marks every row as unlabelled; give some of them a number")
        self._train(X, y[labeled], labeled, "regression")
        return self

    def predict(self, X: Any) -> Array:
        """Give the numbers of each row, float64: [rows], or [rows, targets]."""
        outputs = self._outputs(X)
        found: Array = self._fitted.task.prediction_columns(outputs, ())["label"]
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _rows(X: Any, chosen: BoolArray) -> Any:
    return X.loc[chosen] if hasattr(X, "loc") else X[chosen]


def _laid_over(values: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lay sections of settings over others, section by section."""
    merged = dict(values)
    for name, value in settings.items():
        below = merged.get(name)
        both = isinstance(below, dict) and isinstance(value, Mapping)
        merged[name] = {**below, **value} if both and below is not None else value
    return merged


@contextmanager
def _one_thread(is_table: bool) -> Iterator[None]:
    """Compute in one thread: the matrices of a table's batch are too small for several to pay."""
    threads = torch.get_num_threads()
    if is_table:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leave the process's generators as they were: a run seeds all of them."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
