"""Files on a server that are read like local ones, by Parquet's readers among others."""

import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpdist.data.files.open import (
    open_file,
    stat,
)
from tests.support.served_file import CONTENT, NAME, QUICK, SIZE

pytestmark = pytest.mark.usefixtures("logged")


@pytest.fixture
def table(tmp_path):
    rng = random.Random(1)
    table = pa.table(
        {
            "image": [rng.randbytes(1000) for _ in range(4000)],
            "label": pa.array([row % 10 for row in range(4000)], pa.int32()),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=500, use_dictionary=False)
    return table


def opened(server, name="t.parquet"):
    version = stat(server.url(name), QUICK)
    server.requests.clear()
    return open_file(server.url(name), version, QUICK)


def test_parquet_reads_alike_from_here_and_from_there(server, table):
    with opened(server) as file:
        parquet = pq.ParquetFile(file)
        assert parquet.read() == table
        for group in (7, 0, 3):
            rows = table.slice(group * 500, 500)
            assert parquet.read_row_group(group) == rows
    assert file.closed
    with opened(server) as file:
        assert pq.read_table(file, pre_buffer=True) == table


def test_footer_and_one_column_of_a_row_group_take_two_requests(server, table):
    with opened(server) as file:
        parquet = pq.ParquetFile(file)
        assert server.requests["t.parquet"] == 1
        rows = parquet.read_row_group(2, columns=["image"])
        assert rows == table.select(["image"]).slice(1000, 500)
        assert server.requests["t.parquet"] == 2
        assert parquet.read_row_group(3, columns=["label"]).num_rows == 500
        assert server.requests["t.parquet"] == 3


def test_parquet_survives_every_second_answer_failing(server, table):
    with opened(server) as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            server.fail(503, count=1)
            server.short(count=1)
            server.reset(count=1)
            assert parquet.read_row_group(group) == table.slice(group * 500, 500)


def test_a_remote_file_seeks_and_reads_as_a_local_one(server):
    version = stat(server.url(NAME), QUICK)
    rng = random.Random(2)
    with open_file(server.url(NAME), version, QUICK) as file:
        local = io.BytesIO(CONTENT)
        for _ in range(200):
            size = rng.choice([0, 1, 10, 1000, 70_000, 200_000])
            at = rng.choice([rng.randrange(SIZE), SIZE - 10, SIZE - (64 << 10) - 5, SIZE, SIZE + 9])
            assert file.seek(at) == local.seek(at)
            assert file.read(size) == local.read(size)
            assert file.tell() == local.tell()
        assert file.seek(-100, io.SEEK_END) == SIZE - 100
        assert file.read() == CONTENT[-100:]
        assert file.seek(0) == 0
        buffer = bytearray(50)
        assert file.readinto(buffer) == 50
        assert bytes(buffer) == CONTENT[:50]
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_small_reads_side_by_side_share_a_request(server):
    version = stat(server.url(NAME), QUICK)
    server.requests.clear()
    with open_file(server.url(NAME), version, QUICK) as file:
        assert b"".join(file.read(1000) for _ in range(60)) == CONTENT[:60_000]
        assert server.requests[NAME] == 1
        for last in (8, 1000, 60_000):
            file.seek(-last, io.SEEK_END)
            assert file.read() == CONTENT[-last:]
        assert server.requests[NAME] == 2
