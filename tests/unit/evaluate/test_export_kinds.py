"""Exported files of every kind of model and input, in every precision of ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hpdist
from hpdist.data.structures import index, narrow, row_count, tensors_of
from hpdist.evaluate.export.verify import TOLERANCES
from hpdist.evaluate.predictor import Predictor
from hpdist.evaluate.rows import value_batches
from hpdist.models.outputs import outputs_of
from tests.support.model_runs import KINDS, trained

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

DEFAULT = {
    "pictures": "int8",
    "texts": "fp16",
    "adapted": "int8",
    "hf_pictures": "fp16",
    "spectrograms": "int8",
    "own_module": "fp32",
    "with_head": "fp32",
}
"""What the default run makes; the whole matrix is slow, as is tracing a wav2vec 2.0 at all."""

MATRIX = [
    pytest.param(
        kind, precision, marks=() if DEFAULT.get(kind) == precision else (pytest.mark.slow,)
    )
    for kind in KINDS
    for precision in ("fp32", "fp16", "int8")
]


def seen(predictor: Predictor, data: Any) -> Any:
    """What the model sees of rows: as they are decoded and the plain view makes them."""
    (batch,) = value_batches(data, predictor.kind, predictor.column, 100)
    return predictor.views.plain(predictor.spec.decode_rows(*batch))


def difference(original: Predictor, exported: Predictor, rows: Any) -> float:
    """The largest difference of an output, as a share of the largest output."""
    assert original.model is not None
    assert exported.backend is not None
    with torch.inference_mode():
        expected = list(tensors_of(outputs_of(original.model(rows), original.task.outputs)))
    found = list(tensors_of(exported.backend.run(rows)))
    largest = max(float(one.abs().max()) for one in expected)
    pairs = zip(expected, found, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs) / largest


@pytest.mark.parametrize(("kind", "precision"), MATRIX)
def test_every_kind_in_every_precision(kind: str, precision: str, tmp_path: Path) -> None:
    _, rows = trained(tmp_path, kind)
    data = rows[0] if isinstance(rows, tuple) else rows
    original = hpdist.load(tmp_path / "run")
    file = tmp_path / "model.onnx"
    original.export(file, rows, precision=precision)
    assert list(tmp_path.glob("*model.onnx*")) == [file]
    exported = hpdist.load(file)
    limit = TOLERANCES[precision]
    given = seen(original, data)
    assert row_count(given) == len(data)
    for size in (1, 2, 3):
        assert difference(original, exported, narrow(given, 4, size)) <= limit
    backend: Any = exported.backend
    facts = json.loads(backend.metadata["hpdist.inputs"])
    any_length = [each["shape"][-1] is None for each in facts.values()]
    assert all(any_length) == (kind in ANY_LENGTH), facts
    if all(any_length):
        assert isinstance(given, Tensor)
        for share in (0.5, 0.8):
            cut = index(given, torch.tensor([0, 5, 3]))[..., : int(share * given.shape[-1])]
            assert difference(original, exported, cut.contiguous()) <= limit
    if kind == "texts":
        padded = given[:2].clone()
        padded[1] = original.views.vocabulary.pad  # type: ignore[attr-defined]
        assert difference(original, exported, padded) <= limit


ANY_LENGTH = ("texts", "adapted", "adapted_with_head", "spectrograms", "waveforms")
