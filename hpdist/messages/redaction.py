"""Keeps passwords, tokens and signatures out of what is written, logged or shown.

    redacted_text("cannot read https://me:secret@host/a.parquet?sig=abc")
    # cannot read https://REDACTED@host/a.parquet?REDACTED

One set of rules for everything: errors (`HpdistError` applies it to its message and its causes),
settings in run folders and trackers, log lines and warnings (`redact_log_lines`,
`redact_output`). A URL loses its user, password and whole query, as the names of signature
parameters vary.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

MARK = "REDACTED"

# One URL, or a chain of them (zip://a::https://host/b.zip), within a text. A user and password may
# hold quotes, and in practice slashes too, so they reach up to the last @.
_SCHEME = r"[A-Za-z0-9+.-]+"
_URL = re.compile(
    rf"(?<![A-Za-z0-9+.-]){_SCHEME}://"
    r"(?:[^\s/?#@:]*:(?!\d*[/?#'\"])[^\s@]*@|[^\s/?#]*@)?[^\s'\"<>]*"
)
_LINK = re.compile(rf"::(?={_SCHEME}(?:://|::|$)|/)")
_PARTS = re.compile(rf"({_SCHEME}://)([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", re.DOTALL)
_PORT = re.compile(r"(?:[^:@\[\]]*|\[[^\]]*\])(?::\d*)?")
_HUB = "hf://"  # where @ marks a revision
_HERE = ("file://", "local://")  # names there may have any character
_ENDS = ":;,.)]}"  # punctuation that may follow a URL

_NAMES = (  # of settings, headers and parameters with secret values
    r"(?:aws|azure|gcp|google|gs|s3|x|amz|goog|hf|hub|api|auth|access|client|account|session|security|"
    r"shared|secret|private|bearer|refresh|id|use|sas|storage|user|db|my|our)"
)
_SECRET_NAME = re.compile(
    rf"(?:{_NAMES}[_-]?){{0,4}}(?:token|secret|password|passwd|passphrase|pwd|signature|credentials?|"
    r"authorization|connection[_-]?string|(?:api|access|account|private|secret|storage|shared)"
    r"[_-]?(?:access[_-]?)?key(?:[_-]?id)?)",
    re.IGNORECASE,
)
_NAMED = re.compile(
    rf"\b({_SECRET_NAME.pattern})(['\"]?\s*(?:=|:\s|:(?=['\"]))\s*['\"]?)"
    r"((?:Basic|Bearer|Token|Digest)\s+)?([^\s'\",;&<>()]+)",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{10,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\beyJ[\w-]{10,}\.[\w-]+\.[\w-]*|(?<=Bearer )[^\s'\"]+"
)


def redacted(path: str) -> str:
    """Strip a path or URL, or a chain of URLs, of user, password, query and token."""
    if "://" not in path:
        return path
    return _TOKEN.sub(MARK, "::".join(map(_redacted_url, _LINK.split(path))))


def redacted_text(text: str) -> str:
    """Strip a text of the secrets in its URLs, of tokens, and of values with a secret's name."""
    if "://" in text:
        text = _URL.sub(_within, text)
    return _TOKEN.sub(MARK, _NAMED.sub(_without_value, text))


def redacted_settings(value: Any, name: str = "") -> Any:
    """Copy nested settings, without secrets in their texts or under a secret's name."""
    if isinstance(value, Mapping):
        return {key: redacted_settings(part, str(key)) for key, part in value.items()}
    if isinstance(value, str):
        return MARK if value and _SECRET_NAME.fullmatch(name) else redacted_text(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [redacted_settings(part, name) for part in value]
    return value


def redacted_parts(value: Any, path: str = "") -> list[str]:
    """Dotted names of the settings in which `redacted_settings` has replaced something."""
    if isinstance(value, Mapping):
        items = [(f"{path}.{key}" if path else str(key), part) for key, part in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        items = [(path, part) for part in value]
    else:
        return [path] if isinstance(value, str) and _REDACTED.search(value) else []
    found = [name for key, part in items for name in redacted_parts(part, key)]
    return list(dict.fromkeys(found))


_REDACTED = re.compile(rf"(?:^|[/:?#=\s]){MARK}(?:$|[@/\s:;&])")


def _within(found: re.Match[str]) -> str:
    """Redact a URL in a text; punctuation after it stays."""
    url = found[0].rstrip(_ENDS)
    return redacted(url) + found[0][len(url) :]


def _redacted_url(url: str) -> str:
    found = _PARTS.fullmatch(url)
    if found is None:
        return url
    scheme, host, path, query, fragment = (part or "" for part in found.groups())
    if scheme.lower() in _HERE:
        return url
    if scheme.lower() != _HUB:
        at = host.rfind("@")
        if at >= 0:
            host = f"{MARK}@{host[at + 1 :]}"
        elif not _PORT.fullmatch(host):  # a password with a slash in it, or a truncated one
            slash_at = path.rfind("@")
            host, path = (f"{MARK}@", path[slash_at + 1 :]) if slash_at >= 0 else (MARK, path)
    return f"{scheme}{host}{path}{f'?{MARK}' * bool(query)}{f'#{MARK}' * bool(fragment)}"


def _without_value(found: re.Match[str]) -> str:
    name, between, kind, value = found.groups()
    return found[0] if value == MARK else f"{name}{between}{kind or ''}{MARK}"


def redact_error(error: BaseException | None) -> None:
    """Remove the secrets from an error and from its causes, in place.

    Errors keep their types and tracebacks. Python prints the whole chain of an uncaught error.
    """
    rest: list[BaseException | None] = [error]
    visited: set[int] = set()
    while rest:
        one = rest.pop()
        if one is None or id(one) in visited:
            continue
        visited.add(id(one))
        rest += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        _redact_one(one)


@contextmanager
def redacted_errors() -> Iterator[None]:
    """Remove secrets from errors that leave; also a decorator of what users call."""
    try:
        yield
    except BaseException as error:
        redact_error(error)
        raise


_WORDED = ("filename", "filename2", "strerror", "msg", "text", "name", "path", "__notes__")
"""Attributes that Python's own errors print, beside their arguments."""


def _redact_one(error: BaseException) -> None:
    if _holds_no_secret(error):
        return
    with suppress(Exception):
        error.args = tuple(redacted_settings(list(error.args)))
    for name in _WORDED if type(error).__module__ == "builtins" else ("__notes__",):
        with suppress(Exception):
            value = getattr(error, name)
            if redacted_settings(value) != value:
                setattr(error, name, redacted_settings(value))
    if _holds_no_secret(error):
        return
    # Its class prints something else: replace it by a class of the same name with fixed text.
    kind, text, shown = type(error), redacted_text(str(error)), redacted_text(repr(error))
    own: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__slots__": (),
        "__str__": lambda _: text,
        "__repr__": lambda _: shown,
        "__reduce__": lambda _: (
            RuntimeError,
            (shown,),
        ),  # another process does not know this class
    }
    with suppress(TypeError):
        error.__class__ = cast(Any, type(kind.__name__, (kind,), own))


def _holds_no_secret(error: BaseException) -> bool:
    try:
        text = "\n".join([str(error), repr(error), *getattr(error, "__notes__", ())])
    except Exception:  # then Python cannot print it either
        return True
    return redacted_text(text) == text


class RedactingFilter(logging.Filter):
    """Keeps secrets out of the lines of a logger, and out of the errors that they come with."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every line pass, without its secrets."""
        record.msg, record.args = redacted_text(record.getMessage()), ()
        if isinstance(record.exc_info, tuple):
            redact_error(record.exc_info[1])
            if record.exc_text is None and record.exc_info[0] is not None:
                # Formatters use this as the traceback if it is set.
                record.exc_text = redacted_text(_lines(*record.exc_info).rstrip("\n"))
        return True


_READERS = (
    *("hpdist", "asyncio", "aiohttp", "httpx", "httpcore", "urllib3", "requests", "fsspec"),
    *("s3fs", "botocore", "aiobotocore", "gcsfs", "adlfs", "azure", "ossfs"),
    *("datasets", "huggingface_hub", "wandb", "mlflow"),
)
"""Packages whose log lines may hold addresses or redirects of data that hpdist reads."""

_logs = ""  # the loggers that are redacted: those of the readers, or all
_hooked = False


def redact_log_lines(everybody: bool = False) -> None:
    """Redact the log lines of the packages that read data from now on.

    Reading data calls it, in any program; `everybody` is for hpdist's own process.
    """
    global _logs
    if not _logs:
        make = logging.getLogRecordFactory()

        def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
            made = make(*args, **kwargs)
            if _logs == "all" or made.name.partition(".")[0] in _READERS:
                RedactingFilter().filter(made)
            return made

        logging.setLogRecordFactory(record)
        _logs = "readers"
    if everybody:
        _logs = "all"


def redact_output() -> None:
    """Redact this process's log lines, warnings and tracebacks from now on.

    Libraries word their own, so they are redacted at their source. The command line calls it.
    """
    global _hooked
    redact_log_lines(everybody=True)
    if _hooked:
        return
    _hooked = True
    word = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: redacted_text(word(*args, **kwargs))
    if sys.excepthook is sys.__excepthook__:  # else somebody else prints them
        sys.excepthook = _print_error
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda args: _print_error(
            args.exc_type, args.exc_value, args.exc_traceback
        )
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _print_ignored


def _print_error(kind: Any, error: BaseException | None, trace: Any) -> None:
    print(redacted_text(_lines(kind, error, trace)), end="", file=sys.stderr, flush=True)


def _print_ignored(ignored: Any) -> None:
    """Print an error that Python cannot raise, such as one in a `__del__`."""
    print(f"Exception ignored in: {redacted_text(repr(ignored.object))}", file=sys.stderr)
    _print_error(ignored.exc_type, ignored.exc_value, ignored.exc_traceback)


def _lines(kind: Any, error: BaseException | None, trace: Any) -> str:
    return "".join(traceback.format_exception(kind, error, trace))
