"""From an HTTP request to a vendor's handler and back, faults included.

A handler is an async function of a `Call` that returns a response or raises
`VendorError`. `endpoint` finds out who is calling, lets armed faults
strike, and renders errors in the vendor's own format.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from presort.emulator.core import Emulator
from presort.emulator.faults import BATCH_KINDS, HTTP_KINDS, ROW_KINDS, Fault, garble
from presort.emulator.state import Batch, Tenant

logger = logging.getLogger(__name__)

EMULATED_HEADER = ("x-emulated", "presort-emulator")
PATIENCE_SECONDS = 0.25
"""How long a request waits for batches to be carried forward before it answers."""


@dataclass
class VendorError(Exception):
    """An error that a vendor would answer with.

    `type`, `code` and `param` mean what the vendor means by them.
    """

    status: int
    message: str
    type: str | None = None
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status} {self.message}"


MALFORMED = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a request raises here whose JSON has a shape that nobody foresaw."""


def malformed(error: Exception) -> VendorError:
    """The 400 for such a request."""
    return VendorError(400, f"EMULATED: the request is malformed: {error!r}", "invalid_request_error")


@dataclass
class Call:
    """One authenticated request to a vendor."""

    emulator: Emulator
    request: Request
    tenant: Tenant
    drop: bool = False
    """Set by a handler whose answer must never arrive."""

    def header(self, name: str, default: str = "") -> str:
        """A request header."""
        return self.request.headers.get(name, default)

    async def json(self) -> Any:
        """The request's body.

        Raises:
            ValueError: if it is not JSON.
        """
        return json.loads(await self.request.body())


class Vendor(Protocol):
    """How a vendor identifies callers and words its errors."""

    name: str

    def authenticate(self, emulator: Emulator, request: Request) -> Tenant:
        """Find out who is calling, or raise a 401."""

    def headers(self, call: Call | None) -> dict[str, str]:
        """Headers that every answer of the vendor carries."""

    def render_error(self, error: VendorError) -> Response:
        """Write an error as the vendor does."""

    def fault_error(self, fault: Fault) -> VendorError:
        """The error that a `status` fault orders."""


Handler = Callable[[Call], Awaitable[Response]]


def endpoint(emulator: Emulator, vendor: Vendor, operation: str, handler: Handler) -> Callable[..., Any]:
    """Make an ASGI endpoint of a handler; `operation` is what faults call it."""

    async def run(request: Request) -> Response:
        emulator.requests[f"{vendor.name}.{operation}"] += 1
        faults = {each["kind"]: each for each in emulator.faults.strike(vendor.name, operation, HTTP_KINDS)}
        call = None
        dropped = "drop_before" in faults
        if dropped:
            return Dropped()
        try:
            if "status" in faults:
                raise vendor.fault_error(faults["status"])
            call = Call(emulator, request, vendor.authenticate(emulator, request))
            await emulator.batches.settle(PATIENCE_SECONDS)
            response = await handler(call)
        except VendorError as error:
            response = vendor.render_error(error)
            response.headers.update(error.headers)
        except ClientDisconnect:
            return Dropped()
        except MALFORMED as error:
            response = vendor.render_error(malformed(error))
        except Exception as error:
            logger.exception("%s.%s failed", vendor.name, operation)
            response = vendor.render_error(VendorError(500, f"EMULATED internal error: {error!r}"))
        response.headers.update(vendor.headers(call))
        response.headers[EMULATED_HEADER[0]] = EMULATED_HEADER[1]
        return await _strike(response, faults, drop=call is not None and call.drop)

    return run


def route(emulator: Emulator, vendor: Vendor, method: str, path: str, operation: str, handler: Handler) -> Route:
    """A starlette route for a handler."""
    return Route(path, endpoint(emulator, vendor, operation, handler), methods=[method])


def batch_faults(call: Call, vendor: str) -> tuple[dict[str, Fault], list[Fault]]:
    """Faults that strike a batch that is being created: by kind, and those of its rows."""
    struck = call.emulator.faults.strike(vendor, "create_batch", {**BATCH_KINDS, **ROW_KINDS})
    whole = {fault["kind"]: fault for fault in struck if fault["kind"] in BATCH_KINDS}
    return whole, [fault for fault in struck if fault["kind"] in ROW_KINDS]


def visible(batch: Batch, call: Call) -> bool:
    """Whether a batch exists for this caller now."""
    exists = batch.created_at <= call.emulator.clock.now() and not batch.details.get("deleted")
    return exists and batch.tenant == call.tenant


def listed(call: Call, vendor: str) -> list[Batch]:
    """The caller's batches that the vendor's list shows now, newest first."""
    now = call.emulator.clock.now()
    batches = call.emulator.state.batches(vendor, call.tenant)
    return [batch for batch in batches if visible(batch, call) and batch.listed_at <= now]


def new_id(prefix: str) -> str:
    """A fresh id as vendors make them."""
    return prefix + secrets.token_hex(12)


def canonical_sha256(value: Any) -> str:
    """The hash of a JSON value whatever its key order: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


async def _strike(response: Response, faults: dict[str, Fault], *, drop: bool) -> Response:
    if "delay" in faults:
        await asyncio.sleep(faults["delay"].get("seconds", 1))
    if drop or "drop_after" in faults:
        return Dropped()
    if not faults.keys() & {"truncate", "garble", "slow"}:
        return response
    body = await _body(response)
    if "garble" in faults:
        body = garble(body)
    fraction = faults["truncate"].get("fraction", 0.5) if "truncate" in faults else None
    seconds = faults["slow"].get("seconds", 1) if "slow" in faults else 0.0
    return Spoiled(response, body, fraction, seconds)


async def _body(response: Response) -> bytes:
    parts: list[bytes] = []

    async def send(message: Message) -> None:
        parts.append(message.get("body", b""))

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    await response({"type": "http", "method": "GET", "headers": []}, receive, send)
    return b"".join(parts)


class Dropped(Response):
    """The connection is closed without a word."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Close the TCP connection."""
        transport = scope["state"]["transport"]
        transport.abort()
        while (await receive())["type"] != "http.disconnect":
            pass


class Spoiled(Response):
    """A body that comes slowly, in part, or both; in part means the connection closes early."""

    def __init__(self, original: Response, body: bytes, fraction: float | None, seconds: float) -> None:
        super().__init__(status_code=original.status_code)
        kept = [(name, value) for name, value in original.raw_headers if name != b"content-length"]
        self.raw_headers = [*kept, (b"content-length", str(len(body)).encode())]
        self._pieces = list(_pieces(body if fraction is None else body[: int(len(body) * fraction)]))
        self._pause = seconds / max(1, len(self._pieces))
        self._closes = fraction is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what is to be sent."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self._pieces:
            await asyncio.sleep(self._pause)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if not self._closes:
            await send({"type": "http.response.body"})
            return
        scope["state"]["transport"].close()
        while (await receive())["type"] != "http.disconnect":
            pass


def _pieces(body: bytes) -> Iterable[bytes]:
    size = max(1, len(body) // 10)
    return (body[start : start + size] for start in range(0, len(body), size))


def json_response(value: Any, status: int = 200) -> JSONResponse:
    """A JSON answer."""
    return JSONResponse(value, status_code=status)
