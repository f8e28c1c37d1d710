"""What `.ci/system-packages` says on a machine where it can install nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "system-packages"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder of programs without apt-get, compilers, SLURM and browsers."""
    for name in ("bash", "find", "id"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    return tmp_path


def missing(programs: Path, *arguments: str) -> tuple[list[str], str]:
    """Return the packages that the script names, and why it did not install them."""
    done = subprocess.run(
        [SCRIPT, *arguments], env={"PATH": str(programs)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    head, _, why = line.partition(" (")
    return head.removeprefix("Not installed: ").split(), why


def test_it_names_what_the_default_tests_lack(bare: Path) -> None:
    packages, why = missing(bare)
    assert {"make", "g++", "iproute2", "python3-venv"} <= set(packages)
    assert not {"slurmctld", "chromium"} & set(packages)
    assert why.startswith("there is no apt-get here")


def test_it_names_what_the_slow_tests_lack(bare: Path) -> None:
    packages, _ = missing(bare, "all")
    assert {"munge", "slurmctld", "slurmd", "slurm-client", "chromium"} <= set(packages)


def test_a_found_program_is_not_named(bare: Path) -> None:
    (bare / "make").symlink_to(str(shutil.which("make")))
    assert "make" not in missing(bare)[0]
