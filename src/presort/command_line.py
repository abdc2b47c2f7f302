"""What the commands share: settings, exit statuses, and one line for whatever goes wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from presort import emulated
from presort.errors import ConfigurationError, PresortError

if TYPE_CHECKING:
    from presort.config import Settings

NOTHING_DONE = 2
"""Exit status: wrong usage, input or settings, no key; nothing was sent."""

FAILED = 1
"""Exit status: it began and could not end, or no document succeeded."""

INTERRUPTED = 130
TERMINATED = 143

EMULATED_POLL_SECONDS = 0.5
EMULATED_RECONCILE_SECONDS = 10.0
"""The emulator's list of batches never lags, so a lost create is ruled out quickly."""


def configure(batch_size: int | None, deadline: float | None, *, emulate: bool) -> Settings:
    """Set the configuration, the emulated work's own if asked; raises `ConfigurationError`."""
    from presort import runtime

    where = emulated.folder()
    options: dict[str, Any] = {"batching": {}}
    if batch_size is not None:
        options["batching"]["max_batch_requests"] = batch_size
    if deadline is not None:
        options["batching"]["deadline_seconds"] = deadline
    if emulate:
        options["store"] = str(where / "presort.db")
        options["batching"]["poll_interval_seconds"] = EMULATED_POLL_SECONDS
        options["reconcile_window_seconds"] = EMULATED_RECONCILE_SECONDS
        options["account"] = "emulated"
    settings = runtime.configure(**options)
    file = store_file(runtime.store_url(settings.store))
    if not emulate and file is not None and file.resolve().is_relative_to(where.resolve()):
        raise ConfigurationError(
            f"the store {file} is for EMULATED work, and this is real: choose another, or add --emulate"
        )
    return settings


def store_file(url: str) -> Path | None:
    """Return the file of an SQLite store; `None` if the store is a server's."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def print_json(value: Any) -> None:
    """Print a value for programs."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what can go wrong into one line and an exit status."""
    try:
        yield
    except PresortError as error:
        fail(str(error), NOTHING_DONE)
    except KeyboardInterrupt:
        fail("stopped", INTERRUPTED)
    except OSError as error:
        fail(f"{error.strerror or error}{f': `{error.filename}`' if error.filename else ''}", FAILED)


def fail(message: str, status: int) -> NoReturn:
    """Say in one line what went wrong, and end the command."""
    sys.stderr.write(f"presort: {' '.join(message.split())}\n")
    close()
    raise typer.Exit(status)


def close() -> None:
    """Stop the engine, if it was started."""
    if "presort.runtime" in sys.modules:
        sys.modules["presort.runtime"].close()
