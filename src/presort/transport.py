"""The seam: a transport around the one a client already has.

The official client builds the payload and parses the answer; only the HTTP exchange between the two is ours. A
request presort does not know passes through untouched, byte for byte. One it knows takes the standard route through
the client's own transport, or the batch route through the engine, which answers with the JSON the batch returned.

httpx and httpx2 have the same API and different classes, so the two transports are made for either library.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

from presort import runtime
from presort.context import current_run, wish_for
from presort.engine import Link
from presort.errors import PresortError
from presort.network import library, sibling, wrapped_client
from presort.providers import recognise
from presort.providers.base import Call, Provider, one_line
from presort.request import BatchKey, Outcome, Payload, Route
from presort.routing import choose_route
from presort.telemetry import fell_back, warn

_METER_LIMIT_BYTES = 32 * 1024 * 1024


def transport(inner: Any, *, owner: object | None = None) -> Any:
    """Wrap a transport or a client of httpx or httpx2, sync or async; the argument is left unchanged.

    Args:
        inner: A transport: returns one around it. A client: returns a copy of it with everything the client has
            (transport, mounts, hooks, limits, timeouts, authentication), its transport and mounts wrapped.
        owner: The wrapped object this transport serves, for routes that hold for that object only.

    Example:
        >>> client = anthropic.Anthropic(http_client=presort.transport(httpx2.Client()))

    Raises:
        TypeError: It is neither.
    """
    lib = library(inner)
    if isinstance(inner, (lib.Client, lib.AsyncClient)):
        return wrapped_client(inner, partial(transport, owner=owner))
    synchronous, asynchronous = _classes(lib)
    if isinstance(inner, lib.AsyncBaseTransport) and not isinstance(inner, lib.BaseTransport):
        return asynchronous(inner, owner)
    if isinstance(inner, lib.BaseTransport) and not isinstance(inner, lib.AsyncBaseTransport):
        return synchronous(inner, owner)
    if isinstance(inner, lib.BaseTransport):
        return _both(lib)(inner, owner)
    raise TypeError(f"expected a client or transport of httpx or httpx2, got {type(inner).__name__}")


@dataclass(frozen=True, slots=True)
class _Known:
    """A recognised request, and what becomes of it."""

    provider: Provider
    call: Call
    key: str | None
    headers: dict[str, str]
    body: bytes


def _read(request: Any, lib: ModuleType) -> _Known | None:
    """Recognise a request; `None` is: pass it through. Never raises."""
    if request.method != "POST" or not isinstance(request.stream, lib.ByteStream):
        return None
    headers = {name.lower(): value for name, value in request.headers.items()}
    if "content-encoding" in headers:
        return None
    url = request.url
    port = f":{url.port}" if url.port is not None else ""
    # without query and credentials: this becomes part of a batch key
    found = recognise("POST", f"{url.scheme}://{_host(url.host)}{port}{url.path}", headers, request.content)
    if found is None:
        return None
    provider, call = found
    return _Known(provider, call, provider.read_key(headers), headers, request.content)


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _Seam:
    """What the sync and the async transport share."""

    def __init__(self, inner: Any, owner: object | None, lib: ModuleType) -> None:
        self._inner = inner
        self._owner = owner
        self._lib = lib

    def _parked(self, known: _Known) -> Any | None:
        """Hand a call to the engine if it takes the batch route; return the future, or `None` for the standard one."""
        wish = wish_for(self._owner)
        if wish is None or wish.route is not Route.BATCH:
            return None
        call = known.call
        settings = runtime.settings()
        batching = wish.batching or settings.batching
        seconds = batching.deadline_seconds if wish.deadline_seconds is None else wish.deadline_seconds
        unbatchable = call.unbatchable if known.key else "the request carries no API key"
        engine = runtime.engine()
        choice = choose_route(
            Route.BATCH,
            unbatchable=unbatchable,
            has_batch_api=not engine.lacks_batch_api(call.base_url),
            seconds_left=seconds,
            batching=batching,
        )
        if choice.route is Route.STANDARD or known.key is None:
            if wish.group is not None:
                wish.group.leave()
                engine.nudge()
            if choice.reason is not None and batching.enabled:
                fell_back(choice.reason)
            return None
        key = self._batch_key(known, engine.account(known.key))
        return engine.park(
            Payload(key, one_line(known.body), known.headers),
            deadline_seconds=seconds,
            batching=batching,
            run=current_run(),
            group=wish.group,
            link=Link(known.key, partial(sibling, self._inner)),
        )

    def _batch_key(self, known: _Known, account: str) -> BatchKey:
        call = known.call
        return BatchKey(known.provider.name, call.base_url, account, call.endpoint, call.model, call.headers)

    def _answer(self, outcome: Outcome, request: Any) -> Any:
        headers = {"content-type": "application/json", "x-presort-route": outcome.route.value}
        if outcome.batch_id:
            headers["x-presort-batch-id"] = outcome.batch_id
        if not outcome.succeeded:
            headers["x-should-retry"] = "false"
        return self._lib.Response(
            outcome.status,
            headers=headers,
            content=outcome.body,
            request=request,
            extensions={"http_version": b"HTTP/1.1"},
        )

    def _meter(self, known: _Known, response: Any) -> Callable[[bytes | None], None]:
        """Return a function to be called with the raw body once it has passed, or `None` if it did not pass whole."""
        status, headers = response.status_code, response.headers.raw

        def book(raw: bytes | None) -> None:
            if status >= 400 or known.key is None:  # noqa: PLR2004
                return
            usage = None
            if raw is not None:
                try:
                    content = self._lib.Response(status, headers=headers, content=raw).content
                    if known.call.streaming:
                        meter = known.provider.stream_meter()
                        meter.feed(content)
                        usage = meter.usage
                    else:
                        usage = known.provider.read_usage(content)
                except Exception as error:  # noqa: BLE001 - metering must never break a call that went well
                    warn("meter", f"cannot read the usage of a {known.provider.title} answer: {error}")
            try:
                engine = runtime.engine()
                engine.book_standard(self._batch_key(known, engine.account(known.key)), usage, time.time())
            except PresortError as error:
                warn("meter", f"standard calls are not metered: {error}")

        return book


@cache
def _classes(lib: ModuleType) -> tuple[type[Any], type[Any]]:
    """Make the sync and the async transport for httpx or httpx2."""

    class Metered(lib.SyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, stream: Any, done: Callable[[bytes | None], None]) -> None:
            self._stream, self._tap = stream, _Tap(done)

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self._stream:
                self._tap.take(chunk)
                yield chunk
            self._tap.end(whole=True)

        def close(self) -> None:
            self._tap.end(whole=False)
            self._stream.close()

    class AsyncMetered(lib.AsyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, stream: Any, done: Callable[[bytes | None], None]) -> None:
            self._stream, self._tap = stream, _Tap(done)

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for chunk in self._stream:
                self._tap.take(chunk)
                yield chunk
            self._tap.end(whole=True)

        async def aclose(self) -> None:
            self._tap.end(whole=False)
            await self._stream.aclose()

    class PresortTransport(_Seam, lib.BaseTransport):  # type: ignore[name-defined,misc]
        def __init__(self, inner: Any, owner: object | None) -> None:
            super().__init__(inner, owner, lib)

        def handle_request(self, request: Any) -> Any:
            known = _read(request, lib)
            if known is None:
                return self._inner.handle_request(request)
            future = self._parked(known)
            if future is None:
                response = self._inner.handle_request(request)
                response.stream = Metered(response.stream, self._meter(known, response))
                return response
            try:
                outcome = future.result()
            except BaseException:
                future.cancel()
                raise
            return self._answer(outcome, request)

        def close(self) -> None:
            self._inner.close()

    class AsyncPresortTransport(_Seam, lib.AsyncBaseTransport):  # type: ignore[name-defined,misc]
        def __init__(self, inner: Any, owner: object | None) -> None:
            super().__init__(inner, owner, lib)

        async def handle_async_request(self, request: Any) -> Any:
            known = _read(request, lib)
            if known is None:
                return await self._inner.handle_async_request(request)
            future = self._parked(known)
            if future is None:
                response = await self._inner.handle_async_request(request)
                response.stream = AsyncMetered(response.stream, self._meter(known, response))
                return response
            return self._answer(await asyncio.wrap_future(future), request)

        async def aclose(self) -> None:
            await self._inner.aclose()

    return PresortTransport, AsyncPresortTransport


@cache
def _both(lib: ModuleType) -> type[Any]:
    """Make the transport around one that is sync and async at once."""
    synchronous, asynchronous = _classes(lib)

    class DualPresortTransport(synchronous, asynchronous):  # type: ignore[valid-type,misc]
        pass

    return DualPresortTransport


class _Tap:
    """Keeps a copy of a body that passes by, and tells its end once."""

    def __init__(self, done: Callable[[bytes | None], None]) -> None:
        self._done: Callable[[bytes | None], None] | None = done
        self._chunks: list[bytes] = []
        self._size = 0

    def take(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size <= _METER_LIMIT_BYTES:
            self._chunks.append(chunk)

    def end(self, *, whole: bool) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(b"".join(self._chunks) if whole and self._size <= _METER_LIMIT_BYTES else None)
        self._chunks = []
