"""What the caller asked for: the route, the deadline, the group and the run, in context variables."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

from presort.config import Batching
from presort.engine import Group, Run
from presort.errors import ConfigurationError
from presort.request import Route

_RUN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Wish:
    """A route that was asked for, and by whom."""

    route: Route
    deadline_seconds: float | None = None
    """`None` takes `batching.deadline_seconds`."""
    owner: object | None = None
    """The wrapped object it holds for; `None` is every one below."""
    ticket: Ticket | None = None
    """The call's place in a group; `None` is a call that trickles in."""
    batching: Batching | None = None
    """`None` takes the process's."""


class Ticket:
    """One call's place in a group that knows its size: taken when the call is handed in, else given back. Once.

    A call may reach the transport more than once, when an SDK retries, or not at all: it failed before, or a cache
    answered it. Whoever starts the call gives the ticket back when the call has ended; whichever comes first counts.
    """

    def __init__(self, group: Group, on_taken: Callable[[], None] | None = None) -> None:
        self._group: Group | None = group
        self._on_taken = on_taken
        self._lock = threading.Lock()

    def take(self) -> Group | None:
        """Return the group the call is handed in with; `None` if it was, or never will be."""
        group = self._end()
        if group is not None and self._on_taken is not None:
            self._on_taken()
        return group

    def give_back(self) -> None:
        """Count the call out of its group, unless it was handed in."""
        group = self._end()
        if group is not None:
            group.leave()

    def _end(self) -> Group | None:
        with self._lock:
            group, self._group = self._group, None
        return group


_wish: ContextVar[Wish | None] = ContextVar("presort_wish", default=None)
_run: ContextVar[Run | None] = ContextVar("presort_run", default=None)


@contextmanager
def batch(*, deadline: float | None = None) -> Iterator[None]:
    """Send every call below by the batch route where its vendor, the configuration and the call allow.

    Args:
        deadline: Seconds from each call until its answer must be there; then the standard route takes over.

    Example:
        >>> with presort.batch(deadline=6 * 3600):
        ...     answers = chain.map().invoke(documents)
    """
    if deadline is not None and not deadline > 0:
        raise ConfigurationError(f"`deadline` must be a positive number of seconds, got {deadline!r}")
    with asked(Wish(Route.BATCH, deadline)):
        yield


@contextmanager
def urgent() -> Iterator[None]:
    """Send every call below by the standard route, at once, whatever was asked for outside."""
    with asked(Wish(Route.STANDARD)):
        yield


@contextmanager
def run(name: str) -> Iterator[None]:
    """Name the run that calls below belong to.

    Answers of a named run are replayed if the program is run again, until `finish_run(name)` or `replay_seconds`.
    Equal calls are matched by count: the third one gets the third one's answer.
    """
    token = _run.set(_named(name))
    try:
        yield
    finally:
        _run.reset(token)


@contextmanager
def asked(wish: Wish) -> Iterator[None]:
    """Set the wish for calls below."""
    token = _wish.set(wish)
    try:
        yield
    finally:
        _wish.reset(token)


def wish_for(owner: object | None) -> Wish | None:
    """Return what was asked for calls of a wrapped object, or `None`: a wish of another object does not count."""
    wish = _wish.get()
    if wish is None or (wish.owner is not None and wish.owner is not owner):
        return None
    return wish


def current_wish() -> Wish | None:
    """Return what was asked for, by whomever."""
    return _wish.get()


def current_run() -> Run | None:
    """Return the run calls belong to now: the context's, else the one `PRESORT_RUN` names."""
    return _run.get() or _environment_run(os.environ.get("PRESORT_RUN"))


@cache
def _environment_run(name: str | None) -> Run | None:
    return _named(name) if name else None


def _named(name: str) -> Run:
    if not 0 < len(name) <= _RUN_CHARACTERS:
        raise ConfigurationError(f"a run's name has 1 to {_RUN_CHARACTERS} characters, got {name!r}")
    return Run(name)
