"""The one way to a vendor: a base URL, credentials and an HTTP client. Nothing is retried here.

An exchange fails in one of three ways that differ in what may be done next: nothing was sent
(`NotSentError`), the vendor said no (`RefusedError`), or nobody knows (`AnswerLostError`). Where it is
unclear which, it is the last.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import httpx2

from presort.providers._wire import origin_of
from presort.providers.base import AnswerLostError, GarbledError, NotSentError, RefusedError, Reply

MAX_REPLY_BYTES = 64 * 2**20
MAX_LINE_BYTES = 64 * 2**20
MAX_REFUSAL_BYTES = 64 * 2**10

_BEFORE_SENDING = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.ProxyError,  # the proxy would not open the tunnel
    httpx2.UnsupportedProtocol,
)
_LEGAL_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")
_FRAMING_HEADERS = frozenset({"connection", "content-length", "host", "transfer-encoding"})
"""What describes this exchange, not the call: a caller's own would be wrong here."""

_SECRET_HEADERS = frozenset({"authorization", "x-api-key", "api-key", "x-goog-api-key", "proxy-authorization"})


class HttpChannel:
    """One account's way to one vendor, over plain HTTP.

    Redirects are never followed: a key goes only where the user sent it, and a redirected create is a refused
    one. Only header names and paths appear in errors; keys that a refusal echoes are blotted out.

    Args:
        base_url: Scheme, host, port and path prefix; the verbs' paths are appended to it.
        headers: Sent with every request: the key, above all.
        client: A client with the caller's proxies, certificates and limits. It stays its owner's to close.
        transport: For the client made here, if none was handed in.
        connect_seconds: How long to wait for a connection, or for one from the pool.
        read_seconds: How long to wait for the next bytes, and for the vendor to take ours.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        *,
        client: httpx2.AsyncClient | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        connect_seconds: float = 15.0,
        read_seconds: float = 120.0,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = dict(headers)
        self._timeout = httpx2.Timeout(read_seconds, connect=connect_seconds, pool=connect_seconds)
        self._owned = client is None
        self._client = client or httpx2.AsyncClient(transport=transport, headers={"user-agent": "presort"})
        self._secrets = tuple(
            value.strip().removeprefix("Bearer ").encode()
            for name, value in self._headers.items()
            if name.lower() in _SECRET_HEADERS and value.strip()
        )

    def __repr__(self) -> str:
        scheme, _, rest = self._base_url.rpartition("://")
        return f"HttpChannel({scheme}://{rest.rpartition('@')[2]})"

    async def send(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        content_length: int | None = None,
    ) -> Reply:
        """Exchange one request for one whole answer with a status below 300.

        Args:
            method: HTTP method.
            path: What follows the base URL, or an absolute URL on its origin.
            headers: Added to the channel's own, and winning over them.
            params: Query parameters.
            content: Body; an iterator is streamed.
            content_length: Length of a streamed body; without it the body goes out in chunks.
        """
        request = self._request(method, path, dict(headers or {}), params, content, content_length)
        async with self._exchange(request) as response:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_REPLY_BYTES:
                    raise GarbledError(f"{_name(request)}: the answer is longer than {MAX_REPLY_BYTES} bytes")
            return Reply(response.status_code, dict(response.headers), bytes(body))

    async def lines(self, path: str, *, headers: Mapping[str, str] | None = None) -> AsyncGenerator[bytes, None]:
        r"""Stream the lines of a download, without their ends (`\n` or `\r\n`); the last needs none.

        Args:
            path: What follows the base URL, or an absolute URL on its origin.
            headers: Added to the channel's own, and winning over them.
        """
        request = self._request("GET", path, dict(headers or {}))
        async with self._exchange(request) as response:
            parts: list[bytes] = []
            length = 0
            async for chunk in response.aiter_bytes():
                head, *tails = chunk.split(b"\n")
                parts.append(head)
                length += len(head)
                for tail in tails:
                    yield b"".join(parts).removesuffix(b"\r")
                    parts, length = [tail], len(tail)
                if length > MAX_LINE_BYTES:
                    raise GarbledError(f"{_name(request)}: a line is longer than {MAX_LINE_BYTES} bytes")
            if length:
                yield b"".join(parts).removesuffix(b"\r")

    async def aclose(self) -> None:
        """Close the client, unless it was handed in."""
        if self._owned:
            await self._client.aclose()

    def _request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        content_length: int | None = None,
    ) -> httpx2.Request:
        url = self._base_url + path
        if path.startswith(("https://", "http://")):
            if origin_of(path) != origin_of(self._base_url):
                raise GarbledError(f"{method}: the vendor's link leads to another origin than its base URL")
            url = path
        if origin_of(url) is None:
            raise NotSentError(f"{method}: the base URL is none")
        sent = {name.lower(): value.strip() for name, value in (*self._headers.items(), *headers.items())}
        for name, value in sent.items():
            if not _LEGAL_HEADER_VALUE.fullmatch(value):
                raise NotSentError(f"header `{name}` holds a character that HTTP does not allow")
        sent = {name: value for name, value in sent.items() if name not in _FRAMING_HEADERS}
        if content_length is not None and content is not None and not isinstance(content, bytes):
            sent["content-length"] = str(content_length)
            content = _exactly(content_length, content)
        try:
            return self._client.build_request(
                method, url, headers=sent, params=params, content=content, timeout=self._timeout
            )
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise NotSentError(f"{method}: the base URL is none") from error

    @asynccontextmanager
    async def _exchange(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Response, None]:
        """Send, hand out the response while it is read, and turn every failure of both into ours."""
        try:
            response = await self._client.send(request, stream=True, follow_redirects=False)
        except _BEFORE_SENDING as error:
            raise NotSentError(f"{_name(request)}: {_describe(error)}") from error
        except httpx2.LocalProtocolError:
            # Its message may quote what was being sent, so it does not travel along.
            raise AnswerLostError(f"{_name(request)}: the request could not be written whole") from None
        except (httpx2.HTTPError, OSError) as error:  # TLS 1.3 refuses a client's certificate as an OSError
            raise AnswerLostError(f"{_name(request)}: {_describe(error)}") from error
        try:
            if response.status_code >= 300:
                raise RefusedError(response.status_code, dict(response.headers), self._blot(await _head(response)))
            yield response
        except (httpx2.HTTPError, OSError) as error:
            raise AnswerLostError(f"{_name(request)}: {_describe(error)}") from error
        finally:
            await response.aclose()

    def _blot(self, body: bytes) -> bytes:
        for secret in self._secrets:
            body = body.replace(secret, b"***")
        return body


async def _exactly(length: int, content: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Pass a body on as long as it keeps to its length; httpcore lets h11's own error through otherwise."""
    left = length
    async for chunk in content:
        left -= len(chunk)
        if left < 0:
            break
        yield chunk
    if left:
        raise AnswerLostError(f"the body is not as long as it was said to be: {length} bytes")


async def _head(response: httpx2.Response) -> bytes:
    """Read the beginning of a refusal's body; the status says enough if the rest never comes."""
    body = bytearray()
    with suppress(httpx2.HTTPError):
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) >= MAX_REFUSAL_BYTES:
                break
    return bytes(body[:MAX_REFUSAL_BYTES])


def _name(request: httpx2.Request) -> str:
    return f"{request.method} {request.url.path}"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
