"""What the vendors' wire formats share: JSON kept byte for byte, framed uploads, lists, streamed usage.

Nothing here knows a vendor.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from presort.job import Job
from presort.providers.base import AnswerLostError, Channel, GarbledError, Refusal, RefusedError, Reply
from presort.request import Usage

CLOCK_SKEW_SECONDS = 120.0
"""How far a vendor's clock may be behind ours: a batch may look this much older than its create."""

_CHUNK_BYTES = 64 * 2**10
_MAX_EVENT_BYTES = 16 * 2**20
_NOTHING_HAPPENED = frozenset({501, 503, 505, 529})
"""Answers of 500 and above that say nobody began: unknown method or version, overloaded, nobody there."""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"`{name}` is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_BLANKS = re.compile(r"[ \t\n\r]*")


def read_object(data: bytes | str) -> dict[str, Any] | None:
    """Read a JSON object; `None` if it is not strict UTF-8, not strict JSON, or no object. Never raises."""
    try:
        value = _DECODER.decode(data if isinstance(data, str) else data.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def dump(value: Any) -> bytes:
    """Write compact JSON in UTF-8; half surrogate pairs, which UTF-8 has no bytes for, become `?`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def slice_of(text: str, *path: str) -> str | None:
    """Cut the member at `path` out of the text of a valid JSON object, untouched to the last digit."""
    at = _past_blanks(text, 0)
    for name in path:
        found = _member_at(text, at, name)
        if found is None:
            return None
        at = found
    _, end = _DECODER.raw_decode(text, at)
    return text[at:end]


def _member_at(text: str, at: int, name: str) -> int | None:
    if text[at] != "{":
        return None
    at = _past_blanks(text, at + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = _past_blanks(text, _past_blanks(text, at) + 1)
        if key == name:
            return at
        _, at = _DECODER.raw_decode(text, at)
        at = _past_blanks(text, at)
        if text[at] == ",":
            at = _past_blanks(text, at + 1)
    return None


def _past_blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    return match.end() if match else at


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a JSON object as it is, and anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def tokens(value: Any) -> int:
    """Return a count of tokens or requests as it is, and anything that is none as 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def split_call(method: str, url: str, endpoint: str, body: bytes) -> tuple[str, dict[str, Any]] | None:
    """Split a POST to `endpoint` into base URL and JSON body; `None` if it is something else.

    A URL that carries credentials is something else too: base URLs are stored.
    """
    if method.upper() != "POST" or not url.endswith(endpoint):
        return None
    base_url = url.removesuffix(endpoint)
    try:
        parts = urlsplit(base_url)
    except ValueError:
        return None
    if parts.scheme not in {"http", "https"} or not parts.netloc or "@" in parts.netloc:
        return None
    payload = read_object(body)
    if payload is None or not isinstance(payload.get("model"), str) or not payload["model"]:
        return None
    return base_url, payload


def half_surrogate(payload: Mapping[str, Any], body: bytes) -> bool:
    r"""Whether a body holds an escape such as `\ud83d` without its other half.

    The grammar of JSON allows it and vendors' parsers do not; in a batch it would take the other requests
    down.
    """
    if b"\\ud" not in body and b"\\uD" not in body:
        return False
    try:
        json.dumps(payload, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def present(headers: Mapping[str, str], names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return those of the named headers that are there, as `BatchKey.headers` wants them."""
    return tuple(sorted((name, headers[name].strip()) for name in names if name in headers))


def bearer(headers: Mapping[str, str]) -> str | None:
    """Take the token out of `Authorization: Bearer`."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def origin_of(url: str) -> tuple[str, str, int | None] | None:
    """Read scheme, host and port of a URL; `None` if it has no such thing."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    return (parts.scheme, parts.hostname, port) if parts.hostname else None


def path_of(name: str) -> str:
    """Write a vendor's id as one path segment."""
    return quote(name, safe="")


def batch_path(job: Job) -> str:
    """Write a job's batch id as one path segment."""
    if job.batch_id is None:
        raise ValueError(f"job `{job.id}` has no batch id yet")
    return path_of(job.batch_id)


def refusal_of(status: int) -> Refusal:
    """Say what a status means where the vendor's body adds nothing to it."""
    if status in {401, 403}:
        return Refusal.KEY
    if status == 413:
        return Refusal.SMALLER
    if status in {404, 405, 501} or status < 400:
        return Refusal.NO_BATCH
    if status in {408, 409, 429} or status >= 500:
        return Refusal.LATER
    return Refusal.INVALID


async def coalesce(parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Join small parts, so that a body of many small rows is not sent in as many packets."""
    buffer = bytearray()
    async for part in parts:
        buffer += part
        if len(buffer) >= _CHUNK_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


def object_in(reply: Reply, what: str) -> dict[str, Any]:
    """Read an answer that must be a JSON object; raises `GarbledError` naming `what` was expected."""
    value = read_object(reply.body)
    if value is None:
        raise GarbledError(f"HTTP {reply.status}: expected {what}, got no JSON object")
    return value


def id_in(reply: Reply, what: str) -> str:
    """Read the `id` out of an answer; raises `GarbledError` naming `what` was expected."""
    value = object_in(reply, what).get("id")
    if not isinstance(value, str) or not value:
        raise GarbledError(f"HTTP {reply.status}: expected {what}, got a JSON object without an id")
    return value


async def create_batch(
    channel: Channel,
    path: str,
    headers: Mapping[str, str],
    content: bytes | AsyncIterator[bytes],
    content_length: int | None = None,
) -> str:
    """Send a create and read the new batch's id.

    A server error that does not say that nobody began is a lost answer: the batch may have come to be.
    """
    try:
        reply = await channel.send(
            "POST",
            path,
            headers={**headers, "content-type": "application/json"},
            content=content,
            content_length=content_length,
        )
    except RefusedError as refusal:
        if refusal.status < 500 or refusal.status in _NOTHING_HAPPENED:
            raise
        raise AnswerLostError(f"the create was answered HTTP {refusal.status}: it may have happened") from refusal
    return id_in(reply, "a batch")


async def batches_since(
    channel: Channel,
    path: str,
    headers: Mapping[str, str],
    cursor: str,
    since: float,
    created_at: Callable[[Mapping[str, Any]], float | None],
) -> AsyncGenerator[Mapping[str, Any], None]:
    """Page through a list of batches, newest first, down to those created before `since` less the clock skew.

    Args:
        channel: Where to ask.
        path: The list's.
        headers: To send along.
        cursor: The parameter that continues after an id.
        since: Unix time.
        created_at: Reads a batch's creation time; one it cannot read is handed out.
    """
    oldest = since - CLOCK_SKEW_SECONDS
    params = {"limit": "100"}
    while True:
        page = object_in(await channel.send("GET", path, headers=headers, params=params), "a list of batches")
        data = page.get("data")
        if not isinstance(data, list):
            raise GarbledError("expected a list of batches, got none")
        batches = [batch for batch in data if isinstance(batch, dict)]
        times = [created_at(batch) for batch in batches]
        for batch, time in zip(batches, times, strict=True):
            if isinstance(batch.get("id"), str) and (time is None or time >= oldest):
                yield batch
        last = times[-1] if times else None
        if not page.get("has_more") or (last is not None and last < oldest):
            return
        following = page.get("last_id") or (batches[-1].get("id") if batches else None)
        if not isinstance(following, str) or following == params.get(cursor):
            raise GarbledError("the list of batches goes on and does not say where")
        params[cursor] = following


class SseMeter:
    """Reads the usage off a stream of server-sent events: what was said last, key by key.

    Args:
        find: Takes the usage object out of an event's JSON.
        read: Turns the collected usage object into ours.
        last: The event type whose counts are final; before it nothing is known. `None`: any event's are.
    """

    def __init__(
        self,
        find: Callable[[Mapping[str, Any]], Any],
        read: Callable[[Mapping[str, Any]], Usage | None],
        last: str | None = None,
    ) -> None:
        self._find = find
        self._read = read
        self._last = last
        self._final = last is None
        self._rest = bytearray()
        self._seen: dict[str, Any] = {}

    def feed(self, chunk: bytes) -> None:
        """Look at the next bytes; chunks may cut lines anywhere."""
        self._rest += chunk
        if b"\n" not in chunk:
            if len(self._rest) > _MAX_EVENT_BYTES:
                self._rest.clear()
            return
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and b'"usage"' in line:
                event = read_object(bytes(line[5:]))
                found = mapping(self._find(event)) if event else {}
                self._final = self._final or bool(event and event.get("type") == self._last)
                self._seen.update((name, value) for name, value in found.items() if value is not None)

    @property
    def usage(self) -> Usage | None:
        """What was billed; `None` until the stream has said all of it."""
        return self._read(self._seen) if self._final else None
