"""The end of things: runs that are finished, answers and rows that have grown old."""

from __future__ import annotations

from sqlalchemy import Connection, delete, exists, func, or_, select, update

from presort.store.owners import Owners, is_dead
from presort.store.schema import (
    SETTLED,
    YES,
    answers,
    jobs,
    queued_for_batch,
    queued_for_standard,
    requests,
    runs,
    unfinished,
)


class Runs(Owners):
    """What may go."""

    def opened_at(self, run: str) -> float | None:
        """Return when a named run was opened, or opened again after it was finished; `None` if never."""
        with self._db.read() as connection:
            opened: float | None = connection.scalar(select(runs.c.opened_at).where(runs.c.name == run))
            return opened

    def finish_run(self, run: str, now: float) -> None:
        """Finish a named run: its answers are deleted, and the same name starts anew next time.

        Its settled requests are deleted with their answers. The others stay, no longer matched by the name:
        they are still sent and collected, and count as requests without a run.

        Dying inside: the run is finished, or as it was.
        """
        with self._db.write() as connection:
            connection.execute(update(runs).where(runs.c.name == run).values(finished_at=now))
            found = connection.execute(
                select(requests.c.id, requests.c.state == SETTLED)
                .where(requests.c.open_run == run)
                .order_by(requests.c.id)
                .with_for_update()
            ).all()
            self._delete(connection, [request_id for request_id, settled in found if settled])
            self._update(connection, [request_id for request_id, settled in found if not settled], open_run=None)

    def prune(self, now: float, replay_seconds: float, row_seconds: float) -> int:
        """Delete what has grown old; return the number of requests touched. The ledger stays.

        Answers of named runs untouched for `replay_seconds` go, if they themselves are so old; settled
        requests older than `row_seconds`; completed jobs without requests. Queued requests that are
        so old, past their deadline and whose owner is dead go as well: their prompts must not stay for ever.

        Dying inside: all of it is gone, or nothing.
        """
        old = now - row_seconds
        with self._db.write() as connection:
            self._bury(connection, now)
            replayed = self._forget_answers(connection, now - replay_seconds)
            settled = connection.scalars(
                select(requests.c.id)
                .where(requests.c.settled_at <= old)
                .order_by(requests.c.id)
                .with_for_update(skip_locked=True)
            ).all()
            abandoned = [
                request_id
                for queue in (queued_for_batch, queued_for_standard)
                for request_id in connection.scalars(
                    select(requests.c.id)
                    .where(
                        queue,
                        is_dead(requests.c.owner),
                        requests.c.created_at <= old,
                        requests.c.deadline <= now,
                    )
                    .order_by(requests.c.id)
                    .with_for_update(skip_locked=True)
                )
            ]
            self._delete(connection, [*settled, *abandoned])
            connection.execute(
                delete(jobs).where(
                    ~unfinished,
                    func.coalesce(jobs.c.completed_at, jobs.c.due_at) <= old,
                    ~exists().where(requests.c.job_id == jobs.c.id),
                )
            )
            connection.execute(
                delete(runs).where(
                    func.coalesce(runs.c.finished_at, runs.c.touched_at) <= old,
                    ~exists().where(requests.c.open_run == runs.c.name),
                )
            )
            touched = len({*replayed, *settled, *abandoned})
        if touched:
            self._db.shrink()
        return touched

    def _forget_answers(self, connection: Connection, before: float) -> list[str]:
        """Delete the answers of named runs untouched since a time; return whose they were.

        Answers of a run that was finished before they came go when they are as old.
        """
        untouched = select(runs.c.name).where(runs.c.touched_at <= before)
        found = connection.scalars(
            select(requests.c.id)
            .join(answers, answers.c.id == requests.c.id)
            .where(
                requests.c.settled_at <= before,
                requests.c.run.is_not(None),
                or_(requests.c.open_run.is_(None), requests.c.open_run.in_(untouched)),
            )
            .order_by(requests.c.id)
            .with_for_update(skip_locked=True, of=requests)
        ).all()
        if found:
            connection.execute(delete(answers).where(self._db.among(answers.c.id, found)))
            self._update(connection, found, handed_out=YES)
        return list(found)
