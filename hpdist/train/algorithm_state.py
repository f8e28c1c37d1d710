"""An algorithm's state put together from all ranks, for a loop of one's own.

state = hpdist.whole_state(step.algorithm)     # every rank
step.algorithm.load_state_dict(state)          # every rank, of any number
"""

from __future__ import annotations

from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.protocol import join_shards
from hpdist.distributed.collectives import gathered


def whole_state(algorithm: Algorithm) -> dict[str, Tensor]:
    """The state, and whole what each rank holds a part of; alike on every rank, on the CPU.

    Collective: every rank must call, between two steps.
    """
    state = {name: value.cpu() for name, value in algorithm.state_dict().items()}
    own = {
        name: [(start, part.cpu()) for start, part in parts]
        for name, parts in algorithm.shards().items()
    }
    return join_shards(state, gathered(own))
