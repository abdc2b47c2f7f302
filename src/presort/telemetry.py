"""The logger, and warnings that do not flood.

presort logs under `presort` and configures nothing: a library is a guest.
"""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger("presort")
logger.addHandler(logging.NullHandler())

_QUIET_SECONDS = 60.0
_lock = threading.Lock()
_last: dict[str, tuple[float, int]] = {}


def warn(cause: str, message: str) -> None:
    """Log a warning, at most once a minute per cause; the next one tells how many were held back."""
    now = time.monotonic()
    with _lock:
        at, held = _last.get(cause, (-_QUIET_SECONDS, 0))
        if now - at < _QUIET_SECONDS:
            _last[cause] = (at, held + 1)
            return
        _last[cause] = (now, 0)
    if held:
        message = f"{message} (and {held} more like it in the last minute)"
    logger.warning("%s", message)


def fell_back(reason: str, count: int = 1) -> None:
    """Warn that requests leave the batch route."""
    noun = "request" if count == 1 else "requests"
    warn(f"fallback:{reason}", f"Falling back to standard API: {reason} ({count} {noun})")
