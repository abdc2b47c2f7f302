from __future__ import annotations

import asyncio
import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from emulator_server import EmulatorServer, sha256_of

openai = pytest.importorskip("openai")

MODEL = "gpt-4.1-nano"
URL = "/v1/chat/completions"
DAY = 86_400
tenants = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[EmulatorServer]:
    """Start one emulator for all tests here; each has an organisation of its own."""
    with EmulatorServer(batch_seconds=60) as emulator:
        yield emulator


@functools.cache
def client(url: str) -> Any:
    """Make one client, whose connections all tests share."""
    return openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)


class OpenAI:
    """One test's view of the emulator: its own tenant, typed and raw."""

    def __init__(self, server: EmulatorServer) -> None:
        self.server = server
        self.organization = f"org-{next(tenants)}"
        self.key = f"sk-of-{self.organization}"
        server.key(self.key, organization=self.organization, workspace="proj_a")
        self.sdk = client(server.url).with_options(api_key=self.key)

    def raw(self, method: str, path: str, body: Any = None) -> Any:
        """Send JSON as this tenant."""
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        return self.server.request(method, path, body, headers)

    def upload(self, lines: list[Any]) -> str:
        """Upload an input file of these lines."""
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        return self.sdk.files.create(file=("input.jsonl", text.encode()), purpose="batch").id

    def batch(self, lines: list[Any], **parameters: Any) -> Any:
        """Create a batch of these lines."""
        return self.sdk.batches.create(
            input_file_id=self.upload(lines), endpoint=URL, completion_window="24h", **parameters
        )

    def ended(self, lines: list[Any]) -> Any:
        """Run a batch of these lines to its end."""
        batch = self.batch(lines)
        self.server.advance(61)
        return self.sdk.batches.retrieve(batch.id)

    def rows(self, file_id: str) -> dict[str, dict[str, Any]]:
        """All rows of a result file by custom_id."""
        lines = self.sdk.files.content(file_id).text.splitlines()
        return {row["custom_id"]: row for row in map(json.loads, lines)}


@pytest.fixture
def api(server: EmulatorServer) -> OpenAI:
    """Give a fresh tenant, after all batches of earlier tests have ended."""
    server.advance(2 * DAY)
    return OpenAI(server)


def ask(text: str, **body: Any) -> dict[str, Any]:
    """Make a request's body."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **body}


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    """Make an input line."""
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": ask(f"question {custom_id}", **body)}


# Chat Completions


def test_completion_is_complete_and_says_emulated(api: OpenAI) -> None:
    """A completion validates against the SDK's own type and its text begins with EMULATED."""
    status, raw = api.raw("POST", URL, ask("Tell me about tides."))

    completion = openai.types.chat.ChatCompletion.model_validate(raw)
    assert 200 == status
    assert completion.choices[0].message.content.startswith("EMULATED")
    assert ("stop", "default") == (completion.choices[0].finish_reason, completion.service_tier)
    assert 0 == completion.usage.completion_tokens_details.reasoning_tokens
    assert 0 == completion.usage.prompt_tokens_details.cached_tokens
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_every_answer_carries_its_headers(api: OpenAI) -> None:
    """A standard answer names itself emulated, its request, its organisation and its rate limits."""
    headers = api.sdk.chat.completions.with_raw_response.create(**ask("Hi")).headers

    assert "presort-emulator" == headers["x-emulated"]
    assert api.organization == headers["openai-organization"]
    assert headers["x-request-id"].startswith("req_")
    assert int(headers["x-ratelimit-limit-requests"]) > 0
    assert headers["x-ratelimit-reset-tokens"]


def test_stream_adds_up_to_the_completion(api: OpenAI) -> None:
    """Streamed chunks add up to the same text, and the last one carries the usage that was asked for."""
    whole = api.sdk.chat.completions.create(**ask("Count."))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(api.sdk.chat.completions.create(**ask("Count."), **options))

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == text
    assert whole.usage == chunks[-1].usage
    assert [None] * (len(chunks) - 1) == [chunk.usage for chunk in chunks[:-1]]
    assert "stop" == chunks[-2].choices[0].finish_reason


def test_stream_without_usage(api: OpenAI) -> None:
    """Without `include_usage` no chunk carries usage."""
    chunks = list(api.sdk.chat.completions.create(**ask("Count."), stream=True))

    assert [] == [chunk for chunk in chunks if chunk.usage or not chunk.choices]


def test_stream_of_a_tool_call(api: OpenAI) -> None:
    """A forced function call streams as argument deltas that parse."""
    parameters = {"type": "object", "properties": {"summary": {"type": "string"}}, "required": ["summary"]}
    tools = [{"type": "function", "function": {"name": "note", "parameters": parameters}}]
    body = ask("The cat sat.", tools=tools, tool_choice="required", stream=True)
    deltas = [chunk.choices[0].delta for chunk in api.sdk.chat.completions.create(**body)]
    calls = [call for delta in deltas for call in delta.tool_calls or []]

    assert "note" == calls[0].function.name
    assert {"summary": "The cat sat."} == json.loads("".join(call.function.arguments for call in calls))


def test_length(api: OpenAI) -> None:
    """An answer never exceeds `max_completion_tokens`, reasoning included, and says that it was cut."""
    completion = api.sdk.chat.completions.create(**ask("Hi", max_completion_tokens=6))
    thinking = api.sdk.chat.completions.create(
        **ask("Hi", model="gpt-5-mini", reasoning_effort="low", max_completion_tokens=36)
    )

    assert ("length", 6) == (completion.choices[0].finish_reason, completion.usage.completion_tokens)
    assert 36 == thinking.usage.completion_tokens
    assert 32 == thinking.usage.completion_tokens_details.reasoning_tokens


REFUSED = [
    (ask("x", model="gpt-nope"), 404, "model_not_found"),
    ({"model": MODEL}, 400, "missing_required_parameter"),
    (ask("x", model="gpt-6.1-sol", temperature=0.2), 400, "unsupported_value"),
    (ask("x", model="gpt-6-luna", top_p=0.5), 400, "unsupported_value"),
    (
        ask("x", model="gpt-6-luna", tools=[{"type": "function", "function": {"name": "f"}}]),
        400,
        "unsupported_parameter",
    ),
    (ask("x", max_tokens=0), 400, "integer_below_min_value"),
    (ask("x", messages=[{"role": "nobody", "content": "x"}]), 400, "invalid_value"),
]


@pytest.mark.parametrize(("body", "status", "code"), REFUSED)
def test_refused_completions(api: OpenAI, body: dict[str, Any], status: int, code: str) -> None:
    """A bad request is refused with the vendor's status and code."""
    answered, error = api.raw("POST", URL, body)

    assert (status, code) == (answered, error["error"]["code"])
    assert {"message", "type", "param", "code"} == error["error"].keys()


def test_default_temperature_is_fine_for_gpt6(api: OpenAI) -> None:
    """GPT-6 refuses a custom temperature only."""
    assert 200 == api.raw("POST", URL, ask("x", model="gpt-6-luna", temperature=1))[0]


def test_bad_keys(api: OpenAI) -> None:
    """A missing key is a 401, and a revoked one has the code `invalid_api_key`."""
    status, error = api.server.request("POST", URL, ask("Hi"))
    api.server.key(api.key, revoked=True)
    revoked = api.raw("POST", URL, ask("Hi"))

    assert (401, None) == (status, error["error"]["code"])
    assert (401, "invalid_api_key") == (revoked[0], revoked[1]["error"]["code"])
    assert "invalid_request_error" == revoked[1]["error"]["type"]


def test_models_are_told_apart_by_version_header(api: OpenAI) -> None:
    """`/v1/models` is OpenAI's for whoever sends no `anthropic-version`."""
    models = [model.id for model in api.sdk.models.list()]

    assert "gpt-6.1-sol" in models
    assert [] == [model for model in models if "claude" in model]
    assert "gpt-4o" == api.sdk.models.retrieve("gpt-4o").id


# Files


def test_file_round_trip(api: OpenAI) -> None:
    """A file comes back byte for byte, is listed, expires in 30 days, and is gone once deleted."""
    content = b'{"a": "\xc3\xa4"}\n--not-a-boundary\r\n--\r\n' * 50_000
    made = api.sdk.files.create(file=("in put.jsonl", content), purpose="batch")
    listed = [file.id for file in api.sdk.files.list()]
    fetched = api.sdk.files.content(made.id).read()
    deleted = api.sdk.files.delete(made.id)

    assert (len(content), "in put.jsonl", "batch") == (made.bytes, made.filename, made.purpose)
    assert 30 * DAY == made.expires_at - made.created_at
    assert [made.id] == listed
    assert content == fetched
    assert deleted.deleted
    with pytest.raises(openai.NotFoundError, match="No such File object"):
        api.sdk.files.content(made.id)


def test_file_expiry_as_asked(api: OpenAI) -> None:
    """A file uploaded with `expires_after` is a 404 after that time."""
    expiry = {"anchor": "created_at", "seconds": 3_600}
    made = api.sdk.files.create(file=("x", b"{}"), purpose="batch", expires_after=expiry)
    assert 2 == api.sdk.files.retrieve(made.id).bytes
    api.server.advance(3_600)

    with pytest.raises(openai.NotFoundError):
        api.sdk.files.retrieve(made.id)


def test_file_too_large(api: OpenAI) -> None:
    """A file above the limit is a 413 and leaves nothing behind."""
    api.server.set(openai_max_bytes=1_000)
    try:
        with pytest.raises(openai.APIStatusError) as caught:
            api.sdk.files.create(file=("x", b"y" * 5_000), purpose="batch")
    finally:
        api.server.set(openai_max_bytes=200_000_000)

    assert 413 == caught.value.status_code
    assert [] == list(api.sdk.files.list())


def test_files_of_others(api: OpenAI) -> None:
    """A file and a batch are a 404 for another organisation and another project."""
    batch = api.batch([line("a")])
    stranger = OpenAI(api.server).sdk
    neighbour = api.sdk.with_options(project="proj_b")

    for client in (stranger, neighbour):
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(batch.input_file_id)
        with pytest.raises(openai.NotFoundError, match=f"No batch found with id '{batch.id}'"):
            client.batches.retrieve(batch.id)
        assert [] == list(client.batches.list())


# Batches


def test_life_of_a_batch(api: OpenAI) -> None:
    """A batch validates, runs, finalizes and completes, with its timestamps and counts."""
    batch = api.batch([line(f"r{n}") for n in range(10)], metadata={"token": "t-1"})
    seen = [batch]
    for _ in range(3):
        api.server.advance(26)
        seen.append(api.sdk.batches.retrieve(batch.id))
    last = seen[-1]
    rows = api.rows(last.output_file_id)

    assert ["validating", "in_progress", "in_progress", "completed"] == [each.status for each in seen]
    assert DAY == batch.expires_at - batch.created_at
    assert (10, 10, 0) == (last.request_counts.total, last.request_counts.completed, last.request_counts.failed)
    assert 0 < seen[1].request_counts.completed < 10
    assert last.created_at <= last.in_progress_at <= last.finalizing_at <= last.completed_at
    assert MODEL == last.model
    assert last.error_file_id is None
    assert {f"r{n}" for n in range(10)} == rows.keys()
    assert {"token": "t-1"} == api.sdk.batches.list().data[0].metadata
    usages = [row["response"]["body"]["usage"] for row in rows.values()]
    assert sum(usage["total_tokens"] for usage in usages) == last.usage.total_tokens


def test_finalizing_is_seen(api: OpenAI) -> None:
    """Shortly before it completes a batch is finalizing, without files."""
    batch = api.batch([line("a")])
    api.server.advance(56)
    finalizing = api.sdk.batches.retrieve(batch.id)

    assert ("finalizing", None) == (finalizing.status, finalizing.output_file_id)


def test_row_shape(api: OpenAI) -> None:
    """A succeeded row holds a whole completion, status 200 and no error; its file expires in 30 days."""
    batch = api.ended([line("a")])
    row = api.rows(batch.output_file_id)["a"]
    file = api.sdk.files.retrieve(batch.output_file_id)

    assert {"id", "custom_id", "response", "error"} == row.keys()
    assert row["id"].startswith("batch_req_")
    assert {"status_code", "request_id", "body"} == row["response"].keys()
    assert (200, None) == (row["response"]["status_code"], row["error"])
    completion = openai.types.chat.ChatCompletion.model_validate(row["response"]["body"])
    assert "default" == completion.service_tier
    assert ("batch_output", 30 * DAY) == (file.purpose, file.expires_at - file.created_at)


def test_custom_ids_round_trip(api: OpenAI) -> None:
    """Any string is a custom_id and comes back unchanged."""
    odd = ["with space", "ünïcödé 猫", "x" * 200, 'quo"te\\', "a/b?c#d"]
    batch = api.ended([line(custom_id) for custom_id in odd])

    assert set(odd) == api.rows(batch.output_file_id).keys()


def test_failed_rows_go_to_the_error_file(api: OpenAI) -> None:
    """A row that fails leaves the batch completed, is in the error file only, and is not billed."""
    before = api.server.billed()
    batch = api.ended([line("good", model="gpt-5.6-luna"), line("bad", model="gpt-5.6-luna", max_tokens=-1)])
    good, bad = api.rows(batch.output_file_id), api.rows(batch.error_file_id)

    assert ("completed", 1, 1) == (batch.status, batch.request_counts.completed, batch.request_counts.failed)
    assert (["good"], ["bad"]) == (list(good), list(bad))
    assert (400, None) == (bad["bad"]["response"]["status_code"], bad["bad"]["error"])
    assert "integer_below_min_value" == bad["bad"]["response"]["body"]["error"]["code"]
    usage = good["good"]["response"]["body"]["usage"]
    key = ("openai", "gpt-5.6-luna", "batch", "input")
    assert usage["prompt_tokens"] == api.server.billed()[key] - before.get(key, 0)


def test_all_rows_failed(api: OpenAI) -> None:
    """A batch whose rows all failed is completed, with an error file only."""
    batch = api.ended([line("bad", max_tokens=-1)])

    assert ("completed", None) == (batch.status, batch.output_file_id)
    assert batch.error_file_id is not None


def body_line(**changes: Any) -> dict[str, Any]:
    """Make a line that is wrong outside its body."""
    return {**line("b"), **changes}


BAD_LINES = [
    ("invalid_json_line", "{nope", None),
    ("duplicate_custom_id", line("a"), "custom_id"),
    ("missing_required_parameter", {"custom_id": "b", "method": "POST", "url": URL}, "body"),
    ("missing_required_parameter", body_line(body={"messages": []}), "body.model"),
    ("mismatched_model", line("b", model="gpt-4o"), "body.model"),
    ("invalid_url", body_line(url="/v1/embeddings"), "url"),
    ("model_not_found", line("b", model="gpt-nope"), "body.model"),
    ("invalid_request", body_line(method="GET"), None),
    ("streaming_unsupported", line("b", stream=True), "body.stream"),
]


@pytest.mark.parametrize(("code", "bad", "param"), BAD_LINES, ids=[f"{each[0]}-{each[2]}" for each in BAD_LINES])
def test_first_bad_line_fails_the_file(api: OpenAI, code: str, bad: Any, param: str | None) -> None:
    """The first bad line fails the whole batch, says where and why, and nothing ran."""
    before = api.server.invoice()["total_usd"]
    batch = api.ended([line("a"), bad, "{also bad"])

    assert ("failed", None, None) == (batch.status, batch.output_file_id, batch.error_file_id)
    (error,) = batch.errors.data
    assert (code, 2, param) == (error.code, error.line, error.param)
    assert (0, 0, 0) == tuple(batch.request_counts.model_dump().values())
    assert batch.failed_at is not None
    assert before == api.server.invoice()["total_usd"]


def test_too_many_and_none(api: OpenAI) -> None:
    """A file with too many requests fails, and so does an empty one."""
    api.server.set(openai_max_requests=2)
    try:
        many = api.ended([line(each) for each in "abc"])
    finally:
        api.server.set(openai_max_requests=50_000)
    empty = api.ended(["", ""])

    assert ("too_many_tasks", 3) == (many.errors.data[0].code, many.errors.data[0].line)
    assert "empty_file" == empty.errors.data[0].code


def test_expiry_after_a_day(api: OpenAI) -> None:
    """After 24 hours a batch is expired: finished rows in the output file and billed, the rest in the error file."""
    api.server.fault("slow_batch", seconds=2 * DAY)
    before = api.server.invoice()["requests"].get("openai.batch", 0)
    batch = api.batch([line(f"r{n}") for n in range(10)])
    api.server.advance(DAY)
    expired = api.sdk.batches.retrieve(batch.id)
    done, undone = api.rows(expired.output_file_id), api.rows(expired.error_file_id)

    assert "expired" == expired.status
    assert expired.expires_at == expired.expired_at
    assert (5, 5) == (len(done), len(undone))
    assert {("batch_expired", None)} == {(row["error"]["code"], row["response"]) for row in undone.values()}
    assert before + 5 == api.server.invoice()["requests"]["openai.batch"]


def test_cancel_keeps_what_is_finished(api: OpenAI) -> None:
    """A cancelled batch ends soon with both files; counts while cancelling are off by one, as observed."""
    batch = api.batch([line(f"r{n}") for n in range(10)])
    api.server.advance(31)
    cancelling = api.sdk.batches.cancel(batch.id)
    api.server.advance(2)
    cancelled = api.sdk.batches.retrieve(batch.id)
    done, undone = api.rows(cancelled.output_file_id), api.rows(cancelled.error_file_id)

    assert ("cancelling", "cancelled") == (cancelling.status, cancelled.status)
    assert (5, 5) == (len(done), len(undone))
    assert {"batch_cancelled"} == {row["error"]["code"] for row in undone.values()}
    assert (6, 5) == (cancelling.request_counts.completed, cancelled.request_counts.completed)
    with pytest.raises(openai.ConflictError):
        api.sdk.batches.cancel(batch.id)


def test_list_pages_newest_first(api: OpenAI) -> None:
    """The list pages with `after`, newest first, and finds every batch once."""
    ids = []
    for _ in range(5):
        ids.append(api.batch([line("a")]).id)
        api.server.advance(1)
    page = api.sdk.batches.list(limit=2)

    assert ([ids[4], ids[3]], True) == ([batch.id for batch in page.data], page.has_more)
    assert ids[::-1] == [batch.id for batch in api.sdk.batches.list(limit=2)]


BAD_CREATES = [
    ({"input_file_id": "file-nope"}, 404, "input_file_id"),
    ({"endpoint": "/v1/nope"}, 400, "endpoint"),
    ({"completion_window": "1h"}, 400, "completion_window"),
    ({"metadata": {str(n): "x" for n in range(17)}}, 400, "metadata"),
    ({"metadata": {"k" * 65: "x"}}, 400, "metadata"),
    ({"metadata": {"k": "x" * 513}}, 400, "metadata"),
]


@pytest.mark.parametrize(("changes", "status", "param"), BAD_CREATES)
def test_refused_creates(api: OpenAI, changes: dict[str, Any], status: int, param: str) -> None:
    """A bad create call is refused at once, naming the parameter."""
    good = {"input_file_id": api.upload([line("a")]), "endpoint": URL, "completion_window": "24h"}
    answered, error = api.raw("POST", "/v1/batches", {**good, **changes})

    assert (status, param) == (answered, error["error"]["param"])


def test_record_lists_everything_asked(api: OpenAI) -> None:
    """The record knows a batch by its metadata, custom_ids and body hashes before it is validated."""
    batch = api.batch([line("a"), line("b")], metadata={"token": "t-2"})
    (entry,) = [each for each in api.server.record()["batches"] if each["id"] == batch.id]

    assert ({"token": "t-2"}, ["a", "b"]) == (entry["metadata"], entry["custom_ids"])
    assert [sha256_of(ask("question a")), sha256_of(ask("question b"))] == entry["sha256"]


def test_disputed_rate(api: OpenAI) -> None:
    """Cached batch input of gpt-4.1 is billed at the higher figure and shown as disputed with the other."""
    prefix = "You are a careful archivist. " * 200
    bodies = [{"messages": [{"role": "user", "content": f"{prefix}{n}"}]} for n in range(2)]
    api.ended([line(f"r{n}", model="gpt-4.1", **body) for n, body in enumerate(bodies)])
    lines = {
        each["class"]: each
        for each in api.server.invoice()["lines"]
        if (each["model"], each["lane"]) == ("gpt-4.1", "batch")
    }

    assert (True, "0.5", "0.25") == tuple(
        lines["cache_read"][name] for name in ("disputed", "usd_per_mtok", "other_usd_per_mtok")
    )
    assert (False, "1") == (lines["input"]["disputed"], lines["input"]["usd_per_mtok"])


def test_async_client(api: OpenAI) -> None:
    """The async SDK works as the sync one does."""

    async def run() -> Any:
        async with openai.AsyncOpenAI(api_key=api.key, base_url=f"{api.server.url}/v1", max_retries=0) as client:
            file = await client.files.create(file=("x", json.dumps(line("a")).encode()), purpose="batch")
            batch = await client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
            await asyncio.to_thread(api.server.advance, 100)
            batch = await client.batches.retrieve(batch.id)
            return (await client.files.content(batch.output_file_id)).text

    assert "a" == json.loads(asyncio.run(run()))["custom_id"]
