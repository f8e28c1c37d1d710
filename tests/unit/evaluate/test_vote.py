"""Private votes: the noise, what it costs by independent computations, and what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from hpdist import cli
from hpdist.data.sources.label_files import METADATA, PRIVACY, RECORD
from hpdist.errors import ConfigError
from hpdist.evaluate.gnmax import Check, answer, cost_of, epsilon_of, noisy_argmax, sigma_for
from hpdist.evaluate.vote import vote
from hpdist.testing.ranks import RankError
from tests.support.ranks import run_ranks

NAMES = ["cat", "dog", "owl"]


def write(folder: Path, labels: list[str | None], first: int = 0, names: Any = NAMES) -> str:
    folder.mkdir(parents=True)
    ids = list(range(first, first + len(labels)))[::-1]  # in any order
    table = pa.table({"id": ids, "label": pa.array(labels[::-1], pa.string())})
    table = table.replace_schema_metadata({METADATA: json.dumps({"names": names})})
    pq.write_table(table, folder / "part-00000000.parquet")
    return str(folder)


@pytest.mark.parametrize("order", [1.5, 2.0, 8.0, 32.0])
def test_an_answers_renyi_divergence(order: float) -> None:
    """D_lambda of the noisy counts of neighbouring votes, by its integral: lambda / sigma^2."""
    sigma = 7.0
    x = np.linspace(-200, 200, 400_001)
    exponent = order * -((x - 1) ** 2) + (order - 1) * x**2  # of p^lambda q^(1 - lambda)
    ratio = np.exp(exponent / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    integral = float(ratio.sum() * (x[1] - x[0]))
    one = math.log(integral) / (order - 1)  # of one of the two counts
    assert 2 * one == pytest.approx(order / sigma**2, rel=1e-6)


@pytest.mark.parametrize(("sigma", "delta", "answers"), [(40, 1e-5, 1000), (100, 1e-8, 5000)])
def test_epsilon_is_the_least_over_all_orders(sigma: float, delta: float, answers: int) -> None:
    orders = 1 + np.geomspace(1e-3, 1e4, 2_000_000)
    bounds = answers * orders / sigma**2 + math.log(1 / delta) / (orders - 1)
    found = epsilon_of(cost_of(sigma, answers), delta)
    assert found == pytest.approx(bounds.min(), rel=1e-9)


def test_the_noise_is_the_least_that_keeps_to_epsilon() -> None:
    for epsilon in (0.1, 1.0, 8.0):
        sigma = sigma_for(epsilon, 1e-5, 500)
        assert epsilon_of(cost_of(sigma, 500), 1e-5) == pytest.approx(epsilon, rel=1e-12)
        assert epsilon_of(cost_of(0.99 * sigma, 500), 1e-5) > epsilon


def test_an_answers_chances_are_those_of_gaussian_noise() -> None:
    """With two classes, class 0 wins with Phi((n_0 - n_1) / (sqrt(2) sigma))."""
    counts = np.tile([30, 22], (200_000, 1))
    found = noisy_argmax(counts, 6.0, np.random.default_rng(0))
    expected = 0.5 * (1 + math.erf(8 / (math.sqrt(2) * 6) / math.sqrt(2)))
    assert (found == 0).mean() == pytest.approx(expected, abs=0.004)


def test_a_clear_majority_wins_and_the_cost_is_written(tmp_path: Path) -> None:
    true = [NAMES[row % 3] for row in range(30)]
    few = ["cat" if n < 150 else None for n in range(400)]  # who has no label has no vote
    teachers = [write(tmp_path / f"{n}", [*true[:-2], few[n], None]) for n in range(400)]
    spent = vote(teachers, tmp_path / "out", epsilon=20.0, delta=1e-5).spent
    assert spent.sigma < 10
    table = pq.read_table(tmp_path / "out" / "part-00000000.parquet")
    assert table.column("id").to_pylist() == list(range(30))
    assert table.column("label").to_pylist()[:-1] == [*true[:-2], "cat"]
    record = json.loads((tmp_path / "out" / "_privacy.json").read_text())
    assert record["privacy"]["epsilon"] == 20.0
    assert (record["privacy"]["answers"], record["privacy"]["teachers"]) == (30, 400)


@pytest.mark.parametrize("order", [1.5, 8.0])
def test_a_checks_renyi_divergence(order: float) -> None:
    """D_lambda of neighbouring largest counts with noise, by its integral: lambda / (2 sigma^2)."""
    sigma = 5.0
    x = np.linspace(-150, 150, 300_001)
    exponent = order * -((x - 1) ** 2) + (order - 1) * x**2
    ratio = np.exp(exponent / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    divergence = math.log(float(ratio.sum() * (x[1] - x[0]))) / (order - 1)
    one = cost_of(1.0, 0, Check(3.0, sigma), asked=1)
    assert order * one == pytest.approx(divergence, rel=1e-6)


def test_the_checks_are_paid_for() -> None:
    check = Check(200.0, 150.0)
    sigma = sigma_for(3.0, 1e-5, 200, check, 900)
    assert epsilon_of(cost_of(sigma, 200, check, 900), 1e-5) == pytest.approx(3.0, rel=1e-12)
    assert sigma > sigma_for(3.0, 1e-5, 200)
    with pytest.raises(ConfigError, match=r"checks of 900 rows alone .* set it above ") as caught:
        sigma_for(3.0, 1e-5, 200, Check(200.0, 10.0), 900)
    least = float(str(caught.value).split("above ")[1].split(",")[0])
    assert sigma_for(3.0, 1e-5, 200, Check(200.0, 1.001 * least), 900) > 0


def test_only_clear_votes_are_answered_until_there_are_enough() -> None:
    counts = np.tile([[90, 10], [55, 45]], (50_000, 1))
    check = Check(80.0, 10.0)
    found = answer(counts, 5.0, np.random.default_rng(0), len(counts), check)
    assert found.asked == len(counts)
    share = np.bincount(found.rows % 2) / 50_000
    expected = [0.5 * math.erfc(-gap / (10 * math.sqrt(2))) for gap in (10, -25)]
    assert share == pytest.approx(expected, abs=0.01)
    first = answer(counts, 5.0, np.random.default_rng(0), 100, check)
    assert len(first.rows) == len(first.classes) == 100
    assert first.rows.tolist() == found.rows[:100].tolist()
    assert first.asked == first.rows[-1] + 1  # and no row after the last answer is looked at


def test_a_confident_vote_leaves_unclear_rows_without_a_label(tmp_path: Path) -> None:
    split = [["owl", "dog"][n % 2] for n in range(60)]
    teachers = [write(tmp_path / f"{n}", [*["cat"] * 15, *[split[n]] * 15]) for n in range(60)]
    check = Check(45.0, 1.0)
    voted = vote(teachers, tmp_path / "out", sigma=1.0, delta=1e-5, check=check, answers=12)
    table = pq.read_table(tmp_path / "out" / "part-00000000.parquet")
    ids = table.column("id").to_pylist()
    assert ids == sorted(ids)
    assert len(ids) == voted.labels == 12
    assert max(ids) < 15
    assert set(table.column("label").to_pylist()) == {"cat"}
    spent = json.loads((tmp_path / "out" / "_privacy.json").read_text())["privacy"]
    assert spent["mechanism"] == "Confident-GNMax"
    assert spent["epsilon"] == pytest.approx(epsilon_of(12 + 30 / 2, 1e-5))
    assert (spent["asked"], spent["answers"], spent["threshold"]) == (30, 12, 45.0)
    paid = vote(teachers, tmp_path / "paid", epsilon=90.0, check=check, answers=12).spent
    assert paid.epsilon == 90.0
    assert epsilon_of(cost_of(paid.sigma, 12, check, 30), paid.delta) == pytest.approx(90.0)


def _killed_vote(teachers: list[str], out: Path) -> None:
    """Vote; die once the first file is there."""
    replace = os.replace

    def replace_and_die(*paths: Any) -> None:
        replace(*paths)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die  # type: ignore[assignment]
    vote(teachers, out, epsilon=2.0)


def test_a_killed_vote_leaves_no_label_without_its_cost(tmp_path: Path) -> None:
    teachers = [write(tmp_path / f"{n}", ["cat"] * 20) for n in range(2)]
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(1, _killed_vote, teachers, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PRIVACY]


def test_votes_are_random(tmp_path: Path) -> None:
    teachers = [write(tmp_path / f"{n}", ["cat", "owl"] * 50) for n in range(2)]
    out = []
    for name in ("a", "b"):
        vote(teachers, tmp_path / name, epsilon=0.1)
        out.append(pq.read_table(tmp_path / name / "part-00000000.parquet").to_pylist())
    assert out[0] != out[1]
    assert {row["label"] for row in out[0]} == set(NAMES)  # classes without a vote, too
    vote(teachers, tmp_path / "some", epsilon=0.1, rows=10)
    some = pq.read_table(tmp_path / "some" / "part-00000000.parquet").column("id").to_pylist()
    assert some != list(range(10))
    assert some == sorted(set(some))
    assert len(some) == 10


def test_the_record_says_which_rows_were_labelled(tmp_path: Path) -> None:
    teachers = [write(tmp_path / f"{n}", ["cat"] * 5) for n in range(2)]
    files = [["rows.parquet", 123, "digest"]]
    record = {"parts": 3, "rows": 7, "files": files, "weights": "of the first teacher"}
    (tmp_path / "0" / RECORD).write_text(json.dumps(record))
    spent = vote(teachers, tmp_path / "out", epsilon=2.0).spent
    found = json.loads((tmp_path / "out" / RECORD).read_text())
    assert found.pop("privacy") == asdict(spent)
    assert found == {"parts": 1, "rows": 7, "files": files, "names": NAMES}
    assert not (tmp_path / "out" / PRIVACY).exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teachers = [write(tmp_path / f"{n}", ["cat"] * 20) for n in range(3)]
    rest = ["--vote", "gaussian", "--epsilon", "2", "--rows", "5"]
    assert cli.main(["vote", *teachers, "--out", str(tmp_path / "out"), *rest]) == 0
    assert "epsilon 2 at delta 1e-05" in capsys.readouterr().out
    assert pq.read_metadata(tmp_path / "out" / "part-00000000.parquet").num_rows == 5
    other = write(tmp_path / "other", ["cat"] * 20, first=1)
    tied, most = ["--threshold", "2"], ["--answers", "2"]
    cases = {
        "the folder is not empty": [*teachers, "--out", str(tmp_path / "out"), *rest],
        "labels other rows": [*teachers, other, "--out", str(tmp_path / "new"), *rest],
        "two teachers or more": [teachers[0], "--out", str(tmp_path / "new"), *rest],
        "must be above 0": [*teachers, "--out", str(tmp_path / "new"), "--epsilon", "0"],
        "--epsilon --sigma is required": [*teachers, "--out", str(tmp_path / "new")],
        "--sigma 0 must be": [*teachers, "--out", str(tmp_path / "new"), "--sigma", "0"],
        "give both or neither": [*teachers, "--out", str(tmp_path / "new"), *rest, *tied],
        "goes with --threshold": [*teachers, "--out", str(tmp_path / "new"), *rest, *most],
        "holds no Parquet": [*teachers, str(tmp_path), "--out", str(tmp_path / "new"), *rest],
    }
    for message, arguments in cases.items():
        assert cli.main(["vote", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_threshold_that_no_vote_reaches_gives_no_label(tmp_path: Path) -> None:
    teachers = [write(tmp_path / f"{n}", ["cat"] * 5) for n in range(3)]
    voted = vote(teachers, tmp_path / "out", sigma=1.0, check=Check(1000.0, 1.0))
    assert voted.labels == 0
    assert pq.read_table(tmp_path / "out" / "part-00000000.parquet").num_rows == 0
    assert voted.spent.epsilon == pytest.approx(epsilon_of(5 + 5 / 2, 1e-5))
