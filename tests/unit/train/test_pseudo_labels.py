import pytest
import torch

from hpdist.algorithms import FixMatch, FlexMatch, FreeMatch
from hpdist.algorithms.addons.base import build_algorithm
from hpdist.train import pseudo_label_metrics as pseudo_labels
from hpdist.train.config import parse

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 0.0]])


def test_shares_confidence_and_the_most_frequent_class():
    sums = pseudo_labels.observed(FixMatch(), [LOGITS[:3], LOGITS[3:]], 4)
    numbers, shares = pseudo_labels.summarized(sums)
    assert shares["pseudo_labels"].tolist() == [0.5, 0.5, 0.0]
    assert numbers["pseudo_label_top_share"] == 0.5
    largest = [max(torch.exp(row) / torch.exp(row).sum()) for row in LOGITS.double()]
    assert float(numbers["confidence"]) == pytest.approx(float(sum(largest)) / 4)


def test_a_single_row_and_no_row_say_nothing():
    for logits, rows in (([LOGITS[:1]], 1), ([], 4)):
        assert pseudo_labels.summarized(pseudo_labels.observed(FixMatch(), logits, rows)) == (
            {},
            {},
        )


def test_thresholds_of_freematch_are_those_of_its_formula():
    algorithm = FreeMatch(3)
    algorithm.pending["probability"] = torch.tensor([0.2, 0.5, 0.3])
    algorithm.pending["threshold"] = torch.tensor(0.8)
    told = pseudo_labels.per_class(algorithm, {})
    assert told["thresholds"] == pytest.approx([0.8 * 0.4, 0.8, 0.8 * 0.6])


def test_thresholds_of_flexmatch_follow_what_is_learned():
    algorithm = FlexMatch(3, threshold=0.9, warmup=False)
    algorithm.state["counts"] = torch.tensor([10, 5, 0])
    (_, half, none) = thresholds = pseudo_labels.per_class(algorithm, {})["thresholds"]
    assert thresholds[0] == pytest.approx(0.9)
    assert half == pytest.approx(0.9 * 0.5 / 1.5)  # x / (2 - x), the paper's convex mapping
    assert none == 0


def test_one_threshold_for_all_is_not_one_of_each_class():
    assert pseudo_labels.per_class(FixMatch(), {}) == {}


def test_an_add_on_has_the_thresholds_of_what_it_is_around():
    settings = {
        "model": {"name": "mlp"},
        "data": {"labeled": {"path": "nowhere"}},
        "algorithm": {"name": "freematch"},
        "addons": [{"name": "logit_adjustment"}],
        "steps": 1,
    }
    config = parse(settings)
    algorithm = build_algorithm(config.algorithm, config.addons, 4, "cpu", 1)
    assert len(pseudo_labels.per_class(algorithm, {})["thresholds"]) == 4


def test_of_very_many_classes_nothing_is_recorded():
    shares = {"pseudo_labels": torch.full((2000,), 1 / 2000)}
    assert pseudo_labels.per_class(FixMatch(), shares) == {}
