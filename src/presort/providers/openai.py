"""OpenAI's Chat Completions and Batch APIs.

A batch takes its requests as an uploaded file, validates the file whole, and carries a label of ours, so a
create whose answer was lost is found at once. Answers are split over an output and an error file, either of
which may be missing in any terminal state.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
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
    id_in,
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
    Failure,
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

_CHAT = "/chat/completions"
_ENDPOINT = "/v1/chat/completions"
"""The endpoint's name inside a batch, whatever the base URL."""

_LABEL = "presort_job"

_HEADERS = ("openai-organization", "openai-project", "openai-beta")
"""Headers that alter what a call means. Source: openai SDK 3.54.0, `_client.py`."""

_AZURE = (".azure.com", ".azure.us", ".azure.cn")
"""Azure's hosts: OpenAI's calls with another batch API. Source: learn.microsoft.com, global batch."""

_TIERS_NOT_IN_BATCHES = frozenset({"flex", "priority"})
"""Source: OpenAI's pricing and batch guides as read for facts/providers.md 2.5, 2026-09."""

_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_UNMOVED = frozenset({"validating", "in_progress"})
"""Source: openai SDK 3.54.0, `types/batch.py`."""

_PASSING_FAILURES = ("token_limit", "enqueued", "rate_limit")
"""In the code of a failed batch that may pass later. Source: captures and issues, facts/peers.md, 2026."""

_LIMIT_CODES = frozenset(
    {
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "insufficient_quota",
        "billing_hard_limit_reached",
    }
)
"""Error codes that waiting does not lift. Source: OpenAI's error guide, 2026-09; the last two are older."""

_UNANSWERED = {
    "batch_expired": (OutcomeKind.EXPIRED, 504, "expired"),
    "batch_cancelled": (OutcomeKind.CANCELLED, 409, "cancelled"),
}
"""Error codes of rows that never ran. Source: captured rows, 2026-09."""

_ROW = b'{"custom_id":"'
_MIDDLE = b'","method":"POST","url":"/v1/chat/completions","body":'
_END = b"}\n"
_CUSTOM_ID_BYTES = 35
_FRAME_BYTES = len(_ROW) + _CUSTOM_ID_BYTES + len(_MIDDLE) + len(_END)


class OpenAI(Provider):
    """OpenAI: `/chat/completions`, batched by `/files` and `/batches`."""

    name = "openai"
    title = "OpenAI"
    default_base_url = "https://api.openai.com/v1"
    default_model = "gpt-5-mini"
    key_variable = "OPENAI_API_KEY"
    base_url_variable = "OPENAI_BASE_URL"
    probe_path = "/models"
    limits = BatchLimits(
        max_requests=50_000,
        max_bytes=200_000_000 - 50_000 * _FRAME_BYTES,
        source="openai SDK 3.54.0, batches.create: 50,000 requests and 200 MB per file; 2026-11-23",
    )
    reconcile_by_label = True

    def recognise(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> Call | None:
        """Read a POST to `.../chat/completions` that is not Azure's."""
        split = split_call(method, url, _CHAT, body)
        if split is None:
            return None
        base_url, payload = split
        azure = (urlsplit(base_url).hostname or "").endswith(_AZURE)
        if azure or "/deployments/" in base_url or "api-key" in headers:
            return None
        return Call(
            base_url=base_url,
            endpoint=_CHAT,
            model=payload["model"],
            streaming=bool(payload.get("stream")),
            unbatchable=_unbatchable(payload, body),
            headers=present(headers, _HEADERS),
        )

    def read_key(self, headers: Mapping[str, str]) -> str | None:
        """Take the bearer token."""
        return bearer(headers)

    def key_headers(self, key: str) -> dict[str, str]:
        """Return the key as a bearer token."""
        return {"authorization": f"Bearer {key}"}

    def organisation(self, headers: Mapping[str, str]) -> str | None:
        """Read the project, which batches and files belong to, or else the organisation."""
        return headers.get("openai-project") or headers.get("openai-organization")

    def read_usage(self, body: bytes) -> Usage | None:
        """Read `usage` of a completion."""
        return _usage(mapping(mapping(read_object(body)).get("usage")))

    def stream_meter(self) -> StreamMeter:
        """Return a meter for the usage chunk, which comes only if the caller asked (`stream_options`)."""
        return SseMeter(lambda event: event.get("usage"), _usage)

    def compose(self, model: str, prompt: Prompt) -> tuple[str, bytes, tuple[tuple[str, str], ...]]:
        """Write instructions and document as two messages, the schema as a strict `response_format`."""
        messages = [{"role": "user", "content": prompt.document}]
        if prompt.instructions:
            messages.insert(0, {"role": "system", "content": prompt.instructions})
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "max_completion_tokens": prompt.max_tokens,
        }
        if prompt.schema:
            schema = {"name": prompt.schema_name, "schema": dict(prompt.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return _CHAT, dump(body), ()

    def read_text(self, body: bytes) -> str:
        """Return the first choice's text; raises `ValueError` if it was refused, cut off or is not there."""
        answer = mapping(read_object(body))
        if "error" in answer:
            raise ValueError(f"the answer is an error: {mapping(answer['error']).get('message')}")
        choices = answer.get("choices")
        choice = mapping(choices[0]) if isinstance(choices, list) and choices else {}
        message = mapping(choice.get("message"))
        stop = choice.get("finish_reason")
        if message.get("refusal") or stop == "content_filter":
            raise ValueError(f"the model refused: {message.get('refusal') or stop}")
        if stop == "length":
            raise ValueError("the answer was cut off: `length`")
        content = message.get("content")
        if not isinstance(content, str) or not content:
            raise ValueError(f"the answer holds no text: finish reason `{stop}`")
        return content

    def error_body(self, status: int, message: str) -> bytes:
        """Write `{"error": {...}}`; its type says no more than whose fault it was."""
        return _error_body(status, message)

    def classify(self, refusal: RefusedError) -> Refusal:
        """Go by the status, but for the spend limits, which only the error's code tells from rate limits."""
        error = mapping(mapping(read_object(refusal.body)).get("error"))
        if _LIMIT_CODES & {str(error.get("code")), str(error.get("type"))} or refusal.status == 402:
            return Refusal.LIMIT
        return refusal_of(refusal.status)

    async def submit(self, channel: Channel, key: BatchKey, job: Job, rows: Rows, steps: Steps) -> str:
        """Upload the requests as a file, unless that is done already, and create the batch on it."""
        input_ref = job.input_ref
        if input_ref is None:
            input_ref = await _upload(channel, key, job, rows)
            await steps.uploaded(input_ref)
        order = {
            "input_file_id": input_ref,
            "endpoint": _ENDPOINT,
            "completion_window": "24h",
            "metadata": {_LABEL: job.id},
        }
        await steps.creating()
        return await create_batch(channel, "/batches", dict(key.headers), dump(order))

    async def check(self, channel: Channel, key: BatchKey, job: Job) -> Look:
        """Look whether the status is a terminal one; `failed` without files means that nothing ran."""
        batch = await _read_batch(channel, key, job)
        counts = mapping(batch.get("request_counts"))
        succeeded, failed = tokens(counts.get("completed")), tokens(counts.get("failed"))
        processing = max(0, tokens(counts.get("total")) - succeeded - failed)
        progress = JobProgress(batch["status"] in _ENDED, processing, succeeded, failed)
        rejected = batch["status"] == "failed" and not _files(batch)
        return Look(progress, read_failure(batch) if rejected else None)

    async def collect(self, channel: Channel, key: BatchKey, job: Job) -> AsyncGenerator[Row, None]:
        """Stream the rows of the output file and then of the error file, where they exist."""
        for file in _files(await _read_batch(channel, key, job)):
            path = f"/files/{path_of(file)}/content"
            async with aclosing(channel.lines(path, headers=dict(key.headers))) as lines:
                async for line in lines:
                    row = read_row(line, job.batch_id)
                    if row is not None:
                        yield row

    async def cancel(self, channel: Channel, key: BatchKey, job: Job) -> None:
        """POST to `/cancel`; a refusal counts only while the batch goes on as if nobody had asked."""
        try:
            await channel.send("POST", f"/batches/{batch_path(job)}/cancel", headers=dict(key.headers))
        except RefusedError as refusal:
            if refusal.status not in {400, 409}:
                raise
            if (await _read_batch(channel, key, job))["status"] in _UNMOVED:
                raise

    async def find(
        self,
        channel: Channel,
        key: BatchKey,
        job: Job,
        ids: Sequence[str],  # noqa: ARG002
        known: KnownBatch,
    ) -> Finding:
        """Look for our label among the batches created since."""
        since = job.created_at if job.create_at is None else job.create_at
        batches = batches_since(channel, "/batches", dict(key.headers), "after", since, _created_at)
        async with aclosing(batches):
            async for batch in batches:
                labelled = mapping(batch.get("metadata")).get(_LABEL) == job.id
                if labelled and not await known(batch["id"]):
                    return Finding(batch_id=batch["id"])
        return Finding()


def read_failure(batch: Mapping[str, Any]) -> Failure:
    """Read why a batch `failed`: the first error that names a line, or else the first."""
    data = mapping(batch.get("errors")).get("data")
    errors = [error for error in data if isinstance(error, dict)] if isinstance(data, list) else []
    if not errors:
        return Failure("the vendor gave no reason")
    error = next((error for error in errors if tokens(error.get("line"))), errors[0])
    code = str(error.get("code") or "")
    return Failure(
        message=": ".join(str(part) for part in (error.get("code"), error.get("message")) if part),
        line=tokens(error.get("line")) or None,
        retryable=any(part in code for part in _PASSING_FAILURES),
    )


def read_row(line: bytes, batch_id: str | None) -> Row | None:
    """Read one line of an output or error file; `None` if it says nothing of its request. Never raises."""
    row = mapping(read_object(line))
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str):
        return None
    outcome = _outcome(line.decode(), mapping(row.get("response")), row.get("error"))
    return None if outcome is None else Row(custom_id, replace(outcome, batch_id=batch_id))


def _outcome(text: str, response: Mapping[str, Any], error: Any) -> Outcome | None:
    """Read an answer, the error that stands in for one, or the vendor's word that there will be none.

    Compatible vendors leave keys out, put the error into the body or beside the response, or write either as
    a string. An answer comes before an error.
    """
    content, answer = _body(text, response)
    status = response.get("status_code")
    if not isinstance(status, int) or not 100 <= status <= 599:
        status = 200 if "choices" in answer else None
    failed = status is None or status >= 300 or ("error" in answer and "choices" not in answer)
    if not failed and not content:
        return None
    if not failed:
        return Outcome(OutcomeKind.SUCCEEDED, 200, content, _usage(mapping(answer.get("usage"))))
    code, message = _reason(error or answer.get("error"))
    if code in _UNANSWERED:
        kind, status, reason = _UNANSWERED[code]
        return Outcome(kind, status, _error_body(status, message or reason, code), reason=reason)
    if status is None and not message and not code:
        return None
    status = status if status is not None and status >= 300 else 500
    body = content or _error_body(status, message or "The vendor gave no reason.", code)
    return Outcome(OutcomeKind.ERRORED, status, body, reason=code or f"http_{status}")


def _body(text: str, response: Mapping[str, Any]) -> tuple[bytes, Mapping[str, Any]]:
    body = response.get("body")
    if isinstance(body, str):
        inner = read_object(body)
        return (body.encode(errors="replace"), inner) if inner else (b"", {"error": body})
    if not isinstance(body, dict):
        return b"", {}
    return (slice_of(text, "response", "body") or "").encode(), body


def _reason(error: Any) -> tuple[str | None, str | None]:
    """Read code and message of an error that may be an object or a string."""
    if isinstance(error, str):
        return (error, error) if error in _UNANSWERED else (None, error)
    fields = mapping(error)
    code = fields.get("code") or fields.get("type")
    message = fields.get("message")
    return (str(code) if code else None), (str(message) if message else None)


def _usage(usage: Mapping[str, Any]) -> Usage | None:
    if not usage.keys() & {"prompt_tokens", "completion_tokens"}:
        return None
    details = mapping(usage.get("prompt_tokens_details"))
    read, written = tokens(details.get("cached_tokens")), tokens(details.get("cache_write_tokens"))
    return Usage(
        input_tokens=max(0, tokens(usage.get("prompt_tokens")) - read - written),
        cache_write_tokens=written,
        cache_read_tokens=read,
        output_tokens=tokens(usage.get("completion_tokens")),
    )


def _unbatchable(payload: Mapping[str, Any], body: bytes) -> str | None:
    if payload.get("stream"):
        return "OpenAI takes no `stream` in a batch"
    tier = payload.get("service_tier")
    if isinstance(tier, str) and tier in _TIERS_NOT_IN_BATCHES:
        return f"OpenAI takes no `service_tier: {tier}` in a batch"
    return "it holds half a surrogate pair" if half_surrogate(payload, body) else None


def _error_body(status: int, message: str, code: str | None = None) -> bytes:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return dump({"error": {"message": message, "type": kind, "param": None, "code": code}})


async def _upload(channel: Channel, key: BatchKey, job: Job, rows: Rows) -> str:
    """Upload the rows as a JSONL file in one streamed multipart form of known length."""
    # Every line of the file begins with a brace and holds no line break, so no boundary can occur in it.
    boundary = f"presort-{job.id}"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="presort-{job.id}.jsonl"\r\n'
        "Content-Type: application/jsonl\r\n\r\n"
    ).encode()
    tail = f"\r\n--{boundary}--\r\n".encode()
    reply = await channel.send(
        "POST",
        "/files",
        headers={**dict(key.headers), "content-type": f"multipart/form-data; boundary={boundary}"},
        content=coalesce(_form(head, rows, tail)),
        content_length=len(head) + rows.count * _FRAME_BYTES + rows.size_bytes + len(tail),
    )
    return id_in(reply, "a file")


async def _form(head: bytes, rows: Rows, tail: bytes) -> AsyncGenerator[bytes, None]:
    yield head
    async for custom_id, body in rows:
        yield _ROW + custom_id.encode() + _MIDDLE
        yield body
        yield _END
    yield tail


async def _read_batch(channel: Channel, key: BatchKey, job: Job) -> dict[str, Any]:
    reply = await channel.send("GET", f"/batches/{batch_path(job)}", headers=dict(key.headers))
    batch = object_in(reply, "a batch")
    if not isinstance(batch.get("status"), str):
        raise GarbledError(f"batch `{job.batch_id}` has no status")
    return batch


def _files(batch: Mapping[str, Any]) -> list[str]:
    """List the output and the error file, as far as there are any."""
    files = (batch.get("output_file_id"), batch.get("error_file_id"))
    return [file for file in files if isinstance(file, str) and file]


def _created_at(batch: Mapping[str, Any]) -> float | None:
    time = batch.get("created_at")
    return float(time) if isinstance(time, int | float) else None
