"""Watches what a rank gives to its process group, and looks for rows in it.

    with Crossing(CNN) as crossing:
        train()
    crossing.found(known)       # known rows, or inputs of the model, that another rank could read

Every collective of torch, those of DDP's reducer and DeepSpeed too, is an operator of `c10d`, which
a dispatch mode sees with its tensors: objects come by as their pickled bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

WIDTH = 8  # bytes of a window of a row that is searched for
_DISTINCT = 5  # different bytes of a window that tells anything
_FORMS = (torch.float32, torch.bfloat16, torch.float16)


def windows(content: bytes) -> set[int]:
    """Give three windows of a row's bytes, as numbers; none of a monotonous part."""
    places = [len(content) * part // 4 // WIDTH * WIDTH for part in (1, 2, 3)]
    parts = [content[place : place + WIDTH] for place in places]
    return {
        int.from_bytes(part, "little")
        for part in parts
        if len(part) == WIDTH and len(set(part)) >= _DISTINCT
    }


def row_windows(rows: Tensor) -> set[int]:
    """Give the windows of rows [rows, *] in every precision and memory order."""
    found: set[int] = set()
    orders = [rows, rows.movedim(1, -1)] if rows.dim() > 2 else [rows]
    for order in orders:
        for form in _FORMS:
            for row in order.to(form).flatten(1).clone().view(torch.uint8):
                found |= windows(row.numpy().tobytes())
    return found


class Crossing(TorchDispatchMode):
    """Keeps the bytes of every tensor that this rank gives to a collective."""

    def __init__(self, model: type[nn.Module]) -> None:
        super().__init__()
        self.given: list[tuple[str, bytes]] = []
        self.seen: set[int] = set()
        """Windows of all inputs of the model."""
        self.inputs = 0
        """Rows that the model was given."""
        self.parameters = 0
        """Numbers in the model's parameters."""
        self.example: Tensor | None = None
        """The latest inputs of the model, fp32."""
        self._model = model

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            for part in _given(func._opname, args):
                if isinstance(part, Tensor):
                    raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    self.given.append((func._opname, raw.numpy().tobytes()))
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Crossing:
        self._hook = register_module_forward_pre_hook(self._see)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def _see(self, module: nn.Module, inputs: Any) -> None:
        if isinstance(module, self._model):
            self.inputs += len(inputs[0])
            rows = inputs[0].detach().float()
            self.example = rows.clone()
            self.parameters = sum(parameter.numel() for parameter in module.parameters())
            self.seen |= row_windows(rows)

    def found(self, known: Iterable[int]) -> list[str]:
        """Name the collectives that were given one of these windows, and show the bytes there."""
        wanted = np.fromiter(known, np.uint64)
        found = []
        for name, raw in self.given:
            places = np.flatnonzero(np.isin(_sliding(raw), wanted)) if len(raw) >= WIDTH else ()
            if len(places):
                there = raw[max(0, places[0] - 64) : places[0] + 64]
                found.append(f"{name} of {len(raw)} bytes at {places[0]}: {there!r}")
        return found

    def sizes(self) -> Counter[str]:
        """Count the bytes that were given to each kind of collective."""
        counts: Counter[str] = Counter()
        for name, raw in self.given:
            counts[name] += len(raw)
        return counts


def _given(name: str, args: tuple[Any, ...]) -> Iterable[Any]:
    """Give what this rank gives to a collective, and not what it will receive.

    A buffer to receive into may hold anything that this process has freed, rows too.
    """
    if name == "broadcast_":
        return tree_iter(args[0]) if args[2] == dist.get_rank() else ()
    if name.startswith("recv"):
        return ()
    second = list(tree_iter(args[1])) if len(args) > 1 else []
    both = bool(second) and all(isinstance(part, Tensor) for part in second)
    return second if both else tree_iter(args[0])


def _sliding(raw: bytes) -> Any:
    """Give the number at every byte of a buffer, uint64."""
    view = np.lib.stride_tricks.sliding_window_view(np.frombuffer(raw, np.uint8), WIDTH)
    return np.ascontiguousarray(view).view(np.uint64)[:, 0]
