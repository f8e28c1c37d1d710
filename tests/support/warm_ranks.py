"""A server of warm ranks: forked from a process that has done the imports, and nothing else.

The imports take a rank's CPU longer than most tests. What a rank leaves behind (DeepSpeed's and
Accelerate's singletons, its environment, warnings, threads, a process group) ends with it: every
test is given new ones. Each worker of pytest-xdist has a server of its own.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from unittest import mock

IMPORTED = [
    *("pytest", "hypothesis", "sklearn.datasets", "setuptools", "networkx", "sympy"),
    *("transformers", "transformers.integrations.deepspeed", "accelerate.utils.deepspeed"),
    *("torch._dynamo.testing", "torch._inductor.compile_fx", "torch.utils.cpp_extension"),
    *("deepspeed.runtime.engine", "deepspeed.runtime.zero.stage3", "deepspeed.ops.adam"),
    *("deepspeed.runtime.zero.stage_1_and_2", "deepspeed.compile.inductor"),
    *("deepspeed.compile.backend", "deepspeed.module_inject.auto_ep_layer"),
    *("deepspeed.runtime.superoffload", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("hpdist.train.trainer", "hpdist.engines.zero3", "hpdist.engines.operators"),
]
"""What ranks need that is slow to import."""

READ_ONCE = (
    *("DS_", "HF_", "HUGGINGFACE_", "LD_", "MALLOC_", "PYTHON", "TORCH_CPP", "TRANSFORMERS_"),
    *("ACCELERATE_TORCH", "TORCHDYNAMO", "TORCHINDUCTOR", "TORCH_LOGS"),
)
"""How the variables begin that imports read."""

SET_BY_IMPORTS = ("TORCHINDUCTOR_CACHE_DIR",)
"""Variables that an import sets, and that ask for no other server."""

RANKS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""The environment that all ranks have in common, the server's too."""


def read_once() -> dict[str, str]:
    """Return the variables of this process that imports would read."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(READ_ONCE) and name not in (*RANKS, *SET_BY_IMPORTS)
    }


def put_back(before: dict[str, str]) -> None:
    """Put back the variables that imports would read; where one differs, ranks are not warm."""
    for name in read_once().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


_READ = read_once()


def start_method(fresh: bool) -> str:
    """Return how to start ranks: from the server, unless its imports have read another environment.

    HPDIST_TEST_START=spawn gives all ranks an interpreter of their own.
    """
    if fresh or read_once() != _READ:
        return "spawn"
    method = os.environ.get("HPDIST_TEST_START", "forkserver")
    if method == "forkserver":
        start_server()
    return method


def start_server() -> None:
    """Start the server, if it does not run yet. It imports while the test goes on."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, RANKS, TORCH_WARM_POOL="0"):  # no process of inductor's own
        forkserver.ensure_running()
