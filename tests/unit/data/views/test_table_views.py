"""Views of vectors: what is drawn, what is measured, and rows that know nothing of one another."""

import datasets
import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from hpdist.data.config import Labeled, Unlabeled
from hpdist.data.kinds import input_spec
from hpdist.data.sources.fitting import training_rows
from hpdist.data.sources.unlabeled import open_unlabeled
from hpdist.data.views import FittedViews, TableViewsConfig
from hpdist.errors import DataError
from tests.support.labeled import open_labeled

FEATURES = 6


def table(rows=300, seed=0):
    """Features of unlike size; the last but one is constant, the last is 0 or 1."""
    drawn = np.random.default_rng(seed).normal(size=(rows, FEATURES))
    drawn = drawn * [1, 100, 0.01, 1, 0, 0] + [0, 1000, 0, -5, 0.1, 0]
    drawn[:, -1] = np.arange(rows) % 4 == 0
    return drawn.astype(np.float32)


def views(seed=0, rows=None, **settings):
    built = TableViewsConfig(**settings).build(seed)
    built.fit([table() if rows is None else rows])
    return built


def view(kind, built, x, **changed):
    where = {"stream": "unlabeled", "step": 3, "positions": torch.arange(len(x)), **changed}
    return getattr(built, kind)(x, **where)


def test_plain_standardises_as_scikit_learn_does():
    x = table()
    expected = StandardScaler().fit_transform(x.astype(np.float64))
    result = views().plain(torch.from_numpy(x)).numpy()
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=2e-4)
    assert (result[:, 4] == 0).all(), "a constant feature is not divided by its rounding"
    raw = views(standardize=False).plain(torch.from_numpy(x))
    assert torch.equal(raw, torch.from_numpy(x))


@pytest.mark.parametrize("size", [1, 7, 100, 300])
def test_mean_and_std_do_not_depend_on_the_parts_they_are_measured_in(size):
    x = table()
    x[::5, 0] = np.nan
    x[:50, 3] = np.nan  # whole parts of it
    built = TableViewsConfig().build(0)
    built.fit([x[at : at + size] for at in range(0, 300, size)] + [x[:0]])
    state = built.state()
    np.testing.assert_allclose(state["mean"], np.nanmean(x.astype(np.float64), axis=0), rtol=1e-9)
    std = np.nanstd(x.astype(np.float64), axis=0)
    std[4] = 0  # rounded away
    np.testing.assert_allclose(state["std"], std, rtol=1e-9)
    assert sorted(map(tuple, np.nan_to_num(state["rows"].numpy()))) == sorted(
        map(tuple, np.nan_to_num(x))
    )


def test_a_sample_of_many_rows_is_kept_each_as_likely():
    x = np.arange(20_000, dtype=np.float32)[:, None]
    built = TableViewsConfig().build(0)
    built.fit(np.split(x, 20))
    kept = built.state()["rows"].flatten()
    assert len(kept) == len(kept.unique()) == 1024
    assert abs(float(kept.mean()) - 10_000) < 4 * 5774 / 32
    quarters = torch.histc(kept, 4, 0, 20_000)
    assert (quarters - 256).abs().max() < 4 * 14


def test_a_feature_without_any_value_is_refused_by_name():
    x = table(10)
    x[:, 1] = np.nan
    with pytest.raises(DataError, match="'b' is missing in every training row"):
        TableViewsConfig().build(0).fit([x], names=list("abcdef"))
    with pytest.raises(DataError, match="no training rows"):
        TableViewsConfig().build(0).fit([x[:0]])


def test_missing_values_become_the_mean():
    x = torch.from_numpy(table(50))
    gaps = x.clone()
    gaps[::3, 1] = torch.nan
    filled = views(missing="mean").plain(gaps)
    assert (filled[::3, 1] == 0).all()
    assert torch.equal(filled[1::3], views().plain(x)[1::3])
    raw = views(missing="mean", standardize=False).plain(gaps)
    torch.testing.assert_close(raw[0, 1], torch.tensor(table()[:, 1].mean()))
    for kind in ("weak", "strong"):
        assert view(kind, views(missing="mean"), gaps).isfinite().all()


@pytest.mark.parametrize("standardize", [True, False])
def test_weak_noise_is_gaussian_of_so_many_standard_deviations(standardize):
    x = torch.from_numpy(table()).repeat(40, 1)
    built = views(weak={"noise": 0.2}, standardize=standardize)
    noise = (view("weak", built, x) - built.plain(x)).double()
    std = (built.state()["std"] > 0).double() if standardize else built.state()["std"]
    spread = noise.std(dim=0)
    torch.testing.assert_close(spread, 0.2 * std, rtol=0.03, atol=1e-9)
    assert spread[4] == 0
    assert (noise.mean(dim=0).abs() <= 0.2 * std * 0.05).all()
    z = noise[:, 0] / (0.2 * std[0])
    assert abs(float((z.abs() < 1).double().mean()) - 0.6827) < 0.015
    assert torch.equal(view("weak", views(weak={"noise": 0}), x), views().plain(x))


def test_strong_replaces_so_many_features_by_values_of_other_rows():
    rows = table()
    x = torch.full((4000, FEATURES), 7.0)  # no training row has it
    built = views(standardize=False, strong={"corruption": 0.3, "noise": 0})
    result = view("strong", built, x)
    replaced = result != 7
    share = replaced.double().mean(dim=0)
    assert (share - 0.3).abs().max() < 4 * (0.21 / 4000) ** 0.5
    together = (replaced[:, 0] & replaced[:, 1]).double().mean()
    assert abs(float(together) - 0.09) < 0.02, "each feature on its own"
    for feature in range(FEATURES):
        found = result[replaced[:, feature], feature]
        assert set(found.tolist()) <= set(rows[:, feature].tolist())
        if feature in (0, 1, 2, 3):
            assert len(found.unique()) > 280, "any row's value"
    assert abs(float(result[replaced[:, 5], 5].mean()) - 0.25) < 0.05, "as often as in the rows"
    both = result[replaced[:, 0] & replaced[:, 1]]
    pairs = set(map(tuple, rows[:, :2].tolist()))
    same_row = sum(tuple(pair) in pairs for pair in both[:, :2].tolist())
    assert same_row < len(both) * 0.05, "from a row of its own for each feature"
    assert torch.equal(
        view("strong", views(strong={"corruption": 0, "noise": 0}), x), views().plain(x)
    )
    everything = view("strong", views(standardize=False, strong={"corruption": 1, "noise": 0}), x)
    assert (everything != 7).all()


def test_strong_noise_is_the_weak_views_unless_it_has_its_own():
    x = torch.from_numpy(table())
    still = {"corruption": 0}
    plain = views().plain(x)
    assert (view("strong", views(strong=still), x) - plain).std() > 0.05
    own = views(strong=still | {"noise": 2.0})
    assert (view("strong", own, x) - plain).std() > 1
    both = view("strong", views(strong=still), x) - view("weak", views(), x)
    assert both.std() > 0.05, "weak and strong share no noise"


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_a_row_does_not_depend_on_its_batch(kind):
    x = torch.from_numpy(table(97))
    whole = view(kind, views(), x)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    assert torch.equal(view(kind, views(), x[order], positions=order), whole[order])
    parts = torch.arange(97).split([1, 3, 40, 53])
    assert torch.equal(torch.cat([view(kind, views(), x[p], positions=p) for p in parts]), whole)


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_every_name_changes_the_noise(kind):
    x = torch.from_numpy(table(50))
    base = view(kind, views(), x)
    others = [
        view(kind, views(), x, stream="labeled"),
        view(kind, views(), x, step=4),
        view(kind, views(), x, copy=1),
        view(kind, views(), x, positions=torch.arange(50, 100)),
        view(kind, views(seed=1), x),
    ]
    assert torch.equal(view(kind, views(), x), base)
    assert all((other[:, 0] == base[:, 0]).sum() <= 5 for other in others)


def test_what_was_measured_can_be_taken_over():
    x = torch.from_numpy(table())
    first, second = views(rows=table(seed=5)), TableViewsConfig().build(0)
    assert isinstance(first, FittedViews)
    second.load_state(first.state())
    assert torch.equal(view("strong", second, x), view("strong", first, x))
    assert not torch.equal(view("strong", views(), x), view("strong", first, x))


def test_what_does_not_fit_is_refused():
    x = torch.from_numpy(table())
    with pytest.raises(RuntimeError, match="measured no rows yet"):
        TableViewsConfig().build(0).plain(x)
    for wrong in (x[:, :3], x.double(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(DataError, match="table views of 6 features take float32 rows"):
            views().plain(wrong)
    with pytest.raises(ValueError, match="positions must be one per row"):
        view("weak", views(), x, positions=torch.arange(3))


# What is measured: training rows, all of them that are used, and no others.


def opened(labeled, unlabeled, **settings):
    columns = {"input": ["a", "b"]}
    rows = open_labeled(Labeled(path="memory", **columns, **settings), 0, dataset=labeled)
    spec = input_spec(rows)
    return rows, spec, open_unlabeled(Unlabeled(path="memory"), rows, spec, dataset=unlabeled)


def test_labelled_rows_in_use_and_tables_are_measured():
    labeled = datasets.Dataset.from_dict(
        {"a": [1.0, 2.0, 90.0], "b": [True, False, True], "label": [0, 1, 1]}
    )
    gaps = [None, float("nan"), float("inf"), 5.0] * 700
    unlabeled = datasets.Dataset.from_dict({"a": gaps, "b": [1] * 2800})
    rows, spec, more = opened(labeled, unlabeled, indices=[0, 1])
    found = np.concatenate(list(training_rows(rows, more, spec)))
    expected = [[1, 1], [2, 0]] + [[5, 1]] * 700
    assert found.tolist() == expected, "bad rows and unused labelled ones are passed over"
    stream = unlabeled.to_iterable_dataset()
    rows, spec, more = opened(labeled, stream)
    assert np.concatenate(list(training_rows(rows, more, spec))).tolist() == [
        [1, 1],
        [2, 0],
        [90, 1],
    ]


def test_a_labelled_row_with_a_gap_is_named():
    labeled = datasets.Dataset.from_dict({"a": [1.0, None], "b": [0, 1], "label": [0, 1]})
    rows, spec, _ = opened(labeled, labeled)
    with pytest.raises(DataError, match=r"row 1 cannot.*column 'a'.*views\.missing: mean"):
        list(training_rows(rows, None, spec))
