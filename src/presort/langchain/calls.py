"""Many calls at once: as one group of the engine, and from synchronous code without a thread for each."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from presort.context import Ticket, Wish, asked
from presort.engine import Group
from presort.langchain.clients import through_sync_client

T = TypeVar("T")

Call = Callable[[], Awaitable[T]]

_LOOK_SECONDS = 1.0


class Spread(Generic[T]):
    """Calls made at once as one group, each in a task of its own.

    Args:
        calls: What makes them.
        wish: What is asked for each.
        at_once: How many may be under way without being parked; `None` is any number.
        return_exceptions: Whether an error is a call's result.
    """

    def __init__(self, calls: Sequence[Call[T]], wish: Wish, at_once: int | None, *, return_exceptions: bool) -> None:
        self._wish = wish
        self._group = Group(expected=len(calls))
        self._loop = asyncio.get_running_loop()
        self._gate = asyncio.Semaphore(at_once) if at_once else None
        self._return_exceptions = return_exceptions
        self._tasks = [asyncio.create_task(self._make(call)) for call in calls]

    async def results(self) -> list[T | Exception]:
        """Return the results in the order of the calls; the first error, if it is no result, ends the others."""
        try:
            return await asyncio.gather(*self._tasks)
        finally:
            self.cancel()

    async def as_completed(self) -> AsyncIterator[tuple[int, T | Exception]]:
        """Yield (position, result) as results come."""
        ended: asyncio.Queue[tuple[int, asyncio.Task[T | Exception]]] = asyncio.Queue()
        for position, task in enumerate(self._tasks):
            task.add_done_callback(partial(_enqueue, ended, position))
        try:
            for _ in self._tasks:
                position, task = await ended.get()
                yield position, task.result()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End what is under way: withdrawn if it was not submitted, else collected for whoever asks again."""
        for task in self._tasks:
            task.cancel()

    async def _make(self, call: Call[T]) -> T | Exception:
        slot = _Slot(self._gate, self._loop)
        ticket = Ticket(self._group, on_taken=slot.free_soon)
        try:
            await slot.wait()
            with asked(replace(self._wish, ticket=ticket)):
                return await call()
        except Exception as error:
            if self._return_exceptions:
                return error
            raise
        finally:
            ticket.give_back()
            slot.free()


def _enqueue(queue: asyncio.Queue[tuple[int, asyncio.Task[T]]], position: int, task: asyncio.Task[T]) -> None:
    queue.put_nowait((position, task))


class _Slot:
    """A call's place among those that may be on the wire; free again once the call is parked."""

    def __init__(self, gate: asyncio.Semaphore | None, loop: asyncio.AbstractEventLoop) -> None:
        self._gate = gate
        self._loop = loop
        self._held = False

    async def wait(self) -> None:
        if self._gate is not None:
            await self._gate.acquire()
            self._held = True

    def free(self) -> None:
        if self._gate is not None and self._held:
            self._held = False
            self._gate.release()

    def free_soon(self) -> None:
        """Free it from any thread: a call may reach the transport in another one."""
        if self._gate is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for the place
                self._loop.call_soon_threadsafe(self.free)


class Beside(Generic[T]):
    """A coroutine that runs to its end on an event loop of its own, in a thread of its own, with the caller's context.

    So synchronous code can wait for any number of parked calls, even where a loop is running already (a notebook).
    Whoever stops waiting cancels it, and does not wait for that.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._work = work
        self._future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._task: asyncio.Task[T] | None = None
        self._given_up = False
        self._context = copy_context()
        threading.Thread(target=self._main, name="presort-batch", daemon=True).start()

    def result(self) -> T:
        """Wait for the end."""
        try:
            # in short waits: on Windows a long one does not hear Ctrl-C
            while not self._future.done():
                concurrent.futures.wait([self._future], _LOOK_SECONDS)
            return self._future.result()
        finally:
            self.cancel()

    def when_ended(self, then: Callable[[], None]) -> None:
        """Call a function once it has ended, from any thread."""
        self._future.add_done_callback(lambda _: then())

    def cancel(self) -> None:
        """Cancel it unless it has ended."""
        self._given_up = True
        task = self._task
        if task is not None and not self._future.done():
            with contextlib.suppress(RuntimeError):  # it ended meanwhile, and its loop with it
                task.get_loop().call_soon_threadsafe(task.cancel)

    def _main(self) -> None:
        try:
            with asyncio.Runner() as runner:
                result = runner.run(self._run(), context=self._context)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._future.set_exception(error)
        else:
            self._future.set_result(result)

    async def _run(self) -> T:
        through_sync_client.set(True)
        self._task = asyncio.current_task()
        if self._given_up:
            raise asyncio.CancelledError
        return await self._work()


def iterate_beside(items: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
    """Yield the items of an asynchronous iterator that runs beside, as they come."""
    queue: SimpleQueue[tuple[T] | None] = SimpleQueue()

    async def feed() -> None:
        async for item in items():
            queue.put((item,))

    beside = Beside(feed)
    beside.when_ended(lambda: queue.put(None))
    try:
        while True:
            with contextlib.suppress(Empty):
                item = queue.get(timeout=_LOOK_SECONDS)
                if item is None:
                    break
                yield item[0]
        beside.result()
    finally:
        beside.cancel()
