"""The emulator's own endpoints under `/_emulator/`: clock, faults, keys, settings, invoice, record."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from presort.emulator import billing
from presort.emulator.clock import rfc3339
from presort.emulator.core import ORGANIZATION, Emulator
from presort.emulator.faults import KINDS, OPERATIONS
from presort.emulator.state import Tenant
from presort.emulator.wire import EMULATED_HEADER

NOTICE = "EMULATED by presort-emulator: no vendor was called."

Handler = Callable[[Emulator, Any], Awaitable[dict[str, Any]]]


def routes(emulator: Emulator) -> list[Route]:
    """All admin routes."""
    table: dict[tuple[str, str], Handler] = {
        ("GET", "health"): health,
        ("GET", "clock"): show_clock,
        ("POST", "clock"): advance_clock,
        ("GET", "settings"): show_settings,
        ("POST", "settings"): change_settings,
        ("GET", "keys"): show_keys,
        ("POST", "keys"): add_key,
        ("GET", "faults"): show_faults,
        ("POST", "faults"): add_fault,
        ("DELETE", "faults"): clear_faults,
        ("GET", "invoice"): invoice,
        ("GET", "record"): record,
        ("GET", "stats"): stats,
    }
    return [
        Route(f"/_emulator/{name}", _endpoint(emulator, method, handler), methods=[method])
        for (method, name), handler in table.items()
    ]


def _endpoint(emulator: Emulator, method: str, handler: Handler) -> Callable[..., Any]:
    async def run(request: Request) -> JSONResponse:
        try:
            body = _parse(await request.body()) if method == "POST" else None
            answer, status = await handler(emulator, body), 200
        except ValueError as error:
            answer, status = {"error": str(error)}, 400
        content = {"emulated": True, "notice": NOTICE, **answer}
        return JSONResponse(content, status_code=status, headers=dict([EMULATED_HEADER]))

    return run


def _parse(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError as error:
        raise ValueError(f"the body must be a JSON object, got {body[:100]!r}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the body must be a JSON object, got {value!r}")
    return value


def _only(body: dict[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    for name, value in body.items():
        if name not in kinds:
            raise ValueError(f"unknown name `{name}`, valid are {', '.join(kinds)}")
        if not isinstance(value, kinds[name]) or (isinstance(value, bool) and kinds[name] is not bool):
            raise ValueError(f"`{name}` has the wrong type: {value!r}")
    return body


async def health(emulator: Emulator, _: Any) -> dict[str, Any]:
    """Whether it runs, and where its state is."""
    path = emulator.state.path
    return {"state": None if path is None else str(path), "started_at": rfc3339(emulator.started_at)}


async def show_clock(emulator: Emulator, _: Any) -> dict[str, Any]:
    """The emulator's time."""
    now = emulator.clock.now()
    return {"now": now, "now_text": rfc3339(now), "offset_seconds": emulator.clock.offset_seconds}


async def advance_clock(emulator: Emulator, body: Any) -> dict[str, Any]:
    """Let time pass, and all that happens in it."""
    seconds = _only(body, {"advance_seconds": (int, float)}).get("advance_seconds")
    if seconds is None or seconds < 0:
        raise ValueError(f"`advance_seconds` must be a number of at least 0, got {seconds!r}")
    emulator.clock.advance(seconds)
    await emulator.batches.settle()
    return await show_clock(emulator, None)


async def show_settings(emulator: Emulator, _: Any) -> dict[str, Any]:
    """All settings."""
    return dict(vars(emulator.settings))


async def change_settings(emulator: Emulator, body: Any) -> dict[str, Any]:
    """Change some settings."""
    emulator.settings.change(body, emulator.state)
    return await show_settings(emulator, None)


async def show_keys(emulator: Emulator, _: Any) -> dict[str, Any]:
    """All defined keys; these are made up, so they are shown."""
    return {"only_listed": emulator.settings.only_listed_keys, "keys": emulator.state.keys()}


async def add_key(emulator: Emulator, body: Any) -> dict[str, Any]:
    """Define a key, or refuse undefined ones."""
    kinds = {"key": str, "organization": str, "workspace": str, "revoked": bool, "only_listed": bool}
    _only(body, kinds)
    if "only_listed" in body:
        emulator.settings.change({"only_listed_keys": body["only_listed"]}, emulator.state)
    if body.get("key"):
        tenant = Tenant(body.get("organization", ORGANIZATION), body.get("workspace", ""))
        emulator.state.put_key(body["key"], tenant, revoked=body.get("revoked", False))
    elif "only_listed" not in body:
        raise ValueError("`key` must not be empty")
    return await show_keys(emulator, None)


async def show_faults(emulator: Emulator, _: Any) -> dict[str, Any]:
    """Armed faults, and what could be armed."""
    return {"faults": emulator.faults.all(), "kinds": KINDS, "operations": OPERATIONS}


async def add_fault(emulator: Emulator, body: Any) -> dict[str, Any]:
    """Arm a fault."""
    return {"id": emulator.faults.add(body)}


async def clear_faults(emulator: Emulator, _: Any) -> dict[str, Any]:
    """Disarm all faults."""
    emulator.faults.clear()
    return {"faults": []}


async def invoice(emulator: Emulator, _: Any) -> dict[str, Any]:
    """The bill so far."""
    await emulator.batches.settle()
    return billing.invoice(emulator.state.tallies(), emulator.state.request_counts())


async def record(emulator: Emulator, _: Any) -> dict[str, Any]:
    """Everything that was asked, oldest first."""
    await emulator.batches.settle()
    batches = []
    for batch in reversed(emulator.state.batches()):
        asked = emulator.state.asked(batch.id)
        batches.append(
            {
                "id": batch.id,
                "vendor": batch.vendor,
                "organization": batch.organization,
                "workspace": batch.workspace,
                "created_at": batch.created_at,
                "ended_at": batch.ended_at,
                "status": batch.result or ("cancelling" if batch.cancelled_at is not None else "in_progress"),
                "counts": batch.counts,
                "metadata": batch.details.get("metadata"),
                "foreign": bool(batch.details.get("foreign")),
                "deleted": bool(batch.details.get("deleted")),
                "custom_ids": [custom_id for custom_id, _, _ in asked],
                "sha256": [sha256 for _, sha256, _ in asked],
                "outcomes": [outcome for _, _, outcome in asked],
            }
        )
    return {"batches": batches, "calls": emulator.state.calls()}


async def stats(emulator: Emulator, _: Any) -> dict[str, Any]:
    """How often each endpoint was called since the start; looking here moves no batch."""
    return {
        "requests": dict(emulator.requests),
        "carried_out": emulator.batches.carried_out,
        "uptime_seconds": round(time.time() - emulator.started_at, 3),
    }
