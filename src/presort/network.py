"""A second transport with a client's own network settings, for the engine's loop.

A connection pool belongs to the loop that made its connections, so the engine cannot send through a caller's. What
it needs is a sibling: same proxy, certificates, HTTP versions, limits and local address, other connections. httpx
and httpx2 keep these settings in private attributes only; they are read here and nowhere else, and
`tests/contracts/test_seam.py` fails when they move.

A transport of a class we do not know cannot be doubled; it is used itself, a synchronous one from a worker thread.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any

import httpx2


def library(thing: object) -> ModuleType:
    """Return the HTTP module, httpx or httpx2, that a client or transport comes from, read off its class.

    Raises:
        TypeError: It comes from neither.
    """
    for cls in type(thing).__mro__:
        root = cls.__module__.partition(".")[0]
        if root in {"httpx", "httpx2"}:
            return importlib.import_module(root)
    raise TypeError(f"expected a client or transport of httpx or httpx2, got {type(thing).__name__}")


def sibling(inner: Any) -> httpx2.AsyncBaseTransport:
    """Return an asynchronous httpx2 transport with the network settings of `inner`."""
    pool = getattr(inner, "_pool", None)
    module = type(inner).__module__.partition(".")[0]
    if pool is not None and module in {"httpx", "httpx2"}:
        return _doubled(pool)
    return _Borrowed(inner)


def _doubled(pool: Any) -> httpx2.AsyncBaseTransport:
    proxy_url = getattr(pool, "_proxy_url", None)
    limits = httpx2.Limits(
        max_connections=getattr(pool, "_max_connections", None),
        max_keepalive_connections=getattr(pool, "_max_keepalive_connections", None),
        keepalive_expiry=getattr(pool, "_keepalive_expiry", None),
    )
    options: dict[str, Any] = {
        "verify": getattr(pool, "_ssl_context", None) or True,
        "http1": getattr(pool, "_http1", True),
        "http2": getattr(pool, "_http2", False),
        "limits": limits,
        "trust_env": False,
    }
    if proxy_url is not None:
        options["proxy"] = _proxy(pool, proxy_url)
    else:
        for name in ("retries", "local_address", "uds", "socket_options"):
            value = getattr(pool, f"_{name}", None)
            if value:
                options[name] = value
    return httpx2.AsyncHTTPTransport(**options)


def _proxy(pool: Any, url: Any) -> httpx2.Proxy:
    scheme, host, port = url.scheme.decode(), url.host.decode(), url.port
    text = f"{scheme}://{host}:{port}" if port is not None else f"{scheme}://{host}"
    headers = getattr(pool, "_proxy_headers", None) or []
    auth = getattr(pool, "_proxy_auth", None)
    return httpx2.Proxy(
        text,
        ssl_context=getattr(pool, "_proxy_ssl_context", None),
        auth=None if not auth else (auth[0].decode(), auth[1].decode()),
        headers=[(name.decode(), value.decode()) for name, value in headers],
    )


class _Borrowed(httpx2.AsyncBaseTransport):
    """Passes httpx2 requests to a user's own transport, of either library, sync or async. Never closes it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._lib = library(inner)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        content = await request.aread()
        asynchronous = hasattr(self._inner, "handle_async_request")
        theirs = self._lib.Request(
            request.method, str(request.url), headers=request.headers.raw, content=content, extensions=request.extensions
        )
        try:
            if asynchronous:
                response = await self._inner.handle_async_request(theirs)
                body = await _read(response.stream)
            else:
                response = await asyncio.to_thread(self._inner.handle_request, theirs)
                body = await asyncio.to_thread(lambda: b"".join(response.stream))
        except Exception as error:
            raise _translated(error, request) from error
        return httpx2.Response(response.status_code, headers=response.headers.raw, stream=httpx2.ByteStream(body))


async def _read(stream: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in stream])


def _translated(error: Exception, request: httpx2.Request) -> Exception:
    """Turn the other library's transport error into the one of the same name here."""
    same = getattr(httpx2, type(error).__name__, None)
    if isinstance(error, httpx2.HTTPError) or same is None or not issubclass(same, httpx2.RequestError):
        return error
    return same(str(error), request=request)


def wrapped_client(client: Any, wrap: Any) -> Any:
    """Return a shallow copy of an httpx or httpx2 client whose transport and mounts went through `wrap`.

    Everything else (hooks, timeouts, cookies, authentication) is the original's own. The copy holds on to the
    original: an SDK's default client closes its connections when it is garbage-collected.
    """
    twin = copy.copy(client)
    twin._transport = wrap(client._transport)  # noqa: SLF001 - see the module's docstring
    twin._mounts = {pattern: None if inner is None else wrap(inner) for pattern, inner in client._mounts.items()}  # noqa: SLF001
    twin._presort_original = client  # noqa: SLF001
    return twin
