"""Jobs under way: looked at until they end, then collected.

Looking costs nothing and is never a reason to send again. Collecting writes outcomes as they stream in; if the
process dies in the middle the whole of it is read again, and what is already stored stays as it is.
"""

from __future__ import annotations

from typing import Any

from presort.engine.core import Core, backoff
from presort.engine.failpoints import reach
from presort.engine.settler import Settler
from presort.engine.submitter import KEY_PAUSE_SECONDS
from presort.job import Job, JobState
from presort.providers import provider
from presort.providers.base import ChannelError, Failure, Provider, Refusal, RefusedError
from presort.providers.channel import HttpChannel
from presort.request import Outcome, OutcomeKind, split_custom_id
from presort.routing import REJECTED, Step, next_step
from presort.store.base import ClaimedJob, Settlement
from presort.telemetry import logger, warn

CANCEL_PAUSE_SECONDS = 5.0
GRACE_SECONDS = 900.0
"""How long after its deadline a batch may take to end or to be read before its callers get a named error."""

LATE_PAUSE_SECONDS = 3_600.0
"""How often a batch is looked at whose callers have given up; its spend still counts."""

_CHUNK = 500


class Poller:
    """Owns SUBMITTED, COLLECTING and, with a batch, NEEDS_KEY."""

    def __init__(self, core: Core, settler: Settler) -> None:
        self._core = core
        self._settler = settler

    async def work(self, claimed: ClaimedJob) -> None:
        """Take a claimed job one step further and let go of it."""
        core, job, key = self._core, claimed.job, claimed.key
        vendor = provider(key.provider)
        channel = await core.keyring.channel(key, job)
        if channel is None:
            await self._needs_key(job, f"no key for its account; set {vendor.key_variable} or `configure(keys=…)`")
            await self._give_up_if_overdue(claimed, "no key to read it with")
            return
        try:
            if job.state is not JobState.COLLECTING:
                ended = await self._look(claimed, vendor, channel)
                if ended is None:
                    return
                claimed = ended
            await self._collect(claimed, vendor, channel)
        except RefusedError as refusal:
            if vendor.classify(refusal) is Refusal.KEY:
                await core.keyring.refused(key)
                await self._needs_key(claimed.job, f"the vendor rejected the key (HTTP {refusal.status})")
            else:
                await self._failed_look(claimed, refusal)
        except ChannelError as error:
            await self._failed_look(claimed, error)

    async def _look(self, claimed: ClaimedJob, vendor: Provider, channel: HttpChannel) -> ClaimedJob | None:
        """Look once; return the job as COLLECTING if its batch has ended, else let go of it."""
        core, job, key = self._core, claimed.job, claimed.key
        look = await vendor.check(channel, key, job)
        now = core.clock()
        if look.failure is not None:
            await self._rejected(claimed, vendor, look.failure)
            return None
        if look.progress.ended:
            changes = {"state": JobState.COLLECTING, "ended_at": now, "failures": 0, "note": None, "due_at": now}
            changed = await core.db(core.store.update_job, job, changes)
            reach("poller.ended")
            return None if changed is None else ClaimedJob(changed, key)
        progress = look.progress
        note = f"{progress.succeeded + progress.failed} of {job.count} done" if progress.succeeded else None
        if now < job.deadline:
            pause = min(core.settings.batching.poll_interval_seconds, job.deadline - now)
            await self._snooze(job, {"due_at": now + pause, "note": note})
            return None
        if job.cancelled_at is None:
            logger.info("batch %s is past its deadline: cancelling it", job.batch_id)
            await vendor.cancel(channel, key, job)
            reach("poller.cancelled")
            changes = {"cancelled_at": now, "note": "past its deadline; cancelled, waiting for what finished"}
            await self._snooze(job, {**changes, "due_at": now + self._short_pause()})
            return None
        await self._snooze(job, {"due_at": now + self._short_pause()})
        await self._give_up_if_overdue(claimed, "it goes on running though it was cancelled")
        return None

    async def _collect(self, claimed: ClaimedJob, vendor: Provider, channel: HttpChannel) -> None:
        core, job, key = self._core, claimed.job, claimed.key
        runs = {row.id: row.run for row in await core.db(core.store.unsettled, job.id, job.count)}
        expected = set(await core.db(core.store.custom_ids, job.id))
        seen: set[str] = set()
        unfinished: dict[str, Outcome] = {}
        chunk: list[Settlement] = []
        now = core.clock()
        reach("poller.collecting")
        rows = vendor.collect(channel, key, job)
        try:
            async for row in rows:
                parts = split_custom_id(row.custom_id)
                if parts is None or row.custom_id not in expected or row.custom_id in seen:
                    warn(f"rows:{job.id}", f"batch {job.batch_id} holds a foreign or repeated row `{row.custom_id}`")
                    continue
                seen.add(row.custom_id)
                request_id, attempt = parts
                batching = core.batching_of(request_id)
                left = job.deadline - now
                step = next_step(row.outcome, attempt=attempt, seconds_left=left, batching=batching)
                if step is Step.FINAL:
                    run = runs.get(request_id)
                    chunk.append(core.settlement(request_id, row.custom_id, key, row.outcome, run))
                else:
                    unfinished[request_id] = row.outcome
                if len(chunk) >= _CHUNK:
                    await core.settle(chunk)
                    reach("poller.stored")
                    chunk = []
        finally:
            await rows.aclose()
            # what has arrived is kept even if the rest did not
            await core.settle(chunk)
        reach("poller.collected")
        missing = self._settler.missing(claimed)
        await self._settler.resolve(claimed, lambda request: unfinished.get(request.id, missing))

    async def _rejected(self, claimed: ClaimedJob, vendor: Provider, failure: Failure) -> None:
        """The vendor rejected the batch after it took it: nothing ran, nothing is billed."""
        core, job = self._core, claimed.job
        if failure.retryable:
            warn(f"limit:{job.key_id}", f"{vendor.title} rejected a batch of {job.count}: {failure.message}")
            await self._settler.halve(claimed, failure.message, core.settings.batching.poll_interval_seconds)
            return
        if failure.line is not None:
            ids = await core.db(core.store.custom_ids, job.id)
            culprit = split_custom_id(ids[failure.line - 1]) if 0 < failure.line <= len(ids) else None
            if culprit is not None:
                body = vendor.error_body(400, failure.message)
                outcome = Outcome(OutcomeKind.ERRORED, 400, body, reason=failure.message, batch_id=job.batch_id)
                await core.settle([Settlement(culprit[0], outcome)])
                reach("poller.blamed")
        body = vendor.error_body(502, f"presort: {REJECTED}: {failure.message}")
        rest = Outcome(OutcomeKind.ERRORED, 502, body, reason=REJECTED, batch_id=job.batch_id)
        await self._settler.resolve(claimed, lambda _: rest, rebatch=failure.line is not None)

    async def _failed_look(self, claimed: ClaimedJob, error: ChannelError) -> None:
        job = claimed.job
        failures = job.failures + 1
        pause = min(backoff(failures, 0.5), self._core.settings.batching.poll_interval_seconds * 5)
        note = f"cannot read it, trying again: {error}"
        warn(f"look:{job.key_id}", f"batch {job.batch_id}: {note}")
        changes = {"due_at": self._core.clock() + pause, "failures": failures, "note": note[:500]}
        await self._snooze(job, changes)
        await self._give_up_if_overdue(claimed, f"it could not be read: {error}")

    async def _give_up_if_overdue(self, claimed: ClaimedJob, why: str) -> None:
        """Long past the deadline callers get a named error; the batch itself is followed on, for its spend."""
        core, job = self._core, claimed.job
        if core.clock() < job.deadline + GRACE_SECONDS:
            return
        await self._settler.abandon(claimed, f"no answer {GRACE_SECONDS:.0f} s past the deadline: {why}")
        await core.db(core.store.update_job, job, {"due_at": core.clock() + LATE_PAUSE_SECONDS}, release=True)

    async def _needs_key(self, job: Job, note: str) -> None:
        pause = KEY_PAUSE_SECONDS
        state = JobState.NEEDS_KEY if job.state is not JobState.COLLECTING else job.state
        await self._snooze(job, {"state": state, "due_at": self._core.clock() + pause, "note": note})
        warn(f"needs_key:{job.key_id}", f"batch {job.batch_id} waits for a key: {note}")

    async def _snooze(self, job: Job, changes: dict[str, Any]) -> None:
        await self._core.db(self._core.store.update_job, job, changes, release=True)

    def _short_pause(self) -> float:
        return min(CANCEL_PAUSE_SECONDS, self._core.settings.batching.poll_interval_seconds)
