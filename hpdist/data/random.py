"""Counter-based random numbers: a draw is a pure function of what it is for, with no hidden state.

`uniform(seed, stream, step, positions, count)` gives each row of the global batch its own numbers.
A row's numbers depend on (seed, stream, step, position) alone, never on the batch it shares or the
rank that computes it: nothing has to be saved to resume, nothing changes with the world size.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

import math
import random
import zlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MASK = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words: TypeAlias = "npt.NDArray[np.uint64]"
Counter: TypeAlias = "tuple[Words, Words, Words, Words]"


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Make four random words of every counter: Philox4x32-10.

    Computed by NumPy: a draw is more than a hundred operations on few numbers, which take several
    times as long when torch dispatches each.

    Args:
        counter: four uint64 arrays that broadcast together, values in [0, 2**32).
        key: two words, each in [0, 2**32).

    Returns:
        Four uint64 arrays of the broadcast shape, values in [0, 2**32).

    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(x0, _MULTIPLIERS[0])
        high1, low1 = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ np.uint64(k0), low1, high0 ^ x3 ^ np.uint64(k1), low0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK
    return x0, x1, x2, x3


def _multiply(word: Words, factor: int) -> tuple[Words, Words]:
    """Return the high and the low 32 bits of a 32 x 32 bit product."""
    product = word * np.uint64(factor)
    return product >> np.uint64(32), product & np.uint64(_MASK)


def stream_id(*names: str) -> int:
    """Turn names, such as ("unlabeled", "strong", "0"), into a stable 32-bit id.

    Two purposes with different names draw from different streams and never share noise.
    """
    return zlib.crc32("\0".join(names).encode())


def words(seed: int, stream: int, step: int, positions: Tensor, count: int) -> Tensor:
    """Draw random 32-bit words, `count` for each row.

    The key is the seed; the counter is (block of four words, stream, step, position).

    Args:
        seed: the run's seed, in [0, 2**64).
        stream: what the numbers are for, in [0, 2**32); see `stream_id`.
        step: the optimizer step, in [0, 2**32).
        positions: int64 [B] on the CPU, each row's position in the global batch, in [0, 2**32).
        count: words per row.

    Returns:
        int64 [B, count] on the CPU, values in [0, 2**32).

    Raises:
        ValueError: something is out of range, or does not lie on the CPU.

    """
    for name, value, bits in (("seed", seed, 64), ("stream", stream, 32), ("step", step, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} must be in [0, 2**{bits}), not {value}")
    places = _checked(positions)[:, None]
    blocks = np.arange(-(-count // 4), dtype=np.uint64)[None]  # [1, N], four words in each
    counter = (blocks, np.full((1, 1), stream, np.uint64), np.full((1, 1), step, np.uint64), places)
    drawn = np.empty((len(positions), blocks.size, 4), np.int64)
    for number, word in enumerate(philox(counter, (seed & _MASK, seed >> 32))):
        drawn[..., number] = word
    return torch.from_numpy(drawn.reshape(len(positions), 4 * blocks.size)[:, :count])


def _checked(positions: Tensor) -> Words:
    """Give positions as words. Raises ValueError."""
    if positions.dtype != torch.int64 or positions.dim() != 1 or positions.device.type != "cpu":
        raise ValueError(
            "positions must be int64 [B] on the CPU, not "
            f"{positions.dtype} {list(positions.shape)} on {positions.device}"
        )
    places: npt.NDArray[np.int64] = positions.numpy()
    if places.size and not 0 <= places.min() <= places.max() <= _MASK:
        raise ValueError(f"positions must be in [0, 2**32), not {places.min()} to {places.max()}")
    return places.astype(np.uint64)


def uniform(seed: int, stream: int, step: int, positions: Tensor, count: int) -> Tensor:
    """Draw uniform numbers in [0, 1), multiples of 2**-24: float32 [B, count].

    The arguments are those of `words`.
    """
    return (words(seed, stream, step, positions, count) >> 8).to(torch.float32) * 2**-24


def integers(seed: int, stream: int, step: int, positions: Tensor, count: int, high: int) -> Tensor:
    """Draw uniform integers in [0, high): int64 [B, count]; `high` is at most 2**31.

    The other arguments are those of `words`. No value is likelier than another by more than
    one part in 2**32 / high.
    """
    if not 0 < high <= 2**31:
        raise ValueError(f"high must be in (0, 2**31], not {high}")
    return (words(seed, stream, step, positions, count) * high) >> 32


def normal(seed: int, stream: int, step: int, positions: Tensor, count: int) -> Tensor:
    """Draw standard normal numbers: float32 [B, count], at most 6.7 in size.

    The arguments are those of `words`. Box and Muller's transform, in float64: the last bit of log
    and cos may differ with a tensor's length, and then does not show in float32.
    """
    pairs = words(seed, stream, step, positions, count + count % 2).to(torch.float64) * 2**-32
    first, second = pairs[:, 0::2], pairs[:, 1::2]  # in [0, 1)
    radius = torch.sqrt(-2 * torch.log1p(-first))  # 1 - first lies in (0, 1]: the log is finite
    angle = 2 * math.pi * second
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return both.flatten(1)[:, :count].to(torch.float32)


def mixed_seed(*numbers: int) -> int:
    """A seed from several numbers: multiplicative hashing, folded."""
    value = 0
    for number in numbers:
        value = ((value ^ number) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**64
        value ^= value >> 29
    return value % 2**63


def reseed(*numbers: int) -> None:
    """Seed torch's, Python's and NumPy's generators: dropout, and whatever else a model draws."""
    seed = mixed_seed(*numbers)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
