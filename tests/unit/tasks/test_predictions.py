"""What a task writes of each row that was predicted, and what it shows of itself."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch

from hpdist.algorithms import Classification, Multilabel, Regression
from hpdist.data.config import Labeled
from hpdist.tasks import DEFAULT_TASK, choose_task, make_task
from tests.support.labeled import open_labeled

NAMES = ["ant", "bee", "cat"]


def test_a_class_has_its_name_confidence_and_probabilities() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    columns = Classification().prediction_columns(p.log().half(), NAMES)
    assert columns["label"] == ["ant", "cat"]
    np.testing.assert_allclose(columns["confidence"], [0.7, 0.6], atol=1e-3)
    np.testing.assert_allclose(columns["probabilities"], p, atol=1e-3)
    assert columns["probabilities"].dtype == np.float32


def test_several_labels_are_those_above_the_threshold() -> None:
    p = torch.tensor([[0.9, 0.35, 0.1], [0.1, 0.2, 0.05]])
    columns = Multilabel(0.3).prediction_columns(p.logit(), NAMES)
    assert columns["label"] == [["ant", "bee"], []]
    np.testing.assert_allclose(columns["probabilities"], p, atol=1e-6)
    assert Multilabel().prediction_columns(p.logit(), NAMES)["label"] == [["ant"], []]


def test_numbers_are_in_their_own_units() -> None:
    rows = datasets.Dataset.from_dict({"x": [[0.0]] * 4, "label": [90.0, 110.0, 90.0, 110.0]})
    read = open_labeled(Labeled(path="m", input="x"), 0, dataset=rows, labels=Regression())
    task = Regression().fitted(read.encoding)
    assert (task.std, task.mean) == ((10.0,), (100.0,))
    columns = task.prediction_columns(torch.tensor([[0.0], [-2.5]]), ["price"])
    assert columns["label"].tolist() == [100.0, 75.0]
    again = task.prediction_columns(torch.from_numpy(read.labels), ["price"])
    assert again["label"].tolist() == [90.0, 110.0, 90.0, 110.0]
    two = Regression((10.0, 1.0), (100.0, 0.0)).prediction_columns(torch.ones(1, 2), ["a", "b"])
    assert two["label"].tolist() == [[110.0, 1.0]]


@pytest.mark.parametrize("name", ["classification", "multilabel", "regression"])
def test_example_labels_have_a_loss(name: str) -> None:
    task = make_task(name)
    labels = task.example_labels(6, 3, torch.Generator().manual_seed(0))
    losses = task.losses(torch.zeros(6, task.output_size(3)), labels)
    assert losses.shape == (6,)
    assert losses.isfinite().all()
    assert (losses > 0).all()


def test_the_display_says_what_a_report_draws() -> None:
    assert DEFAULT_TASK.display() == {
        "name": "classification",
        "headline": "accuracy",
        "title": "Accuracy",
        "summarized": ["accuracy", "macro_f1", "balanced_accuracy"],
        "charts": ["confusion"],
    }
    assert Multilabel.display()["title"] == "Mean average precision"
    assert Regression.display()["title"] == "Root mean squared error"


def test_options_make_the_task() -> None:
    task: Any = choose_task("multilabel", threshold=0.3, labels="ids").build()
    assert (task.threshold, task.labels) == (0.3, "ids")
    assert make_task().name == DEFAULT_TASK.name
