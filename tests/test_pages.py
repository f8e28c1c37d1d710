"""Links, anchors, paths and commands within the text of README and docs lead somewhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from hpdist import cli
from hpdist.train.config import json_schema
from tests.support.documents import (
    GUIDES,
    PAGES,
    ROOT,
    anchors,
    blocks,
    inline_code,
    links,
    name_of,
    read,
)

README = ROOT / "README.md"
MENTIONED = re.compile(r"\bdocs/[\w-]+\.md(?:#[\w-]+)?|\bREADME(?:\.md)?#[\w-]+")
OURS = re.compile(r"(?:docs|hpdist|tests|configs|launch)/[\w./-]*\w")
FILES = (".json", ".safetensors", ".py", ".yaml")  # which begin as a section does
SETTING = re.compile(r"([a-z_]+(?:\.[a-z_0-9]+)+)(?<!\.png)(?<!\.txt)(?::? .*)?$")
TEXTS = [
    path
    for part in ("hpdist", "configs", "launch", "tests")
    for path in sorted((ROOT / part).rglob("*"))
    if path.suffix in (".py", ".yaml", ".json", ".sh", ".sbatch") and path != Path(__file__)
]


def check_target(page: Path, target: str) -> None:
    """Assert that a relative link or anchor leads to something in this repository."""
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.is_relative_to(ROOT.resolve()), f"{target} leaves the repository"
    assert file.exists(), f"{target} does not exist"
    if anchor:
        assert file.suffix == ".md", f"{target}: only pages have anchors"
        assert anchor in anchors(file), f"{target}: no such heading; there are {anchors(file)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in links(page):
        if not re.match(r"https?://", target):
            check_target(page, target)


def test_pages_that_other_files_mention_exist() -> None:
    found = [target for path in TEXTS for target in MENTIONED.findall(read(path))]
    assert found
    for target in found:
        check_target(README, target.replace("README#", "README.md#"))


def test_the_readme_leads_to_every_page_and_every_page_back() -> None:
    assert len(read(README).splitlines()) <= 250
    table = [target for target in links(README) if target.startswith("docs/")]
    assert Counter(table) == Counter(name_of(page) for page in GUIDES if page != README)
    for page in GUIDES:
        if page != README:
            assert "../README.md#where-to-go" in links(page), name_of(page)
            assert page.stem == "glossary" or "glossary.md" in links(page), name_of(page)


def test_every_file_that_a_page_writes_is_written_once() -> None:
    named = Counter(block.file for page in GUIDES for block in blocks(page) if block.file)
    assert set(named.values()) == {1}, named


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_block_is_a_command_a_file_or_an_output(page: Path) -> None:
    fences = [line for line in read(page).splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(blocks(page)), "a fence is indented, or not closed"
    for block in blocks(page):
        assert block.language in ("bash", "python", "yaml", "text"), block.text
        if block.language in ("python", "yaml"):
            assert block.file, f"the block must begin with its file name: {block.text}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_the_text_names_is_there(page: Path) -> None:
    for code in inline_code(page):
        if OURS.fullmatch(code):
            assert (ROOT / code).exists(), code
        check_command(code.split())


@pytest.mark.slow  # for the schema of all settings
@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_settings_that_the_text_names_are_there(page: Path) -> None:
    sections, keys = settings()
    for code in inline_code(page):
        setting = SETTING.match(code.removeprefix("--"))
        if code.endswith(FILES):
            continue
        if setting and setting[1].split(".")[0] in sections:
            assert set(setting[1].split(".")) <= keys, code


@cache
def settings() -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the config's sections, and of all settings in them."""
    schema = json.loads(json_schema())
    return frozenset(schema["properties"]), frozenset(property_names(schema))


def property_names(schema: object) -> Iterator[str]:
    """Yield the names of all properties in a JSON Schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            yield from schema["properties"]
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from property_names(part)


def check_command(words: list[str]) -> None:
    """Assert that a command within a sentence names what there is."""
    if words[:2] == ["pip", "install"]:
        project = read(ROOT / "pyproject.toml")
        extras = re.search(r"\[([\w,]+)\]", words[-1])
        for extra in extras[1].split(",") if extras else []:
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    elif words[:1] == ["make"] and len(words) > 1:
        assert re.search(rf"^{words[1]}:", read(ROOT / "Makefile"), re.MULTILINE), words
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), words
    elif words[:1] == ["python"]:
        assert (ROOT / words[1]).exists(), words
    elif words[:1] == ["hpdist"] and len(words) > 1:
        with pytest.raises(SystemExit) as ended:
            cli.main([words[1], "--help"])
        assert ended.value.code == 0, words
