"""Carries batches forward, whichever vendor's they are.

Nothing moves by itself: `settle` does what should have happened by now, in slices so
that other requests are served in between. It is called when somebody looks, and by
a timer. A slice is one transaction: outcomes, bill and cache entries are stored
together, so a killed emulator neither forgets a bill nor bills twice.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Protocol

from presort.emulator.billing import Meter, Usage
from presort.emulator.cache import Reader
from presort.emulator.clock import Clock
from presort.emulator.faults import Fault, strikes_row
from presort.emulator.lifecycle import Ending, Result, Window, finish_time, progress
from presort.emulator.settings import Settings
from presort.emulator.state import Batch, Entry, State, Tenant

logger = logging.getLogger(__name__)

SLICE = 100
REPLACING = {"row_error", "row_expired", "row_null_response"}


@dataclass(frozen=True)
class Outcome:
    """What became of one request: succeeded, errored, expired or canceled, and its line in the results."""

    kind: str
    line: str
    model: str = ""
    usage: Usage | None = None


class Worker(Protocol):
    """What a vendor does with its own batches."""

    vendor: str
    window: Window

    async def load(self, batch: Batch) -> None:
        """Read the input: set `size` and store the entries, or set `ending` to fail."""

    def carry_out(self, batch: Batch, entry: Entry, reader: Reader) -> Outcome:
        """Answer one request."""

    def replace(self, entry: Entry, fault: Fault) -> Outcome:
        """Answer one request as a row fault demands."""

    def leave(self, entry: Entry, kind: str) -> Outcome:
        """Give up one request as expired or canceled."""

    async def conclude(self, batch: Batch) -> None:
        """Publish the results of a batch that has just ended."""


def new_batch(
    batch_id: str,
    vendor: str,
    tenant: Tenant,
    now: float,
    settings: Settings,
    faults: dict[str, Fault],
    details: dict[str, Any],
) -> Batch:
    """A batch whose fate is decided by the faults that struck its creation."""
    created_at = now + (faults["late_create"].get("seconds", 60) if "late_create" in faults else 0)
    share, ending = 1.0, Ending.COMPLETE
    if "never_ends" in faults:
        share, ending = faults["never_ends"].get("fraction", 0.0), Ending.NEVER
    if "expire_half" in faults:
        share, ending = faults["expire_half"].get("fraction", 0.5), Ending.EXPIRE
    if "fail_batch" in faults:
        ending = Ending.FAIL
    return Batch(
        id=batch_id,
        vendor=vendor,
        organization=tenant.organization,
        workspace=tenant.workspace,
        created_at=created_at,
        listed_at=created_at + (faults["late_list"].get("seconds", 60) if "late_list" in faults else 0),
        seconds=faults["slow_batch"].get("seconds", 3_600) if "slow_batch" in faults else settings.batch_seconds,
        share=share,
        ending=ending,
        size=None,
        done=0,
        cancelled_at=None,
        ended_at=None,
        result=None,
        counts={},
        details=details,
    )


class Batches:
    """All batches of all vendors."""

    def __init__(self, state: State, clock: Clock, settings: Settings, meter: Meter) -> None:
        self._state = state
        self._clock = clock
        self._settings = settings
        self._meter = meter
        self._workers: dict[str, Worker] = {}
        self._pass: asyncio.Task[None] | None = None
        self.carried_out = 0
        """Requests answered since the start."""

    def register(self, worker: Worker) -> None:
        """Take on a vendor."""
        self._workers[worker.vendor] = worker

    async def settle(self, patience_seconds: float | None = None) -> None:
        """Do what should have happened by now.

        All callers share one pass over the batches. Whoever runs out of patience
        leaves it to itself, and sees batches that are still at work.
        """
        if not self._state.live_batches():
            return
        try:
            async with asyncio.timeout(patience_seconds):
                if self._pass is not None and not self._pass.done():
                    await asyncio.shield(self._pass)  # it may have begun before the clock was moved
                if self._pass is None or self._pass.done():
                    self._pass = asyncio.create_task(self._advance_all())
                await asyncio.shield(self._pass)
        except TimeoutError:
            pass

    async def _advance_all(self) -> None:
        for batch_id in self._state.live_batches():
            try:
                await self._advance(batch_id)
            except Exception:
                logger.exception("batch %s is stuck", batch_id)

    async def _advance(self, batch_id: str) -> None:
        batch = self._state.batch(batch_id)
        if batch is None or batch.ended_at is not None or self._clock.now() < batch.created_at:
            return
        worker = self._workers[batch.vendor]
        if batch.size is None and batch.ending != Ending.FAIL:
            await worker.load(batch)
        while (batch := self._state.batch(batch_id)) is not None:
            where = progress(batch, worker.window, self._settings.cancel_seconds, self._clock.now())
            if batch.done < where.due:
                self._carry_out_slice(batch, worker, min(where.due, batch.done + SLICE))
                await asyncio.sleep(0)
            elif where.end is not None:
                await self._end(batch, worker, *where.end)
                return
            else:
                return

    def _carry_out_slice(self, batch: Batch, worker: Worker, stop: int) -> None:
        with self._state.transaction():
            rows = []
            for entry in self._state.entries(batch.id, batch.done, stop):
                outcome, defect = self._carry_out(batch, worker, entry)
                rows.append((outcome.kind, defect, outcome.line, batch.id, entry.n))
                batch.counts[outcome.kind] = batch.counts.get(outcome.kind, 0) + 1
                if outcome.usage is not None and not batch.details.get("foreign"):
                    self._meter.add(batch.vendor, outcome.model, "batch", outcome.usage)
                    self._count_usage(batch, outcome.usage)
            self._state.finish_entries(rows)
            self._meter.store()
            self.carried_out += stop - batch.done
            batch.done = stop
            self._state.put_batch(batch)

    def _carry_out(self, batch: Batch, worker: Worker, entry: Entry) -> tuple[Outcome, str | None]:
        faults: list[Fault] = batch.details.get("row_faults", [])
        fault = next((fault for fault in faults if strikes_row(fault, entry.n)), None) if faults else None
        if fault is not None and fault["kind"] in REPLACING:
            return worker.replace(entry, fault), None
        reader = Reader(
            scope=f"foreign:{batch.id}" if batch.details.get("foreign") else "",
            now=finish_time(batch, worker.window, entry.n),
            writer=batch.id,
            hit_percent=self._settings.batch_hit_percent,
            own_hit_percent=self._settings.batch_own_hit_percent,
            luck=entry.sha256.encode(),
        )
        defect: str | None = fault["kind"] if fault else None
        return worker.carry_out(batch, entry, reader), defect

    @staticmethod
    def _count_usage(batch: Batch, usage: Usage) -> None:
        total = batch.details.setdefault("usage", {})
        for name, tokens in (
            ("prompt", usage.prompt),
            ("cache_read", usage.cache_read),
            ("output", usage.output),
        ):
            total[name] = total.get(name, 0) + tokens

    async def _end(self, batch: Batch, worker: Worker, result: Result, when: float) -> None:
        left_as = {Result.CANCELLED: "canceled", Result.EXPIRED: "expired"}.get(result)
        while left_as and batch.done < (batch.size or 0):
            stop = batch.done + SLICE * 5
            with self._state.transaction():
                outcomes = [
                    (entry.n, worker.leave(entry, left_as)) for entry in self._state.entries(batch.id, batch.done, stop)
                ]
                self._state.finish_entries([(left_as, None, one.line, batch.id, n) for n, one in outcomes])
                batch.counts[left_as] = batch.counts.get(left_as, 0) + len(outcomes)
                batch.done = min(stop, batch.size or 0)
                self._state.put_batch(batch)
            await asyncio.sleep(0)
        batch.result, batch.ended_at = result, when
        await worker.conclude(batch)
        self._state.put_batch(batch)
