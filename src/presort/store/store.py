"""The store: what must survive the process.

Every method is one transaction: it has happened wholly or not at all when the process dies in it. None of
them reads a clock: times come in as unix seconds. A process is an *owner* with a lease; what a dead owner
left is found again by the methods that say so. Ids come in from the caller too, so that a repeated call after
an uncertain commit does no harm.

The verbs, by what they are about: `owners`, `admission` and `requests`, `runs`, `jobs`, `ledger`.
"""

from __future__ import annotations

from typing import Self

from presort.store.database import Database
from presort.store.jobs import Jobs
from presort.store.requests import Requests
from presort.store.runs import Runs


class Store(Requests, Runs, Jobs):
    """Requests, jobs, leases and the ledger in one database. Safe to use from several threads and processes.

    Every method may raise `StoreError`: the database cannot be used, and the message says what to do.
    """

    @classmethod
    def open(cls, url: str) -> Self:
        """Open, and if need be create or upgrade, the store at an SQLAlchemy URL (`sqlite:///…`, `postgresql+psycopg://…`).

        A text without `://` is the path of an SQLite file.

        Raises `StoreVersionError` for one written by a newer presort, `StoreError` for one on a network file
        system, a foreign or damaged file, a folder that cannot be written, a database that does not answer.
        """
        return cls(Database.open(url))

    def close(self) -> None:
        """Close its connections; a method called afterwards raises `StoreError`."""
        self._db.close()

    @property
    def location(self) -> str:
        """Path, or URL without the password, for people."""
        return self._db.location
