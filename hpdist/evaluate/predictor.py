"""A trained model that predicts: what `hpdist.load` gives.

    predictor = hpdist.load("runs/cifar10")
    predictor.predict(rows)                 # a label for each row
    predictor.predict_probabilities(rows)   # float32 [rows, classes]
    predictor.evaluate(rows)                # its scores
    predictor.model                         # a plain module of torch

It knows how rows are decoded, what the model sees of them and what its outputs mean, so that a
user gives rows as they are stored: pictures, texts, sounds, numbers.
"""

from __future__ import annotations

from typing import Any

from hpdist.evaluate.loaded import LoadedModel
from hpdist.evaluate.measure import measure, open_measured


class Predictor(LoadedModel):
    """A model that `hpdist.load` gave: it predicts, and is measured."""

    def evaluate(self, data: Any = None, *, batch: int | None = None) -> dict[str, float]:
        """Measure the model on all rows of a labelled set; give the task's scores by name.

        Args:
            data: What `predict_columns` takes, but for the inputs alone, with a column of labels;
                by default the run's test set.
            batch: Rows of a forward; by default as many as the run's evaluation had.

        Collective in a process group: every rank must call, and each row is measured once. Raises
        DataError where the set does not fit, or not one row can be decoded.
        """
        (found,) = measure([self], open_measured(self, data), batch)
        return dict(found.scores.values)
