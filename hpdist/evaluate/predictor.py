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

import os
from pathlib import Path
from typing import Any

from hpdist.evaluate.export.verify import Verified
from hpdist.evaluate.export.write import write_file
from hpdist.evaluate.loaded import Backend, LoadedModel
from hpdist.evaluate.measure import measure, open_measured

__all__ = ["Backend", "Predictor"]


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

    def export(
        self,
        out: str | os.PathLike[str],
        data: Any = None,
        *,
        file_format: str | None = None,
        precision: str = "fp32",
        tolerance: float | None = None,
    ) -> Verified:
        """Write the model to a file, which is kept if it passes a comparison with the model.

        Args:
            out: The file; an earlier one is replaced.
            data: Labelled rows to compare on, as `evaluate` takes them; by default the run's test
                set.
            file_format: onnx, safetensors, openvino or executorch; by default what the file's name
                ends in.
            precision: fp32 or fp16, int8 of ONNX, or bf16 of safetensors.
            tolerance: The largest difference of an output that passes, as a share of the largest
                output; by default 1e-4 in fp32, 1e-2 in fp16, 5e-2 in bf16 and 0.25 in int8.

        Call it on one rank alone, of a process group. Raises ConfigError where it cannot be done or
        the file does not pass, and CheckpointError where the file cannot be written.
        """
        return write_file(
            self,
            Path(out),
            open_measured(self, data),
            file_format=file_format,
            precision=precision,
            tolerance=tolerance,
        )
