"""Where a batch stands at a given time: pure functions of its row and the clock.

    waiting → validating → running → finalizing → ended
                              └─ cancelling ────────┘

A batch carries out its requests one after another, spread evenly over the middle
part of its duration, and ends by itself, by cancellation, or after 24 hours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from presort.emulator.state import Batch

WINDOW_SECONDS = 86_400
"""Both vendors: the processing window is 24 hours from creation, exactly."""

RESOLUTION_SECONDS = 1e-6
"""Times since the epoch are floats, exact to less than a microsecond."""


class Phase(StrEnum):
    """What a live batch is doing."""

    WAITING = "waiting"
    """It does not exist yet."""
    VALIDATING = "validating"
    """Its input is being read."""
    RUNNING = "running"
    """Its requests are being carried out."""
    FINALIZING = "finalizing"
    """All are done, results are being prepared."""
    CANCELLING = "cancelling"
    """It was cancelled and has not ended yet."""


class Ending(StrEnum):
    """The fate a batch was created with."""

    COMPLETE = "complete"
    """It ends when its duration is over."""
    EXPIRE = "expire"
    """It expires when its duration is over, with a share of its requests done."""
    NEVER = "never"
    """A share of its requests gets done, the rest never does."""
    FAIL = "fail"
    """Its validation fails."""


class Result(StrEnum):
    """How a batch ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"


@dataclass(frozen=True)
class Window:
    """When in its duration a batch runs its requests, as fractions."""

    start: float
    end: float


@dataclass(frozen=True)
class Progress:
    """Where a batch stands: `due` requests should have been carried out; `end` is set once it is over."""

    phase: Phase
    due: int
    end: tuple[Result, float] | None = None


def finish_time(batch: Batch, window: Window, n: int) -> float:
    """When request `n` of a batch is carried out."""
    share = (n + 1) / max(1, batch.size or 0)
    return batch.created_at + batch.seconds * (window.start + (window.end - window.start) * share)


def progress(batch: Batch, window: Window, cancel_seconds: float, now: float) -> Progress:
    """Tell where a batch stands."""
    if now < batch.created_at:
        return Progress(Phase.WAITING, 0)
    over, when = min(_ends(batch, window, cancel_seconds), key=lambda end: end[1])
    stop = min(now, when, batch.cancelled_at if batch.cancelled_at is not None else math.inf)
    end = (over, when) if now >= when else None
    match batch.ending, end and over:
        case Ending.FAIL, _:
            due = 0
        case _, Result.COMPLETED:
            due = batch.size or 0
        case _:
            due = _due(batch, window, stop)
    return Progress(_phase(batch, window, now), due, end)


def _ends(batch: Batch, window: Window, cancel_seconds: float) -> list[tuple[Result, float]]:
    if batch.cancelled_at is not None:
        return [(Result.CANCELLED, batch.cancelled_at + cancel_seconds)]
    ends = [(Result.EXPIRED, batch.created_at + WINDOW_SECONDS)]
    natural = batch.created_at + batch.seconds
    match batch.ending:
        case Ending.COMPLETE:
            ends.append((Result.COMPLETED, natural))
        case Ending.EXPIRE:
            ends.append((Result.EXPIRED, natural))
        case Ending.FAIL:
            ends.append((Result.FAILED, batch.created_at + batch.seconds * window.start))
    return ends


def _due(batch: Batch, window: Window, stop: float) -> int:
    size = batch.size or 0
    limit = math.floor(size * batch.share + 1e-9)
    running = batch.seconds * (window.end - window.start)
    begun = stop - batch.created_at - batch.seconds * window.start + RESOLUTION_SECONDS
    if begun < 0:
        return 0
    return limit if begun >= running else min(limit, math.floor(size * begun / running))


def _phase(batch: Batch, window: Window, now: float) -> Phase:
    if batch.cancelled_at is not None:
        return Phase.CANCELLING
    age = now - batch.created_at
    if age < batch.seconds * window.start:
        return Phase.VALIDATING
    finalizing = batch.ending == Ending.COMPLETE and age >= batch.seconds * window.end
    return Phase.FINALIZING if finalizing else Phase.RUNNING
