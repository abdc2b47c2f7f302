"""OpenAI's API: Chat Completions, Files, Batches, models.

Shapes and wordings: the openai package 3.54 and live captures of 2026-08/09.
Where no capture exists (bodies above 200 MB, cancelling an ended batch) the wording
follows the API's style.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from presort.emulator import openai_chat as chat
from presort.emulator.batches import new_batch
from presort.emulator.cache import Reader
from presort.emulator.core import ORGANIZATION, Emulator
from presort.emulator.faults import Fault
from presort.emulator.lifecycle import WINDOW_SECONDS, Ending, Phase, Result, progress
from presort.emulator.models import OPENAI
from presort.emulator.multipart import parse
from presort.emulator.openai_batches import ERROR_CODES, ERROR_TYPES, FAILURES, WINDOW, error_body
from presort.emulator.openai_chat import invalid
from presort.emulator.state import Batch, StoredFile, Tenant
from presort.emulator.wire import (
    Call,
    VendorError,
    batch_faults,
    canonical_sha256,
    json_response,
    listed,
    new_id,
    route,
    visible,
)

PROJECT: Final = "proj_emulated"
MONTH_SECONDS: Final = 30 * 86_400
"""Batch inputs and outputs are kept for 30 days."""

ENDPOINTS: Final = (
    "/v1/responses",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/completions",
    "/v1/moderations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/videos",
)
"""What OpenAI batches; the emulator answers Chat Completions only."""

EMULATED_ENDPOINT: Final = "/v1/chat/completions"

METADATA_PAIRS: Final = 16
METADATA_KEY_CHARACTERS: Final = 64
METADATA_VALUE_CHARACTERS: Final = 512


class OpenAI:
    """How OpenAI identifies callers and words errors."""

    name = "openai"

    def authenticate(self, emulator: Emulator, request: Request) -> Tenant:
        """Accept `Authorization: Bearer`."""
        key = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not key:
            text = "You didn't provide an API key. You need to provide your API key in an Authorization header."
            raise VendorError(401, text, "invalid_request_error")
        known = emulator.state.key(key)
        if known[1] if known else emulator.settings.only_listed_keys:
            shown = key if len(key) < 9 else f"{key[:4]}{'*' * 8}{key[-4:]}"
            text = f"Incorrect API key provided: {shown}."
            raise VendorError(401, text, "invalid_request_error", code="invalid_api_key")
        tenant = known[0] if known else Tenant(ORGANIZATION, "")
        project = request.headers.get("openai-project") or tenant.workspace or PROJECT
        return Tenant(tenant.organization, project)

    def headers(self, call: Call | None) -> dict[str, str]:
        """Request id, and whose request it was."""
        headers = {"x-request-id": new_id("req_"), "openai-version": "2020-10-01"}
        if call is not None:
            headers["openai-organization"] = call.tenant.organization
            headers["openai-project"] = call.tenant.workspace
        return headers

    def render_error(self, error: VendorError) -> Response:
        """Write the error envelope."""
        return json_response(error_body(error), error.status)

    def fault_error(self, fault: Fault) -> VendorError:
        """An ordered error."""
        status = fault.get("status", 500)
        error_type = fault.get("error_type") or ERROR_TYPES.get(status, "invalid_request_error")
        code = fault.get("code") or fault.get("error_code") or ERROR_CODES.get(status)
        headers = {"retry-after": str(fault["retry_after"])} if "retry_after" in fault else {}
        return VendorError(status, fault.get("message") or "EMULATED error", error_type, code=code, headers=headers)


def routes(emulator: Emulator) -> list[Route]:
    """All of OpenAI's routes except those it shares with Anthropic."""
    vendor = OpenAI()
    table = [
        ("POST", EMULATED_ENDPOINT, "standard", create_completion),
        ("POST", "/v1/files", "upload_file", upload_file),
        ("GET", "/v1/files", "list_files", list_files),
        ("GET", "/v1/files/{id}", "retrieve_file", retrieve_file),
        ("DELETE", "/v1/files/{id}", "delete_file", delete_file),
        ("GET", "/v1/files/{id}/content", "results", file_content),
        ("POST", "/v1/batches", "create_batch", create_batch),
        ("GET", "/v1/batches", "list_batches", list_batches),
        ("GET", "/v1/batches/{id}", "retrieve_batch", retrieve_batch),
        ("POST", "/v1/batches/{id}/cancel", "cancel_batch", cancel_batch),
    ]
    return [route(emulator, vendor, *each) for each in table]


async def _json(call: Call) -> Any:
    try:
        return await call.json()
    except ValueError:
        text = "We could not parse the JSON body of your request."
        raise invalid(f"{text} (HINT: This likely means you aren't using your HTTP library correctly.)") from None


# Chat Completions


async def create_completion(call: Call) -> Response:
    """POST /v1/chat/completions."""
    body = await _json(call)
    emulator, tenant = call.emulator, call.tenant
    model = body.get("model") if isinstance(body, dict) and isinstance(body.get("model"), str) else None
    now = emulator.clock.now()
    record = ("openai", tenant, model, canonical_sha256(body), now)
    try:
        chat.validate(body, emulator.settings)
        reader = Reader(chat.scope(tenant, body), now)
        plan = chat.plan(body, emulator.cache, reader)
    except VendorError as error:
        emulator.state.add_call(*record, error.status)
        raise
    if emulator.settings.answer_seconds:
        await asyncio.sleep(emulator.settings.answer_seconds)
    answer = chat.answer(body, eager_tools=emulator.settings.eager_tools)
    usage = replace(plan.usage, output=answer.output_tokens)
    with emulator.state.transaction():
        emulator.cache.commit(plan, reader)
        emulator.meter.add("openai", body["model"], "standard", usage)
        emulator.meter.store()
        emulator.state.add_call(*record, 200)
    completion = chat.completion(body, answer, usage, new_id("chatcmpl-"), now)
    response: Response = json_response(completion)
    if body.get("stream"):
        include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        response = StreamingResponse(_stream(completion, include_usage=include_usage), media_type="text/event-stream")
    response.headers.update(RATE_LIMITS)
    return response


RATE_LIMITS: Final = {
    "x-ratelimit-limit-requests": "10000",
    "x-ratelimit-remaining-requests": "9999",
    "x-ratelimit-reset-requests": "6ms",
    "x-ratelimit-limit-tokens": "2000000",
    "x-ratelimit-remaining-tokens": "1999000",
    "x-ratelimit-reset-tokens": "30ms",
}


async def _stream(completion: dict[str, Any], *, include_usage: bool) -> AsyncIterator[bytes]:
    for chunk in chat.chunks(completion, include_usage=include_usage):
        yield f"data: {json.dumps(chunk)}\n\n".encode()
    yield b"data: [DONE]\n\n"


# Files


async def upload_file(call: Call) -> Response:
    """POST /v1/files; the content goes to the store as it arrives."""
    state, file_id = call.emulator.state, new_id("file-")
    fields: dict[str, str] = {}
    filename, size, pending = None, 0, bytearray()
    limit = call.emulator.settings.openai_max_bytes
    try:
        async for piece in parse(call.header("content-type"), call.request.stream()):
            if piece.filename is None:
                fields[piece.name] = fields.get(piece.name, "") + piece.data.decode("utf-8", "replace")
                continue
            filename = piece.filename
            size += len(piece.data)
            if size <= limit:
                pending += piece.data
            if len(pending) >= 1 << 20:
                state.append_chunk(file_id, bytes(pending))
                pending.clear()
        _check_upload(fields, filename, size, limit)
    except ValueError as error:
        state.delete_file(file_id)
        raise invalid(f"Could not parse multipart form: {error}") from None
    except BaseException:
        state.delete_file(file_id)
        raise
    now = call.emulator.clock.now()
    lifetime = int(fields.get("expires_after[seconds]") or MONTH_SECONDS)
    stored = StoredFile(
        file_id,
        call.tenant.organization,
        call.tenant.workspace,
        fields["purpose"],
        filename or "file",
        size,
        now,
        now + lifetime,
    )
    with state.transaction():
        if pending:
            state.append_chunk(file_id, bytes(pending))
        state.put_file(stored)
    return json_response(file_object(stored))


def _check_upload(fields: dict[str, str], filename: str | None, size: int, limit: int) -> None:
    if filename is None:
        raise invalid("'file' is a required property", "file")
    if fields.get("purpose") not in ("batch", "user_data", "assistants", "vision", "fine-tune"):
        raise invalid(f"'{fields.get('purpose')}' is not one of ['batch', ...] - 'purpose'", "purpose")
    if size > limit:
        raise VendorError(413, f"File is too large: {size} bytes, the maximum is {limit}.", "invalid_request_error")
    seconds = fields.get("expires_after[seconds]", "3600")
    if not (seconds.isdigit() and 3_600 <= int(seconds) <= MONTH_SECONDS):
        raise invalid("'expires_after.seconds' must be between 3600 and 2592000", "expires_after")


def file_object(file: StoredFile) -> dict[str, Any]:
    """The FileObject."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "expires_at": None if file.expires_at is None else int(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _find_file(call: Call) -> StoredFile:
    file_id = call.request.path_params["id"]
    file = call.emulator.state.file(file_id)
    expired = file is not None and file.expires_at is not None and file.expires_at <= call.emulator.clock.now()
    if file is None or expired or Tenant(file.organization, file.workspace) != call.tenant:
        raise VendorError(404, f"No such File object: {file_id}", "invalid_request_error", param="id")
    return file


async def retrieve_file(call: Call) -> Response:
    """GET /v1/files/{id}."""
    return json_response(file_object(_find_file(call)))


async def list_files(call: Call) -> Response:
    """GET /v1/files, newest first."""
    now = call.emulator.clock.now()
    files = call.emulator.state.files(call.tenant)
    purpose = call.request.query_params.get("purpose")
    shown = [
        file for file in files if (file.expires_at is None or file.expires_at > now) and purpose in (None, file.purpose)
    ]
    return json_response(_page(call, [file_object(file) for file in shown], 10_000))


def _page(call: Call, objects: list[dict[str, Any]], most: int) -> dict[str, Any]:
    query = call.request.query_params
    text = query.get("limit", str(min(20, most)) if most <= 100 else str(most))
    if not text.isdigit() or not 1 <= int(text) <= most:
        raise invalid(f"Invalid 'limit': expected an integer between 1 and {most}, got {text}.", "limit")
    limit = int(text)
    ids = [each["id"] for each in objects]
    if "after" in query:
        if query["after"] not in ids:
            raise invalid(f"Invalid 'after': no object with id '{query['after']}'.", "after")
        objects = objects[ids.index(query["after"]) + 1 :]
    page = objects[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(objects) > limit,
    }


async def delete_file(call: Call) -> Response:
    """DELETE /v1/files/{id}."""
    file = _find_file(call)
    call.emulator.state.delete_file(file.id)
    return json_response({"id": file.id, "object": "file", "deleted": True})


async def file_content(call: Call) -> Response:
    """GET /v1/files/{id}/content."""
    file = _find_file(call)
    content = _aiter(call.emulator.state.chunks(file.id))
    headers = {"content-length": str(file.bytes)}
    return StreamingResponse(content, media_type="application/octet-stream", headers=headers)


async def _aiter(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
        await asyncio.sleep(0)


# Batches


async def create_batch(call: Call) -> Response:
    """POST /v1/batches; the file is judged after this, as a whole."""
    body = await _json(call)
    emulator = call.emulator
    endpoint, file, metadata = _checked(call, body)
    whole, rows = batch_faults(call, "openai")
    call.drop = "late_create" in whole
    details: dict[str, Any] = {
        "endpoint": endpoint,
        "input_file_id": file.id,
        "metadata": metadata,
        "model": None,
        "errors": None,
        "output_file_id": None,
        "error_file_id": None,
        "output_seconds": (body.get("output_expires_after") or {}).get("seconds", MONTH_SECONDS),
        "row_faults": rows,
        "no_files": "cancel_without_files" in whole,
    }
    if "fail_batch" in whole:
        details["errors"] = [_ordered_failure(whole["fail_batch"], call.tenant)]
    now = emulator.clock.now()
    batch = new_batch(new_id("batch_"), "openai", call.tenant, now, emulator.settings, whole, details)
    with emulator.state.transaction():
        emulator.state.put_batch(batch)
        if "foreign_batch" in whole:
            _add_foreign(emulator, batch)
    return json_response(batch_object(batch, emulator))


def _checked(call: Call, body: Any) -> tuple[str, StoredFile, dict[str, str] | None]:
    """Judge what can be judged before the file is read."""
    if not isinstance(body, dict):
        raise invalid("We could not parse the JSON body of your request. (Expected an object.)")
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(body.get(name), str):
            raise invalid(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    for name, valid in (("endpoint", ENDPOINTS), ("completion_window", ("24h",))):
        if body[name] not in valid:
            text = f"Invalid value: '{body[name]}'. Supported values are: {', '.join(map(repr, valid))}."
            raise invalid(text, name, "invalid_value")
    if body["endpoint"] != EMULATED_ENDPOINT:
        text = f"EMULATED: batches of {body['endpoint']} are not emulated, only {EMULATED_ENDPOINT}."
        raise invalid(text, "endpoint")
    _check_metadata(body.get("metadata") or {})
    seconds = (body.get("output_expires_after") or {}).get("seconds", MONTH_SECONDS)
    if not isinstance(seconds, int) or not 3_600 <= seconds <= MONTH_SECONDS:
        name = "output_expires_after"
        raise invalid(f"'{name}.seconds' must be between 3600 and {MONTH_SECONDS}", name)
    return body["endpoint"], _input_file(call, body["input_file_id"]), body.get("metadata")


def _input_file(call: Call, file_id: str) -> StoredFile:
    file = call.emulator.state.file(file_id)
    if file is None or Tenant(file.organization, file.workspace) != call.tenant:
        text = f"No such File object: {file_id}"
        raise VendorError(404, text, "invalid_request_error", param="input_file_id")
    if file.purpose != "batch":
        raise invalid(f"Invalid file purpose: '{file.purpose}', expected 'batch'.", "input_file_id")
    return file


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        text = "Invalid type for 'metadata': expected a map of strings to strings."
        raise invalid(text, "metadata", "invalid_type")
    if (pairs := len(metadata)) > METADATA_PAIRS:
        text = f"Invalid 'metadata': too many properties. Expected at most {METADATA_PAIRS}, got {pairs}."
        raise invalid(text, "metadata", "object_above_max_properties")
    for key, value in metadata.items():
        if len(key) > METADATA_KEY_CHARACTERS or len(value) > METADATA_VALUE_CHARACTERS:
            limits = f"keys have at most {METADATA_KEY_CHARACTERS} characters, values {METADATA_VALUE_CHARACTERS}"
            text = f"Invalid 'metadata.{key[:64]}': string too long, {limits}."
            raise invalid(text, "metadata", "string_above_max_length")


def _ordered_failure(fault: Fault, tenant: Tenant) -> dict[str, Any]:
    code = fault.get("code", "token_limit_exceeded")
    message = fault.get("message") or FAILURES.get(code, "EMULATED failure").format(tenant.organization)
    return {"code": code, "message": message, "param": None, "line": fault.get("line")}


def _add_foreign(emulator: Emulator, batch: Batch) -> None:
    """Somebody else's batch of the same input, at the same moment, in the same project."""
    details = {**batch.details, "foreign": True, "metadata": None, "row_faults": []}
    emulator.state.put_batch(replace(batch, id=new_id("batch_"), counts={}, details=details))


def _find(call: Call) -> Batch:
    batch_id = call.request.path_params["id"]
    batch = call.emulator.state.batch(batch_id)
    if batch is None or batch.vendor != "openai" or not visible(batch, call):
        raise VendorError(404, f"No batch found with id '{batch_id}'.", "invalid_request_error")
    return batch


def batch_object(batch: Batch, emulator: Emulator) -> dict[str, Any]:
    """The Batch."""
    details = batch.details
    status = _status(batch, emulator)
    start = batch.created_at + batch.seconds * WINDOW.start
    finalizing = batch.created_at + batch.seconds * WINDOW.end
    ran = status not in ("validating", "failed")
    ended = {f"{result}_at": batch.ended_at if batch.result == result else None for result in Result}
    times = {
        "created_at": batch.created_at,
        "in_progress_at": start if ran else None,
        "expires_at": batch.created_at + WINDOW_SECONDS,
        "finalizing_at": finalizing if status in ("finalizing", "completed") else None,
        "cancelling_at": batch.cancelled_at,
        **ended,
    }
    errors = details["errors"] if status == "failed" else None
    usage = details.get("usage", {}) if batch.ended_at is not None else {}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": details["endpoint"],
        "model": details["model"],
        "errors": None if errors is None else {"object": "list", "data": errors},
        "input_file_id": details["input_file_id"],
        "completion_window": "24h",
        "status": status,
        "output_file_id": details["output_file_id"],
        "error_file_id": details["error_file_id"],
        **{name: None if moment is None else int(moment) for name, moment in times.items()},
        "request_counts": _counts(batch, status),
        "metadata": details["metadata"],
        "usage": {
            "input_tokens": usage.get("prompt", 0),
            "input_tokens_details": {"cached_tokens": usage.get("cache_read", 0)},
            "output_tokens": usage.get("output", 0),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.get("prompt", 0) + usage.get("output", 0),
        },
    }


def _status(batch: Batch, emulator: Emulator) -> str:
    if batch.result is not None:
        return batch.result
    where = progress(batch, WINDOW, emulator.settings.cancel_seconds, emulator.clock.now())
    if where.phase == Phase.FINALIZING and batch.done < where.due:
        return "in_progress"
    return {
        Phase.VALIDATING: "validating",
        Phase.RUNNING: "validating" if batch.ending == Ending.FAIL else "in_progress",
        Phase.FINALIZING: "finalizing",
        Phase.CANCELLING: "cancelling",
    }.get(where.phase, "validating")


def _counts(batch: Batch, status: str) -> dict[str, int]:
    """Progress; while a batch is being cancelled one line too many counts as completed, as was observed."""
    if status in ("validating", "failed"):
        return {"total": 0, "completed": 0, "failed": 0}
    completed = batch.counts.get("succeeded", 0)
    size = batch.size or 0
    if status == "cancelling" and completed < size:
        completed += 1
    failed = batch.counts.get("errored", 0)
    return {"total": size, "completed": completed, "failed": failed}


async def retrieve_batch(call: Call) -> Response:
    """GET /v1/batches/{id}."""
    return json_response(batch_object(_find(call), call.emulator))


async def list_batches(call: Call) -> Response:
    """GET /v1/batches, newest first, metadata included."""
    objects = [batch_object(batch, call.emulator) for batch in listed(call, "openai")]
    return json_response(_page(call, objects, 100))


async def cancel_batch(call: Call) -> Response:
    """POST /v1/batches/{id}/cancel; what has finished by now stays."""
    batch = _find(call)
    if batch.ended_at is not None:
        text = f"Cannot cancel a batch with status '{batch.result}'."
        raise VendorError(409, text, "invalid_request_error")
    if batch.cancelled_at is None:
        batch.cancelled_at = call.emulator.clock.now()
        call.emulator.state.put_batch(batch)
    return json_response(batch_object(batch, call.emulator))


# Models


async def list_models(call: Call) -> Response:
    """GET /v1/models."""
    names = [*sorted(OPENAI), *call.emulator.settings.models]
    return json_response({"object": "list", "data": [model_object(name) for name in names]})


async def retrieve_model(call: Call) -> Response:
    """GET /v1/models/{id}."""
    model = call.request.path_params["id"]
    chat.check_model(model, call.emulator.settings)
    return json_response(model_object(model))


def model_object(model: str) -> dict[str, Any]:
    """The Model."""
    return {"id": model, "object": "model", "created": 0, "owned_by": "presort-emulator"}
