"""The one engine of this process: made when first needed, closed at exit, dropped in a forked child."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from presort.config import KeySource, Settings, load
from presort.context import current_run
from presort.engine import Engine
from presort.errors import ClosedError, ConfigurationError
from presort.store import Store, default_url
from presort.store.base import JobView, QueueView

_FORK_SECONDS = 5.0

_lock = threading.RLock()
_beginning = threading.Lock()
_settings: Settings | None = None
_engine: Engine | None = None
_exiting = False
_held = False


def configure(*, keys: KeySource | Mapping[str, str] | None = None, **settings: Any) -> Settings:
    """Set the configuration of this process: arguments over `PRESORT_…` variables over the file.

    While calls wait for their answers the store stays the same; everything else counts for what comes next, keys at
    once.

    Args:
        keys: A function (provider, account) -> key, or a mapping from provider names to keys. Held in memory only.
        **settings: `store`, `account`, `batching={…}`, `caching={…}`, `http={…}`, `reconcile_window_seconds`,
            `replay_seconds`, `lease_seconds`.

    Raises:
        ConfigurationError: A name or value is wrong, or another store was named while work runs.
    """
    global _settings  # noqa: PLW0603 - process-wide on purpose: hosts build a new model object for each call
    new = load(keys, **settings)
    with _lock:
        if _engine is not None and not _engine.busy:
            close()
        elif _engine is not None:
            if store_url(new.store) != store_url(_engine.settings.store):
                raise ConfigurationError(
                    f"work is running on the store `{_engine.store.location}`; call `presort.drain()` and "
                    "`presort.close()` before `presort.configure(…)` with another one"
                )
            _engine.reconfigure(new)
        _settings = new
    return new


def settings() -> Settings:
    """Return the configuration of this process, reading it if nobody has."""
    global _settings  # noqa: PLW0603
    with _lock:
        if _settings is None:
            _settings = load()
        return _settings


def engine() -> Engine:
    """Return the engine, starting it if need be.

    Raises:
        StoreError: The store cannot be used.
        ConfigurationError: The configuration is wrong.
        ClosedError: The interpreter is shutting down.
    """
    global _engine  # noqa: PLW0603
    with _lock:
        if _exiting:
            raise ClosedError("the interpreter is shutting down")
        if _engine is None or _engine.closed:
            chosen = settings()
            _engine = Engine(chosen, Store.open(store_url(chosen.store)))
        return _engine


def started() -> bool:
    """Whether the engine runs, so that `engine` returns at once."""
    return _engine is not None and not _engine.closed


def begin() -> None:
    """Start the engine in the background if it does not run; what goes wrong shows when it is needed."""
    if started() or _exiting or not _beginning.acquire(blocking=False):
        return

    def start() -> None:
        try:
            with contextlib.suppress(Exception):
                engine()
        finally:
            _beginning.release()

    threading.Thread(target=start, name="presort-start", daemon=True).start()


def store_url(store: str | None) -> str:
    """Turn the `store` setting into an SQLAlchemy URL: a plain path is a SQLite file."""
    if store is None:
        return default_url()
    return str(store) if "://" in store else f"sqlite:///{os.path.abspath(os.path.expanduser(store))}"  # noqa: PTH100, PTH111


def flush() -> None:
    """Send what accumulates now, without waiting for more."""
    if _engine is not None:
        _engine.flush()


def drain(timeout_seconds: float | None = None) -> bool:
    """Flush, then wait until no call of this process waits for a batch; `False` if time ran out first."""
    return _engine.drain(timeout_seconds) if _engine is not None else True


def close() -> None:
    """Stop the engine. Work in flight stays in the store; the next process goes on with it."""
    global _engine
    with _lock:
        running, _engine = _engine, None
    if running is not None:
        running.close()


def jobs(*, all_jobs: bool = False) -> tuple[list[JobView], list[QueueView]]:
    """Return the jobs in the store, and what is queued without one."""
    return engine().jobs(all_jobs=all_jobs)


def finish_run(name: str) -> None:
    """Finish a named run: its answers are deleted, and the same name starts anew next time."""
    engine().finish_run(name)
    session = current_run()
    if session is not None and session.name == name:
        session.restart()


def _at_exit() -> None:
    global _engine, _exiting  # noqa: PLW0603
    _exiting = True
    running, _engine = _engine, None
    if running is None:
        return
    # a thread that still waits ends as the interpreter does: without a word. One with a loop is to see its tasks
    # cancelled; only the name of that is not among those that threads may end with in silence.
    loud = threading.excepthook
    threading.excepthook = lambda args: None if args.exc_type is _Exiting else loud(args)
    running.close(error=SystemExit, in_loops=_Exiting)


class _Exiting(asyncio.CancelledError):
    """What parked calls on event loops get when the interpreter ends."""


def _before_fork() -> None:
    """Wait until no other thread is just opening the store: a child must not inherit its connections."""
    global _held  # noqa: PLW0603
    _held = _lock.acquire(timeout=_FORK_SECONDS)


def _after_fork_in_parent() -> None:
    if _held:
        _lock.release()


def _after_fork_in_child() -> None:
    """The parent's threads, sockets and database connections are not ours."""
    global _beginning, _engine, _lock  # noqa: PLW0603
    _lock = threading.RLock()
    _beginning = threading.Lock()
    _engine = None


def _register(hook: Callable[[], None]) -> None:
    # before the interpreter joins threads that wait for us; `atexit` runs after it has joined them
    register = getattr(threading, "_register_atexit", None)
    if register is None:
        atexit.register(hook)
        return
    with contextlib.suppress(RuntimeError):
        register(hook)


_register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
