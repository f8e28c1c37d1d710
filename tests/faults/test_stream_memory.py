"""Eight epochs of a Parquet stream: memory is flat, epochs end and streams close at no cost."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

FILES, GROUPS, GROUP_ROWS = 6, 4, 160
ROW_BYTES = 4096
DATASET = FILES * GROUPS * GROUP_ROWS * ROW_BYTES  # 15.7 MB
EPOCHS = 8

pytestmark = pytest.mark.alone

SCRIPT = """
import json, sys, threading, time
import datasets, psutil
import pyarrow as pa
from hpdist.data.kinds import input_spec
from hpdist.data.config import Labeled, Unlabeled
from tests.support.labeled import open_labeled
from hpdist.data.stream import BatchStream
from hpdist.data.unlabeled import open_unlabeled
first = {"x": [[0.5] * 1024], "label": [0]}
labeled = open_labeled(Labeled(path="m", input="x"), 0, dataset=datasets.Dataset.from_dict(first))
spec = input_spec(labeled)
config = Unlabeled(path=sys.argv[1], input="x", streaming=True, shuffle_window="4MiB")
rows = open_unlabeled(config, labeled, spec)
stream = BatchStream(rows, 64, 0, 1, 0, spec)
process, epoch = psutil.Process(), 0
memory, arrow, waits, ends = [], [], [], []
while epoch < 8:
    began = time.perf_counter()
    next(stream)
    (waits if stream.epoch == epoch else ends).append(time.perf_counter() - began)
    if stream.epoch != epoch:
        epoch = stream.epoch
        memory.append(process.memory_info().rss)
        arrow.append(pa.total_allocated_bytes())
closes = []
for _ in range(4):
    began = time.perf_counter()
    stream.close()
    closes.append(time.perf_counter() - began)
    stream = BatchStream(rows, 64, 0, 1, 0, spec)
    next(stream)
stream.close()
left = [thread.name for thread in threading.enumerate() if thread.name.startswith("hpdist")]
print(json.dumps([memory, arrow, waits, ends, closes, left, pa.total_allocated_bytes()]))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    kind = pa.list_(pa.float32())
    for number in range(FILES):
        count = GROUPS * GROUP_ROWS
        values = random.random(count * ROW_BYTES // 4, np.float32)
        offsets = np.arange(0, len(values) + 1, ROW_BYTES // 4, np.int32)
        column = pa.ListArray.from_arrays(offsets, values).cast(kind)
        pq.write_table(
            pa.table({"x": column}),
            folder / f"train-{number}.parquet",
            row_group_size=GROUP_ROWS,
            compression="none",
            use_dictionary=False,
        )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_memory_is_flat_from_the_third_epoch_on(measured: list[Any]) -> None:
    memory, arrow, *_, after = measured
    assert len(memory) == EPOCHS
    early, late = max(memory[2:4]), max(memory[6:])
    assert late - early < DATASET / 4, memory  # five epochs have gone by
    assert max(arrow) < 4 * 2**20 * 3, arrow  # the windows' budget, and what mixes one of them
    assert after < DATASET / 16  # closed


def test_an_epoch_s_end_costs_no_more_than_any_batch(measured: list[Any]) -> None:
    _, _, waits, ends, *_ = measured
    assert len(ends) == EPOCHS
    assert np.median(ends) < 10 * np.mean(waits)  # closing an iterator of `datasets`: 1,000 times


def test_closing_is_quick_and_leaves_no_thread(measured: list[Any]) -> None:
    *_, closes, left, _ = measured
    assert min(closes) < 0.5
    assert left == []
