"""Models that come in half precision: they train in fp32 weights, whatever they compute in."""

from __future__ import annotations

from torch import nn

from hpdist.models.stored import HALF


def to_full_precision(model: nn.Module) -> str | None:
    """Convert a model's half-precision weights and buffers to fp32, in place; return a message.

    An update of a weight is often smaller than half precision can resolve, so the optimizer needs
    fp32. Weights that `weights_as_stored` has marked are left to their engine.
    """
    tensors = [*model.parameters(), *model.buffers()]
    halves = [t for t in tensors if t.dtype in HALF and not getattr(t, "as_stored", False)]
    if not halves:
        return None
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in halves})
    for tensor in halves:
        tensor.data = tensor.data.float()
    return (
        f"note: {len(halves)} of the model's {len(tensors)} weights and buffers came in "
        f"{' and '.join(kinds)}; they train in fp32, and computations use the precision setting"
    )
