"""What an HTTP status says of a request: to be repeated, or final."""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

from hpdist.data.files.retry import Failed, FileLostError

_BUSY = (408, 425, 429)


def failure_of_status(path: str, status: int, headers: Any) -> Exception:
    """Make the error for a status: Failed where a later request may succeed, else final."""
    if status in _BUSY or status >= 500:
        return Failed(f"HTTP {status}", _asked_to_wait(headers))
    hint = {401: ": it asks for a login or a token", 403: ": no permission"}.get(status, "")
    return FileLostError(path, f"HTTP {status}{hint}")


def _asked_to_wait(headers: Any) -> float:
    """Seconds from Retry-After, or from the Hub's own header."""
    after = headers.get("retry-after", "").strip()
    if after.isdecimal():
        return float(after)
    if after:
        try:
            return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
        except ValueError:
            return 0.0
    found = re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("ratelimit", ""))
    return float(found[1]) if found else 0.0
