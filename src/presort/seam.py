"""The seam: a transport around the one a client already has.

The official client builds the payload and parses the answer; only the HTTP exchange between the two is ours.
A request presort does not know passes through untouched, byte for byte. One it knows takes the standard route
through the client's own transport, or the batch route through the engine, which answers with the JSON that
the batch returned.

httpx and httpx2 have the same API and different classes, so the transports are made for either library. On
the standard route nothing here awaits anything but the client's own transport: trio's users stay on trio.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType, TracebackType
from typing import Any, Protocol

from presort import runtime
from presort.context import Wish, current_run, wish_for
from presort.engine import Link
from presort.errors import ClosedError
from presort.network import Lease, copied_client, library, sibling
from presort.providers import recognise
from presort.providers.base import Call, Provider, one_line
from presort.request import BatchKey, Outcome, OutcomeKind, Payload, Route, Usage
from presort.routing import choose_route
from presort.telemetry import fell_back, warn


class _Done(Protocol):
    def __call__(self, raw: bytes, *, whole: bool) -> None: ...


_METER_LIMIT_BYTES = 32 * 1024 * 1024
_LOOK_SECONDS = 0.5


def transport(inner: Any, *, owner: object | None = None) -> Any:
    """Wrap a transport or a client of httpx or httpx2, sync or async; the argument is left unchanged.

    Args:
        inner: A transport: returns one around it. A client: returns a copy of it with everything it has
            (transport, mounts, hooks, limits, timeouts, authentication), its transport and mounts wrapped.
            The copy shares the original's connections; closing either leaves the other usable.
        owner: The wrapped object this transport serves, for routes that hold for that object only.

    Example:
        >>> client = anthropic.Anthropic(http_client=presort.transport(httpx2.Client()))

    Raises:
        TypeError: It is neither.
    """
    lib = library(inner)
    synchronous, asynchronous, both = _classes(lib)
    if isinstance(inner, lib.Client):
        return copied_client(inner, lambda each, lease: synchronous(each, owner, lease), asynchronous=False)
    if isinstance(inner, lib.AsyncClient):
        return copied_client(inner, lambda each, lease: asynchronous(each, owner, lease), asynchronous=True)
    kinds = (hasattr(inner, "handle_request"), hasattr(inner, "handle_async_request"))
    if kinds == (True, True):
        return both(inner, owner)
    if kinds == (True, False):
        return synchronous(inner, owner)
    if kinds == (False, True):
        return asynchronous(inner, owner)
    raise TypeError(f"expected a client or transport of httpx or httpx2, got {type(inner).__name__}")


@dataclass(frozen=True, slots=True)
class _Known:
    """A recognised request."""

    provider: Provider
    call: Call
    key: str | None
    headers: dict[str, str]
    body: bytes


def _read(request: Any, lib: ModuleType) -> _Known | None:
    """Recognise a request; `None` is: pass it through. Never raises."""
    # a stream of any other class may be read once only, or watched by its owner
    if request.method != "POST" or type(request.stream) is not lib.ByteStream:
        return None
    try:
        headers = {name.lower(): value for name, value in request.headers.items()}
        if "content-encoding" in headers:
            return None
        url = request.url
        host = f"[{url.host}]" if ":" in url.host else url.host
        port = f":{url.port}" if url.port is not None else ""
        body = b"".join(request.stream)
        # without query and credentials: this becomes part of a batch key
        found = recognise("POST", f"{url.scheme}://{host}{port}{url.path}", headers, body)
        if found is None:
            return None
        provider, call = found
        return _Known(provider, call, provider.read_key(headers), headers, body)
    except Exception as error:  # noqa: BLE001 - a call we cannot read is the vendor's to judge
        warn("recognise", f"a request passes unread: {type(error).__name__}: {error}")
        return None


class _Seam:
    """What the transports share."""

    _lib: ModuleType

    def __init__(self, inner: Any, owner: object | None, lease: Lease | None = None) -> None:
        self._under = inner
        """What is opened and closed."""
        self._inner: Any = inner._inner if isinstance(inner, _Seam) else inner  # noqa: SLF001 - one of us is enough
        """What sends."""
        self._owner = owner
        self._lease = lease
        self._entered = False

    # -- the connections, which may be shared with the client that was copied
    def _opens(self) -> bool:
        self._entered = self._lease is None or not self._lease.opened
        return self._entered

    def _closes(self) -> bool:
        return self._lease is None or self._lease.let_go()

    # -- the batch route
    def _wish(self) -> Wish | None:
        """Return what was asked for if it is the batch route."""
        wish = wish_for(self._owner)
        return wish if wish is not None and wish.route is Route.BATCH else None

    def _parked(
        self, known: _Known, wish: Wish, loop: asyncio.AbstractEventLoop | None, *, here: bool = True
    ) -> concurrent.futures.Future[Outcome] | None:
        """Hand a call to the engine; return the future, or `None` if it takes the standard route after all.

        Args:
            known: The call.
            wish: What was asked for.
            loop: The caller's, if it is asynchronous.
            here: Whether the caller can wait for a future.
        """
        call = known.call
        settings = runtime.settings()
        batching = wish.batching or settings.batching
        seconds = batching.deadline_seconds if wish.deadline_seconds is None else wish.deadline_seconds
        unbatchable = call.unbatchable
        if known.key is None:
            unbatchable = "the request carries no API key"
        elif not here:
            unbatchable = "the caller's event loop is not asyncio's"
        engine = runtime.engine()
        choice = choose_route(
            Route.BATCH,
            unbatchable=unbatchable,
            has_batch_api=not engine.lacks_batch_api(call.base_url),
            seconds_left=seconds,
            batching=batching,
        )
        if choice.route is Route.STANDARD or known.key is None:
            if wish.ticket is not None:
                wish.ticket.give_back()
            if choice.reason is not None and batching.enabled:
                fell_back(choice.reason)
            return None
        key = _batch_key(known, engine.account(known.key))
        return engine.park(
            Payload(key, one_line(known.body), known.headers),
            deadline_seconds=seconds,
            batching=batching,
            run=current_run(),
            group=None if wish.ticket is None else wish.ticket.take(),
            link=Link(known.key, partial(sibling, self._inner, self._lib, loop)),
        )

    def _answer(self, outcome: Outcome) -> Any:
        headers = {
            "content-type": "application/json",
            "content-length": str(len(outcome.body)),
            "x-presort-route": outcome.route.value,
        }
        if outcome.batch_id:
            headers["x-presort-batch-id"] = outcome.batch_id
        if not outcome.succeeded:
            headers["x-should-retry"] = "false"
        return self._lib.Response(
            outcome.status,
            headers=headers,
            stream=self._lib.ByteStream(outcome.body),
            extensions={"http_version": b"HTTP/1.1"},
        )

    # -- the standard route
    def _metered(self, known: _Known, response: Any, stream: type[Any]) -> Any:
        """Have a response's usage booked once its body has passed."""
        if known.key is None or not 200 <= response.status_code < 300:
            return response
        if response.is_stream_consumed:
            # read already, by a transport of the user's own
            _book(known, _usage(known, response.content))
        else:
            response.stream = stream(response.stream, partial(self._passed, known, response.headers.raw))
        return response

    def _passed(self, known: _Known, headers: list[tuple[bytes, bytes]], raw: bytes, *, whole: bool) -> None:
        """Book what a body says; of one cut short only a stream's meter knows whether it said enough."""
        content: bytes | None = None
        if whole or known.call.streaming:
            try:
                content = self._lib.Response(200, headers=headers, content=raw).content
            except Exception as error:  # noqa: BLE001 - metering must never break a call that went well
                _unmetered(known, error)
        _book(known, None if content is None else _usage(known, content))


def _batch_key(known: _Known, account: str) -> BatchKey:
    call = known.call
    return BatchKey(known.provider.name, call.base_url, account, call.endpoint, call.model, call.headers)


def _usage(known: _Known, content: bytes) -> Usage | None:
    try:
        if not known.call.streaming:
            return known.provider.read_usage(content)
        meter = known.provider.stream_meter()
        meter.feed(content)
        return meter.usage
    except Exception as error:  # noqa: BLE001 - as in `_passed`
        _unmetered(known, error)
        return None


def _book(known: _Known, usage: Usage | None) -> None:
    if known.key is None:
        return
    try:
        engine = runtime.engine()
        engine.book_standard(_batch_key(known, engine.account(known.key)), usage, time.time())
    except Exception as error:  # noqa: BLE001 - as in `_passed`
        warn("book", f"standard calls are not booked: {type(error).__name__}: {error}")


def _unmetered(known: _Known, error: Exception) -> None:
    title, kind = known.provider.title, type(error).__name__
    warn("meter", f"cannot read the usage of a {title} answer: {kind}: {error}")


def _wait(future: concurrent.futures.Future[Outcome]) -> Outcome:
    if sys.platform == "win32":
        # Ctrl-C does not interrupt a wait there; it is heard between two
        while not future.done():
            concurrent.futures.wait([future], _LOOK_SECONDS)
    return future.result()


def _closed(known: _Known, error: ClosedError) -> Outcome:
    """Say in the vendor's words that presort was closed: some clients would retry an exception, and start it anew."""
    return Outcome(OutcomeKind.ERRORED, 503, known.provider.error_body(503, f"presort: {error}"), reason="closed")


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@cache
def _classes(lib: ModuleType) -> tuple[type[Any], type[Any], type[Any]]:  # noqa: C901 - six short classes
    """Make the transports for httpx or httpx2: sync, async, and both at once."""

    class Metered(lib.SyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, stream: Any, done: _Done) -> None:
            self._stream, self._tap = stream, _Tap(done)

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self._stream:
                self._tap.take(chunk)
                yield chunk
            self._tap.end(whole=True)

        def close(self) -> None:
            try:
                self._stream.close()
            finally:
                self._tap.end(whole=False)

    class AsyncMetered(lib.AsyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, stream: Any, done: _Done) -> None:
            self._stream, self._tap = stream, _Tap(done)

        async def __aiter__(self) -> AsyncIterator[bytes]:
            chunks = aiter(self._stream)
            try:
                async for chunk in chunks:
                    self._tap.take(chunk)
                    yield chunk
            finally:
                # one left off half-way is closed here and now, not when it is collected
                if isinstance(chunks, AsyncGenerator):
                    await chunks.aclose()
            self._tap.end(whole=True)

        async def aclose(self) -> None:
            try:
                await self._stream.aclose()
            finally:
                self._tap.end(whole=False)

    class PresortTransport(_Seam, lib.BaseTransport):  # type: ignore[name-defined,misc]
        _lib = lib

        def handle_request(self, request: Any) -> Any:
            known = _read(request, lib)
            if known is None:
                return self._inner.handle_request(request)
            wish = self._wish()
            future = None if wish is None else self._parked(known, wish, None)
            if future is None:
                runtime.begin()
                return self._metered(known, self._inner.handle_request(request), Metered)
            try:
                return self._answer(_wait(future))
            except ClosedError as error:
                return self._answer(_closed(known, error))
            except BaseException:
                future.cancel()
                raise

        def __enter__(self) -> Any:
            if self._opens():
                self._under.__enter__()
            return self

        def __exit__(
            self,
            kind: type[BaseException] | None = None,
            error: BaseException | None = None,
            trace: TracebackType | None = None,
        ) -> None:
            if not self._entered:
                self.close()
            elif self._closes():
                self._under.__exit__(kind, error, trace)

        def close(self) -> None:
            if self._closes():
                self._under.close()

    class AsyncPresortTransport(_Seam, lib.AsyncBaseTransport):  # type: ignore[name-defined,misc]
        _lib = lib

        async def handle_async_request(self, request: Any) -> Any:
            known = _read(request, lib)
            if known is None:
                return await self._inner.handle_async_request(request)
            wish, loop, future = self._wish(), _running_loop(), None
            if wish is not None:
                if loop is not None and not runtime.started():
                    await asyncio.to_thread(runtime.engine)
                future = self._parked(known, wish, loop, here=loop is not None)
            if future is None:
                runtime.begin()
                return self._metered(known, await self._inner.handle_async_request(request), AsyncMetered)
            try:
                return self._answer(await asyncio.wrap_future(future))
            except ClosedError as error:
                return self._answer(_closed(known, error))

        async def __aenter__(self) -> Any:
            if self._opens():
                await self._under.__aenter__()
            return self

        async def __aexit__(
            self,
            kind: type[BaseException] | None = None,
            error: BaseException | None = None,
            trace: TracebackType | None = None,
        ) -> None:
            if not self._entered:
                await self.aclose()
            elif self._closes():
                await self._under.__aexit__(kind, error, trace)

        async def aclose(self) -> None:
            if self._closes():
                await self._under.aclose()

    class DualPresortTransport(PresortTransport, AsyncPresortTransport):
        pass

    return PresortTransport, AsyncPresortTransport, DualPresortTransport


class _Tap:
    """Keeps a copy of a body that passes by, and tells its end once."""

    def __init__(self, done: _Done) -> None:
        self._done: _Done | None = done
        self._chunks: list[bytes] = []
        self._size = 0

    def take(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size <= _METER_LIMIT_BYTES:
            self._chunks.append(chunk)

    def end(self, *, whole: bool) -> None:
        done, self._done = self._done, None
        chunks, self._chunks = self._chunks, []
        if done is not None:
            fits = self._size <= _METER_LIMIT_BYTES
            done(b"".join(chunks) if fits else b"", whole=whole and fits)
