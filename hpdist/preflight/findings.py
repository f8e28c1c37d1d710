"""The outcome of a check, and the table of all outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "FAILED"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    verdict: Verdict
    text: str


def table(findings: Sequence[Finding]) -> str:
    """Format the findings, a line each; further lines are indented."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        first, *rest = finding.text.splitlines()
        lines.append(f"{finding.verdict:6}  {finding.check:{width}}  {first}")
        lines += [" " * (width + 10) + line for line in rest]
    return "\n".join(lines)
