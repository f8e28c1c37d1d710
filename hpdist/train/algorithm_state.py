"""An algorithm's state, assembled from all ranks, for a training loop of one's own.

state = hpdist.whole_state(step.algorithm)     # every rank
step.algorithm.load_state_dict(state)          # every rank, any number of them
"""

from __future__ import annotations

from torch import Tensor

from hpdist.algorithms.base import Algorithm
from hpdist.algorithms.protocol import join_shards
from hpdist.distributed.collectives import gathered


def whole_state(algorithm: Algorithm) -> dict[str, Tensor]:
    """Return the state with all shards, equal on every rank, on the CPU.

    Collective: every rank must call, between two steps.
    """
    state = {name: value.cpu() for name, value in algorithm.state_dict().items()}
    own = {
        name: [(start, part.cpu()) for start, part in parts]
        for name, parts in algorithm.shards().items()
    }
    return join_shards(state, gathered(own))
