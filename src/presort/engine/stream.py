"""The engine's core verb: payloads in as they are drawn, outcomes out in the same order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from presort.config import Batching
from presort.engine.accumulator import ADMIT_CHUNK, Group, Run
from presort.engine.keyring import Link
from presort.request import Outcome, Payload

if TYPE_CHECKING:
    from presort.engine.engine import Engine

_TAKE = 200

LOOK_SECONDS = 1.0
"""How long a caller's thread waits at a stretch."""


class Stream(Iterator[tuple[int, Outcome]]):
    """Outcomes of a stream of payloads, in input order: (position from 0, outcome)."""

    def __init__(
        self,
        engine: Engine,
        payloads: Iterable[Payload],
        run: Run | None,
        deadline_seconds: float | None,
        batching: Batching | None,
        link: Link | None,
    ) -> None:
        self._engine = engine
        self._payloads = payloads
        self._run = run
        self._options = (deadline_seconds, batching, link)
        self._changed = threading.Condition()
        self._group = Group()
        self._ids: list[str | None] = []
        self._position = 0
        self._loaded: deque[tuple[int, str, Outcome]] = deque()
        self._given: list[str] = []
        self._fed = False
        self._error: BaseException | None = None
        self.settled = 0
        """Requests that have their outcome."""
        self.admitted = 0
        """Requests handed to the engine so far."""
        self.failed = 0
        """Requests whose outcome is not a success."""
        engine.streams.add(self)
        threading.Thread(target=self._feed, name="presort-stream", daemon=True).start()

    def fail(self, error: BaseException) -> None:
        """End the stream with an error."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    @property
    def attached(self) -> int:
        """Requests that an earlier session of the named run handed in."""
        return self._group.attached

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until every payload has its outcome, or so long; return whether they have."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._error is not None or (self._fed and self.settled >= self.admitted), timeout_seconds
            )

    def __next__(self) -> tuple[int, Outcome]:
        if not self._loaded:
            self._load()
        position, request_id, outcome = self._loaded.popleft()
        self._given.append(request_id)
        return position, outcome

    def _load(self) -> None:
        """Read the next settled stretch from the store; its predecessor has been handed out."""
        engine = self._engine
        engine.check_may_block()
        if self._given:
            given, self._given = self._given, []
            engine.call(self._hand_out(given))
        with self._changed:
            # in short waits: on Windows a long one does not hear Ctrl-C
            while not self._changed.wait_for(self._next_is_known, LOOK_SECONDS):
                pass
            if self._error is not None:
                engine.streams.discard(self)
                raise self._error
            if self._done():
                engine.streams.discard(self)
                raise StopIteration
            ids = []
            for request_id in islice(self._ids, self._position, self._position + _TAKE):
                if request_id is None:
                    break
                ids.append(request_id)
        rows = engine.call(engine.core.db(engine.core.store.outcomes, ids))
        for request_id in ids:
            outcome = rows[request_id].outcome
            assert outcome is not None  # noqa: S101 - what `outcomes` returns is settled
            self._loaded.append((self._position, request_id, outcome))
            self._position += 1

    async def _hand_out(self, ids: list[str]) -> None:
        for request_id in ids:
            self._engine.accumulator.hand_out(request_id)
        await self._engine.accumulator.flush_handed_out()

    def _next_is_known(self) -> bool:
        return self._error is not None or self._next_is_settled() or self._done()

    def _next_is_settled(self) -> bool:
        return self._position < len(self._ids) and self._ids[self._position] is not None

    def _done(self) -> bool:
        return self._fed and self._position >= len(self._ids)

    def _feed(self) -> None:
        engine = self._engine
        deadline_seconds, batching, link = self._options
        group = self._group
        try:
            source = iter(self._payloads)
            while payloads := list(islice(source, ADMIT_CHUNK)):
                parcels = []
                for payload in payloads:
                    position = len(self._ids)
                    listener = self._listener(position)
                    parcels.append(engine.parcel(payload, listener, deadline_seconds, batching, self._run, group, link))
                    self._ids.append(None)
                engine.check_open()
                engine.accumulator.put(parcels)
                with self._changed:
                    self.admitted += len(parcels)
                self._hold_back(group)
            group.close()
            engine.nudge()
            with self._changed:
                self._fed = True
                self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised again where the stream is read
            self.fail(error)

    def _hold_back(self, group: Group) -> None:
        """Let the store catch up, so that payloads do not pile up in memory."""
        with self._changed:
            while self._error is None and self.admitted - group.admitted > 2 * ADMIT_CHUNK:
                self._changed.wait(0.02)

    def _listener(self, position: int) -> Callable[[str, Outcome], None]:
        def settled(request_id: str, outcome: Outcome) -> None:
            with self._changed:
                self._ids[position] = request_id
                self.settled += 1
                self.failed += not outcome.succeeded
                if self._fed or position == self._position:
                    self._changed.notify_all()

        return settled
