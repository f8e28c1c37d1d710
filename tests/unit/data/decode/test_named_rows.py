"""Rows that are arrays by name: in memory, and decoded in threads and in processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hpdist.data.decode.arrays import (
    ArrayLayout,
    check_rows,
    mapped_arrays,
    memory_size,
    slice_rows,
)
from hpdist.data.decode.decoders import Decoder
from tests.support.named_rows import NamedSpec

VALUES = [*range(41), -1, *range(60, 80)]


@pytest.mark.parametrize(
    ("slow", "threads", "processes"), [(False, 1, 0), (True, 3, 0), (False, 1, 2)]
)
def test_a_batch_is_the_same_however_it_is_decoded(
    slow: bool, threads: int, processes: int
) -> None:
    with Decoder(NamedSpec(slow), threads, processes) as decoder:
        for values in (VALUES, VALUES[:5], [], VALUES * 2):
            rows, reasons = decoder.decode(values)
            wanted = torch.tensor(values).clamp(min=0)
            assert reasons == {n: "-1 is negative" for n, value in enumerate(values) if value < 0}
            assert not isinstance(rows, torch.Tensor)
            assert [(name, list(part.shape[1:]), part.dtype) for name, part in rows.items()] == [
                ("bytes", [3], torch.uint8),
                ("wide", [2, 5], torch.float64),
                ("one", [], torch.int16),
            ]
            for part in rows.values():
                flat = part.reshape(len(values), math.prod(part.shape[1:])).long()
                assert torch.equal(flat, wanted[:, None].expand_as(flat))


def test_arrays_of_shared_memory_do_not_overlap() -> None:
    layout = NamedSpec().layout
    for rows in (0, 1, 7, 64):
        size = memory_size(layout, rows)
        memory = bytearray(max(size, 1))
        arrays = mapped_arrays(layout, rows, memory)
        assert not isinstance(arrays, np.ndarray)
        for number, array in enumerate(arrays.values()):
            array[...] = number + 1
        for number, array in enumerate(arrays.values()):
            assert (array == number + 1).all()
            assert array.ctypes.data % array.itemsize == 0
        assert size >= sum(array.nbytes for array in arrays.values())
    assert memory_size(ArrayLayout((3,), np.dtype("float32")), 5) == 60


def test_what_does_not_fit_is_refused_by_name() -> None:
    spec = NamedSpec()
    out = mapped_arrays(spec.layout, 4, bytearray(memory_size(spec.layout, 4)))
    check_rows(spec.layout, 4, out)
    with pytest.raises(ValueError, match="4 rows of 3 of 'bytes' do not fit into 2x3"):
        spec.decode_into([1] * 4, slice_rows(out, slice(0, 2)))
    assert spec.decode(7)["wide"].tolist() == [[7.0] * 5] * 2
    with pytest.raises(ValueError, match="-3 is negative"):
        spec.decode(-3)
