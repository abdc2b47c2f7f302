from __future__ import annotations

import gzip
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing

import httpx2
import pytest

from plain_server import PlainServer, answer
from presort.providers import channel as channel_module
from presort.providers.base import AnswerLostError, GarbledError, NotSentError, RefusedError
from presort.providers.channel import HttpChannel

pytestmark = pytest.mark.anyio

KEY = "sk-very-secret-0123456789"
KEYED = {"Authorization": f"Bearer {KEY}"}


async def test_send_returns_the_whole_answer():
    """A reply holds status, lower-case headers and body as the server sent them."""
    async with PlainServer(lambda _: answer(b'{"a":1}', 201, "Request-Id: r1")) as server:
        reply = await HttpChannel(server.url, KEYED).send("POST", "/v1/x", content=b"hello")

    assert (201, "r1", b'{"a":1}') == (reply.status, reply.headers["request-id"], reply.body)


async def test_send_asks_what_it_was_told():
    """Path and query follow the base URL's prefix, and a call's headers win over the channel's."""
    async with PlainServer(lambda _: answer(b"{}")) as server:
        channel = HttpChannel(f"{server.url}/prefix/", {**KEYED, "X-Version": "1"})
        await channel.send("GET", "/v1/x", headers={"x-version": "2"}, params={"limit": "100"})

    heard = server.heard[0]
    assert ("GET", "/prefix/v1/x?limit=100") == (heard.method, heard.target)
    assert (f"Bearer {KEY}", "2") == (heard.headers["authorization"], heard.headers["x-version"])


async def test_framing_is_the_channels_own():
    """Host and length of an earlier exchange, handed in with its headers, are not repeated."""
    stale = {"Host": "elsewhere.example", "Content-Length": "999", "Transfer-Encoding": "chunked"}
    async with PlainServer(lambda _: answer(b"{}")) as server:
        await HttpChannel(server.url, KEYED).send("POST", "/v1/x", headers=stale, content=b"hello")

    heard = server.heard[0]
    assert (server.url, "5", b"hello") == (
        f"http://{heard.headers['host']}",
        heard.headers["content-length"],
        heard.body,
    )


async def test_streamed_body_has_its_length():
    """A streamed body of known length goes out with Content-Length and not in chunks."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"ab"
        yield b"cd"

    async with PlainServer(lambda _: answer(b"{}")) as server:
        await HttpChannel(server.url, {}).send("POST", "/", content=parts(), content_length=4)

    heard = server.heard[0]
    assert ("4", None, b"abcd") == (
        heard.headers["content-length"],
        heard.headers.get("transfer-encoding"),
        heard.body,
    )


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://127.0.0.1:99999", "http://[::1", "nonsense"])
async def test_impossible_url_is_not_sent(url: str):
    """A base URL that leads nowhere is `NotSentError`."""
    with pytest.raises(NotSentError):
        await HttpChannel(url, KEYED).send("GET", "/v1/x")


async def test_refused_connection_is_not_sent():
    """Nobody listening is `NotSentError`, with its cause."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(NotSentError) as caught:
            await HttpChannel(f"http://127.0.0.1:{taken.getsockname()[1]}", KEYED).send("GET", "/v1/x")

    assert isinstance(caught.value.__cause__, httpx2.ConnectError)


async def test_refusing_proxy_is_not_sent():
    """A proxy that opens no tunnel is `NotSentError`."""
    async with (
        PlainServer(lambda _: answer(b"no", 403)) as proxy,
        httpx2.AsyncClient(proxy=proxy.url, trust_env=False) as client,
    ):
        with pytest.raises(NotSentError):
            await HttpChannel("https://api.example.com", KEYED, client=client).send("POST", "/v1/x")

    assert ["CONNECT"] == [heard.method for heard in proxy.heard]


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(b"", id="hung up"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Le", id="half a head"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", id="half a body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", id="no last chunk"),
        pytest.param(b"SSH-2.0-hello\r\n\r\n", id="no HTTP"),
        pytest.param(answer(b"plain", 200, "Content-Encoding: gzip"), id="no gzip"),
    ],
)
async def test_broken_answer_is_lost(response: bytes):
    """An answer that does not come whole is `AnswerLostError`, and the request was sent once."""
    async with PlainServer(lambda _: response) as server:
        with pytest.raises(AnswerLostError) as caught:
            await HttpChannel(server.url, KEYED).send("POST", "/v1/x", content=b"{}")

    assert 1 == len(server.heard)
    assert isinstance(caught.value.__cause__, httpx2.HTTPError)


async def test_silence_is_a_lost_answer():
    """A server that takes the request and says nothing is `AnswerLostError` after `read_seconds`."""
    async with PlainServer(lambda _: None) as server:
        with pytest.raises(AnswerLostError, match="ReadTimeout"):
            await HttpChannel(server.url, KEYED, read_seconds=0.05).send("POST", "/v1/x")


@pytest.mark.parametrize("length", [3, 9])
async def test_body_of_another_length_is_a_lost_answer(length: int):
    """A streamed body longer or shorter than it was said to be is `AnswerLostError`."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"abcdef"

    async with PlainServer(lambda _: answer(b"{}")) as server:
        with pytest.raises(AnswerLostError):
            await HttpChannel(server.url, {}).send("POST", "/", content=parts(), content_length=length)


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404, 413, 429, 500, 529])
async def test_refusal_is_data(status: int):
    """Any status from 300 on is `RefusedError` with headers and body."""
    async with PlainServer(lambda _: answer(b"no", status, "Retry-After: 7", "Location: /y")) as server:
        with pytest.raises(RefusedError) as caught:
            await HttpChannel(server.url, KEYED).send("POST", "/v1/x")

    refusal = caught.value
    assert (status, b"no", 7.0) == (refusal.status, refusal.body, refusal.retry_after_seconds)


async def test_refusal_keeps_64_kib():
    """Of an endless refusal 64 KiB are kept, and of one cut short what came."""
    async with PlainServer(lambda _: answer(b"x" * 200_000, 500)) as server:
        with pytest.raises(RefusedError) as long:
            await HttpChannel(server.url, KEYED).send("GET", "/")
    async with PlainServer(lambda _: b"HTTP/1.1 400 x\r\nContent-Length: 9\r\n\r\nshort") as server:
        with pytest.raises(RefusedError) as short:
            await HttpChannel(server.url, KEYED).send("GET", "/")

    assert (65_536, b"short") == (len(long.value.body), short.value.body)


async def test_redirects_are_not_followed():
    """A redirect is a refusal even if the client that was handed in follows redirects."""
    async with (
        PlainServer(lambda _: answer(b"", 307, "Location: /elsewhere")) as server,
        httpx2.AsyncClient(follow_redirects=True) as client,
    ):
        with pytest.raises(RefusedError):
            await HttpChannel(server.url, KEYED, client=client).send("GET", "/v1/x")

    assert ["/v1/x"] == [heard.target for heard in server.heard]


async def test_link_on_the_own_origin_is_followed():
    """An absolute URL on the base URL's origin is asked as it stands."""
    async with PlainServer(lambda _: answer(b"{}")) as server:
        await HttpChannel(f"{server.url}/prefix", KEYED).send("GET", f"{server.url}/v1/results?x=1")

    assert ["/v1/results?x=1"] == [heard.target for heard in server.heard]


@pytest.mark.parametrize("foreign", ["http://127.0.0.1:1/x", "https://{host}/x", "http://evil.example/x", "http://[/x"])
async def test_link_to_another_origin_is_refused(foreign: str):
    """An absolute URL elsewhere is `GarbledError`, and the key goes nowhere."""
    async with PlainServer(lambda _: answer(b"{}")) as server:
        channel = HttpChannel(server.url, KEYED)
        with pytest.raises(GarbledError):
            await channel.send("GET", foreign.format(host=server.url.removeprefix("http://")))

    assert [] == server.heard


async def test_endless_answer_is_garbled(monkeypatch: pytest.MonkeyPatch):
    """An answer longer than the bound is `GarbledError`."""
    monkeypatch.setattr(channel_module, "MAX_REPLY_BYTES", 10)
    async with PlainServer(lambda _: answer(b"x" * 11)) as server:
        with pytest.raises(GarbledError, match="longer than 10 bytes"):
            await HttpChannel(server.url, KEYED).send("GET", "/")


@pytest.mark.parametrize("name", ["x-api-key", "Authorization"])
@pytest.mark.parametrize("key", ["sk-secret\nx", "sk-secret…"])
async def test_impossible_key_is_named_not_quoted(name: str, key: str):
    """A key that HTTP cannot carry is `NotSentError` naming the header and nothing of the key."""
    with pytest.raises(NotSentError) as caught:
        await HttpChannel("http://127.0.0.1:1", {name: key}).send("GET", "/")

    assert f"header `{name.lower()}` holds a character that HTTP does not allow" == str(caught.value)


async def test_blanks_around_a_key_are_dropped():
    """A key read with its line end is sent without."""
    async with PlainServer(lambda _: answer(b"{}")) as server:
        await HttpChannel(server.url, {"x-api-key": f"{KEY}\n"}).send("GET", "/")

    assert KEY == server.heard[0].headers["x-api-key"]


async def test_echoed_key_is_blotted_out():
    """A refusal that quotes the key comes out without it."""
    async with PlainServer(lambda _: answer(f"bad key {KEY}".encode(), 401)) as server:
        with pytest.raises(RefusedError) as caught:
            await HttpChannel(server.url, KEYED).send("GET", "/")

    assert (b"bad key ***", "HTTP 401: bad key ***") == (caught.value.body, str(caught.value))


def test_repr_holds_no_secret():
    """The repr shows the base URL without credentials, and no header."""
    shown = repr(HttpChannel("https://user:password@gateway.example/v1/", KEYED))

    assert "HttpChannel(https://gateway.example/v1)" == shown


async def test_lines_come_without_their_ends():
    r"""Lines end in `\n` or `\r\n`, the last in nothing, and other breaks of Unicode are content."""
    text = 'a\r\nb\n\n{"x":"\u2028\u0085"}\nlast'
    async with PlainServer(lambda _: answer(text.encode())) as server:
        lines = [line async for line in HttpChannel(server.url, KEYED).lines("/results")]

    assert ["a", "b", "", '{"x":"\u2028\u0085"}', "last"] == [line.decode() for line in lines]


async def test_lines_are_joined_over_chunks():
    """A line that arrives in many chunks is one line, compressed or not."""
    body = b"\n".join(b"%d" % n * 5000 for n in range(200))
    async with PlainServer(lambda _: answer(gzip.compress(body), 200, "Content-Encoding: gzip")) as server:
        lines = [line async for line in HttpChannel(server.url, KEYED).lines("/results")]

    assert body.split(b"\n") == lines


async def test_download_cut_short_raises_after_the_lines():
    """A download that breaks off hands out its whole lines and then raises `AnswerLostError`."""
    async with PlainServer(lambda _: b"HTTP/1.1 200 x\r\nContent-Length: 99\r\n\r\none\ntwo\nthr") as server:
        lines = HttpChannel(server.url, KEYED).lines("/results")
        whole = [await anext(lines), await anext(lines)]
        with pytest.raises(AnswerLostError):
            await anext(lines)

    assert [b"one", b"two"] == whole


async def test_endless_line_is_garbled(monkeypatch: pytest.MonkeyPatch):
    """A line longer than the bound is `GarbledError`."""
    monkeypatch.setattr(channel_module, "MAX_LINE_BYTES", 10)
    async with PlainServer(lambda _: answer(b"short\n" + b"x" * 11)) as server:
        lines = HttpChannel(server.url, KEYED).lines("/results")
        first = await anext(lines)
        with pytest.raises(GarbledError, match="longer than 10 bytes"):
            await anext(lines)

    assert b"short" == first


async def test_refused_download_is_data():
    """A download answered with an error is `RefusedError`."""
    async with PlainServer(lambda _: answer(b"gone", 404)) as server:
        with pytest.raises(RefusedError, match="HTTP 404: gone"):
            await anext(HttpChannel(server.url, KEYED).lines("/results"))


async def test_download_may_be_left_early():
    """A download left after its first line frees the connection for the next request."""
    limits = httpx2.Limits(max_connections=1)
    async with (
        PlainServer(lambda _: answer(b"line\n" * 200_000)) as server,
        httpx2.AsyncClient(limits=limits) as client,
    ):
        channel = HttpChannel(server.url, KEYED, client=client, connect_seconds=5)
        async with aclosing(channel.lines("/results")) as lines:
            first = await anext(lines)
        reply = await channel.send("GET", "/again")

    assert (b"line", 200) == (first, reply.status)


async def test_only_the_own_client_is_closed():
    """`aclose` closes the client made here and leaves one that was handed in."""
    own = HttpChannel("http://127.0.0.1:1", {})
    async with httpx2.AsyncClient() as client:
        lent = HttpChannel("http://127.0.0.1:1", {}, client=client)
        await own.aclose()
        await lent.aclose()

        assert (True, False) == (own._client.is_closed, client.is_closed)
