from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from emulator_server import EmulatorServer

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

URL = "/v1/chat/completions"
tenants = itertools.count()


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorServer]:
    """Start one emulator for all tests here."""
    with EmulatorServer(batch_seconds=60) as server:
        yield server


@pytest.fixture
def server(emulator: EmulatorServer) -> Iterator[EmulatorServer]:
    """Give the emulator; afterwards disarm it and let all batches end."""
    yield emulator
    emulator.clear_faults()
    emulator.advance(2 * 86_400)


@functools.cache
def anthropic_client(url: str) -> Any:
    """Make one client, whose connections all tests share."""
    return anthropic.Anthropic(api_key="none", base_url=url, max_retries=0)


@functools.cache
def openai_client(url: str) -> Any:
    """As above, for OpenAI."""
    return openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)


class Claude:
    """Message Batches reduced to what both vendors can do."""

    vendor = "anthropic"
    error = anthropic

    def __init__(self, server: EmulatorServer) -> None:
        key = f"fault-{next(tenants)}"
        server.key(key, organization=key, workspace="w")
        self.server = server
        self.sdk = anthropic_client(server.url).with_options(api_key=key)

    def call(self) -> Any:
        """Make a standard call."""
        message = {"role": "user", "content": "Hi"}
        return self.sdk.messages.create(model="claude-haiku-4-5", max_tokens=50, messages=[message])

    def create(self, count: int = 10) -> str:
        """Create a batch."""
        params = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
        requests = [{"custom_id": f"r{n}", "params": params} for n in range(count)]
        return self.sdk.messages.batches.create(requests=requests).id

    def status(self, batch_id: str) -> str:
        """A batch's status."""
        return self.sdk.messages.batches.retrieve(batch_id).processing_status

    def listed(self) -> list[str]:
        """Ids of all batches."""
        return [batch.id for batch in self.sdk.messages.batches.list()]

    def cancel(self, batch_id: str) -> None:
        """Cancel a batch."""
        self.sdk.messages.batches.cancel(batch_id)

    def lines(self, batch_id: str) -> list[str]:
        """All result lines."""
        response = self.sdk.messages.batches.with_raw_response.results(batch_id)
        return response.http_response.read().decode().splitlines()


class Gpt:
    """OpenAI batches reduced to the same."""

    vendor = "openai"
    error = openai

    def __init__(self, server: EmulatorServer) -> None:
        key = f"fault-{next(tenants)}"
        server.key(key, organization=key, workspace="p")
        self.server = server
        self.sdk = openai_client(server.url).with_options(api_key=key)

    def call(self) -> Any:
        """Make a standard call."""
        return self.sdk.chat.completions.create(model="gpt-5-nano", messages=[{"role": "user", "content": "Hi"}])

    def create(self, count: int = 10) -> str:
        """Create a batch."""
        body = {"model": "gpt-5-nano", "messages": [{"role": "user", "content": "Hi"}]}
        rows = [{"custom_id": f"r{n}", "method": "POST", "url": URL, "body": body} for n in range(count)]
        content = "\n".join(map(json.dumps, rows)).encode()
        file = self.sdk.files.create(file=("in.jsonl", content), purpose="batch")
        return self.sdk.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id

    def status(self, batch_id: str) -> str:
        """A batch's status."""
        return self.sdk.batches.retrieve(batch_id).status

    def listed(self) -> list[str]:
        """Ids of all batches."""
        return [batch.id for batch in self.sdk.batches.list()]

    def cancel(self, batch_id: str) -> None:
        """Cancel a batch."""
        self.sdk.batches.cancel(batch_id)

    def lines(self, batch_id: str) -> list[str]:
        """All result lines."""
        batch = self.sdk.batches.retrieve(batch_id)
        files = [file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id]
        return [line for file_id in files for line in self.sdk.files.content(file_id).text.splitlines()]


@pytest.fixture(params=[Claude, Gpt])
def api(request: pytest.FixtureRequest, server: EmulatorServer) -> Any:
    """Give a fresh tenant of each vendor in turn."""
    return request.param(server)


def rows(api: Any, batch_id: str) -> dict[str, Any]:
    """All rows of an ended batch by custom_id."""
    return {row["custom_id"]: row for row in map(json.loads, api.lines(batch_id))}


def kind(api: Any, row: dict[str, Any]) -> str:
    """What became of a row, in one word for both vendors."""
    if api.vendor == "anthropic":
        return row["result"]["type"] if row["result"] else "null"
    if row["error"]:
        return {"batch_expired": "expired", "batch_cancelled": "canceled"}[row["error"]["code"]]
    if row["response"] is None:
        return "null"
    return "succeeded" if row["response"]["status_code"] == 200 else "errored"


def run(api: Any, count: int = 10) -> dict[str, str]:
    """Run a batch to its end and tell what became of each row."""
    batch_id = api.create(count)
    api.server.advance(61)
    return {custom_id: kind(api, row) for custom_id, row in rows(api, batch_id).items()}


# HTTP


def test_status(api: Any) -> None:
    """A `status` fault answers with the vendor's error body and headers, once, and nothing is done."""
    api.server.fault("status", on="create_batch", status=429, retry_after=7, message="Slow down.")
    with pytest.raises(api.error.RateLimitError, match=r"Slow down\.") as caught:
        api.create()

    assert "7" == caught.value.response.headers["retry-after"]
    assert [] == api.listed()
    assert api.create() in api.listed()


def test_overloaded(server: EmulatorServer) -> None:
    """A 529 carries Anthropic's `overloaded_error` and its details' error code if ordered."""
    server.fault("status", on="standard", status=529, error_code="x")
    with pytest.raises(anthropic.APIStatusError) as caught:
        Claude(server).call()

    assert 529 == caught.value.status_code
    assert "overloaded_error" == caught.value.body["error"]["type"]
    assert "x" == caught.value.body["error"]["details"]["error_code"]


def test_times_after_and_vendor(server: EmulatorServer) -> None:
    """A fault skips the first `after` calls of its vendor, strikes `times` calls, and then stops."""
    server.fault("status", on="standard", status=500, after=1, times=2, vendor="openai")
    claude, gpt = Claude(server), Gpt(server)
    outcomes = []
    for _ in range(4):
        claude.call()
        try:
            gpt.call()
            outcomes.append("ok")
        except openai.InternalServerError:
            outcomes.append("500")

    assert ["ok", "500", "500", "ok"] == outcomes


def test_forever_until_cleared(server: EmulatorServer) -> None:
    """With `times` -1 a fault strikes until it is cleared."""
    server.fault("status", on="retrieve_batch", status=503, times=-1)
    gpt = Gpt(server)
    batch_id = gpt.create(1)
    for _ in range(3):
        with pytest.raises(openai.InternalServerError):
            gpt.status(batch_id)
    server.clear_faults()

    assert "validating" == gpt.status(batch_id)


def test_drop_before(api: Any) -> None:
    """With `drop_before` the client sees a connection error and no batch was made."""
    api.server.fault("drop_before", on="create_batch")
    with pytest.raises(api.error.APIConnectionError):
        api.create()

    assert [] == api.listed()


def test_drop_after(api: Any) -> None:
    """With `drop_after` the client sees the same connection error, yet the batch exists, once."""
    api.server.fault("drop_after", on="create_batch")
    with pytest.raises(api.error.APIConnectionError):
        api.create()

    assert 1 == len(api.listed())


def test_drop_during_upload(server: EmulatorServer) -> None:
    """A dropped upload leaves no file, one dropped after acting leaves one."""
    gpt = Gpt(server)
    for fault, files in (("drop_before", 0), ("drop_after", 1)):
        server.fault(fault, on="upload_file")
        with pytest.raises(openai.APIConnectionError):
            gpt.create()
        assert files == len(list(gpt.sdk.files.list()))


def test_delay(api: Any) -> None:
    """A delayed create runs into the client's timeout although the batch was made."""
    api.server.fault("delay", on="create_batch", seconds=2)
    api.sdk = api.sdk.with_options(timeout=0.5)
    with pytest.raises(api.error.APITimeoutError):
        api.create()

    assert 1 == len(api.listed())


def test_slow(api: Any) -> None:
    """A slow answer arrives whole, but takes its time."""
    api.server.fault("slow", on="standard", seconds=0.5)
    start = time.monotonic()
    api.call()

    assert time.monotonic() - start >= 0.5


def test_truncated_results(api: Any) -> None:
    """A truncated download breaks off as a protocol error, and the next one is whole."""
    batch_id = api.create()
    api.server.advance(61)
    api.server.fault("truncate", on="results", fraction=0.5)
    with pytest.raises(Exception, match=r"peer closed|incomplete|Connection error"):
        api.lines(batch_id)

    assert 10 == len(api.lines(batch_id))


def test_garbled_results(api: Any) -> None:
    """A garbled download has exactly one line in the middle that does not parse."""
    batch_id = api.create()
    api.server.advance(61)
    api.server.fault("garble", on="results")
    broken = [n for n, line in enumerate(api.lines(batch_id)) if not parses(line)]

    assert [5] == broken


def parses(line: str) -> bool:
    """Whether a line is JSON."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def test_garbled_answer(api: Any) -> None:
    """A garbled create answer is a 200 that is not JSON."""
    api.server.fault("garble", on="create_batch")
    with pytest.raises((api.error.APIError, ValueError, AttributeError)):
        api.create().upper()

    assert 1 == len(api.listed())


# Rows


@pytest.mark.parametrize(
    ("fault", "word"), [("row_error", "errored"), ("row_expired", "expired"), ("row_null_response", "null")]
)
def test_rows_that_do_not_run(api: Any, fault: str, word: str) -> None:
    """Rows chosen by index fail as ordered, are not billed, and leave the others alone."""
    before = api.server.invoice()["requests"].get(f"{api.vendor}.batch", 0)
    api.server.fault(fault, index=[1, 3])
    outcomes = run(api)

    assert {"r1", "r3"} == {custom_id for custom_id, outcome in outcomes.items() if outcome == word}
    assert 8 == list(outcomes.values()).count("succeeded")
    assert before + 8 == api.server.invoice()["requests"][f"{api.vendor}.batch"]


def test_row_error_is_as_ordered(server: EmulatorServer) -> None:
    """An ordered row error has its status, type and message in each vendor's shape."""
    order = {"index": 0, "status": 500, "message": "boom", "error_type": "api_error"}
    found = []
    for api in (Claude(server), Gpt(server)):
        server.fault("row_error", **order)
        batch_id = api.create(1)
        server.advance(61)
        found.append(rows(api, batch_id)["r0"])

    error = found[0]["result"]["error"]["error"]
    assert ("api_error", "boom") == (error["type"], error["message"])
    assert 500 == found[1]["response"]["status_code"]
    assert {"message": "boom", "type": "api_error", "param": None, "code": None} == found[1]["response"]["body"][
        "error"
    ]


@pytest.mark.parametrize(
    ("choice", "expected"), [({"every": 4}, {"r3", "r7"}), ({"fraction": 0.2}, {"r4", "r9"}), ({}, 10)]
)
def test_choosing_rows(api: Any, choice: dict[str, Any], expected: Any) -> None:
    """Rows are chosen by `every` or `fraction`; without a choice all are meant."""
    api.server.fault("row_error", **choice)
    struck = {custom_id for custom_id, outcome in run(api).items() if outcome == "errored"}

    assert expected == (struck if isinstance(expected, set) else len(struck))


def test_defaced_rows(api: Any) -> None:
    """Missing, doubled, garbled and foreign rows spoil the results, but all rows ran and are billed."""
    before = api.server.invoice()["requests"].get(f"{api.vendor}.batch", 0)
    for n, fault in enumerate(("row_missing", "row_twice", "row_garbled", "row_foreign")):
        api.server.fault(fault, index=n)
    batch_id = api.create(5)
    api.server.advance(61)
    lines = api.lines(batch_id)
    ids = sorted(json.loads(line)["custom_id"] for line in lines if parses(line))

    assert 6 == len(lines)
    assert ["foreign-r3", "r1", "r1", "r3", "r4"] == ids
    assert before + 5 == api.server.invoice()["requests"][f"{api.vendor}.batch"]


# Batches


def test_expire_half(api: Any) -> None:
    """With `expire_half` a batch expires at its end time with its first half done."""
    api.server.fault("expire_half")
    outcomes = run(api)

    assert ["succeeded"] * 5 + ["expired"] * 5 == [outcomes[f"r{n}"] for n in range(10)]


def test_fail_batch(server: EmulatorServer) -> None:
    """With `fail_batch` a batch fails with the ordered code, runs nothing and has no files."""
    gpt = Gpt(server)
    before = server.invoice()["total_usd"]
    server.fault("fail_batch", code="token_limit_exceeded")
    batch_id = gpt.create()
    assert "validating" == gpt.status(batch_id)
    server.advance(61)
    batch = gpt.sdk.batches.retrieve(batch_id)

    assert ("failed", "token_limit_exceeded") == (batch.status, batch.errors.data[0].code)
    assert (None, None) == (batch.output_file_id, batch.error_file_id)
    assert before == server.invoice()["total_usd"]


def test_never_ends(api: Any) -> None:
    """A batch that never ends is running after 23 hours, expires at 24, or ends when cancelled."""
    api.server.fault("never_ends", times=2)
    expiring, cancelled = api.create(), api.create()
    api.server.advance(23 * 3_600)
    assert "in_progress" == api.status(expiring)
    api.cancel(cancelled)
    api.server.advance(3_600)

    assert {"expired"} == {kind(api, row) for row in rows(api, expiring).values()}
    assert {"canceled"} == {kind(api, row) for row in rows(api, cancelled).values()}


def test_slow_batch(api: Any) -> None:
    """A slow batch ends when it was ordered to, not before."""
    api.server.fault("slow_batch", seconds=1_000)
    batch_id = api.create()
    api.server.advance(990)
    before = api.status(batch_id)
    api.server.advance(11)

    assert before in ("in_progress", "finalizing")
    assert api.status(batch_id) in ("ended", "completed")


def test_cancel_without_files(server: EmulatorServer) -> None:
    """With `cancel_without_files` a cancelled batch has neither file, though half of it ran."""
    gpt = Gpt(server)
    server.fault("cancel_without_files")
    batch_id = gpt.create()
    server.advance(30)
    gpt.cancel(batch_id)
    server.advance(2)
    batch = gpt.sdk.batches.retrieve(batch_id)

    assert "cancelled" == batch.status
    assert (None, None) == (batch.output_file_id, batch.error_file_id)


def test_late_list(api: Any) -> None:
    """A batch that is listed late can be retrieved at once, but is in no list until its time."""
    api.server.fault("late_list", seconds=30)
    batch_id = api.create()

    assert batch_id not in api.listed()
    assert api.status(batch_id)
    api.server.advance(31)
    assert batch_id in api.listed()


def test_late_create(api: Any) -> None:
    """A late create loses its answer, and the batch comes into being only later."""
    api.server.fault("late_create", seconds=100)
    with pytest.raises(api.error.APIConnectionError):
        api.create()
    before = api.listed()
    api.server.advance(101)
    (batch_id,) = api.listed()
    api.server.advance(61)

    assert [] == before
    assert {"succeeded"} == {kind(api, row) for row in rows(api, batch_id).values()}


def test_foreign_batch(api: Any) -> None:
    """A foreign batch of the same size and moment appears beside ours, is not billed, and has other custom_ids."""
    before = sum(api.server.billed().values())
    api.server.fault("foreign_batch")
    ours = api.create()
    (foreign,) = set(api.listed()) - {ours}
    api.server.advance(61)

    bill = sum(api.server.billed().values()) - before
    assert 10 == len(rows(api, foreign))
    assert not rows(api, foreign).keys() & rows(api, ours).keys()
    assert bill == sum(tokens(api, row) for row in rows(api, ours).values())
    marked = {batch["id"]: batch["foreign"] for batch in api.server.record()["batches"]}
    assert (False, True) == (marked[ours], marked[foreign])


def tokens(api: Any, row: dict[str, Any]) -> int:
    """All tokens of a succeeded row."""
    if api.vendor == "openai":
        return row["response"]["body"]["usage"]["total_tokens"]
    usage = row["result"]["message"]["usage"]
    return usage["input_tokens"] + usage["output_tokens"]


# Orders


BAD_ORDERS = [
    ({"kind": "nope"}, "unknown kind 'nope', valid are status"),
    ({"kind": "status"}, "unknown on None, valid are create_batch"),
    ({"kind": "status", "on": "nope"}, "unknown on 'nope', valid are create_batch"),
    ({"kind": "row_error", "on": "results"}, "unknown on 'results', valid are create_batch"),
    ({"kind": "status", "on": "standard", "vendor": "acme"}, "unknown vendor 'acme', valid are anthropic, openai"),
    ({"kind": "fail_batch", "vendor": "anthropic"}, "unknown vendor 'anthropic', valid are openai"),
    ({"kind": "delay", "on": "standard", "second": 1}, "unknown parameter of `delay` 'second'"),
    ({"kind": "delay", "on": "standard", "seconds": "1"}, "`seconds` must be int or float, got '1'"),
]


@pytest.mark.parametrize(("order", "words"), BAD_ORDERS)
def test_bad_orders(server: EmulatorServer, order: dict[str, Any], words: str) -> None:
    """A fault that makes no sense is a 400 that names the value and the valid ones."""
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        server.admin("POST", "faults", order)


def test_armed_faults_are_shown(server: EmulatorServer) -> None:
    """Armed faults are listed with how often they matched and struck."""
    number = server.fault("status", on="standard", status=500, after=5)
    Gpt(server).call()
    (shown,) = server.admin("GET", "faults")["faults"]

    assert (number, 1, 0) == (shown["id"], shown["seen"], shown["used"])
