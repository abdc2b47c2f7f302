"""Admission: each payload gets the one row that stands for it, new or found again.

What was stored is read and held, what becomes of each payload is decided without the database, and the
decision is written: three steps in one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Connection, Row, bindparam, case, delete, update

from presort.request import OutcomeKind, Request, RequestState, Route
from presort.store import rows
from presort.store.base import Admitted, NewRequest
from presort.store.owners import Owners, is_dead
from presort.store.schema import BATCH, NO, QUEUED, YES, answers, awaits_caller, bodies, requests, runs

_PREFERRED = (RequestState.QUEUED, RequestState.ON_STANDARD, RequestState.IN_JOB, RequestState.SETTLED)
"""Of several rows that could stand for a payload, the last is taken first: it has come furthest."""


class Admission(Owners):
    """How requests get in."""

    def admit(self, owner: str, run: str | None, items: Sequence[NewRequest], now: float) -> list[Admitted]:
        """Store requests as QUEUED for `owner`, or attach to the rows that stand for them; in item order.

        In a named run the row is the one with the same (run, payload hash, occurrence); one that has an
        outcome which is an error and was handed out, or whose answer is gone, starts again (QUEUED, attempt +
        1, body stored anew, owner set). The run is opened if new; a finished run of that name starts empty.
        Without a run it is a row without a run, of an owner whose lease has run out, with the same hash and
        not handed out; each such row is taken once, and `owner` becomes its owner. An unsettled row of a dead
        owner gets `owner` as its owner and, if it is QUEUED, the item's deadline. A row comes back with its
        outcome if it has one; bodies never come back. Repeated with the same ids, it returns what the first
        call stored.

        Dying inside: all of the items are stored, or none.
        """
        if not items:
            return []
        keys = {key.id: key for key in {item.key for item in items}}
        key_ids = {key: key_id for key_id, key in keys.items()}
        with self._db.write() as connection:
            self._bury(connection, now, owner)
            self._has_keys(connection, keys)
            if run is None:
                standing = self._left_behind(connection, owner, items)
            else:
                self._open_run(connection, run, now)
                standing = self._of_run(connection, run, items)
            repeated = self._lock(connection, _STANDING, [item.id for item in items])
            # asked only now: whoever took a row before this transaction held it had joined by then
            alive = self._alive(connection) | {owner}
            plan = _Plan(owner, run, now, alive, repeated, standing)
            admitted = [plan.admit(item, key_ids[item.key]) for item in items]
            self._carry_out(connection, plan)
        self._keys.update(keys)
        return admitted

    def _open_run(self, connection: Connection, run: str, now: float) -> None:
        """Open a run or touch it; the row is held, so that admissions to one run come one after the other."""
        statement = self._db.insert(runs)
        opened_at = case((runs.c.finished_at.is_(None), runs.c.opened_at), else_=now)
        changed = {"opened_at": opened_at, "touched_at": now, "finished_at": None}
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=[runs.c.name],
                set_=changed,
            ),
            {"name": run, "opened_at": now, "touched_at": now, "finished_at": None},
        )

    def _of_run(self, connection: Connection, run: str, items: Iterable[NewRequest]) -> Sequence[Row[Any]]:
        """Return the rows of an open run that may stand for items, held."""
        hashes = [item.payload_hash for item in items]
        return connection.execute(
            _STANDING.where(requests.c.open_run == run, self._db.among(requests.c.payload_hash, hashes))
        ).all()

    def _left_behind(self, connection: Connection, owner: str, items: Iterable[NewRequest]) -> Sequence[Row[Any]]:
        """Return the rows without a run that a dead owner left and that may stand for items, held."""
        hashes = [item.payload_hash for item in items]
        return connection.execute(
            _STANDING.where(
                awaits_caller,
                self._db.among(requests.c.payload_hash, hashes),
                requests.c.owner != owner,
                is_dead(requests.c.owner),
            )
        ).all()

    def _carry_out(self, connection: Connection, plan: _Plan) -> None:
        self._update(connection, plan.taken, owner=plan.owner, shared=NO)
        self._update(connection, plan.shared, shared=YES)
        self._db.many(connection, _NEW_DEADLINE, plan.deadlines)
        if plan.restarted:
            again = [row["of_id"] for row in plan.restarted]
            connection.execute(delete(answers).where(self._db.among(answers.c.id, again)))
            self._db.many(connection, _RESTART, plan.restarted)
        self._db.many(connection, self._db.insert(requests).values(_NEW).on_conflict_do_nothing(), plan.new)
        self._db.many(connection, self._db.insert(bodies).on_conflict_do_nothing(), plan.bodies)


@dataclass(slots=True)
class _Plan:
    """Decides what becomes of each payload, and collects what is to be written."""

    owner: str
    run: str | None
    now: float
    alive: set[str]
    repeated: Sequence[Row[Any]]
    standing: Sequence[Row[Any]]
    new: list[dict[str, Any]] = field(default_factory=list)
    restarted: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    deadlines: list[dict[str, Any]] = field(default_factory=list)
    _by_id: dict[str, Row[Any]] = field(init=False)
    _free: dict[tuple[str, int], list[Row[Any]]] = field(init=False, default_factory=dict)
    _used: dict[tuple[str, int], Request] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_id = {row.id: row for row in self.repeated}
        for row in sorted(self.standing, key=lambda row: _PREFERRED.index(row.state)):
            if row.id not in self._by_id and (self.run is not None or row.owner not in self.alive):
                self._free.setdefault(self._identity(row.payload_hash, row.occurrence), []).append(row)

    def admit(self, item: NewRequest, key_id: str) -> Admitted:
        """Decide about one payload."""
        identity = self._identity(item.payload_hash, item.occurrence)
        if (row := self._by_id.get(item.id)) is not None:
            request = rows.settled_of(row)
        elif self.run is not None and identity in self._used:
            request = self._used[identity]
        elif free := self._free.get(identity):
            request = self._attach(free.pop(), item)
        else:
            request = self._add(item, key_id)
            self._used[identity] = request
            return Admitted(request, attached=False)
        self._used[identity] = request
        return Admitted(request, attached=True)

    def _identity(self, payload_hash: str, occurrence: int) -> tuple[str, int]:
        return payload_hash, 0 if self.run is None else occurrence

    def _add(self, item: NewRequest, key_id: str) -> Request:
        self.new.append(
            {
                "id": item.id,
                "run": self.run,
                "open_run": self.run,
                "payload_hash": item.payload_hash,
                "occurrence": item.occurrence,
                "key_id": key_id,
                "owner": self.owner,
                "body_bytes": len(item.body),
                "deadline": item.deadline,
                "created_at": self.now,
            }
        )
        self.bodies.append({"id": item.id, "body": item.body})
        return Request(item.id, key_id, item.payload_hash, RequestState.QUEUED, 0, item.deadline, self.now, self.run)

    def _attach(self, row: Row[Any], item: NewRequest) -> Request:
        request = rows.settled_of(row)
        if request.outcome is not None:
            failed = row.outcome != OutcomeKind.SUCCEEDED and row.handed_out
            if self.run is not None and (failed or row.answer is None):
                return self._restart(request, item)
            if self.run is None:
                self.taken.append(row.id)
        elif row.owner not in self.alive:
            self.taken.append(row.id)
            if request.state is RequestState.QUEUED:
                self.deadlines.append({"of_id": row.id, "deadline": item.deadline})
                request = replace(request, deadline=item.deadline)
        elif row.owner != self.owner and not row.shared:
            self.shared.append(row.id)
        return request

    def _restart(self, request: Request, item: NewRequest) -> Request:
        self.restarted.append(
            {
                "of_id": request.id,
                "owner": self.owner,
                "deadline": item.deadline,
                "created_at": self.now,
                "body_bytes": len(item.body),
            }
        )
        self.bodies.append({"id": request.id, "body": item.body})
        return replace(
            request,
            state=RequestState.QUEUED,
            attempt=request.attempt + 1,
            deadline=item.deadline,
            created_at=self.now,
            job_id=None,
            outcome=None,
        )


_STANDING = (
    rows.with_outcomes(
        requests.c.occurrence,
        requests.c.owner,
        requests.c.shared,
        requests.c.handed_out,
        answers.c.id.label("answer"),
    )
    .order_by(requests.c.id)
    .with_for_update(of=requests)
)

_NEW = {"state": QUEUED, "route": BATCH, "attempt": NO, "shared": NO, "handed_out": NO}

_NEW_DEADLINE = update(requests).where(requests.c.id == bindparam("of_id")).values(deadline=bindparam("deadline"))

_RESTART = (
    update(requests)
    .where(requests.c.id == bindparam("of_id"))
    .values(
        state=RequestState.QUEUED.value,
        route=Route.BATCH.value,
        attempt=requests.c.attempt + 1,
        shared=NO,
        handed_out=NO,
        **{name: bindparam(name) for name in ("owner", "deadline", "created_at", "body_bytes")},
        **dict.fromkeys(("job_id", "sender", "outcome", "status", "outcome_route", "reason", "batch_id", "settled_at")),
    )
)
