"""Jobs: formed of requests, leased to one process at a time, guarded by fences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, func, or_, select, union, update

from presort.job import Job, JobState
from presort.request import BatchKey, Request, RequestState, custom_id, split_custom_id
from presort.store import rows
from presort.store.base import ClaimedJob, JobView, QueueView, Route
from presort.store.owners import Owners
from presort.store.schema import (
    NO,
    SETTLED,
    batch_keys,
    bodies,
    jobs,
    on_standard,
    owners,
    queued_for_batch,
    queued_for_standard,
    requests,
    unfinished,
)

_CHANGEABLE = frozenset(field.name for field in fields(Job)) - {"id", "key_id", "fence"}


class Jobs(Owners):
    """What is sent together."""

    def form_job(self, job: Job, request_ids: Sequence[str]) -> int:
        """Store a PENDING job of those of the requests that still are QUEUED for a batch (IN_JOB now).

        Its count, size and deadline are set from the rows; returns the count. With 0 no job is stored.
        Repeated with the same job, it returns what the first call did.

        Dying inside: the job is stored with all its requests, or they are all still queued.
        """
        return self._form(job, request_ids, select(requests.c.id).where(queued_for_batch), attempts=0)

    def regroup(self, job: Job, old_job_id: str, request_ids: Sequence[str]) -> int:
        """As `form_job`, for requests that are unsettled in an old job: attempt + 1, into the new one.

        Dying inside: all are in the new job, or all in the old one.
        """
        there = select(requests.c.id).where(
            requests.c.job_id == old_job_id, requests.c.state == RequestState.IN_JOB.value
        )
        return self._form(job, request_ids, there, attempts=1)

    def withdraw_unsent(self, ids: Sequence[str]) -> list[str]:
        """Delete those of the requests whose job nobody has begun to submit nor holds; return their ids.

        The job shrinks with them, and goes with its last one. One that another owner has attached to stays.

        Dying inside: all are withdrawn, or none.
        """
        if not ids:
            return []
        with self._db.write() as connection:
            unsent = connection.scalars(
                select(jobs.c.id)
                .where(
                    jobs.c.id.in_(select(requests.c.job_id).where(self._db.among(requests.c.id, ids))),
                    jobs.c.state.in_([JobState.PENDING.value, JobState.NEEDS_KEY.value]),
                    jobs.c.create_at.is_(None),
                    jobs.c.input_ref.is_(None),
                    jobs.c.batch_id.is_(None),
                    jobs.c.lease_owner.is_(None),
                )
                .order_by(jobs.c.id)
                .with_for_update(skip_locked=True)
            ).all()
            in_them = select(requests.c.id, requests.c.job_id, requests.c.body_bytes).where(
                self._db.among(requests.c.job_id, unsent),
                requests.c.state == RequestState.IN_JOB.value,
                requests.c.shared == NO,
            )
            found = self._lock(connection, in_them, ids)
            for job_id in sorted({row.job_id for row in found}):
                gone = [row for row in found if row.job_id == job_id]
                connection.execute(
                    update(jobs)
                    .where(jobs.c.id == job_id)
                    .values(
                        count=jobs.c.count - len(gone),
                        size_bytes=jobs.c.size_bytes - sum(row.body_bytes for row in gone),
                    )
                )
                connection.execute(delete(jobs).where(jobs.c.id == job_id, jobs.c.count <= 0))
            self._delete(connection, [row.id for row in found])
            return [row.id for row in found]

    def claim_jobs(self, owner: str, now: float, lease_seconds: float, limit: int) -> list[ClaimedJob]:
        """Lease the jobs that are due, not COMPLETED and not under a live lease (of anybody).

        Dying inside: nothing is leased; dying afterwards, the leases run out.
        """
        with self._db.write() as connection:
            found = connection.execute(
                select(*rows.JOB)
                .where(
                    unfinished,
                    jobs.c.due_at <= now,
                    or_(jobs.c.lease_until.is_(None), jobs.c.lease_until <= now),
                )
                .order_by(jobs.c.due_at, jobs.c.id)
                .limit(limit)
                .with_for_update(skip_locked=True)
            ).all()
            if not found:
                return []
            connection.execute(
                update(jobs)
                .where(self._db.among(jobs.c.id, [row.id for row in found]))
                .values(lease_owner=owner, lease_until=now + lease_seconds, fence=jobs.c.fence + 1)
            )
            return [
                ClaimedJob(replace(rows.job_of(row), fence=row.fence + 1), self._key(connection, row.key_id))
                for row in found
            ]

    def renew(self, owner: str, job_ids: Sequence[str], now: float, lease_seconds: float) -> list[str]:
        """Prolong leases that `owner` still holds; return the ids of the jobs it does.

        A lease that ran out is still held while nobody else has taken the job.

        Dying inside: all are prolonged, or none.
        """
        with self._db.write() as connection:
            held = connection.scalars(
                select(jobs.c.id)
                .where(self._db.among(jobs.c.id, job_ids), jobs.c.lease_owner == owner)
                .order_by(jobs.c.id)
                .with_for_update()
            ).all()
            connection.execute(
                update(jobs).where(self._db.among(jobs.c.id, held)).values(lease_until=now + lease_seconds)
            )
            return list(held)

    def update_job(self, job: Job, changes: dict[str, Any], *, release: bool = False) -> Job | None:
        """Change fields of a job if its fence still is `job.fence`, else return `None`.

        With `release` the lease ends as well.

        Raises `TypeError` for what is not a field of `Job`, or names the job: id, key and fence.

        Dying inside: all of the fields are changed, or none.
        """
        if unknown := changes.keys() - _CHANGEABLE:
            raise TypeError(f"a job has no changeable {', '.join(f'`{name}`' for name in sorted(unknown))}")
        with self._db.write() as connection:
            return self._change(connection, job, changes, release=release)

    def mark_creating(self, job: Job, key: BatchKey, now: float) -> Job | None:
        """Record, durably, that the create is about to be sent: SUBMITTING with `create_at`.

        `None`, and nothing changed, if fenced off or if another job of the same provider, base URL and
        account is SUBMITTING with a `create_at`: at most one create in doubt per account.

        Dying inside: nothing is recorded and nothing was sent; dying afterwards, the create is in doubt.
        """
        with self._db.write() as connection:
            self._db.lock_for(connection, _number(key))
            in_doubt = connection.scalar(
                select(jobs.c.id)
                .join(batch_keys, batch_keys.c.id == jobs.c.key_id)
                .where(
                    unfinished,
                    jobs.c.state == JobState.SUBMITTING.value,
                    jobs.c.create_at.is_not(None),
                    jobs.c.id != job.id,
                    batch_keys.c.provider == key.provider,
                    batch_keys.c.base_url == key.base_url,
                    batch_keys.c.account == key.account,
                )
                .limit(1)
            )
            if in_doubt is not None:
                return None
            return self._change(connection, job, {"state": JobState.SUBMITTING, "create_at": now})

    def complete_job(self, job: Job, now: float) -> bool:
        """COMPLETED and released, if no request is left unsettled in it and the fence holds.

        Dying inside: it is completed and released, or nothing happened.
        """
        with self._db.write() as connection:
            unsettled = connection.scalar(
                select(requests.c.id).where(requests.c.job_id == job.id, requests.c.state != SETTLED).limit(1)
            )
            if unsettled is not None:
                return False
            changed = self._change(connection, job, {"state": JobState.COMPLETED}, release=True)
            connection.execute(
                update(jobs)
                .where(jobs.c.id == job.id, jobs.c.fence == job.fence, jobs.c.completed_at.is_(None))
                .values(completed_at=now)
            )
            return changed is not None

    def job(self, job_id: str) -> Job | None:
        """Return a job."""
        with self._db.read() as connection:
            row = connection.execute(select(*rows.JOB).where(jobs.c.id == job_id)).one_or_none()
            return None if row is None else rows.job_of(row)

    def rows(self, job_id: str, after: str | None, limit: int) -> list[tuple[str, bytes]]:
        """Return (custom_id, body) of a job's requests in the order of their ids, after a custom_id.

        Those that have an outcome by now have no body any more and are left out.
        """
        query = (
            select(requests.c.id, requests.c.attempt, bodies.c.body)
            .join(bodies, bodies.c.id == requests.c.id)
            .where(requests.c.job_id == job_id)
            .order_by(requests.c.id)
            .limit(limit)
        )
        if after is not None:
            split = split_custom_id(after)
            if split is None:
                raise ValueError(f"not a custom_id of presort: {after!r}")
            query = query.where(requests.c.id > split[0])
        with self._db.read() as connection:
            return [
                (custom_id(request_id, attempt), bytes(body)) for request_id, attempt, body in connection.execute(query)
            ]

    def unsettled(self, job_id: str, limit: int) -> list[Request]:
        """Return requests of a job that have no outcome, in the order of their ids, without bodies."""
        with self._db.read() as connection:
            found = connection.execute(
                select(*rows.REQUEST)
                .where(requests.c.job_id == job_id, requests.c.state != SETTLED)
                .order_by(requests.c.id)
                .limit(limit)
            )
            return [rows.request_of(row) for row in found]

    def custom_ids(self, job_id: str) -> list[str]:
        """Return all custom_ids of a job, in the order of `rows`."""
        with self._db.read() as connection:
            found = connection.execute(
                select(requests.c.id, requests.c.attempt).where(requests.c.job_id == job_id).order_by(requests.c.id)
            )
            return [custom_id(request_id, attempt) for request_id, attempt in found]

    def knows_batch(self, batch_id: str) -> bool:
        """Whether a job with this vendor batch id is stored."""
        with self._db.read() as connection:
            found = connection.scalar(select(jobs.c.id).where(jobs.c.batch_id == batch_id).limit(1))
            return found is not None

    def next_due(self) -> float | None:
        """Return the earliest `due_at` of the jobs that are not COMPLETED."""
        with self._db.read() as connection:
            earliest: float | None = connection.scalar(select(func.min(jobs.c.due_at)).where(unfinished))
            return earliest

    # -- people ----------------------------------------------------------------------------------------------
    def job_views(self, now: float, *, all_jobs: bool = False) -> list[JobView]:
        """Return the jobs under way, oldest first; with `all_jobs` the completed ones too."""
        settled = (
            select(func.count()).where(requests.c.job_id == jobs.c.id, requests.c.state == SETTLED).scalar_subquery()
        )
        query = (
            select(*rows.JOB, settled.label("settled"), owners.c.host, owners.c.pid)
            .outerjoin(owners, and_(owners.c.id == jobs.c.lease_owner, jobs.c.lease_until > now))
            .order_by(jobs.c.created_at, jobs.c.id)
        )
        if not all_jobs:
            query = query.where(unfinished)
        with self._db.read() as connection:
            return [
                JobView(
                    rows.job_of(row),
                    self._key(connection, row.key_id),
                    row.settled,
                    None if row.host is None else f"{row.host}:{row.pid}",
                )
                for row in connection.execute(query).all()
            ]

    def queue_views(self) -> list[QueueView]:
        """Return what is queued without a job."""
        groups = (requests.c.key_id, requests.c.run, requests.c.route)
        with self._db.read() as connection:
            found = [
                row
                for queue in (queued_for_batch, queued_for_standard)
                for row in connection.execute(
                    select(*groups, func.count(), func.min(requests.c.created_at)).where(queue).group_by(*groups)
                ).all()
            ]
            return [
                QueueView(self._key(connection, key_id), run, Route(route), count, oldest_at)
                for key_id, run, route, count, oldest_at in sorted(found, key=lambda row: row[4])
            ]

    def batch_keys(self) -> Iterator[BatchKey]:
        """Return every batch key that has unfinished work."""
        with self._db.read() as connection:
            found = connection.scalars(
                union(
                    select(jobs.c.key_id).where(unfinished),
                    *(
                        select(requests.c.key_id).where(waiting)
                        for waiting in (queued_for_batch, queued_for_standard, on_standard)
                    ),
                )
            ).all()
            return iter([self._key(connection, key_id) for key_id in sorted(found)])

    # -- inside a transaction --------------------------------------------------------------------------------
    def _form(self, job: Job, request_ids: Sequence[str], eligible: Select[Any], attempts: int) -> int:
        with self._db.write() as connection:
            stored: int | None = connection.scalar(select(jobs.c.count).where(jobs.c.id == job.id))
            if stored is not None:
                return stored
            found = self._lock(
                connection,
                eligible.add_columns(requests.c.body_bytes, requests.c.deadline).where(requests.c.key_id == job.key_id),
                request_ids,
            )
            if not found:
                return 0
            formed = {field.name: getattr(job, field.name) for field in fields(job)}
            formed |= {
                "state": JobState.PENDING,
                "count": len(found),
                "size_bytes": sum(row.body_bytes for row in found),
                "deadline": min(row.deadline for row in found),
            }
            connection.execute(jobs.insert(), rows.job_row(formed))
            self._update(
                connection,
                [row.id for row in found],
                state=RequestState.IN_JOB.value,
                job_id=job.id,
                attempt=requests.c.attempt + attempts,
            )
            return len(found)

    def _change(
        self, connection: Connection, job: Job, changes: dict[str, Any], *, release: bool = False
    ) -> Job | None:
        """Change a job if its fence holds."""
        written = rows.job_row(changes)
        if release:
            written |= {"lease_owner": None, "lease_until": None}
        guarded = (jobs.c.id == job.id, jobs.c.fence == job.fence)
        if written:
            connection.execute(update(jobs).where(*guarded).values(**written))
        row = connection.execute(select(*rows.JOB).where(*guarded)).one_or_none()
        return None if row is None else rows.job_of(row)


def _number(key: BatchKey) -> int:
    """Name an account by 64 bits, for a lock."""
    text = json.dumps([key.provider, key.base_url, key.account])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)
