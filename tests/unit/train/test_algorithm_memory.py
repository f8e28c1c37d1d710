"""An algorithm that cannot fit is refused with its size, and a large one is said."""

from __future__ import annotations

import psutil
import pytest
import torch

from hpdist.algorithms import (
    DARP,
    Algorithm,
    CoMatch,
    CReST,
    FixMatch,
    NoisyStudent,
    SimMatch,
    TemporalEnsembling,
)
from hpdist.errors import ConfigError
from hpdist.train.algorithm_memory import check_memory, describe_sums
from hpdist.train.config import Batch

CPU, BATCH = torch.device("cpu"), Batch(labeled=64, unlabeled=448)


def check(algorithm: Algorithm, ranks: int = 1, rows: int | None = 10**11) -> list[str]:
    algorithm.rows = rows
    algorithm.bind_rank(0, ranks)
    return check_memory(algorithm, CPU, BATCH)


def test_tables_that_cannot_fit_are_refused_with_their_size() -> None:
    """A hundred billion rows of a thousand classes."""
    with pytest.raises(ConfigError, match=r"372,90\d\.\d GiB on each rank.*algorithm\.top: 16"):
        check(TemporalEnsembling(1_000))
    with pytest.raises(ConfigError, match=r"186,26\d\.\d GiB on each rank, and there are"):
        check(NoisyStudent(1_000))
    refused = r"745,05\d\.\d GiB on each rank.* addons: darp\.top: 16, .*more ranks"
    with pytest.raises(ConfigError, match=refused):
        check(DARP(FixMatch(0.9), 1_000))
    assert check(DARP(FixMatch(0.9), 1_000, top=16), ranks=100_000) == []
    with pytest.raises(ConfigError, match=r"use more ranks, each of which holds its share"):
        check(CReST(FixMatch(0.9), 1_000))
    assert check(CReST(FixMatch(0.9), 1_000), ranks=100_000) == []
    assert check(TemporalEnsembling(1_000, top=16), ranks=100_000) == []
    assert check(TemporalEnsembling(1_000), rows=None) == []
    assert check(FixMatch(0.9)) == []


def test_sums_that_grow_with_rows_and_classes_are_said() -> None:
    """At 21,000 classes, from 16 MiB on, and where there is a rank to send them to."""

    def said(algorithm: Algorithm, ranks: int) -> list[str]:
        algorithm.bind_rank(0, ranks)
        return describe_sums(algorithm, BATCH, ranks)

    (line,) = said(CoMatch(21_000), 2)
    assert line.startswith("CoMatch sums 36 MiB over the ranks in every step: ")
    assert line.endswith("for 448 unlabelled rows")
    assert "DARP sums 108 MiB" in said(DARP(CoMatch(21_000), 21_000), 2)[0]
    assert "TemporalEnsembling sums 36 MiB" in said(TemporalEnsembling(21_000, top=16), 2)[0]
    assert said(CoMatch(21_000), 1) == []
    assert said(CoMatch(1_000), 2) == said(SimMatch(21_000), 2) == []


def test_what_is_held_of_a_large_batch_is_said_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 21,000 classes; SimMatch holds nothing that grows with the global batch."""
    assert check(CoMatch(10)) == []
    (line,) = check(CoMatch(21_000, bank=10_000))
    assert line.startswith("CoMatch holds about 1.")
    assert check(SimMatch(21_000)) == []
    total = psutil.virtual_memory().total
    large = Batch(labeled=64, unlabeled=total // (4 * 21_000))
    with pytest.raises(ConfigError, match=r"rows of every class, .*a smaller batch\.unlabeled"):
        check_memory(CoMatch(21_000), CPU, large)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100000")
    with pytest.raises(ConfigError, match=r"GiB of the global batch"):
        check(CoMatch(21_000))
