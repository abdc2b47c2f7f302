"""The engine: one event loop in a thread of its own, shared by every caller of the process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from presort.config import Batching, Settings
from presort.engine.accumulator import Accumulator, Group, Parcel, Run
from presort.engine.core import Core, new_id
from presort.engine.keyring import Link
from presort.engine.poller import Poller
from presort.engine.settler import Settler
from presort.engine.stream import LOOK_SECONDS, Stream
from presort.engine.submitter import Submitter
from presort.engine.worker import Worker
from presort.errors import ClosedError, DeadlockError, EngineError
from presort.pricing import cost
from presort.providers import provider
from presort.providers.base import AnswerLostError, Reply
from presort.request import BatchKey, Outcome, Payload, Route, Usage, custom_id
from presort.store import Store
from presort.store.base import JobView, LedgerRow, LedgerTotal, QueueView, Spend
from presort.telemetry import logger, warn

T = TypeVar("T")

_CLOSE_SECONDS = 1.5
_LOOK_SECONDS = 15.0
_STILL_SECONDS = 5.0


class Engine:
    """Takes payloads, gives outcomes. Thread-safe; none of its blocking methods may be called on its own thread.

    The core verb is `stream`. `park` is the same for one payload whose caller waits.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings = settings
        self.store = store
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._closed = False
        self._futures: set[_Parked] = set()
        self.streams: set[Stream] = set()
        self._lock = threading.Lock()
        self._gone: Future[None] = Future()
        """Fails once the engine is closed, with what its callers get."""
        self._go_on: threading.Event | None = None
        self._thread = threading.Thread(target=self._main, name="presort-engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        _living.add(self)

    # -- callers -------------------------------------------------------------------------------------------------
    def account(self, key: str) -> str:
        """Name the account a key pays for."""
        return self.core.keyring.account(key)

    def lacks_batch_api(self, base_url: str) -> bool:
        """Whether a base URL has answered as if it had no Batch API."""
        return base_url in self.core.no_batch_api

    def park(
        self,
        payload: Payload,
        *,
        deadline_seconds: float | None = None,
        batching: Batching | None = None,
        run: Run | None = None,
        group: Group | None = None,
        link: Link | None = None,
    ) -> Future[Outcome]:
        """Hand in one payload; the future resolves to its outcome, perhaps hours later.

        Cancelling the future withdraws the request if it has not been submitted; else it is collected all the same.

        Raises:
            ClosedError: The engine was closed.
        """
        future = _Parked(self)

        def settled(request_id: str, outcome: Outcome) -> None:
            with self._lock:
                self._futures.discard(future)
            if future.set_running_or_notify_cancel():
                future.set_result(outcome)
                self.accumulator.hand_out(request_id)

        parcel = self.parcel(payload, settled, deadline_seconds, batching, run, group, link)
        with self._lock:
            self.check_open()
            self._futures.add(future)
        future.add_done_callback(lambda done: self._withdraw(parcel) if done.cancelled() else None)
        self.accumulator.put([parcel])
        return future

    def stream(
        self,
        payloads: Iterable[Payload],
        *,
        run: str | None = None,
        deadline_seconds: float | None = None,
        batching: Batching | None = None,
        link: Link | None = None,
    ) -> Stream:
        """Hand in payloads as they are drawn from an iterable; iterate the result for the outcomes, in input order.

        The iterable is drawn in a thread of its own. Its end closes the group, which is sent at once. Neither side
        is held in memory: prompts and answers lie in the store.
        """
        self.check_open()
        session = Run(run) if run is not None else None
        return Stream(self, payloads, session, deadline_seconds, batching, link)

    def finish_run(self, run: str) -> None:
        """Finish a named run: its answers are deleted, and the same name starts anew next time."""
        self.call(self._finish_run(run))

    def book_standard(self, key: BatchKey, usage: Usage | None, at: float) -> None:
        """Note, without waiting, what a call cost that a client sent by the standard route itself."""
        if not self._closed:
            # pricing loads a table when first used: not on the caller's loop
            self._loop.call_soon_threadsafe(self._book_standard, key, usage, at)

    def _book_standard(self, key: BatchKey, usage: Usage | None, at: float) -> None:
        price = cost(key.provider, key.base_url, key.model, usage, Route.STANDARD, at)
        row = LedgerRow(
            custom_id=custom_id(new_id(at), 0),
            spend=Spend.PAID,
            route=Route.STANDARD,
            provider=key.provider,
            model=key.model,
            account=key.account,
            at=at,
            usage=usage,
            baseline_usd=price.baseline_usd,
            actual_usd=price.actual_usd,
        )
        self.accumulator.book(row)

    def flush(self) -> None:
        """Send what accumulates now, without waiting for more."""
        self.call(self.accumulator.flush())

    def nudge(self) -> None:
        """Tell the engine that a group has changed."""
        if not self._closed:
            self.accumulator.nudge()

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Flush, then wait until nobody in this process waits for an outcome; `False` if time ran out first."""
        self.flush()

        async def watch() -> bool:
            try:
                async with asyncio.timeout(timeout_seconds):
                    while self.core.waiters:  # noqa: ASYNC110 - waiters come and go in many places; a poll is simplest
                        await asyncio.sleep(0.05)
            except TimeoutError:
                return False
            await self.accumulator.flush_handed_out()
            return True

        return self.call(watch())

    def jobs(self, *, all_jobs: bool = False) -> tuple[list[JobView], list[QueueView]]:
        """Return the jobs in the store, and what is queued without one."""

        async def read() -> tuple[list[JobView], list[QueueView]]:
            core = self.core
            views = await core.db(core.store.job_views, core.clock(), all_jobs=all_jobs)
            return views, await core.db(core.store.queue_views)

        return self.call(read())

    def totals(self, run: str | None = None, since: float | None = None) -> list[LedgerTotal]:
        """Sum the ledger, of one run or of all."""
        return self.call(self.core.db(self.core.store.totals, run, since))

    def run_totals(self, run: str) -> list[LedgerTotal]:
        """Sum what a named run has cost since it was opened."""

        async def read() -> list[LedgerTotal]:
            core = self.core
            await self.accumulator.flush_handed_out()
            since = await core.db(core.store.opened_at, run)
            return await core.db(core.store.totals, run, since)

        return self.call(read())

    def look(self, base_url: str, provider_name: str, path: str, link: Link) -> Reply:
        """Ask a vendor something harmless with a live key, to see that it answers; raises `ChannelError`."""
        key = BatchKey(provider_name, base_url, self.account(link.key), "", "")

        async def ask() -> Reply:
            self.core.keyring.remember(key, link)
            channel = await self.core.keyring.channel(key)
            assert channel is not None  # noqa: S101 - it was remembered just now
            try:
                async with asyncio.timeout(_LOOK_SECONDS):
                    return await channel.send("GET", path, headers=dict(provider(provider_name).standing_headers))
            except TimeoutError as error:
                raise AnswerLostError(f"no answer in {_LOOK_SECONDS:.0f} s") from error

        return self.call(ask())

    @property
    def trouble(self) -> tuple[float, str] | None:
        """Since when the store cannot be written, in Unix seconds, and why; `None` if it can."""
        return min(list(self.core.trouble.values()), default=None)

    def reconfigure(self, settings: Settings) -> None:
        """Take other settings of the same store, while work goes on; they count for what comes next."""

        async def change() -> None:
            self.settings = self.core.settings = settings
            self.core.keyring.reconfigure(settings)
            self.core.jobs_due.set()
            self.core.standard_due.set()

        self.call(change())

    @property
    def closed(self) -> bool:
        """Whether it takes no more work: it was closed, or has failed."""
        return self._closed

    @property
    def busy(self) -> bool:
        """Whether anybody in this process waits for an outcome."""
        return not self._closed and (bool(self._futures) or bool(self.streams))

    def close(
        self,
        *,
        error: Callable[[], BaseException] = lambda: ClosedError("presort was closed"),
        in_loops: Callable[[], BaseException] | None = None,
    ) -> None:
        """Stop. Work in flight stays in the store for the next process.

        Args:
            error: What callers get that still wait.
            in_loops: What those of them get that wait on an event loop, if not the same.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            futures, self._futures = self._futures, set()
            streams = set(self.streams)
        for stream in streams:
            stream.fail(error())
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(in_loops() if in_loops is not None and future.in_loop else error())
        self._gone.set_exception(error())
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_CLOSE_SECONDS)

    # -- inside --------------------------------------------------------------------------------------------------
    def parcel(
        self,
        payload: Payload,
        listener: Callable[[str, Outcome], None] | None,
        deadline_seconds: float | None,
        batching: Batching | None,
        run: Run | None,
        group: Group | None,
        link: Link | None,
    ) -> Parcel:
        """Wrap a payload up for the accumulator; without a link its own headers say the key."""
        if link is None:
            key = provider(payload.key.provider).read_key(payload.headers)
            link = None if key is None else Link(key)
        chosen = batching or self.settings.batching
        seconds = chosen.deadline_seconds if deadline_seconds is None else deadline_seconds
        payload_hash = payload.hash
        return Parcel(
            payload=payload,
            payload_hash=payload_hash,
            deadline=self.core.clock() + seconds,
            batching=chosen,
            listener=listener,
            run=run,
            occurrence=run.occurrence(payload_hash) if run is not None else 0,
            group=group,
            link=link,
        )

    def _withdraw(self, parcel: Parcel) -> None:
        with self._lock:
            if not self._closed:
                with contextlib.suppress(RuntimeError):  # it has just failed
                    self._loop.call_soon_threadsafe(self.accumulator.leave, parcel)

    async def _finish_run(self, run: str) -> None:
        await self.accumulator.flush_handed_out()
        await self.core.db(self.core.store.finish_run, run, self.core.clock())

    def check_open(self) -> None:
        """Raise `ClosedError` if the engine was closed."""
        if self._closed:
            raise ClosedError("presort was closed")

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's loop and wait for it.

        Raises:
            DeadlockError: This is the engine's own thread.
            ClosedError: The engine was closed, before or meanwhile.
        """
        try:
            self.check_may_block()
            if self._gone.done():
                self._gone.result()
            self.check_open()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except BaseException as error:
            work.close()
            if isinstance(error, RuntimeError) and not isinstance(error, EngineError):
                raise ClosedError("presort was closed") from None
            raise
        try:
            either: tuple[Future[Any], ...] = (future, self._gone)
            # in short waits: on Windows a long one does not hear Ctrl-C
            while not concurrent.futures.wait(either, LOOK_SECONDS, concurrent.futures.FIRST_COMPLETED).done:
                pass
        except BaseException:
            future.cancel()
            raise
        if not future.done() or future.cancelled():
            future.cancel()
            self._gone.result(_CLOSE_SECONDS)
        return future.result()

    def check_may_block(self) -> None:
        """Raise `DeadlockError` on the engine's own thread, which would wait for itself."""
        if threading.current_thread() is self._thread:
            raise DeadlockError("a blocking call of presort on its own thread would wait for itself")

    # -- forks ---------------------------------------------------------------------------------------------------
    def hold_still(self) -> None:
        """Before a fork: close the store's connections and open none until `go_on`.

        A child must not inherit them: SQLite would believe that it holds the parent's locks, and two processes
        would write at once.
        """
        if self._closed:
            return
        still, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            try:
                self.store._db._engine.dispose()  # noqa: SLF001 - the store has no public word for it yet
            finally:
                still.set()
            go_on.wait()

        with contextlib.suppress(RuntimeError):  # it is closing: there will be no connections
            self.core.database.submit(hold)
            self._go_on = go_on
            if not still.wait(_STILL_SECONDS):
                warn("fork", "a process was forked while the store was busy; the child should use another store")

    def go_on(self) -> None:
        """After a fork, in the parent."""
        if self._go_on is not None:
            self._go_on.set()
            self._go_on = None

    def stay_behind(self) -> None:
        """After a fork, in the child: its threads are not here, and what they hold is the parent's."""
        self._lock = threading.Lock()
        self._closed = True

    def _main(self) -> None:
        try:
            # not `asyncio.run`, which hosts replace so that loops can be nested
            with asyncio.Runner() as runner:
                runner.run(self._live())
        except BaseException as error:  # noqa: BLE001 - handed to whoever starts or uses the engine
            self._failure = error
            if self._ready.is_set():
                logger.exception("presort's engine has stopped")
                why = f"presort's engine has stopped: {error!r}"
                self.close(error=lambda: ClosedError(why))
        finally:
            self._ready.set()

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        core = self.core = Core(self.settings, self.store)
        self.accumulator = Accumulator(core)
        settler = Settler(core)
        worker = Worker(core, Submitter(core, settler), Poller(core, settler), settler)
        await worker.join()
        loops: list[asyncio.Task[None]] = [
            asyncio.create_task(part)
            for part in (self.accumulator.run(), worker.run(), worker.keep_alive(), settler.run())
        ]
        self._ready.set()
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait([*loops, stopped], return_when=asyncio.FIRST_COMPLETED)
        broken = [task for task in loops if task.done()]
        for task in loops:
            task.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        with contextlib.suppress(Exception):
            await self.accumulator.last_things()
        with contextlib.suppress(Exception):
            await worker.stop()
        await core.keyring.close()
        core.close()
        self.store.close()
        for task in broken:
            task.result()


class _Parked(Future[Outcome]):
    """The future of a parked call; whoever could only wait for ever is told so instead."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self._pid = os.getpid()
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.in_loop = False
        else:
            self.in_loop = True

    def result(self, timeout: float | None = None) -> Outcome:
        self._check()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check()
        return super().exception(timeout)

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ClosedError("this call was made before the process was forked: its answer goes to the parent")
        if not self.done():
            self._engine.check_may_block()


_living: weakref.WeakSet[Engine] = weakref.WeakSet()
_forking = threading.Lock()
"""Held by the thread that forks: a second one waits."""
_left_behind: list[Engine] = []
"""Engines of the parent. Kept, so that nothing of theirs is closed here that both processes share."""


def _before_fork() -> None:
    _forking.acquire()
    for engine in list(_living):
        engine.hold_still()


def _after_fork_in_parent() -> None:
    for engine in list(_living):
        engine.go_on()
    _forking.release()


def _after_fork_in_child() -> None:
    global _forking  # noqa: PLW0603
    _forking = threading.Lock()
    for engine in list(_living):
        engine.stay_behind()
        _left_behind.append(engine)
    _living.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
