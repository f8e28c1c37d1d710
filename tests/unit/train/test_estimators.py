"""The estimators are scikit-learn's: its own checks, rows without a label, models of one's own."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from unittest import SkipTest

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_classification, make_regression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks
from torch import nn

import hpdist
from hpdist.errors import ConfigError
from hpdist.train.estimators import SemiSupervisedClassifier, SemiSupervisedRegressor
from tests.support import sampling

SMALL: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [32]},
    "steps": 40,
    "labeled_batch": 24,
    "unlabeled_batch": 24,
    "settings": {"optim": {"lr": 0.01}, "teacher": {"decay": 0.9}},
}


CHECKED = [SemiSupervisedClassifier(**SMALL), SemiSupervisedRegressor(**SMALL)]
EVERY = 5  # the default run makes one of so many checks


@parametrize_with_checks(CHECKED)
@pytest.mark.slow
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("kind", CHECKED, ids=lambda kind: type(kind).__name__)
def test_some_of_scikit_learns_own_checks(kind: Any) -> None:
    made = list(estimator_checks_generator(kind))
    for estimator, check in made[sampling.seed() % EVERY :: EVERY]:
        with suppress(SkipTest):  # of what is not installed, such as polars
            check(estimator)


def two_classes(rows: int = 240) -> tuple[Any, Any, Any]:
    """Rows of two classes; their labels; and those labels of which most are unknown."""
    X, y = make_classification(
        rows, 6, n_informative=4, n_redundant=0, class_sep=2.0, random_state=0
    )
    few = y.copy()
    few[np.random.default_rng(0).permutation(rows)[24:]] = -1
    return X, y, few


def test_rows_without_a_label_are_learnt_from() -> None:
    X, y, few = two_classes()
    model = SemiSupervisedClassifier(**SMALL, random_state=0).fit(X, few)
    assert model.classes_.tolist() == [0, 1]
    assert model.score(X, y) > 0.8
    alone = SemiSupervisedClassifier(**SMALL, random_state=0).fit(X[few >= 0], few[few >= 0])
    assert not np.array_equal(model.predict_proba(X), alone.predict_proba(X))


@pytest.mark.parametrize(
    "marked",
    [
        lambda few: np.where(few < 0, np.nan, few),
        lambda few: [None if label < 0 else int(label) for label in few],
        lambda few: pd.Series(few).astype("Int64").where(few >= 0).astype(object),
    ],
    ids=["NaN", "None", "pandas"],
)
def test_every_mark_gives_the_same_model(marked: Any) -> None:
    X, _, few = two_classes()
    expected = SemiSupervisedClassifier(**SMALL, random_state=3).fit(X, few).predict_proba(X)
    if isinstance(marked(few), pd.Series):
        few_marked = [None if pd.isna(label) else label for label in marked(few)]
    else:
        few_marked = marked(few)
    found = SemiSupervisedClassifier(**SMALL, random_state=3).fit(X, few_marked)
    assert np.array_equal(found.predict_proba(X), expected)


def test_names_of_classes_come_back() -> None:
    X, _, few = two_classes()
    names = np.array(["cat", "dog", "-1"], object)[few]
    model = SemiSupervisedClassifier(**SMALL, random_state=0).fit(X, names)
    assert model.classes_.tolist() == ["cat", "dog"]
    assert set(model.predict(X)) == {"cat", "dog"}


def test_minus_one_is_a_class_where_labels_are_negative() -> None:
    X, y, _ = two_classes()
    model = SemiSupervisedClassifier(**SMALL, random_state=0).fit(X, np.where(y > 0, 1, -1))
    assert model.classes_.tolist() == [-1, 1]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_state_decides_and_nothing_else_changes() -> None:
    X, _, few = two_classes()
    np.random.seed(5)
    torch.manual_seed(5)
    before = np.random.get_state()[1].copy(), torch.get_rng_state(), torch.get_num_threads()
    one = SemiSupervisedClassifier(**SMALL, random_state=1).fit(X, few).predict_proba(X)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.get_num_threads() == before[2]
    again = SemiSupervisedClassifier(**SMALL, random_state=1).fit(X, few).predict_proba(X)
    other = SemiSupervisedClassifier(**SMALL, random_state=2).fit(X, few).predict_proba(X)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_fit_prints_and_writes_nothing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    X, _, few = two_classes()
    SemiSupervisedClassifier(**SMALL, random_state=1).fit(X, few)
    assert capfd.readouterr() == ("", "")
    SemiSupervisedClassifier(**SMALL, random_state=1, verbose=True).fit(X, few)
    assert "fixmatch, 40 steps" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


class Net(nn.Module):
    """A module of one's own."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, 16), nn.ReLU())
        self.head = nn.Linear(16, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


def test_a_module_of_ones_own_is_copied() -> None:
    X, y, few = two_classes()
    net = Net(6, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    estimator = SemiSupervisedClassifier(**(SMALL | {"model": net}), random_state=0)
    assert estimator.fit(X, few).score(X, y) > 0.7
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert isinstance(estimator.model_, Net)
    assert clone(estimator).fit(X, few).score(X, y) == estimator.score(X, y)
    loaded = pickle.loads(pickle.dumps(estimator))
    assert np.array_equal(loaded.predict(X), estimator.predict(X))


def test_numbers_are_learnt_with_most_unknown() -> None:
    X, y = make_regression(300, 5, n_informative=3, noise=1.0, random_state=0)
    few = y.copy()
    few[100:] = np.nan
    settings = SMALL | {"steps": 150}
    model = SemiSupervisedRegressor(**settings, random_state=0).fit(X, few)
    assert model.score(X[100:], y[100:]) > 0.8
    both = SemiSupervisedRegressor(**settings, random_state=0).fit(X, np.stack([few, -few], axis=1))
    assert both.predict(X).shape == (300, 2)
    assert both.score(X[100:], np.stack([y, -y], axis=1)[100:]) > 0.8


def test_frames_with_categories_and_numbers() -> None:
    X, y, few = two_classes()
    frame = pd.DataFrame(X[:, :3], columns=["a", "b", "c"])
    frame["colour"] = np.where(y > 0, "red", "blue")
    model = SemiSupervisedClassifier(**SMALL, random_state=0).fit(frame, few)
    assert model.score(frame, y) > 0.95
    assert model.feature_names_in_.tolist() == ["a", "b", "c", "colour"]
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame.rename(columns={"a": "other"}))


def test_pictures() -> None:
    draws = np.random.default_rng(0)
    y = draws.integers(0, 2, 60)
    X = (draws.integers(0, 60, (60, 8, 8)) + 120 * y[:, None, None]).astype(np.uint8)
    few = np.where(np.arange(60) < 20, y, -1)
    settings = SMALL | {"model": {"name": "cnn", "width": 8}}
    settings["settings"] = {"views": {"name": "image"}, "teacher": {"decay": 0.9}}
    model = SemiSupervisedClassifier(**settings, random_state=0).fit(X, few)
    assert model.predict_proba(X).shape == (60, 2)
    assert model.score(X, y) > 0.8


def test_in_scikit_learns_tools() -> None:
    X, y, _ = two_classes(120)
    pipeline = make_pipeline(StandardScaler(), SemiSupervisedClassifier(**SMALL, random_state=0))
    assert cross_val_score(pipeline, X, y, cv=2).mean() > 0.7
    assert pipeline.get_params()["semisupervisedclassifier__steps"] == 40


def test_what_cannot_be_is_refused() -> None:
    X, _, few = two_classes()
    with pytest.raises(ValueError, match="y has 0 classes in its rows with a label"):
        SemiSupervisedClassifier(**SMALL).fit(X, np.full(len(X), np.nan))
    with pytest.raises(ValueError, match="every row as unlabelled"):
        SemiSupervisedRegressor(**SMALL).fit(X, np.full(len(X), np.nan))
    with pytest.raises(ConfigError, match=r"fixmtch"):
        SemiSupervisedClassifier(**SMALL, algorithm="fixmtch").fit(X, few)
    assert hpdist.SemiSupervisedClassifier is SemiSupervisedClassifier
    assert hpdist.SemiSupervisedRegressor is SemiSupervisedRegressor


def test_a_rows_outputs_do_not_depend_on_the_others() -> None:
    """Nor does it matter that so many rows are computed in several parts."""
    X, _, marked = two_classes()
    fitted = SemiSupervisedClassifier(steps=5, random_state=0).fit(X, marked)
    many = np.tile(X, (5, 1))[:1030]
    found = fitted.predict_proba(many)
    assert found.shape == (1030, 2)
    alone = [fitted.predict_proba(many[row : row + 1])[0] for row in range(0, 1030, 103)]
    np.testing.assert_allclose(found[::103], alone, rtol=0, atol=1e-13)
