"""Anthropic's API: Messages, token counting, Message Batches, models.

Shapes and wordings: the anthropic package 2.12 and live captures of 2026-08/09.
"""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from presort.emulator import anthropic_messages as messages
from presort.emulator.anthropic_messages import VERSIONS, Rules, invalid
from presort.emulator.batches import Outcome, new_batch
from presort.emulator.billing import Lane
from presort.emulator.cache import Reader
from presort.emulator.clock import rfc3339
from presort.emulator.core import ORGANIZATION, Emulator
from presort.emulator.faults import Fault, deface
from presort.emulator.lifecycle import WINDOW_SECONDS, Window
from presort.emulator.models import ANTHROPIC
from presort.emulator.state import Batch, Entry, NewEntry, Tenant
from presort.emulator.wire import (
    MALFORMED,
    Call,
    VendorError,
    batch_faults,
    canonical_sha256,
    json_response,
    listed,
    malformed,
    new_id,
    route,
    visible,
)

WORKSPACE: Final = "wrkspc_emulated"
RETENTION_SECONDS: Final = 29 * 86_400
"""Results are kept for 29 days after creation (Anthropic docs, "Message Batches")."""

POLL_AGAIN_SECONDS: Final = 10
CUSTOM_ID: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")

ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Anthropic docs, "Errors"."""

TOO_LARGE: Final = (
    "<html>\r\n<head><title>413 Request Entity Too Large</title></head>\r\n<body>\r\n"
    "<center><h1>413 Request Entity Too Large</h1></center>\r\n<hr><center>cloudflare</center>\r\n"
    "</body>\r\n</html>\r\n"
)
"""On the direct API the proxy in front answers oversized bodies, not in JSON."""


class TooLarge(VendorError):
    """The 413 of the proxy in front of the API."""


class Anthropic:
    """How Anthropic identifies callers and words errors."""

    name = "anthropic"

    def authenticate(self, emulator: Emulator, request: Request) -> Tenant:
        """Accept `x-api-key`, or `Authorization: Bearer`; the former wins."""
        bearer = request.headers.get("authorization", "")
        key = request.headers.get("x-api-key") or bearer.removeprefix("Bearer ").strip()
        if not key:
            raise VendorError(401, "x-api-key header is required", "authentication_error")
        known = emulator.state.key(key)
        if known[1] if known else emulator.settings.only_listed_keys:
            raise VendorError(401, "API key is invalid.", "authentication_error")
        tenant = known[0] if known else Tenant(ORGANIZATION, "")
        workspace = request.headers.get("anthropic-workspace-id") or tenant.workspace or WORKSPACE
        version = request.headers.get("anthropic-version")
        if version is None:
            raise invalid("anthropic-version: header is required")
        if version not in VERSIONS:
            raise invalid(f'anthropic-version: "{version}" is not a valid version')
        return Tenant(tenant.organization, workspace)

    def headers(self, call: Call | None) -> dict[str, str]:
        """Request id, and whose request it was."""
        headers = {"request-id": new_id("req_")}
        if call is not None:
            headers["anthropic-organization-id"] = call.tenant.organization
            headers["anthropic-workspace-id"] = call.tenant.workspace
        return headers

    def render_error(self, error: VendorError) -> Response:
        """Write the error envelope."""
        if isinstance(error, TooLarge):
            return HTMLResponse(TOO_LARGE, status_code=413, headers={"server": "cloudflare"})
        return json_response({**_error(error), "request_id": new_id("req_")}, error.status)

    def fault_error(self, fault: Fault) -> VendorError:
        """An ordered error; `error_code` goes into its details."""
        status = fault.get("status", 500)
        error_type = fault.get("error_type") or ERROR_TYPES.get(status, "api_error")
        message = fault.get("message") or f"EMULATED {error_type}"
        headers = {"retry-after": str(fault["retry_after"])} if "retry_after" in fault else {}
        return VendorError(status, message, error_type, code=fault.get("error_code"), headers=headers)


def _error(error: VendorError) -> dict[str, Any]:
    inner: dict[str, Any] = {
        "type": error.type or ERROR_TYPES.get(error.status, "api_error"),
        "message": error.message,
    }
    if error.code:
        inner["details"] = {"error_code": error.code}
    return {"type": "error", "error": inner}


def routes(emulator: Emulator) -> list[Route]:
    """All of Anthropic's routes except those it shares with OpenAI."""
    vendor = Anthropic()
    table = [
        ("POST", "/v1/messages", "standard", create_message),
        ("POST", "/v1/messages/count_tokens", "count_tokens", count_tokens),
        ("POST", "/v1/messages/batches", "create_batch", create_batch),
        ("GET", "/v1/messages/batches", "list_batches", list_batches),
        ("GET", "/v1/messages/batches/{id}", "retrieve_batch", retrieve_batch),
        ("DELETE", "/v1/messages/batches/{id}", "delete_batch", delete_batch),
        ("POST", "/v1/messages/batches/{id}/cancel", "cancel_batch", cancel_batch),
        ("GET", "/v1/messages/batches/{id}/results", "results", results),
    ]
    return [route(emulator, vendor, *each) for each in table]


# Messages


async def create_message(call: Call) -> Response:
    """POST /v1/messages."""
    params = await _params(call)
    emulator, tenant = call.emulator, call.tenant
    model = params.get("model") if isinstance(params, dict) and isinstance(params.get("model"), str) else None
    record = ("anthropic", tenant, model, canonical_sha256(params), emulator.clock.now())
    try:
        messages.validate(params, _rules(call, "standard"))
    except VendorError as error:
        emulator.state.add_call(*record, error.status)
        raise
    reader = Reader(messages.scope(tenant, params["model"]), emulator.clock.now())
    plan = messages.plan(params, emulator.cache, reader, emulator.settings)
    if emulator.settings.answer_seconds:
        await asyncio.sleep(emulator.settings.answer_seconds)
    answer = messages.answer(params, eager_tools=emulator.settings.eager_tools)
    usage = replace(plan.usage, output=answer.output_tokens)
    with emulator.state.transaction():
        emulator.cache.commit(plan, reader)
        emulator.meter.add("anthropic", params["model"], "standard", usage)
        emulator.meter.store()
        emulator.state.add_call(*record, 200)
    message = messages.message(params, answer, usage, new_id("msg_"), "standard")
    response: Response = json_response(message)
    if params.get("stream"):
        response = StreamingResponse(_stream(message), media_type="text/event-stream")
    response.headers.update(_rate_limits(emulator.clock.now()))
    return response


async def _stream(message: dict[str, Any]) -> AsyncIterator[bytes]:
    for name, data in messages.events(message):
        yield f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


async def count_tokens(call: Call) -> Response:
    """POST /v1/messages/count_tokens."""
    params = await _params(call)
    messages.validate(params, _rules(call, "standard"), counting=True)
    return json_response({"input_tokens": messages.count_tokens(params)})


async def _params(call: Call) -> Any:
    try:
        return await call.json()
    except ValueError as error:
        raise invalid(f"The request body is not valid JSON: {error}") from None


def _rules(call: Call, lane: Lane) -> Rules:
    version = call.header("anthropic-version", VERSIONS[0])
    return Rules(version, lane, call.header("anthropic-beta"), call.emulator.settings)


def _rate_limits(now: float) -> dict[str, str]:
    limits = {"requests": 4_000, "tokens": 2_400_000, "input-tokens": 2_000_000, "output-tokens": 400_000}
    headers = {}
    for name, limit in limits.items():
        headers[f"anthropic-ratelimit-{name}-limit"] = str(limit)
        headers[f"anthropic-ratelimit-{name}-remaining"] = str(limit - 1)
        headers[f"anthropic-ratelimit-{name}-reset"] = rfc3339(now + 1)[:19] + "Z"
    return headers


# Batches


async def create_batch(call: Call) -> Response:
    """POST /v1/messages/batches; what is inside `params` is judged later, row by row."""
    body = await _bounded_json(call)
    requests = _requests(body, call.emulator.settings.anthropic_max_requests)
    emulator = call.emulator
    whole, rows = batch_faults(call, "anthropic")
    call.drop = "late_create" in whole
    details = {
        "version": call.header("anthropic-version"),
        "betas": call.header("anthropic-beta"),
        "row_faults": rows,
    }
    batch = new_batch(
        new_id("msgbatch_"), "anthropic", call.tenant, emulator.clock.now(), emulator.settings, whole, details
    )
    batch.size = len(requests)
    with emulator.state.transaction():
        emulator.state.put_batch(batch)
        emulator.state.add_entries(_entry(batch.id, n, each) for n, each in enumerate(requests))
        if "foreign_batch" in whole:
            _add_foreign(emulator, batch, requests)
    return json_response(batch_object(batch, call))


async def _bounded_json(call: Call) -> Any:
    limit = call.emulator.settings.anthropic_max_bytes
    body, size = bytearray(), 0
    async for chunk in call.request.stream():
        size += len(chunk)
        if size <= limit:
            body += chunk
    if size > limit:
        raise TooLarge(413, "Request exceeds the maximum size")
    try:
        return json.loads(body)
    except ValueError as error:
        raise invalid(f"The request body is not valid JSON: {error}") from None


def _requests(body: Any, limit: int) -> list[dict[str, Any]]:
    """The requests of a create call, judged as early as the API judges them."""
    if not isinstance(body, dict) or "requests" not in body:
        raise invalid("requests: Field required")
    requests = body["requests"]
    if not isinstance(requests, list):
        raise invalid("requests: Input should be a valid list")
    if not requests:
        raise invalid("requests: List should have at least 1 item after validation, not 0")
    if len(requests) > limit:
        raise TooLarge(413, "Too many requests in the batch")
    seen: set[str] = set()
    for n, request in enumerate(requests):
        _check_request(n, request)
        custom_id = request["custom_id"]
        if custom_id in seen:
            text = "requests: custom_id's must be unique within a batch. Duplicate custom_id found:"
            raise invalid(f"{text} {custom_id}")
        seen.add(custom_id)
    return requests


def _check_request(n: int, request: Any) -> None:
    if not isinstance(request, dict):
        raise invalid(f"requests.{n}: Input should be a valid dictionary")
    for name in ("custom_id", "params"):
        if name not in request:
            raise invalid(f"requests.{n}.{name}: Field required")
    custom_id = request["custom_id"]
    if not isinstance(custom_id, str):
        raise invalid(f"requests.{n}.custom_id: Input should be a valid string")
    if len(custom_id) > 64:
        raise invalid(f"requests.{n}.custom_id: String should have at most 64 characters")
    if not CUSTOM_ID.fullmatch(custom_id):
        raise invalid(f"requests.{n}.custom_id: String should match pattern '^[a-zA-Z0-9_-]{{1,64}}$'")


def _entry(batch_id: str, n: int, request: dict[str, Any]) -> NewEntry:
    """A stored request; its place among the results is arbitrary but always the same."""
    custom_id, params = request["custom_id"], request["params"]
    return (
        batch_id,
        n,
        custom_id,
        canonical_sha256(params),
        json.dumps(params),
        zlib.crc32(custom_id.encode()),
    )


def _add_foreign(emulator: Emulator, batch: Batch, requests: list[dict[str, Any]]) -> None:
    """Somebody else's batch of the same size, at the same moment, in the same workspace."""
    foreign = replace(batch, id=new_id("msgbatch_"), counts={}, details={**batch.details, "foreign": True})
    foreign.details["row_faults"] = []
    model = next((each["params"].get("model") for each in requests if isinstance(each["params"], dict)), None)
    params = {"model": model, "max_tokens": 64, "messages": [{"role": "user", "content": "Somebody else's."}]}
    emulator.state.put_batch(foreign)
    rows = ({"custom_id": f"somebody-elses-{n}", "params": params} for n in range(len(requests)))
    emulator.state.add_entries(_entry(foreign.id, n, each) for n, each in enumerate(rows))


def _find(call: Call) -> Batch:
    batch_id = call.request.path_params["id"]
    batch = call.emulator.state.batch(batch_id)
    if batch is None or batch.vendor != "anthropic" or not visible(batch, call):
        raise VendorError(404, f"Message Batch {batch_id} not found.", "not_found_error")
    return batch


def batch_object(batch: Batch, call: Call) -> dict[str, Any]:
    """The MessageBatch; counts stay at zero until the whole batch has ended."""
    names = ("succeeded", "errored", "canceled", "expired")
    over = batch.ended_at is not None
    counts = {name: batch.counts.get(name, 0) if over else 0 for name in names}
    archived_at = batch.created_at + RETENTION_SECONDS
    archived = over and call.emulator.clock.now() >= archived_at
    status = "ended" if over else "canceling" if batch.cancelled_at is not None else "in_progress"
    url = f"{call.request.url.scheme}://{call.header('host')}/v1/messages/batches/{batch.id}/results"
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": status,
        "request_counts": {"processing": 0 if over else batch.size, **counts},
        "created_at": rfc3339(batch.created_at),
        "expires_at": rfc3339(batch.created_at + WINDOW_SECONDS),
        "ended_at": None if batch.ended_at is None else rfc3339(batch.ended_at),
        "cancel_initiated_at": None if batch.cancelled_at is None else rfc3339(batch.cancelled_at),
        "archived_at": rfc3339(archived_at) if archived else None,
        "results_url": url if over and not archived else None,
    }


async def retrieve_batch(call: Call) -> Response:
    """GET /v1/messages/batches/{id}."""
    batch = _find(call)
    response = json_response(batch_object(batch, call))
    if batch.ended_at is None:
        response.headers["retry-after"] = str(POLL_AGAIN_SECONDS)
    return response


async def list_batches(call: Call) -> Response:
    """GET /v1/messages/batches, newest first."""
    query = call.request.query_params
    try:
        limit = int(query.get("limit", "20"))
    except ValueError:
        raise invalid("limit: Input should be a valid integer") from None
    if not 1 <= limit <= 1_000:
        bound = "greater than or equal to 1" if limit < 1 else "less than or equal to 1000"
        raise invalid(f"limit: Input should be {bound}")
    shown = listed(call, "anthropic")
    ids = [batch.id for batch in shown]
    for name in ("after_id", "before_id"):
        if name in query and query[name] not in ids:
            raise invalid(f"{name}: Invalid cursor")
    if "before_id" in query:
        newer = shown[: ids.index(query["before_id"])]
        page, more = newer[-limit:], len(newer) > limit
    else:
        older = shown[ids.index(query["after_id"]) + 1 :] if "after_id" in query else shown
        page, more = older[:limit], len(older) > limit
    return json_response(
        {
            "data": [batch_object(batch, call) for batch in page],
            "has_more": more,
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
        }
    )


async def cancel_batch(call: Call) -> Response:
    """POST /v1/messages/batches/{id}/cancel; what has finished by now stays."""
    batch = _find(call)
    if batch.ended_at is not None:
        raise invalid(f"Message Batch {batch.id} has already ended and cannot be canceled.")
    if batch.cancelled_at is None:
        batch.cancelled_at = call.emulator.clock.now()
        call.emulator.state.put_batch(batch)
    return json_response(batch_object(batch, call))


async def delete_batch(call: Call) -> Response:
    """DELETE /v1/messages/batches/{id}."""
    batch = _find(call)
    if batch.ended_at is None:
        raise invalid("In progress batches cannot be deleted. Consider canceling the batch instead.")
    batch.details["deleted"] = True
    call.emulator.state.put_batch(batch)
    return json_response({"id": batch.id, "type": "message_batch_deleted"})


async def results(call: Call) -> Response:
    """GET /v1/messages/batches/{id}/results."""
    batch = _find(call)
    if batch_object(batch, call)["results_url"] is None:
        raise VendorError(404, f"Message Batch {batch.id} has no available results.", "not_found_error")
    return StreamingResponse(_lines(call.emulator, batch), media_type="application/x-jsonl")


async def _lines(emulator: Emulator, batch: Batch) -> AsyncIterator[bytes]:
    part: list[str] = []
    outcomes = ("succeeded", "errored", "canceled", "expired")
    for _, defect, line in emulator.state.results(batch.id, outcomes):
        part += deface(line, defect)
        if len(part) >= 200:
            yield "".join(f"{each}\n" for each in part).encode()
            part.clear()
            await asyncio.sleep(0)
    yield "".join(f"{each}\n" for each in part).encode()


class AnthropicWorker:
    """Carries out Message Batches; see `batches.Worker`."""

    vendor = "anthropic"
    window = Window(0.0, 1.0)

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator

    async def load(self, batch: Batch) -> None:
        """Nothing to read: the requests came with the create call."""

    def carry_out(self, batch: Batch, entry: Entry, reader: Reader) -> Outcome:
        """Judge and answer one request."""
        emulator = self._emulator
        params = json.loads(entry.params)
        try:
            rules = Rules(batch.details["version"], "batch", batch.details["betas"], emulator.settings)
            messages.validate(params, rules)
        except VendorError as error:
            return _errored(entry, error)
        except MALFORMED as error:
            return _errored(entry, malformed(error))
        reader = replace(reader, scope=reader.scope + messages.scope(batch.tenant, params["model"]))
        plan = messages.plan(params, emulator.cache, reader, emulator.settings)
        answer = messages.answer(params, eager_tools=emulator.settings.eager_tools)
        usage = replace(plan.usage, output=answer.output_tokens)
        emulator.cache.commit(plan, reader)
        message = messages.message(params, answer, usage, new_id("msg_"), "batch")
        line = _row(entry, {"type": "succeeded", "message": message})
        return Outcome("succeeded", line, params["model"], usage)

    def replace(self, entry: Entry, fault: Fault) -> Outcome:
        """Do what a row fault demands."""
        match fault["kind"]:
            case "row_expired":
                return self.leave(entry, "expired")
            case "row_null_response":
                return Outcome("errored", _row(entry, None))
            case _:
                status = fault.get("status", 400)
                error_type = fault.get("error_type") or ERROR_TYPES.get(status, "api_error")
                return _errored(entry, VendorError(status, fault.get("message", "EMULATED row error"), error_type))

    def leave(self, entry: Entry, kind: str) -> Outcome:
        """Give a request up."""
        return Outcome(kind, _row(entry, {"type": kind}))

    async def conclude(self, batch: Batch) -> None:
        """Nothing to publish: results are read from the entries."""


def _row(entry: Entry, result: dict[str, Any] | None) -> str:
    return json.dumps({"custom_id": entry.custom_id, "result": result})


def _errored(entry: Entry, error: VendorError) -> Outcome:
    inner = {"details": {"error_visibility": "user_facing"}, "type": error.type, "message": error.message}
    return Outcome(
        "errored",
        _row(entry, {"type": "errored", "error": {"type": "error", "error": inner, "request_id": None}}),
    )


# Models


async def list_models(call: Call) -> Response:
    """GET /v1/models."""
    data = [model_object(model) for model in [*ANTHROPIC, *call.emulator.settings.models]]
    return json_response({"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]})


async def retrieve_model(call: Call) -> Response:
    """GET /v1/models/{id}."""
    model = call.request.path_params["id"]
    if model not in ANTHROPIC and model not in call.emulator.settings.models:
        raise VendorError(404, f"model: {model}", "not_found_error")
    return json_response(model_object(model))


def model_object(model: str) -> dict[str, Any]:
    """The ModelInfo."""
    return {
        "type": "model",
        "id": model,
        "display_name": f"EMULATED {model}",
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
        "max_tokens": ANTHROPIC[model].max_output_tokens if model in ANTHROPIC else None,
    }
