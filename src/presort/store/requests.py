"""Requests: admitted once, queued, sent, settled once, handed out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection, bindparam, delete, insert, null, select, update

from presort.request import BatchKey, Request, RequestState, Route
from presort.store import rows
from presort.store.admission import Admission
from presort.store.base import ClaimedRequest, LedgerRow, Settlement, Spend
from presort.store.ledger import Ledger
from presort.store.owners import is_dead
from presort.store.schema import (
    BATCH,
    NO,
    QUEUED,
    SETTLED,
    YES,
    answers,
    bodies,
    on_standard,
    owners,
    queued_for_batch,
    queued_for_standard,
    requests,
)


class Requests(Admission, Ledger):
    """What is asked, and how it ended."""

    def withdraw(self, ids: Sequence[str]) -> list[str]:
        """Delete those of the requests that are still QUEUED; return their ids.

        One that another owner has attached to in a named run is not deleted but given up, for others to
        adopt.

        Dying inside: all are withdrawn, or none.
        """
        with self._db.write() as connection:
            found = self._lock(
                connection,
                select(requests.c.id, requests.c.shared).where(requests.c.state == QUEUED),
                ids,
            )
            given_up = [row.id for row in found if row.shared]
            withdrawn = [row.id for row in found if not row.shared]
            if given_up:
                connection.execute(
                    update(requests).where(self._db.among(requests.c.id, given_up)).values(owner="", shared=NO)
                )
            self._delete(connection, withdrawn)
            return withdrawn

    def adopt(self, owner: str, now: float, limit: int) -> list[tuple[Request, BatchKey, int]]:
        """Take over QUEUED batch-route requests of named runs whose owner is dead; with key and size.

        Dying inside: nobody has taken them over, or `owner` has, whose lease runs out in turn.
        """
        with self._db.write() as connection:
            self._bury(connection, now, owner)
            waiting = connection.scalars(select(requests.c.owner).where(queued_for_batch).distinct())
            dead = set(waiting) - self._alive(connection) - {owner}
            if not dead:
                return []
            found = connection.execute(
                select(*rows.REQUEST, requests.c.body_bytes)
                .where(
                    queued_for_batch,
                    self._db.among(requests.c.owner, sorted(dead)),
                    requests.c.open_run.is_not(None),
                )
                .order_by(requests.c.id)
                .limit(limit)
                .with_for_update(skip_locked=True)
            ).all()
            self._update(connection, [row.id for row in found], owner=owner, shared=NO)
            return [(rows.request_of(row), self._key(connection, row.key_id), row.body_bytes) for row in found]

    def queued(self, ids: Sequence[str]) -> list[str]:
        """Return those of the requests that are QUEUED."""
        with self._db.read() as connection:
            return list(
                connection.scalars(
                    select(requests.c.id)
                    .where(self._db.among(requests.c.id, ids), requests.c.state == QUEUED)
                    .order_by(requests.c.id)
                )
            )

    def reroute(self, ids: Sequence[str], reason: str) -> int:
        """Send QUEUED or IN_JOB requests by the standard route: QUEUED there, attempt + 1, out of their job.

        Those that already are on that route are left alone.

        Dying inside: all are on the standard route, or none.
        """
        with self._db.write() as connection:
            found = self._lock(
                connection,
                select(requests.c.id).where(
                    requests.c.state.in_([RequestState.QUEUED.value, RequestState.IN_JOB.value]),
                    requests.c.route == BATCH,
                ),
                ids,
            )
            return self._update(
                connection,
                [row.id for row in found],
                state=RequestState.QUEUED.value,
                route=Route.STANDARD.value,
                attempt=requests.c.attempt + 1,
                job_id=None,
                reason=rows.clean(reason),
            )

    def claim_standard(self, owner: str, now: float, limit: int) -> list[ClaimedRequest]:
        """Record the oldest queued standard-route requests as ON_STANDARD by `owner`: about to be sent.

        An owner whose lease has run out gets none: others may take what it sends for cut off.

        Dying inside: nothing is recorded and nothing was sent; dying afterwards, what was recorded is in
        doubt.
        """
        with self._db.write() as connection:
            alive = connection.scalar(
                select(owners.c.id).where(owners.c.id == owner, owners.c.lease_until > now).with_for_update(read=True)
            )
            if alive is None:
                return []
            found = connection.execute(
                select(*rows.REQUEST, requests.c.reason, bodies.c.body)
                .join(bodies, bodies.c.id == requests.c.id)
                .where(queued_for_standard)
                .order_by(requests.c.created_at, requests.c.id)
                .limit(limit)
                .with_for_update(skip_locked=True, of=requests)
            ).all()
            self._update(connection, [row.id for row in found], state=RequestState.ON_STANDARD.value, sender=owner)
            return [
                ClaimedRequest(
                    replace(rows.request_of(row), state=RequestState.ON_STANDARD, body=bytes(row.body)),
                    self._key(connection, row.key_id),
                    row.reason,
                )
                for row in found
            ]

    def rescue_standard(self, now: float) -> list[ClaimedRequest]:
        """Put ON_STANDARD requests of dead senders back in the standard queue (attempt + 1).

        They were in doubt, and are booked as that here, or a second crash would lose the doubt. Returns them
        as they were (old attempt), without bodies.

        Dying inside: all are queued again and booked, or none.
        """
        with self._db.write() as connection:
            self._bury(connection, now)
            held = connection.execute(
                select(*rows.REQUEST, requests.c.reason, requests.c.sender)
                .where(on_standard, is_dead(requests.c.sender))
                .order_by(requests.c.sender, requests.c.id)  # or SQLite reads the whole table by its ids
                .with_for_update(skip_locked=True)
            ).all()
            # asked again now that they are held: a new process may have joined and sent one of them meanwhile
            alive = self._alive(connection)
            found = [row for row in held if row.sender not in alive]
            self._requeue(connection, [row.id for row in found])
            rescued = [
                ClaimedRequest(rows.request_of(row), self._key(connection, row.key_id), row.reason) for row in found
            ]
            self._book(connection, [_doubt(claimed, now) for claimed in rescued])
            return rescued

    def release_standard(self, owner: str, ids: Sequence[str], *, sent: bool = True) -> None:
        """Put ON_STANDARD requests of `owner` back in the queue: QUEUED there, and if they were sent, attempt + 1.

        What was sent was refused for now, or is on the books as in doubt.

        Dying inside: all are queued again, or all are still in doubt.
        """
        with self._db.write() as connection:
            mine = select(requests.c.id).where(on_standard, requests.c.sender == owner)
            self._requeue(connection, [row.id for row in self._lock(connection, mine, ids)], attempts=int(sent))

    def settle(self, items: Sequence[Settlement], now: float) -> list[str]:
        """Write outcomes, each request's first only; book every ledger row; return the ids that were first.

        The body goes when the outcome is stored. A ledger row that is already there is left alone, unless it
        was in doubt and is known now; one whose outcome came second is booked as WASTED instead of PAID.

        Dying inside: all outcomes and ledger rows are stored, or none and they can be settled again.
        """
        with self._db.write() as connection:
            found = self._lock(connection, select(requests.c.id, requests.c.state), [item.request_id for item in items])
            still_open = {row.id for row in found if row.state != RequestState.SETTLED}
            first: dict[str, Settlement] = {}
            costs: list[LedgerRow] = []
            for item in items:
                won = item.request_id in still_open and item.request_id not in first
                if won:
                    first[item.request_id] = item
                if item.ledger is not None:
                    late = not won and item.ledger.spend is Spend.PAID
                    costs.append(replace(item.ledger, spend=Spend.WASTED) if late else item.ledger)
            if first:
                winners = sorted(first.values(), key=lambda item: item.request_id)
                self._db.many(connection, _SETTLE, [rows.outcome_row(item, now) for item in winners])
                self._db.many(connection, insert(answers), [rows.answer_row(item) for item in winners])
                connection.execute(delete(bodies).where(self._db.among(bodies.c.id, list(first))))
            self._book(connection, costs)
            return list(first)

    def outcomes(self, ids: Sequence[str]) -> dict[str, Request]:
        """Return those of the requests that are SETTLED, with their outcomes.

        One whose answer was handed out or pruned has an empty body.
        """
        with self._db.read() as connection:
            found = connection.execute(
                rows.with_outcomes().where(self._db.among(requests.c.id, ids), requests.c.state == SETTLED)
            )
            return {row[0]: rows.settled_of(row) for row in found}

    def settled_since(self, since: float, limit: int) -> list[tuple[str, float]]:
        """Return (id, settled at) of requests settled at or after a time, oldest first.

        Those settled at the same time are never cut apart, even if they are more than the limit: the next
        call may begin right after the last time.
        """
        query = (
            select(requests.c.id, requests.c.settled_at)
            .where(requests.c.settled_at >= since)
            .order_by(requests.c.settled_at, requests.c.id)
        )
        with self._db.read() as connection:
            found = [(request_id, at) for request_id, at in connection.execute(query.limit(limit))]
            if len(found) == limit and found:
                last_id, last_at = found[-1]
                ties = query.where(
                    requests.c.settled_at == last_at,
                    requests.c.id > last_id,
                )
                found += [(request_id, at) for request_id, at in connection.execute(ties)]
            return found

    def hand_out(self, ids: Sequence[str]) -> None:
        """Mark outcomes as handed out; the answers of requests without a run are deleted, their rows stay.

        A request whose run was finished counts as one without.

        Dying inside: all are handed out, or none and they can be found again.
        """
        with self._db.write() as connection:
            found = self._lock(
                connection,
                select(requests.c.id, requests.c.open_run).where(requests.c.state == SETTLED),
                ids,
            )
            self._update(connection, [row.id for row in found], handed_out=YES)
            gone = [row.id for row in found if row.open_run is None]
            if gone:
                connection.execute(delete(answers).where(self._db.among(answers.c.id, gone)))

    # -- inside a transaction --------------------------------------------------------------------------------
    def _requeue(self, connection: Connection, ids: Sequence[str], *, attempts: int = 1) -> None:
        self._update(
            connection,
            ids,
            state=RequestState.QUEUED.value,
            attempt=requests.c.attempt + attempts,
            sender=None,
        )


_SETTLE = (
    update(requests)
    .where(requests.c.id == bindparam("of_id"))
    .values(
        state=SETTLED,
        sender=null(),
        **{
            name: bindparam(name) for name in ("outcome", "status", "outcome_route", "reason", "batch_id", "settled_at")
        },
    )
)


def _doubt(claimed: ClaimedRequest, now: float) -> LedgerRow:
    """Return what a standard call that was cut off may have cost: nobody knows."""
    request, key = claimed.request, claimed.key
    return LedgerRow(
        custom_id=request.custom_id,
        spend=Spend.IN_DOUBT,
        route=Route.STANDARD,
        provider=key.provider,
        model=key.model,
        account=key.account,
        at=now,
        usage=None,
        baseline_usd=None,
        actual_usd=None,
        run=request.run,
    )
