"""A `Trainer` without a run name never goes on with another run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpdist.errors import CheckpointError
from tests.support.odd_models import Small, trainer

SCRIPT = """
import os, signal
from pathlib import Path
from tests.support.odd_models import Small, trainer

made = trainer(Small(), Path("runs"), None, 4)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    save = made.saving.save
    def and_die(facts):
        save(facts)
        made.saving.finish()
        os.kill(os.getpid(), signal.SIGKILL)
    made.saving.save = and_die
made.fit()
"""


def test_every_run_without_a_name_gets_a_new_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run-0001").mkdir()  # of anybody
    for number in (2, 3):
        made = trainer(Small(), tmp_path, None, 1)
        made.fit()
        assert made.step.applied_steps == 1
        said = capfd.readouterr().err
        assert f"this run is {tmp_path}/run-000{number}" in said
        assert f"run={{'name': 'run-000{number}'}}" in said
        assert (tmp_path / f"run-000{number}" / "summary.json").exists()
    trainer(Small(), tmp_path, "run-0002", 2).fit()
    assert "at step 1" in capfd.readouterr().err, "a name goes on with its run"
    assert len(list(tmp_path.iterdir())) == 3


def test_where_no_folder_can_be_made_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"run.dir: cannot make a run folder in '.*file'"):
        trainer(Small(), tmp_path / "file", None, 1)


@pytest.mark.slow
def test_restarts_of_a_launcher_go_on_with_the_run_that_they_had(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "ACCELERATE_USE_CPU": "true",
    }
    for launch in (1, 2):
        done = subprocess.run(
            [*command, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / "runs").iterdir())) == launch, "one run of a launch"
        run = tmp_path / "runs" / f"run-000{launch}"
        assert json.loads((run / "summary.json").read_text())["steps"] == 4
        assert "at step 1" in done.stderr
