"""The check that a config's engine computes right gradients on these machines.

Run as a program by `check_engine`, it is one process of a separate group, which makes the engine
as training would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hpdist.distributed.rendezvous import Rendezvous
from hpdist.engines.config import Shard
from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.preflight.child import join_and_print, run_in_child
from hpdist.preflight.findings import Finding

_NAME = "gradients"
_PARTS = ("precision", "stage", "offload", "nvme_path", "base", "compile", "bf16_state", "shard")


def check_engine(
    engine: ExecutionPlan,
    facts: Sequence[Mapping[str, Any]],
    peers: Rendezvous,
    timeout: float,
) -> Finding:
    """Do one step on the engine that all processes make together, beside them. Collective.

    `engine` is the plan of a run. DeepSpeed's first start on a machine compiles an operator, which
    may take longer than the timeout; then there is only a note.
    """
    own = facts[peers.rank]
    on_gpu = all(fact["devices"] for fact in facts)
    device, backend = ("cuda:" + str(own["gpu"]), "nccl") if on_gpu else ("cpu", "gloo")
    local = sum(fact["host"] == own["host"] for fact in facts[: peers.rank])
    variables = {
        "RANK": str(peers.rank),
        "WORLD_SIZE": str(peers.size),
        "LOCAL_RANK": str(own["gpu"] if on_gpu else local),
        "MASTER_ADDR": peers.endpoint.address,
        "MASTER_PORT": str(peers.endpoint.port),  # required, but the group exists already
    }
    described = json.dumps({part: getattr(engine, part) for part in _PARTS}, default=dict)
    found = run_in_child(
        "hpdist.preflight.gradients",
        *(backend, device, peers.endpoint, timeout, described),
        variables=variables,
    )
    return _finding(peers.gathered(found), [fact["host"] for fact in facts])


def is_worth_checking(engine: ExecutionPlan, on_gpu: bool) -> bool:
    """Whether an engine is checked here: all but DDP on CPUs, which a run itself still checks."""
    return on_gpu or engine.is_sharded


def _finding(outcomes: Sequence[Any], hosts: Sequence[str]) -> Finding:
    """The outcome of all processes: the same error of a step, or each one's failure."""
    failed = [
        f"process {rank} on {host}: {outcome}"
        for rank, (host, outcome) in enumerate(zip(hosts, outcomes, strict=True))
        if isinstance(outcome, str)
    ]
    if failed and all("not done within" in line for line in failed):
        text = "\n".join([*failed, "not measured; a larger --timeout gives it the time"])
        return Finding(_NAME, "note", text)
    if failed:
        return Finding(_NAME, "FAILED", "\n".join(failed))
    return Finding(_NAME, "ok" if outcomes[0]["passed"] else "FAILED", outcomes[0]["said"])


def _measure(_: torch.device, arguments: list[str]) -> dict[str, Any]:
    from hpdist.engines.gradient_check import check_gradients
    from hpdist.engines.launch import make_accelerator

    parts = json.loads(arguments[0])
    plan = ExecutionPlan(**parts | {"shard": Shard(**parts["shard"])})
    found = check_gradients(make_accelerator(plan), plan)
    return {"passed": found.passed, "said": str(found)}


if __name__ == "__main__":
    join_and_print(_NAME, _measure)
