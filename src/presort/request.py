"""The vocabulary of one LLM call: payload, batch key, request, outcome, usage.

Plain data. Nothing here reads a clock, a file or a socket.

A *payload* is a call's JSON as an official client would put it on the wire. A *request* is that payload once it
has an identity here: the unit of result, of cost and of fallback. An *outcome* is how a request ended; it is data,
never an exception.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache


class Route(StrEnum):
    """How a request is served.

    - BATCH: through the vendor's Batch API, at its discount, within the deadline
    - STANDARD: at once, at list price
    """

    BATCH = "batch"
    STANDARD = "standard"


class OutcomeKind(StrEnum):
    """How a request ended.

    - SUCCEEDED: the vendor answered it
    - ERRORED: the vendor refused it, or presort could not get an answer and says why
    - EXPIRED: the vendor or the deadline ran out of time before it was answered
    - CANCELLED: it was withdrawn before it was answered
    """

    SUCCEEDED = "succeeded"
    ERRORED = "errored"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class RequestState(StrEnum):
    """Where a request is on its way to an outcome.

    - QUEUED: stored, waiting to be put into a job
    - IN_JOB: part of a job; the job's state says the rest
    - ON_STANDARD: recorded as about to be sent, or sent, by the standard route: in doubt until it is settled
    - SETTLED: has its outcome
    """

    QUEUED = "queued"
    IN_JOB = "in_job"
    ON_STANDARD = "on_standard"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True)
class Usage:
    """Billed tokens of one answer in five disjoint classes, cache writes split by their TTL."""

    input_tokens: int = 0
    """Uncached input."""
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    cache_write_tokens: int = 0
    """Cache writes of vendors that do not say, or do not price by, the TTL."""
    cache_read_tokens: int = 0
    output_tokens: int = 0

    @property
    def total_input_tokens(self) -> int:
        """Everything the vendor read: uncached, written and read from the cache."""
        return (
            self.input_tokens
            + self.cache_write_5m_tokens
            + self.cache_write_1h_tokens
            + self.cache_write_tokens
            + self.cache_read_tokens
        )

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cache_write_5m_tokens + other.cache_write_5m_tokens,
            self.cache_write_1h_tokens + other.cache_write_1h_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
            self.cache_read_tokens + other.cache_read_tokens,
            self.output_tokens + other.output_tokens,
        )


@dataclass(frozen=True, slots=True)
class BatchKey:
    """What all requests of one batch have in common.

    Two requests may share a batch only if every field is equal: a vendor's batch belongs to one account, OpenAI's
    holds one model and one endpoint, and the headers that alter meaning go with the create, not with its lines.
    """

    provider: str
    """Registry name, such as `anthropic`."""
    base_url: str
    """Scheme, host, port and path prefix before the endpoint, without a trailing slash."""
    account: str
    """Who pays: the user's alias, or `key-` and an HMAC of the key. Never the key."""
    endpoint: str
    """Path of the call below the base URL, such as `/v1/messages`."""
    model: str
    headers: tuple[tuple[str, str], ...] = ()
    """Lower-cased headers that alter meaning (version, betas, organisation, project, workspace), sorted."""

    @property
    def id(self) -> str:
        """A short stable name for the key: 32 hexadecimal digits."""
        return _key_id(self)


@lru_cache(1024)
def _key_id(key: BatchKey) -> str:
    text = json.dumps(
        [key.provider, key.base_url, key.account, key.endpoint, key.model, key.headers], ensure_ascii=False
    )
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Payload:
    """One LLM call as it would go over the wire, ready for the engine."""

    key: BatchKey
    body: bytes
    """The JSON body, byte for byte."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The original request's headers, for a fallback sent by this process. Held in memory, never stored."""

    @property
    def hash(self) -> str:
        """Identity of the content: batch key and body, 32 hexadecimal digits."""
        digest = hashlib.blake2b(self.key.id.encode(), digest_size=16)
        digest.update(self.body)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended, with the vendor's own words.

    `status` and `body` are what the vendor's standard API would have answered, so that the official client can
    turn them into its own objects or exceptions.
    """

    kind: OutcomeKind
    status: int
    """HTTP status: the vendor's, or the nearest of its own that says the same."""
    body: bytes
    """HTTP body: the answer's JSON, or the vendor's error JSON."""
    usage: Usage | None = None
    """Billed tokens; `None` if nothing was billed or the answer does not say."""
    route: Route = Route.BATCH
    reason: str | None = None
    """Why it did not succeed or left the batch route, in a few stable words; `None` for a plain success."""
    batch_id: str | None = None
    """The vendor's handle, for support and for looking by hand."""

    @property
    def succeeded(self) -> bool:
        """Whether the vendor answered."""
        return self.kind is OutcomeKind.SUCCEEDED


@dataclass(frozen=True, slots=True)
class Request:
    """A payload with an identity: one call of one run, once."""

    id: str
    """32 hexadecimal digits, unique everywhere, rising with time."""
    key_id: str
    payload_hash: str
    state: RequestState
    attempt: int
    """How many times it was put into a job, from 0."""
    deadline: float
    """Unix time in seconds by which the answer must be there."""
    created_at: float
    run: str | None = None
    job_id: str | None = None
    body: bytes | None = field(default=None, repr=False)
    """`None` once the outcome is stored, or where it was not asked for."""
    outcome: Outcome | None = None

    @property
    def custom_id(self) -> str:
        """Our id on the wire: the request and the attempt, so that two batches never share one."""
        return custom_id(self.id, self.attempt)


def custom_id(request_id: str, attempt: int) -> str:
    """Name one attempt of a request; 35 characters of `[0-9a-f-]`, so that a batch's size is known beforehand."""
    return f"{request_id}-{attempt:02d}"


def split_custom_id(text: str) -> tuple[str, int] | None:
    """Read a `custom_id` back into request id and attempt; `None` if it is not one of ours."""
    request_id, dash, attempt = text.rpartition("-")
    if not dash or len(request_id) != 32 or len(attempt) != 2 or not attempt.isdecimal():
        return None
    return request_id, int(attempt)
