"""Jobs out: PENDING to SUBMITTED, and the search for a create whose answer was lost.

What is stored when the process dies:
- before `mark_creating`: PENDING; nothing that costs was sent, submit again (an upload may lie at the vendor, unused)
- after it: SUBMITTING with `create_at`; in doubt, so search before anything else
- after the batch id is stored: SUBMITTED, the poller's
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from presort.engine.core import Core, backoff
from presort.engine.failpoints import reach
from presort.engine.settler import Settler
from presort.job import Job, JobState
from presort.providers import provider
from presort.providers.base import (
    AnswerLostError,
    ChannelError,
    GarbledError,
    NotSentError,
    Provider,
    Refusal,
    RefusedError,
)
from presort.providers.channel import HttpChannel
from presort.request import BatchKey, Outcome, OutcomeKind
from presort.store.base import ClaimedJob
from presort.telemetry import logger, warn

KEY_PAUSE_SECONDS = 5.0
LIMIT_PAUSE_SECONDS = 300.0
_BUSY_PAUSE_SECONDS = 0.5
_SEARCH_PAUSE_SECONDS = 2.0
_ROW_PAGE = 200

_TIMED_OUT = 408
"""The one refusal of a create that may come from a gateway although the vendor took it; providers see to the 5xx."""


class _BusyError(Exception):
    """Another create of the account is in doubt, or this job is no longer ours."""


class Submitter:
    """Owns PENDING, SUBMITTING and, without a batch, NEEDS_KEY."""

    def __init__(self, core: Core, settler: Settler) -> None:
        self._core = core
        self._settler = settler
        self._turns: dict[tuple[str, str, str], asyncio.Lock] = {}

    async def work(self, claimed: ClaimedJob) -> None:
        """Take a claimed job one step further and let go of it."""
        core, job, key = self._core, claimed.job, claimed.key
        vendor = provider(key.provider)
        channel = await core.keyring.channel(key, job)
        if job.create_at is None and core.clock() >= job.deadline:
            await self._settler.too_late(claimed)
            return
        if channel is None:
            await self._needs_key(job, vendor)
            return
        if job.create_at is not None:
            await self._search(claimed, vendor, channel)
            return
        # one create at a time per account, so that one in doubt can be told apart
        turn = self._turns.setdefault((key.provider, key.base_url, key.account), asyncio.Lock())
        async with turn:
            await self._submit(claimed, vendor, channel)

    async def _submit(self, claimed: ClaimedJob, vendor: Provider, channel: HttpChannel) -> None:
        core, key = self._core, claimed.key
        steps = _Steps(core, claimed)
        rows = _StoredRows(core, claimed.job)
        reach("submitter.submit")
        try:
            batch_id = await vendor.submit(channel, key, claimed.job, rows, steps)
        except _BusyError:
            await self._again(steps.job, _BUSY_PAUSE_SECONDS, "another create of this account is not settled yet")
        except NotSentError as error:
            await self._again(
                steps.job, backoff(claimed.job.failures), f"cannot reach {key.base_url}: {error}", failed=True
            )
        except RefusedError as refusal:
            if steps.job.create_at is not None and refusal.status == _TIMED_OUT:
                await self._in_doubt(steps.job, str(refusal))
            else:
                await self._refused(claimed, steps.job, vendor, refusal)
        except (AnswerLostError, GarbledError) as error:
            if steps.job.create_at is not None:
                await self._in_doubt(steps.job, f"the answer to the create was lost: {error}")
            else:
                await self._again(
                    steps.job, backoff(claimed.job.failures), f"the upload broke off: {error}", failed=True
                )
        else:
            reach("submitter.created")
            await self._submitted(steps.job, key, batch_id)

    async def _submitted(self, job: Job, key: BatchKey, batch_id: str) -> None:
        now = self._core.clock()
        pause = min(self._core.settings.batching.poll_interval_seconds, max(0.0, job.deadline - now))
        changes = {
            "state": JobState.SUBMITTED,
            "batch_id": batch_id,
            "submitted_at": now,
            "due_at": now + pause,
            "failures": 0,
            "note": None,
        }
        await self._core.db(self._core.store.update_job, job, changes, release=True)
        reach("submitter.submitted")
        logger.info("submitted %s as %s batch %s (%d requests)", job.id, key.provider, batch_id, job.count)

    async def _search(self, claimed: ClaimedJob, vendor: Provider, channel: HttpChannel) -> None:
        """Reconcile: find the batch of a create that nobody answered, or rule it out."""
        core, job, key = self._core, claimed.job, claimed.key
        looked_at = core.clock()
        try:
            ids = await core.db(core.store.custom_ids, job.id)
            finding = await vendor.find(channel, key, job, ids, self._known)
        except RefusedError as refusal:
            if vendor.classify(refusal) is Refusal.KEY:
                await core.keyring.refused(key)
            await self._again_in_doubt(job, f"cannot search for the batch: {refusal}")
            return
        except ChannelError as error:
            await self._again_in_doubt(job, f"cannot search for the batch: {error}")
            return
        if finding.batch_id is not None:
            logger.info("found the batch of %s again: %s", job.id, finding.batch_id)
            await self._submitted(job, key, finding.batch_id)
            return
        if finding.waiting_for is not None:
            await self._again_in_doubt(job, f"its create is in doubt; waiting for {finding.waiting_for}")
            return
        assert job.create_at is not None  # noqa: S101 - what `work` branched on
        absent_at = min(job.create_at + core.settings.reconcile_window_seconds, max(job.deadline, job.create_at))
        if looked_at < absent_at:
            left = absent_at - looked_at
            note = f"its create is in doubt and not at the vendor; counts as never made in {left:.0f} s"
            await self._again_in_doubt(job, note, at_most=left)
            return
        # new custom_ids, and a new label: should the old batch turn up after all, it can be told apart
        reach("submitter.absent")
        await self._settler.start_over(claimed, "its create never arrived")

    async def _known(self, batch_id: str) -> bool:
        return await self._core.db(self._core.store.knows_batch, batch_id)

    async def _refused(self, claimed: ClaimedJob, job: Job, vendor: Provider, refusal: RefusedError) -> None:
        key = claimed.key
        meaning = vendor.classify(refusal)
        if meaning is Refusal.KEY:
            await self._core.keyring.refused(key)
            await self._needs_key(job, vendor, f"the vendor rejected the key (HTTP {refusal.status})")
        elif meaning is Refusal.LATER:
            pause = refusal.retry_after_seconds
            await self._again(job, backoff(job.failures) if pause is None else pause, str(refusal), failed=True)
        elif meaning is Refusal.LIMIT:
            warn(f"limit:{key.account}", f"{vendor.title} refuses batches until a limit is lifted: {refusal}")
            await self._again(job, LIMIT_PAUSE_SECONDS, str(refusal))
        elif meaning is Refusal.SMALLER and job.count > 1:
            await self._settler.halve(claimed, "the vendor called the batch too large")
        elif meaning is Refusal.NO_BATCH:
            self._core.no_batch_api.add(key.base_url)
            await self._settler.all_to_standard(claimed, f"no Batch API at {key.base_url} (HTTP {refusal.status})")
        else:
            outcome = Outcome(OutcomeKind.ERRORED, refusal.status, refusal.body, reason="the vendor refused its batch")
            await self._settler.refused_whole(claimed, outcome)

    async def _needs_key(self, job: Job, vendor: Provider, why: str | None = None) -> None:
        note = why or f"no key for its account; set {vendor.key_variable} or `configure(keys=…)`"
        changes = {
            "state": JobState.NEEDS_KEY if job.create_at is None else job.state,
            "due_at": self._core.clock() + KEY_PAUSE_SECONDS,
            "note": note,
        }
        if why is not None:
            changes |= {"state": JobState.NEEDS_KEY, "create_at": None}
        await self._core.db(self._core.store.update_job, job, changes, release=True)
        warn(f"needs_key:{job.key_id}", f"a job of {job.count} requests waits for a key: {note}")

    async def _again(self, job: Job, pause: float, note: str, *, failed: bool = False) -> None:
        """Nothing came to be: the same later."""
        now = self._core.clock()
        changes = {
            "state": JobState.PENDING,
            "create_at": None,
            "due_at": min(now + pause, max(job.deadline, now + _BUSY_PAUSE_SECONDS)),
            "failures": job.failures + 1 if failed else job.failures,
            "note": note,
        }
        await self._core.db(self._core.store.update_job, job, changes, release=True)
        if failed:
            warn(f"submit:{job.key_id}", f"a job of {job.count} requests could not be submitted yet: {note}")

    async def _in_doubt(self, job: Job, note: str) -> None:
        warn(f"doubt:{job.key_id}", f"{note}; looking for the batch before anything else is sent")
        await self._again_in_doubt(job, note, at_most=_SEARCH_PAUSE_SECONDS)

    async def _again_in_doubt(self, job: Job, note: str, *, at_most: float | None = None) -> None:
        pause = min(self._core.settings.batching.poll_interval_seconds, backoff(job.failures, _SEARCH_PAUSE_SECONDS))
        if at_most is not None:
            pause = min(pause, max(at_most, 0.1))
        changes = {"due_at": self._core.clock() + pause, "failures": job.failures + 1, "note": note}
        await self._core.db(self._core.store.update_job, job, changes, release=True)


class _Steps:
    """Makes a provider's steps durable."""

    def __init__(self, core: Core, claimed: ClaimedJob) -> None:
        self._core = core
        self._key = claimed.key
        self.job = claimed.job

    async def uploaded(self, ref: str) -> None:
        reach("submitter.uploaded")
        changed = await self._core.db(self._core.store.update_job, self.job, {"input_ref": ref})
        if changed is None:
            raise _BusyError
        self.job = changed

    async def creating(self) -> None:
        changed = await self._core.db(self._core.store.mark_creating, self.job, self._key, self._core.clock())
        if changed is None:
            raise _BusyError
        self.job = changed
        reach("submitter.creating")


class _StoredRows:
    """A job's requests, a page at a time from the store."""

    def __init__(self, core: Core, job: Job) -> None:
        self._core = core
        self._job = job

    @property
    def count(self) -> int:
        return self._job.count

    @property
    def size_bytes(self) -> int:
        return self._job.size_bytes

    async def __aiter__(self) -> AsyncIterator[tuple[str, bytes]]:
        after: str | None = None
        while page := await self._core.db(self._core.store.rows, self._job.id, after, _ROW_PAGE):
            for row in page:
                yield row
            after = page[-1][0]
