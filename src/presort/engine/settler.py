"""What a batch did not answer: into the next batch, by the standard route, or a named error.

Sends by the standard route too. If the process dies while one is on the wire it is in doubt: it was recorded as
ON_STANDARD before it was sent, the next process books possible spend and sends it again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec

from presort.engine.accumulator import new_job
from presort.engine.core import Core, backoff
from presort.engine.failpoints import reach
from presort.providers import provider
from presort.providers.base import AnswerLostError, ChannelError, NotSentError, Provider, RefusedError
from presort.request import Outcome, OutcomeKind, Request, Route
from presort.routing import MISSING, RETRYABLE_STATUSES, Step, next_step
from presort.store.base import ClaimedJob, ClaimedRequest, LedgerRow, Settlement, Spend
from presort.telemetry import fell_back, logger, warn

P = ParamSpec("P")

STANDARD_TRIES = 4
"""Times the standard route is tried for one request before its last answer stands."""

_NO_KEY_PAUSE_SECONDS = 5.0


class Settler:
    """Owns what leaves a job without its answer, and the standard route."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._tries: Counter[str] = Counter()
        self._sending: set[asyncio.Task[None]] = set()
        self._rest_until = 0.0

    # -- jobs ----------------------------------------------------------------------------------------------------
    async def too_late(self, claimed: ClaimedJob) -> None:
        """A job's deadline passed before it could be submitted."""
        await self.resolve(claimed, lambda _: self._stated(claimed, OutcomeKind.EXPIRED, 504, "its deadline passed"))

    async def start_over(self, claimed: ClaimedJob, why: str) -> None:
        """A job's create provably made nothing: the same requests in a new job."""
        await self.resolve(claimed, lambda _: self._stated(claimed, OutcomeKind.CANCELLED, 504, why))

    async def all_to_standard(self, claimed: ClaimedJob, reason: str) -> None:
        """A job can never be submitted where it should go."""
        stated = self._stated(claimed, OutcomeKind.ERRORED, 501, reason)
        await self.resolve(claimed, lambda _: stated, rebatch=False, insist=True)

    async def refused_whole(self, claimed: ClaimedJob, outcome: Outcome) -> None:
        """The vendor refused a job as invalid: each request shall hear by itself whether it is."""
        await self.resolve(claimed, lambda _: outcome, rebatch=False, insist=True)

    async def abandon(self, claimed: ClaimedJob, why: str) -> None:
        """Callers stop waiting for a job that may still run: it cannot be sent again, and its answers may yet come."""
        rows = await self._core.db(self._core.store.unsettled, claimed.job.id, claimed.job.count)
        stated = self._stated(claimed, OutcomeKind.ERRORED, 504, why)
        await self._core.settle([Settlement(row.id, stated) for row in rows])

    async def halve(self, claimed: ClaimedJob, why: str, pause_seconds: float = 0.0) -> None:
        """Put a job's requests into two jobs of half the size; nothing of it ran."""
        core = self._core
        rows = await core.db(core.store.unsettled, claimed.job.id, claimed.job.count)
        middle = (len(rows) + 1) // 2
        now = core.clock()
        for part in (rows[:middle], rows[middle:]):
            job = new_job(claimed.key, now, now + pause_seconds)
            await core.db(core.store.regroup, job, claimed.job.id, [row.id for row in part])
            reach("settler.halved")
        logger.info("%s: %s; now in halves", claimed.job.id, why)
        await self._complete(claimed)

    async def resolve(
        self,
        claimed: ClaimedJob,
        outcome_of: Callable[[Request], Outcome],
        *,
        rebatch: bool = True,
        insist: bool = False,
    ) -> None:
        """Decide for every request still open in a job what follows, do it, and complete the job.

        Args:
            claimed: The job; nothing of it runs at the vendor any more.
            outcome_of: What the batch made of a request.
            rebatch: Whether another batch is worth trying.
            insist: Whether even a final refusal is tried by the standard route, where fallback is on.
        """
        core, job, key = self._core, claimed.job, claimed.key
        now = core.clock()
        final: list[Settlement] = []
        again: list[str] = []
        standard: dict[str, list[str]] = {}
        for row in await core.db(core.store.unsettled, job.id, job.count):
            outcome = outcome_of(row)
            left = row.deadline - now if rebatch else 0.0
            batching = core.batching_of(row.id)
            step = next_step(outcome, attempt=row.attempt, seconds_left=left, batching=batching)
            if step is Step.REBATCH:
                again.append(row.id)
            elif step is Step.STANDARD or (insist and batching.fallback):
                standard.setdefault(outcome.reason or outcome.kind.value, []).append(row.id)
            else:
                final.append(core.settlement(row.id, row.custom_id, key, outcome, row.run))
        await core.settle(final)
        reach("settler.settled")
        if again:
            await core.db(core.store.regroup, new_job(key, now), job.id, again)
            core.jobs_due.set()
            reach("settler.regrouped")
        for reason, ids in standard.items():
            count = await core.db(core.store.reroute, ids, reason)
            fell_back(reason, count)
            reach("settler.rerouted")
        if standard:
            core.standard_due.set()
        await self._complete(claimed)

    async def _complete(self, claimed: ClaimedJob) -> None:
        core = self._core
        if await core.db(core.store.complete_job, claimed.job, core.clock()):
            reach("settler.completed")
            return
        # a request slipped in between: look again at once
        await core.db(core.store.update_job, claimed.job, {"due_at": core.clock()}, release=True)
        core.jobs_due.set()

    def missing(self, claimed: ClaimedJob) -> Outcome:
        """What a request came to that its ended batch did not mention."""
        return self._stated(claimed, OutcomeKind.ERRORED, 502, MISSING)

    def _stated(self, claimed: ClaimedJob, kind: OutcomeKind, status: int, reason: str) -> Outcome:
        vendor = provider(claimed.key.provider)
        handle = f" (batch {claimed.job.batch_id})" if claimed.job.batch_id else ""
        body = vendor.error_body(status, f"presort: {reason}{handle}")
        return Outcome(kind, status, body, reason=reason, batch_id=claimed.job.batch_id)

    # -- the standard route --------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Send what waits for the standard route, a bounded number at once, until cancelled."""
        core = self._core
        most = core.settings.http.standard_concurrency
        while True:
            try:
                async with asyncio.timeout(1.0):
                    await core.standard_due.wait()
            except TimeoutError:
                pass
            core.standard_due.clear()
            free = most - len(self._sending)
            if free <= 0 or core.clock() < self._rest_until:
                continue
            try:
                for claimed in await core.db(core.store.claim_standard, core.owner, core.clock(), free):
                    task = asyncio.create_task(self._send(claimed))
                    self._sending.add(task)
                    task.add_done_callback(self._sent)
            except Exception as error:  # noqa: BLE001 - the loop must outlive a store that is locked or full
                warn("standard", f"cannot read the store, trying again: {error}")

    async def rescue(self) -> None:
        """Take over standard calls of dead processes: booked as possibly paid for by the store, to be sent again."""
        core = self._core
        rescued = await core.db(core.store.rescue_standard, core.clock())
        if rescued:
            warn("in_doubt", f"{len(rescued)} standard calls were cut off by a crash: in doubt, sent again")
            core.standard_due.set()

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._core.standard_due.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            warn("standard", f"a standard call could not be settled: {error!r}")

    async def _send(self, claimed: ClaimedRequest) -> None:
        core, request, key = self._core, claimed.request, claimed.key
        vendor = provider(key.provider)
        channel = await core.keyring.channel(key)
        if channel is None:
            await self._surely(core.db, core.store.release_standard, core.owner, [request.id], sent=False)
            self._rest_until = core.clock() + _NO_KEY_PAUSE_SECONDS
            warn(f"needs_key:{key.id}", f"fallbacks wait for a key of their account; set {vendor.key_variable}")
            return
        headers = {"content-type": "application/json", **core.original_headers(request.id), **dict(key.headers)}
        self._tries[request.id] += 1
        last = self._tries[request.id] >= STANDARD_TRIES
        pause: float
        reach("standard.sending")
        try:
            reply = await channel.send("POST", key.endpoint, headers=headers, content=request.body)
        except NotSentError as error:
            outcome = self._failed(vendor, 503, f"cannot reach {key.base_url}: {error}")
            pause = backoff(self._tries[request.id])
        except RefusedError as refusal:
            outcome = Outcome(OutcomeKind.ERRORED, refusal.status, refusal.body, route=Route.STANDARD)
            last = last or refusal.status not in RETRYABLE_STATUSES
            pause = refusal.retry_after_seconds or backoff(self._tries[request.id])
        except ChannelError as error:
            if isinstance(error, AnswerLostError):
                await self._surely(core.db, core.store.book, [self._doubt(claimed)])
            outcome = self._failed(vendor, 502, f"the answer was lost: {error}")
            pause = backoff(self._tries[request.id])
        else:
            reach("standard.sent")
            usage = vendor.read_usage(reply.body)
            outcome = Outcome(OutcomeKind.SUCCEEDED, reply.status, reply.body, usage, Route.STANDARD, claimed.reason)
            last = True
        if last:
            self._tries.pop(request.id, None)
            settlement = core.settlement(request.id, request.custom_id, key, outcome, request.run)
            await self._surely(core.settle, [settlement])
            reach("standard.settled")
            return
        await asyncio.sleep(pause)
        await self._surely(core.db, core.store.release_standard, core.owner, [request.id])

    async def _surely(self, action: Callable[P, Awaitable[Any]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Write to the store however often it takes: what was claimed here nobody else will free while we live."""
        while True:
            try:
                await action(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - a full disk, a lock held for long
                warn("standard", f"cannot write to the store, trying again: {error}")
                await asyncio.sleep(1.0)
            else:
                return

    def _failed(self, vendor: Provider, status: int, reason: str) -> Outcome:
        body = vendor.error_body(status, f"presort: {reason}")
        return Outcome(OutcomeKind.ERRORED, status, body, route=Route.STANDARD, reason=reason)

    def _doubt(self, claimed: ClaimedRequest) -> LedgerRow:
        return LedgerRow(
            custom_id=claimed.request.custom_id,
            spend=Spend.IN_DOUBT,
            route=Route.STANDARD,
            provider=claimed.key.provider,
            model=claimed.key.model,
            account=claimed.key.account,
            at=self._core.clock(),
            usage=None,
            baseline_usd=None,
            actual_usd=None,
            run=claimed.request.run,
        )
