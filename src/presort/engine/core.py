"""What the engine's loops share: settings, store, keys, waiters, clock, and this process's lease."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from presort.config import Batching, Settings
from presort.engine.keyring import Keyring
from presort.engine.waiters import Waiters
from presort.pricing import cost
from presort.request import BatchKey, Outcome
from presort.store import Store
from presort.store.base import LedgerRow, Settlement, Spend

P = ParamSpec("P")
T = TypeVar("T")

_NOT_FORWARDED = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "accept-encoding", "authorization", "x-api-key"}
)


@dataclass(frozen=True, slots=True)
class Requested:
    """What a live caller asked for, beyond what is stored."""

    batching: Batching
    headers: Mapping[str, str] = field(repr=False)


class Core:
    """The engine's shared state. Lives on the engine's loop; the store is used from one thread of its own."""

    def __init__(self, settings: Settings, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self.store = store
        self.clock = clock
        self.owner = new_id(clock())
        self.host = machine()
        self.pid = os.getpid()
        self.waiters = Waiters()
        self.keyring = Keyring(settings, self)
        self.jobs_due = asyncio.Event()
        self.standard_due = asyncio.Event()
        self.no_batch_api: set[str] = set()
        """Base URLs that answered a first create or upload as if there were no such API."""
        self.requested: dict[str, Requested] = {}
        """What live callers asked for, by request id: nothing of it is stored."""
        self.trouble: dict[str, tuple[float, str]] = {}
        """Since when, in Unix seconds, and why a loop cannot write to the store, by loop."""
        self.database = ThreadPoolExecutor(1, thread_name_prefix="presort-store")
        """The only thread on which the store is used."""

    async def db(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a store method on the store's thread, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self.database, lambda: function(*args, **kwargs))

    def note_trouble(self, loop: str, error: Exception) -> None:
        """Note that a loop cannot write to the store; the loop takes it back once it can."""
        self.trouble.setdefault(loop, (self.clock(), str(error)))

    def batching_of(self, request_id: str) -> Batching:
        """Return the batching settings a request was handed in with; if before this process, the general ones."""
        requested = self.requested.get(request_id)
        return self.settings.batching if requested is None else requested.batching

    def original_headers(self, request_id: str) -> dict[str, str]:
        """Return the headers a live caller's client wrote, without its connection's and those that carry its key."""
        requested = self.requested.get(request_id)
        if requested is None:
            return {}
        return {name: value for name, value in requested.headers.items() if name not in _NOT_FORWARDED}

    def close(self) -> None:
        """Let go of the store's thread; what it is doing is waited for."""
        self.database.shutdown(wait=True)

    def settlement(
        self, request_id: str, custom_id: str, key: BatchKey, outcome: Outcome, run: str | None
    ) -> Settlement:
        """Pair an outcome with its ledger row. What a vendor refused, expired or cancelled is not billed."""
        if not outcome.succeeded:
            return Settlement(request_id, outcome)
        at = self.clock()
        price = cost(key.provider, key.base_url, key.model, outcome.usage, outcome.route, at)
        row = LedgerRow(
            custom_id=custom_id,
            spend=Spend.PAID,
            route=outcome.route,
            provider=key.provider,
            model=key.model,
            account=key.account,
            at=at,
            usage=outcome.usage,
            baseline_usd=price.baseline_usd,
            actual_usd=price.actual_usd,
            run=run,
            batch_id=outcome.batch_id,
        )
        return Settlement(request_id, outcome, row)

    async def settle(self, items: list[Settlement]) -> None:
        """Store outcomes, then wake whoever waits for those that were first."""
        if not items:
            return
        first = set(await self.db(self.store.settle, items, self.clock()))
        for request_id in first:
            self.requested.pop(request_id, None)
        self.waiters.deliver({item.request_id: item.outcome for item in items if item.request_id in first})


def backoff(failures: int, base_seconds: float = 1.0, most_seconds: float = 300.0) -> float:
    """Return how long to wait after so many failures in a row, in seconds, with up to 20% of chance on top."""
    pause = min(most_seconds, base_seconds * 2.0 ** min(failures, 20))
    return pause * (1.0 + secrets.randbelow(1000) / 5000)


_counter = secrets.randbelow(1 << 16)


def new_id(now: float) -> str:
    """Return 32 hexadecimal digits, unique everywhere and rising with time within a process."""
    global _counter  # noqa: PLW0603 - one counter per process is the point
    _counter = (_counter + 1) & 0xFFFFFFFF
    return f"{int(now * 1000) & 0xFFFFFFFFFFFF:012x}{_counter:08x}{secrets.token_hex(6)}"


def machine() -> str:
    """Name the machine, and where the system tells, its boot and process namespace."""
    parts = [socket.gethostname()]
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8])
            parts.append(str(Path("/proc/self/ns/pid").readlink()).removeprefix("pid:").strip("[]"))
    return "/".join(parts)


def process_is_gone(host: str, pid: int) -> bool:
    """Whether a process of this very machine provably no longer runs; `False` where that cannot be told."""
    if sys.platform == "win32" or host != machine():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
