"""Checkpoint folders and models of the Hub: errors of `transformers` in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hpdist.errors import ConfigError

PREFIX = "hf:"
_LENGTH = 300


def require_transformers(setting: str) -> Any:
    """Import `transformers`; raises ConfigError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"{setting} needs transformers, which cannot be imported ({error}); "
            "pip install 'hpdist[text]'"
        ) from error
    found: Any = transformers
    found.utils.logging.disable_progress_bar()
    return found


@contextmanager
def checkpoint_folder(path: str, setting: str) -> Iterator[str]:
    """Check a folder or an id of the Hub and return it; errors inside become ConfigErrors."""
    place = os.path.expanduser(path)
    local = os.path.isdir(place)
    if not local and path.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"{setting}: there is no folder {path!r}")
    if local and not os.path.isfile(os.path.join(place, "config.json")):
        raise ConfigError(
            f"{setting}: folder {path!r} holds no config.json, so it is no Hugging Face model"
        )
    try:
        yield place if local else path
    except ConfigError:
        raise
    except Exception as error:  # every file format and transport has its own errors
        raise ConfigError(f"{setting}: {_message(path, local, error)}") from error


def _message(path: str, local: bool, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return f"{path!r} contains Python code, which only runs with model.trust_remote_code: true"
    reason = text if len(text) <= _LENGTH else text[: _LENGTH - 1] + "…"
    if local:
        return f"folder {path!r} cannot be used: {reason}"
    if isinstance(error, OSError):
        return (
            f"{path!r} is no folder here, and the Hub did not give it: {reason}; check spelling, "
            "the network and, for a gated model, `hf auth login`"
        )
    return f"{path!r} cannot be used: {reason}"
