"""The HTTP server: one port, both vendors, loopback only."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from presort.emulator import admin, anthropic, openai
from presort.emulator.core import Emulator
from presort.emulator.openai_batches import OpenAIWorker
from presort.emulator.wire import Call, VendorError, endpoint

TICK_SECONDS = 0.1
METHODS = ["GET", "POST", "DELETE", "PUT", "PATCH"]


def build_app(emulator: Emulator) -> Starlette:
    """The ASGI application.

    It needs a server that puts the connection's transport into `scope["state"]`, as
    `serve` does: dropped connections are part of what is emulated.
    """
    emulator.batches.register(anthropic.AnthropicWorker(emulator))
    emulator.batches.register(OpenAIWorker(emulator))
    models = _either(emulator, "models", anthropic.list_models, openai.list_models)
    model = _either(emulator, "models", anthropic.retrieve_model, openai.retrieve_model)
    unknown = _either(emulator, "unknown", _not_found, _not_found)
    return Starlette(
        routes=[
            *admin.routes(emulator),
            *anthropic.routes(emulator),
            *openai.routes(emulator),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{id}", model, methods=["GET"]),
            Route("/{path:path}", unknown, methods=METHODS),
        ],
        lifespan=_lifespan(emulator),
    )


async def _not_found(call: Call) -> Response:
    path = call.request.url.path
    raise VendorError(404, f"EMULATED: there is no {call.request.method} {path} here.")


def _either(
    emulator: Emulator,
    operation: str,
    for_anthropic: Callable[[Call], Awaitable[Response]],
    for_openai: Callable[[Call], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Paths that both vendors have: whoever sends `anthropic-version` means Anthropic."""
    anthropic_endpoint = endpoint(emulator, anthropic.Anthropic(), operation, for_anthropic)
    openai_endpoint = endpoint(emulator, openai.OpenAI(), operation, for_openai)

    async def run(request: Request) -> Response:
        chosen = anthropic_endpoint if "anthropic-version" in request.headers else openai_endpoint
        response: Response = await chosen(request)
        return response

    return run


def _lifespan(emulator: Emulator) -> Callable[[Starlette], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        ticker = asyncio.create_task(_tick(emulator))
        yield
        ticker.cancel()
        emulator.state.close()

    return lifespan


async def _tick(emulator: Emulator) -> None:
    """Carry batches forward while nobody looks."""
    while True:
        await asyncio.sleep(TICK_SECONDS)
        await emulator.batches.settle()


class _Protocol(H11Protocol):
    """HTTP/1.1 that tells the application its transport, so that it can hang up."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


class _LastRequest:
    """Notes when the last request came."""

    def __init__(self, app: ASGIApp, emulator: Emulator) -> None:
        self._app = app
        self._emulator = emulator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._emulator.last_request = time.monotonic()
        await self._app(scope, receive, send)


async def _stop_when_idle(server: uvicorn.Server, emulator: Emulator, idle_seconds: float) -> None:
    while (left := emulator.last_request + idle_seconds - time.monotonic()) > 0:  # noqa: ASYNC110 - it moves
        await asyncio.sleep(left)
    server.should_exit = True


def serve(
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    state: Path | None = None,
    batch_seconds: float | None = None,
    idle_exit_seconds: float | None = None,
) -> int:
    """Run the emulator until it is told to stop, and return an exit status.

    Prints its address, so that port 0 (any free port) is useful.
    """
    try:
        if not ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback:
            raise ValueError(host)
    except ValueError:
        return _refuse(f"host must be a loopback address such as 127.0.0.1, got {host}")
    if idle_exit_seconds is not None and idle_exit_seconds <= 0:
        return _refuse(f"idle-exit-seconds must be positive, got {idle_exit_seconds}")
    try:
        sock = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        return _refuse(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}")
    try:
        emulator = Emulator(state, batch_seconds=batch_seconds)
    except (sqlite3.Error, OSError, ValueError) as error:
        sock.close()
        return _refuse(f"cannot use state {state}: {error}")
    name = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"EMULATED Anthropic and OpenAI APIs on http://{name}:{sock.getsockname()[1]}\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(emulator, sock, idle_exit_seconds))
    return 0


async def _run(emulator: Emulator, sock: socket.socket, idle_exit_seconds: float | None) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises a signal again once it has shut down; by then it has done its work
        signal.signal(each, lambda *_: None)
    config = uvicorn.Config(
        _LastRequest(build_app(emulator), emulator),
        http=_Protocol,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=1,
        timeout_keep_alive=75,
    )
    server = uvicorn.Server(config)
    waits: list[asyncio.Task[Any]] = []
    if idle_exit_seconds is not None:
        waits.append(asyncio.create_task(_stop_when_idle(server, emulator, idle_exit_seconds)))
    await server.serve(sockets=[sock])
    for wait in waits:
        wait.cancel()


def _refuse(message: str) -> int:
    sys.stderr.write(f"presort emulator: {message}\n")
    return 2
