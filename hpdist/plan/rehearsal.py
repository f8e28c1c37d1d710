"""One rank of many, rehearsed in one process, to count the memory that it needs.

Everything is real but the other ranks: data, model, DeepSpeed's partitions and buckets, a few
steps and two batches of evaluation. The process group is torch's `fake` one, in which a
collective returns at once and a gather returns this rank's own part for every rank. So the
resulting numbers are meaningless, but the sizes of all tensors are those of rank 0.

`hpdist plan` starts this module. Each stage has a process, as neither DeepSpeed nor Accelerate can
be set up twice.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from hpdist.errors import HpdistError, RehearsalError
from hpdist.plan.forks import Forks
from hpdist.processes import end_with

if TYPE_CHECKING:
    from torch import Tensor

    from hpdist.data.sources.labeled import LabeledRows
    from hpdist.distributed.fragments import Fragment, SpanOf
    from hpdist.engines.base import Engine
    from hpdist.train.data import RunData
    from hpdist.train.step import SemiSupervisedStep
    from hpdist.train.trainer import Trainer

STEPS = 2  # the first one makes the optimizer's state, so it needs less
ERRORS = ".errors"
"""The ending of the file, beside that of a stage's result, with what the stage prints."""
_BUILT = ".built"  # of the one that says that the stage's run could be built
_LOOK_SECONDS = 0.05
_MOST_ATTEMPTS = 20  # in fp16 the first ones may overflow


@dataclass(frozen=True)
class Rehearsal:
    """The memory that rank 0 held; in bytes of tensors, if not stated otherwise."""

    parameters: int
    """The number of parameters of the model."""
    trained: int
    """The number of those that the optimizer steps."""
    rows: int
    """Rows of one forward, labelled and unlabelled together."""
    device: str
    weights: int
    """The model's weights, or this rank's part of them, and its buffers."""
    optimizer: int
    """The optimizer's state, and the fp32 master weights if they are separate."""
    teacher: int
    """The averaged weights, and a second model if there is one."""
    activations: int
    """What rows, views and the first forward leave for the backward pass; under ZeRO-3 also the
    weights that are whole at that time."""
    peak: int
    peak_phase: str
    """The phase of the peak: building, step or evaluation."""

    @property
    def rest(self) -> int:
        """The rest of the peak: gradients, buckets of DDP or DeepSpeed, temporary tensors."""
        return self.peak - self.weights - self.optimizer - self.teacher - self.activations


def rehearse(
    settings: Mapping[str, Any],
    ranks: int,
    built: Callable[[], object] = lambda: None,
    threads: int | None = None,
) -> Rehearsal:
    """Train and evaluate briefly as rank 0 of so many, and count.

    `built` is called when the run has been built; `threads` are those of torch's operations.

    Sets up this process permanently: call it in one of its own. Raises ConfigError or DataError as
    training would, and RehearsalError if no step is applied.
    """
    if ranks > 1:
        _join_fake_group(ranks)
    import torch

    from hpdist.plan.memory_meter import MemoryMeter
    from hpdist.train.trainer import Trainer

    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with MemoryMeter(device) as meter:
        meter.mark("building")
        trainer = Trainer.from_settings(settings, files=False)
        built()
        step = trainer.step
        _stand_in_for_others(step.engine, ranks)
        _mark_first_backward(step, meter)
        meter.mark("step")
        for _ in trainer.trial_steps(_MOST_ATTEMPTS):
            if step.applied_steps == STEPS:
                break
            meter.mark("step")
        else:
            raise RehearsalError(f"fewer than {STEPS} of {_MOST_ATTEMPTS} steps were applied")
        held = held_bytes(step)
        meter.mark("evaluation")
        _evaluate(trainer)
    phases = {"start": "building", "backward": "step"}
    parameters = [(_whole_size(p), p.requires_grad) for p in step.engine.module.parameters()]
    return Rehearsal(
        parameters=sum(size for size, _ in parameters),
        trained=sum(size for size, is_trained in parameters if is_trained),
        rows=trainer.sharding.micro_batch,
        device=torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU",
        **held,
        activations=meter.levels["backward"] - meter.levels["step"],
        peak=meter.peak,
        peak_phase=phases.get(meter.peak_phase, meter.peak_phase),
    )


def held_bytes(step: SemiSupervisedStep) -> dict[str, int]:
    """The memory of a rank between steps: weights, optimizer, teacher; each storage once."""
    engine, teacher = step.engine, step.teacher
    counted: set[int] = set()

    def count(tensors: Iterable[Any]) -> int:
        total = 0
        for tensor in tensors:
            tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in counted:
                counted.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    module = engine.module
    weights = count(getattr(p, "ds_tensor", p) for p in module.parameters())
    weights += count(module.buffers())
    optimizer = count(engine.master_parts())
    for _, state in engine.flat_states():
        optimizer += count(value for value in state.values() if hasattr(value, "untyped_storage"))
    average = count(teacher.tensors()) if teacher is not None else 0
    return {"weights": weights, "optimizer": optimizer, "teacher": average}


def _join_fake_group(ranks: int) -> None:
    # Before any other import: DeepSpeed and Accelerate use the existing group.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # required, but never used
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())


def _stand_in_for_others(engine: Engine, ranks: int) -> None:
    """Replace what a fake collective cannot provide to the engine."""
    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    from hpdist.distributed.fragments import Layout

    def own_gradients(_: Any, bucket: Any) -> Any:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    own_gradients.__annotations__.clear()  # torch would compare them as strings
    if isinstance(engine.model, DistributedDataParallel):
        # It reads the result of its all-reduce, which a fake one does not have.
        engine.model.register_comm_hook(None, own_gradients)
    for module in engine.module.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(cast(Any, _OwnPart()))
    own = engine.master_fragments()
    engine.layout = Layout(own, spans=_all_spans(engine, own, ranks))


class _OwnPart:
    """A reduce-scatter for FSDP2 that gives a rank its own part of what it would send."""

    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Tensor:
        import torch

        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, *rest: Any, **more: Any
    ) -> None:
        output_tensor.copy_(input_tensor[: len(output_tensor)])


def _all_spans(engine: Engine, own: list[Fragment], ranks: int) -> list[list[SpanOf]]:
    """Rank 0's fragments, and equal shares of the rest for the others."""
    from hpdist.distributed.fragments import fragment_spans

    mine = fragment_spans(own)
    ends = {name: start + length for name, start, length in mine}  # rank 0's part comes first
    left = {n: (ends.get(n, 0), s.numel()) for n, s in engine.parameter_shapes().items()}
    spans = [mine, *([] for _ in range(ranks - 1))]
    share = -(-sum(stop - start for start, stop in left.values()) // max(ranks - 1, 1))
    rank, room = 1, share
    for name, (start, stop) in left.items():
        while start < stop:
            length = min(room, stop - start)
            spans[rank].append((name, start, length))
            start, room = start + length, room - length
            if not room:
                rank, room = rank + 1, share
    return spans


def _mark_first_backward(step: SemiSupervisedStep, meter: Any) -> None:
    """Begin the phase `backward` when a step's first forward has ended."""
    backward, marked = step.engine.backward, -1

    def marking(loss: Tensor) -> None:
        nonlocal marked
        if marked != step.attempts:
            marked = step.attempts
            meter.mark("backward")
        backward(loss)

    step.engine.backward = marking  # type: ignore[method-assign]


def _evaluate(trainer: Trainer) -> None:
    """Evaluate student and teacher on two batches: one is held while the next is made."""
    from hpdist.evaluate.scoring import evaluate_both

    step, data = trainer.step, trainer.data
    for rows in (data.validation, data.test):
        if rows is not None:
            first = partial(_first_batches, data, rows)
            evaluate_both(step.engine, step.teacher, data.views, first, data.task)


def _first_batches(data: RunData, rows: LabeledRows) -> Iterable[Any]:
    return islice(data.evaluation_batches(rows), 2)


def _whole_size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def main(source: str) -> None:
    """Rehearse the stages that a JSON file lists, and write each result, or error, to its file.

    Several stages are forks of this process, which has imported what all of them need; a line on
    the standard output says that one begins. The first must have been built before the others
    begin, and they do not if it ends with an error, which theirs would be too.
    """
    wanted = json.loads(Path(source).read_text())
    end_with(wanted["parent"])
    first, *others = wanted["stages"]
    if not others:
        _announce(first)
        _rehearse_one(first)
    _import("hpdist.train.trainer", "hpdist.evaluate.scoring", "hpdist.plan.memory_meter")
    forks, built = Forks(wanted["at_once"]), _next_to(first["target"], _BUILT)
    _announce(first)
    pids = [forks.start(partial(_rehearse_one, first))]
    while not built.exists() and forks.running:
        forks.wait(_LOOK_SECONDS)
    if built.exists() or "error" not in _read(first["target"]):
        _import("deepspeed")
        for stage in others:
            _announce(stage)
            pids.append(forks.start(partial(_rehearse_one, stage)))
    forks.wait_all()
    for stage, pid in zip(wanted["stages"], pids, strict=False):
        if not _read(stage["target"]) and forks.most > 1:  # side by side they may lack memory
            pid = forks.start(partial(_rehearse_one, stage))
            forks.wait_all()
        if not _read(stage["target"]):
            Path(stage["target"]).write_text(json.dumps({"ended": forks.ended[pid]}))


def _announce(stage: Mapping[str, Any]) -> None:
    print(stage["name"], flush=True)


def _read(target: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(target).read_text()) if Path(target).exists() else {}
    return found


def _next_to(target: str, ending: str) -> Path:
    return Path(target).with_suffix(ending)


def _import(*names: str) -> None:
    """Import what several stages need; what sets up devices or threads is left to the forks."""
    for name in names:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)


def _rehearse_one(stage: Mapping[str, Any]) -> NoReturn:
    """Rehearse a stage, write what it gives, and end this process."""
    errors = os.open(_next_to(stage["target"], ERRORS), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    if stage["deepspeed"] is not None:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = stage["deepspeed"]
    try:
        built = _next_to(stage["target"], _BUILT)
        result = asdict(rehearse(stage["settings"], stage["ranks"], built.touch, stage["threads"]))
    except HpdistError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    Path(stage["target"]).write_text(json.dumps(result))
    os._exit(0)  # nothing to clean up, and a fake group cannot end


if __name__ == "__main__":
    main(*sys.argv[1:])
