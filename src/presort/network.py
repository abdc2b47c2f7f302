"""What is read off a client's own HTTP objects: its library, its network settings, a copy of it.

A connection pool belongs to the loop that made its connections, so the engine cannot send through a caller's.
What it needs is a sibling: same proxy, certificates, HTTP versions, limits and local address, other
connections. httpx and httpx2 keep these settings in private attributes only; they are read here and nowhere
else, and `tests/contracts/test_seam.py` fails when they move.

A transport of a class we do not know cannot be doubled; it is used itself: a synchronous one from a worker
thread, an asynchronous one on the loop it belongs to.
"""

from __future__ import annotations

import asyncio
import copy
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import ModuleType
from typing import Any, TypeVar

import httpx2

from presort.telemetry import warn

T = TypeVar("T")

_LIBRARIES = ("httpx2", "httpx")
_POOLS = frozenset({"ConnectionPool", "AsyncConnectionPool"})
_PROXY_POOLS = frozenset({"HTTPProxy", "AsyncHTTPProxy", "SOCKSProxy", "AsyncSOCKSProxy"})
_LOOK_SECONDS = 1.0
_NOT_OF_READ_CONTENT = frozenset({b"content-encoding", b"content-length", b"transfer-encoding"})


def library(thing: object) -> ModuleType:
    """Return the HTTP module, httpx or httpx2, that a client or transport comes from, read off its class.

    Raises:
        TypeError: It comes from neither.
    """
    # not by `__module__`: importing openai renames `httpx2.BaseTransport` to `openai.BaseTransport`
    for name in _LIBRARIES:
        lib = sys.modules.get(name)
        if lib is not None and isinstance(
            thing, (lib.Client, lib.AsyncClient, lib.BaseTransport, lib.AsyncBaseTransport)
        ):
            return lib
    raise TypeError(f"expected a client or transport of httpx or httpx2, got {type(thing).__name__}")


# -- copies of clients -------------------------------------------------------------------------------------


_originals: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Clients that were copied, by id. Not a weak reference in each lease: the garbage collector clears those that are
themselves in a cycle it collects, as a copy and an SDK's client are, although what they refer to lives on."""


class Lease:
    """What a copied client holds of its original, whose connections it shares.

    It keeps the original alive, since an SDK's default client closes its connections when it is collected.
    When the copy is closed it lets go, and the connections are closed if nobody else has the original in use.
    """

    def __init__(self, original: Any, *, asynchronous: bool) -> None:
        self._original: Any | None = original
        self._name = id(original)
        _originals[self._name] = original
        self._asynchronous = asynchronous
        self._alone: bool | None = None
        self.opened = _is(original, "OPENED")
        """Whether the original's transports had been in use before it was copied."""

    def let_go(self) -> bool:
        """Release the original; return whether its connections are now the copy's to close."""
        if self._alone is None:
            self._alone = self._look()
        return self._alone

    def _look(self) -> bool:
        original, self._original = self._original, None
        if self._asynchronous and original is not None and not original.is_closed:
            # an SDK's asynchronous client that dies open closes its connections in a task of its own, later;
            # one that says it is closed leaves them to us. It belongs to this loop: nobody looks meanwhile.
            before, original._state = original._state, type(original._state).CLOSED  # noqa: SLF001
            del original
            survivor = _originals.get(self._name)
            if survivor is not None:
                survivor._state = before  # noqa: SLF001
        else:
            del original
            survivor = _originals.get(self._name)
        return survivor is None or survivor.is_closed


def copied_client(client: T, wrap: Callable[[Any, Lease], Any], *, asynchronous: bool) -> T:
    """Return a shallow copy of an httpx or httpx2 client whose transport and mounts went through `wrap`.

    Everything else (hooks, timeouts, headers, cookies, authentication) is the original's own.
    """
    original: Any = client
    lease = Lease(original, asynchronous=asynchronous)
    twin: Any = copy.copy(original)
    twin._transport = wrap(original._transport, lease)  # noqa: SLF001 - see the module's docstring
    twin._mounts = {  # noqa: SLF001
        pattern: None if mounted is None else wrap(mounted, lease)
        for pattern, mounted in original._mounts.items()  # noqa: SLF001
    }
    if lease.opened:
        twin._state = type(original._state).UNOPENED  # noqa: SLF001 - `with copy:` is its own to enter
    copied: T = twin
    return copied


def _is(client: Any, state: str) -> bool:
    return bool(client._state is getattr(type(client._state), state))  # noqa: SLF001


# -- siblings of transports --------------------------------------------------------------------------------


def sibling(
    inner: Any, lib: ModuleType | None = None, loop: asyncio.AbstractEventLoop | None = None
) -> httpx2.AsyncBaseTransport:
    """Return an asynchronous httpx2 transport with the network settings of `inner`.

    Args:
        inner: A transport of httpx or httpx2, or of a user's own class for one of them.
        lib: Which of the two, where its class does not tell.
        loop: The loop that `inner` is used on, if it is asynchronous.
    """
    face_of = getattr(inner, "presort_face_of", None)
    if face_of is not None:
        # an asynchronous face of ours: what is behind it belongs to no loop
        inner, loop = face_of, None
    lib = lib or library(inner)
    if type(inner) in {lib.HTTPTransport, lib.AsyncHTTPTransport}:
        try:
            return _doubled(inner._pool)  # noqa: SLF001 - see the module's docstring
        except (AttributeError, LookupError) as error:
            # going out without the proxy, say, that a setting we cannot read stands for would be worse
            warn("sibling", f"cannot double a transport of {lib.__name__}, using it itself: {error}")
    return _Borrowed(inner, lib, loop)


def _doubled(pool: Any) -> httpx2.AsyncBaseTransport:
    """Build the sibling; raises `AttributeError` or `LookupError` if the pool is not as we know it."""
    kind = type(pool).__name__
    if kind not in _POOLS | _PROXY_POOLS:
        raise LookupError(f"unknown pool `{kind}`")
    backend = type(pool._network_backend).__module__  # noqa: SLF001
    if not backend.startswith("httpcore"):
        raise LookupError(f"a network backend of its own, from `{backend}`")
    options: dict[str, Any] = {
        "verify": pool._ssl_context,  # noqa: SLF001
        "http1": pool._http1,  # noqa: SLF001
        "http2": pool._http2,  # noqa: SLF001
        "limits": httpx2.Limits(
            max_connections=pool._max_connections,  # noqa: SLF001
            max_keepalive_connections=pool._max_keepalive_connections,  # noqa: SLF001
            keepalive_expiry=pool._keepalive_expiry,  # noqa: SLF001
        ),
        "socket_options": pool._socket_options,  # noqa: SLF001
        "trust_env": False,
    }
    if options["verify"] is None:
        raise LookupError("a pool without certificates")
    if kind in _PROXY_POOLS:
        options["proxy"] = _proxy(pool)
    elif getattr(pool, "_proxy", None) is not None:
        raise LookupError("a proxy below the transport")
    else:
        for name in ("retries", "local_address", "uds"):
            options[name] = getattr(pool, f"_{name}")
    return httpx2.AsyncHTTPTransport(**options)


def _proxy(pool: Any) -> httpx2.Proxy:
    url = pool._proxy_url  # noqa: SLF001
    host = url.host.decode("ascii")
    host = f"[{host}]" if ":" in host else host
    port = "" if url.port is None else f":{url.port}"
    where = f"{url.scheme.decode('ascii')}://{host}{port}"
    if "SOCKS" in type(pool).__name__:
        auth = pool._proxy_auth  # noqa: SLF001
        return httpx2.Proxy(where, auth=None if auth is None else (auth[0].decode(), auth[1].decode()))
    return httpx2.Proxy(
        where,
        ssl_context=pool._proxy_ssl_context,  # noqa: SLF001
        headers=list(pool._proxy_headers),  # noqa: SLF001 - credentials included
    )


class _Borrowed(httpx2.AsyncBaseTransport):
    """Passes httpx2 requests to a user's own transport, of either library, sync or async. Never closes it.

    Its loop may end before the engine does. Then nothing can be sent, and nothing is: `ConnectError`.
    """

    def __init__(self, inner: Any, lib: ModuleType, loop: asyncio.AbstractEventLoop | None) -> None:
        self._inner = inner
        self._lib = lib
        self._loop = loop
        self._synchronous = loop is None and hasattr(inner, "handle_request")

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        theirs = self._lib.Request(
            request.method,
            str(request.url),
            headers=request.headers.raw,
            content=await request.aread(),
            extensions=request.extensions,
        )
        try:
            if self._synchronous:
                response = await asyncio.to_thread(self._inner.handle_request, theirs)
            else:
                response = await self.there(self._inner.handle_async_request(theirs))
        except Exception as error:
            raise _translated(error) from error
        headers, stream = response.headers.raw, response.stream
        if response.is_stream_consumed:
            headers = [pair for pair in headers if pair[0].lower() not in _NOT_OF_READ_CONTENT]
            stream = self._lib.ByteStream(response.content)
        bridge = _Bridge(self, stream, synchronous=self._synchronous)
        return httpx2.Response(response.status_code, headers=headers, stream=bridge)

    @property
    def ended(self) -> bool:
        """Whether nothing can be sent any more: its loop has ended."""
        return self._loop is not None and not self._loop.is_running()

    async def there(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine on the loop that the transport belongs to."""
        loop = self._loop
        if loop is None or loop is asyncio.get_running_loop():
            return await work
        if not loop.is_running():
            work.close()
            raise httpx2.ConnectError("the event loop that the client's own transport belongs to has ended")
        future = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
        try:
            while not future.done():
                await asyncio.wait({future}, timeout=_LOOK_SECONDS)
                if loop.is_closed():
                    future.cancel()
        except asyncio.CancelledError:
            future.cancel()
            raise
        if future.cancelled():
            raise httpx2.ReadError("the event loop that the client's own transport belongs to ended meanwhile")
        return future.result()


class _Bridge(httpx2.AsyncByteStream):
    """The body of a borrowed transport's response, read where it belongs."""

    def __init__(self, borrowed: _Borrowed, stream: Any, *, synchronous: bool) -> None:
        self._borrowed = borrowed
        self._stream = stream
        self._synchronous = synchronous

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            chunks = iter(self._stream) if self._synchronous else aiter(self._stream)
            while (chunk := await self._next(chunks)) is not None:
                yield chunk
        except Exception as error:
            raise _translated(error) from error

    async def _next(self, chunks: Any) -> bytes | None:
        if self._synchronous:
            return await asyncio.to_thread(_next_of, chunks)
        return await self._borrowed.there(_anext_of(chunks))

    async def aclose(self) -> None:
        if self._synchronous:
            await asyncio.to_thread(self._stream.close)
        else:
            await self._borrowed.there(self._stream.aclose())


def _next_of(chunks: Iterator[bytes]) -> bytes | None:
    return next(chunks, None)


async def _anext_of(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)


def _translated(error: Exception) -> httpx2.RequestError:
    """Turn a transport's error into the one of the same name here; any other may mean anything."""
    if isinstance(error, httpx2.RequestError):
        return error
    for cls in type(error).__mro__:
        same = getattr(httpx2, cls.__name__, None)
        if isinstance(same, type) and issubclass(same, httpx2.RequestError):
            return same(str(error))
    return httpx2.TransportError(f"{type(error).__name__}: {error}")
