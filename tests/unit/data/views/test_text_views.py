"""Views of text: what each option does, what stays, and that only the place in the batch counts."""

import pytest
import torch

from hpdist.data.decode.text import Vocabulary
from hpdist.data.views.text import (
    Strong,
    TextViewsConfig,
    Weak,
    compacted,
    one_of,
    span,
    swapped,
)
from hpdist.errors import ConfigError, DataError

PAD, BEGIN, END, MASK = 0, 1, 2, 3
WORDS = Vocabulary(1000, PAD, MASK, (PAD, BEGIN, END))
NOTHING = {"drop": 0.0, "mask": 0.0, "swap": 0.0, "crop": 0.0}


def rows_of(*lengths, tokens=24):
    """Rows of so many different tokens of text, with beginning, end and padding."""
    rows = torch.full((len(lengths), tokens), PAD)
    for row, length in zip(rows, lengths, strict=True):
        row[: length + 2] = torch.tensor([BEGIN, *range(10, 10 + length), END])
    return rows


def views(**options):
    return TextViewsConfig(strong=Strong(**{**NOTHING, **options})).build(7, WORDS)


def strong(made, x, step=0, copy=0, positions=None):
    positions = torch.arange(len(x)) if positions is None else positions
    return made.strong(x, stream="unlabeled", step=step, positions=positions, copy=copy)


def texts(rows):
    """Each row's tokens of text; checks beginning, end and padding."""
    found = []
    for row in rows.tolist():
        end = row.index(END)
        assert row[0] == BEGIN
        assert set(row[end + 1 :]) <= {PAD}
        assert PAD not in row[:end]
        found.append(row[1:end])
    return found


MANY = rows_of(*[1, 2, 3, 7, 12, 22] * 60)


def test_without_noise_nothing_changes():
    made = views()
    assert torch.equal(strong(made, MANY), MANY)
    assert torch.equal(made.plain(MANY), MANY)


def test_drop_keeps_order_and_at_least_one_token_at_the_given_rate():
    found = texts(strong(views(drop=0.3), MANY))
    before = list(texts(MANY))
    kept = sum(map(len, found)) / sum(map(len, before))
    assert all(
        row and row == sorted(row) and set(row) <= set(old)
        for row, old in zip(found, before, strict=False)
    )
    assert 0.67 < kept < 0.75
    assert all(len(row) >= 1 for row in texts(strong(views(drop=0.99), MANY)))


def test_mask_replaces_at_the_given_rate_and_never_all():
    found = texts(strong(views(mask=0.3), MANY))
    for row, old in zip(found, texts(MANY), strict=True):
        assert len(row) == len(old)
        assert all(new in (MASK, token) for new, token in zip(row, old, strict=True))
    tokens = [token for row in found for token in row]
    assert 0.24 < tokens.count(MASK) / len(tokens) < 0.31
    assert all(set(row) - {MASK} for row in texts(strong(views(mask=0.99), MANY)))


def test_swap_exchanges_neighbours_only():
    found = texts(strong(views(swap=1.0), MANY))
    starts = set()
    for row, old in zip(found, texts(MANY), strict=True):
        assert sorted(row) == old
        moved = [new - token for new, token in zip(row, old, strict=True)]
        assert set(moved) <= {-1, 0, 1}
        if len(row) == 7:
            starts.add(moved[0])
    assert starts == {0, 1}  # pairs begin at either
    some = texts(strong(views(swap=0.5), MANY))
    assert some != found
    assert some != texts(MANY)


def test_crop_keeps_a_run_of_neighbours():
    found = texts(strong(views(crop=0.5), MANY))
    lengths = set()
    for row, old in zip(found, texts(MANY), strict=True):
        assert row == list(range(row[0], row[0] + len(row)))
        assert len(row) >= len(old) - int(0.5 * len(old)) >= 1
        if len(old) == 22:
            lengths.add(len(row))
            assert row[0] >= old[0]
            assert row[-1] <= old[-1]
    assert lengths == set(range(12, 23))


def test_everything_together_leaves_a_text_in_each_row():
    made = views(drop=0.9, mask=0.9, swap=0.9, crop=0.9)
    for row, old in zip(texts(strong(made, MANY)), texts(MANY), strict=True):
        assert row
        assert set(row) <= {*old, MASK}
        assert set(row) - {MASK}


def test_noise_follows_from_seed_step_place_copy_and_kind_alone():
    made = views(drop=0.3, mask=0.2, swap=0.3, crop=0.3)
    whole = strong(made, MANY)
    order = torch.randperm(len(MANY), generator=torch.Generator().manual_seed(0))[:50]
    assert torch.equal(strong(made, MANY[order], positions=order), whole[order])
    same = {"drop": 0.3, "mask": 0.2, "swap": 0.3, "crop": 0.3}
    config = TextViewsConfig(weak=Weak(**same), strong=Strong(**same))
    places = torch.arange(len(MANY))
    others = [
        strong(made, MANY, step=1),
        strong(made, MANY, copy=1),
        made.strong(MANY, stream="labeled", step=0, positions=places),
        config.build(7, WORDS).weak(MANY, stream="unlabeled", step=0, positions=places),
        strong(config.build(8, WORDS), MANY),
        strong(made, MANY, positions=places + 1),
    ]
    assert all(not torch.equal(other, whole) for other in others)


def test_rows_that_are_full_and_rows_without_text_are_possible():
    full = torch.arange(10, 34)[None]  # neither beginning nor end
    empty = torch.full((1, 24), PAD)
    made = views(drop=0.9, mask=0.9, swap=0.9, crop=0.9)
    assert int((strong(made, full) != PAD).sum()) >= 1
    assert torch.equal(strong(made, empty), empty)
    assert tuple(strong(made, MANY[:0], positions=torch.arange(0)).shape) == (0, 24)


def test_weak_changes_little_by_default():
    made = TextViewsConfig().build(0, WORDS)
    places = torch.arange(len(MANY))
    weak = made.weak(MANY, stream="unlabeled", step=0, positions=places)
    kept = [sum(map(len, texts(rows))) for rows in (weak, MANY)]
    assert 0.93 < kept[0] / kept[1] < 0.98
    assert (weak == MASK).sum() == 0


def test_parts():
    text = torch.tensor([[False, True, True, True, True, False]])
    half = torch.tensor([0.99])
    assert span(text, half, torch.tensor([0.0]), 0.5).tolist() == [
        [False, True, True, True, False, False]
    ]
    assert span(text, half, half, 0.5).tolist() == [[False, False, True, True, True, False]]
    assert not one_of(torch.zeros(1, 4, dtype=torch.bool), torch.rand(1, 4)).any()
    x, left = compacted(torch.tensor([[1, 5, 6, 7, 8, 2]]), text, ~text | (text.cumsum(1) == 2), 0)
    assert x.tolist() == [[1, 6, 2, 0, 0, 0]]
    assert left.tolist() == [[False, True] + [False] * 4]
    drawn = torch.ones(1, 6, dtype=torch.bool)
    x = torch.tensor([[1, 5, 6, 7, 8, 2]])
    assert swapped(x, text, torch.tensor([0.9]), drawn).tolist() == [[1, 5, 7, 6, 8, 2]]
    assert swapped(x, text, torch.tensor([0.1]), drawn).tolist() == [[1, 6, 5, 8, 7, 2]]


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"views\.strong\.mask: the tokenizer has no mask token"):
        TextViewsConfig().build(0, Vocabulary(10, PAD, None, (PAD,)))
    made = views(drop=0.5)
    with pytest.raises(DataError, match="int64 token ids"):
        made.plain(torch.zeros(2, 4))
    with pytest.raises(DataError, match="int64 token ids"):
        strong(made, torch.zeros(2, 1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="one per row"):
        strong(made, MANY, positions=torch.arange(3))
