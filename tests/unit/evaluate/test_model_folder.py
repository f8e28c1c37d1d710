"""The folder of a model is whole: the old one or the new one, whenever its writer is killed."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from hpdist.data.decode.arrays import ArrayLayout
from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.vector import VectorSpec
from hpdist.data.kinds import InputKind
from hpdist.errors import CheckpointError, ConfigError, DataError
from hpdist.evaluate import model_folder
from hpdist.evaluate.description import Description, InputFacts, LabelFacts, RunFacts
from hpdist.models.mlp import MLPConfig

KILLS = 12


def description(step: int) -> Description:
    return Description(
        hpdist="0",
        run=RunFacts(id="1", name="run"),
        step=step,
        model={"name": "mlp", "hidden": [300]},
        outputs=2,
        task={"name": "classification"},
        labels=LabelFacts(column="label", names=["a", "b"]),
        views={"name": "identity"},
        inputs=InputFacts(
            kind="table", reader="image", column="x", spec=VectorSpec((20,)).record()
        ),
        seed=0,
        precision="fp32",
    )


def model_of(step: int) -> nn.Module:
    """A model whose every weight is the step."""
    model = MLPConfig(hidden=[300]).build((20,), 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float(step))
    return model


def write(folder: Path, step: int) -> None:
    fitted = {"views/mean": torch.full((20,), float(step))}
    model_folder.write(folder, description(step), model_of(step), VectorSpec((20,)), fitted)


def check(run: Path) -> int:
    """Verify what is there; which step it is of."""
    folder = model_folder.find(run)
    assert folder is not None
    found = model_folder.read(folder)
    tensors = model_folder.read_tensors(folder, model_folder.WEIGHTS)
    tensors |= model_folder.read_tensors(folder, model_folder.FITTED)
    values = {float(value) for tensor in tensors.values() for value in tensor.flatten()}
    assert values == {float(found.step or 0)}
    return found.step or 0


def write_on(run: Path, start: int) -> None:
    for step in range(start, start + 1000):
        write(run / "model", step)


@pytest.mark.parametrize("exchanges", [True, False])
def test_whoever_is_killed_leaves_a_whole_model(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the system cannot exchange two names at once."""
    if not exchanges:
        monkeypatch.setattr(model_folder, "_exchange", lambda *_: False)
    draw = random.Random(0)
    write(tmp_path / "model", 1)
    seen = {1}
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:
            try:
                write_on(tmp_path, 1000 * (kill + 1))
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.01, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        seen.add(check(tmp_path))
    assert len(seen) > KILLS / 2, "else they were killed too early to write anything"
    write(tmp_path / "model", 2)
    assert check(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left behind"


def test_between_two_renames_the_old_one_is_found(tmp_path: Path) -> None:
    write(tmp_path / "model", 3)
    (tmp_path / "model").rename(tmp_path / ".model-replaced-12345678")
    assert check(tmp_path) == 3


def test_what_is_left_beside_a_model_goes_and_the_only_whole_one_stays(tmp_path: Path) -> None:
    write(tmp_path / "model", 3)
    (tmp_path / "model").rename(tmp_path / ".model-replaced-12345678")
    (tmp_path / ".model-writing-12345678").mkdir()
    model_folder.remove_leftovers(tmp_path)
    assert check(tmp_path) == 3
    assert not (tmp_path / ".model-writing-12345678").exists()
    (tmp_path / ".model-replaced-12345678").rename(tmp_path / "model")
    (tmp_path / ".model-replaced-87654321").mkdir()
    model_folder.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_full_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model", 4)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "save_file", full)
    with pytest.raises(CheckpointError, match=r"model could not be written: .*No space left"):
        write(tmp_path / "model", 5)
    monkeypatch.undo()
    assert check(tmp_path) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@dataclass(frozen=True)
class LengthSpec(InputSpec):
    """A spec of a user's own."""

    kind: ClassVar[str] = "lengths"
    length: int
    names: tuple[str, ...] = ()

    @property
    def layout(self) -> ArrayLayout:
        return ArrayLayout((self.length,), np.dtype("float32"))


class Lengths(InputKind):
    name = "lengths"
    held = "lengths"


def test_a_spec_of_ones_own_comes_back(tmp_path: Path) -> None:
    spec = LengthSpec(length=7, names=("a", "b"))
    values = spec.record()
    assert values == {"class": f"python:{__name__}:LengthSpec", "length": 7, "names": ["a", "b"]}
    assert Lengths().recorded_spec(values, tmp_path) == spec
    with pytest.raises(ValueError, match="LengthSpec has no field 'width'"):
        Lengths().recorded_spec(values | {"width": 1}, tmp_path)
    with pytest.raises(ConfigError, match="is no InputSpec"):
        Lengths().recorded_spec({"class": "python:pathlib:Path"}, tmp_path)
    odd = LengthSpec(length=7, names=({1},))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="LengthSpec has fields that are no plain values"):
        odd.record()
