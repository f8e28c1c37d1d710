"""ZeRO 1 and 2 when the ranks' losses do not reach the same parameters.

DeepSpeed concatenates a rank's gradients and sums the results over ranks. If one rank has a
gradient that another lacks, elements of different parameters are added, or a rank waits for data
that never comes. Stage 1 sums when the backward is over, and is given zeros for missing
gradients; stage 2 sums during the backward, in its order, so the difference can only be detected,
which the first step does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hpdist.distributed.collectives import all_reduce_max, gathered
from hpdist.distributed.module_names import shortened
from hpdist.errors import ConfigError


def reduce_same_parameters(wrapped: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Have all ranks reduce the same parameters, or raise on all in the first step.

    Args:
        wrapped: DeepSpeed's optimizer of stage 1 or 2.
        parameters: The trained parameters, by name.
    """
    if wrapped.partition_gradients or wrapped.overlap_comm:
        _check_first(wrapped, {wrapped.get_param_id(p): name for name, p in parameters.items()})
    else:
        _fill_missing(wrapped)


def _fill_missing(wrapped: Any) -> None:
    reduce = wrapped.reduce_gradients

    def completed(**kwargs: Any) -> None:
        for group in wrapped.bit16_groups:
            for parameter in group:
                if wrapped.get_gradient_for_reduction(parameter) is None:
                    _set_zero(wrapped, parameter)
        reduce(**kwargs)

    wrapped.reduce_gradients = completed


def _set_zero(wrapped: Any, parameter: Any) -> None:
    if wrapped.use_grad_accum_attribute:
        dtype = wrapped.gradient_accumulation_dtype
        parameter.grad_accum = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    else:
        parameter.grad = torch.zeros_like(parameter, requires_grad=False)


def _check_first(wrapped: Any, names: Mapping[int, str]) -> None:
    """Compare the contents of the ranks' buckets before reduction, in the first backward."""
    reduce, end = wrapped.reduce_ipg_grads, wrapped.overlapping_partition_gradients_reduce_epilogue

    def compared(comm_dtype: torch.dtype | None = None) -> None:
        laid = [names[i] for bucket in wrapped.ipg_buckets.values() for *_, i in bucket.params]
        if _differs(laid):
            _compare(gathered(laid))
        reduce(comm_dtype=comm_dtype)

    def ended() -> None:
        end()
        del wrapped.reduce_ipg_grads, wrapped.overlapping_partition_gradients_reduce_epilogue

    wrapped.reduce_ipg_grads = compared
    wrapped.overlapping_partition_gradients_reduce_epilogue = ended


def _differs(laid: Sequence[str]) -> bool:
    """Whether the buckets of any two ranks differ. Collective: every rank must call."""
    digest = hashlib.sha256(json.dumps(laid).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    return all_reduce_max(number) != -all_reduce_max(-number)


def _compare(laid: Sequence[Sequence[str]]) -> None:
    """Raise ConfigError on all ranks if their buckets differ."""
    if all(other == laid[0] for other in laid):
        return
    everywhere = set(laid[0]).intersection(*laid)
    some = sorted({name for names in laid for name in names} - everywhere)
    what = (
        f"the losses of some ranks reach {shortened(some)}, those of others do not"
        if some
        else "the ranks' losses reach the parameters in different orders"
    )
    error = ConfigError(
        f"model: in the first step {what}; ZeRO-2 cannot add up such gradients. Have forward() use "
        "the same layers on every rank, or set zero.stage: 1 (without overlap_comm), or leave it "
        "out: both treat missing gradients as zero"
    )
    error.everywhere = True
    raise error
