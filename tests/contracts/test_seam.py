"""The seam: what a client sends, receives and raises is the same with presort's transport as without it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import gzip
import importlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import httpx2
import pytest
import trustme

import presort
import seam_doors
from emulator_server import EmulatorServer
from presort import api, network, runtime, seam, telemetry
from presort.errors import ConfigurationError, InputError, MissingKeyError, StoreError
from presort.request import Outcome, OutcomeKind, Payload, Route, Usage
from seam_doors import DOORS, KEYS, QUESTION, Door, Session, closing, each, settle
from seam_servers import (
    TEXT,
    Heard,
    Proxy,
    Server,
    answer,
    chunked,
    json_reply,
    reply,
    stream_parts,
    stream_type,
    vendors,
)

pytestmark = pytest.mark.anyio

SYNC, ASYNC = False, True
BOTH_WAYS = pytest.mark.parametrize("asynchronous", [SYNC, ASYNC], ids=["sync", "async"])
THROUGH = pytest.mark.parametrize("door", DOORS, ids=str)
PROXY_USER = "pro:x y"
CALL = {"model": "claude-haiku-4-5", "max_tokens": 16, "messages": QUESTION}
HEADERS = {"x-api-key": KEYS["anthropic"], "anthropic-version": "2023-06-01"}
USAGE = Usage(input_tokens=11, output_tokens=7)
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Spares clients that speak plain HTTP the loading of certificates."""


@dataclass
class Kind:
    """One of the four HTTP clients there are."""

    lib: ModuleType
    asynchronous: bool

    @property
    def cls(self) -> type[Any]:
        """The client's class."""
        return self.lib.AsyncClient if self.asynchronous else self.lib.Client

    def client(self, **settings: Any) -> Any:
        """Make a client."""
        return self.cls(**{"verify": NO_TLS, **settings})

    def network(self, **settings: Any) -> Any:
        """Make a transport."""
        kind = self.lib.AsyncHTTPTransport if self.asynchronous else self.lib.HTTPTransport
        return kind(**{"verify": NO_TLS, **settings})

    def custom(self, handle: Callable[[Any], Any], **members: Any) -> Any:
        """Make a transport of a class of the user's own."""
        if self.asynchronous:

            async def handle_async_request(_: Any, request: Any) -> Any:
                return await settle(handle(request))

            members["handle_async_request"] = handle_async_request
            return type("Own", (self.lib.AsyncBaseTransport,), members)()
        members["handle_request"] = lambda _, request: handle(request)
        return type("Own", (self.lib.BaseTransport,), members)()

    async def finish(self, response: Any) -> None:
        """Close a response."""
        await settle(response.aclose() if self.asynchronous else response.close())

    @contextlib.asynccontextmanager
    async def entered(self, client: Any) -> AsyncIterator[None]:
        """Use a client in its own `with`."""
        if self.asynchronous:
            async with client:
                yield
        else:
            with client:
                yield


KINDS = [Kind(lib, way) for lib in (httpx, httpx2) for way in (SYNC, ASYNC)]
EVERY_KIND = pytest.mark.parametrize(
    "kind", KINDS, ids=[f"{kind.lib.__name__}-{'async' if kind.asynchronous else 'sync'}" for kind in KINDS]
)
ASYNC_KINDS = pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]], ids=["httpx", "httpx2"])
SYNC_KINDS = pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=["httpx", "httpx2"])


@dataclass
class FakeEngine:
    """Books and parks in memory, so that the transport is tested by itself."""

    booked: list[tuple[Any, Usage | None]] = field(default_factory=list)
    parked: list[tuple[Payload, dict[str, Any]]] = field(default_factory=list)
    future: concurrent.futures.Future[Outcome] = field(default_factory=concurrent.futures.Future)
    broken: Exception | None = None

    def account(self, key: str) -> str:
        """Name an account."""
        return f"account-of-{key}"

    def lacks_batch_api(self, base_url: str) -> bool:
        """Say that there is one."""
        return False

    def book_standard(self, key: Any, usage: Usage | None, at: float) -> None:
        """Note a call."""
        self.booked.append((key, usage))

    def park(self, payload: Payload, **options: Any) -> concurrent.futures.Future[Outcome]:
        """Note a call and return the one future there is."""
        self.parked.append((payload, options))
        return self.future

    @property
    def usages(self) -> list[Usage | None]:
        """What was booked."""
        return [usage for _, usage in self.booked]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Keep this machine's proxies, keys and stores out of the tests, and each test's out of the next."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "OPENAI_BASE_URL", "PRESORT_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    monkeypatch.setenv("PRESORT_STORE", str(tmp_path / "presort.db"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    telemetry._last.clear()
    presort.configure()
    yield
    presort.close()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Put a fake in the engine's place."""
    fake = FakeEngine()

    def running() -> FakeEngine:
        if fake.broken is not None:
            raise fake.broken
        return fake

    monkeypatch.setattr(runtime, "engine", running)
    return fake


@pytest.fixture(scope="module")
def origin_server() -> Iterator[Server]:
    """Start the origin that tests share."""
    with Server(vendors) as server:
        yield server


@pytest.fixture
def origin(origin_server: Server, engine: FakeEngine) -> Server:
    """Give an origin that has heard nothing, and answers as the vendors do."""
    origin_server.heard.clear()
    origin_server.answers = vendors
    return origin_server


@dataclass(frozen=True)
class Certificates:
    """A private authority, with a server's and a client's view of it."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    stranger: ssl.SSLContext


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    """Found an authority that nobody but these tests trusts."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(server)
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    authority.issue_cert("me@example.org", common_name="the client").configure_cert(client)
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(stranger)
    return Certificates(server, client, stranger)


@pytest.fixture
def secure(certificates: Certificates, engine: FakeEngine) -> Iterator[Server]:
    """Start an origin behind TLS that wants a client certificate."""
    with Server(vendors, tls=certificates.server) as server:
        yield server


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """Start a proxy that wants a name and a password."""
    with Proxy(PROXY_USER) as server:
        yield server


def proxy_settings(proxy: Proxy, certificates: Certificates, lib: ModuleType = httpx2) -> dict[str, Any]:
    """Return the settings that lead through the proxy to the secure origin."""
    user, _, password = PROXY_USER.partition(":")
    return {"proxy": lib.Proxy(proxy.url, auth=(user, password)), "verify": certificates.client}


@contextlib.asynccontextmanager
async def opened(door: Door, url: str, settings: dict[str, Any], *how: bool) -> AsyncIterator[Session]:
    """Open a door and close it again."""
    session = door.open(url, settings, *how)
    try:
        yield session
    finally:
        await session.close()


@contextlib.asynccontextmanager
async def closed_after(*clients: Any) -> AsyncIterator[None]:
    """Close clients in the end."""
    try:
        yield
    finally:
        for client in clients:
            await settle(closing(client)())


async def post(client: Any, url: str, **changes: Any) -> Any:
    """Send a call that presort knows."""
    return await settle(client.post(f"{url}/v1/messages", **{"json": CALL, "headers": HEADERS, **changes}))


async def until(happened: Callable[[], Any]) -> None:
    """Wait for something, ten seconds at most."""
    for _ in range(1000):
        if happened():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not happen")


def door_library(door: Door) -> ModuleType:
    """Return the HTTP library that a door speaks."""
    sdk = {"Chat": door.name.removeprefix("Chat").lower()}.get(door.name[:4], door.name)
    names = {"google-genai": "google", "googlegenerativeai": "google"}
    return seam_doors.lib_of(names.get(sdk, sdk))


# -- every front door --------------------------------------------------------------------------------------------


@THROUGH
@BOTH_WAYS
async def test_every_door_sends_the_same_bytes_and_returns_the_same_answer(
    door: Door, asynchronous: bool, origin: Server
):
    """Bare and wrapped, a call reaches the vendor as the same bytes and its answer is parsed to the same text."""
    seen = []
    for wrapped in (False, True):
        async with opened(door, origin.url, {"verify": NO_TLS}, wrapped, asynchronous) as session:
            text = session.read(await settle(session.ask()))
        seen.append((text, origin.heard.pop().raw, origin.heard))
    bare, through = seen
    assert bare[0] == TEXT
    assert bare == through


@THROUGH
@BOTH_WAYS
async def test_every_door_keeps_its_proxy_and_certificates(
    door: Door, asynchronous: bool, secure: Server, proxy: Proxy, certificates: Certificates
):
    """Through a proxy with a password to an origin of a private authority, both hear what they hear from a bare one."""
    settings = proxy_settings(proxy, certificates, door_library(door))
    seen = []
    for wrapped in (False, True):
        async with opened(door, secure.url, settings, wrapped, asynchronous) as session:
            text = session.read(await settle(session.ask()))
        heard = secure.heard.pop()
        seen.append((text, heard.raw, heard.client_certificate, proxy.heard.pop().raw))
    bare, through = seen
    assert bare[2] == "the client"
    assert bare[3].startswith(f"CONNECT 127.0.0.1:{secure.port} ".encode())
    assert bare == through


@THROUGH
@BOTH_WAYS
async def test_every_door_streams_piece_by_piece(door: Door, asynchronous: bool, origin: Server, engine: FakeEngine):
    """The first piece of a stream arrives before the vendor has sent the last, and its usage is booked at the end."""
    first_arrived = threading.Event()
    waited: list[bool] = []

    def hesitant(heard: Heard) -> Iterator[bytes]:
        parts = stream_parts(heard.target.partition("?")[0])

        def one_by_one() -> Iterator[bytes]:
            # `message_start` and the like come first: the text is in the third part at the latest
            early = 3 if len(parts) > 4 else 1
            yield from parts[:early]
            waited.append(first_arrived.wait(5))
            yield from parts[early:]

        return iter(chunked(one_by_one(), stream_type(heard.target.partition("?")[0])))

    origin.answers = hesitant
    async with opened(door, origin.url, {"verify": NO_TLS}, True, asynchronous) as session:
        async for _ in each(await settle(session.stream())):
            first_arrived.set()
    assert waited == [True]
    assert engine.usages == ([USAGE] if door.metered else [])


def silent(until: threading.Event) -> Callable[[Heard], Iterator[bytes]]:
    """Answer nothing until a test is over."""

    def answers(_: Heard) -> Iterator[bytes]:
        until.wait(10)
        yield b""

    return answers


def causes(error: BaseException | None) -> list[type[BaseException]]:
    """Return the types of an exception and of what it came from."""
    found = []
    while error is not None:
        found.append(type(error))
        error = error.__cause__ or error.__context__
    return found


@pytest.mark.parametrize("door", [door for door in DOORS if not door.name.startswith("Chat")], ids=str)
@BOTH_WAYS
async def test_every_sdk_raises_the_same_error_for_a_timeout(door: Door, asynchronous: bool, origin: Server):
    """`timeout=` counts on the standard route, and ends in the exceptions that it ends in without presort."""
    over = threading.Event()
    origin.answers = silent(over)
    seen = []
    for wrapped in (False, True):
        settings = {"verify": NO_TLS, "timeout": door_library(door).Timeout(5, read=0.05)}
        async with opened(door, origin.url, settings, wrapped, asynchronous) as session:
            with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is the point
                await settle(session.ask())
        seen.append(causes(caught.value))
    over.set()
    assert any(issubclass(kind, (httpx.ReadTimeout, httpx2.ReadTimeout)) for kind in seen[0])
    assert seen[0] == seen[1]


@BOTH_WAYS
async def test_an_sdk_retries_as_often_as_without(asynchronous: bool, origin: Server):
    """A 500 is tried three times by a client that retries twice, wrapped or not."""
    origin.answers = lambda _: json_reply({"error": {"message": "m"}}, 500, "retry-after-ms: 1")
    counts = []
    for wrapped in (False, True):
        http = seam_doors.http_client(seam_doors.lib_of("anthropic"), {"verify": NO_TLS}, wrapped, asynchronous)
        client = seam_doors.anthropic_client(origin.url, http, asynchronous, max_retries=2)
        async with closed_after(http):
            with pytest.raises(Exception, match="500"):
                await settle(client.messages.create(**CALL))
        counts.append(len(origin.heard))
        origin.heard.clear()
    assert counts == [3, 3]


# -- requests pass byte for byte ---------------------------------------------------------------------------------

FORM = {"content-type": "multipart/form-data; boundary=b"}
ZIP = {**HEADERS, "content-encoding": "gzip"}
TWICE = [("x-a", "1"), ("X-A", "2"), ("x-b", "\u00e4".encode())]
REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "get": ("GET", "/v1/models?limit=2&x=%20%2F", {}),
    "head": ("HEAD", "/v1/models", {}),
    "options": ("OPTIONS", "/v1/messages", {}),
    "delete": ("DELETE", "/v1/files/f", {}),
    "put": ("PUT", "/v1/things", {"json": {"a": 1}}),
    "post-nothing": ("POST", "/v1/messages", {}),
    "post-known": ("POST", "/v1/messages", {"json": CALL, "headers": HEADERS}),
    "post-spaced": ("POST", "/v1/messages", {"content": b' {"model" : "m",\n "max_tokens":1.0}', "headers": HEADERS}),
    "post-garbled": ("POST", "/v1/messages", {"content": b'{"model": "m"', "headers": HEADERS}),
    "post-other": ("POST", "/v1/embeddings", {"json": {"input": "\u00fc"}}),
    "post-zipped": ("POST", "/v1/messages", {"content": gzip.compress(b"{}", mtime=0), "headers": ZIP}),
    "post-form": ("POST", "/v1/files", {"files": {"file": ("f", b"x")}, "data": {"p": "q"}, "headers": FORM}),
    "post-twice": ("POST", "/v1/x", {"content": b"", "headers": TWICE}),
}


@EVERY_KIND
@pytest.mark.parametrize("asked", REQUESTS.values(), ids=REQUESTS)
async def test_every_request_passes_byte_for_byte(kind: Kind, asked: tuple[str, str, dict[str, Any]], origin: Server):
    """Whatever is sent, the wire is the same to the last byte as without presort."""
    method, path, more = asked
    origin.answers = lambda _: reply()
    bare = kind.client()
    wrapped = presort.transport(bare)
    async with closed_after(wrapped, bare):
        for client in (bare, wrapped):
            await settle(client.request(method, origin.url + path, **more))
    assert origin.heard[0].raw == origin.heard[1].raw


@EVERY_KIND
async def test_an_upload_in_chunks_passes_unread(kind: Kind, origin: Server):
    """A body made on the way is first asked for by the client's own transport, piece by piece."""
    reached = threading.Event()
    inner = kind.network()

    def handle(request: Any) -> Any:
        reached.set()
        return inner.handle_async_request(request) if kind.asynchronous else inner.handle_request(request)

    def body() -> Iterator[bytes]:
        for piece in (b'{"model": "m", ', b'"max_tokens": 1}'):
            assert reached.is_set()
            yield piece

    async def async_body() -> AsyncIterator[bytes]:
        for piece in body():
            yield piece

    client = presort.transport(kind.client(transport=kind.custom(handle)))
    async with closed_after(client, inner):
        await post(client, origin.url, json=None, content=async_body() if kind.asynchronous else body())
    assert origin.heard[0].raw.endswith(b'\r\nf\r\n{"model": "m", \r\n10\r\n"max_tokens": 1}\r\n0\r\n\r\n')


@EVERY_KIND
async def test_a_redirected_call_keeps_its_body(kind: Kind, origin: Server):
    """A 307 is followed with the same body, whose request httpx builds from a bare stream."""
    moved = reply(b"", 307, "Location: /else/v1/messages", reason="Moved")
    origin.answers = lambda heard: moved if heard.target == "/v1/messages" else vendors(heard)
    client = presort.transport(kind.client(follow_redirects=True))
    async with closed_after(client):
        response = await post(client, origin.url)
    assert response.json()["content"][0]["text"] == TEXT
    assert [heard.json for heard in origin.heard] == [CALL, CALL]


# -- answers pass byte for byte ----------------------------------------------------------------------------------

ZIPPED = gzip.compress(json.dumps(answer("/v1/messages", CALL)).encode(), mtime=0)
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}
TRAILERS = b"HTTP/1.1 200 Fine\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\nX-T: 1\r\n\r\n"
ANSWERS: dict[str, bytes] = {
    "plain": json_reply(answer("/v1/messages", CALL)),
    "gzip": reply(ZIPPED, 200, "Content-Type: application/json", "Content-Encoding: gzip"),
    "empty-204": b"HTTP/1.1 204 No Content\r\nX-A: 1\r\nx-a: 2\r\n\r\n",
    "early-hints": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + json_reply({"a": 1}),
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + json_reply({"a": 1}),
    "not-modified": b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n",
    "trailers": TRAILERS,
    "until-close": b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nall there is",
    "error": json_reply(OVERLOADED, 529, "retry-after: 1"),
    "no-json": reply(b"<html>", 200, "Content-Type: application/json"),
}


def then_hang_up(*parts: bytes) -> Iterator[bytes]:
    """Answer, and close the connection."""
    yield from parts
    raise EOFError


@EVERY_KIND
@pytest.mark.parametrize("raw", ANSWERS.values(), ids=ANSWERS)
async def test_every_answer_passes_byte_for_byte(kind: Kind, raw: bytes, origin: Server):
    """Status, reason, headers, raw body, HTTP version and extensions are those of the client's own transport."""
    origin.answers = lambda _: then_hang_up(raw) if b"Connection: close" in raw else raw
    bare = kind.client()
    wrapped = presort.transport(bare)
    seen = []
    async with closed_after(wrapped, bare):
        for client in (bare, wrapped):
            request = client.build_request("POST", f"{origin.url}/v1/messages", json=CALL, headers=HEADERS)
            response = await settle(client.send(request, stream=True))
            server = response.extensions["network_stream"].get_extra_info("server_addr")
            chunks = response.aiter_raw() if kind.asynchronous else response.iter_raw()
            body = b"".join([chunk async for chunk in each(chunks)])
            await kind.finish(response)
            seen.append(
                (
                    response.status_code,
                    response.reason_phrase,
                    response.headers.raw,
                    body,
                    response.http_version,
                    sorted(response.extensions),
                    server,
                    response.elapsed.total_seconds() < 5,
                )
            )
    assert seen[0] == seen[1]


@EVERY_KIND
async def test_an_upgraded_connection_is_handed_over(kind: Kind, origin: Server):
    """After a 101 the network stream in the response's extensions speaks the new protocol with the server."""
    switched = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\nhel"
    origin.answers = lambda _: then_hang_up(switched, b"lo")
    client = presort.transport(kind.client())
    asking = {"connection": "upgrade", "upgrade": "echo"}
    request = client.build_request("GET", f"{origin.url}/v1/realtime", headers=asking)
    async with closed_after(client):
        response = await settle(client.send(request, stream=True))
        stream = response.extensions["network_stream"]
        said = b""
        while chunk := await settle(stream.read(100)):
            said += chunk
        await kind.finish(response)
    assert (response.status_code, said) == (101, b"hello")


# -- errors pass as they are -------------------------------------------------------------------------------------


def stalled(until: threading.Event) -> Callable[[Heard], Iterator[bytes]]:
    """Answer half a body until a test is over."""

    def answers(_: Heard) -> Iterator[bytes]:
        yield reply(b"half", length=8)
        until.wait(10)

    return answers


FAILURES: dict[str, tuple[str, Callable[[threading.Event], Any], float]] = {
    "no-answer": ("ReadTimeout", silent, 0.05),
    "hung-up": ("RemoteProtocolError", lambda _: lambda _: b"", 5),
    "cut-body": ("RemoteProtocolError", lambda _: lambda _: then_hang_up(reply(b"half", length=8)), 5),
    "slow-body": ("ReadTimeout", stalled, 0.05),
}


@EVERY_KIND
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_every_error_is_the_librarys_own(kind: Kind, failure: tuple[str, Any, float], origin: Server):
    """What breaks on the standard route raises the library's exception, with its request, as without presort."""
    name, answers, read_seconds = failure
    over = threading.Event()
    origin.answers = answers(over)
    bare = kind.client(timeout=kind.lib.Timeout(5, read=read_seconds))
    wrapped = presort.transport(bare)
    seen = []
    async with closed_after(wrapped, bare):
        for client in (bare, wrapped):
            with pytest.raises(kind.lib.HTTPError) as caught:
                await post(client, origin.url)
            seen.append((type(caught.value), str(caught.value), caught.value.request.url))
    over.set()
    assert seen[0][0] is getattr(kind.lib, name)
    assert seen[0] == seen[1]


@EVERY_KIND
async def test_a_refused_connection_is_a_connect_error(kind: Kind, engine: FakeEngine):
    """Where nobody listens the library's `ConnectError` is raised."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = presort.transport(kind.client())
        async with closed_after(client):
            with pytest.raises(kind.lib.ConnectError):
                await post(client, f"http://127.0.0.1:{unused.getsockname()[1]}")


@EVERY_KIND
async def test_limits_and_pool_timeouts_hold(kind: Kind, origin: Server):
    """With one connection allowed and in use, the next call ends in the library's `PoolTimeout`."""
    settings = {"limits": kind.lib.Limits(max_connections=1), "timeout": kind.lib.Timeout(5, pool=0.05)}
    client = presort.transport(kind.client(**settings))
    async with closed_after(client):
        request = client.build_request("POST", f"{origin.url}/v1/messages", json=CALL, headers=HEADERS)
        response = await settle(client.send(request, stream=True))
        with pytest.raises(kind.lib.PoolTimeout):
            await post(client, origin.url)
        await kind.finish(response)


@ASYNC_KINDS
async def test_a_cancelled_call_hangs_up(kind: Kind, origin: Server):
    """Cancelling a task on the standard route raises `CancelledError` in it, and the next call works."""
    over = threading.Event()
    origin.answers = silent(over)
    client = presort.transport(kind.client())
    async with closed_after(client):
        task = asyncio.create_task(post(client, origin.url))
        await until(lambda: origin.heard)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        over.set()
        origin.answers = vendors
        assert (await post(client, origin.url)).status_code == 200


@ASYNC_KINDS
def test_trio_stays_on_trio(kind: Kind, origin: Server, engine: FakeEngine):
    """A standard call, streamed or not, works under trio and is booked."""
    trio = pytest.importorskip("trio")
    streaming = {**CALL, "stream": True}

    async def main() -> list[Any]:
        async with presort.transport(kind.client()) as client:
            plain = await post(client, origin.url)
            url = f"{origin.url}/v1/messages"
            async with client.stream("POST", url, json=streaming, headers=HEADERS) as response:
                lines = [line async for line in response.aiter_lines()]
            return [plain.status_code, lines[0]]

    assert trio.run(main) == [200, "event: message_start"]
    assert engine.usages == [USAGE, USAGE]


# -- the client that was wrapped ---------------------------------------------------------------------------------


@EVERY_KIND
async def test_hooks_fire_once_per_request(kind: Kind, origin: Server):
    """The user's event hooks see each request and each response once."""
    seen: list[str] = []

    def note(thing: Any) -> None:
        seen.append(type(thing).__name__)

    async def async_note(thing: Any) -> None:
        note(thing)

    hook = async_note if kind.asynchronous else note
    client = presort.transport(kind.client(event_hooks={"request": [hook], "response": [hook]}))
    async with closed_after(client):
        await post(client, origin.url)
    assert seen == ["Request", "Response"]


@EVERY_KIND
async def test_what_the_client_adds_is_sent(kind: Kind, origin: Server):
    """Authentication, default headers, parameters and cookies of the client go out as before."""
    settings = {"auth": ("u", "p"), "headers": {"x-mine": "1"}, "params": {"q": "1"}, "cookies": {"c": "1"}}
    client = presort.transport(kind.client(**settings))
    async with closed_after(client):
        await post(client, origin.url)
    heard = origin.heard[0]
    found = (heard.target, heard.header("authorization"), heard.header("x-mine"), heard.header("cookie"))
    assert found == ("/v1/messages?q=1", "Basic dTpw", "1", "c=1")


@EVERY_KIND
async def test_the_argument_is_left_as_it_was(kind: Kind, engine: FakeEngine):
    """Wrapping changes nothing in the client that was handed in, and gives a client of the same class."""
    client = kind.client(mounts={"all://other": None})
    before = dict(vars(client))
    wrapped = presort.transport(client)
    async with closed_after(wrapped, client):
        assert vars(client) == before
        assert type(wrapped) is type(client)
        assert wrapped is not client


@EVERY_KIND
async def test_a_client_in_use_can_be_wrapped_and_entered(kind: Kind, origin: Server):
    """A copy of a client that has been used may be used in a `with` of its own, and the original goes on."""
    bare = kind.client()
    async with closed_after(bare):
        await post(bare, origin.url)
        wrapped = presort.transport(bare)
        async with kind.entered(wrapped):
            await post(wrapped, origin.url)
        assert (wrapped.is_closed, bare.is_closed) == (True, False)
        assert (await post(bare, origin.url)).status_code == 200


@EVERY_KIND
async def test_a_closed_client_stays_closed(kind: Kind, engine: FakeEngine):
    """A copy of a closed client refuses to send, as its original does."""
    bare = kind.client()
    await settle(closing(bare)())
    with pytest.raises(RuntimeError, match="closed"):
        await post(presort.transport(bare), "http://127.0.0.1:9")


@EVERY_KIND
async def test_closing_the_copy_cuts_nothing_off(kind: Kind, origin: Server):
    """An answer that the original is in the middle of is read to its end after the copy was closed."""
    copy_closed = threading.Event()

    def halting(_: Heard) -> Iterator[bytes]:
        whole = json_reply(answer("/v1/messages", CALL))
        yield whole[:-9]
        copy_closed.wait(10)
        yield whole[-9:]

    bare = kind.client()
    wrapped = presort.transport(bare)
    async with closed_after(bare):
        await post(wrapped, origin.url)
        origin.answers = halting
        request = bare.build_request("POST", f"{origin.url}/v1/messages", json=CALL, headers=HEADERS)
        response = await settle(bare.send(request, stream=True))
        await settle(closing(wrapped)())
        copy_closed.set()
        await settle(response.aread() if kind.asynchronous else response.read())
    assert response.json()["content"][0]["text"] == TEXT


@EVERY_KIND
async def test_closing_the_original_leaves_the_copy_usable(kind: Kind, origin: Server):
    """After its original was closed the copy makes connections of its own."""
    bare = kind.client()
    wrapped = presort.transport(bare)
    await post(wrapped, origin.url)
    await settle(closing(bare)())
    async with closed_after(wrapped):
        assert (await post(wrapped, origin.url)).status_code == 200


@EVERY_KIND
@pytest.mark.parametrize("original", ["closed", "forgotten"])
async def test_the_last_of_the_two_closes_the_connections(kind: Kind, original: str, origin: Server):
    """A copy whose original is gone, or closed, closes the connections they shared."""
    bare = kind.client()
    pool = bare._transport._pool
    wrapped = presort.transport(bare)
    if original == "closed":
        await settle(closing(bare)())
    else:
        del bare
    await post(wrapped, origin.url)
    open_before = len(pool.connections)
    await settle(closing(wrapped)())
    assert (open_before, pool.connections) == (1, [])


@pytest.mark.parametrize("sdk", ["anthropic", "openai"])
@BOTH_WAYS
async def test_an_sdks_own_client_may_be_collected(sdk: str, asynchronous: bool, origin: Server):
    """An SDK's default client closes its connections when it is collected: not while its copy is reading from them."""
    pytest.importorskip(sdk)
    original = getattr(seam_doors, f"{sdk}_client")(origin.url, None, asynchronous)
    pool = original._client._transport._pool
    client = presort.wrap(original)
    request = client._client.build_request("POST", f"{origin.url}/v1/messages", json=CALL, headers=HEADERS)
    response = await settle(client._client.send(request, stream=True))
    del original
    gc.collect()
    await asyncio.sleep(0.01)
    await settle(response.aread() if asynchronous else response.read())
    assert (response.json()["content"][0]["text"], len(pool.connections)) == (TEXT, 1)
    await settle(client.close())
    assert pool.connections == []


@EVERY_KIND
async def test_the_copy_may_be_collected(kind: Kind, origin: Server):
    """A copy that is forgotten leaves the original its connections."""
    bare = kind.client()
    async with closed_after(bare):
        await post(presort.transport(bare), origin.url)
        gc.collect()
        await asyncio.sleep(0)
        await post(bare, origin.url)
    assert origin.heard[0].connection == origin.heard[1].connection


@BOTH_WAYS
async def test_an_sdks_copy_may_be_collected_in_a_cycle(asynchronous: bool, origin: Server):
    """A wrapped SDK client that only the garbage collector finds cuts off nothing that its original is reading."""
    pytest.importorskip("anthropic")
    collected = threading.Event()

    def halting(_: Heard) -> Iterator[bytes]:
        whole = json_reply(answer("/v1/messages", CALL))
        yield whole[:-9]
        collected.wait(10)
        yield whole[-9:]

    origin.answers = halting
    original = seam_doors.anthropic_client(origin.url, None, asynchronous)
    copied = presort.wrap(original)
    copied._client.itself = copied._client
    async with closed_after(original):
        request = original._client.build_request("POST", f"{origin.url}/v1/messages", json=CALL, headers=HEADERS)
        response = await settle(original._client.send(request, stream=True))
        del copied
        gc.collect()
        await asyncio.sleep(0.01)
        collected.set()
        await settle(response.aread() if asynchronous else response.read())
    assert response.json()["content"][0]["text"] == TEXT


@EVERY_KIND
async def test_mounts_are_kept_and_wrapped(kind: Kind, engine: FakeEngine):
    """A URL with a mounted transport goes through that one, a URL mounted to nothing through the client's own."""
    ways: list[str] = []

    def way(name: str) -> Any:
        def handle(request: Any) -> Any:
            ways.append(name)
            return kind.lib.Response(200, json=answer("/v1/messages", CALL))

        return kind.custom(handle)

    mounts = {"all://one.test": way("mounted"), "all://two.test": None}
    client = presort.transport(kind.client(transport=way("main"), mounts=mounts))
    async with closed_after(client):
        for host in ("one", "two", "three"):
            await post(client, f"http://{host}.test")
    assert ways == ["mounted", "main", "main"]
    assert engine.usages == [USAGE] * 3


@EVERY_KIND
async def test_wrapping_twice_counts_once(kind: Kind, origin: Server, engine: FakeEngine):
    """A client that was wrapped twice books each call once, and closing it leaves the first copy its connections."""
    bare = kind.client()
    once = presort.transport(bare)
    twice = presort.transport(once)
    async with closed_after(once, bare):
        await post(twice, origin.url)
        assert engine.usages == [USAGE]
        await settle(closing(twice)())
        assert len(bare._transport._pool.connections) == 1
        assert (await post(once, origin.url)).status_code == 200


@EVERY_KIND
async def test_a_transport_of_the_users_own_is_opened_and_closed_once(kind: Kind, engine: FakeEngine):
    """`with` on a wrapped client enters and leaves the user's own transport, once each."""
    seen: list[str] = []
    enter, leave = ("__aenter__", "__aexit__") if kind.asynchronous else ("__enter__", "__exit__")

    def note(name: str) -> Callable[..., Any]:
        async def later(*_: object) -> None:
            seen.append(name)

        def now(*_: object) -> None:
            seen.append(name)

        return later if kind.asynchronous else now

    own = kind.custom(lambda _: kind.lib.Response(200), **{enter: note("in"), leave: note("out")})
    client = presort.transport(kind.client(transport=own))
    async with kind.entered(client):
        await post(client, "http://x.test")
    assert seen == ["in", "out"]


@EVERY_KIND
async def test_a_duck_will_do_as_a_clients_transport(kind: Kind, engine: FakeEngine):
    """A client's transport need not derive from anything: httpx does not ask for it either."""

    class Duck:
        def handle_request(self, request: Any) -> Any:
            return kind.lib.Response(200, json=answer("/v1/messages", CALL))

        async def handle_async_request(self, request: Any) -> Any:
            return self.handle_request(request)

        def close(self) -> None:
            pass

        async def aclose(self) -> None:
            pass

    client = presort.transport(kind.client(transport=Duck()))
    async with closed_after(client):
        await post(client, "http://x.test")
    assert engine.usages == [USAGE]


@EVERY_KIND
async def test_a_transport_alone_is_wrapped_too(kind: Kind, origin: Server, engine: FakeEngine):
    """`presort.transport(transport)` fits where the bare one did, also if it is sync and async at once."""
    both = seam_doors.both_transports(kind.lib, {"verify": NO_TLS})
    async with closed_after(both.one, both.other):
        for inner in (kind.network(), both):
            client = kind.client(transport=presort.transport(inner))
            async with closed_after(client):
                await post(client, origin.url)
    assert engine.usages == [USAGE, USAGE]


@pytest.mark.parametrize("thing", [None, "x", object(), httpx.Response(200), httpx2])
def test_what_is_no_client_is_refused(thing: Any):
    """`presort.transport` names what it was given instead of a client or transport."""
    with pytest.raises(TypeError, match=f"httpx or httpx2, got {type(thing).__name__}"):
        presort.transport(thing)


# -- metering ----------------------------------------------------------------------------------------------------


@EVERY_KIND
async def test_a_zipped_answer_is_metered(kind: Kind, origin: Server, engine: FakeEngine):
    """The usage in a compressed answer is booked, under the account and model of the call."""
    origin.answers = lambda _: ANSWERS["gzip"]
    client = presort.transport(kind.client())
    async with closed_after(client):
        response = await post(client, origin.url)
    key, usage = engine.booked[0]
    assert (response.json()["usage"]["input_tokens"], usage) == (11, USAGE)
    assert (key.provider, key.base_url, key.model) == ("anthropic", origin.url, "claude-haiku-4-5")
    assert key.account == f"account-of-{KEYS['anthropic']}"


@EVERY_KIND
async def test_an_answer_read_by_the_users_transport_is_metered(kind: Kind, engine: FakeEngine):
    """A transport that has read the body already, as loggers and mocks do, hides no usage."""
    inner = kind.lib.MockTransport(lambda _: kind.lib.Response(200, json=answer("/v1/messages", CALL)))
    client = presort.transport(kind.client(transport=inner))
    async with closed_after(client):
        await post(client, "http://x.test")
    assert engine.usages == [USAGE]


@EVERY_KIND
@pytest.mark.parametrize("name", ["error", "not-modified"])
async def test_what_is_not_billed_is_not_booked(kind: Kind, name: str, origin: Server, engine: FakeEngine):
    """An answer that is no success books nothing."""
    origin.answers = lambda _: ANSWERS[name]
    client = presort.transport(kind.client())
    async with closed_after(client):
        await post(client, origin.url)
    assert engine.booked == []


@EVERY_KIND
async def test_an_answer_left_unread_is_booked_as_unknown(kind: Kind, origin: Server, engine: FakeEngine):
    """A whole answer that the caller does not read was billed all the same: its usage is unknown, not zero."""
    client = presort.transport(kind.client())
    async with closed_after(client):
        request = client.build_request("POST", f"{origin.url}/v1/messages", json=CALL, headers=HEADERS)
        await kind.finish(await settle(client.send(request, stream=True)))
    assert engine.usages == [None]


@EVERY_KIND
async def test_a_stream_left_at_its_last_event_is_metered(kind: Kind, origin: Server, engine: FakeEngine):
    """A reader that stops at the last event, before the end of the body, loses no usage."""
    over = threading.Event()

    def parts() -> Iterator[bytes]:
        yield from stream_parts("/v1/messages")
        over.wait(10)

    origin.answers = lambda _: chunked(parts(), "text/event-stream")
    client = presort.transport(kind.client())
    streaming = {**CALL, "stream": True}
    async with closed_after(client):
        request = client.build_request("POST", f"{origin.url}/v1/messages", json=streaming, headers=HEADERS)
        response = await settle(client.send(request, stream=True))
        lines = response.aiter_lines() if kind.asynchronous else response.iter_lines()
        async for line in each(lines):
            if "message_stop" in line:
                break
        await kind.finish(response)
    over.set()
    assert engine.usages == [USAGE]


@EVERY_KIND
async def test_a_broken_store_breaks_no_standard_call(
    kind: Kind, origin: Server, engine: FakeEngine, caplog: pytest.LogCaptureFixture
):
    """If the engine cannot be had a standard call succeeds all the same, and a warning says it is not booked."""
    engine.broken = StoreError("disk full")
    client = presort.transport(kind.client())
    async with closed_after(client):
        assert (await post(client, origin.url)).status_code == 200
    said = [record.message for record in caplog.records if record.name == "presort"]
    assert said == ["standard calls are not booked: StoreError: disk full"]


@EVERY_KIND
async def test_a_call_that_recognition_chokes_on_passes(
    kind: Kind, origin: Server, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    """Whatever goes wrong in reading a request, it is sent unread."""

    def choke(*_: object) -> None:
        raise RecursionError

    monkeypatch.setattr(seam, "recognise", choke)
    client = presort.transport(kind.client())
    async with closed_after(client):
        assert (await post(client, origin.url)).status_code == 200
    assert engine.booked == []


# -- the batch route, with an engine of wood ---------------------------------------------------------------------


def succeeded(body: Any) -> Outcome:
    """Return the outcome of a batched call that went well."""
    return Outcome(OutcomeKind.SUCCEEDED, 200, json.dumps(body).encode(), USAGE, batch_id="msgbatch_1")


@EVERY_KIND
async def test_a_batched_call_sends_nothing_and_gets_its_answer(kind: Kind, origin: Server, engine: FakeEngine):
    """On the batch route the call goes to the engine, and the outcome comes back as a response like any other."""
    engine.future.set_result(succeeded(answer("/v1/messages", CALL)))
    client = presort.transport(kind.client())
    async with closed_after(client):
        with presort.batch(deadline=7):
            response = await post(client, origin.url)
    payload, options = engine.parked[0]
    assert (origin.heard, engine.booked) == ([], [])
    assert json.loads(payload.body) == CALL
    assert payload.headers["x-api-key"] == KEYS["anthropic"]
    assert (options["deadline_seconds"], options["link"].key) == (7, KEYS["anthropic"])
    assert response.json()["content"][0]["text"] == TEXT
    assert response.headers["x-presort-route"] == "batch"
    assert response.headers["x-presort-batch-id"] == "msgbatch_1"
    assert (response.http_version, response.is_closed) == ("HTTP/1.1", True)
    assert response.elapsed.total_seconds() >= 0


@EVERY_KIND
async def test_a_timeout_does_not_count_on_the_batch_route(kind: Kind, engine: FakeEngine):
    """An answer that takes longer than every timeout of the client still arrives."""
    client = presort.transport(kind.client(timeout=0.01))
    async with closed_after(client):
        threading.Timer(0.2, engine.future.set_result, [succeeded({})]).start()
        with presort.batch():
            assert (await post(client, "http://x.test")).json() == {}


@EVERY_KIND
async def test_what_cannot_be_batched_takes_the_standard_route(kind: Kind, origin: Server, engine: FakeEngine):
    """Inside `presort.batch()` an urgent call, a streamed one and one without a key are sent at once."""
    client = presort.transport(kind.client())
    async with closed_after(client):
        with presort.batch():
            with presort.urgent():
                await post(client, origin.url)
            await post(client, origin.url, json={**CALL, "stream": True})
            await post(client, origin.url, headers={"anthropic-version": "2023-06-01"})
    assert (len(origin.heard), engine.parked) == (3, [])


@ASYNC_KINDS
async def test_a_cancelled_caller_withdraws_its_call(kind: Kind, engine: FakeEngine):
    """Cancelling a task that is parked raises `CancelledError` at once and cancels the engine's future."""
    client = presort.transport(kind.client())
    async with closed_after(client):
        with presort.batch():
            task = asyncio.create_task(post(client, "http://x.test"))
        await until(lambda: engine.parked)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert engine.future.cancelled()


@SYNC_KINDS
@pytest.mark.skipif(sys.platform == "win32", reason="no pthread_kill")
def test_ctrl_c_withdraws_a_parked_call(kind: Kind, engine: FakeEngine):
    """Ctrl-C while a synchronous call is parked raises `KeyboardInterrupt` and cancels the engine's future."""
    interrupt = threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    with presort.transport(kind.client()) as client, presort.batch():
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            client.post("http://x.test/v1/messages", json=CALL, headers=HEADERS)
    assert engine.future.cancelled()


@ASYNC_KINDS
def test_trio_cannot_park(kind: Kind, origin: Server, engine: FakeEngine, caplog: pytest.LogCaptureFixture):
    """Under trio a call inside `presort.batch()` takes the standard route, and a warning says why."""
    trio = pytest.importorskip("trio")

    async def main() -> int:
        async with presort.transport(kind.client()) as client:
            with presort.batch():
                return int((await post(client, origin.url)).status_code)

    assert (trio.run(main), engine.parked) == (200, [])
    assert "the caller's event loop is not asyncio's" in caplog.text


@pytest.mark.parametrize("sdk", ["anthropic", "openai"])
@BOTH_WAYS
async def test_a_failed_row_raises_the_sdks_own_exception_once(sdk: str, asynchronous: bool, engine: FakeEngine):
    """An errored row is the SDK's exception for its status, and even a status it retries is not retried."""
    module = pytest.importorskip(sdk)
    body = b'{"type": "error", "error": {"type": "api_error", "message": "broke"}}'
    engine.future.set_result(Outcome(OutcomeKind.ERRORED, 500, body, reason="batch"))
    http = seam_doors.http_client(seam_doors.lib_of(sdk), {"verify": NO_TLS}, True, asynchronous)
    client = getattr(seam_doors, f"{sdk}_client")("http://x.test", http, asynchronous, max_retries=2)
    create = client.messages.create if sdk == "anthropic" else client.chat.completions.create
    async with closed_after(http):
        with presort.batch(), pytest.raises(module.InternalServerError, match="broke"):
            await settle(create(**CALL))
    assert len(engine.parked) == 1


# -- siblings: how the engine sends ------------------------------------------------------------------------------


async def through_sibling(inner: Any, url: str, loop: asyncio.AbstractEventLoop | None = None, **call: Any) -> Any:
    """Send as the engine's side client does."""
    async with httpx2.AsyncClient(transport=network.sibling(inner, loop=loop), timeout=5) as client:
        return await client.request(**{"method": "POST", "url": f"{url}/v1/messages", "json": CALL, **call})


@EVERY_KIND
async def test_a_sibling_keeps_proxy_authority_and_client_certificate(
    kind: Kind, secure: Server, proxy: Proxy, certificates: Certificates
):
    """The engine's own connections go through the client's proxy, with its password, and present its certificate."""
    inner = kind.network(**proxy_settings(proxy, certificates, kind.lib))
    async with closed_after(inner):
        response = await through_sibling(inner, secure.url)
    assert response.json()["content"][0]["text"] == TEXT
    assert secure.heard[0].client_certificate == "the client"
    assert proxy.asked == [("CONNECT", f"127.0.0.1:{secure.port}")]


@EVERY_KIND
async def test_a_sibling_sends_plain_http_through_the_proxy_too(kind: Kind, origin: Server, proxy: Proxy):
    """Without TLS the proxy is asked in absolute form, with the same headers of its own."""
    user, _, password = PROXY_USER.partition(":")
    through = kind.lib.Proxy(proxy.url, auth=(user, password), headers={"x-proxy": "1"})
    inner = kind.network(proxy=through)
    async with closed_after(inner):
        await through_sibling(inner, origin.url)
    assert proxy.asked == [("POST", f"{origin.url}/v1/messages")]
    assert proxy.heard[0].header("x-proxy") == "1"
    assert origin.heard[0].header("proxy-authorization") is None


@EVERY_KIND
async def test_a_sibling_trusts_and_shows_no_more_than_its_client(
    kind: Kind, secure: Server, certificates: Certificates
):
    """Where the client has no certificate to show, or does not trust the authority, its sibling fails as it does."""
    for verify in (certificates.stranger, ssl.create_default_context()):
        inner = kind.network(verify=verify)
        async with closed_after(inner):
            # httpcore does not translate what a server says after a TLS 1.3 handshake
            with pytest.raises((httpx2.TransportError, ssl.SSLError)):
                await through_sibling(inner, secure.url)
    assert secure.heard == []


@EVERY_KIND
async def test_a_sibling_has_every_setting_of_its_client(kind: Kind):
    """Limits, retries, local address, socket options, HTTP versions: all are the client's, none is a default."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    limits = kind.lib.Limits(max_connections=7, max_keepalive_connections=3, keepalive_expiry=11)
    inner = kind.network(limits=limits, retries=2, local_address="127.0.0.1", socket_options=options)
    names = ("max_connections", "max_keepalive_connections", "keepalive_expiry", "retries", "local_address")
    names = (*names, "uds", "http1", "http2", "socket_options", "ssl_context")
    sibling = network.sibling(inner)
    assert isinstance(sibling, httpx2.AsyncHTTPTransport)
    assert sibling._pool is not inner._pool
    for name in names:
        assert getattr(sibling._pool, f"_{name}") == getattr(inner._pool, f"_{name}")


@EVERY_KIND
@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")
async def test_a_sibling_uses_the_clients_unix_socket(kind: Kind, tmp_path: Path):
    """A client that speaks through a Unix socket has a sibling that does."""
    inner = kind.network(uds=str(tmp_path / "nobody"))
    async with closed_after(inner):
        with pytest.raises(httpx2.ConnectError, match="No such file"):
            await through_sibling(inner, "http://x.test")


@EVERY_KIND
async def test_a_sibling_doubles_the_transport_of_the_mount(
    kind: Kind, origin: Server, proxy: Proxy, engine: FakeEngine
):
    """A parked call leaves a way to the transport that would have sent it: the mounted one, not the main one."""
    dead = kind.custom(lambda _: pytest.fail("the main transport was used"))
    user, _, password = PROXY_USER.partition(":")
    mounted = kind.network(proxy=kind.lib.Proxy(proxy.url, auth=(user, password)))
    client = presort.transport(kind.client(transport=dead, mounts={"all://127.0.0.1": mounted}))
    engine.future.set_result(succeeded({}))
    async with closed_after(client, mounted):
        with presort.batch():
            await post(client, origin.url)
        transport = engine.parked[0][1]["link"].transport()
        async with httpx2.AsyncClient(transport=transport) as side:
            await side.post(f"{origin.url}/v1/messages", json=CALL)
    assert proxy.asked == [("POST", f"{origin.url}/v1/messages")]


@EVERY_KIND
@pytest.mark.parametrize("read", [False, True], ids=["as-it-comes", "read-before"])
async def test_a_transport_of_the_users_own_is_used_itself(kind: Kind, read: bool, origin: Server):
    """A transport that cannot be doubled carries the engine's requests, whole bodies both ways, and is left open."""
    inner = kind.network()
    closed: list[bool] = []

    async def handle(request: Any) -> Any:
        request.headers["x-signed"] = str(len(request.content))
        response = await settle(
            inner.handle_async_request(request) if kind.asynchronous else inner.handle_request(request)
        )
        if read:
            await settle(response.aread() if kind.asynchronous else response.read())
        return response

    def handle_sync(request: Any) -> Any:
        request.headers["x-signed"] = str(len(request.content))
        response = inner.handle_request(request)
        if read:
            response.read()
        return response

    async def parts() -> AsyncIterator[bytes]:
        yield b'{"a": '
        yield b"1}"

    own = kind.custom(handle if kind.asynchronous else handle_sync, close=lambda _: closed.append(True))
    origin.answers = lambda _: ANSWERS["gzip"]
    async with closed_after(inner):
        response = await through_sibling(own, origin.url, json=None, content=parts())
    assert response.json()["content"][0]["text"] == TEXT
    assert (origin.heard[0].json, origin.heard[0].header("x-signed"), closed) == ({"a": 1}, "8", [])


@EVERY_KIND
@pytest.mark.parametrize("name", ["ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "ProxyError"])
async def test_errors_of_a_users_own_transport_keep_their_meaning(kind: Kind, name: str):
    """Whether a request may have been sent is told by the kind of error, so it survives the change of library."""

    def fail(_: Any) -> Any:
        raise getattr(kind.lib, name)("why")

    with pytest.raises(getattr(httpx2, name), match="why"):
        await through_sibling(kind.custom(fail), "http://x.test")


@EVERY_KIND
async def test_an_unknown_error_of_a_users_own_transport_leaves_all_open(kind: Kind):
    """An exception that is not the library's says nothing of what was sent: `TransportError`."""

    def fail(_: Any) -> Any:
        raise KeyError("x")

    with pytest.raises(httpx2.TransportError, match="KeyError") as caught:
        await through_sibling(kind.custom(fail), "http://x.test")
    assert type(caught.value) is httpx2.TransportError


@dataclass
class OtherLoop:
    """An event loop that runs in a thread, as the caller's does beside the engine's."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __enter__(self) -> asyncio.AbstractEventLoop:
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        return self.loop

    def __exit__(self, *_: object) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()


@ASYNC_KINDS
async def test_an_asynchronous_transport_of_the_users_own_stays_on_its_loop(kind: Kind, origin: Server):
    """Its requests are sent and its answers read on the loop that its connections belong to."""
    inner = kind.network()
    seen: list[asyncio.AbstractEventLoop] = []

    async def handle(request: Any) -> Any:
        seen.append(asyncio.get_running_loop())
        return await inner.handle_async_request(request)

    with OtherLoop() as loop:
        for _ in range(2):
            response = await through_sibling(kind.custom(handle), origin.url, loop)
            assert response.json()["content"][0]["text"] == TEXT
        asyncio.run_coroutine_threadsafe(inner.aclose(), loop).result()
    assert seen == [loop, loop]
    assert origin.heard[0].connection == origin.heard[1].connection


@ASYNC_KINDS
async def test_nothing_is_sent_once_the_loop_of_a_users_transport_has_ended(kind: Kind):
    """A transport whose loop has stopped is not used: `ConnectError`, which says that nothing was sent."""
    own = kind.custom(lambda _: pytest.fail("it was used"))
    with OtherLoop() as loop:
        pass
    with pytest.raises(httpx2.ConnectError, match="event loop"):
        await through_sibling(own, "http://x.test", loop)


@ASYNC_KINDS
async def test_a_loop_that_ends_in_between_leaves_all_open(kind: Kind, monkeypatch: pytest.MonkeyPatch):
    """If the caller's loop ends while its transport is sending, the answer is lost, and nobody waits for ever."""
    monkeypatch.setattr(network, "_LOOK_SECONDS", 0.02)
    began = threading.Event()

    async def handle(_: Any) -> Any:
        began.set()
        await asyncio.sleep(60)

    other = OtherLoop()
    with other as loop:
        call = asyncio.create_task(through_sibling(kind.custom(handle), "http://x.test", loop))
        await asyncio.to_thread(began.wait, 5)
        await asyncio.to_thread(other.__exit__)
        with pytest.raises(httpx2.ReadError, match="event loop"):
            await asyncio.wait_for(call, 10)


# -- private attributes we live by -------------------------------------------------------------------------------

POOL_FIELDS = (
    "ssl_context max_connections max_keepalive_connections keepalive_expiry http1 http2 socket_options retries "
    "local_address uds network_backend"
).split()
PROXY_FIELDS = {
    "http://p:1": ("proxy_url", "proxy_headers", "proxy_ssl_context"),
    "socks5://p:1": ("proxy_url", "proxy_auth"),
}


@EVERY_KIND
def test_a_client_keeps_its_transports_where_we_look(kind: Kind):
    """Httpx and httpx2 keep `_transport`, `_mounts` and `_state` in a client: `network.copied_client` lives by them."""
    client = kind.client(mounts={"all://x.test": None})
    missing = {"_transport", "_mounts", "_state"} - vars(client).keys()
    assert missing == set(), f"{kind.lib.__name__} {kind.lib.__version__} has moved {missing}"
    assert {state.name for state in type(client._state)} == {"UNOPENED", "OPENED", "CLOSED"}
    assert list(client._mounts.values()) == [None]


@EVERY_KIND
@pytest.mark.parametrize("proxy_url", [None, "http://p:1", "socks5://p:1"])
def test_a_pool_keeps_its_settings_where_we_look(kind: Kind, proxy_url: str | None):
    """Httpcore keeps every setting of a pool in the attributes that `network.sibling` reads."""
    if proxy_url and proxy_url.startswith("socks"):
        pytest.importorskip("socksio")
    pool = kind.network(proxy=proxy_url)._pool
    wanted = {f"_{name}" for name in (*POOL_FIELDS, *PROXY_FIELDS.get(proxy_url or "", ()))}
    missing = wanted - vars(pool).keys()
    assert missing == set(), f"{kind.lib.__name__} {kind.lib.__version__} has moved {missing}"
    assert type(pool).__name__ in network._POOLS | network._PROXY_POOLS
    assert type(pool._network_backend).__module__.startswith("httpcore")


@pytest.mark.parametrize("sdk", ["anthropic", "openai", "ollama"])
@BOTH_WAYS
async def test_an_sdk_keeps_its_http_client_where_we_look(sdk: str, asynchronous: bool):
    """The SDKs keep an httpx or httpx2 client in `_client`: `presort.wrap` lives by it."""
    module = pytest.importorskip(sdk)
    if sdk == "ollama":
        client = (module.AsyncClient if asynchronous else module.Client)()
    else:
        client = getattr(seam_doors, f"{sdk}_client")("http://x.test", None, asynchronous)
    assert hasattr(client, "_client"), f"{sdk} {module.__version__} has moved `_client`"
    async with closed_after(client._client):
        lib = network.library(client._client)
        assert isinstance(client._client, lib.AsyncClient if asynchronous else lib.Client)


@EVERY_KIND
async def test_a_transport_that_has_changed_inside_is_used_itself(
    kind: Kind, origin: Server, caplog: pytest.LogCaptureFixture
):
    """Where a setting cannot be read, the proxy's say, the client's own transport is used and a warning says so."""
    inner = kind.network()
    sending = inner._pool
    del sending._http2
    async with closed_after(inner):
        sibling = network.sibling(inner)
        sending._http2 = False
        async with httpx2.AsyncClient(transport=sibling) as client:
            assert (await client.post(f"{origin.url}/v1/messages", json=CALL)).status_code == 200
    assert "cannot double a transport" in caplog.text


# -- presort.wrap ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sdk", ["anthropic", "openai"])
@BOTH_WAYS
async def test_wrapping_an_sdk_client_copies_it(sdk: str, asynchronous: bool, origin: Server, engine: FakeEngine):
    """`presort.wrap` gives a client of the same class and settings, and leaves the one it was given alone."""
    pytest.importorskip(sdk)
    original = getattr(seam_doors, f"{sdk}_client")(origin.url, None, asynchronous, timeout=7, max_retries=1)
    client = presort.wrap(original)
    assert type(client) is type(original)
    assert (client.timeout, client.max_retries, client.api_key) == (7, 1, KEYS[sdk])
    assert client.base_url == original.base_url
    for each_client in (original, client):
        create = each_client.messages if sdk == "anthropic" else each_client.chat.completions
        await settle(create.create(**CALL))
    assert origin.heard[0].raw == origin.heard[1].raw
    assert engine.usages == [USAGE]
    async with closed_after(client._client, original._client):
        pass


@BOTH_WAYS
async def test_wrapping_an_azure_client_passes_its_calls(asynchronous: bool, origin: Server, engine: FakeEngine):
    """An Azure client is copied as one, and its calls, whose batches are other ones, pass as they are."""
    openai = pytest.importorskip("openai")
    make = openai.AsyncAzureOpenAI if asynchronous else openai.AzureOpenAI
    original = make(azure_endpoint=origin.url, api_key="a", api_version="2024-10-21", azure_deployment="d")
    client = presort.wrap(original)
    async with closed_after(client._client, original._client):
        with presort.batch():
            await settle(client.chat.completions.create(model="d", messages=QUESTION))
    assert type(client) is make
    assert origin.heard[0].target == "/openai/deployments/d/chat/completions?api-version=2024-10-21"
    assert (engine.parked, engine.booked) == ([], [])


def test_wrapping_a_google_client_says_how_to(engine: FakeEngine):
    """`presort.wrap` of a google-genai client names the option that takes wrapped HTTP clients."""
    genai = pytest.importorskip("google.genai")
    client = genai.Client(api_key="x", vertexai=False)
    with pytest.raises(TypeError, match=r"httpx_client=presort\.transport"):
        presort.wrap(client)
    client.close()


@EVERY_KIND
async def test_wrapping_an_http_client_is_the_transports_work(kind: Kind, engine: FakeEngine):
    """`presort.wrap` of an HTTP client is `presort.transport` of it."""
    client = kind.client()
    wrapped = presort.wrap(client)
    async with closed_after(wrapped, client):
        assert type(wrapped._transport) is type(presort.transport(kind.network()))


def test_what_cannot_be_wrapped_is_refused():
    """`presort.wrap` names the class that it does not know."""
    with pytest.raises(TypeError, match=r"got pathlib\.PosixPath|got pathlib\.WindowsPath|got pathlib\._local"):
        presort.wrap(Path())


def test_wrapping_imports_no_sdk():
    """Wrapping an HTTP client loads neither an SDK nor LangChain nor the other HTTP library."""
    others = ("anthropic", "openai", "google.genai", "ollama", "langchain_core", "httpx")
    code = (
        "import sys, httpx2, presort; presort.wrap(httpx2.Client()); "
        f"print([name for name in {others} if name in sys.modules])"
    )
    source = str(Path(presort.__file__).parent.parent)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source})
    assert (found.stdout.strip(), found.stderr) == ("[]", "")


# -- the batch route, with the real engine against the emulator --------------------------------------------------


@pytest.fixture(scope="module")
def emulator_process() -> Iterator[EmulatorServer]:
    """Start the emulator that tests share; its batches take a second."""
    with EmulatorServer(batch_seconds=1.0) as server:
        yield server


@pytest.fixture
def emulator(emulator_process: EmulatorServer, monkeypatch: pytest.MonkeyPatch) -> EmulatorServer:
    """Give the emulator without faults, and let the engine send and look soon."""
    emulator_process.clear_faults()
    for name, value in {"FLUSH_SECONDS": "0.05", "POLL_INTERVAL_SECONDS": "0.1"}.items():
        monkeypatch.setenv(f"PRESORT_BATCHING__{name}", value)
    presort.configure()
    return emulator_process


@dataclass(frozen=True)
class Vendor:
    """How to make one call of a vendor's SDK, and read what comes back."""

    sdk: str
    call: dict[str, Any]

    def client(self, emulator: EmulatorServer, asynchronous: bool, **options: Any) -> Any:
        """Make an SDK client with presort in it."""
        pytest.importorskip(self.sdk)
        return presort.wrap(getattr(seam_doors, f"{self.sdk}_client")(emulator.url, None, asynchronous, **options))

    def create(self, client: Any) -> Any:
        """Start the call."""
        method = client.messages.create if self.sdk == "anthropic" else client.chat.completions.create
        return method(**self.call)

    def gist(self, answer: Any) -> Any:
        """Take out what is the same in every answer to the call: not its id, time and service tier."""
        body = answer.to_dict()
        usage = body["usage"] | {"service_tier": None}
        return type(answer), body["model"], body.get("content") or body["choices"], usage


VENDORS = pytest.mark.parametrize(
    "vendor",
    [Vendor("anthropic", CALL), Vendor("openai", {"model": "gpt-4.1-mini", "messages": QUESTION})],
    ids=lambda vendor: vendor.sdk,
)


@VENDORS
@BOTH_WAYS
async def test_a_batched_answer_is_parsed_to_the_same_object(
    vendor: Vendor, asynchronous: bool, emulator: EmulatorServer
):
    """A batch that takes five times the client's timeout returns what the standard API would, at half its price."""
    client = vendor.client(emulator, asynchronous, timeout=0.2)
    async with closed_after(client._client):
        with presort.batch():
            batched = await settle(vendor.create(client))
        standard = await settle(vendor.create(client.with_options(timeout=5)))
        assert vendor.gist(batched) == vendor.gist(standard)
    assert presort.drain(5)
    costs = {total.route: total.actual_usd for total in totals(2)}
    assert costs[Route.BATCH] * 2 == costs[Route.STANDARD]


def totals(rows: int) -> list[Any]:
    """Wait until so many calls are in the ledger; return its sums."""
    for _ in range(500):
        found = runtime.engine().totals()
        if sum(total.rows for total in found) >= rows:
            break
        time.sleep(0.01)
    return found


@VENDORS
@BOTH_WAYS
async def test_an_errored_row_is_the_sdks_own_exception(vendor: Vendor, asynchronous: bool, emulator: EmulatorServer):
    """A row that the vendor refuses raises the SDK's exception for it, and is not asked a second time."""
    emulator.fault("row_error", index=0, status=400, error_type="invalid_request_error", message="no such thing")
    before = len(emulator.asked())
    client = vendor.client(emulator, asynchronous, max_retries=2)
    refused = importlib.import_module(vendor.sdk).BadRequestError
    async with closed_after(client._client):
        with presort.batch(), pytest.raises(refused, match="no such thing"):
            await settle(vendor.create(client))
    assert len(emulator.asked()) == before + 1


@BOTH_WAYS
async def test_the_engine_goes_through_the_clients_proxy(asynchronous: bool, emulator: EmulatorServer, proxy: Proxy):
    """Create, looks and results of a batch all pass the proxy of the client that the call came from."""
    vendor = Vendor("anthropic", CALL)
    pytest.importorskip("anthropic")
    lib = seam_doors.lib_of("anthropic")
    user, _, password = PROXY_USER.partition(":")
    settings = {"proxy": lib.Proxy(proxy.url, auth=(user, password)), "verify": NO_TLS}
    http = seam_doors.http_client(lib, settings, True, asynchronous)
    client = seam_doors.anthropic_client(emulator.url, http, asynchronous)
    async with closed_after(http):
        with presort.batch():
            await settle(vendor.create(client))
    batches = f"{emulator.url}/v1/messages/batches"
    assert proxy.asked[0] == ("POST", batches)
    assert proxy.asked[-1][1].endswith("/results")
    assert all(target.startswith(batches) for _, target in proxy.asked)


# -- payloads of one's own making --------------------------------------------------------------------------------


def payloads(emulator: EmulatorServer, *questions: str) -> list[Payload]:
    """Make one payload per question."""
    return [
        api.payload(
            "anthropic", {**CALL, "messages": [{"role": "user", "content": text}]}, base_url=emulator.url, key="k"
        )
        for text in questions
    ]


def texts(outcomes: Any) -> list[tuple[int, str]]:
    """Return (position, text) of each outcome."""
    return [(place, json.loads(outcome.body)["content"][0]["text"]) for place, outcome in outcomes]


def said(*questions: str) -> list[tuple[int, str]]:
    """Return what the emulator answers."""
    return [(place, f'EMULATED answer. You wrote: "{text}"') for place, text in enumerate(questions)]


def test_a_payload_is_what_the_official_client_would_send(emulator: EmulatorServer):
    """A payload has the client's endpoint, JSON and batch key, so that both may share a batch."""
    pytest.importorskip("anthropic")
    made = api.payload("anthropic", CALL, base_url=f"{emulator.url}/", key="k", headers={"Anthropic-Beta": "b"})
    assert json.loads(made.body) == CALL
    assert (made.key.base_url, made.key.endpoint, made.key.model) == (emulator.url, "/v1/messages", CALL["model"])
    assert made.key.account == runtime.engine().account("k")
    assert dict(made.key.headers)["anthropic-beta"] == "b"
    assert "'k'" not in repr(made)


def test_a_payload_takes_its_key_from_the_configuration_or_the_environment(
    emulator: EmulatorServer, monkeypatch: pytest.MonkeyPatch
):
    """Without `key` it is `configure(keys=…)` that says it, then the environment."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of-the-environment")
    found = [api.payload("anthropic", CALL).headers]
    presort.configure(keys={"anthropic": "of-the-configuration"})
    found.append(api.payload("anthropic", CALL).headers)
    assert ["of-the-environment" in str(found[0]), "of-the-configuration" in str(found[1])] == [True, True]


@pytest.mark.parametrize(
    ("provider", "body", "key", "error", "says"),
    [
        ("anthropics", CALL, "k", ConfigurationError, "no provider `anthropics`"),
        ("anthropic", {"messages": []}, "k", InputError, "needs a `model`"),
        ("anthropic", {**CALL, "stream": True}, "k", InputError, "no batch accepts"),
        ("anthropic", {**CALL, "x": {1}}, "k", InputError, "cannot be written as JSON"),
        ("anthropic", {**CALL, "x": float("nan")}, "k", InputError, "cannot be written as JSON"),
        ("anthropic", CALL, None, MissingKeyError, "ANTHROPIC_API_KEY"),
    ],
)
def test_a_payload_that_cannot_be_is_refused(
    provider: str, body: dict[str, Any], key: str | None, error: type[Exception], says: str
):
    """A wrong provider, body or key is named before anything is stored."""
    with pytest.raises(error, match=says):
        api.payload(provider, body, key=key)


def test_a_stream_yields_outcomes_in_order_and_replays_a_run(emulator: EmulatorServer):
    """Answers come in the order of the payloads; the same run again gets the same answers without a second batch."""
    made = payloads(emulator, "one", "two", "one")
    before = len(emulator.asked())
    for _ in range(2):
        assert texts(presort.stream(made, run="r")) == said("one", "two", "one")
    assert len(emulator.asked()) == before + 3


def test_submitted_payloads_are_collected_by_a_later_stream(emulator: EmulatorServer):
    """`submit` returns once all is stored, nobody waits for it, and a later `stream` of the run gets the answers."""
    made = payloads(emulator, "three", "four")
    before = len(emulator.asked())
    assert presort.submit(iter(made), run="s") == 2
    assert presort.drain(0.5)
    assert texts(presort.stream(made, run="s")) == said("three", "four")
    assert len(emulator.asked()) == before + 2


def test_what_a_dead_process_submitted_is_sent_by_the_next(
    emulator: EmulatorServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """If the process dies right after `submit`, the next one that uses the store sends the calls, once."""
    monkeypatch.setenv("PRESORT_LEASE_SECONDS", "0.5")
    monkeypatch.setenv("PRESORT_BATCHING__FLUSH_SECONDS", "60")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
    body = {**CALL, "messages": [{"role": "user", "content": "five"}]}
    code = (
        "import os, presort.api as api\n"
        f"made = [api.payload('anthropic', {body!r}, base_url={emulator.url!r})]\n"
        "print(api.submit(made, run='d'), flush=True)\n"
        "os._exit(1)\n"
    )
    before = len(emulator.asked())
    source = str(Path(presort.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert child.stdout == "1\n", child.stderr
    monkeypatch.setenv("PRESORT_BATCHING__FLUSH_SECONDS", "0.05")
    presort.configure()
    runtime.engine()
    give_up_at = time.monotonic() + 20
    while len(emulator.asked()) == before and time.monotonic() < give_up_at:
        time.sleep(0.02)
    made = [api.payload("anthropic", body, base_url=emulator.url)]
    assert texts(presort.stream(made, run="d")) == said("five")
    assert len(emulator.asked()) == before + 1


@pytest.mark.parametrize("verb", [presort.stream, presort.submit])
def test_a_run_or_deadline_that_cannot_be_is_refused(verb: Callable[..., Any]):
    """An empty name of a run, and a deadline that has passed, are refused by name."""
    with pytest.raises(ConfigurationError, match="a run's name"):
        verb([], run="")
    with pytest.raises(ConfigurationError, match="`deadline`"):
        verb([], run="r", deadline=0)
