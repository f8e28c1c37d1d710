"""Returns any model's logits, or all of its outputs by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpdist.data.structures import Structure, as_dtype, tensors_of
from hpdist.distributed.batch_norm import batch_norms
from hpdist.distributed.normalisation.running import RunningStatistics
from hpdist.errors import ConfigError
from hpdist.models.stored import FullPrecisionReads

LOGITS = ("logits",)
"""The names of a model's outputs if only its logits matter."""

NO_GRADIENT = (
    "model: its outputs have no gradient, so it cannot be trained; look for forward() under "
    "torch.no_grad() or inference_mode(), for a detach(), or for trained layers that it leaves out"
)


def find_logits(output: Any) -> Any:
    """Find the logits in any output of a model.

    This is the output itself; its `.logits` or, in a dict, its `"logits"`; in a tuple without
    names, as `return_dict=False` gives it, the first.
    """
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return output[0] if isinstance(output, (tuple, list)) and output else output


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output (`find_logits` says which), fp32.

    Raises ConfigError if there are none.
    """
    logits = find_logits(output)
    if not isinstance(logits, Tensor):
        raise _missing(LOGITS, named_outputs(output))
    return logits.float()


def named_outputs(output: Any) -> dict[str, Tensor]:
    """Every tensor that a model returns, by name.

    A single tensor is named `logits`; in a tuple without names the first is, and the others are
    `output_1`, `output_2` and so on. What is not a tensor, such as a cache, is left out.
    """
    if isinstance(output, Tensor):
        return {"logits": output}
    named: Mapping[Any, Any]
    if isinstance(output, Mapping):
        named = output
    elif hasattr(output, "_asdict"):
        named = output._asdict()
    elif isinstance(output, (tuple, list)):
        named = {f"output_{n}" if n else "logits": value for n, value in enumerate(output)}
    else:
        named = getattr(output, "__dict__", {})
    found = {str(name): value for name, value in named.items() if isinstance(value, Tensor)}
    logits = getattr(output, "logits", None)  # it may be a property
    return {"logits": logits} | found if isinstance(logits, Tensor) else found


def outputs_of(output: Any, names: Sequence[str] = LOGITS) -> Structure:
    """Return a model's outputs by name, in fp32 if they are floating-point.

    If only the logits are requested they are a plain tensor, else the result is tensors by name.
    Raises ConfigError if one is missing.
    """
    if tuple(names) == LOGITS:
        return logits_of(output)
    found = named_outputs(output)
    if any(name not in found for name in names):
        raise _missing(names, found)
    return as_dtype({name: found[name] for name in names}, torch.float32)


def _missing(names: Sequence[str], found: Mapping[str, Tensor]) -> ConfigError:
    missing = ", ".join(name for name in names if name not in found)
    return ConfigError(
        f"model: its outputs lack {missing}, which the task or the algorithm needs; it returns "
        f"{', '.join(found) or 'no tensor'}: return them by name, in a dict or a dataclass"
    )


@contextmanager
def on_trial(model: nn.Module, *, gradient: bool = False) -> Iterator[None]:
    """Inside, the model is in evaluation mode, without gradient unless requested.

    It may have `weights_as_stored`, which have none in any case.
    """
    training = model.training
    model.eval()
    try:
        with torch.set_grad_enabled(gradient), FullPrecisionReads():
            yield
    finally:
        model.train(training)


def has_gradient_in_training(
    model: nn.Module, example: Structure, names: Sequence[str] = LOGITS
) -> bool:
    """Whether the model's outputs for an example in training, under these names, can train it.

    The model is unchanged afterwards, including its running statistics and torch's generators.
    Collective if it has batch normalisation.
    """
    training = model.training
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        unrecorded = RunningStatistics(batch_norms(model)).paused()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), unrecorded:
            outputs = outputs_of(model.train()(example), names)
            return any(tensor.requires_grad for tensor in tensors_of(outputs))
    finally:
        model.train(training)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
