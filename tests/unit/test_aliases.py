"""Modules and names of before are found where they are now, with a warning."""

import importlib
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from hpdist.aliases import MOVED, MOVED_NAMES, current_name


@pytest.mark.parametrize("old", sorted(MOVED))
def test_every_old_module_is_the_new_one(old: str) -> None:
    new = importlib.import_module(f"hpdist.{MOVED[old]}")
    sys.modules.pop(f"hpdist.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"hpdist\.{old} is hpdist\.{MOVED[old]} now"):
        found = importlib.import_module(f"hpdist.{old}")
    assert found is new
    assert new.__name__ == new.__spec__.name == f"hpdist.{MOVED[old]}"


@pytest.mark.parametrize("package", sorted(MOVED_NAMES))
def test_every_old_name_is_the_new_one(package: str) -> None:
    module = importlib.import_module(f"hpdist.{package}")
    for home, names in MOVED_NAMES[package].items():
        for name in names:
            with pytest.warns(DeprecationWarning, match=f"is hpdist.{home}.{name} now"):
                found = getattr(module, name)
            assert found is getattr(importlib.import_module(f"hpdist.{home}"), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


def test_what_deepspeed_pickled_under_an_old_name_still_opens() -> None:
    stored = b"chpdist.distributed.zero\n_keep_scale\n."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = pickle.loads(stored)
    from hpdist.engines.zero import _keep_scale

    assert found is _keep_scale


def test_names_of_things_in_old_modules() -> None:
    assert current_name("hpdist.algorithms.auxiliary_balanced.ABC") == (
        "hpdist.algorithms.addons.auxiliary_balanced.ABC"
    )
    for same in ("hpdist.algorithms.fixmatch.FixMatch", "own.module.Thing"):
        assert current_name(same) == same


def test_an_old_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpdist.data.digits", str(tmp_path / "digits")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "digits").iterdir())
