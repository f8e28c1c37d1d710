"""What a rank pays for a checkpoint of very many does not grow with their number: it is counted."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from hpdist.algorithms.parts.tables import BLOCK, LabelTable
from hpdist.checkpoint import reader
from hpdist.checkpoint.fragment_index import FragmentIndex
from hpdist.checkpoint.manifest import digest_of
from hpdist.checkpoint.reader import SavedRun
from hpdist.distributed.fragments import Fragment
from hpdist.errors import CheckpointError
from tests.support.many_ranks import KINDS, cut_each, cut_flat, save_on, weights
from tests.support.opened import Asked, counted

CUTS = {"flat": cut_flat, "each": cut_each}
OWN = {"manifest.json", "common.safetensors"}


def rewrite(path: Path, fragments: object) -> None:
    """Give a manifest other fragments, or none, with a digest that fits."""
    facts = json.loads((path / "manifest.json").read_text())
    del facts["digest"], facts["fragments"]
    if fragments is not None:
        facts["fragments"] = fragments
    (path / "manifest.json").write_text(json.dumps({**facts, "digest": digest_of(facts)}))


def opened_as(path: Path, rank: int, ranks: int) -> tuple[Asked, SavedRun]:
    with counted(path) as asked:
        saved = SavedRun(path, rank, ranks)
    return asked, saved


@pytest.mark.parametrize("cut", CUTS)
def test_a_rank_asks_for_its_own_files_however_many_there_are(tmp_path: Path, cut: str) -> None:
    tensors = weights(6, 500)
    found = {}
    for ranks in (8, 64):
        path = save_on(tmp_path / str(ranks), ranks, CUTS[cut](tensors, ranks))
        asked, saved = opened_as(path, 5, ranks)
        assert set(asked.opened) == {*OWN, "rank-00005.safetensors"}
        own = CUTS[cut](tensors, ranks)(5)
        with counted(path) as loading:
            for kind in KINDS:
                for piece in own[kind]:
                    assert torch.equal(saved.read(kind, piece), piece.values)
        assert not loading.opened, "it is open already"
        found[ranks] = (sum(asked.opened.values()), asked.stats)
    assert found[8] == found[64], "opens and stats"


@pytest.mark.parametrize("cut", CUTS)
def test_any_part_is_read_from_the_files_that_have_it(tmp_path: Path, cut: str) -> None:
    tensors = weights(4, 300)
    path = save_on(tmp_path, 16, CUTS[cut](tensors, 16))
    _, saved = opened_as(path, 1, 16)
    for rank in range(3):  # as of three ranks
        for piece in cut_flat(tensors, 3)(rank)["teacher"]:
            assert torch.equal(saved.read("teacher", piece), piece.values)
    name = "layers.2.weight"
    with counted(path) as asked:
        part = saved.whole("master").read(name, 100, 101)
    assert part.tolist() == [tensors[name][100]]
    assert len(asked.opened) <= 1
    assert torch.equal(saved.whole("master")[name], tensors[name])


def test_every_file_is_verified_by_one_rank(tmp_path: Path) -> None:
    path = save_on(tmp_path, 8, cut_each(weights(2, 100), 8))
    for ranks in (1, 3, 8, 12):
        seen = [name for rank in range(ranks) for name in opened_as(path, rank, ranks)[0].opened]
        assert {name for name in seen if name.startswith("rank-")} == {
            f"rank-{rank:05d}.safetensors" for rank in range(8)
        }
    file = path / "rank-00006.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    SavedRun(path, 2, 8)  # its own files are whole
    with pytest.raises(CheckpointError, match=r"rank-00006.*truncated"):
        SavedRun(path, 6, 8)


def test_the_index_of_a_thousand_ranks_is_small(tmp_path: Path) -> None:
    """Of 10^9 elements in 20 tensors; the sizes of the fragments are all that it depends on."""
    sizes = {f"layers.{number}.weight": 50_000_000 for number in range(20)}
    ranks = 1024
    tracemalloc.start()
    index = FragmentIndex()
    for rank in range(ranks):
        for name, size in sizes.items():
            share = -(-size // ranks)
            start = min(rank * share, size)
            index.add("master", name, (start, min(share, size - start), rank, 1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    encoded = index.encoded()
    assert max(len(text.split()) for text in encoded["master"].values()) <= 2
    assert peak < 50_000
    again = FragmentIndex()
    again.include(encoded, ranks)
    assert [*again.spans("master", "layers.7.weight", 48_828, 48_830)] == [
        (0, 48_829, 0),
        (48_829, 48_829, 1),
    ]
    assert again.size("master", "layers.7.weight") == 50_000_000


def table_of(folder: Path, blocks: int, ranks: int) -> tuple[torch.Tensor, SavedRun]:
    labels = (torch.arange(blocks * BLOCK + 5) % 1000).to(torch.int16)

    def of_rank(rank: int) -> dict[str, list[Fragment]]:
        starts = range(rank * BLOCK, len(labels), ranks * BLOCK)
        return {"algorithm": [Fragment("labels", at, labels[at : at + BLOCK]) for at in starts]}

    return labels, SavedRun(save_on(folder, ranks, of_rank))


def part_of(saved: SavedRun, rank: int, ranks: int) -> torch.Tensor:
    table = LabelTable(1000)
    table.rank, table.ranks = rank, ranks
    table.load(saved.whole("algorithm"))
    return table.labels()


def lines_run(function: Callable[[], object]) -> int:
    """How many lines of Python a call runs."""
    count = 0

    def line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return line

    before = sys.gettrace()
    sys.settrace(line)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_a_table_of_labels_is_dealt_out_to_any_ranks(tmp_path: Path) -> None:
    labels, saved = table_of(tmp_path, 64, 4)
    # Blocks lie on the ranks in turn: 16 rounds, and the rest.
    assert len(saved.facts["fragments"]["algorithm"]["labels"].split()) == 17
    for rank, ranks in ((1, 4), (2, 3), (0, 1)):
        own = [labels[at : at + BLOCK] for at in range(rank * BLOCK, len(labels), ranks * BLOCK)]
        assert torch.equal(part_of(saved, rank, ranks), torch.cat(own))


def test_a_table_of_labels_is_not_walked_through_for_each_block(tmp_path: Path) -> None:
    """Four times as many rows are four times as much work."""
    small, large = (table_of(tmp_path / str(n), n, 4)[1] for n in (64, 256))
    one, four = (lines_run(partial(part_of, saved, 1, 4)) for saved in (small, large))
    assert one > 64 / 4
    assert four < 4.5 * one


def test_a_checkpoint_without_an_index_opens_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights(5, 200)
    path = save_on(tmp_path, 12, cut_each(tensors, 12))
    rewrite(path, None)
    asked, saved = opened_as(path, 3, 12)
    assert max(asked.opened.values()) <= 3  # one hash; safetensors opens a file twice
    for name, tensor in tensors.items():
        assert torch.equal(saved.whole("teacher")[name], tensor)
    assert reader.SavedRun(path).kinds() == set(KINDS)


BAD = {
    "no numbers": {"master": {"w": "a:b:c:d"}},
    "too few numbers": {"master": {"w": "0:4:0"}},
    "a rank that is not there": {"master": {"w": "0:4:0:3"}},
    "a negative start": {"master": {"w": "-4:4:0:1"}},
    "a huge count": {"master": {"w": "0:4:0:" + "9" * 18}},
    "a list": {"master": ["0:4:0:1"]},
    "numbers": {"master": {"w": 4}},
}


@pytest.mark.parametrize("kind", BAD)
def test_an_index_that_hpdist_did_not_write_is_refused(tmp_path: Path, kind: str) -> None:
    path = save_on(tmp_path, 2, cut_each(weights(1, 10), 2))
    rewrite(path, BAD[kind])
    with pytest.raises(CheckpointError, match=r"manifest\.json is"):
        SavedRun(path)


@pytest.mark.parametrize("text", ["0:9:0:1", "0:5:0:2 10:5:1:1", "0:4:1:1 4:4:0:1", "1:5:0:2"])
def test_an_index_that_does_not_fit_the_files_is_no_elements(tmp_path: Path, text: str) -> None:
    path = save_on(tmp_path, 2, cut_each(weights(1, 10), 2))
    rewrite(path, {"master": {"layers.0.weight": text}})
    whole = SavedRun(path).whole("master")
    with pytest.raises(CheckpointError):
        whole.read("layers.0.weight", 0, 15)
