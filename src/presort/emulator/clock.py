"""The emulator's clock: the wall clock plus an offset that can be moved.

The offset is a setting like any other, so it survives a restart.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from presort.emulator.state import State


class Clock:
    """Time as every vendor object sees it."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._offset = float(state.setting("clock_offset_seconds", 0.0))

    @property
    def offset_seconds(self) -> float:
        """How far the clock runs ahead of the wall clock."""
        return self._offset

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time() + self._offset

    def advance(self, seconds: float) -> None:
        """Move the clock; 86400 lets a whole batch window pass at once."""
        self._offset += seconds
        self._state.set_setting("clock_offset_seconds", self._offset)


def rfc3339(seconds: float) -> str:
    """Write a time as Anthropic does."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
