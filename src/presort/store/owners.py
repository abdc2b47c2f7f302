"""Owners: processes that hold leases, and what all parts of the store share.

An owner whose lease has run out may still come back, and nothing is lost if it does before anybody acts on
its absence. Whoever is about to act first *buries* the dead, which deletes their rows, in the same
transaction. From then on an owner without a row is dead; and one that comes back finds out by its next
heartbeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, delete, select, update

from presort.request import BatchKey
from presort.store import rows
from presort.store.database import Database
from presort.store.schema import answers, batch_keys, bodies, jobs, owners, requests


class Owners:
    """Which processes are alive."""

    _db: Database

    def __init__(self, database: Database) -> None:
        self._db = database
        self._keys: dict[str, BatchKey] = {}  # batch keys never change

    def join(self, owner: str, host: str, pid: int, now: float, lease_seconds: float) -> None:
        """Register a process.

        Dying inside: it is registered, or it is not and owns nothing.
        """
        statement = self._db.insert(owners)
        changed = {name: statement.excluded[name] for name in ("host", "pid", "lease_until")}
        with self._db.write() as connection:
            connection.execute(
                statement.on_conflict_do_update(index_elements=[owners.c.id], set_=changed),
                {"id": owner, "host": host, "pid": pid, "lease_until": now + lease_seconds},
            )

    def heartbeat(self, owner: str, now: float, lease_seconds: float) -> bool:
        """Prolong a process's lease; `False` if it had run out and was taken as dead meanwhile.

        Then it must join anew.

        Dying inside: the lease is prolonged, or it runs out as it would have.
        """
        with self._db.write() as connection:
            found = connection.execute(
                update(owners).where(owners.c.id == owner).values(lease_until=now + lease_seconds)
            )
            return found.rowcount == 1

    def leave(self, owner: str) -> None:
        """End a process's lease, and its leases on jobs, at once.

        Dying inside: all leases end now, or all run out in their time.
        """
        with self._db.write() as connection:
            connection.execute(delete(owners).where(owners.c.id == owner))
            held = connection.scalars(
                select(jobs.c.id).where(jobs.c.lease_owner == owner).order_by(jobs.c.id).with_for_update()
            ).all()
            connection.execute(
                update(jobs)
                .where(self._db.among(jobs.c.id, held), jobs.c.lease_owner == owner)
                .values(lease_owner=None, lease_until=None)
            )

    def owners(self, now: float) -> list[tuple[str, str, int]]:
        """Return the owners whose lease has not run out: (owner, host, pid)."""
        with self._db.read() as connection:
            found = connection.execute(
                select(owners.c.id, owners.c.host, owners.c.pid).where(owners.c.lease_until > now).order_by(owners.c.id)
            )
            return [(owner, host, pid) for owner, host, pid in found]

    # -- shared by the other parts ---------------------------------------------------------------------------
    def _bury(self, connection: Connection, now: float, acting: str | None = None) -> None:
        """Delete the owners whose lease has run out, but not the one that acts: it is alive."""
        connection.execute(delete(owners).where(owners.c.lease_until <= now, owners.c.id != (acting or "")))

    def _alive(self, connection: Connection) -> set[str]:
        """Return the owners that are not buried."""
        return set(connection.scalars(select(owners.c.id)))

    def _has_keys(self, connection: Connection, keys: dict[str, BatchKey]) -> None:
        """Store those batch keys that this process has not stored yet."""
        new = [rows.key_row(keys[key_id]) for key_id in sorted(keys.keys() - self._keys.keys())]
        if new:
            connection.execute(self._db.insert(batch_keys).on_conflict_do_nothing(), new)

    def _key(self, connection: Connection, key_id: str) -> BatchKey:
        """Return a batch key by its id."""
        if key_id not in self._keys:
            row = connection.execute(select(batch_keys).where(batch_keys.c.id == key_id)).one()
            self._keys[key_id] = rows.key_of(row)
        return self._keys[key_id]

    def _lock(self, connection: Connection, query: Select[Any], ids: Sequence[str]) -> list[Row[Any]]:
        """Read some requests and hold them until the transaction ends; in one order, against deadlocks."""
        if not ids:
            return []
        return list(
            connection.execute(
                query.where(self._db.among(requests.c.id, ids)).order_by(requests.c.id).with_for_update(of=requests)
            )
        )

    def _update(self, connection: Connection, ids: Sequence[str], **changes: Any) -> int:
        """Change some requests, which this transaction holds; return how many they are."""
        if ids:
            connection.execute(update(requests).where(self._db.among(requests.c.id, ids)).values(**changes))
        return len(ids)

    def _delete(self, connection: Connection, ids: Sequence[str]) -> None:
        """Delete some requests with what belongs to them."""
        if ids:
            for table in (bodies, answers, requests):
                connection.execute(delete(table).where(self._db.among(table.c.id, ids)))


def is_dead(owner: ColumnElement[str]) -> ColumnElement[bool]:
    """Compare a column with the owners that are left once the dead are buried."""
    return owner.not_in(select(owners.c.id))
