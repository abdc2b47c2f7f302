"""How OpenAI validates a batch's file, carries it out, and publishes the results.

Codes and wordings: live captures of 2026-08/09; `empty_file` and `too_many_tasks` after
Azure's documentation of the same API.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Final

from presort.emulator import openai_chat as chat
from presort.emulator.batches import Outcome
from presort.emulator.cache import Reader
from presort.emulator.core import Emulator
from presort.emulator.faults import Fault, deface
from presort.emulator.lifecycle import Ending, Result, Window
from presort.emulator.state import Batch, Entry, NewEntry, StoredFile
from presort.emulator.wire import MALFORMED, VendorError, canonical_sha256, malformed, new_id

WINDOW: Final = Window(0.1, 0.9)
"""A tenth of a batch's duration is spent on validating, a tenth on finalizing; invented."""

SLICE: Final = 500

FAILURES: Final = {
    "invalid_json_line": "This line is not parseable as valid JSON.",
    "duplicate_custom_id": "The custom_id `{}` has already been used in this batch.",
    "missing_required_parameter": "Missing required parameter: `{}`.",
    "mismatched_model": "The model `{}` does not match the model of the first request in the batch.",
    "invalid_url": "The URL `{}` does not match the batch endpoint.",
    "model_not_found": "The provided model `{}` is not supported by the Batch API.",
    "invalid_request": "The request is invalid: {}.",
    "streaming_unsupported": "Streaming is not supported in the Batch API.",
    "empty_file": "The input file is empty.",
    "too_many_tasks": "The batch input file contains more than the maximum of {} requests.",
    "token_limit_exceeded": "Enqueued token limit reached for this model in organization {}. "
    "Please try again once some in_progress batches have been completed.",
}
"""Why the validation of a whole file fails."""

UNDONE: Final = {
    "canceled": ("batch_cancelled", "This request was not executed because the batch was cancelled."),
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
}

ERROR_TYPES: Final = {401: "invalid_request_error", 429: "requests", 500: "server_error", 503: "server_error"}
ERROR_CODES: Final = {429: "rate_limit_exceeded", 503: "server_is_overloaded"}


def error_body(error: VendorError) -> dict[str, Any]:
    """OpenAI's error envelope."""
    inner = {"message": error.message, "type": error.type or "invalid_request_error"}
    return {"error": {**inner, "param": error.param, "code": error.code}}


class OpenAIWorker:
    """Validates and carries out batches; see `batches.Worker`."""

    vendor = "openai"
    window = WINDOW

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator

    async def load(self, batch: Batch) -> None:
        """Judge the whole file; the first bad line fails the batch."""
        state = self._emulator.state
        state.drop_entries(batch.id)
        judge = _Judge(self._emulator, batch)
        failure = None
        rows: list[NewEntry] = []
        try:
            async for number, line in _numbered_lines(self._emulator, batch.details["input_file_id"]):
                rows.append(judge.judge(number, line))
                if len(rows) >= SLICE:
                    state.add_entries(rows)
                    rows.clear()
                    await asyncio.sleep(0)
            if not judge.size:
                raise _BadFileError("empty_file")
        except _BadFileError as bad:
            failure = bad.error
        with state.transaction():
            fresh = state.batch(batch.id) or batch
            fresh.size, fresh.details["model"] = judge.size, judge.model
            if failure is None:
                state.add_entries(rows)
            else:
                state.drop_entries(batch.id)
                fresh.ending, fresh.size, fresh.details["errors"] = Ending.FAIL, 0, [failure]
            state.put_batch(fresh)

    def carry_out(self, batch: Batch, entry: Entry, reader: Reader) -> Outcome:
        """Judge and answer one request."""
        emulator = self._emulator
        body = json.loads(entry.params)
        try:
            chat.validate(body, emulator.settings)
            reader = replace(reader, scope=reader.scope + chat.scope(batch.tenant, body))
            plan = chat.plan(body, emulator.cache, reader)
            answer = chat.answer(body, eager_tools=emulator.settings.eager_tools)
        except VendorError as error:
            return _errored(entry, error)
        except MALFORMED as error:
            return _errored(entry, malformed(error))
        usage = replace(plan.usage, output=answer.output_tokens)
        emulator.cache.commit(plan, reader)
        completion = chat.completion(body, answer, usage, new_id("chatcmpl-"), reader.now)
        return Outcome("succeeded", _answered(entry, 200, completion), body["model"], usage)

    def replace(self, entry: Entry, fault: Fault) -> Outcome:
        """Do what a row fault demands."""
        match fault["kind"]:
            case "row_expired":
                return self.leave(entry, "expired")
            case "row_null_response":
                return Outcome("errored", _line(entry, response=None, error=None))
            case _:
                status = fault.get("status", 400)
                error_type = fault.get("error_type") or ERROR_TYPES.get(status, "invalid_request_error")
                message = fault.get("message", "EMULATED row error")
                code = fault.get("code") or ERROR_CODES.get(status)
                return _errored(entry, VendorError(status, message, error_type, code=code, param=fault.get("param")))

    def leave(self, entry: Entry, kind: str) -> Outcome:
        """Give a request up."""
        code, message = UNDONE[kind]
        return Outcome(kind, _line(entry, response=None, error={"code": code, "message": message}))

    async def conclude(self, batch: Batch) -> None:
        """Write the output file and the error file, each only if it has rows."""
        if batch.result == Result.FAILED or (batch.result == Result.CANCELLED and batch.details["no_files"]):
            return
        batch.details["output_file_id"] = await self._publish(batch, "output", ("succeeded",))
        batch.details["error_file_id"] = await self._publish(batch, "error", ("errored", "canceled", "expired"))

    async def _publish(self, batch: Batch, name: str, outcomes: tuple[str, ...]) -> str | None:
        state, file_id, size = self._emulator.state, new_id("file-"), 0
        rows = state.results(batch.id, outcomes)
        empty = True
        while part := list(itertools.islice(rows, SLICE)):
            empty = False
            lines = [each for _, defect, line in part for each in deface(line, defect)]
            data = "".join(f"{line}\n" for line in lines).encode()
            size += len(data)
            state.append_chunk(file_id, data)
            await asyncio.sleep(0)
        if empty:
            return None
        created_at = batch.ended_at or batch.created_at
        expires_at = created_at + batch.details["output_seconds"]
        filename = f"{batch.id}_{name}.jsonl"
        tenant = (batch.organization, batch.workspace)
        state.put_file(StoredFile(file_id, *tenant, "batch_output", filename, size, created_at, expires_at))
        return file_id


def _line(entry: Entry, response: dict[str, Any] | None, error: dict[str, Any] | None) -> str:
    row = {"id": new_id("batch_req_"), "custom_id": entry.custom_id, "response": response, "error": error}
    return json.dumps(row)


def _answered(entry: Entry, status: int, body: dict[str, Any]) -> str:
    return _line(entry, {"status_code": status, "request_id": new_id("req_"), "body": body}, None)


def _errored(entry: Entry, error: VendorError) -> Outcome:
    return Outcome("errored", _answered(entry, error.status, error_body(error)))


async def _numbered_lines(emulator: Emulator, file_id: str) -> AsyncIterator[tuple[int, bytes]]:
    rest, number = b"", 0
    for chunk in emulator.state.chunks(file_id):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield number, line
        await asyncio.sleep(0)
    if rest.strip():
        yield number + 1, rest


@dataclass
class _BadFileError(Exception):
    """Why a file was refused: a code of `FAILURES`, and where."""

    code: str
    value: Any = ""
    param: str | None = None
    line: int | None = None

    @property
    def error(self) -> dict[str, Any]:
        """The entry in the batch's `errors`."""
        message = FAILURES[self.code].format(self.value)
        return {"code": self.code, "message": message, "param": self.param, "line": self.line}


class _Judge:
    """Judges the lines of one input file in order."""

    def __init__(self, emulator: Emulator, batch: Batch) -> None:
        self._settings = emulator.settings
        self._batch = batch
        self._seen: set[str] = set()
        self.model: str | None = None
        self.size = 0

    def judge(self, number: int, line: bytes) -> NewEntry:
        """Make a request of a line.

        Raises:
            _BadFileError: if the line fails the file.
        """
        try:
            custom_id, body = self._request(line)
            self._judge_body(body)
            if self.size >= self._settings.openai_max_requests:
                raise _BadFileError("too_many_tasks", self._settings.openai_max_requests)
        except _BadFileError as bad:
            bad.line = number
            raise
        self._seen.add(custom_id)
        if self._batch.details.get("foreign"):
            custom_id = f"somebody-elses-{self.size}"
        place = zlib.crc32(custom_id.encode()) if self._settings.shuffle_openai_results else self.size
        self.size += 1
        return (self._batch.id, self.size - 1, custom_id, canonical_sha256(body), json.dumps(body), place)

    def _request(self, line: bytes) -> tuple[str, dict[str, Any]]:
        try:
            request = json.loads(line)
            str(request.get("custom_id")).encode()
        except (ValueError, AttributeError):
            raise _BadFileError("invalid_json_line") from None
        for name in ("custom_id", "method", "url", "body"):
            if request.get(name) in (None, ""):
                raise _BadFileError("missing_required_parameter", name, name)
        custom_id, body = request["custom_id"], request["body"]
        if not isinstance(custom_id, str) or request["method"] != "POST" or not isinstance(body, dict):
            raise _BadFileError("invalid_request", "custom_id is a string, method is POST, body is an object")
        if custom_id in self._seen:
            raise _BadFileError("duplicate_custom_id", custom_id, "custom_id")
        if request["url"] != self._batch.details["endpoint"]:
            raise _BadFileError("invalid_url", request["url"], "url")
        return custom_id, body

    def _judge_body(self, body: dict[str, Any]) -> None:
        model = body.get("model")
        if not model:
            raise _BadFileError("missing_required_parameter", "model", "body.model")
        try:
            chat.check_model(model, self._settings)
        except VendorError:
            raise _BadFileError("model_not_found", model, "body.model") from None
        self.model = self.model or model
        if model != self.model:
            raise _BadFileError("mismatched_model", model, "body.model")
        if body.get("stream"):
            raise _BadFileError("streaming_unsupported", param="body.stream")
