from __future__ import annotations

import asyncio
import functools
import itertools
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from emulator_server import EmulatorServer, sha256_of

anthropic = pytest.importorskip("anthropic")
pydantic = pytest.importorskip("pydantic")

MODEL = "claude-haiku-4-5"
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
    return anthropic.Anthropic(api_key="none", base_url=url, max_retries=0)


class Anthropic:
    """One test's view of the emulator: its own tenant, typed and raw."""

    def __init__(self, server: EmulatorServer) -> None:
        self.server = server
        self.organization = f"org_{next(tenants)}"
        self.key = f"key-of-{self.organization}"
        server.key(self.key, organization=self.organization, workspace="wrkspc_a")
        self.sdk = client(server.url).with_options(api_key=self.key)

    def raw(self, method: str, path: str, body: Any = None, version: str = "2023-06-01") -> Any:
        """Send JSON as this tenant."""
        headers = {"x-api-key": self.key, "anthropic-version": version, "content-type": "application/json"}
        return self.server.request(method, path, body, headers)

    def refused(self, path: str, body: Any, version: str = "2023-06-01") -> tuple[int, str, str]:
        """Send what is refused; give status, type and message."""
        status, answer = self.raw("POST", path, body, version)
        return status, answer["error"]["type"], answer["error"]["message"]

    def batch(self, count: int = 3, **params: Any) -> Any:
        """Create a batch of this many questions."""
        requests = [{"custom_id": f"r-{n}", "params": ask(f"question {n}", **params)} for n in range(count)]
        return self.sdk.messages.batches.create(requests=requests)

    def rows(self, batch_id: str) -> dict[str, dict[str, Any]]:
        """All result rows by custom_id, as sent."""
        url = f"{self.server.url}/v1/messages/batches/{batch_id}/results"
        headers = {"x-api-key": self.key, "anthropic-version": "2023-06-01"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
            assert "application/x-jsonl" in response.headers["content-type"]
            return {row["custom_id"]: row["result"] for row in map(json.loads, response)}


@pytest.fixture
def api(server: EmulatorServer) -> Anthropic:
    """Give a fresh tenant, after all batches of earlier tests have ended."""
    server.advance(2 * DAY)
    return Anthropic(server)


def ask(text: str, **params: Any) -> dict[str, Any]:
    """Make a request's params."""
    return {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": text}], **params}


# Messages


def test_message_is_complete_and_says_emulated(api: Anthropic) -> None:
    """A message validates against the SDK's own type and its text begins with EMULATED."""
    status, raw = api.raw("POST", "/v1/messages", ask("Tell me about tides."))

    message = anthropic.types.Message.model_validate(raw)
    assert 200 == status
    assert message.content[0].text.startswith("EMULATED")
    assert "Tell me about tides." in message.content[0].text
    assert ("end_turn", "standard") == (message.stop_reason, message.usage.service_tier)
    assert 5 == message.usage.input_tokens


def test_same_request_same_answer(api: Anthropic) -> None:
    """Two equal requests get equal text."""
    first, second = (api.sdk.messages.create(**ask("Why is the sky blue?")) for _ in range(2))

    assert first.content == second.content


def test_every_answer_carries_its_headers(api: Anthropic) -> None:
    """A standard answer names itself emulated, its request, its tenant and its rate limits."""
    headers = api.sdk.messages.with_raw_response.create(**ask("Hi")).headers

    assert "presort-emulator" == headers["x-emulated"]
    assert headers["request-id"].startswith("req_")
    assert api.organization == headers["anthropic-organization-id"]
    assert "wrkspc_a" == headers["anthropic-workspace-id"]
    for name in ("requests", "tokens", "input-tokens", "output-tokens"):
        assert int(headers[f"anthropic-ratelimit-{name}-limit"]) > 0
        assert headers[f"anthropic-ratelimit-{name}-reset"].endswith("Z")


def test_stream_adds_up_to_the_message(api: Anthropic) -> None:
    """Streamed events accumulate in the SDK to the same message as without streaming."""
    whole = api.sdk.messages.create(**ask("Count to three."))
    with api.sdk.messages.stream(**ask("Count to three.")) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()

    assert whole.content[0].text == streamed.content[0].text
    assert whole.usage == streamed.usage
    assert "message_start" == kinds[0]
    assert "message_stop" == kinds[-1]


def test_stream_of_a_tool_call(api: Anthropic) -> None:
    """A forced tool call streams as JSON deltas that accumulate to its input."""
    tool = {
        "name": "note",
        "input_schema": {"type": "object", "properties": {"summary": {"type": "string"}}, "required": ["summary"]},
    }
    forced = ask("The cat sat.", tools=[tool], tool_choice={"type": "tool", "name": "note"})
    with api.sdk.messages.stream(**forced) as stream:
        message = stream.get_final_message()

    assert "tool_use" == message.stop_reason
    assert {"summary": "The cat sat."} == message.content[0].input


@pytest.mark.parametrize("eager", [False, True])
def test_tools_left_to_the_model(api: Anthropic, eager: bool) -> None:
    """A tool that need not be called is called only if `eager_tools` is set, and not again after its result."""
    tools = [{"name": "note", "input_schema": {"type": "object", "properties": {}}}]
    result = [{"type": "tool_result", "tool_use_id": "t", "content": "done"}]
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "note", "input": {}}]},
        {"role": "user", "content": result},
    ]
    api.server.set(eager_tools=eager)
    try:
        first = api.sdk.messages.create(**ask("Hi", tools=tools))
        second = api.sdk.messages.create(**ask("", tools=tools, messages=turns))
    finally:
        api.server.set(eager_tools=False)

    assert ("tool_use" if eager else "end_turn", "end_turn") == (first.stop_reason, second.stop_reason)


def test_max_tokens_cuts(api: Anthropic) -> None:
    """An answer never exceeds `max_tokens`, and says that it was cut."""
    message = api.sdk.messages.create(**ask("A long question " * 20, max_tokens=7))

    assert ("max_tokens", 7) == (message.stop_reason, message.usage.output_tokens)


def test_stop_sequence(api: Anthropic) -> None:
    """An answer ends before a stop sequence and names it."""
    message = api.sdk.messages.create(**ask("alpha beta gamma", stop_sequences=["beta"]))

    assert ("stop_sequence", "beta") == (message.stop_reason, message.stop_sequence)
    assert "beta" not in message.content[0].text


def test_count_tokens_agrees_with_usage(api: Anthropic) -> None:
    """Token counting and usage count the same prompt alike."""
    params = ask("How many tokens is this?", system="Be brief.")
    counted = api.sdk.messages.count_tokens(**{key: params[key] for key in ("model", "messages", "system")})

    assert counted.input_tokens == api.sdk.messages.create(**params).usage.input_tokens


def test_models_validate(api: Anthropic) -> None:
    """Each listed model validates against the SDK's type."""
    status, page = api.raw("GET", "/v1/models")

    models = [anthropic.types.ModelInfo.model_validate(each) for each in page["data"]]
    assert 200 == status
    assert "claude-sonnet-5-5" in [model.id for model in models]
    assert "claude-opus-5" == api.sdk.models.retrieve("claude-opus-5").id


def test_async_client(api: Anthropic) -> None:
    """The async SDK works as the sync one does."""

    async def run() -> Any:
        async with anthropic.AsyncAnthropic(api_key=api.key, base_url=api.server.url, max_retries=0) as client:
            batch = await client.messages.batches.create(requests=[{"custom_id": "a", "params": ask("Hi")}])
            await asyncio.to_thread(api.server.advance, 100)
            return [row async for row in await client.messages.batches.results(batch.id)]

    (row,) = asyncio.run(run())
    assert ("a", "succeeded") == (row.custom_id, row.result.type)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"model": "claude-does-not-exist-9"}, (404, "not_found_error", "model: claude-does-not-exist-9")),
        ({"messages": None}, (400, "invalid_request_error", "messages: Input should be a valid list")),
        (
            {"max_tokens": 64_001},
            (
                400,
                "invalid_request_error",
                f"max_tokens: 64001 > 64000, which is the maximum allowed number of output tokens for {MODEL}",
            ),
        ),
        ({"messages": []}, (400, "invalid_request_error", "messages: at least one message is required")),
    ],
)
def test_refused_messages(api: Anthropic, params: dict[str, Any], expected: tuple[int, str, str]) -> None:
    """A bad request is refused with the vendor's status, type and words."""
    assert expected == api.refused("/v1/messages", {**ask("Hi"), **params})


@pytest.mark.parametrize("params", [{"tools": 5}, {"system": 5}, {"tools": ["x"]}, {"output_config": "json"}])
def test_shapes_nobody_foresaw(api: Anthropic, params: dict[str, Any]) -> None:
    """JSON of a nonsensical shape is a 400, not a crash."""
    status, kind, _ = api.refused("/v1/messages", {**ask("Hi"), **params})

    assert (400, "invalid_request_error") == (status, kind)


def test_missing_fields(api: Anthropic) -> None:
    """A request without `max_tokens` is told which field is missing."""
    params = ask("Hi")
    del params["max_tokens"]

    assert (400, "invalid_request_error", "max_tokens: Field required") == api.refused("/v1/messages", params)


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k"])
def test_new_version_refuses_sampling(api: Anthropic, name: str) -> None:
    """Version 2026-10-21 refuses a sampling parameter that 2023-06-01 accepts."""
    params = {**ask("Hi"), name: 1}

    expected = (400, "invalid_request_error", f"{name}: Extra inputs are not permitted")
    assert expected == api.refused("/v1/messages", params, "2026-10-21")
    assert 200 == api.raw("POST", "/v1/messages", params, "2023-06-01")[0]


def test_new_version_refuses_blocks(api: Anthropic) -> None:
    """Version 2026-10-21 refuses documents of the assistant and citations of the user."""
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [document]}]
    cited = [{"role": "user", "content": [{"type": "text", "text": "x", "citations": [{"type": "x"}]}]}]

    for messages in (said, cited):
        assert 400 == api.raw("POST", "/v1/messages", ask("", messages=messages), "2026-10-21")[0]
        assert 200 == api.raw("POST", "/v1/messages", ask("", messages=messages))[0]


def test_version_header_is_required(api: Anthropic) -> None:
    """A request without `anthropic-version`, or with an unknown one, is a 400."""
    status, _ = api.server.request("POST", "/v1/messages", ask("Hi"), {"x-api-key": "k"})

    assert 400 == status
    assert 400 == api.raw("POST", "/v1/messages", ask("Hi"), "2020-01-01")[0]


# Keys


def test_without_a_key(api: Anthropic) -> None:
    """A request without a key is a 401 in the vendor's envelope, request id included."""
    status, body = api.server.request("POST", "/v1/messages", ask("Hi"), {"anthropic-version": "2023-06-01"})

    assert (401, "error", "authentication_error") == (status, body["type"], body["error"]["type"])
    assert body["request_id"].startswith("req_")


def test_x_api_key_wins_over_bearer(api: Anthropic) -> None:
    """With both headers the `x-api-key` decides; alone, a bearer token is accepted."""
    other = Anthropic(api.server)
    headers = {"anthropic-version": "2023-06-01", "authorization": f"Bearer {other.key}"}
    batch = other.batch(1)
    path = f"/v1/messages/batches/{batch.id}"

    assert 200 == api.server.request("GET", path, None, headers)[0]
    assert 404 == api.server.request("GET", path, None, {**headers, "x-api-key": api.key})[0]


def test_revoked_key(api: Anthropic) -> None:
    """A revoked key is refused with the vendor's words and the SDK's own exception."""
    api.server.key(api.key, revoked=True)

    with pytest.raises(anthropic.AuthenticationError, match=r"API key is invalid\."):
        api.sdk.messages.create(**ask("Hi"))


def test_other_tenants_see_nothing(api: Anthropic) -> None:
    """A batch is a 404 for another organisation and for another workspace, and in neither's list."""
    batch = api.batch(1)
    stranger = Anthropic(api.server)
    neighbour = api.sdk.with_options(default_headers={"anthropic-workspace-id": "wrkspc_b"})

    for client in (stranger.sdk, neighbour):
        with pytest.raises(anthropic.NotFoundError, match=f"Message Batch {batch.id} not found"):
            client.messages.batches.retrieve(batch.id)
        assert [] == client.messages.batches.list().data


# Batches


def test_life_of_a_batch(api: Anthropic) -> None:
    """Counts stay at zero until a batch ends, then all results are there in an order of their own."""
    batch = api.batch(20)
    running = api.sdk.messages.batches.with_raw_response.retrieve(batch.id)
    api.server.advance(30)
    halfway = api.sdk.messages.batches.retrieve(batch.id)
    api.server.advance(31)
    ended = api.sdk.messages.batches.retrieve(batch.id)
    rows = list(api.sdk.messages.batches.results(batch.id))

    assert "in_progress" == batch.processing_status
    assert DAY == (batch.expires_at - batch.created_at).total_seconds()
    assert "10" == running.headers["retry-after"]
    assert (20, 0) == (halfway.request_counts.processing, halfway.request_counts.succeeded)
    assert halfway.results_url is None
    assert ("ended", 20) == (ended.processing_status, ended.request_counts.succeeded)
    assert ended.results_url.startswith(api.server.url)
    assert 60 == pytest.approx((ended.ended_at - ended.created_at).total_seconds())
    ids = [row.custom_id for row in rows]
    assert {f"r-{n}" for n in range(20)} == set(ids)
    assert ids != sorted(ids, key=lambda each: int(each[2:]))


def test_result_row_shape(api: Anthropic) -> None:
    """A succeeded row has exactly the captured fields and the batch tier."""
    batch = api.batch(1)
    api.server.advance(61)
    result = api.rows(batch.id)["r-0"]

    assert {"type", "message"} == result.keys()
    fields = {"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"}
    assert fields == result["message"].keys()
    usage = result["message"]["usage"]
    assert ("batch", "not_available") == (usage["service_tier"], usage["inference_geo"])
    assert {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0} == usage["cache_creation"]
    anthropic.types.messages.MessageBatchIndividualResponse.model_validate({"custom_id": "x", "result": result})


BAD_IDS = [
    ([{"params": {}}], "requests.0.custom_id: Field required"),
    ([{"custom_id": "a" * 65, "params": {}}], "requests.0.custom_id: String should have at most 64 characters"),
    (
        [{"custom_id": "a b", "params": {}}],
        "requests.0.custom_id: String should match pattern '^[a-zA-Z0-9_-]{1,64}$'",
    ),
    (
        [{"custom_id": "dup", "params": {}}] * 2,
        "requests: custom_id's must be unique within a batch. Duplicate custom_id found: dup",
    ),
    ([], "requests: List should have at least 1 item after validation, not 0"),
]


@pytest.mark.parametrize(("requests", "message"), BAD_IDS)
def test_early_refusals(api: Anthropic, requests: list[Any], message: str) -> None:
    """What is wrong outside `params` fails the create call with the captured words."""
    refused = api.refused("/v1/messages/batches", {"requests": requests})

    assert (400, "invalid_request_error", message) == refused


def test_invalid_json(api: Anthropic) -> None:
    """A create call that is not JSON is a 400 that says so."""
    _, _, message = api.refused("/v1/messages/batches", b"{nope")

    assert message.startswith("The request body is not valid JSON: ")


def test_late_refusals(api: Anthropic) -> None:
    """What is wrong inside `params` becomes one errored row each, without usage, and is not billed."""
    bad = {
        "model": ask("x", model="claude-does-not-exist-9"),
        "stream": ask("x", stream=True),
        "cap": ask("x", max_tokens=10**6),
        "messages": {"model": MODEL, "max_tokens": 5},
        "shape": ask("x", tools="not a list"),
    }
    before = api.server.billed()
    requests = [{"custom_id": name, "params": params} for name, params in bad.items()]
    status, batch = api.raw("POST", "/v1/messages/batches", {"requests": requests})
    api.server.advance(61)
    rows = api.rows(batch["id"])

    assert 200 == status
    assert {"errored"} == {row["type"] for row in rows.values()}
    expected = {
        "type": "error",
        "error": {
            "details": {"error_visibility": "user_facing"},
            "type": "not_found_error",
            "message": "model: claude-does-not-exist-9",
        },
        "request_id": None,
    }
    assert expected == rows["model"]["error"]
    messages = {name: row["error"]["error"]["message"] for name, row in rows.items()}
    assert '"stream=True" is not supported in the Message Batches API' == messages["stream"]
    assert "messages: Field required" == messages["messages"]
    assert messages["cap"].startswith("max_tokens: 1000000 > 64000")
    assert before == api.server.billed()


def test_version_applies_to_rows(api: Anthropic) -> None:
    """A batch created with version 2026-10-21 refuses a temperature row by row."""
    requests = [{"custom_id": "a", "params": ask("x", temperature=1)}]
    versions = ("2023-06-01", "2026-10-21")
    batches = [api.raw("POST", "/v1/messages/batches", {"requests": requests}, version)[1] for version in versions]
    api.server.advance(61)

    assert ["succeeded", "errored"] == [api.rows(batch["id"])["a"]["type"] for batch in batches]


def test_results_before_the_end(api: Anthropic) -> None:
    """Results of a running batch are a 404 with the vendor's words."""
    batch = api.batch(1)
    status, body = api.raw("GET", f"/v1/messages/batches/{batch.id}/results")

    assert 404 == status
    assert body["error"]["message"].endswith("has no available results.")


def test_list_pages_newest_first(api: Anthropic) -> None:
    """The list pages backwards in time and finds every batch once."""
    ids = []
    for _ in range(5):
        ids.append(api.batch(1).id)
        api.server.advance(1)
    first = api.sdk.messages.batches.list(limit=2)

    assert [ids[4], ids[3]] == [batch.id for batch in first.data]
    assert first.has_more
    assert ids[::-1] == [batch.id for batch in api.sdk.messages.batches.list(limit=2)]
    before = api.sdk.messages.batches.list(limit=2, before_id=ids[0])
    assert [ids[2], ids[1]] == [batch.id for batch in before.data]
    assert before.has_more


def test_cancel_keeps_what_is_finished(api: Anthropic) -> None:
    """Cancelling half-way ends a batch soon, with the finished half succeeded and billed, the rest canceled."""
    before = api.server.invoice()["requests"].get("anthropic.batch", 0)
    batch = api.batch(10)
    api.server.advance(30)
    cancelled = api.sdk.messages.batches.cancel(batch.id)
    api.server.advance(2)
    ended = api.sdk.messages.batches.retrieve(batch.id)
    kinds = [row["type"] for row in api.rows(batch.id).values()]

    assert "canceling" == cancelled.processing_status
    assert cancelled.cancel_initiated_at is not None
    assert ("ended", 5, 5) == (
        ended.processing_status,
        ended.request_counts.succeeded,
        ended.request_counts.canceled,
    )
    assert (5, 5) == (kinds.count("succeeded"), kinds.count("canceled"))
    assert before + 5 == api.server.invoice()["requests"]["anthropic.batch"]


def test_expiry_after_a_day(api: Anthropic) -> None:
    """What is unfinished after 24 hours expires without usage; what was finished stays."""
    api.server.fault("slow_batch", seconds=2 * DAY)
    batch = api.batch(10)
    api.server.advance(DAY)
    ended = api.sdk.messages.batches.retrieve(batch.id)
    rows = api.rows(batch.id).values()

    assert "ended" == ended.processing_status
    assert (5, 5) == (ended.request_counts.succeeded, ended.request_counts.expired)
    assert [{"type": "expired"}] * 5 == [row for row in rows if row["type"] != "succeeded"]
    assert ended.ended_at == ended.expires_at


def test_archive_after_29_days(api: Anthropic) -> None:
    """29 days after creation a batch is still there, but its results are not."""
    batch = api.batch(1)
    api.server.advance(29 * DAY)
    archived = api.sdk.messages.batches.retrieve(batch.id)

    assert 29 * DAY == (archived.archived_at - archived.created_at).total_seconds()
    assert archived.results_url is None
    assert 404 == api.raw("GET", f"/v1/messages/batches/{batch.id}/results")[0]


def test_delete(api: Anthropic) -> None:
    """Only an ended batch can be deleted; afterwards it is a 404, but the record still knows it."""
    batch = api.batch(1)
    with pytest.raises(anthropic.BadRequestError, match="In progress batches cannot be deleted"):
        api.sdk.messages.batches.delete(batch.id)
    api.server.advance(61)
    deleted = api.sdk.messages.batches.delete(batch.id)

    assert (batch.id, "message_batch_deleted") == (deleted.id, deleted.type)
    assert 404 == api.raw("GET", f"/v1/messages/batches/{batch.id}")[0]
    assert batch.id in [each["id"] for each in api.server.record()["batches"]]


def test_too_large(api: Anthropic) -> None:
    """Too many requests or bytes are a 413 whose body is not JSON, and no batch comes of it."""
    try:
        api.server.set(anthropic_max_requests=2)
        many = api.raw("POST", "/v1/messages/batches", {"requests": [{"custom_id": c, "params": {}} for c in "abc"]})
        api.server.set(anthropic_max_requests=100_000, anthropic_max_bytes=1_000)
        big = api.raw("POST", "/v1/messages/batches", {"requests": [{"custom_id": "a", "params": ask("x" * 2_000)}]})
    finally:
        api.server.set(anthropic_max_requests=100_000, anthropic_max_bytes=256_000_000)

    for status, body in (many, big):
        assert 413 == status
        assert b"cloudflare" in body
    assert [] == api.sdk.messages.batches.list().data


def test_record_lists_everything_asked(api: Anthropic) -> None:
    """The record has the hash of each batched and each standard request, in canonical JSON."""
    batch = api.batch(2)
    api.sdk.messages.create(**ask("standard"))
    record = api.server.record()
    (entry,) = [each for each in record["batches"] if each["id"] == batch.id]

    assert ["r-0", "r-1"] == entry["custom_ids"]
    assert [sha256_of(ask("question 0")), sha256_of(ask("question 1"))] == entry["sha256"]
    assert sha256_of(ask("standard")) == record["calls"][-1]["sha256"]
    assert 1 == api.server.asked().count(sha256_of(ask("standard")))


def test_unread_results_are_billed(api: Anthropic) -> None:
    """A batch is billed at half price when it finishes, though nobody fetches it."""
    model = "claude-opus-4-8"
    batch = api.batch(4, model=model)
    before = api.server.billed()
    api.server.advance(61)
    lines = {
        line["class"]: line
        for line in api.server.invoice()["lines"]
        if (line["model"], line["lane"]) == (model, "batch")
    }
    usages = [row["message"]["usage"] for row in api.rows(batch.id).values()]

    assert ("anthropic", model, "batch", "input") not in before
    assert sum(usage["input_tokens"] for usage in usages) == lines["input"]["tokens"]
    assert sum(usage["output_tokens"] for usage in usages) == lines["output"]["tokens"]
    assert ("2.5", "12.5") == (lines["input"]["usd_per_mtok"], lines["output"]["usd_per_mtok"])
