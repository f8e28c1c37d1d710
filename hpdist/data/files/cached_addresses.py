"""Takes secrets out of the addresses that `datasets` notes down in its cache.

`datasets` keeps the URL of every file that it has downloaded, the password or signature with it, in
a note beside the download.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import datasets

from hpdist.messages.redaction import redacted, redacted_text


def redact_cached_addresses(addresses: Iterable[str]) -> None:
    """Rewrite what `datasets` has noted, where one of the addresses has a secret.

    The notes are for people: it finds downloads by hashes. A cache that cannot be written stays as
    it is.
    """
    if all(redacted(address) == address for address in addresses):
        return
    for note in Path(datasets.config.DOWNLOADED_DATASETS_PATH).glob("*.json"):
        with suppress(OSError, UnicodeDecodeError):  # another process's, or none of `datasets`
            _redact(note)


def _redact(note: Path) -> None:
    text = note.read_text(encoding="utf-8")
    clean = redacted_text(text)
    if clean != text:
        temporary = note.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(clean, encoding="utf-8")
        os.replace(temporary, note)
