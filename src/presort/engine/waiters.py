"""Who waits for which outcome in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from presort.request import Outcome

Listener = Callable[[str, Outcome], None]
"""Called once, on the engine's loop, with the request id and its outcome."""


class Waiters:
    """Listeners by request id. Used on the engine's loop only."""

    def __init__(self) -> None:
        self._listeners: dict[str, list[Listener]] = {}

    def __len__(self) -> int:
        return len(self._listeners)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._listeners

    def add(self, request_id: str, listener: Listener) -> None:
        """Wait for a request."""
        self._listeners.setdefault(request_id, []).append(listener)

    def discard(self, request_id: str, listener: Listener) -> bool:
        """Stop waiting; return whether nobody else waits for the request."""
        listeners = self._listeners.get(request_id, [])
        if listener in listeners:
            listeners.remove(listener)
        if listeners:
            return False
        self._listeners.pop(request_id, None)
        return True

    def ids(self) -> list[str]:
        """Return the requests somebody waits for."""
        return list(self._listeners)

    def deliver(self, outcomes: Mapping[str, Outcome]) -> None:
        """Tell and forget the listeners of settled requests."""
        for request_id, outcome in outcomes.items():
            for listener in self._listeners.pop(request_id, ()):
                listener(request_id, outcome)
