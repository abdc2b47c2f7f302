"""The vocabulary of one batch on our side: a job, its states, what the store remembers of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class JobState(StrEnum):
    """Where a job is. Each state has one owner in `presort.engine`.

    - PENDING: formed and stored, not yet sent (submitter)
    - NEEDS_KEY: no usable key for its account now; resumes when one arrives (submitter, poller)
    - SUBMITTING: its create may have been sent and no answer is stored: in doubt until found or ruled out (submitter)
    - SUBMITTED: the vendor has it; not known to have ended (poller)
    - COLLECTING: it has ended; its results are not yet all safe here (poller)
    - COMPLETED: every request in it has left it with an outcome or for another route (nobody)

    Before a job there is only `accumulating`: queued requests that share a batch key.
    """

    PENDING = "pending"
    NEEDS_KEY = "needs_key"
    SUBMITTING = "submitting"
    SUBMITTED = "submitted"
    COLLECTING = "collecting"
    COMPLETED = "completed"


@dataclass(frozen=True, slots=True)
class Job:
    """One batch of ours: a durable row, one per vendor batch."""

    id: str
    """32 hexadecimal digits; also the label put on the vendor's batch where it has one."""
    key_id: str
    state: JobState
    count: int
    """Requests in it."""
    size_bytes: int
    """Sum of their bodies."""
    created_at: float
    """Unix seconds, as all times here."""
    deadline: float
    """The earliest deadline of its requests."""
    due_at: float
    """When its owner should look at it next."""
    input_ref: str | None = None
    """The uploaded input at vendors that want a file first."""
    create_at: float | None = None
    """When the create was about to be sent; `None` if it provably was not."""
    batch_id: str | None = None
    """The vendor's id, once known."""
    submitted_at: float | None = None
    ended_at: float | None = None
    cancelled_at: float | None = None
    """When we asked the vendor to cancel it."""
    failures: int = 0
    """Consecutive failed looks; never a reason to send anything again."""
    note: str | None = None
    """What it waits for or last ran into, for people."""
    fence: int = 0
    """Rises with each lease taken; a write with an older fence is refused."""


@dataclass(frozen=True, slots=True)
class JobProgress:
    """What a vendor says of a batch that is under way."""

    ended: bool
    processing: int = 0
    succeeded: int = 0
    failed: int = 0
