"""What a provider is: one vendor's wire format behind few verbs.

A provider holds no state and decides nothing. It recognises a vendor's calls, reads what they cost, and
speaks the vendor's Batch API: `submit`, `check`, `collect`, `cancel`, `find`. Routes, retries, leases and
money are decided elsewhere. Errors of the network and of the vendor stop here: they leave as one of the three
`ChannelError`s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from presort.job import Job, JobProgress
from presort.request import BatchKey, Outcome, Usage


class ChannelError(Exception):
    """An exchange with a vendor that did not end in a usable answer."""


class NotSentError(ChannelError):
    """Nothing reached the vendor: no name, no connection, no TLS. Sending again is safe."""


class AnswerLostError(ChannelError):
    """The request may have reached the vendor, and no whole answer came. Sending again may do it twice."""


class RefusedError(ChannelError):
    """The vendor answered, and its answer is an error. What was asked for did not happen.

    Attributes:
        status: HTTP status.
        headers: Response headers, names in lower case.
        body: Response body, at most 64 KiB of it.
    """

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"HTTP {status}: {body[:300].decode(errors='replace')}")
        self.status = status
        self.headers = dict(headers)
        self.body = body

    @property
    def retry_after_seconds(self) -> float | None:
        """What the vendor asked us to wait, in seconds; `None` if it did not, or not in seconds."""
        try:
            return max(0.0, float(self.headers["retry-after"]))
        except (KeyError, ValueError):
            return None


class GarbledError(ChannelError):
    """The vendor's answer came whole and makes no sense: not JSON, or without what it must hold.

    For a create this is as doubtful as `AnswerLostError`; for a look it is a reason to look again.
    """


class Refusal(StrEnum):
    """What a vendor's refusal means for us.

    - KEY: the key is unknown, revoked or may not do this: wait for another
    - LATER: rate limit, overload, server error: the same again later
    - LIMIT: a spend or usage limit: not before a person or a new month lifts it
    - SMALLER: too large: the same in smaller parts
    - NO_BATCH: there is no such API at this base URL
    - INVALID: the vendor will never accept it
    """

    KEY = "key"
    LATER = "later"
    LIMIT = "limit"
    SMALLER = "smaller"
    NO_BATCH = "no_batch"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Reply:
    """A vendor's answer, read whole."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class Channel(Protocol):
    """How one account reaches one vendor: base URL, credentials and network settings, nothing else.

    Paths are appended to the base URL. Every verb raises `NotSentError`, `AnswerLostError` or `RefusedError`;
    none of them retries.
    """

    async def send(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        content_length: int | None = None,
    ) -> Reply:
        """Exchange one request for one whole answer with a status below 400."""
        ...

    def lines(self, path: str, *, headers: Mapping[str, str] | None = None) -> AsyncGenerator[bytes, None]:
        """Stream the lines of a download, without their ends; a body cut short raises `AnswerLostError`.

        Whoever stops early closes the generator, and with it the connection.
        """
        ...


class Rows(Protocol):
    """The requests of a job, streamed from the store in a fixed order, as often as asked."""

    @property
    def count(self) -> int:
        """How many."""
        ...

    @property
    def size_bytes(self) -> int:
        """Sum of the bodies' lengths."""
        ...

    def __aiter__(self) -> AsyncIterator[tuple[str, bytes]]:
        """Yield (custom_id, body)."""
        ...


class Steps(Protocol):
    """The durable steps of a submit. A provider awaits each before it goes on."""

    async def uploaded(self, ref: str) -> None:
        """The input lies at the vendor as `ref`; a repeated submit must use it (`job.input_ref`)."""
        ...

    async def creating(self) -> None:
        """The very next thing sent is the create."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """A request to a vendor's endpoint that presort knows, as `recognise` read it."""

    base_url: str
    endpoint: str
    model: str
    streaming: bool
    unbatchable: str | None = None
    """Why no batch accepts it, in a few words; `None` if one may."""
    headers: tuple[tuple[str, str], ...] = ()
    """The headers that alter meaning, as in `BatchKey.headers`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a batch's results. `custom_id` may be foreign or repeated; the caller checks."""

    custom_id: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a vendor rejected a whole batch after accepting the create. Nothing ran, nothing is billed."""

    message: str
    line: int | None = None
    """The line to blame, counted from 1; `None` if it is the batch as a whole."""
    retryable: bool = False
    """Whether the same lines may pass later (an enqueued-token limit, say)."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one `check` saw."""

    progress: JobProgress
    failure: Failure | None = None
    """Set only where the batch has ended because the vendor rejected it whole."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a search for a lost create found: a batch, a reason to look again later, or nothing.

    With neither field set the create has left no trace at the time of looking.
    """

    batch_id: str | None = None
    waiting_for: str | None = None
    """Batches that could be ours and cannot be told apart yet."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """A vendor's limits on one batch, with where they come from."""

    max_requests: int
    max_bytes: int
    """Of the bodies alone: room for the frame around a full batch of them is already taken off."""
    source: str


class StreamMeter(Protocol):
    """Reads the usage off a streamed answer while it passes by."""

    def feed(self, chunk: bytes) -> None:
        """Look at the next bytes; chunks may cut lines anywhere."""
        ...

    @property
    def usage(self) -> Usage | None:
        """What was billed, once the stream said so."""
        ...


KnownBatch = Callable[[str], Awaitable[bool]]
"""Whether a vendor's batch id already belongs to another job of this store."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question in the words common to all vendors, for callers that have no client to compose it."""

    instructions: str
    document: str
    schema: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema the answer must fit."""
    schema_name: str = "answer"
    max_tokens: int = 2048


def one_line(body: bytes) -> bytes:
    """Put a JSON body on one line, as JSONL wants it; the engine does so on admission.

    A raw line break inside JSON can only be white space between its tokens, so each becomes a blank: key
    order, number texts, string escapes and the length stay as they are.
    """
    return body.replace(b"\n", b" ").replace(b"\r", b" ")


class Provider(ABC):
    """One vendor's wire format. One instance per vendor lives in the registry; it holds no state."""

    name: str
    title: str
    """What people call it."""
    default_base_url: str
    default_model: str
    key_variable: str
    """The environment variable its own client reads the key from."""
    base_url_variable: str
    probe_path: str
    """A path below the base URL that a GET may ask at any time, to see whether a key is good, and whose."""
    standing_headers: tuple[tuple[str, str], ...] = ()
    """Headers every request of our own needs, besides the key: an API version, say."""
    limits: BatchLimits
    reconcile_by_label: bool
    """Whether `find` knows our batch at once by a label; if not it compares custom_ids after the end."""

    @abstractmethod
    def recognise(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> Call | None:
        """Read a request on the wire; `None` if it is not one of this vendor's calls that presort knows.

        `url` is absolute, without query; header names are in lower case. The base URL is not checked against
        the vendor's own: gateways and emulators speak the same format elsewhere. Never raises on any input.
        """

    @abstractmethod
    def read_key(self, headers: Mapping[str, str]) -> str | None:
        """Take the API key out of a request's headers (names in lower case)."""

    @abstractmethod
    def key_headers(self, key: str) -> dict[str, str]:
        """Return the headers that carry a key."""

    @abstractmethod
    def organisation(self, headers: Mapping[str, str]) -> str | None:
        """Read who an answer's headers say the key belongs to; `None` if they do not."""

    @abstractmethod
    def read_usage(self, body: bytes) -> Usage | None:
        """Read what a whole answer was billed for; `None` if it does not say or is not JSON."""

    @abstractmethod
    def stream_meter(self) -> StreamMeter:
        """Return a meter for one streamed answer."""

    @abstractmethod
    def compose(self, model: str, prompt: Prompt) -> tuple[str, bytes, tuple[tuple[str, str], ...]]:
        """Write a prompt as this vendor's call: endpoint, JSON body, headers that alter meaning."""

    @abstractmethod
    def read_text(self, body: bytes) -> str:
        """Return the text of an answer to a composed prompt; raises `ValueError` saying why there is none."""

    @abstractmethod
    def error_body(self, status: int, message: str) -> bytes:
        """Write an error in the vendor's own JSON shape, for outcomes that presort has to state itself."""

    @abstractmethod
    def classify(self, refusal: RefusedError) -> Refusal:
        """Say what a refusal means."""

    @abstractmethod
    async def submit(self, channel: Channel, key: BatchKey, job: Job, rows: Rows, steps: Steps) -> str:
        """Hand a job to the vendor's Batch API and return the batch's id.

        Awaits `steps.uploaded` and `steps.creating` as it goes. `NotSentError` and `RefusedError` mean that
        no batch came to be; after `steps.creating`, `AnswerLostError` and `GarbledError` leave it in doubt. A
        create answered 500, 502 or 504 is such a doubt, not a refusal: something broke while the vendor, or a
        gateway, was at it.
        """

    @abstractmethod
    async def check(self, channel: Channel, key: BatchKey, job: Job) -> Look:
        """Look once whether the job's batch has ended."""

    @abstractmethod
    def collect(self, channel: Channel, key: BatchKey, job: Job) -> AsyncGenerator[Row, None]:
        """Stream every row of an ended batch, from the output and the error side, in the vendor's order.

        Lines that cannot be read are skipped (their requests come out as missing); a download that breaks off
        raises after the rows that arrived.
        """

    @abstractmethod
    async def cancel(self, channel: Channel, key: BatchKey, job: Job) -> None:
        """Ask for the end of a batch. One that has ended already is no error."""

    @abstractmethod
    async def find(self, channel: Channel, key: BatchKey, job: Job, ids: Sequence[str], known: KnownBatch) -> Finding:
        """Search for a batch whose create was answered to nobody.

        `job.create_at` is when the create was about to be sent; `ids` are the job's custom_ids, to recognise
        it by where the vendor keeps no label. Fewer than all will do, at the price of reading more of other
        batches.
        """
