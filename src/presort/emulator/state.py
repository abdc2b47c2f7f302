"""Everything the emulator remembers, in SQLite.

With a file, whatever a response has confirmed survives a SIGKILL of the
emulator: a transaction is committed before its answer is sent. Without one,
SQLite keeps a private temporary database that vanishes with the process.

One thread uses it, and no transaction spans an `await`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS api_key (
    key TEXT PRIMARY KEY, organization TEXT NOT NULL, workspace TEXT NOT NULL, revoked INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS file (
    id TEXT PRIMARY KEY, organization TEXT NOT NULL, workspace TEXT NOT NULL, purpose TEXT NOT NULL,
    filename TEXT NOT NULL, bytes INTEGER NOT NULL, created_at REAL NOT NULL, expires_at REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS chunk (id INTEGER PRIMARY KEY, file TEXT NOT NULL, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS chunk_by_file ON chunk (file, id);
CREATE TABLE IF NOT EXISTS batch (
    id TEXT PRIMARY KEY, vendor TEXT NOT NULL, organization TEXT NOT NULL, workspace TEXT NOT NULL,
    created_at REAL NOT NULL, listed_at REAL NOT NULL, seconds REAL NOT NULL, share REAL NOT NULL,
    ending TEXT NOT NULL, size INTEGER, done INTEGER NOT NULL DEFAULT 0, cancelled_at REAL, ended_at REAL,
    result TEXT, counts TEXT NOT NULL DEFAULT '{}', details TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS batch_live ON batch (ended_at) WHERE ended_at IS NULL;
CREATE TABLE IF NOT EXISTS entry (
    batch TEXT NOT NULL, n INTEGER NOT NULL, custom_id TEXT NOT NULL, sha256 TEXT NOT NULL, params TEXT,
    outcome TEXT, defect TEXT, line TEXT, place INTEGER NOT NULL, PRIMARY KEY (batch, n)
);
CREATE TABLE IF NOT EXISTS call (
    id INTEGER PRIMARY KEY, vendor TEXT NOT NULL, organization TEXT NOT NULL, workspace TEXT NOT NULL,
    model TEXT, sha256 TEXT NOT NULL, time REAL NOT NULL, status INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS tally (
    vendor TEXT NOT NULL, model TEXT NOT NULL, lane TEXT NOT NULL, class TEXT NOT NULL, prompt TEXT NOT NULL,
    tokens INTEGER NOT NULL, PRIMARY KEY (vendor, model, lane, class, prompt)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cache (
    scope TEXT NOT NULL, prefix TEXT NOT NULL, seconds INTEGER NOT NULL, expires_at REAL NOT NULL,
    writer TEXT NOT NULL, PRIMARY KEY (scope, prefix)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fault (
    id INTEGER PRIMARY KEY, spec TEXT NOT NULL,
    seen INTEGER NOT NULL DEFAULT 0, used INTEGER NOT NULL DEFAULT 0
);
"""


PUT_BATCH = """
INSERT OR REPLACE INTO batch (
    id, vendor, organization, workspace, created_at, listed_at, seconds, share, ending, size, done,
    cancelled_at, ended_at, result, counts, details
) VALUES (
    :id, :vendor, :organization, :workspace, :created_at, :listed_at, :seconds, :share, :ending, :size, :done,
    :cancelled_at, :ended_at, :result, :counts, :details
)"""


@dataclass(frozen=True)
class Tenant:
    """Whose objects a request may see."""

    organization: str
    workspace: str


@dataclass(frozen=True)
class StoredFile:
    """A file as OpenAI keeps it, without its content."""

    id: str
    organization: str
    workspace: str
    purpose: str
    filename: str
    bytes: int
    created_at: float
    expires_at: float | None


@dataclass
class Batch:
    """A vendor's batch.

    `seconds`, `share` and `ending` are its fate: how long it takes, which part of
    it may finish, and how it ends. `done` requests were carried out so far.
    `result` is None until it ended, then completed, cancelled, expired or
    failed. `details` holds what only its vendor understands.
    """

    id: str
    vendor: str
    organization: str
    workspace: str
    created_at: float
    listed_at: float
    seconds: float
    share: float
    ending: str
    size: int | None
    done: int
    cancelled_at: float | None
    ended_at: float | None
    result: str | None
    counts: dict[str, int]
    details: dict[str, Any]

    @property
    def tenant(self) -> Tenant:
        """Whose batch it is."""
        return Tenant(self.organization, self.workspace)


@dataclass(frozen=True)
class Entry:
    """One request of a batch, not yet carried out."""

    n: int
    custom_id: str
    sha256: str
    params: str


NewEntry = tuple[str, int, str, str, str, int]
"""A request to store: (batch, n, custom_id, sha256, params, place among the results)."""


def _batch(row: sqlite3.Row) -> Batch:
    fields = dict(row)
    fields["counts"] = json.loads(fields["counts"])
    fields["details"] = json.loads(fields["details"])
    return Batch(**fields)


class State:
    """The emulator's memory; the only place that speaks SQL."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._db = sqlite3.connect(path or "", isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; nested use joins the outer transaction."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # Settings and keys

    def setting(self, name: str, default: Any) -> Any:
        """Read a setting."""
        row = self._db.execute("SELECT value FROM setting WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row["value"])

    def set_setting(self, name: str, value: Any) -> None:
        """Write a setting."""
        self._db.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (name, json.dumps(value)))

    def put_key(self, key: str, tenant: Tenant, *, revoked: bool) -> None:
        """Define or redefine an API key."""
        values = (key, tenant.organization, tenant.workspace, revoked)
        self._db.execute("INSERT OR REPLACE INTO api_key VALUES (?, ?, ?, ?)", values)

    def key(self, key: str) -> tuple[Tenant, bool] | None:
        """Whose key it is and whether it was revoked, or None if nobody defined it."""
        row = self._db.execute("SELECT * FROM api_key WHERE key = ?", (key,)).fetchone()
        return row and (Tenant(row["organization"], row["workspace"]), bool(row["revoked"]))

    def keys(self) -> list[dict[str, Any]]:
        """All defined keys."""
        return [dict(row) for row in self._db.execute("SELECT * FROM api_key")]

    # Files

    def append_chunk(self, file_id: str, data: bytes) -> None:
        """Add to a file's content; the file itself may be declared later."""
        self._db.execute("INSERT INTO chunk (file, data) VALUES (?, ?)", (file_id, data))

    def put_file(self, file: StoredFile) -> None:
        """Declare a file."""
        values = tuple(vars(file).values())
        self._db.execute("INSERT INTO file VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)

    def file(self, file_id: str) -> StoredFile | None:
        """Find a file."""
        row = self._db.execute("SELECT * FROM file WHERE id = ?", (file_id,)).fetchone()
        return row and StoredFile(**dict(row))

    def files(self, tenant: Tenant) -> list[StoredFile]:
        """A tenant's files, newest first."""
        query = "SELECT * FROM file WHERE organization = ? AND workspace = ? ORDER BY created_at DESC, id DESC"
        rows = self._db.execute(query, (tenant.organization, tenant.workspace))
        return [StoredFile(**dict(row)) for row in rows]

    def chunks(self, file_id: str) -> Iterator[bytes]:
        """A file's content, piece by piece."""
        last = 0
        query = "SELECT id, data FROM chunk WHERE file = ? AND id > ? ORDER BY id LIMIT 1"
        while row := self._db.execute(query, (file_id, last)).fetchone():
            last = row["id"]
            yield row["data"]

    def delete_file(self, file_id: str) -> None:
        """Forget a file and its content."""
        with self.transaction():
            self._db.execute("DELETE FROM chunk WHERE file = ?", (file_id,))
            self._db.execute("DELETE FROM file WHERE id = ?", (file_id,))

    # Batches

    def put_batch(self, batch: Batch) -> None:
        """Store a new batch, or a batch as it is now."""
        values = {**vars(batch), "counts": json.dumps(batch.counts), "details": json.dumps(batch.details)}
        self._db.execute(PUT_BATCH, values)

    def batch(self, batch_id: str) -> Batch | None:
        """Find a batch."""
        row = self._db.execute("SELECT * FROM batch WHERE id = ?", (batch_id,)).fetchone()
        return row and _batch(row)

    def batches(self, vendor: str | None = None, tenant: Tenant | None = None) -> list[Batch]:
        """Batches, newest first."""
        query = """
            SELECT * FROM batch WHERE (:vendor IS NULL OR vendor = :vendor)
            AND (:organization IS NULL OR (organization = :organization AND workspace = :workspace))
            ORDER BY created_at DESC, id DESC"""
        values = {
            "vendor": vendor,
            "organization": None,
            "workspace": None,
            **(vars(tenant) if tenant else {}),
        }
        return [_batch(row) for row in self._db.execute(query, values)]

    def live_batches(self) -> list[str]:
        """Ids of batches that have not ended, oldest first."""
        query = "SELECT id FROM batch WHERE ended_at IS NULL ORDER BY created_at, id"
        return [row["id"] for row in self._db.execute(query)]

    def add_entries(self, rows: Iterable[NewEntry]) -> None:
        """Store requests."""
        query = "INSERT INTO entry (batch, n, custom_id, sha256, params, place) VALUES (?, ?, ?, ?, ?, ?)"
        self._db.executemany(query, rows)

    def drop_entries(self, batch_id: str) -> None:
        """Forget a batch's requests."""
        self._db.execute("DELETE FROM entry WHERE batch = ?", (batch_id,))

    def entries(self, batch_id: str, start: int, stop: int) -> list[Entry]:
        """Requests `start` to `stop` of a batch, not yet carried out."""
        query = "SELECT n, custom_id, sha256, params FROM entry WHERE batch = ? AND n >= ? AND n < ? ORDER BY n"
        return [Entry(*row) for row in self._db.execute(query, (batch_id, start, stop))]

    def finish_entries(self, rows: Iterable[tuple[str, str | None, str, str, int]]) -> None:
        """Store outcomes: (outcome, defect, line, batch, n); the params are no longer needed."""
        query = "UPDATE entry SET outcome = ?, defect = ?, line = ?, params = NULL WHERE batch = ? AND n = ?"
        self._db.executemany(query, rows)

    def results(self, batch_id: str, outcomes: tuple[str, ...]) -> Iterator[tuple[str, str | None, str]]:
        """Finished lines of a batch in the order of the vendor's file: (custom_id, defect, line)."""
        query = """
            SELECT custom_id, defect, line FROM entry
            WHERE batch = ? AND outcome IN (SELECT value FROM json_each(?)) ORDER BY place, n"""
        for row in self._db.execute(query, (batch_id, json.dumps(outcomes))):
            yield row["custom_id"], row["defect"], row["line"]

    def asked(self, batch_id: str) -> list[tuple[str, str, str | None]]:
        """What a batch was asked, in order: (custom_id, sha256, outcome)."""
        query = "SELECT custom_id, sha256, outcome FROM entry WHERE batch = ? ORDER BY n"
        return [tuple(row) for row in self._db.execute(query, (batch_id,))]

    # Standard calls and money

    def add_call(self, vendor: str, tenant: Tenant, model: str | None, sha256: str, time: float, status: int) -> None:
        """Record a standard call."""
        values = (vendor, tenant.organization, tenant.workspace, model, sha256, time, status)
        query = """
            INSERT INTO call (vendor, organization, workspace, model, sha256, time, status)
            VALUES (?, ?, ?, ?, ?, ?, ?)"""
        self._db.execute(query, values)

    def calls(self) -> list[dict[str, Any]]:
        """All standard calls, oldest first."""
        return [dict(row) for row in self._db.execute("SELECT * FROM call ORDER BY id")]

    def add_tokens(self, rows: Iterable[tuple[str, str, str, str, str, int]]) -> None:
        """Add to the bill: (vendor, model, lane, class, prompt, tokens)."""
        query = """
            INSERT INTO tally VALUES (?, ?, ?, ?, ?, ?)
            ON CONFLICT DO UPDATE SET tokens = tokens + excluded.tokens"""
        self._db.executemany(query, rows)

    def tallies(self) -> list[dict[str, Any]]:
        """All billed tokens."""
        query = "SELECT * FROM tally WHERE tokens > 0 ORDER BY vendor, model, lane, class, prompt"
        return [dict(row) for row in self._db.execute(query)]

    def request_counts(self) -> dict[str, int]:
        """Answered requests by vendor and lane; other tenants' batches are left out."""
        calls = "SELECT vendor, count(*) FROM call WHERE status = 200 GROUP BY vendor"
        entries = """
            SELECT batch.vendor, count(*) FROM entry JOIN batch ON batch.id = entry.batch
            WHERE outcome = 'succeeded' AND json_extract(details, '$.foreign') IS NULL
            GROUP BY batch.vendor"""
        lanes = {"standard": calls, "batch": entries}
        return {f"{row[0]}.{lane}": row[1] for lane, query in lanes.items() for row in self._db.execute(query)}

    # Prompt cache

    def cached(self, scope: str, prefixes: list[str], now: float) -> dict[str, str]:
        """Which of these prefixes are cached now, and who wrote each."""
        query = """
            SELECT prefix, writer FROM cache
            WHERE scope = ? AND expires_at > ? AND prefix IN (SELECT value FROM json_each(?))"""
        return dict(self._db.execute(query, (scope, now, json.dumps(prefixes))).fetchall())

    def refresh_cached(self, scope: str, prefixes: Iterable[str], now: float) -> None:
        """Let entries live for their full time again from `now`."""
        query = "UPDATE cache SET expires_at = max(expires_at, ? + seconds) WHERE scope = ? AND prefix = ?"
        self._db.executemany(query, [(now, scope, prefix) for prefix in prefixes])

    def put_cached(self, scope: str, entries: Iterable[tuple[str, int]], now: float, writer: str) -> None:
        """Write entries: (prefix, seconds to live from `now`)."""
        query = "INSERT OR REPLACE INTO cache VALUES (?, ?, ?, ?, ?)"
        values = [(scope, prefix, seconds, now + seconds, writer) for prefix, seconds in entries]
        self._db.executemany(query, values)

    # Faults

    def add_fault(self, spec: dict[str, Any]) -> int:
        """Arm a fault and return its number."""
        cursor = self._db.execute("INSERT INTO fault (spec) VALUES (?)", (json.dumps(spec),))
        return int(cursor.lastrowid or 0)

    def faults(self) -> list[dict[str, Any]]:
        """All armed faults with how often each was seen and used."""
        rows = self._db.execute("SELECT * FROM fault ORDER BY id")
        return [{**json.loads(row["spec"]), "id": row["id"], "seen": row["seen"], "used": row["used"]} for row in rows]

    def count_fault(self, fault_id: int, *, used: bool) -> None:
        """Note that a fault matched, and whether it struck."""
        self._db.execute("UPDATE fault SET seen = seen + 1, used = used + ? WHERE id = ?", (used, fault_id))

    def clear_faults(self) -> None:
        """Disarm all faults."""
        self._db.execute("DELETE FROM fault")
