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

import numpy as np
import torch
from torch import Tensor

_MASK = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Make four random words of every counter: Philox4x32-10.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2**32).
        key: two words, each in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).

    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(x0, _MULTIPLIERS[0])
        high1, low1 = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK
    return x0, x1, x2, x3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low 32 bits of a 32 x 32 bit product."""
    product = word * factor  # wraps around in int64: all 64 bits are right, only the sign is not
    return (product >> 32) & _MASK, product & _MASK


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
        positions: int64 [B], each row's position in the global batch, in [0, 2**32); checked when
            it lies on the CPU, for a check elsewhere would wait for the device.
        count: words per row.

    Returns:
        int64 [B, count] on the device of `positions`, values in [0, 2**32).

    Raises:
        ValueError: something is out of range.

    """
    for name, value, bits in (("seed", seed, 64), ("stream", stream, 32), ("step", step, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} must be in [0, 2**{bits}), not {value}")
    _check_positions(positions)
    blocks = torch.arange(-(-count // 4), device=positions.device)  # [N], four words in each
    counter = (blocks, blocks.new_full((), stream), blocks.new_full((), step), positions[:, None])
    x0, x1, x2, x3 = philox(counter, (seed & _MASK, seed >> 32))  # each [B, N]
    return torch.stack((x0, x1, x2, x3), dim=-1).flatten(1)[:, :count]


def _check_positions(positions: Tensor) -> None:
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(
            f"positions must be int64 [B], not {positions.dtype} {list(positions.shape)}"
        )
    if positions.device.type == "cpu" and positions.numel():
        low, high = (int(bound) for bound in positions.aminmax())
        if low < 0 or high > _MASK:
            raise ValueError(f"positions must be in [0, 2**32), not {low} to {high}")


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
