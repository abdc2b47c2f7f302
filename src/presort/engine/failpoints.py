"""Named places at which a test may kill the process: one at every durable step of every loop."""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None
"""Called with the name of each place that is reached; set by test drivers only."""


def reach(name: str) -> None:
    """Tell the hook, if there is one, that the engine has come to a named place."""
    if hook is not None:
        hook(name)
