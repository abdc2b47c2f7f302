"""The ledger: what each answer cost, written once and never deleted; and whose accounts they were."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from sqlalchemy import Connection, func, select

from presort.request import Route, Usage
from presort.store import rows
from presort.store.base import LedgerRow, LedgerTotal, Spend
from presort.store.owners import Owners
from presort.store.schema import accounts, ledger

_IN_DOUBT = Spend.IN_DOUBT.value


class Ledger(Owners):
    """What was spent."""

    def book(self, rows: Sequence[LedgerRow]) -> None:
        """Write ledger rows; one that is there already is left alone, unless it was in doubt.

        Dying inside: all are booked, or none and they can be booked again.
        """
        with self._db.write() as connection:
            self._book(connection, rows)

    def totals(self, run: str | None = None, since: float | None = None) -> list[LedgerTotal]:
        """Sum the ledger by provider, model, route and spend; of one run, or of all."""
        groups = (ledger.c.provider, ledger.c.model, ledger.c.route, ledger.c.spend)
        known = func.count(ledger.c.baseline_usd + ledger.c.actual_usd)
        query = (
            select(
                *groups,
                func.count(),
                known,
                self._db.exact_sum(ledger.c.baseline_usd),
                self._db.exact_sum(ledger.c.actual_usd),
                *(func.coalesce(func.sum(column), 0) for column in rows.USAGE),
            )
            .group_by(*groups)
            .order_by(*groups)
        )
        if run is not None:
            query = query.where(ledger.c.run == run)
        if since is not None:
            query = query.where(ledger.c.at >= since)
        with self._db.read() as connection:
            return [
                LedgerTotal(
                    row[0],
                    row[1],
                    Route(row[2]),
                    Spend(row[3]),
                    row[4],
                    Usage(*map(int, row[8:])),
                    Decimal(row[6] or 0),
                    Decimal(row[7] or 0),
                    row[4] - row[5],
                )
                for row in connection.execute(query)
            ]

    def remember_organisation(self, account: str, organisation: str) -> None:
        """Remember whom the vendor says an account alias or key belongs to.

        Dying inside: it is remembered, or it was not.
        """
        statement = self._db.insert(accounts)
        with self._db.write() as connection:
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=[accounts.c.account], set_={"organisation": organisation}
                ),
                {"account": account, "organisation": organisation},
            )

    def organisation(self, account: str) -> str | None:
        """Return what `remember_organisation` was told."""
        with self._db.read() as connection:
            return connection.scalar(select(accounts.c.organisation).where(accounts.c.account == account))

    def _book(self, connection: Connection, costs: Sequence[LedgerRow]) -> None:
        """Write ledger rows inside a transaction, in one order, against deadlocks.

        A custom_id has one row: the same answer cannot be paid and wasted. A doubt gives way to what is
        known.
        """
        statement = self._db.insert(ledger)
        self._db.many(
            connection,
            statement.on_conflict_do_update(
                index_elements=[ledger.c.custom_id],
                set_={column.name: statement.excluded[column.name] for column in ledger.c},
                where=(ledger.c.spend == _IN_DOUBT) & (statement.excluded.spend != _IN_DOUBT),
            ),
            [rows.ledger_row(row) for row in sorted(costs, key=lambda row: row.custom_id)],
        )
