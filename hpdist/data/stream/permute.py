"""Shuffling by arithmetic: where a row goes is computed, not stored.

A permutation of any size costs no memory and no time to set up, and its values never change with
the version of a library, so that a run can be resumed years later.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Int64Array: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_UInt64Array: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
Keys: TypeAlias = _UInt64Array
"""What `keys_of` makes of keys."""

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15


def permuted(places: Int64Array, size: int, *key: int) -> Int64Array:
    """Where the permutation of 0..size chosen by `key` takes each of `places`, [n] -> [n].

    A Feistel network over the smallest power of two that holds `size`; what leaves the range goes
    through it again until it is back (Black and Rogaway 2002, section 3, cycle walking).
    """
    bits = max(2, (size - 1).bit_length())
    low = np.uint64(bits // 2)
    low_mask, high_mask = ((np.uint64(1) << width) - np.uint64(1) for width in (low, bits - low))
    keys = _round_keys(key)
    result = _network(places.astype(np.uint64), low, low_mask, high_mask, keys)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _network(result[outside], low, low_mask, high_mask, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def permutation(size: int, *key: int) -> Int64Array:
    """The whole permutation, [size]; `permuted` of all places, with fewer calls of NumPy.

    A round only mixes one half of a place, of which there are few: each is mixed once, for all
    rounds together, and leaving the range is looked up.
    """
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    halves = np.arange(1 << (bits - low), dtype=np.uint64)
    masks = [(1 << (bits - low)) - 1, (1 << low) - 1] * (_ROUNDS // 2)
    mixed = _mixed(halves + _round_keys(key)[:, None])  # [rounds, halves]
    mixed &= np.array(masks, np.uint64)[:, None]
    places = np.arange(1 << bits)
    right, left = places & ((1 << low) - 1), places >> low
    for number, table in enumerate(mixed.astype(np.int64)):
        if number % 2:
            right ^= table[left]
        else:
            left ^= table[right]
    network = (left << low) | right
    result = network[:size].copy()
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = network[result[outside]]
        outside = outside[result[outside] >= size]
    return result


def shuffled(size: int, *key: int) -> Int64Array:
    """A permutation of 0..size chosen by `key`, [size], several times faster than `permutation`.

    The places sorted by their SplitMix64 numbers, of which no two are the same, so that every way
    of sorting gives the same order.
    """
    numbers = np.arange(size, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(_state(key))
    return np.argsort(_mixed(numbers))


def chosen(size: int, keys: Keys) -> Int64Array:
    """A number below `size` that each of many keys chooses, [keys]."""
    return (_mixed(keys) % np.uint64(size)).astype(np.int64)


def all_shuffled(sizes: Int64Array, keys: Keys) -> Int64Array:
    """The permutations of 0..size that many keys choose, laid end to end; each is as `shuffled`."""
    before = np.cumsum(sizes) - sizes
    owner = np.repeat(np.arange(len(sizes)), sizes)
    places = np.arange(len(owner)) - before[owner]
    numbers = _mixed(places.astype(np.uint64) * np.uint64(_GOLDEN) + keys[owner])
    return places[np.lexsort((numbers, owner))]


def keys_of(key: tuple[int, ...], *parts: Int64Array) -> Keys:
    """What stands for each of many keys that begin with the same numbers, of parts [keys]."""
    state: Any = np.uint64(_state(key))
    for part in parts:
        state = _mixed((part.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + state)
    return np.atleast_1d(state)


def _network(
    values: _UInt64Array,
    low: np.uint64,
    low_mask: np.uint64,
    high_mask: np.uint64,
    keys: _UInt64Array,
) -> _UInt64Array:
    right, left = values & low_mask, values >> low
    for number, key in enumerate(keys):
        if number % 2:
            right = right ^ (_mixed(left + key) & low_mask)
        else:
            left = left ^ (_mixed(right + key) & high_mask)
    return (left << low) | right


def _mixed(values: _UInt64Array) -> _UInt64Array:
    """SplitMix64's finaliser: every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(key: tuple[int, ...]) -> _UInt64Array:
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mixed(np.uint64(_state(key)) + steps)


def _state(key: tuple[int, ...]) -> int:
    """All numbers of a key in one."""
    state = 0
    for part in key:
        state = _mixed_int((state + (part + 1) * _GOLDEN) % 2**64)
    return state


def _mixed_int(value: int) -> int:
    """`_mixed` of one number, for which arrays are slow."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)
