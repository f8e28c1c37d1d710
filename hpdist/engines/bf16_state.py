"""Master weights and optimizer state in bf16, which halves them: what DeepSpeed can, checked.

The names are DeepSpeed's. It keeps fp32 moments beside bf16 master weights only in its own Adam for
the CPU, which hpdist does not use, so here both are in bf16, or neither.
"""

from __future__ import annotations

from collections.abc import Mapping

from hpdist.engines.execution_plan import ExecutionPlan
from hpdist.errors import ConfigError

BF16_STATE = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
"""DeepSpeed's names of the settings: of its section `bf16`, and here of `zero`."""


def check_both(wanted: Mapping[str, bool]) -> None:
    """Raise ConfigError if only one of the settings is on."""
    on, off = ([key for key in BF16_STATE if wanted[key] is value] for value in (True, False))
    if on and off:
        raise ConfigError(
            f"zero.{on[0]}: true without zero.{off[0]}: DeepSpeed's ZeRO keeps both in bf16, or "
            "neither; set both to true, or leave both out"
        )


def check_bf16_state(plan: ExecutionPlan) -> None:
    """Raise ConfigError if a plan has bf16 state where DeepSpeed cannot keep it."""
    if not plan.bf16_state:
        return
    where = f"zero.{BF16_STATE[0]}"
    if plan.precision != "bf16":
        raise ConfigError(f"{where} needs precision: bf16, not {plan.precision}")
    if not plan.stage:
        raise ConfigError(
            f"{where} needs zero.stage 1, 2 or 3: "
            + ("DDP" if plan.stage is None else "stage 0")
            + " keeps whole master weights, in fp32"
        )
    if plan.offload != "none":
        raise ConfigError(
            f"{where} with zero.offload: {plan.offload}: DeepSpeed steps offloaded bf16 state only "
            "by its own Adam, which hpdist does not use; leave one of them out"
        )


def bf16_state_note(plan: ExecutionPlan) -> str | None:
    """What a run with bf16 state says of it once; None for other runs."""
    if not plan.bf16_state:
        return None
    return (
        "note: master weights and optimizer state are in bf16, so an update below 1/512 of its "
        "weight is lost; the teacher stays fp32, and is fed from these master weights"
    )
