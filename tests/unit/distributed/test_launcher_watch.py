"""What counts as the launcher of a rank, among the processes that it descends from."""

from __future__ import annotations

import shlex

import psutil
import pytest

from hpdist.distributed.launcher_watch import find_launcher


@pytest.mark.parametrize(
    ("command", "is_launcher"),
    [
        ("/opt/bin/accelerate launch train.py", True),
        ("python -X dev /opt/bin/accelerate launch", True),
        ("python3.11 -u /opt/bin/accelerate-launch train.py", True),
        ("/usr/bin/python -u -m deepspeed.launcher.launch --world_info=e30=", True),
        ("python -Wignore -m accelerate.commands.launch", True),
        ("editor /home/someone/accelerate", False),
        ("tmux new -s accelerate", False),
        ("python -c pass accelerate", False),
        ("python -Ic pass accelerate", False),
        ("python -m hpdist train accelerate", False),
        ("python train.py accelerate launch", False),
        ("python", False),
    ],
)
def test_a_launcher_is_what_a_command_line_runs(
    command: str, is_launcher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other words of the command line may be anything, such as the folder of an editor."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(psutil.Process, "cmdline", lambda process: shlex.split(command))
    found = find_launcher()
    assert (found is not None) is is_launcher
