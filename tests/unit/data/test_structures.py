"""Structures: plain tensors and named ones go the same ways, row by row."""

import numpy as np
import pytest
import torch

from hpdist.data import structures


def named(rows: int) -> dict[str, torch.Tensor]:
    return {"image": torch.arange(rows * 6.0).view(rows, 2, 3), "text": torch.arange(rows)}


def test_split_undoes_cat_and_narrow_index_agree_with_it() -> None:
    parts = [named(2), named(3), named(1)]
    whole = structures.cat(parts)
    assert structures.row_count(whole) == 6
    for part, again in zip(parts, structures.split(whole, [2, 3, 1]), strict=True):
        assert part.keys() == again.keys()
        assert all(torch.equal(part[name], again[name]) for name in part)
    middle = structures.narrow(whole, 2, 3)
    taken = structures.index(whole, torch.tensor([2, 3, 4]))
    masked = structures.index(whole, torch.tensor([False, False, True, True, True, False]))
    for name, tensor in parts[1].items():
        assert torch.equal(middle[name], tensor)
        assert torch.equal(taken[name], tensor)
        assert torch.equal(masked[name], tensor)


def test_a_plain_tensor_is_a_structure() -> None:
    rows = torch.arange(12.0).view(4, 3)
    assert torch.equal(structures.cat(structures.split(rows, [1, 3])), rows)
    assert torch.equal(structures.narrow(rows, 1, 2), rows[1:3])
    assert torch.equal(structures.index(rows, torch.tensor([3, 0])), rows[[3, 0]])
    assert structures.row_count(rows) == 4
    assert structures.to(rows, "cpu") is rows


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"as many rows each: a \[2\], b \[3\]"):
        structures.row_count({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="same names"):
        structures.cat([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}])
    with pytest.raises(ValueError, match="cannot be concatenated"):
        structures.cat([torch.zeros(2), {"b": torch.zeros(2)}])


def test_the_mark_of_what_is_not_finite() -> None:
    whole = named(3)
    assert structures.finite_mark(whole) == 0
    whole["image"][1, 0, 0] = float("inf")
    assert structures.finite_mark(whole).isnan()
    assert structures.finite_mark(torch.zeros(2, dtype=torch.int64)) == 0


def test_gradients_go_through_and_stop_at_detach() -> None:
    whole = {"a": torch.ones(3, 2, requires_grad=True)}
    first, _ = structures.split(whole, [1, 2])
    first["a"].sum().backward()
    assert whole["a"].grad is not None
    assert whole["a"].grad.sum() == 2
    assert not structures.detach(whole)["a"].requires_grad


def test_arrays_by_name_are_taken_by_row_and_become_tensors() -> None:
    arrays = {"rank": np.arange(4), "steps": np.arange(8.0).reshape(4, 2)}
    taken = structures.take_rows(arrays, np.array([3, 0]))
    assert taken["rank"].tolist() == [3, 0]
    assert taken["steps"].tolist() == [[6, 7], [0, 1]]
    tensors = structures.from_arrays({"turned": np.arange(6).reshape(2, 3).T})
    assert tensors["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert structures.from_arrays(structures.take_rows(np.arange(3), np.array([2]))).tolist() == [2]
