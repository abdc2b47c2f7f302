from __future__ import annotations

import json
from email import message_from_bytes

import pytest

from plain_server import Heard, PlainServer, answer
from presort.job import JobProgress
from presort.providers.base import (
    AnswerLostError,
    Call,
    Failure,
    Finding,
    GarbledError,
    Look,
    Prompt,
    Refusal,
    RefusedError,
)
from presort.providers.channel import HttpChannel
from presort.providers.openai import OpenAI, read_failure, read_row
from presort.request import BatchKey, Outcome, OutcomeKind, Usage
from provider_fakes import FakeSteps, job_of, rows_of, unknown

OPENAI = OpenAI()
URL = "https://api.openai.com/v1/chat/completions"
BODY = b'{"model":"gpt-5-mini","messages":[{"role":"user","content":"hi"}]}'
IDS = [f"{n:032x}-00" for n in range(3)]
JOB_ID = job_of().id


def key(base_url: str) -> BatchKey:
    """Return the batch key of a server."""
    return BatchKey("openai", base_url, "a", "/chat/completions", "gpt-5-mini", (("openai-project", "p"),))


def refused(status: int, error: object = None) -> RefusedError:
    """Write a refusal in the vendor's shape."""
    return RefusedError(status, {}, json.dumps({"error": error}).encode())


# Recognise


def test_call_is_recognised():
    """A POST to /chat/completions is read with its model and the headers that alter meaning."""
    headers = {
        "authorization": "Bearer k",
        "openai-project": "p",
        "openai-organization": "o",
        "user-agent": "x",
    }
    call = OPENAI.recognise("POST", URL, headers, BODY)

    meaning = (("openai-organization", "o"), ("openai-project", "p"))
    expected = Call("https://api.openai.com/v1", "/chat/completions", "gpt-5-mini", streaming=False, headers=meaning)
    assert expected == call


@pytest.mark.parametrize(
    ("method", "url", "headers", "body"),
    [
        pytest.param("GET", URL, {}, BODY, id="GET"),
        pytest.param("POST", "https://api.openai.com/v1/responses", {}, BODY, id="responses"),
        pytest.param("POST", "https://api.openai.com/v1/completions", {}, BODY, id="completions"),
        pytest.param("POST", f"{URL}/x", {}, BODY, id="below"),
        pytest.param("POST", "https://x.openai.azure.com/openai/v1/chat/completions", {}, BODY, id="Azure"),
        pytest.param("POST", "https://gw/openai/deployments/d/chat/completions", {}, BODY, id="deployments"),
        pytest.param("POST", URL, {"api-key": "k"}, BODY, id="Azure's key"),
        pytest.param("POST", "https://u:p@gw/v1/chat/completions", {}, BODY, id="credentials in URL"),
        pytest.param("POST", URL, {}, b"{", id="no JSON"),
        pytest.param("POST", URL, {}, b'{"model":null}', id="no model"),
    ],
)
def test_other_requests_are_not(method: str, url: str, headers: dict[str, str], body: bytes):
    """What is not a well-formed chat completion, or is Azure's, is `None` and never an exception."""
    assert OPENAI.recognise(method, url, headers, body) is None


@pytest.mark.parametrize(
    ("field", "streaming", "batchable"),
    [
        ('"stream":true', True, False),
        ('"stream":false', False, True),
        ('"service_tier":"flex"', False, False),
        ('"service_tier":"priority"', False, False),
        ('"service_tier":"auto"', False, True),
        ('"service_tier":["flex"]', False, True),
        ('"x":"\\uDE00 alone"', False, False),
    ],
)
def test_what_no_batch_takes(field: str, streaming: bool, batchable: bool):
    """Streams, other service tiers and half surrogate pairs stay out of batches."""
    call = OPENAI.recognise("POST", URL, {}, b'{"model":"m",' + field.encode() + b"}")

    assert call is not None
    assert (streaming, batchable) == (call.streaming, call.unbatchable is None)


# Keys, usage, errors


def test_key_travels_as_a_bearer_token():
    """A key is read from and written to `Authorization: Bearer`."""
    assert "k" == OPENAI.read_key(OPENAI.key_headers("k"))
    assert OPENAI.read_key({}) is None


def test_account_is_the_project():
    """The project names the account, and where there is none the organisation does."""
    assert "p" == OPENAI.organisation({"openai-organization": "o", "openai-project": "p"})
    assert "o" == OPENAI.organisation({"openai-organization": "o"})
    assert OPENAI.organisation({}) is None


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (
            {
                "prompt_tokens": 100,
                "completion_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 50},
            },
            Usage(20, 0, 0, 50, 30, 7),
        ),
        (
            {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": None},
            Usage(100, output_tokens=7),
        ),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 9}}, Usage(0, 0, 0, 0, 9, 0)),
        ({}, None),
        (None, None),
    ],
)
def test_usage_is_read_in_disjoint_classes(usage: object, expected: Usage | None):
    """Cached and written tokens are taken out of the prompt's total."""
    assert expected == OPENAI.read_usage(json.dumps({"usage": usage}).encode())


@pytest.mark.parametrize("step", [1, 10_000])
def test_stream_usage_is_the_usage_chunk(step: int):
    """The chunk with usage is read and those with `usage: null` are passed over, however they are cut."""
    chunks = [
        {"choices": [], "usage": None},
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1}},
    ]
    stream = b"".join(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks) + b"data: [DONE]\n\n"
    meter = OPENAI.stream_meter()
    before = meter.usage
    for at in range(0, len(stream), step):
        meter.feed(stream[at : at + step])

    assert (None, Usage(5, output_tokens=1)) == (before, meter.usage)


def test_composed_prompt_is_a_call():
    """A composed prompt carries instructions, document and schema and is recognised as a batchable call."""
    prompt = Prompt("Be brief.", "Grüße", {"type": "object"}, schema_name="record", max_tokens=99)
    endpoint, body, headers = OPENAI.compose("gpt-5-mini", prompt)

    schema = {"name": "record", "schema": {"type": "object"}, "strict": True}
    expected = {
        "model": "gpt-5-mini",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße"}],
        "max_completion_tokens": 99,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    assert expected == json.loads(body)
    call = OPENAI.recognise("POST", f"https://x/v1{endpoint}", dict(headers), body)
    assert call is not None
    assert call.unbatchable is None


def choice(finish: str, **message: object) -> dict[str, object]:
    """Write a completion."""
    return {"choices": [{"finish_reason": finish, "message": message}]}


def test_text_is_read():
    """The text is the first choice's content."""
    assert "hi" == OPENAI.read_text(json.dumps(choice("stop", content="hi", refusal=None)).encode())


@pytest.mark.parametrize(
    ("answered", "reason"),
    [
        (choice("stop", content=None, refusal="I will not"), "refused: I will not"),
        (choice("content_filter", content="x"), "refused: content_filter"),
        (choice("length", content="x"), "cut off"),
        (choice("stop", content=""), "no text"),
        ({"choices": []}, "no text"),
        ({"error": {"message": "overloaded"}}, "overloaded"),
        ([], "no text"),
    ],
)
def test_missing_text_says_why(answered: object, reason: str):
    """An answer without a whole text is `ValueError` with the reason."""
    with pytest.raises(ValueError, match=reason):
        OPENAI.read_text(json.dumps(answered).encode())


def test_error_body_is_the_vendors():
    """An error that presort states has OpenAI's shape."""
    error = {"message": "later", "type": "server_error", "param": None, "code": None}

    assert {"error": error} == json.loads(OPENAI.error_body(503, "later"))


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (refused(400, {"code": "invalid"}), Refusal.INVALID),
        (refused(400, {"code": "billing_hard_limit_reached"}), Refusal.LIMIT),
        (refused(401), Refusal.KEY),
        (refused(403), Refusal.KEY),
        (refused(404), Refusal.NO_BATCH),
        (refused(405), Refusal.NO_BATCH),
        (refused(409), Refusal.LATER),
        (refused(413), Refusal.SMALLER),
        (refused(429, {"code": "rate_limit_exceeded"}), Refusal.LATER),
        (refused(429, {"code": "slow_down"}), Refusal.LATER),
        (refused(429, {"code": "credit_balance_exhausted"}), Refusal.LIMIT),
        (refused(429, {"code": "organization_spend_limit_exceeded"}), Refusal.LIMIT),
        (refused(429, {"code": "project_spend_limit_exceeded"}), Refusal.LIMIT),
        (refused(429, {"code": "organization_usage_limit_exceeded"}), Refusal.LIMIT),
        (refused(429, {"type": "insufficient_quota"}), Refusal.LIMIT),
        (refused(501), Refusal.NO_BATCH),
        (refused(503, {"code": "server_is_overloaded"}), Refusal.LATER),
        (refused(429, "text"), Refusal.LATER),
    ],
)
def test_refusals_are_classified(refusal: RefusedError, expected: Refusal):
    """A refusal means what its status says, but for the spend limits."""
    assert expected == OPENAI.classify(refusal)


# Rows


def row(response: str, error: str = "null") -> bytes:
    """Write a result line."""
    return f'{{"id":"batch_req_1","custom_id":"c","response":{response},"error":{error}}}'.encode()


def test_answer_keeps_its_bytes():
    """The body of an answered row comes out byte for byte: numbers, escapes, blanks and order."""
    body = '{ "z":1.50,"a":"\\u00e9é","choices":[{}],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
    read = read_row(row(f'{{"status_code":200,"request_id":"r","body" : {body} }}'), "b")

    assert read is not None
    expected = Outcome(OutcomeKind.SUCCEEDED, 200, body.encode(), Usage(1, output_tokens=2), batch_id="b")
    assert expected == read.outcome


@pytest.mark.parametrize("status", [400, 404, 429, 500])
def test_refused_row_keeps_the_vendors_error(status: int):
    """An error row has the vendor's status and JSON, and no usage."""
    body = '{"error":{"message":"m","type":"t","param":"p","code":null}}'
    read = read_row(row(f'{{"status_code":{status},"body":{body}}}'), "b")

    assert read is not None
    assert Outcome(OutcomeKind.ERRORED, status, body.encode(), reason="t", batch_id="b") == read.outcome


@pytest.mark.parametrize(
    ("line", "kind", "status", "reason"),
    [
        (row("null", '{"code":"batch_expired","message":"m"}'), OutcomeKind.EXPIRED, 504, "expired"),
        (row("null", '{"code":"batch_cancelled","message":"m"}'), OutcomeKind.CANCELLED, 409, "cancelled"),
        (row("null", '"batch_expired"'), OutcomeKind.EXPIRED, 504, "expired"),
        (row('{"status_code":408}', '{"code":"batch_expired"}'), OutcomeKind.EXPIRED, 504, "expired"),
        (b'{"custom_id":"c","error":{"code":"batch_expired"}}', OutcomeKind.EXPIRED, 504, "expired"),
        (row("null", '{"code":"news","message":"m"}'), OutcomeKind.ERRORED, 500, "news"),
        (row("null", '{"message":"m"}'), OutcomeKind.ERRORED, 500, "http_500"),
        (row("null", '"out of luck"'), OutcomeKind.ERRORED, 500, "http_500"),
        (row("null", '{"code":7}'), OutcomeKind.ERRORED, 500, "7"),
        (row('{"status_code":400,"body":"out of luck"}'), OutcomeKind.ERRORED, 400, "http_400"),
        (
            row('{"status_code":400,"body":"{\\"error\\":{\\"code\\":\\"x\\"}}"}'),
            OutcomeKind.ERRORED,
            400,
            "x",
        ),
        (row('{"status_code":200,"body":"text"}'), OutcomeKind.ERRORED, 500, "http_500"),
        (row('{"status_code":400,"body":null}'), OutcomeKind.ERRORED, 400, "http_400"),
        (row('{"status_code":400,"body":[1]}'), OutcomeKind.ERRORED, 400, "http_400"),
        (row('{"body":{"error":{"code":"x"}}}'), OutcomeKind.ERRORED, 500, "x"),
        (row('{"status_code":200,"body":{"error":{"code":"x"}}}'), OutcomeKind.ERRORED, 500, "x"),
        (row('{"status_code":"200","body":{"choices":[]}}'), OutcomeKind.SUCCEEDED, 200, None),
        (row('{"status_code":200,"body":"{\\"choices\\":[]}"}'), OutcomeKind.SUCCEEDED, 200, None),
        (row('{"status_code":200,"body":{"choices":[]}}', '{"code":"x"}'), OutcomeKind.SUCCEEDED, 200, None),
        (
            b'{"custom_id":"c","response":{"status_code":200,"body":{"choices":[]}}}',
            OutcomeKind.SUCCEEDED,
            200,
            None,
        ),
    ],
)
def test_odd_rows_are_read(line: bytes, kind: OutcomeKind, status: int, reason: str | None):
    """Every shape that says something of its request becomes that outcome, with a JSON object for a body."""
    read = read_row(line, "b")

    assert read is not None
    outcome = read.outcome
    assert (kind, status, reason, None) == (outcome.kind, outcome.status, outcome.reason, outcome.usage)
    assert isinstance(json.loads(outcome.body), dict)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"\xff",
        row("null"),
        row("{}"),
        row("7", "7"),
        row("[]", "[]"),
        row("null", '""'),
        row("null", "{}"),
        row('{"status_code":200}'),
        row('{"status_code":200,"body":null}'),
        b'{"custom_id":"c"}',
        b'{"custom_id":null,"response":null,"error":{"code":"batch_expired"}}',
        b'{"response":{"status_code":200,"body":{"choices":[]}}}',
        b'{"custom_id":"c","response":{"status_code":200,"bo',
    ],
)
def test_unreadable_row_is_skipped(line: bytes):
    """A line that says nothing of a request is `None` and never an exception."""
    assert read_row(line, "b") is None


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([{"code": "invalid_request", "message": "m", "line": 2}], Failure("invalid_request: m", 2)),
        (
            [{"code": "token_limit_exceeded", "message": "m", "line": None}],
            Failure("token_limit_exceeded: m", retryable=True),
        ),
        ([{"code": "rate_limit_exceeded"}], Failure("rate_limit_exceeded", retryable=True)),
        ([{"code": "a"}, {"code": "b", "line": 7}], Failure("b", 7)),
        ([None, {"message": "m", "line": "7"}], Failure("m")),
        ([], Failure("the vendor gave no reason")),
        (None, Failure("the vendor gave no reason")),
    ],
)
def test_failure_names_the_line(errors: object, expected: Failure):
    """A failed batch names its first blamed line and whether the same may pass later."""
    assert expected == read_failure({"errors": {"data": errors}})


# The documented wire, from a server that knows nothing else


@pytest.mark.anyio
async def test_submit_uploads_and_creates():
    """A submit is a multipart upload of known length, made durable, and then a labelled create on it."""
    steps = FakeSteps()
    bodies = (BODY, b'{"model": "m","x":1.0}', '{"model":"m","ü":"\u2028"}'.encode())

    def reply(heard: Heard) -> bytes:
        steps.taken.append(heard.target)
        return answer(b'{"id":"file-7"}' if heard.target == "/v1/files" else b'{"id":"batch_7"}')

    async with PlainServer(reply) as server:
        base = f"{server.url}/v1"
        channel = HttpChannel(base, {"authorization": "Bearer k"})
        batch_id = await OPENAI.submit(channel, key(base), job_of(batch_id="batch_1"), rows_of(IDS, *bodies), steps)

    upload, create = server.heard
    head = f"content-type: {upload.headers['content-type']}\r\n\r\n".encode()
    purpose, file = message_from_bytes(head + upload.body).get_payload()
    lines = "".join(
        f'{{"custom_id":"{custom_id}","method":"POST","url":"/v1/chat/completions","body":{body.decode()}}}\n'
        for custom_id, body in zip(IDS, bodies, strict=True)
    )
    assert ("batch_7", ["/v1/files", "uploaded file-7", "creating", "/v1/batches"]) == (batch_id, steps.taken)
    assert b"batch" == purpose.get_payload(decode=True)
    assert f"presort-{JOB_ID}.jsonl" == file.get_filename()
    assert lines.encode() == file.get_payload(decode=True)
    assert {
        "input_file_id": "file-7",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "metadata": {"presort_job": JOB_ID},
    } == json.loads(create.body)
    assert ["p", "p"] == [heard.headers["openai-project"] for heard in server.heard]


@pytest.mark.anyio
async def test_uploaded_input_is_used_again():
    """A job whose input lies at the vendor already is created on it without another upload."""
    steps = FakeSteps()
    async with PlainServer(lambda _: answer(b'{"id":"batch_7"}')) as server:
        await OPENAI.submit(
            HttpChannel(server.url, {}),
            key(server.url),
            job_of(input_ref="file-5"),
            rows_of(IDS, BODY),
            steps,
        )

    assert (["/batches"], ["creating"]) == ([heard.target for heard in server.heard], steps.taken)
    assert "file-5" == json.loads(server.heard[0].body)["input_file_id"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("response", "error"),
    [
        (answer(b"no", 413), RefusedError),
        (answer(b"oops", 502), RefusedError),
        (answer(b"{}"), GarbledError),
        (b"", AnswerLostError),
    ],
)
async def test_failed_upload_stops_before_the_create(response: bytes, error: type[Exception]):
    """An upload that goes wrong raises before `creating`, so that nothing is in doubt."""
    steps = FakeSteps()
    async with PlainServer(lambda _: response) as server:
        with pytest.raises(error):
            await OPENAI.submit(
                HttpChannel(server.url, {}),
                key(server.url),
                job_of(batch_id="batch_1"),
                rows_of(IDS, BODY),
                steps,
            )

    assert [] == steps.taken


def batch(**fields: object) -> bytes:
    """Answer with a batch."""
    return answer(json.dumps({"id": "batch_1", "output_file_id": None, "error_file_id": None, **fields}).encode())


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "ended"),
    [
        ("validating", False),
        ("in_progress", False),
        ("finalizing", False),
        ("cancelling", False),
        ("news", False),
        ("completed", True),
        ("expired", True),
        ("cancelled", True),
    ],
)
async def test_check_reads_status_and_counts(status: str, ended: bool):
    """Only the documented terminal states are an end, and an unknown one is not."""
    counts = {"total": 9, "completed": 2, "failed": 3}
    async with PlainServer(lambda _: batch(status=status, request_counts=counts)) as server:
        look = await OPENAI.check(HttpChannel(server.url, {}), key(server.url), job_of(batch_id="batch_1"))

    assert Look(JobProgress(ended, 4, 2, 3)) == look


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("files", "failure"),
    [
        ({}, Failure("invalid_request: m", 1)),
        ({"error_file_id": "file-2"}, None),
        ({"output_file_id": "file-1"}, None),
    ],
)
async def test_failed_batch_without_files_was_rejected(files: dict[str, str], failure: Failure | None):
    """`failed` is the vendor's rejection of the whole only if it left no file to collect."""
    errors = {"data": [{"code": "invalid_request", "message": "m", "line": 1}]}
    async with PlainServer(lambda _: batch(status="failed", errors=errors, **files)) as server:
        look = await OPENAI.check(HttpChannel(server.url, {}), key(server.url), job_of(batch_id="batch_1"))

    assert Look(JobProgress(ended=True), failure) == look


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"output_file_id": "file-1", "error_file_id": "file-2"}, ["file-1", "file-2"]),
        ({"output_file_id": "file-1"}, ["file-1"]),
        ({"error_file_id": "file-2"}, ["file-2"]),
        ({}, []),
    ],
)
async def test_both_files_are_collected(files: dict[str, str], expected: list[str]):
    """Rows come from the output file and then the error file, and either may be missing."""

    def reply(heard: Heard) -> bytes:
        if heard.target.startswith("/files/"):
            line = row("null", '{"code":"batch_expired"}').decode().replace('"c"', f'"{heard.target.split("/")[2]}"')
            return answer(f"\nbroken\n{line}".encode())
        return batch(status="expired", **files)

    async with PlainServer(reply) as server:
        rows = OPENAI.collect(HttpChannel(server.url, {}), key(server.url), job_of(batch_id="batch_1"))
        ids = [each.custom_id async for each in rows]

    assert expected == ids


@pytest.mark.anyio
async def test_batch_is_found_by_its_label():
    """A lost batch is the one labelled with our job, on whichever page, unless another job has it."""

    def listed(n: int, label: object) -> dict[str, object]:
        return {"id": f"batch_{n}", "created_at": 1_800_000_000, "metadata": label}

    ours = {"presort_job": JOB_ID}
    pages = {
        "/batches?limit=100": {"data": [listed(1, None), listed(2, {"presort_job": "x"})], "has_more": True},
        "/batches?limit=100&after=batch_2": {"data": [listed(3, ours), listed(4, ours)], "has_more": False},
    }

    async def known(batch_id: str) -> bool:
        return batch_id == "batch_3"

    async with PlainServer(lambda heard: answer(json.dumps(pages[heard.target]).encode())) as server:
        finding = await OPENAI.find(
            HttpChannel(server.url, {}), key(server.url), job_of(batch_id="batch_1"), IDS, known
        )

    assert Finding(batch_id="batch_4") == finding


@pytest.mark.anyio
async def test_search_ends_at_the_window():
    """Pages older than the create are not asked for."""
    old = {"id": "batch_1", "created_at": 1_799_999_000, "metadata": {"presort_job": JOB_ID}}
    page = {"data": [old], "has_more": True, "last_id": "batch_1"}
    async with PlainServer(lambda _: answer(json.dumps(page).encode())) as server:
        finding = await OPENAI.find(
            HttpChannel(server.url, {}), key(server.url), job_of(batch_id="batch_1"), IDS, unknown
        )

    assert (Finding(), 1) == (finding, len(server.heard))


@pytest.mark.anyio
@pytest.mark.parametrize(("status", "fine"), [("completed", True), ("cancelling", True), ("in_progress", False)])
async def test_refused_cancel_counts_while_the_batch_goes_on(status: str, fine: bool):
    """A refused cancel is no error if the batch has ended or is ending, and is one if it simply goes on."""

    def reply(heard: Heard) -> bytes:
        return answer(b"{}", 409) if heard.method == "POST" else batch(status=status)

    async with PlainServer(reply) as server:
        cancelling = OPENAI.cancel(HttpChannel(server.url, {}), key(server.url), job_of(batch_id="batch_1"))
        try:
            await cancelling
            went = True
        except RefusedError:
            went = False

    assert fine == went
