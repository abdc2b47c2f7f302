"""Anthropic's Messages and Message Batches APIs.

A batch takes its requests inline and keeps no label of ours, so a create whose answer was lost is found by
time and size and confirmed by our custom_ids once it has ended. What a request holds is validated late: a bad
one is an errored row, never a refused batch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from presort.job import Job, JobProgress
from presort.providers._wire import (
    SseMeter,
    batch_path,
    batches_since,
    bearer,
    coalesce,
    create_batch,
    dump,
    half_surrogate,
    mapping,
    object_in,
    path_of,
    present,
    read_object,
    refusal_of,
    slice_of,
    split_call,
    tokens,
)
from presort.providers.base import (
    BatchLimits,
    Call,
    Channel,
    Finding,
    GarbledError,
    KnownBatch,
    Look,
    Prompt,
    Provider,
    Refusal,
    RefusedError,
    Row,
    Rows,
    Steps,
    StreamMeter,
)
from presort.request import BatchKey, Outcome, OutcomeKind, Usage

_MESSAGES = "/v1/messages"
_BATCHES = "/v1/messages/batches"
_HOST = "api.anthropic.com"

_HEADERS = ("anthropic-version", "anthropic-beta", "anthropic-workspace-id", "anthropic-user-profile-id")
"""Headers that alter what a call means. Source: anthropic SDK 2.12.0, batches.create and messages.create."""

_VERSION = "2026-10-21"
"""For what presort composes itself. Source: anthropic SDK 2.12.0, `_constants.py`."""

_NOT_IN_BATCHES: Mapping[str, Callable[[Any], bool]] = {
    "stream": bool,
    "speed": lambda value: value is not None,
    "store": lambda value: value is not None,
    "previous_thread_event_id": lambda value: value is not None,
    "cache_hint": lambda value: value is not None,
    "context_hint": lambda value: value is not None,
    "max_tokens": lambda value: value == 0 and value is not False,
}
"""Body fields, and when no batch takes them. Source: platform.claude.com, batch processing, 2026-08-22."""

_BETA_NOT_IN_BATCHES = "research_preview_2026_02"
"""Source: platform.claude.com, batch processing, 2026-08-22."""

_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""Error types and their status. Source: platform.claude.com, errors, 2026-08-22; anthropic SDK 2.12.0."""

_LIMIT_CODES = frozenset({"enforced_spend_limit_reached", "contract_spend_limit_reached"})
"""`details.error_code` of a 429 that waiting does not lift. Source: as `_STATUS`."""

_LIMIT_TEXTS = ("specified API usage limits", "credit balance is too low")
"""In the message of a 400 that is a spend limit. Source: as `_STATUS`; the second is older."""

_OPEN, _ROW, _MIDDLE, _END = b'{"requests":[', b'{"custom_id":"', b'","params":', b"]}"
_CUSTOM_ID_BYTES = 35
_FRAME_BYTES = len(_ROW) + _CUSTOM_ID_BYTES + len(_MIDDLE) + len(b"},")

_STRANGERS = 100
"""So many result rows without one of all our custom_ids, and the batch is somebody else's."""


class Anthropic(Provider):
    """Anthropic: `/v1/messages`, batched by `/v1/messages/batches`."""

    name = "anthropic"
    title = "Anthropic"
    default_base_url = "https://api.anthropic.com"
    default_model = "claude-haiku-5-5"
    key_variable = "ANTHROPIC_API_KEY"
    base_url_variable = "ANTHROPIC_BASE_URL"
    probe_path = "/v1/models"
    standing_headers = (("anthropic-version", _VERSION),)
    limits = BatchLimits(
        max_requests=100_000,
        max_bytes=256_000_000 - 100_000 * _FRAME_BYTES,
        source="platform.claude.com, batch processing: 100,000 requests or 256 MB; 2026-08-22",
    )
    reconcile_by_label = False

    def recognise(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> Call | None:
        """Read a POST to `.../v1/messages` that has one of Anthropic's headers or goes to its own host."""
        split = split_call(method, url, _MESSAGES, body)
        if split is None:
            return None
        base_url, payload = split
        if not headers.keys() & {"anthropic-version", "x-api-key"} and urlsplit(base_url).hostname != _HOST:
            return None
        return Call(
            base_url=base_url,
            endpoint=_MESSAGES,
            model=payload["model"],
            streaming=bool(payload.get("stream")),
            unbatchable=_unbatchable(payload, headers, body),
            headers=present(headers, _HEADERS),
        )

    def read_key(self, headers: Mapping[str, str]) -> str | None:
        """Take the key out of `x-api-key`, which wins, or of the bearer token that SDK 2 sends instead."""
        return headers.get("x-api-key", "").strip() or bearer(headers)

    def key_headers(self, key: str) -> dict[str, str]:
        """Return `x-api-key`, or a bearer token where the key is an OAuth token (`sk-ant-oat...`)."""
        return {"authorization": f"Bearer {key}"} if key.startswith("sk-ant-oat") else {"x-api-key": key}

    def organisation(self, headers: Mapping[str, str]) -> str | None:
        """Read the workspace, which batches and caches belong to, or else the organisation."""
        return headers.get("anthropic-workspace-id") or headers.get("anthropic-organization-id")

    def read_usage(self, body: bytes) -> Usage | None:
        """Read `usage` of a message."""
        return _usage(mapping(mapping(read_object(body)).get("usage")))

    def stream_meter(self) -> StreamMeter:
        """Return a meter for `message_start` and `message_delta`, whose counts are cumulative."""
        return SseMeter(
            lambda event: event.get("usage") or mapping(event.get("message")).get("usage"), _usage, "message_delta"
        )

    def compose(self, model: str, prompt: Prompt) -> tuple[str, bytes, tuple[tuple[str, str], ...]]:
        """Write instructions as `system`, the document as a user message, the schema as `output_config`."""
        body: dict[str, Any] = {"model": model, "max_tokens": prompt.max_tokens}
        if prompt.instructions:
            body["system"] = prompt.instructions
        body["messages"] = [{"role": "user", "content": prompt.document}]
        if prompt.schema:
            body["output_config"] = {"format": {"type": "json_schema", "schema": dict(prompt.schema)}}
        return _MESSAGES, dump(body), (("anthropic-version", _VERSION),)

    def read_text(self, body: bytes) -> str:
        """Join the text blocks; raises `ValueError` if it was refused, cut off or holds no text."""
        answer = mapping(read_object(body))
        if answer.get("type") == "error":
            raise ValueError(f"the answer is an error: {mapping(answer.get('error')).get('message')}")
        stop = answer.get("stop_reason")
        if stop == "refusal":
            raise ValueError("the model refused")
        if stop in {"max_tokens", "model_context_window_exceeded"}:
            raise ValueError(f"the answer was cut off: `{stop}`")
        content = answer.get("content")
        blocks = [mapping(block) for block in content] if isinstance(content, list) else []
        texts = [block["text"] for block in blocks if isinstance(block.get("text"), str)]
        if not any(texts):
            raise ValueError(f"the answer holds no text: stop reason `{stop}`, {len(blocks)} blocks")
        return "".join(texts)

    def error_body(self, status: int, message: str) -> bytes:
        """Write `{"type": "error", ...}` with the error type that goes with the status."""
        return _error_body(status, message)

    def classify(self, refusal: RefusedError) -> Refusal:
        """Go by the status, but for the spend limits, which hide in 400 and 429."""
        error = mapping(mapping(read_object(refusal.body)).get("error"))
        message = str(error.get("message"))
        if (
            refusal.status == 402
            or (refusal.status == 429 and mapping(error.get("details")).get("error_code") in _LIMIT_CODES)
            or (refusal.status == 400 and any(text in message for text in _LIMIT_TEXTS))
        ):
            return Refusal.LIMIT
        return refusal_of(refusal.status)

    async def submit(
        self,
        channel: Channel,
        key: BatchKey,
        job: Job,  # noqa: ARG002
        rows: Rows,
        steps: Steps,
    ) -> str:
        """Create the batch with all its requests in one streamed POST."""
        await steps.creating()
        length = len(_OPEN) + rows.count * _FRAME_BYTES - len(b",") + rows.size_bytes + len(_END)
        return await create_batch(channel, _BATCHES, dict(key.headers), coalesce(_frame(rows)), length)

    async def check(self, channel: Channel, key: BatchKey, job: Job) -> Look:
        """Look whether `processing_status` is `ended`, the only end there is."""
        batch = await _read_batch(channel, key, job)
        counts = mapping(batch.get("request_counts"))
        return Look(
            JobProgress(
                ended=batch["processing_status"] == "ended",
                processing=tokens(counts.get("processing")),
                succeeded=tokens(counts.get("succeeded")),
                failed=sum(tokens(counts.get(kind)) for kind in ("errored", "canceled", "expired")),
            )
        )

    async def collect(self, channel: Channel, key: BatchKey, job: Job) -> AsyncGenerator[Row, None]:
        """Stream the rows of `/results`, which come in any order."""
        batch = await _read_batch(channel, key, job)
        async with aclosing(channel.lines(_results(key, batch), headers=dict(key.headers))) as lines:
            async for line in lines:
                row = read_row(line, job.batch_id)
                if row is not None:
                    yield row

    async def cancel(self, channel: Channel, key: BatchKey, job: Job) -> None:
        """POST to `/cancel`; a refusal counts only while the batch goes on as if nobody had asked."""
        try:
            await channel.send("POST", f"{_batch(job)}/cancel", headers=dict(key.headers))
        except RefusedError as refusal:
            if refusal.status not in {400, 409}:
                raise
            if (await _read_batch(channel, key, job))["processing_status"] == "in_progress":
                raise

    async def find(self, channel: Channel, key: BatchKey, job: Job, ids: Sequence[str], known: KnownBatch) -> Finding:
        """Look for our custom_ids in each unknown batch of the right time and size that has ended."""
        since = job.created_at if job.create_at is None else job.create_at
        ours = frozenset(ids)
        strangers = _STRANGERS if len(ours) >= job.count else None
        undecided = []
        batches = batches_since(channel, _BATCHES, dict(key.headers), "after_id", since, _created_at)
        async with aclosing(batches):
            async for batch in batches:
                counts = mapping(batch.get("request_counts"))
                if sum(map(tokens, counts.values())) != job.count or await known(batch["id"]):
                    continue
                verdict = await _is_ours(channel, key, batch, ours, strangers)
                if verdict:
                    return Finding(batch_id=batch["id"])
                if verdict is None:
                    undecided.append(batch["id"])
        if not undecided:
            return Finding()
        return Finding(waiting_for=f"the end of {', '.join(undecided)}: of the right time and size ({job.count})")


def read_row(line: bytes, batch_id: str | None) -> Row | None:
    """Read one line of `/results`; `None` if it cannot be read. Never raises."""
    row = mapping(read_object(line))
    custom_id = row.get("custom_id")
    outcome = _outcome(line, mapping(row.get("result")))
    if not isinstance(custom_id, str) or outcome is None:
        return None
    return Row(custom_id, replace(outcome, batch_id=batch_id))


def _outcome(line: bytes, result: Mapping[str, Any]) -> Outcome | None:
    match result.get("type"):
        case "succeeded" if isinstance(result.get("message"), dict):
            body = (slice_of(line.decode(), "result", "message") or "").encode()
            return Outcome(OutcomeKind.SUCCEEDED, 200, body, _usage(mapping(result["message"].get("usage"))))
        case "errored":
            return _errored(line, mapping(result.get("error")))
        case "expired":
            body = _error_body(504, "The batch expired before this request was answered.")
            return Outcome(OutcomeKind.EXPIRED, 504, body, reason="expired")
        case "canceled":
            body = _error_body(409, "The batch was cancelled before this request was answered.")
            return Outcome(OutcomeKind.CANCELLED, 409, body, reason="cancelled")
        case _:
            return None


def _errored(line: bytes, error: Mapping[str, Any]) -> Outcome:
    whole = error.get("type") == "error" and isinstance(error.get("error"), dict)
    inner = mapping(error["error"]) if whole else error
    kind, message = inner.get("type"), inner.get("message")
    reason = kind if isinstance(kind, str) else "api_error"
    status = _STATUS.get(reason, 500)
    body = (slice_of(line.decode(), "result", "error") or "").encode() if whole else b""
    text = message if isinstance(message, str) else "The vendor gave no reason."
    return Outcome(OutcomeKind.ERRORED, status, body or _error_body(status, text), reason=reason)


def _usage(usage: Mapping[str, Any]) -> Usage | None:
    if not usage.keys() & {"input_tokens", "output_tokens"}:
        return None
    by_ttl = mapping(usage.get("cache_creation"))
    five_minutes = tokens(by_ttl.get("ephemeral_5m_input_tokens"))
    one_hour = tokens(by_ttl.get("ephemeral_1h_input_tokens"))
    return Usage(
        input_tokens=tokens(usage.get("input_tokens")),
        cache_write_5m_tokens=five_minutes,
        cache_write_1h_tokens=one_hour,
        cache_write_tokens=max(0, tokens(usage.get("cache_creation_input_tokens")) - five_minutes - one_hour),
        cache_read_tokens=tokens(usage.get("cache_read_input_tokens")),
        output_tokens=tokens(usage.get("output_tokens")),
    )


def _unbatchable(payload: Mapping[str, Any], headers: Mapping[str, str], body: bytes) -> str | None:
    for field, forbids in _NOT_IN_BATCHES.items():
        if forbids(payload.get(field)):
            return f"Anthropic takes no `{field}: {payload[field]}` in a batch"
    if _BETA_NOT_IN_BATCHES in headers.get("anthropic-beta", "").replace("-", "_"):
        return f"Anthropic takes no beta `{_BETA_NOT_IN_BATCHES}` in a batch"
    if half_surrogate(payload, body):
        return "it holds half a surrogate pair"
    return None


def _error_body(status: int, message: str) -> bytes:
    names = {number: name for name, number in _STATUS.items()}
    kind = names.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return dump({"type": "error", "error": {"type": kind, "message": message}, "request_id": None})


async def _frame(rows: Rows) -> AsyncGenerator[bytes, None]:
    lead = _OPEN
    async for custom_id, body in rows:
        yield lead + _ROW + custom_id.encode() + _MIDDLE
        yield body
        lead = b"},"
    yield b"}" + _END


def _batch(job: Job) -> str:
    return f"{_BATCHES}/{batch_path(job)}"


async def _read_batch(channel: Channel, key: BatchKey, job: Job) -> dict[str, Any]:
    batch = object_in(await channel.send("GET", _batch(job), headers=dict(key.headers)), "a batch")
    if not isinstance(batch.get("processing_status"), str):
        raise GarbledError(f"batch `{job.batch_id}` has no processing status")
    return batch


def _results(key: BatchKey, batch: Mapping[str, Any]) -> str:
    """Follow the vendor's own link only below the base URL: a gateway hands on links that lead around it."""
    url = batch.get("results_url")
    if isinstance(url, str) and url.startswith(f"{key.base_url}/"):
        return url.removeprefix(key.base_url)
    return f"{_BATCHES}/{path_of(str(batch.get('id')))}/results"


def _created_at(batch: Mapping[str, Any]) -> float | None:
    try:
        time = datetime.fromisoformat(str(batch.get("created_at")))
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


async def _is_ours(
    channel: Channel, key: BatchKey, batch: Mapping[str, Any], ids: frozenset[str], strangers: int | None
) -> bool | None:
    """Look for our custom_ids in a batch's results; `None` if they cannot be read yet."""
    if batch.get("processing_status") != "ended":
        return None
    seen = 0
    try:
        async with aclosing(channel.lines(_results(key, batch), headers=dict(key.headers))) as lines:
            async for line in lines:
                custom_id = mapping(read_object(line)).get("custom_id")
                if isinstance(custom_id, str):
                    if custom_id in ids:
                        return True
                    seen += 1
                if seen == strangers:
                    break
    except RefusedError:
        return None
    return False if seen else None
