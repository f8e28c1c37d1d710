"""A config names modules of the user's; whoever only looks at one does not run them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from hpdist.cli import main
from hpdist.errors import ConfigError
from hpdist.train.config import load
from tests.support.parquet_files import write_numbers

MODULE = """
from pathlib import Path
Path("it-ran").touch()
raise RuntimeError("the module ran")
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_numbers(tmp_path / "data", [[8]])
    files = {"path": "parquet", "data_files": str(tmp_path / "data/*.parquet"), "input": "x"}
    (tmp_path / "strangers.py").write_text(MODULE)
    settings = {
        "model": {"name": "python:strangers:model", "args": {"width": 3}},
        "algorithm": {"name": "python:strangers:Algorithm", "margin": 0.5},
        "addons": [{"name": "python:strangers:Addon"}],
        "views": {"name": "python:strangers:Views"},
        "task": {"name": "python:strangers:Task", "cutoff": 0.5},
        "data": {
            "labeled": files,
            "unlabeled": {**files, "streaming": True, "filter": "python:strangers:keep"},
        },
        "batch": {"labeled": 4, "unlabeled": 4},
        "steps": 1,
        "tracker": {"name": "none"},
        "run": {"dir": str(tmp_path / "runs")},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "c.yaml"


def test_the_config_is_printed_as_it_is_given(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["algorithm"] == {"name": "python:strangers:Algorithm", "margin": 0.5}
    assert printed["task"] == {"name": "python:strangers:Task", "cutoff": 0.5}
    assert printed["model"] == {"name": "python:strangers:model", "args": {"width": 3}}
    assert printed["data"]["unlabeled"]["filter"] == "python:strangers:keep"
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("command", [["preflight"], ["convert", "--out", "rows"]])
def test_commands_that_build_no_model_run_no_module(config: Path, command: list[str]) -> None:
    name, *more = command
    assert main([name, str(config), *more]) == 0
    assert not Path("it-ran").exists()


def test_training_runs_it(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "--dry-run"]) == 2
    assert "the module ran" in capsys.readouterr().err
    assert Path("it-ran").exists()


def test_a_name_that_can_name_nothing_is_refused_all_the_same(config: Path) -> None:
    for run_code in (True, False):
        with pytest.raises(ConfigError, match="must read python:package"):
            load(config, ["--algorithm.name", "python:strangers"], run_code=run_code)
    assert load(config, run_code=False).run.name == "c"


class Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("it-ran"),))


@pytest.mark.parametrize("command", [["preflight"], ["convert", "--out", "rows"], ["train"]])
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_data_are_no_code(
    config: Path, command: list[str], streaming: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The builder of `datasets` for pandas unpickles its files."""
    Path("a.pkl").write_bytes(pickle.dumps(Harm()))
    given = [f"--data.unlabeled={{path: pandas, data_files: a.pkl, streaming: {streaming}}}"]
    given += ["--algorithm={name: fixmatch}", "--model={name: mlp}", "--views={name: identity}"]
    given += ["--task={name: classification}"]
    name, *more = command
    assert main([name, str(config), *more, *given, "--addons=[]"]) in (2, 3)
    assert not Path("it-ran").exists()
    assert "pandas reads pickles" in "".join(capfd.readouterr())
