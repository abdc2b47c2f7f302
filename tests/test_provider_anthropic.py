from __future__ import annotations

import json

import pytest

from plain_server import Heard, PlainServer, answer
from presort.job import JobProgress
from presort.providers.anthropic import Anthropic, read_row
from presort.providers.base import (
    AnswerLostError,
    Call,
    Finding,
    GarbledError,
    Look,
    Prompt,
    Refusal,
    RefusedError,
    one_line,
)
from presort.providers.channel import HttpChannel
from presort.request import BatchKey, Outcome, OutcomeKind, Usage
from provider_fakes import FakeSteps, job_of, rows_of, unknown

ANTHROPIC = Anthropic()
URL = "https://api.anthropic.com/v1/messages"
VERSION = {"anthropic-version": "2026-10-21"}
BODY = b'{"model":"claude-haiku-5-5","max_tokens":9,"messages":[{"role":"user","content":"hi"}]}'
IDS = [f"{n:032x}-00" for n in range(3)]


def key(base_url: str) -> BatchKey:
    """Return the batch key of a server."""
    return BatchKey("anthropic", base_url, "a", "/v1/messages", "claude-haiku-5-5", (*VERSION.items(),))


def refused(status: int, error: object = None, **headers: str) -> RefusedError:
    """Write a refusal in the vendor's shape."""
    return RefusedError(status, headers, json.dumps({"type": "error", "error": error}).encode())


# Recognise


def test_call_is_recognised():
    """A POST to /v1/messages is read with its model and the headers that alter meaning."""
    headers = {**VERSION, "x-api-key": "k", "anthropic-beta": "b1", "user-agent": "x"}
    call = ANTHROPIC.recognise("POST", URL, headers, BODY)

    meaning = (("anthropic-beta", "b1"), ("anthropic-version", "2026-10-21"))
    expected = Call("https://api.anthropic.com", "/v1/messages", "claude-haiku-5-5", streaming=False, headers=meaning)
    assert expected == call


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("http://127.0.0.1:1234/v1/messages", VERSION),
        ("http://gateway.example/team/a/v1/messages", {"x-api-key": "k"}),
        (URL, {}),
    ],
)
def test_gateways_are_recognised(url: str, headers: dict[str, str]):
    """Any base URL will do if the headers or the host are Anthropic's."""
    call = ANTHROPIC.recognise("POST", url, headers, BODY)

    assert call is not None
    assert url == call.base_url + call.endpoint


@pytest.mark.parametrize(
    ("method", "url", "headers", "body"),
    [
        pytest.param("GET", URL, VERSION, BODY, id="GET"),
        pytest.param("POST", f"{URL}/count_tokens", VERSION, BODY, id="count_tokens"),
        pytest.param("POST", f"{URL}/batches", VERSION, BODY, id="batches"),
        pytest.param("POST", "http://gateway.example/v1/messages", {}, BODY, id="nothing of Anthropic's"),
        pytest.param("POST", "https://u:p@gateway.example/v1/messages", VERSION, BODY, id="credentials in URL"),
        pytest.param("POST", "/v1/messages", VERSION, BODY, id="no host"),
        pytest.param("POST", "http://[/v1/messages", VERSION, BODY, id="no URL"),
        pytest.param("POST", URL, VERSION, b"", id="no body"),
        pytest.param("POST", URL, VERSION, b"\xff\xfe", id="no UTF-8"),
        pytest.param("POST", URL, VERSION, b"\xef\xbb\xbf" + BODY, id="byte order mark"),
        pytest.param("POST", URL, VERSION, b"[1]", id="no object"),
        pytest.param("POST", URL, VERSION, b'{"model":"m","x":NaN}', id="no JSON number"),
        pytest.param("POST", URL, VERSION, b'{"messages":[]}', id="no model"),
        pytest.param("POST", URL, VERSION, b'{"model":7}', id="odd model"),
        pytest.param("POST", URL, VERSION, b"[" * 100_000, id="bottomless"),
    ],
)
def test_other_requests_are_not(method: str, url: str, headers: dict[str, str], body: bytes):
    """What is not a well-formed call of Anthropic's Messages API is `None` and never an exception."""
    assert ANTHROPIC.recognise(method, url, headers, body) is None


@pytest.mark.parametrize(
    ("field", "streaming"),
    [
        ('"stream":true', True),
        ('"speed":"fast"', False),
        ('"store":false', False),
        ('"previous_thread_event_id":"e"', False),
        ('"cache_hint":{}', False),
        ('"context_hint":"x"', False),
        ('"max_tokens":0', False),
        ('"x":"\\ud83d alone"', False),
    ],
)
def test_what_no_batch_takes(field: str, streaming: bool):
    """A call with a field that the Batch API refuses is recognised and unbatchable."""
    call = ANTHROPIC.recognise("POST", URL, VERSION, b'{"model":"m",' + field.encode() + b"}")

    assert call is not None
    assert (streaming, True) == (call.streaming, call.unbatchable is not None)


def test_research_preview_is_unbatchable():
    """The research preview's beta header keeps a call out of a batch."""
    headers = {**VERSION, "anthropic-beta": "a,research_preview_2026_02"}
    call = ANTHROPIC.recognise("POST", URL, headers, BODY)

    assert call is not None
    assert call.unbatchable is not None


@pytest.mark.parametrize("field", ['"stream":false', '"stream":null', '"speed":null', '"x":"\\ud83d\\ude00"'])
def test_what_a_batch_takes(field: str):
    """Fields that say nothing, and whole surrogate pairs, stay batchable."""
    call = ANTHROPIC.recognise("POST", URL, VERSION, b'{"model":"m",' + field.encode() + b"}")

    assert call is not None
    assert call.unbatchable is None


def test_one_line_changes_line_breaks_only():
    """A pretty-printed body becomes one line of the same length, numbers and escapes untouched."""
    body = b'{\r\n  "a": 1.00, "b": "x\\n",\n "a": 1e400\n}'

    assert b'{    "a": 1.00, "b": "x\\n",  "a": 1e400 }' == one_line(body)


# Keys, usage, errors


def test_keys_travel_in_their_own_headers():
    """`x-api-key` wins over a bearer token, and OAuth tokens go back as bearer tokens."""
    both = {"x-api-key": "k1", "authorization": "Bearer k2"}

    assert "k1" == ANTHROPIC.read_key(both)
    assert "k2" == ANTHROPIC.read_key({"authorization": "bearer k2"})
    assert ANTHROPIC.read_key({"authorization": "Basic k2"}) is None
    assert {"x-api-key": "sk-ant-api03-x"} == ANTHROPIC.key_headers("sk-ant-api03-x")
    assert {"authorization": "Bearer sk-ant-oat01-x"} == ANTHROPIC.key_headers("sk-ant-oat01-x")


def test_account_is_the_workspace():
    """The workspace names the account, and where there is none the organisation does."""
    organisation = {"anthropic-organization-id": "o"}

    assert "o" == ANTHROPIC.organisation(organisation)
    assert "w" == ANTHROPIC.organisation({**organisation, "anthropic-workspace-id": "w"})
    assert ANTHROPIC.organisation({}) is None


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (
            {
                "input_tokens": 5,
                "cache_creation_input_tokens": 30,
                "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
                "cache_read_input_tokens": 40,
                "output_tokens": 7,
            },
            Usage(5, 10, 20, 0, 40, 7),
        ),
        (
            {"input_tokens": 5, "cache_creation_input_tokens": 30, "output_tokens": 7},
            Usage(5, 0, 0, 30, 0, 7),
        ),
        ({"input_tokens": 5, "cache_creation": None, "output_tokens": None}, Usage(5)),
        ({}, None),
        (None, None),
        ([], None),
    ],
)
def test_usage_is_read_in_disjoint_classes(usage: object, expected: Usage | None):
    """Cache writes are split by TTL as far as the answer says, and an answer without usage has none."""
    assert expected == ANTHROPIC.read_usage(json.dumps({"usage": usage}).encode())


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_stream_usage_is_the_last_said(step: int):
    """Counts of `message_delta` replace those of `message_start`, however the chunks are cut."""
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}
    delta = {"type": "message_delta", "usage": {"input_tokens": None, "output_tokens": 12}}
    events = [start, {"type": "ping"}, {"type": "content_block_delta", "delta": {"text": '"usage"'}}, delta]
    stream = b"".join(f"event: x\r\ndata: {json.dumps(event)}\r\n\r\n".encode() for event in events)
    meter = ANTHROPIC.stream_meter()
    before = meter.usage
    for at in range(0, len(stream), step):
        meter.feed(stream[at : at + step])

    assert (None, Usage(5, output_tokens=12)) == (before, meter.usage)


def test_composed_prompt_is_a_call():
    """A composed prompt carries instructions, document and schema and is recognised as a batchable call."""
    prompt = Prompt("Be brief.", "Grüße", {"type": "object"}, max_tokens=99)
    endpoint, body, headers = ANTHROPIC.compose("claude-haiku-5-5", prompt)

    expected = {
        "model": "claude-haiku-5-5",
        "max_tokens": 99,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "Grüße"}],
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    }
    assert expected == json.loads(body)
    call = ANTHROPIC.recognise("POST", f"https://x{endpoint}", dict(headers), body)
    assert call is not None
    assert (headers, None) == (call.headers, call.unbatchable)


def test_text_is_read():
    """The text blocks are joined, and what lies between them is left out."""
    content = [
        {"type": "text", "text": "a"},
        {"type": "thinking", "thinking": "x"},
        {"type": "text", "text": "b"},
    ]

    assert "ab" == ANTHROPIC.read_text(json.dumps({"content": content, "stop_reason": "end_turn"}).encode())


@pytest.mark.parametrize(
    ("answered", "reason"),
    [
        ({"stop_reason": "refusal", "content": [{"type": "text", "text": "x"}]}, "refused"),
        ({"stop_reason": "max_tokens", "content": [{"type": "text", "text": "x"}]}, "cut off: `max_tokens`"),
        ({"stop_reason": "end_turn", "content": []}, "no text"),
        ({"stop_reason": "end_turn"}, "no text"),
        ({"type": "error", "error": {"message": "overloaded"}}, "overloaded"),
        ([], "no text"),
    ],
)
def test_missing_text_says_why(answered: object, reason: str):
    """An answer without a whole text is `ValueError` with the reason."""
    with pytest.raises(ValueError, match=reason):
        ANTHROPIC.read_text(json.dumps(answered).encode())


def test_error_body_is_the_vendors():
    """An error that presort states has Anthropic's shape and the type that goes with its status."""
    error = {"type": "rate_limit_error", "message": "later"}

    assert {"type": "error", "error": error, "request_id": None} == json.loads(ANTHROPIC.error_body(429, "later"))


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (refused(307), Refusal.NO_BATCH),
        (refused(400, {"type": "invalid_request_error", "message": "requests.0"}), Refusal.INVALID),
        (refused(400, {"message": "You have reached your specified API usage limits. ..."}), Refusal.LIMIT),
        (refused(400, {"message": "Your credit balance is too low to access the API"}), Refusal.LIMIT),
        (refused(401), Refusal.KEY),
        (refused(402), Refusal.LIMIT),
        (refused(403), Refusal.KEY),
        (refused(404), Refusal.NO_BATCH),
        (refused(405), Refusal.NO_BATCH),
        (refused(408), Refusal.LATER),
        (refused(409), Refusal.LATER),
        (refused(413), Refusal.SMALLER),
        (refused(422), Refusal.INVALID),
        (refused(429), Refusal.LATER),
        (refused(429, {"details": {"error_code": "enforced_spend_limit_reached"}}), Refusal.LIMIT),
        (refused(429, {"details": {"error_code": "contract_spend_limit_reached"}}), Refusal.LIMIT),
        (refused(429, {"details": {"error_code": "ramp_limit_exceeded"}}), Refusal.LATER),
        (refused(500), Refusal.LATER),
        (refused(501), Refusal.NO_BATCH),
        (refused(529), Refusal.LATER),
        (RefusedError(413, {}, b"<html>cloudflare</html>"), Refusal.SMALLER),
    ],
)
def test_refusals_are_classified(refusal: RefusedError, expected: Refusal):
    """A refusal means what its status says, but for the spend limits."""
    assert expected == ANTHROPIC.classify(refusal)


# Rows


def row(result: str, custom_id: str = '"c"') -> bytes:
    """Write a result line."""
    return f'{{"custom_id":{custom_id},"result":{result}}}'.encode()


def test_succeeded_row_keeps_its_bytes():
    """The message of a succeeded row comes out byte for byte: numbers, escapes, blanks and order."""
    message = '{ "z":1.50,"a":"\\u00e9é","n":12345678901234567890.10,"usage":{"input_tokens":1,"output_tokens":2}}'
    read = read_row(row(f'{{"x":[1,{{}}] , "type":"succeeded", "message" :{message} }}'), "b")

    assert read is not None
    expected = Outcome(OutcomeKind.SUCCEEDED, 200, message.encode(), Usage(1, output_tokens=2), batch_id="b")
    assert expected == read.outcome


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("invalid_request_error", 400),
        ("not_found_error", 404),
        ("overloaded_error", 529),
        ("news_error", 500),
    ],
)
def test_errored_row_keeps_the_vendors_error(kind: str, status: int):
    """An errored row has the status that goes with its type, the vendor's own JSON, and no usage."""
    error = f'{{"type":"error","error":{{"details":{{}},"type":"{kind}","message":"m"}},"request_id":null}}'
    read = read_row(row(f'{{"type":"errored","error":{error}}}'), "b")

    assert read is not None
    assert Outcome(OutcomeKind.ERRORED, status, error.encode(), reason=kind, batch_id="b") == read.outcome


@pytest.mark.parametrize(("kind", "expected"), [("expired", OutcomeKind.EXPIRED), ("canceled", OutcomeKind.CANCELLED)])
def test_unanswered_row_says_so(kind: str, expected: OutcomeKind):
    """An expired or cancelled row has an error in the vendor's shape and no usage."""
    read = read_row(row(f'{{"type":"{kind}"}}'), "b")

    assert read is not None
    assert (expected, None) == (read.outcome.kind, read.outcome.usage)
    assert "error" == json.loads(read.outcome.body)["type"]


@pytest.mark.parametrize("error", ["null", '"text"', "[]", "{}", '{"error":7}', '{"error":{"type":7}}'])
def test_odd_error_is_still_an_error(error: str):
    """An errored row whose error cannot be read is a server error in the vendor's shape."""
    read = read_row(row(f'{{"type":"errored","error":{error}}}'), "b")

    assert read is not None
    body = ANTHROPIC.error_body(500, "The vendor gave no reason.")
    assert Outcome(OutcomeKind.ERRORED, 500, body, reason="api_error", batch_id="b") == read.outcome


def test_flat_error_is_wrapped():
    """An errored row whose error is not nested, as older documentation has it, is put into the live shape."""
    read = read_row(row('{"type":"errored","error":{"type":"invalid_request_error","message":"m"}}'), "b")

    assert read is not None
    assert (400, ANTHROPIC.error_body(400, "m")) == (read.outcome.status, read.outcome.body)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[]",
        b'{"custom_id":"c","result":{"type":"succeeded","mess',
        b"\xff",
        row("null"),
        row("7"),
        row("{}"),
        row('{"type":"news"}'),
        row('{"type":["succeeded"]}'),
        row('{"type":"succeeded"}'),
        row('{"type":"succeeded","message":null}'),
        row('{"type":"expired"}', "null"),
        row('{"type":"expired"}', "7"),
        b'{"result":{"type":"expired"}}',
        b"[" * 100_000,
    ],
)
def test_unreadable_row_is_skipped(line: bytes):
    """A line that says nothing of a request is `None` and never an exception."""
    assert read_row(line, "b") is None


# The documented wire, from a server that knows nothing else


@pytest.mark.anyio
async def test_create_is_one_post_of_known_length():
    """A create is the documented JSON, bodies byte for byte, with its length and the key's headers."""
    steps = FakeSteps()
    bodies = (BODY, b'{"model": "m","x":1.0}', '{"model":"m","ü":"\u2028"}'.encode())
    async with PlainServer(lambda _: answer(b'{"id":"msgbatch_7"}')) as server:
        channel = HttpChannel(server.url, {"x-api-key": "k"})
        batch_id = await ANTHROPIC.submit(
            channel, key(server.url), job_of(batch_id="msgbatch_1"), rows_of(IDS, *bodies), steps
        )

    heard = server.heard[0]
    rows = b",".join(
        b'{"custom_id":"%s","params":%s}' % (custom_id.encode(), body)
        for custom_id, body in zip(IDS, bodies, strict=True)
    )
    assert ("msgbatch_7", ["creating"]) == (batch_id, steps.taken)
    assert ("POST", "/v1/messages/batches") == (heard.method, heard.target)
    assert b'{"requests":[' + rows + b"]}" == heard.body
    assert ("2026-10-21", "k", "application/json") == (
        heard.headers["anthropic-version"],
        heard.headers["x-api-key"],
        heard.headers["content-type"],
    )


@pytest.mark.anyio
@pytest.mark.parametrize("status", [500, 502, 504, 520])
async def test_broken_create_is_in_doubt(status: int):
    """A create answered with a server error that may have come too late is `AnswerLostError`."""
    async with PlainServer(lambda _: answer(b"oops", status)) as server:
        channel = HttpChannel(server.url, {})
        with pytest.raises(AnswerLostError, match=f"HTTP {status}"):
            await ANTHROPIC.submit(
                channel, key(server.url), job_of(batch_id="msgbatch_1"), rows_of(IDS, BODY), FakeSteps()
            )


@pytest.mark.anyio
@pytest.mark.parametrize("status", [307, 400, 401, 404, 413, 429, 501, 503, 529])
async def test_refused_create_is_certain(status: int):
    """A create answered with a refusal, or by somebody who is too busy to begin, is `RefusedError`."""
    async with PlainServer(lambda _: answer(b"no", status)) as server:
        channel = HttpChannel(server.url, {})
        with pytest.raises(RefusedError):
            await ANTHROPIC.submit(
                channel, key(server.url), job_of(batch_id="msgbatch_1"), rows_of(IDS, BODY), FakeSteps()
            )


@pytest.mark.anyio
@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"id":7}', b'{"id":""}'])
async def test_create_without_an_id_is_garbled(body: bytes):
    """A create answered without a batch's id is `GarbledError`."""
    async with PlainServer(lambda _: answer(body)) as server:
        channel = HttpChannel(server.url, {})
        with pytest.raises(GarbledError):
            await ANTHROPIC.submit(
                channel, key(server.url), job_of(batch_id="msgbatch_1"), rows_of(IDS, BODY), FakeSteps()
            )


@pytest.mark.anyio
async def test_check_reads_status_and_counts():
    """A batch has ended when its status says so, and errored, canceled and expired all count as failed."""
    counts = {"processing": 1, "succeeded": 2, "errored": 3, "canceled": 4, "expired": 5}
    batch = {"id": "msgbatch_1", "processing_status": "canceling", "request_counts": counts}
    async with PlainServer(lambda _: answer(json.dumps(batch).encode())) as server:
        look = await ANTHROPIC.check(HttpChannel(server.url, {}), key(server.url), job_of(batch_id="msgbatch_1"))

    assert Look(JobProgress(False, 1, 2, 12)) == look
    assert ["/v1/messages/batches/msgbatch_1"] == [heard.target for heard in server.heard]


@pytest.mark.anyio
@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"processing_status":null}'])
async def test_check_of_nonsense_is_garbled(body: bytes):
    """A look that is answered with nonsense is `GarbledError`, not an end."""
    async with PlainServer(lambda _: answer(body)) as server:
        with pytest.raises(GarbledError):
            await ANTHROPIC.check(HttpChannel(server.url, {}), key(server.url), job_of(batch_id="msgbatch_1"))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("link", "target"),
    [
        (
            "{base}/v1/messages/batches/msgbatch_1/results?x=1",
            "/gw/v1/messages/batches/msgbatch_1/results?x=1",
        ),
        ("https://api.anthropic.com/v1/elsewhere", "/gw/v1/messages/batches/msgbatch_1/results"),
        (None, "/gw/v1/messages/batches/msgbatch_1/results"),
    ],
)
async def test_results_are_fetched_below_the_base_url(link: str | None, target: str):
    """A results link is followed below the base URL only; otherwise the documented path is asked."""

    def reply(heard: Heard) -> bytes:
        if "results" in heard.target:
            return answer(row('{"type":"expired"}') + b"\n\nbroken\n" + row('{"type":"canceled"}'))
        url = link and link.format(base=base)
        return answer(json.dumps({"id": "msgbatch_1", "processing_status": "ended", "results_url": url}).encode())

    async with PlainServer(reply) as server:
        base = f"{server.url}/gw"
        rows = ANTHROPIC.collect(HttpChannel(base, {}), key(base), job_of(batch_id="msgbatch_1"))
        kinds = [each.outcome.kind async for each in rows]

    assert [OutcomeKind.EXPIRED, OutcomeKind.CANCELLED] == kinds
    assert target == server.heard[-1].target


# Find: rules that need batches the emulator cannot make


def listed(n: int, created: str, count: int = 3, status: str = "ended") -> dict[str, object]:
    """Write a batch as the list shows it."""
    counts = {"processing": 0, "succeeded": count}
    return {
        "id": f"msgbatch_{n}",
        "created_at": created,
        "processing_status": status,
        "request_counts": counts,
    }


class Listing:
    """A vendor with these batches, two to a page, and these result lines."""

    def __init__(self, batches: list[dict[str, object]], results: dict[str, bytes]) -> None:
        self._batches = batches
        self._results = results

    def __call__(self, heard: Heard) -> bytes:
        """Answer a request."""
        path, _, query = heard.target.partition("?")
        if path.endswith("/results"):
            content = self._results.get(path.split("/")[-2])
            return answer(b"{}", 404) if content is None else answer(content)
        ids = [batch["id"] for batch in self._batches]
        start = ids.index(query.rpartition("after_id=")[2]) + 1 if "after_id" in query else 0
        page = self._batches[start : start + 2]
        more = start + 2 < len(self._batches)
        return answer(json.dumps({"data": page, "has_more": more, "last_id": page[-1]["id"]}).encode())


NOW = "2027-01-15T08:00:01Z"  # 1_800_000_001
EARLY = "2027-01-15T07:58:30Z"  # within the clocks' skew
OLD = "2027-01-15T07:57:00Z"
OURS = b'{"custom_id":"%s","result":{"type":"canceled"}}\n' % IDS[2].encode()
THEIRS = b'{"custom_id":"theirs","result":{"type":"expired"}}\n'


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("batches", "results", "expected"),
    [
        pytest.param([listed(1, NOW)], {"msgbatch_1": OURS}, "msgbatch_1", id="ours"),
        pytest.param([listed(1, EARLY)], {"msgbatch_1": OURS}, "msgbatch_1", id="ours by a slow clock"),
        pytest.param([listed(1, NOW)], {"msgbatch_1": b"{\n" + THEIRS + OURS}, "msgbatch_1", id="spoilt head"),
        pytest.param([listed(1, NOW)], {"msgbatch_1": THEIRS}, None, id="theirs"),
        pytest.param([listed(1, NOW, count=4)], {"msgbatch_1": OURS}, None, id="another size"),
        pytest.param([listed(1, OLD)], {"msgbatch_1": OURS}, None, id="older"),
        pytest.param([listed(1, "nonsense")], {"msgbatch_1": OURS}, "msgbatch_1", id="of no known time"),
        pytest.param(
            [listed(n, NOW, count=9) for n in range(5)] + [listed(5, NOW), listed(6, OLD), listed(7, OLD)],
            {"msgbatch_5": OURS},
            "msgbatch_5",
            id="on a later page",
        ),
        pytest.param(
            [listed(1, NOW, status="in_progress"), listed(2, NOW)],
            {"msgbatch_2": OURS},
            "msgbatch_2",
            id="one left",
        ),
        pytest.param([], {}, None, id="none"),
    ],
)
async def test_batch_is_found_by_time_size_and_ids(
    batches: list[dict[str, object]], results: dict[str, bytes], expected: str | None
):
    """A lost batch is one of our time and size whose results hold one of our custom_ids."""
    if not batches:
        batches = [listed(9, OLD)]
    async with PlainServer(Listing(batches, results)) as server:
        finding = await ANTHROPIC.find(
            HttpChannel(server.url, {}), key(server.url), job_of(batch_id="msgbatch_1"), IDS, unknown
        )

    assert Finding(batch_id=expected) == finding


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "results"),
    [("in_progress", {}), ("canceling", {}), ("ended", {}), ("ended", {"msgbatch_1": b"{spoilt\n"})],
)
async def test_undecided_batch_is_waited_for(status: str, results: dict[str, bytes]):
    """A batch of our time and size whose results cannot be read is a reason to wait, with its id."""
    batches = [listed(1, NOW, status=status), listed(2, NOW)]
    async with PlainServer(Listing(batches, {"msgbatch_2": THEIRS, **results})) as server:
        finding = await ANTHROPIC.find(
            HttpChannel(server.url, {}), key(server.url), job_of(batch_id="msgbatch_1"), IDS, unknown
        )

    assert Finding(waiting_for="the end of msgbatch_1: of the right time and size (3)") == finding


@pytest.mark.anyio
async def test_known_batch_is_not_ours():
    """A batch that belongs to another job of ours is passed over unread."""

    async def known(batch_id: str) -> bool:
        return batch_id == "msgbatch_1"

    async with PlainServer(Listing([listed(1, NOW)], {"msgbatch_1": OURS})) as server:
        finding = await ANTHROPIC.find(
            HttpChannel(server.url, {}), key(server.url), job_of(batch_id="msgbatch_1"), IDS, known
        )

    assert Finding() == finding
    assert 1 == len(server.heard)


@pytest.mark.anyio
async def test_few_ids_are_looked_for_in_all_rows():
    """With only some of the job's custom_ids a batch is ours if any row has one, however late."""
    results = THEIRS * 500 + OURS
    async with PlainServer(Listing([listed(1, NOW)], {"msgbatch_1": results})) as server:
        finding = await ANTHROPIC.find(
            HttpChannel(server.url, {}), key(server.url), job_of(batch_id="msgbatch_1"), IDS[2:], unknown
        )

    assert Finding(batch_id="msgbatch_1") == finding


@pytest.mark.anyio
async def test_list_that_goes_round_is_garbled():
    """A list that names the same page again and again is `GarbledError`, not an endless search."""
    page = {"data": [listed(1, NOW, count=9)], "has_more": True, "last_id": "msgbatch_1"}
    async with PlainServer(lambda _: answer(json.dumps(page).encode())) as server:
        with pytest.raises(GarbledError):
            await ANTHROPIC.find(
                HttpChannel(server.url, {}), key(server.url), job_of(batch_id="msgbatch_1"), IDS, unknown
            )

    assert 2 == len(server.heard)
