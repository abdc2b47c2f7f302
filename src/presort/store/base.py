"""What the store takes and gives: plain data, besides `Request` and `Job`."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from presort.job import Job, JobState
from presort.request import BatchKey, Outcome, Request, RequestState, Route, Usage


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A payload to be admitted."""

    id: str
    """The id it gets if it is new."""
    key: BatchKey
    payload_hash: str
    body: bytes
    deadline: float
    occurrence: int = 0
    """Which of the equal payloads of its named run this is, from 0; ignored without a run."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """What became of a `NewRequest`: the row that stands for it, new or found again."""

    request: Request
    attached: bool
    """Whether the row was there before."""


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job under lease, with what all its requests have in common."""

    job: Job
    key: BatchKey


@dataclass(frozen=True, slots=True)
class ClaimedRequest:
    """A request recorded as about to be sent by the standard route, with its body."""

    request: Request
    key: BatchKey
    reason: str | None


class Spend(StrEnum):
    """What a ledger row stands for.

    - PAID: tokens behind an answer that was used
    - WASTED: tokens that were billed for an answer nobody could use any more
    - IN_DOUBT: a standard call that was cut off; possibly billed, tokens unknown
    """

    PAID = "paid"
    WASTED = "wasted"
    IN_DOUBT = "in_doubt"


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """What one answer cost. Written once per (custom_id, spend)."""

    custom_id: str
    spend: Spend
    route: Route
    provider: str
    model: str
    account: str
    at: float
    usage: Usage | None
    """`None` where the vendor did not say; then no price is known either."""
    baseline_usd: Decimal | None
    """These very tokens at the live uncached price; `None` if unknown."""
    actual_usd: Decimal | None
    """What they cost on the route they took; `None` if unknown."""
    run: str | None = None
    batch_id: str | None = None


@dataclass(frozen=True, slots=True)
class Settlement:
    """An outcome to be written, and what it cost."""

    request_id: str
    outcome: Outcome
    ledger: LedgerRow | None = None
    """Booked whether or not the outcome came in time; as WASTED instead of PAID if another outcome was first."""


@dataclass(frozen=True, slots=True)
class LedgerTotal:
    """Sum of ledger rows that share provider, model, route and spend."""

    provider: str
    model: str
    route: Route
    spend: Spend
    rows: int
    usage: Usage
    baseline_usd: Decimal
    """Sum over the rows with a known baseline."""
    actual_usd: Decimal
    """Sum over the rows with a known actual cost."""
    unknown: int
    """Rows whose baseline or actual cost is unknown."""


@dataclass(frozen=True, slots=True)
class JobView:
    """One line of `presort jobs`."""

    job: Job
    key: BatchKey
    settled: int
    """Requests of it that have their outcome."""
    leader: str | None
    """Who holds its lease now: `host:pid`."""


@dataclass(frozen=True, slots=True)
class QueueView:
    """Queued requests that share a batch key, a run and a route: what accumulates, or waits for the standard route."""

    key: BatchKey
    run: str | None
    route: Route
    count: int
    oldest_at: float


__all__ = [
    "Admitted",
    "BatchKey",
    "ClaimedJob",
    "ClaimedRequest",
    "Job",
    "JobState",
    "JobView",
    "LedgerRow",
    "LedgerTotal",
    "NewRequest",
    "Outcome",
    "QueueView",
    "Request",
    "RequestState",
    "Route",
    "Settlement",
    "Spend",
    "Usage",
]
