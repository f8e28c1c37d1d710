"""An optimizer's state as engines and checkpoints exchange it.

Some of it is per element, such as momentum, and split into fragments like the weights. Some is one
number per parameter, such as Adam's step: nearly always the same for all of them. A parameter
that no step has reached has neither, and gets neither when the run resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hpdist.distributed.fragments import Elements, Fragment, Partition

if TYPE_CHECKING:
    from hpdist.checkpoint.reader import SavedRun

States = Iterable[tuple[Tensor, Mapping[str, Any]]]
"""The tensors that the optimizer steps, each with its state."""
_STEP = "step"
"""The key under which torch's optimizers count a parameter's steps; for a parameter without
dimensions it looks like its momentum."""
_KIND = "optimizer."
"""The prefix of the optimizer's kinds of fragments in a checkpoint."""


@dataclass(frozen=True)
class SavedOptimizer:
    """A state to load.

    `read` returns the elements of a key at a fragment's place; without it all are zero.
    """

    keys: Collection[str]
    """The names of the state per element."""
    scalars: Mapping[str, float]
    """The state that is one number, by its name."""
    by_parameter: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """That state by its name and the parameter's, for parameters with another number."""
    holds: Callable[[str, str], bool] = lambda key, name: False
    """Whether a key was saved for a parameter at all."""
    elements: Callable[[str, Fragment], Tensor] | None = None

    def read(self, key: str, like: Fragment) -> Tensor:
        """The elements of a key at a fragment's place; zeros if none were saved."""
        if self.elements is None or not self.holds(key, like.name):
            return torch.zeros_like(like.values)
        return self.elements(key, like)

    def numbers_of(self, name: str) -> dict[str, float]:
        """The state of a parameter that is one number."""
        own = {key: values[name] for key, values in self.by_parameter.items() if name in values}
        return {**self.scalars, **own}


def saved_optimizer(saved: SavedRun, used: Collection[str]) -> SavedOptimizer:
    """The state in a checkpoint, as far as the optimizer uses it (`used`)."""
    keys = _element_keys(saved)
    scalars = {k: v for k, v in saved.facts["optimizer"].items() if k not in keys}
    if "exp_avg" in keys:
        # An earlier version left it out if no step had reached the first parameter.
        scalars.setdefault(_STEP, saved.facts["step"])
    return SavedOptimizer(
        sorted(keys & set(used)),
        scalars,
        saved.facts.get("optimizer_apart", {}),
        lambda key, name: saved.holds(_KIND + key, name),
        lambda key, like: saved.read(_KIND + key, like),
    )


def optimizer_of(saved: SavedRun, if_unknown: str) -> str:
    """The name of the optimizer that wrote a checkpoint without that name."""
    keys = _element_keys(saved)
    if "momentum_buffer" in keys:
        return "sgd"
    if "exp_avg" in keys:
        return if_unknown if if_unknown in ("adam", "adamw") else "adam or adamw"
    return if_unknown


def _element_keys(saved: SavedRun) -> set[str]:
    keys = {kind.removeprefix(_KIND) for kind in saved.kinds() if kind.startswith(_KIND)}
    return keys - {_STEP}  # an earlier version wrote it for parameters without dimensions


def scalar_keys(states: States) -> set[str]:
    """The names of the state that is one number for a parameter."""
    found = {_STEP}
    for tensor, state in states:
        for key, value in state.items():
            is_number = isinstance(value, (int, float))
            if is_number or (isinstance(value, Tensor) and value.dim() == 0 < tensor.dim()):
                found.add(key)
    return found


def scalars_of(states: States) -> dict[str, float]:
    """The state that is one number: the largest of all, as some may have had fewer steps."""
    states = list(states)
    found: dict[str, float] = {}
    for key in sorted(scalar_keys(states)):
        values = [float(state[key]) for _, state in states if state.get(key) is not None]
        if values:
            found[key] = max(values)
    return found


def scalars_by_parameter(
    names: Iterable[str], states: Collection[tuple[Tensor, Mapping[str, Any]]]
) -> dict[str, dict[str, float]]:
    """The numbers, by their name and the parameter's, for which `scalars_of` is not right."""
    common, found = scalars_of(states), dict[str, dict[str, float]]()
    for name, (_, state) in zip(names, states, strict=True):
        for key, value in common.items():
            if state.get(key) is not None and float(state[key]) != value:
                found.setdefault(key, {})[name] = float(state[key])
    return found


def make_state(
    tensor: Tensor,
    state: MutableMapping[str, Any],
    keys: Iterable[str],
    numbers: Mapping[str, float],
) -> None:
    """Create the state that a tensor has after the first step; existing elements stay."""
    for key in keys:
        if state.get(key) is None:
            state[key] = torch.zeros_like(tensor, requires_grad=False)
    state.update({key: torch.tensor(value) for key, value in numbers.items()})


class WholeState:
    """The optimizer's state of tensors that are whole on every rank; each owns an equal share.

    Args:
        tensors: The tensors that the optimizer steps, by name.
        optimizer: Has `state` by tensor, then by name.
        rank: This rank.
        ranks: The number of ranks.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], optimizer: Any, rank: int, ranks: int
    ) -> None:
        self._tensors = tensors
        self._optimizer = optimizer
        self._partition = Partition(tensors, rank, ranks)

    def master_parts(self) -> list[Tensor]:
        """Views of this rank's share of the tensors, one by one."""
        return [fragment.values for fragment in self._partition.cut(self._tensors)]

    def fragments_of(self, parts: Sequence[Tensor]) -> list[Fragment]:
        """The parts, named."""
        return self._partition.named(parts)

    def states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Every tensor with its state."""
        state = self._optimizer.state
        return [(tensor, state[tensor]) for tensor in self._tensors.values()]

    def fragments(self) -> dict[str, list[Fragment]]:
        """Views of this rank's share of the state per element, by its name."""
        return {key: self._partition.cut(found) for key, found in self._elements().items()}

    def by_parameter(self) -> dict[str, dict[str, float]]:
        """The numbers of parameters for which `scalars_of` is not right."""
        return scalars_by_parameter(self._tensors, self.states())

    @torch.no_grad()
    def load(self, saved: SavedOptimizer) -> None:
        """Load a state; a parameter without saved state gets none. Collective."""
        found: dict[str, dict[str, Tensor]] = {key: {} for key in saved.keys}
        for name, (tensor, state) in zip(self._tensors, self.states(), strict=True):
            held = [key for key in saved.keys if saved.holds(key, name)]
            if saved.keys and not held:
                state.clear()
                continue
            make_state(tensor, state, held, saved.numbers_of(name))
            for key in held:
                found[key][name] = state[key]
        for key, tensors in found.items():
            self._partition.fill(tensors, partial(saved.read, key))

    @torch.no_grad()
    def load_tensors(self, saved: Elements) -> None:
        """Load the tensors. Collective."""

        def read(place: Fragment) -> Tensor:
            return saved.read(place.name, place.start, place.start + len(place.values))

        self._partition.fill(self._tensors, read)

    def _elements(self) -> dict[str, dict[str, Tensor]]:
        numbers = scalar_keys(self.states())
        found: dict[str, dict[str, Tensor]] = {}
        for name, (tensor, state) in zip(self._tensors, self.states(), strict=True):
            for key, value in state.items():
                own = isinstance(value, Tensor) and value.shape == tensor.shape
                if own and key not in numbers:
                    found.setdefault(key, {})[name] = value
        return found


class HasWholeState:
    """The methods of an engine whose weights and state are whole on every rank."""

    _whole: WholeState

    def master_parts(self) -> list[Tensor]:
        """Views of this rank's 1/N of the fp32 weights, one by one."""
        return self._whole.master_parts()

    def fragments_of(self, parts: Sequence[Tensor]) -> list[Fragment]:
        """The parts, named."""
        return self._whole.fragments_of(parts)

    def optimizer_fragments(self) -> dict[str, list[Fragment]]:
        """Views of this rank's 1/N of every state tensor per element."""
        return self._whole.fragments()

    def optimizer_scalars_by_parameter(self) -> dict[str, dict[str, float]]:
        """The numbers of parameters that some steps left out."""
        return self._whole.by_parameter()

    def load_optimizer(self, saved: SavedOptimizer) -> None:
        """Load the whole state, of which every rank reads its share. Collective."""
        self._whole.load(saved)

    def flat_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Every weight that the optimizer steps, with its state."""
        return self._whole.states()
