"""Requests in: admitted to the store, accumulated by batch key, formed into jobs.

If the process dies before a request is admitted, its caller dies with it and nothing was promised. Once admitted it
is QUEUED in the store; if its owner dies then, the same call made again attaches to it, and one of a named run is
taken over.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from presort.config import Batching
from presort.engine.core import Core, Requested, new_id
from presort.engine.failpoints import reach
from presort.engine.keyring import Link
from presort.engine.waiters import Listener
from presort.job import Job, JobState
from presort.providers import provider
from presort.request import BatchKey, Payload, RequestState
from presort.routing import cut, flush_due
from presort.store.base import Admitted, LedgerRow, NewRequest
from presort.telemetry import fell_back, logger, warn

ADMIT_CHUNK = 500
_ADOPT_EVERY_SECONDS = 5.0
_IDLE_SECONDS = 1.0
_TICK_SECONDS = 0.25
_STUCK_SECONDS = 5.0


class Run:
    """One session of a named run: counts equal payloads, so that each is a call of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._seen: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def restart(self) -> None:
        """Count from 0 again: the run was finished, and starts anew."""
        with self._lock:
            self._seen.clear()

    def occurrence(self, payload_hash: str) -> int:
        """Return which of the equal payloads this is, from 0."""
        with self._lock:
            number = self._seen[payload_hash]
            self._seen[payload_hash] += 1
        return number


class Group:
    """Calls that belong together and know their number: flushed as one, as soon as all have come.

    Used from any thread.
    """

    def __init__(self, expected: int | None = None) -> None:
        self._lock = threading.Lock()
        self._expected = expected
        self._arrived = 0
        self._changed: Callable[[], None] | None = None
        self.admitted = 0
        """Calls that have reached the store; engine's loop only."""
        self.attached = 0
        """Those of them that were there before."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Have a function called, from any thread, if the last call to wait for is counted out."""
        self._changed = changed

    def arrive(self) -> None:
        """Count a call that was handed to the engine."""
        with self._lock:
            self._arrived += 1

    def leave(self) -> None:
        """Count out a call that will never be handed in: it failed before, or took another way."""
        with self._lock:
            if self._expected is not None:
                self._expected -= 1
        if self._changed is not None and self.complete:
            self._changed()

    def close(self) -> None:
        """No further call will come."""
        with self._lock:
            self._expected = self._arrived

    @property
    def complete(self) -> bool:
        """Whether every call has come and is in the store."""
        with self._lock:
            return self._expected is not None and self.admitted >= self._expected


@dataclass(slots=True, eq=False)
class Parcel:
    """A payload on its way into the store, with what its caller wants of it."""

    payload: Payload
    payload_hash: str
    deadline: float
    batching: Batching
    listener: Listener | None
    """`None` if nobody in this process waits for the outcome."""
    run: Run | None = None
    occurrence: int = 0
    group: Group | None = None
    link: Link | None = None
    request_id: str | None = None
    cancelled: bool = False


@dataclass(slots=True)
class _Bucket:
    key: BatchKey
    batching: Batching
    group: Group | None
    oldest_at: float
    newest_at: float
    ids: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


class Accumulator:
    """Takes parcels from any thread; does the rest on the engine's loop."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._inbox: deque[Parcel] = deque()
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._woken = False
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, int | None, Batching], _Bucket] = {}
        self._handed_out: list[str] = []
        self._ledger: list[LedgerRow] = []
        self._working = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()

    # -- any thread ----------------------------------------------------------------------------------------------
    def put(self, parcels: Sequence[Parcel]) -> None:
        """Take parcels in."""
        for parcel in parcels:
            if parcel.group is not None:
                parcel.group.arrive()
        with self._lock:
            self._inbox.extend(parcels)
            call = not self._woken
            self._woken = True
        if call:
            self._loop.call_soon_threadsafe(self._wake.set)

    def nudge(self) -> None:
        """Look at the buckets again: a group has changed."""
        with contextlib.suppress(RuntimeError):  # the engine was closed: there are no buckets
            self._loop.call_soon_threadsafe(self._wake.set)

    # -- engine's loop -------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Admit what comes in and flush what is due, until cancelled."""
        adopt_at = 0.0
        while True:
            if not self._wake.is_set():
                pause = _TICK_SECONDS if self._buckets or self._handed_out or self._ledger else _IDLE_SECONDS
                try:
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
                except TimeoutError:
                    pass
            self._wake.clear()
            try:
                async with self._working:
                    await self._admit_all()
                    if self._core.clock() >= adopt_at:
                        await self._adopt()
                        adopt_at = self._core.clock() + _ADOPT_EVERY_SECONDS
                    await self._flush_due()
                    await self.flush_handed_out()
                self._core.trouble.pop("accumulator", None)
            except Exception as error:  # noqa: BLE001 - the loop must outlive a full disk
                self._core.note_trouble("accumulator", error)
                warn("accumulator", f"cannot write to the store, trying again: {error}")
                await asyncio.sleep(1.0)

    async def flush(self) -> None:
        """Form jobs of everything that waits, now."""
        async with self._working:
            await self._admit_all()
            for where in list(self._buckets):
                await self._form(where)

    def hand_out(self, request_id: str) -> None:
        """Note that an answer has reached its caller."""
        self._handed_out.append(request_id)

    def book(self, row: LedgerRow) -> None:
        """Note a ledger row, to be written with the next ones."""
        self._ledger.append(row)

    async def flush_handed_out(self) -> None:
        """Tell the store which answers have reached their callers, and what standard calls cost."""
        if self._ledger:
            rows, self._ledger = self._ledger, []
            await self._core.db(self._core.store.book, rows)
        if self._handed_out:
            ids, self._handed_out = self._handed_out, []
            await self._core.db(self._core.store.hand_out, ids)

    async def last_things(self) -> None:
        """Before the end: those that are leaving leave, and what was handed out or spent is noted."""
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await self.flush_handed_out()

    def leave(self, parcel: Parcel) -> None:
        """A caller has gone: see `withdraw`."""
        task = self._loop.create_task(self.withdraw(parcel))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def withdraw(self, parcel: Parcel) -> None:
        """A caller has gone: what was not submitted is taken back; the rest is collected for whoever asks again."""
        parcel.cancelled = True
        if parcel.request_id is None:
            return
        if parcel.listener is None or not self._core.waiters.discard(parcel.request_id, parcel.listener):
            return
        store = self._core.store
        gone = await self._core.db(store.withdraw, [parcel.request_id])
        gone = gone or await self._core.db(store.withdraw_unsent, [parcel.request_id])
        if not gone:
            logger.info("a caller left; its request %s is under way and will be collected", parcel.request_id)
        for request_id in gone:
            self._core.requested.pop(request_id, None)
        for bucket in self._buckets.values():
            for request_id in gone:
                if request_id in bucket.ids:
                    place = bucket.ids.index(request_id)
                    del bucket.ids[place], bucket.sizes[place]

    async def _admit_all(self) -> None:
        with self._lock:
            self._woken = False
        while True:
            with self._lock:
                parcels = [self._inbox.popleft() for _ in range(min(ADMIT_CHUNK, len(self._inbox)))]
            if not parcels:
                return
            try:
                await self._admit([parcel for parcel in parcels if not parcel.cancelled])
            except BaseException:
                with self._lock:
                    self._inbox.extendleft(parcel for parcel in reversed(parcels) if parcel.request_id is None)
                raise
            for parcel in parcels:
                if parcel.cancelled and parcel.group is not None and parcel.request_id is None:
                    parcel.group.admitted += 1

    async def _admit(self, parcels: list[Parcel]) -> None:
        by_run: dict[str | None, list[Parcel]] = defaultdict(list)
        for parcel in parcels:
            by_run[parcel.run.name if parcel.run else None].append(parcel)
        now = self._core.clock()
        for run, members in by_run.items():
            fresh = [
                NewRequest(
                    id=new_id(now),
                    key=parcel.payload.key,
                    payload_hash=parcel.payload_hash,
                    body=parcel.payload.body,
                    deadline=parcel.deadline,
                    occurrence=parcel.occurrence,
                )
                for parcel in members
            ]
            reach("accumulator.admit")
            admitted = await self._core.db(self._core.store.admit, self._core.owner, run, fresh, now)
            reach("accumulator.admitted")
            for parcel, row in zip(members, admitted, strict=True):
                self._place(parcel, row, now)

    def _place(self, parcel: Parcel, admitted: Admitted, now: float) -> None:
        request = admitted.request
        parcel.request_id = request.id
        if parcel.group is not None:
            parcel.group.admitted += 1
            parcel.group.attached += admitted.attached
        if parcel.link is not None:
            self._core.keyring.remember(parcel.payload.key, parcel.link)
        if parcel.cancelled:
            self.leave(parcel)
        if parcel.listener is not None:
            self._core.waiters.add(request.id, parcel.listener)
        if parcel.payload.headers or parcel.batching != self._core.settings.batching:
            self._core.requested[request.id] = Requested(parcel.batching, parcel.payload.headers)
        if request.outcome is not None:
            self._core.waiters.deliver({request.id: request.outcome})
        elif request.state is RequestState.QUEUED:
            self._put(parcel.payload.key, parcel.batching, parcel.group, request.id, len(parcel.payload.body), now)

    def _put(
        self, key: BatchKey, batching: Batching, group: Group | None, request_id: str, size: int, now: float
    ) -> None:
        where = (key.id, None if group is None else id(group), batching)
        bucket = self._buckets.get(where)
        if bucket is None:
            bucket = self._buckets[where] = _Bucket(key, batching, group, now, now)
            if group is not None:
                group.watch(self.nudge)
        bucket.ids.append(request_id)
        bucket.sizes.append(size)
        bucket.newest_at = now

    async def _adopt(self) -> None:
        core = self._core
        for request, key, size in await core.db(core.store.adopt, core.owner, core.clock(), ADMIT_CHUNK):
            self._put(key, core.settings.batching, None, request.id, size, request.created_at)

    async def _flush_due(self) -> None:
        now = self._core.clock()
        for where, bucket in list(self._buckets.items()):
            group = bucket.group
            if group is None:
                due = flush_due(waiting=len(bucket.ids), oldest_at=bucket.oldest_at, now=now, batching=bucket.batching)
            else:
                # a caller of the group that is stuck elsewhere must not hold up the others for ever
                stuck = now - bucket.newest_at >= max(bucket.batching.flush_seconds, _STUCK_SECONDS)
                due = group.complete or stuck or len(bucket.ids) >= bucket.batching.max_batch_requests
            if due:
                await self._form(where)

    async def _form(self, where: tuple[str, int | None, Batching]) -> None:
        core = self._core
        bucket = self._buckets.pop(where)
        if not bucket.ids:
            return
        try:
            if len(bucket.ids) < bucket.batching.min_requests:
                reason = f"fewer than `batching.min_requests` ({bucket.batching.min_requests})"
                await self._to_standard(bucket.ids, reason)
                return
            if bucket.key.base_url in core.no_batch_api:
                await self._to_standard(bucket.ids, "no Batch API at this base URL")
                return
            limits = provider(bucket.key.provider).limits
            largest = min(bucket.batching.max_batch_requests, limits.max_requests)
            start = 0
            for count in cut(bucket.sizes, max_requests=largest, max_bytes=limits.max_bytes):
                await core.db(core.store.form_job, new_job(bucket.key, core.clock()), bucket.ids[start : start + count])
                reach("accumulator.formed")
                start += count
        except BaseException:
            # form_job takes only what is still queued: the whole bucket may be tried again
            self._buckets.setdefault(where, bucket)
            raise
        core.jobs_due.set()

    async def _to_standard(self, ids: list[str], reason: str) -> None:
        count = await self._core.db(self._core.store.reroute, ids, reason)
        fell_back(reason, count)
        self._core.standard_due.set()


def new_job(key: BatchKey, now: float, due_at: float | None = None) -> Job:
    """Return a PENDING job; the store fills in what its requests decide."""
    return Job(
        id=new_id(now),
        key_id=key.id,
        state=JobState.PENDING,
        count=0,
        size_bytes=0,
        created_at=now,
        deadline=now,
        due_at=now if due_at is None else due_at,
    )
