from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from emulator_server import EmulatorServer
from presort.emulator import lifecycle
from presort.emulator.lifecycle import Ending, Phase, Result, Window, progress
from presort.emulator.multipart import parse
from presort.emulator.state import Batch

HEADERS = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
BEARER = {"authorization": "Bearer k"}
DAY = 86_400


@pytest.fixture(scope="module")
def shared() -> Iterator[EmulatorServer]:
    """Start one emulator for the tests that leave nothing behind."""
    with EmulatorServer() as server:
        yield server


def params(text: str = "Hi") -> dict[str, Any]:
    """Make a request's params."""
    return {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": text}]}


def create(server: EmulatorServer, count: int = 10) -> str:
    """Create a batch and give its id."""
    requests = [{"custom_id": f"r{n}", "params": params(f"question {n}")} for n in range(count)]
    status, batch = server.request("POST", "/v1/messages/batches", {"requests": requests}, HEADERS)
    assert 200 == status
    return batch["id"]


def test_survives_a_kill(tmp_path: Path) -> None:
    """After SIGKILL and restart the clock, batches, cache, keys, faults, settings, bill and record are as before."""
    state = tmp_path / "emulator.db"
    marked = {**params(), "cache_control": {"type": "ephemeral", "ttl": "1h"}, "model": "claude-sonnet-5"}
    marked["messages"] = [{"role": "user", "content": "long " * 2_000}]
    with EmulatorServer(state=state, batch_seconds=1_000) as server:
        server.key("revoked", revoked=True)
        server.set(batch_hit_percent=70)
        batch_id = create(server)
        server.request("POST", "/v1/messages", marked, HEADERS)
        server.advance(505)
        server.fault("status", on="standard", status=500, after=9)
        before = server.now(), server.invoice(), server.record()
        server.kill()
    with EmulatorServer(state=state) as server:
        after = server.now(), server.invoice(), server.record()
        settings, faults = server.admin("GET", "settings"), server.admin("GET", "faults")["faults"]
        revoked = server.request("POST", "/v1/messages", params(), {**HEADERS, "x-api-key": "revoked"})[0]
        _, cached = server.request("POST", "/v1/messages", marked, HEADERS)
        server.advance(500)
        _, batch = server.request("GET", f"/v1/messages/batches/{batch_id}", None, HEADERS)

    assert before[1:] == after[1:]
    assert 0 <= after[0] - before[0] < 30
    assert (1_000, 70) == (settings["batch_seconds"], settings["batch_hit_percent"])
    assert ["status"] == [fault["kind"] for fault in faults]
    assert 401 == revoked
    assert 2_500 == cached["usage"]["cache_read_input_tokens"]
    assert ("ended", 10) == (batch["processing_status"], batch["request_counts"]["succeeded"])


def test_killed_in_a_batch_bills_once(tmp_path: Path) -> None:
    """Though it is killed twice while it works on a batch, each request is answered and billed once."""
    state = tmp_path / "emulator.db"
    with EmulatorServer(state=state, batch_seconds=0.5) as server:
        batch_id = create(server, 3_000)
        server.kill()
    with EmulatorServer(state=state) as server:
        while not server.admin("GET", "stats")["carried_out"]:
            pass
        server.kill()
    with EmulatorServer(state=state) as server:
        invoice = server.invoice()
        (batch,) = [each for each in server.record()["batches"] if each["id"] == batch_id]

    assert {"anthropic.batch": 3_000} == invoice["requests"]
    assert {"succeeded": 3_000} == batch["counts"]
    tokens = {line["class"]: line["tokens"] for line in invoice["lines"]}
    assert 10 * 3 + 90 * 3 + 900 * 3 + 2_000 * 4 == tokens["input"]


def test_memory_state_is_gone(tmp_path: Path) -> None:
    """Without a state file nothing is written to disk and a new start knows nothing."""
    with EmulatorServer() as server:
        create(server)
        health = server.admin("GET", "health")
    with EmulatorServer() as server:
        record = server.record()

    assert (None, True) == (health["state"], health["emulated"])
    assert [] == record["batches"]


def test_says_emulated_everywhere(shared: EmulatorServer) -> None:
    """The start-up line, the invoice, admin answers, errors and unknown paths all say that they are emulated."""
    banner, invoice = shared.banner, shared.invoice()
    status, unknown = shared.request("GET", "/v1/nothing", None, HEADERS)
    other_status, other = shared.request("GET", "/v1/nothing", None, BEARER)

    assert banner.startswith("EMULATED Anthropic and OpenAI APIs on http://127.0.0.1:")
    assert invoice["notice"].startswith("EMULATED")
    assert (404, 404) == (status, other_status)
    assert "EMULATED" in unknown["error"]["message"]
    assert "EMULATED" in other["error"]["message"]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it where it is expected to end by itself; port TAKEN is another's."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "presort.emulator", *(each.replace("TAKEN", port) for each in arguments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--port", "TAKEN"), "cannot listen on 127.0.0.1:"),
        (("--host", "0.0.0.0"), "host must be a loopback address such as 127.0.0.1, got 0.0.0.0"),
        (("--host", "example.com"), "host must be a loopback address"),
        (("--port", "70000"), "cannot listen on 127.0.0.1:70000"),
        (("--idle-exit-seconds", "0"), "idle-exit-seconds must be positive, got 0.0"),
        (("--batch-seconds", "-1"), "`batch_seconds` must not be negative, got -1.0"),
        (("--state", "/nowhere/at/all"), "cannot use state /nowhere/at/all"),
    ],
)
def test_refuses_to_start(arguments: tuple[str, ...], words: str) -> None:
    """What cannot work is one clear line on stderr and exit status 2."""
    ended = start(*arguments)

    assert 2 == ended.returncode
    assert words in ended.stderr
    assert 1 == len(ended.stderr.splitlines())
    assert "" == ended.stdout


def test_stops_quickly() -> None:
    """SIGTERM ends it within two seconds with status 0, even while a request waits."""
    with EmulatorServer() as server:
        server.fault("delay", on="standard", seconds=60)
        with socket.create_connection(("127.0.0.1", server.port)) as waiting:
            body = json.dumps(params()).encode()
            headers = {"host": "x", **HEADERS, "content-length": str(len(body))}
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            waiting.sendall(f"POST /v1/messages HTTP/1.1\r\n{head}\r\n".encode() + body)
            while not server.admin("GET", "faults")["faults"][0]["used"]:
                pass
            begun = time.monotonic()
            status = server.stop()

    assert 0 == status
    assert time.monotonic() - begun < 2.5


def test_idle_exit() -> None:
    """It stops by itself once nobody has asked anything for a while, and not before."""
    with EmulatorServer(arguments=("--idle-exit-seconds", "1")) as server:
        for _ in range(3):
            time.sleep(0.5)
            server.admin("GET", "health")
        begun = time.monotonic()
        status = server.process.wait(10)

    assert 0 == status
    assert 0.8 < time.monotonic() - begun < 5


def test_admin_refuses_nonsense(shared: EmulatorServer) -> None:
    """A bad admin request is a 400 that names the value and the valid ones, and changes nothing."""
    cases = [
        ("clock", b"{nope", "the body must be a JSON object"),
        ("clock", [1], "the body must be a JSON object, got [1]"),
        ("clock", {"advance_seconds": "1"}, "`advance_seconds` has the wrong type: '1'"),
        ("clock", {"advance_seconds": -1}, "must be a number of at least 0, got -1"),
        ("clock", {"seconds": 1}, "unknown name `seconds`, valid are advance_seconds"),
        ("settings", {"nope": 1}, "unknown setting `nope`, valid are batch_seconds"),
        ("settings", {"batch_hit_percent": 101}, "`batch_hit_percent` must be at most 100, got 101"),
        ("settings", {"only_listed_keys": 1}, "`only_listed_keys` must be a bool, got 1"),
        ("settings", {"batch_seconds": 5, "models": "x"}, "`models` must be a list, got 'x'"),
        ("keys", {"key": ""}, "`key` must not be empty"),
        ("keys", {"key": "a", "revoked": "yes"}, "`revoked` has the wrong type: 'yes'"),
    ]
    answers = [shared.request("POST", f"/_emulator/{name}", body) for name, body, _ in cases]
    settings = shared.admin("GET", "settings")

    for (status, answer), (_, _, words) in zip(answers, cases, strict=True):
        assert 400 == status
        assert words in answer["error"]
    assert 2 == settings["batch_seconds"]


def test_only_listed_keys(shared: EmulatorServer) -> None:
    """With `only_listed` an undefined key is refused and a defined one is not."""
    shared.key("good")
    shared.admin("POST", "keys", {"only_listed": True})
    try:
        keys = [{**HEADERS, "x-api-key": key} for key in ("good", "bad")]
        statuses = [shared.request("POST", "/v1/messages", params(), headers)[0] for headers in keys]
    finally:
        shared.admin("POST", "keys", {"only_listed": False})

    assert [200, 401] == statuses


def test_unpriced_models(shared: EmulatorServer) -> None:
    """Tokens of a model without a published price are billed as null, never as zero."""
    shared.set(models=["claude-brand-new"])
    shared.request("POST", "/v1/messages", {**params(), "model": "claude-brand-new"}, HEADERS)
    shared.request("POST", "/v1/messages", {**params(), "model": "claude-haiku-4-5-20251001"}, HEADERS)
    invoice = shared.invoice()

    unpriced = [line for line in invoice["lines"] if line["model"] == "claude-brand-new"]
    assert {None} == {line["usd"] for line in unpriced}
    assert sum(line["tokens"] for line in unpriced) == invoice["unpriced_tokens"] > 0
    dated = {line["class"]: line["usd"] for line in invoice["lines"] if line["model"] == "claude-haiku-4-5-20251001"}
    assert {"input": "0.000001", "output": "0.00004"} == dated  # 1 token at 1, 8 tokens at 5


def test_long_prompts_cost_more(shared: EmulatorServer) -> None:
    """A claude-haiku-5-5 request above 100,000 tokens costs five times as much, output included."""
    long = {**params("word " * 80_004), "model": "claude-haiku-5-5"}
    shared.request("POST", "/v1/messages", long, HEADERS)
    lines = [line for line in shared.invoice()["lines"] if line["model"] == "claude-haiku-5-5"]
    rates = {(line["class"], line["prompt"]): line["usd_per_mtok"] for line in lines}

    assert {("input", "long"): "0.5", ("output", "long"): "2.5"} == rates


def test_big_batch_leaves_room() -> None:
    """While 10,000 requests are carried out, other calls are answered in well under a second."""
    with EmulatorServer(batch_seconds=0.1) as server:
        batch_id = create(server, 10_000)
        slowest, done = 0.0, False
        while not done:
            begun = time.monotonic()
            server.request("GET", "/v1/models", None, HEADERS)
            slowest = max(slowest, time.monotonic() - begun)
            _, batch = server.request("GET", f"/v1/messages/batches/{batch_id}", None, HEADERS)
            done = batch["processing_status"] == "ended"

    assert 10_000 == batch["request_counts"]["succeeded"]
    assert slowest < 1


def test_progress_without_looking() -> None:
    """A batch is carried out though nobody looks at it."""
    with EmulatorServer(batch_seconds=0.2) as server:
        create(server, 50)
        deadline = time.monotonic() + 10
        while not server.admin("GET", "stats")["carried_out"] and time.monotonic() < deadline:
            time.sleep(0.05)
        stats = server.admin("GET", "stats")

    assert stats["carried_out"] > 0
    assert {"anthropic.create_batch": 1} == stats["requests"]


# Lifecycle


def batch(**changes: Any) -> Batch:
    """Make a batch's row."""
    values: dict[str, Any] = {
        "id": "b",
        "vendor": "v",
        "organization": "o",
        "workspace": "w",
        "created_at": 1_000.0,
        "listed_at": 1_000.0,
        "seconds": 100.0,
        "share": 1.0,
        "ending": Ending.COMPLETE,
        "size": 10,
        "done": 0,
        "cancelled_at": None,
        "ended_at": None,
        "result": None,
        "counts": {},
        "details": {},
    }
    return Batch(**{**values, **changes})


WINDOW = Window(0.1, 0.9)
CASES = [
    ({}, 999, (Phase.WAITING, 0, None)),
    ({}, 1_005, (Phase.VALIDATING, 0, None)),
    ({}, 1_050, (Phase.RUNNING, 5, None)),
    ({}, 1_090, (Phase.FINALIZING, 10, None)),
    ({}, 1_100, (Phase.FINALIZING, 10, (Result.COMPLETED, 1_100))),
    ({"cancelled_at": 1_057.5}, 1_058.4, (Phase.CANCELLING, 5, None)),
    ({"cancelled_at": 1_050.0}, 2_000, (Phase.CANCELLING, 5, (Result.CANCELLED, 1_051))),
    ({"cancelled_at": 1_099.9}, 1_100, (Phase.CANCELLING, 10, None)),
    ({"ending": Ending.EXPIRE, "share": 0.25}, 1_100, (Phase.RUNNING, 2, (Result.EXPIRED, 1_100))),
    ({"ending": Ending.NEVER, "share": 0.0}, 80_000, (Phase.RUNNING, 0, None)),
    ({"ending": Ending.NEVER, "share": 0.0}, 1_000 + DAY, (Phase.RUNNING, 0, (Result.EXPIRED, 1_000 + DAY))),
    ({"ending": Ending.FAIL}, 1_010, (Phase.RUNNING, 0, (Result.FAILED, 1_010))),
    ({"seconds": 0.0}, 1_000, (Phase.FINALIZING, 10, (Result.COMPLETED, 1_000))),
    ({"seconds": 2.0 * DAY}, 1_000 + DAY, (Phase.RUNNING, 5, (Result.EXPIRED, 1_000 + DAY))),
]


@pytest.mark.parametrize(("changes", "now", "expected"), CASES)
def test_progress(changes: dict[str, Any], now: float, expected: Any) -> None:
    """Where a batch stands follows from its fate and the time alone."""
    where = progress(batch(**changes), WINDOW, 1.0, now)

    assert expected == (where.phase, where.due, where.end)


def test_finish_times_agree_with_progress() -> None:
    """A request is due exactly from its finish time on."""
    one = batch()
    for n in range(10):
        moment = lifecycle.finish_time(one, WINDOW, n)
        assert n + 1 == progress(one, WINDOW, 1.0, moment + 1e-6).due
        assert n == progress(one, WINDOW, 1.0, moment - 1e-3).due


# Multipart


FORM = (
    b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a \\"b\\".jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\nline\r\n--A\r\n--\r\n\r\n--B--\r\n"
)


async def pieces(body: bytes, size: int, content_type: str = "multipart/form-data; boundary=B") -> dict[Any, bytes]:
    """Parse a form that arrives in chunks of this size."""

    async def stream() -> AsyncIterator[bytes]:
        for begin in range(0, len(body), size):
            yield body[begin : begin + size]

    parts: dict[Any, bytes] = {}
    async for piece in parse(content_type, stream()):
        key = piece.name, piece.filename
        parts[key] = parts.get(key, b"") + piece.data
    return parts


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_multipart_in_any_pieces(size: int) -> None:
    """However a form is cut into chunks, its parts come out byte for byte."""
    expected = {("purpose", None): b"batch", ("file", 'a "b".jsonl'): b"line\r\n--A\r\n--\r\n"}

    assert expected == asyncio.run(pieces(FORM, size))


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (FORM[:-6], "multipart/form-data; boundary=B"),
        (FORM, "application/json"),
        (b"", "multipart/form-data; boundary=B"),
    ],
)
def test_bad_multipart(body: bytes, content_type: str) -> None:
    """A form without its end, or of another type, is refused."""
    with pytest.raises(ValueError, match="multipart"):
        asyncio.run(pieces(body, 10, content_type))
