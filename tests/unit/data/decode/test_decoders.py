"""Decoding by threads and processes: the same result always, and nothing left behind, ever."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from hpdist.data.decode.decoders import Decoder
from hpdist.data.decode.encoded import Unreadable
from hpdist.data.decode.pixels import ImageSpec
from hpdist.data.kinds import spec_of_value
from hpdist.errors import DataError

WAYS = [{"threads": 5}, {"threads": 2, "processes": 3}]
RESIZED_WAYS = [{"threads": 2}, {"processes": 1}]  # a worker that resizes imports torch: seconds


def encoded(seed: int, kind: str = "PNG", side: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def mixed(side: int) -> list[object]:
    kinds = ["PNG", "JPEG", "WEBP", "TIFF", "BMP"]
    values: list[object] = [encoded(row, kinds[row % 5], side) for row in range(30)]
    values[3] = None
    values[7] = b"no image at all"
    values[11] = encoded(11, "JPEG", side)[:-80]
    values[12] = {"bytes": encoded(12, "PNG", side), "path": None}
    values[18] = encoded(18, side=side + 1)
    values[19] = Unreadable("its lists hold nulls")
    values[29] = np.zeros((3, side, side), np.uint8)
    return values


def workers(decoder: Decoder) -> list[int]:
    return [worker._process.pid for worker in decoder._pool._workers] if decoder._pool else []


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something, which takes long only where others use the machine."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not happen"
        time.sleep(0.01)


def gone(*pids: int) -> Callable[[], bool]:
    """A look whether processes are gone, or zombies that whoever adopted them has yet to bury."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    return lambda: not any(alive(pid) for pid in pids)


PLUGIN = """
import io, os, signal
from PIL import Image, PngImagePlugin

class Held(PngImagePlugin.PngImageFile):  # an image that is in a file, by its name
    def __init__(self, fp, filename=None):
        fp.read(4)
        with open(fp.read(), "rb") as file:
            super().__init__(io.BytesIO(file.read()))

class Deadly(PngImagePlugin.PngImageFile):
    def __init__(self, fp, filename=None):
        os.kill(os.getpid(), signal.SIGKILL)

def held(prefix): return prefix.startswith(b"HELD")
def deadly(prefix): return prefix.startswith(b"DEAD")

def register():
    Image.init()
    Image.register_open("HELD", Held, held)
    Image.register_open("DEADLY", Deadly, deadly)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Image formats that Pillow knows in this process only, as an application adds them."""
    (tmp_path / "image_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    import image_plugin

    Image.init()
    monkeypatch.setattr(Image, "ID", Image.ID.copy())
    monkeypatch.setattr(Image, "OPEN", Image.OPEN.copy())
    image_plugin.register()


class Held:
    """A value that keeps whoever decodes it waiting until it is given its bytes."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self.value = b"HELD" + self.path.encode()
        self.writer: int | None = None

    def readers(self, pids: list[int]) -> list[int]:
        """Those of the processes that wait for the bytes."""
        if self.writer is None:
            try:
                self.writer = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # nobody reads yet
                return []
        return [pid for pid in pids if self.path in self._files(pid)]

    def _files(self, pid: int) -> list[str]:
        try:
            return [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except FileNotFoundError:  # closed, or the process is gone
            return []

    def give(self, data: bytes) -> None:
        assert self.writer is not None
        os.write(self.writer, data)
        os.close(self.writer)
        self.writer = None


@pytest.fixture
def held(plugin, tmp_path):
    held = Held(tmp_path / "pipe")
    yield held
    if held.writer is not None:
        os.close(held.writer)


@pytest.mark.parametrize(("side", "size"), [(8, None), (150, None), (40, 9)])
def test_the_result_is_the_same_however_it_is_decoded(side, size):
    values = mixed(side)
    spec = spec_of_value(values[0], size)
    with Decoder(spec) as alone:
        expected, reasons = alone.decode(values)
    assert list(reasons) == ([3, 7, 11, 19, 29] if size else [3, 7, 11, 18, 19, 29])
    for way in RESIZED_WAYS if size else WAYS:
        with Decoder(spec, **way) as decoder:
            for _ in range(2):
                inputs, found = decoder.decode(values)
                assert torch.equal(inputs, expected)
                assert list(found.items()) == list(reasons.items())


def test_batches_of_any_length():
    values = [encoded(row) for row in range(40)]
    spec = spec_of_value(values[0], None)
    expected = torch.stack([spec.decode(value) for value in values])
    with Decoder(spec, processes=2) as decoder:
        first = workers(decoder)
        for rows in (1, 0, 3, 40, 2):
            inputs, reasons = decoder.decode(values[:rows])
            assert inputs.shape == (rows, 3, 8, 8)
            assert torch.equal(inputs, expected[:rows])
            assert not reasons
        assert workers(decoder) == first  # none fell over a length and was replaced


def test_arrays_stay_with_the_caller():
    values = [np.arange(4.0) + row for row in range(9)] + [np.array([1, np.nan, 2, 3])]
    with Decoder(spec_of_value(values[0], None), threads=2, processes=2) as decoder:
        inputs, reasons = decoder.decode(values)
        assert not workers(decoder)
    assert inputs[8].tolist() == [8, 9, 10, 11]
    assert list(reasons) == [9]


class Recorded(ImageSpec):
    """A spec that records which threads decode."""

    def decode_into(self, values, out):
        used.add(threading.current_thread().name)
        time.sleep(0.02)
        return super().decode_into(values, out)


used: set[str] = set()


@pytest.mark.parametrize(
    ("side", "size", "pays"), [(32, None, False), (256, None, True), (256, 8, True), (16, 8, False)]
)
def test_threads_are_used_where_they_pay(side, size, pays):
    values = [encoded(row, side=side) for row in range(16)]
    used.clear()
    spec = spec_of_value(values[0], size)
    with Decoder(Recorded(**vars(spec)), threads=3) as decoder:
        decoder.decode(values)
    own = threading.current_thread().name
    assert used == ({own, "hpdist-decode-1", "hpdist-decode-2"} if pays else {own})


def test_an_error_in_another_thread_is_raised():
    class Broken(ImageSpec):
        def decode_into(self, values, out):
            time.sleep(0.02)
            if threading.current_thread().name == "hpdist-decode-1":
                raise MemoryError("none left")
            return super().decode_into(values, out)

    values = [encoded(row, side=150) for row in range(16)]
    spec = Broken(**vars(spec_of_value(values[0], None)))
    with Decoder(spec, threads=2) as decoder, pytest.raises(MemoryError, match="none left"):
        decoder.decode(values)


def test_a_killed_worker_is_replaced_and_no_row_is_lost(held):
    values: list[object] = [encoded(row) for row in range(20)]
    spec = spec_of_value(values[0], None)
    expected = torch.stack([spec.decode(value) for value in values])
    with Decoder(spec, processes=2) as decoder:
        first = workers(decoder)
        os.kill(first[0], signal.SIGKILL)  # as it starts or waits
        assert torch.equal(decoder.decode(values)[0], expected)
        assert first[0] not in workers(decoder)

        answer: list[object] = []
        waiting = [*values[:10], held.value, *values[11:]]
        thread = threading.Thread(target=lambda: answer.append(decoder.decode(waiting)))
        thread.start()
        until(lambda: bool(held.readers(workers(decoder))))
        victim = held.readers(workers(decoder))[0]
        os.kill(victim, signal.SIGKILL)  # in the middle of its rows
        until(lambda: victim not in workers(decoder) and bool(held.readers(workers(decoder))))
        held.give(encoded(10))
        thread.join(30)
        inputs, reasons = answer[0]
        assert torch.equal(inputs, expected)
        assert not reasons
        assert len(workers(decoder)) == 2


def test_workers_follow_what_is_set_in_pillow(plugin, tmp_path, monkeypatch):
    (tmp_path / "image").write_bytes(encoded(2, side=64))
    named = b"HELD" + str(tmp_path / "image").encode()
    values = [encoded(0, "JPEG", 64), encoded(1, "JPEG", 64)[:-400], named]
    spec = spec_of_value(values[0], None)
    with Decoder(spec) as alone, Decoder(spec, processes=1) as decoder:
        for truncated, limit, bad in [(False, None, [1]), (True, None, []), (True, 9, [0, 1, 2])]:
            monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", truncated)
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            expected, reasons = alone.decode(values)
            inputs, found = decoder.decode(values)
            assert list(found) == bad
            assert found == reasons
            assert torch.equal(inputs, expected)


def test_rows_that_kill_every_worker_are_named(plugin):
    values = [encoded(row) for row in range(16)]
    with Decoder(spec_of_value(values[0], None), processes=1) as decoder:
        with pytest.raises(DataError, match=r"rows 8 to 11 .* 3 worker processes.* signal 9"):
            decoder.decode([*values[:9], b"DEAD", *values[10:]])
        inputs, reasons = decoder.decode(values)  # and it goes on
        assert inputs.any(dim=(1, 2, 3)).all()
        assert not reasons


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_closing_and_collection_leave_nothing():
    values = [encoded(row, side=150) for row in range(8)]
    spec = spec_of_value(values[0], None)
    with Decoder(spec, threads=3, processes=2) as first:  # what a process opens once, it keeps
        first.decode(values)
    gc.collect()
    before, threads = open_files(), threading.active_count()
    for close in (True, False):
        decoder = Decoder(spec, threads=3, processes=2)
        decoder.decode(values)
        pids = workers(decoder)
        start = time.monotonic()
        if close:
            decoder.close()
            decoder.close()
            with pytest.raises(RuntimeError, match="closed"):
                decoder.decode(values)
        del decoder
        assert time.monotonic() - start < 30
        assert gone(*pids)()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # not even a zombie
    with Decoder(spec, threads=3) as decoder:
        decoder.decode(values)
    gc.collect()
    assert open_files() <= before  # fewer where something else has been let go of meanwhile
    assert threading.active_count() <= threads


def test_closing_ends_a_decode_of_another_thread(held):
    errors: list[BaseException] = []
    decoder = Decoder(spec_of_value(encoded(0), None), processes=2)

    def decode() -> None:
        try:
            decoder.decode([held.value])
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=decode)
    thread.start()
    until(lambda: bool(held.readers(workers(decoder))))
    pids = workers(decoder)
    decoder.close()
    thread.join(30)
    assert "closed" in str(errors[0])
    assert gone(*pids)()
    assert not workers(decoder)


def test_workers_import_torch_only_to_resize_and_then_with_one_thread():
    image = encoded(0, side=30)
    for size in (None, 25):
        with Decoder(spec_of_value(image, size), processes=1) as decoder:
            decoder.decode([image] * 4)
            process = Path(f"/proc/{workers(decoder)[0]}")
            assert ("libtorch" in (process / "maps").read_text()) == (size is not None)
            assert b"OMP_NUM_THREADS=1\0" in (process / "environ").read_bytes()
            status = dict(line.split(":", 1) for line in (process / "status").open())
            assert int(status["Threads"]) <= 4  # it, the look at the parent, two that pyarrow makes
            assert int(status["SigIgn"], 16) & 1 << (signal.SIGINT - 1)


SCRIPT = """
import io, sys
from PIL import Image
from hpdist.data.decode.decoders import Decoder
from hpdist.data.decode.pixels import ImageSpec
file = io.BytesIO()
Image.new("RGB", (8, 8)).save(file, "PNG")
decoder = Decoder(ImageSpec.of(file.getvalue()), processes=2)
inputs, reasons = decoder.decode([file.getvalue()] * 8)
assert not reasons
print(*(worker._process.pid for worker in decoder._pool._workers), flush=True)
"""
BLOCK = """
import image_plugin
image_plugin.register()
decoder.decode([%r])
"""


def script(code: str, *, stdin: bool = False) -> tuple[subprocess.Popen[str], list[int]]:
    """Run code whose __main__ nobody can import; also the workers that it says it has."""
    process = subprocess.Popen(
        [sys.executable, "-" if stdin else "-c", *([] if stdin else [code])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[4],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if stdin:
        assert process.stdin is not None
        process.stdin.write(code)
        process.stdin.close()
        process.stdin = None
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.parametrize("stdin", [True, False])
def test_an_interpreter_that_exits_takes_its_workers_along(stdin):
    process, pids = script(SCRIPT, stdin=stdin)
    assert len(pids) == 2
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert gone(*pids)()


def test_workers_die_with_a_parent_that_is_killed(held):
    process, pids = script(SCRIPT + BLOCK % held.value)
    until(lambda: bool(held.readers(pids)))  # the one is busy, the other waits
    process.kill()
    until(gone(*pids))
    process.communicate()


def test_ctrl_c_ends_a_decode_at_once_and_quietly(held):
    process, pids = script(SCRIPT + BLOCK % held.value)
    until(lambda: bool(held.readers(pids)))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1
    assert gone(*pids)()


def test_a_decoder_goes_on_after_ctrl_c(held):
    values = [encoded(row) for row in range(8)]
    spec = spec_of_value(values[0], None)
    with Decoder(spec, processes=2) as decoder:
        main = threading.main_thread().ident

        def interrupt() -> None:
            until(lambda: bool(held.readers(workers(decoder))))
            signal.pthread_kill(main, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            decoder.decode([*values[:5], held.value])
        thread.join()
        inputs, reasons = decoder.decode(values)
        assert torch.equal(inputs, torch.stack([spec.decode(value) for value in values]))
        assert not reasons


def test_numbers_that_make_no_sense_are_refused():
    spec = spec_of_value(encoded(0), None)
    for numbers in ({"threads": 0}, {"processes": -1}):
        with pytest.raises(ValueError, match="give"):
            Decoder(spec, **numbers)


def test_a_fork_can_neither_use_nor_end_the_workers():
    with Decoder(spec_of_value(encoded(0), None), processes=1) as decoder:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                decoder.decode([encoded(0)])
            except RuntimeError:
                decoder.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        pids = workers(decoder)
        assert not decoder.decode([encoded(0)])[1]
        assert workers(decoder) == pids
