"""The lease of this process, and the jobs it claims by it.

A process that goes silent for `lease_seconds` loses its jobs to whoever claims them next; a fence that rises with
each claim keeps its late writes out.
"""

from __future__ import annotations

import asyncio

from presort.engine.core import Core, backoff, process_is_gone
from presort.engine.failpoints import reach
from presort.engine.poller import Poller
from presort.engine.settler import Settler
from presort.engine.submitter import Submitter
from presort.errors import StoreError
from presort.job import JobState
from presort.store.base import ClaimedJob
from presort.telemetry import warn

MAX_JOBS_AT_ONCE = 16
_IDLE_SECONDS = 2.0
_LEASED_PAUSE_SECONDS = 0.5
_SWEEP_SECONDS = 1.0
_SWEEP_MARGIN_SECONDS = 5.0
_SWEEP_PAGE = 2_000
PRUNE_SECONDS = 3_600.0
KEEP_ROWS_SECONDS = 30 * 86_400.0
"""How long a settled request's row, without prompt and answer, is kept."""


class Worker:
    """Claims due jobs and hands each to the part that owns its state."""

    def __init__(self, core: Core, submitter: Submitter, poller: Poller, settler: Settler) -> None:
        self._core = core
        self._submitter = submitter
        self._poller = poller
        self._settler = settler
        self._active: dict[str, asyncio.Task[None]] = {}
        self._swept_to = 0.0

    async def join(self) -> None:
        """Register this process, and bury those of this machine that are provably gone."""
        core = self._core
        now = core.clock()
        await core.db(core.store.join, core.owner, core.host, core.pid, now, core.settings.lease_seconds)
        for owner, host, pid in await core.db(core.store.owners, now):
            if owner != core.owner and process_is_gone(host, pid):
                await core.db(core.store.leave, owner)
        self._swept_to = now
        await self._settler.rescue()

    async def run(self) -> None:
        """Claim and dispatch until cancelled."""
        core = self._core
        while True:
            pause = _IDLE_SECONDS
            try:
                free = MAX_JOBS_AT_ONCE - len(self._active)
                if free > 0:
                    now, lease = core.clock(), core.settings.lease_seconds
                    for claimed in await core.db(core.store.claim_jobs, core.owner, now, lease, free):
                        reach("worker.claimed")
                        self._active[claimed.job.id] = asyncio.create_task(self._work(claimed))
                due = await core.db(core.store.next_due)
                if due is not None and free > 0:
                    left = due - core.clock()
                    # one that is due and was not claimed is under somebody's lease
                    pause = min(pause, max(0.01, left) if left > 0 else _LEASED_PAUSE_SECONDS)
            except Exception as error:  # noqa: BLE001 - the loop must outlive a store that is locked, full or away
                warn("worker", f"cannot read the store, trying again: {error}")
                pause = 1.0
            try:
                async with asyncio.timeout(pause):
                    await core.jobs_due.wait()
            except TimeoutError:
                pass
            core.jobs_due.clear()

    async def keep_alive(self) -> None:
        """Prolong the leases, rescue what the dead left, and wake waiters of work done elsewhere; until cancelled."""
        core = self._core
        lease = core.settings.lease_seconds
        prune_at = 0.0
        beat_at = core.clock()
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, lease / 3))
            try:
                await self._sweep()
                now = core.clock()
                if now - beat_at < lease / 3 and now >= beat_at:
                    continue
                beat_at = now
                if not await core.db(core.store.heartbeat, core.owner, now, lease):
                    await core.db(core.store.join, core.owner, core.host, core.pid, now, lease)
                await core.db(core.store.renew, core.owner, list(self._active), now, lease)
                core.trouble.pop("lease", None)
                await self._settler.rescue()
                if now >= prune_at:
                    await core.db(core.store.prune, now, core.settings.replay_seconds, KEEP_ROWS_SECONDS)
                    prune_at = now + PRUNE_SECONDS
            except Exception as error:  # noqa: BLE001 - a missed beat costs the lease at worst
                core.note_trouble("lease", error)
                warn("lease", f"cannot reach the store, trying again: {error}")

    async def stop(self) -> None:
        """Let go of everything at once: another process may take over now."""
        for task in self._active.values():
            task.cancel()
        await asyncio.gather(*self._active.values(), return_exceptions=True)
        await self._core.db(self._core.store.leave, self._core.owner)

    async def _work(self, claimed: ClaimedJob) -> None:
        core, job = self._core, claimed.job
        try:
            early = job.state in {JobState.PENDING, JobState.SUBMITTING}
            if early or (job.state is JobState.NEEDS_KEY and job.batch_id is None):
                await self._submitter.work(claimed)
            else:
                await self._poller.work(claimed)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job stays and is tried again
            cause = "store" if isinstance(error, StoreError) else f"job:{job.id}"
            warn(cause, f"job {job.id} ran into {error!r}; trying again")
            changes = {
                "due_at": core.clock() + backoff(job.failures),
                "failures": job.failures + 1,
                "note": f"{type(error).__name__}: {error}"[:500],
            }
            try:
                await core.db(core.store.update_job, job, changes, release=True)
            except Exception as second:  # noqa: BLE001 - then the lease runs out by itself
                warn("worker", f"cannot write to the store: {second}")
        finally:
            self._active.pop(job.id, None)
            core.jobs_due.set()

    async def _sweep(self) -> None:
        """Wake waiters whose requests another process has settled."""
        core = self._core
        if not core.waiters:
            self._swept_to = core.clock()
            return
        since = self._swept_to - _SWEEP_MARGIN_SECONDS
        while True:
            settled = await core.db(core.store.settled_since, since, _SWEEP_PAGE)
            mine = [request_id for request_id, _at in settled if request_id in core.waiters]
            if mine:
                rows = await core.db(core.store.outcomes, mine)
                core.waiters.deliver({key: row.outcome for key, row in rows.items() if row.outcome is not None})
            if len(settled) < _SWEEP_PAGE:
                break
            since = max(settled[-1][1], since + 1e-6)
        self._swept_to = core.clock()
