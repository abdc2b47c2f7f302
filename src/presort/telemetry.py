"""The logger, and warnings that do not flood.

presort logs under `presort` and configures nothing: a library is a guest.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict

logger = logging.getLogger("presort")
logger.addHandler(logging.NullHandler())

QUIET_SECONDS = 60.0
"""Of one cause there is at most one warning in this time."""

MOST_CAUSES = 1_000
"""Causes that are remembered at once: they hold job ids, and a process may live for months."""

_lock = threading.Lock()
_last: OrderedDict[str, tuple[float, int]] = OrderedDict()
"""When each cause was last warned of, and how often it was held back since; oldest first."""


def warn(cause: str, message: str) -> None:
    """Log a warning, at most once a minute per cause; the next one tells how many were held back."""
    now = time.monotonic()
    with _lock:
        at, held = _last.get(cause, (-QUIET_SECONDS, 0))
        if now - at < QUIET_SECONDS:
            _last[cause] = (at, held + 1)
            return
        _last[cause] = (now, 0)
        _last.move_to_end(cause)
        if len(_last) > MOST_CAUSES:
            _last.popitem(last=False)
    if held:
        message = f"{message} (and {held} more like it since the last warning)"
    logger.warning("%s", message)


def fell_back(reason: str, count: int = 1) -> None:
    """Warn that requests leave the batch route."""
    noun = "request" if count == 1 else "requests"
    warn(f"fallback:{reason}", f"Falling back to standard API: {reason} ({count} {noun})")


def _after_fork() -> None:
    """In a child: whoever held the lock has stayed behind."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
