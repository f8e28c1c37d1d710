"""The operators that DeepSpeed compiles at its first start: compiled here, logged, under a lock.

Only the `zero` modules and this one know DeepSpeed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hpdist.distributed.watchdog import Watchdog
from hpdist.engines.build_lock import Log, build_lock, last_change, left_lock, working_in
from hpdist.errors import ConfigError

_LOOK = 1.0  # seconds between checks of a build's progress
_LONGEST = 1800.0  # seconds for which a running compiler counts as progress


def prepare_operators(builders: Sequence[Any], log: Log, patience: float | None) -> None:
    """Compile and load operators; if another process is compiling, wait for it.

    Args:
        builders: DeepSpeed's builders, as `needed_builders` gives them.
        log: Receives a line on what is compiled, what is waited for and how long it took.
        patience: Seconds without progress after which the process ends; None waits for ever.

    Raises ConfigError if one cannot be compiled, on the ranks of that machine.
    """
    try:
        for builder in builders:
            _prepare(builder, log, patience)
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank of a machine reports it
            error.rank = int(os.environ.get("RANK", "0"))
        raise


def _prepare(builder: Any, log: Log, patience: float | None) -> None:
    try:
        _Build(builder, log, patience).run()
    except OSError as error:
        raise ConfigError(
            f"DeepSpeed's operator {builder.name} cannot be compiled or loaded: {error}; set "
            "TORCH_EXTENSIONS_DIR to a writable folder on this machine"
        ) from error


def needed_builders(config: Mapping[str, Any]) -> list[Any]:
    """Return the builders of the operators that DeepSpeed would compile for this config."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    found = []
    kind = get_accelerator().create_op_builder("ShareMemCommBuilder")  # for CPU ranks only
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
    """Return the folder in which PyTorch compiles extensions, each in a folder of its own."""
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory("", verbose=False))


def left_locks() -> list[Path]:
    """Find locks of PyTorch's on this machine that a killed start has left."""
    return [lock for lock in sorted(extensions_folder().glob("*/lock")) if left_lock(lock)]


class _Build:
    """Compiles one operator, or loads a compiled one, into this process."""

    def __init__(self, builder: Any, log: Log, patience: float | None) -> None:
        self._builder = builder
        self._folder = extensions_folder() / builder.name
        self._log = log
        self._watchdog = Watchdog(int(os.environ.get("RANK", "0")), patience)
        self._done = threading.Event()
        self._loads = self._announced = False

    def run(self) -> None:
        """Wait for the lock, compile and load, under the watchdog."""
        watcher = threading.Thread(target=self._watch, name="hpdist-build", daemon=True)
        self._watchdog.start()
        watcher.start()
        try:
            with build_lock(self._folder, self._builder.name, self._log):
                self._loads = True
                self._load()
        finally:
            self._done.set()
            watcher.join()
            self._watchdog.stop()

    def _load(self) -> None:
        if not any(self._folder.glob("*.so")):
            self._announce()
        start = time.monotonic()
        try:
            with _own_ninja(), _quoted_libraries():
                self._builder.load(verbose=False)
        except Exception as error:  # from ninja, the compiler or the loader
            raise ConfigError(_why_not_compiled(self._builder.name, self._folder, error)) from error
        if self._announced:
            self._log(f"compiled {self._builder.name} in {time.monotonic() - start:.0f} s")

    def _watch(self) -> None:
        """Report running compilers and new files as progress to the watchdog."""
        limit = time.monotonic() + _LONGEST
        before = last_change(self._folder)
        while not self._done.wait(_LOOK):
            now, compilers = last_change(self._folder), working_in(self._folder)
            if now != before or (compilers and time.monotonic() < limit):
                self._watchdog.heartbeat(0, f"compiling {self._builder.name}")
            if self._loads and compilers:
                self._announce()
            before = now

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            self._log(
                f"compiling DeepSpeed's operator {self._builder.name} into {self._folder}; this "
                "takes minutes, once on this machine"
            )


@contextmanager
def _own_ninja() -> Iterator[None]:
    """Put the ninja of this environment first, even if the environment is not activated.

    Another version would consider everything changed, and compile it anew.
    """
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextmanager
def _quoted_libraries() -> Iterator[None]:
    """Have PyTorch quote its folder of libraries for the linker, as it does for headers.

    Otherwise nothing links if the environment's path contains a space.
    """
    from torch.utils import cpp_extension

    plain = cpp_extension.TORCH_LIB_PATH
    cpp_extension.TORCH_LIB_PATH = shlex.quote(plain).replace("$", "$$")  # ninja's escape
    try:
        yield
    finally:
        cpp_extension.TORCH_LIB_PATH = plain


def _why_not_compiled(name: str, folder: Path, error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if "error:" in line.lower()] or lines or [""]
    with _own_ninja():
        missing = [tool for tool in ("ninja", "c++") if shutil.which(tool) is None]
    advice = f"install {' and '.join(missing)}" if missing else f"remove {folder} and try again"
    return (
        f"DeepSpeed's operator {name} cannot be compiled ({type(error).__name__}: "
        f"{' '.join(reasons[0].split())[:300]}); {advice}, or launch without DeepSpeed"
    )
