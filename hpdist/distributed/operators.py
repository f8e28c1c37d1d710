"""The operators that DeepSpeed compiles at its first start: compiled here, in words, under a lock.

Only the `zero` modules and this one know DeepSpeed.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpdist.distributed.build_lock import Say, build_lock, changes, left_lock, working_in
from hpdist.distributed.watchdog import Watchdog
from hpdist.errors import ConfigError

_LOOK = 1.0  # seconds between looks at how a build goes on
_LONGEST = 1800.0  # seconds for which a compiler that runs counts as progress


def prepare_operators(builders: Sequence[Any], say: Say, patience: float | None) -> None:
    """Compile and load operators; where another process is at it, wait for it.

    Args:
        builders: DeepSpeed's builders, as `needed_builders` gives them.
        say: Is given a line of what is compiled, what is waited for and how long it took.
        patience: Seconds without any progress, after which the process ends; None waits for ever.

    Raises ConfigError where one cannot be compiled.
    """
    for builder in builders:
        folder = extensions_folder() / builder.name
        with (
            _watched(folder, patience, f"compiling {builder.name}"),
            build_lock(folder, builder.name, say),
        ):
            _load(builder, folder, say)


def needed_builders(config: Mapping[str, Any]) -> list[Any]:
    """Give the builders of the operators that DeepSpeed would compile in a run of this config."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    found = []
    kind = get_accelerator().create_op_builder("ShareMemCommBuilder")  # for CPU ranks alone
    if kind is not None and deepspeed.ops.__compatible_ops__.get(kind.name, False):
        found.append(kind)
    zero = config.get("zero_optimization") or {}
    parts = [zero.get(f"offload_{part}") or {} for part in ("optimizer", "param")]
    names = []
    if any(part.get("device") == "nvme" for part in parts):
        names.append("AsyncIOBuilder")
        if (config.get("aio") or {}).get("use_gds"):
            names.append("GDSBuilder")
    if os.environ.get("DS_PIN_MEMORY_BACKEND") == "native":
        names.append("PinMemoryBuilder")
    found += [get_accelerator().create_op_builder(name) for name in names]
    return [builder for builder in found if builder and not installed_ops.get(builder.name)]


def extensions_folder() -> Path:
    """Give the folder below which PyTorch compiles extensions, a folder for each."""
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory("", verbose=False))


def left_locks() -> list[Path]:
    """Find the locks of PyTorch's that a killed start has left on this machine."""
    return [lock for lock in sorted(extensions_folder().glob("*/lock")) if left_lock(lock)]


def _load(builder: Any, folder: Path, say: Say) -> None:
    built = any(folder.glob("*.so"))
    if not built:
        say(
            f"compiling DeepSpeed's operator {builder.name} into {folder}; this takes minutes, "
            "once on this machine"
        )
    start = time.monotonic()
    try:
        builder.load(verbose=False)
    except Exception as error:  # of ninja, the compiler or the loader
        lines = [line for line in str(error).splitlines() if line.strip()]
        told = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
        missing = [tool for tool in ("ninja", "c++") if shutil.which(tool) is None]
        advice = f"install {' and '.join(missing)}" if missing else f"remove {folder} and try again"
        raise ConfigError(
            f"DeepSpeed's operator {builder.name} cannot be compiled ({type(error).__name__}: "
            f"{' '.join(told.split())[:300]}); {advice}, or launch without DeepSpeed"
        ) from error
    if not built:
        say(f"compiled {builder.name} in {time.monotonic() - start:.0f} s")


@contextmanager
def _watched(folder: Path, patience: float | None, doing: str) -> Iterator[None]:
    """End the process when nothing goes on in the folder for so long: no compiler, no new file."""
    watchdog = Watchdog(int(os.environ.get("RANK", "0")), patience)
    done = threading.Event()
    limit = time.monotonic() + _LONGEST

    def look() -> None:
        before = changes(folder)
        while not done.wait(_LOOK):
            now = changes(folder)
            if now != before or (working_in(folder) and time.monotonic() < limit):
                watchdog.beat(0, doing)
            before = now

    watchdog.start()
    watchdog.beat(0, doing)
    thread = threading.Thread(target=look, name="hpdist-build", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        watchdog.stop()
