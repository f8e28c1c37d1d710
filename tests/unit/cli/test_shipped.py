"""Configs that come with hpdist are found by name from any folder; a local file wins."""

import os
from pathlib import Path

import pytest
import yaml

from hpdist import cli
from hpdist.cli.shipped import copy_shipped, find_config, list_configs, shipped
from hpdist.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_name_is_a_shipped_config_unless_a_file_is_called_so(tmp_path):
    assert find_config("digits") == shipped("configs") / "digits.yaml"
    (tmp_path / "digits").mkdir()
    assert find_config("digits") == shipped("configs") / "digits.yaml"
    assert find_config("digits.yaml") == Path("digits.yaml")  # a path, there or not
    assert find_config("./digits") == Path("./digits")
    (tmp_path / "imdb_softmatch").write_text("steps: 1\n")
    assert find_config("imdb_softmatch") == Path("imdb_softmatch")


def test_a_name_of_neither_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        find_config("digit")


def test_the_command_says_which_file_a_name_stands_for(capsys):
    assert cli.main(["train", "digits", "--print-config", "--steps=7"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"config digits: {shipped('configs') / 'digits.yaml'}; ")
    assert yaml.safe_load(out)["steps"] == 7
    assert yaml.safe_load(out)["run"]["name"] == "digits"


def test_every_config_is_listed_with_its_first_line(capsys):
    assert cli.main(["configs"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
    assert all(len(line.split()) > 3 for line in list_configs())


def test_copies_follow_the_umask_and_overwrite_nothing(tmp_path):
    before = os.umask(0o027)
    try:
        written = copy_shipped(tmp_path)
    finally:
        os.umask(before)
    assert tmp_path / "configs" / "accelerate" / "zero2_fp16.yaml" in written
    assert (tmp_path / "configs" / "digits.yaml").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "launch" / "hosts.sh").stat().st_mode & 0o777 == 0o750
    assert copy_shipped(tmp_path) == []
    (tmp_path / "configs" / "digits.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"digits\.yaml' exists and differs"):
        copy_shipped(tmp_path)
    assert (tmp_path / "configs" / "digits.yaml").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "configs").write_text("a file")
    with pytest.raises(ConfigError, match="cannot copy into"):
        copy_shipped(tmp_path)
