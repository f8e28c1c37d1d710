"""Predictions of datasets of any size: sharded over ranks, resumable, each row exactly once."""

from __future__ import annotations

from hpdist.evaluate.predict.run import Predicted, PredictOptions, predict_to

__all__ = ["PredictOptions", "Predicted", "predict_to"]
