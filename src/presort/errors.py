"""The errors presort raises, named for what the caller does next.

* PresortError
    x ConfigurationError     a setting is wrong: mend it
    x StoreError             the store cannot be used as it is
        + StoreVersionError  it was written by a newer presort: upgrade
    x InputError             what was handed in cannot be worked on
    x MissingKeyError        no API key: set it
    x MissingExtraError      an optional part is not installed: install it
    x EngineError            the engine cannot take this call here
        + ClosedError        it was closed
        + DeadlockError      a blocking call on the engine's own thread
    x UnansweredError        a request ended without the vendor's answer

A vendor's refusal is never one of these: it reaches the caller as the official client's own exception.
"""

from __future__ import annotations


class PresortError(Exception):
    """Anything presort raises on purpose."""


class ConfigurationError(PresortError, ValueError):
    """A setting is unknown, of the wrong type or out of range; the message names it and the nearest right one."""


class StoreError(PresortError):
    """The store cannot be opened or used: a network file system, a full disk, a damaged or foreign file."""


class StoreVersionError(StoreError):
    """The store was written by a newer version of presort."""


class InputError(PresortError, ValueError):
    """A path, document or payload that was handed in cannot be worked on."""


class MissingKeyError(PresortError):
    """No API key was found where the provider's key is looked for."""


class MissingExtraError(PresortError, ImportError):
    """An optional part of presort is not installed; the message holds the command that installs it."""


class EngineError(PresortError, RuntimeError):
    """The engine cannot take this call in its present state."""


class ClosedError(EngineError):
    """The engine was closed, or the interpreter is shutting down."""


class DeadlockError(EngineError):
    """A blocking call was made on the engine's own thread, where it would wait for itself."""


class UnansweredError(PresortError):
    """A request ended without an answer from the vendor; the message says why and names the batch."""
