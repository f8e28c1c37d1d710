"""The pages for readers: their blocks of code, their links, and what a link may lead to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
"""The pages whose commands are run."""
PAGES = sorted({*GUIDES, *ROOT.glob("*.md"), *(ROOT / "tests/benchmarks/results").glob("*.md")})
"""All pages."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that it is to be written to, which its first line names."""
        named = re.match(r"# (\S+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


def name_of(page: Path) -> str:
    """Return a page's path from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


@cache
def read(page: Path) -> str:
    """Return a page's text."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    """Return a page's fenced blocks."""
    return [Block(language, text) for language, text in _FENCE.findall(read(page))]


def files() -> dict[str, str]:
    """Return every file that a page tells its reader to write, by name."""
    named = [(block.file, block.text) for page in GUIDES for block in blocks(page)]
    return {file: text for file, text in named if file}


def prose(page: Path) -> str:
    """Return a page's text without its fenced blocks."""
    return _FENCE.sub("", read(page))


def inline_code(page: Path) -> list[str]:
    """Return what a page's prose sets in backticks."""
    return [code.strip("`") for code in _CODE.findall(prose(page).replace("\n", " "))]


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and pictures."""
    return _LINK.findall(_CODE.sub("", prose(page)))


@cache
def anchors(page: Path) -> set[str]:
    """Return what a link into a page may lead to, by GitHub's rule for headings."""
    found: dict[str, int] = {}
    result = set()
    for heading in _HEADING.findall(prose(page)):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        again = found.get(slug, 0)
        found[slug] = again + 1
        result.add(f"{slug}-{again}" if again else slug)
    return result
