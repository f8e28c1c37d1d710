import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from hpdist import cli
from hpdist.cli import output
from hpdist.cli.output import report_error
from hpdist.errors import ConfigError, DataError, DistributedError, PrecisionError
from hpdist.train.config import load
from hpdist.version import __version__

CONFIG = """
model: {name: cnn}
data:
  labeled: {path: parquet, data_files: train.parquet}
algorithm: {name: supervised}
steps: 100
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "digits.yaml"
    path.write_text(CONFIG)
    return str(path)


def refusal(capsys, *arguments: str) -> str:
    """Run a command that the user got wrong; the one line that it says."""
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    return line.removeprefix("hpdist: ConfigError: ")


def test_print_config_prints_yaml_that_gives_the_same_config(config, tmp_path, capsys):
    assert cli.main(["train", "--optim.lr", "1e-3", config, "--print-config"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    values = yaml.safe_load(output.out)
    assert list(values)[:3] == ["run", "model", "data"]
    assert values["optim"]["lr"] == 0.001
    again = tmp_path / "again.yaml"
    again.write_text(output.out)
    assert load(again) == load(config, ["--optim.lr", "1e-3"])


def test_print_schema_needs_no_config(capsys):
    assert cli.main(["train", "--print-schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "RunConfig"


@pytest.mark.parametrize("flag", ["--print-config", "--print-schema"])
def test_only_the_main_rank_prints(config, flag, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", config, flag]) == 0
    assert cli.main(["train", config, "--optim.lr=-1"]) == 2
    assert cli.main(["nothing"]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see `hpdist --help`"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        (["algorithms", "--all"], "unrecognized arguments: --all"),
        (["train"], "train needs a config file: hpdist train CONFIG [--key.sub value ...]"),
        (["train", "--steps", "5"], "train needs a config file"),
        (["train", "a.yaml", "b.yaml"], "unrecognized arguments: b.yaml"),
        (["train", "a.yaml"], "cannot read the config 'a.yaml': No such file or directory"),
        (["train", "."], "cannot read the config '.': Is a directory"),
        (
            ["train", "--dryrun", "a.yaml"],
            "--dryrun: no option or setting, did you mean 'dry-run'?",
        ),
        (["train", "a.yaml", "--optm.lr=1"], "--optm: no option or setting, did you mean 'optim'?"),
    ],
)
def test_a_wrong_command_is_one_clear_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, *arguments).startswith(message)


def test_a_wrong_setting_is_one_clear_line(config, capsys):
    line = refusal(capsys, "train", config, "--optim.lr", "-1")
    assert line == f"{config}: --optim.lr: must be greater than 0, not -1"
    assert refusal(capsys, "train", config, "--steps", "--dry-run") == "--steps needs a value"


def test_help_says_how_overrides_work(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "hpdist train configs/digits.yaml --algorithm.name freematch --optim.lr 0.01" in text
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "accelerate launch" in capsys.readouterr().out


def test_every_flag_of_train_is_known_where_overrides_are_split_off(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    words = capsys.readouterr().out.partition("options:")[2].partition("\n\n")[0].split()
    assert {word for word in words if word.startswith("--")} == set(cli.train.OWN_OPTIONS)


def test_version_and_module():
    result = subprocess.run(
        [sys.executable, "-m", "hpdist", "--version"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, f"hpdist {__version__}\n")
    result = subprocess.run([sys.executable, "-m", "hpdist"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("hpdist: ConfigError: ")


def test_exit_statuses():
    assert [error.exit_status for error in (ConfigError, DataError)] == [2, 2]
    assert [error.exit_status for error in (PrecisionError, DistributedError)] == [3, 3]


def test_what_one_rank_knows_that_rank_says(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    error = DataError("row 7 is damaged")
    report_error(error)
    assert capsys.readouterr().err == ""
    error.rank = 3
    report_error(error)
    assert capsys.readouterr().err == "hpdist: rank 3: DataError: row 7 is damaged\n"
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    error.rank = 0
    report_error(error)
    assert capsys.readouterr().err == "hpdist: DataError: row 7 is damaged\n"


def test_a_warning_says_whose_it_is(monkeypatch):
    code = (
        "import warnings; from hpdist.cli.output import begin_warnings; "
        "begin_warnings(); warnings.warn('a row is bad')"
    )
    for ranks, told in (("4", "rank 3: <string>:1: UserWarning: a row is bad"), ("1", "<string>")):
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("WORLD_SIZE", ranks)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stderr.startswith(told)


def test_a_warning_of_hpdists_own_is_its_sentence(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("WORLD_SIZE", "1")
    output.begin_warnings()
    told = warnings.formatwarning
    assert told("look for a detach()", UserWarning, output.__file__, 1) == (
        "warning: look for a detach()\n"
    )
    gone = told("soon gone", DeprecationWarning, output.__file__, 1)
    assert "DeprecationWarning: soon gone" in gone
    assert "UserWarning: not ours" in told("not ours", UserWarning, "elsewhere.py", 1)
