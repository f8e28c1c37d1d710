"""The units of FSDP2: the parts of a model whose weights are gathered and released together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from hpdist.distributed.module_names import shortened
from hpdist.errors import ConfigError

MIN_PARAMETERS = 100_000
"""Parameters below which a part of a model is gathered with what is around it."""
_CONTAINERS = (nn.Sequential, nn.ModuleList)


def find_units(
    model: nn.Module, names: Sequence[str] | None = None, min_parameters: int = MIN_PARAMETERS
) -> list[nn.Module]:
    """Return the modules to shard one by one, inner ones first; the rest belongs to the model.

    These are the modules of the classes that are named. By default they are those that a Hugging
    Face model must not split (`_no_split_modules`); else the blocks, which are the members of
    `nn.Sequential` and `nn.ModuleList` that have children with weights; else the model's children.
    By default only those with at least `min_parameters` are units. A module that shares a weight
    with the rest of the model is none, as it could not be gathered by itself.

    Raises ConfigError if no module of the model is of a named class.
    """
    if names is not None:
        chosen = [m for m in model.modules() if type(m).__name__ in names and m is not model]
        found = {type(module).__name__ for module in chosen}
        missing = [name for name in names if name not in found]
        if missing:
            raise ConfigError(
                f"shard.units: {type(model).__name__} has no part of the class "
                f"{shortened(missing)}; it has {shortened(_classes(model), 20)}"
            )
        wanted = _gatherable(model, chosen)
    else:
        unsplit = _no_split_classes(model)
        candidates = [m for m in model.modules() if type(m).__name__ in unsplit]
        candidates = candidates or list(_blocks(model)) or list(model.children())
        wanted = [m for m in _gatherable(model, candidates) if _size(m) >= min_parameters]
    return wanted[::-1]  # `modules` gives a module before those inside it


def _no_split_classes(model: nn.Module) -> set[str]:
    """The names of the classes that a Hugging Face model keeps whole."""
    found: set[str] = set()
    for module in model.modules():
        found |= set(getattr(module, "_no_split_modules", None) or ())
    return found


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks that contain no sequence of blocks themselves."""
    for child in module.children():
        if not isinstance(child, _CONTAINERS):
            yield from _blocks(child)
            continue
        for member in child.children():
            inner = list(_blocks(member))
            if inner:
                yield from inner
            elif any(True for child in member.children() for _ in child.parameters()):
                yield member  # not, say, a normalisation with its activation inside


def _gatherable(model: nn.Module, modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that have weights, can be called, and share no weight with a module outside."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found = []
    for module in modules:
        own: dict[int, int] = {}
        for _, parameter in module.named_parameters(remove_duplicate=False):
            own[id(parameter)] = own.get(id(parameter), 0) + 1
        callable_ = not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if own and callable_ and all(uses[key] == count for key, count in own.items()):
            found.append(module)
    return found


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _classes(model: nn.Module) -> list[str]:
    return sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.children())})
