"""Which way a request goes: pure functions, no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from presort.config import Batching
from presort.request import Outcome, OutcomeKind, Route

MAX_BATCH_ATTEMPTS = 3
"""Batches one request may be put into before it goes another way."""

RETRYABLE_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses the official clients retry: what failed was the service, not the request."""

MISSING = "missing from the batch's results"
"""Reason of a request that an ended batch did not mention."""

REJECTED = "batch rejected"
"""Reason of a request whose batch the vendor rejected whole, for no fault of its own."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A route, and why it is not the one that was asked for."""

    route: Route
    reason: str | None = None


def choose_route(
    wanted: Route, *, unbatchable: str | None, has_batch_api: bool, seconds_left: float, batching: Batching
) -> Choice:
    """Decide how a call is served, before anything is sent.

    Args:
        wanted: The route that was asked for.
        unbatchable: Why no batch accepts the call; `None` if one may.
        has_batch_api: Whether the base URL is not known to lack a Batch API.
        seconds_left: Time to the deadline.
        batching: The settings.
    """
    if wanted is Route.STANDARD:
        return Choice(Route.STANDARD)
    if not batching.enabled:
        return Choice(Route.STANDARD, "batching is switched off")
    if unbatchable is not None:
        return Choice(Route.STANDARD, unbatchable)
    if not has_batch_api:
        return Choice(Route.STANDARD, "no Batch API at this base URL")
    if seconds_left <= 0:
        return Choice(Route.STANDARD, "the deadline has passed")
    return Choice(Route.BATCH)


class Step(StrEnum):
    """What becomes of a request that a batch has returned, or has not.

    - FINAL: the outcome stands
    - REBATCH: into the next batch
    - STANDARD: by the standard route, at list price
    """

    FINAL = "final"
    REBATCH = "rebatch"
    STANDARD = "standard"


def next_step(outcome: Outcome, *, attempt: int, seconds_left: float, batching: Batching) -> Step:
    """Decide what follows a batch's outcome for one request.

    What the vendor refused as invalid it would refuse again: it is final. What expired, was cancelled, went missing
    or met a broken service is sent again, as it was not billed: in a batch while there is time, then by the standard
    route, and if that is switched off the outcome stands.
    """
    if outcome.kind is OutcomeKind.SUCCEEDED:
        return Step.FINAL
    if outcome.kind is OutcomeKind.ERRORED and outcome.status not in RETRYABLE_STATUSES:
        return Step.FINAL
    if seconds_left > 0 and attempt + 1 < MAX_BATCH_ATTEMPTS and batching.enabled:
        return Step.REBATCH
    if batching.fallback:
        return Step.STANDARD
    return Step.FINAL


def flush_due(*, waiting: int, oldest_at: float, now: float, batching: Batching) -> bool:
    """Decide whether calls that trickle in are sent now."""
    return waiting >= batching.flush_requests or (waiting > 0 and now - oldest_at >= batching.flush_seconds)


def cut(sizes: list[int], *, max_requests: int, max_bytes: int) -> list[int]:
    """Cut a sequence of request sizes into batches; return the number of requests in each.

    A single request over `max_bytes` gets a batch of its own: the vendor shall say no to it, and to nothing else.
    """
    counts: list[int] = []
    count = total = 0
    for size in sizes:
        if count and (count >= max_requests or total + size > max_bytes):
            counts.append(count)
            count = total = 0
        count += 1
        total += size
    if count:
        counts.append(count)
    return counts
