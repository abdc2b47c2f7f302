"""The tables, as SQLAlchemy Core knows them. The migrations create them; a test holds the two together.

There are no foreign keys: rows that belong together are written and deleted in one transaction by one method,
the ledger outlives what it speaks of, and a key check for every row would cost a tenth of the store's speed.

Bodies and answers have tables of their own, since both databases rewrite a whole row when one of its columns
changes: a request moves through its states without its prompt being copied each time. Every name begins with
`presort_`, for in PostgreSQL the database may be the host application's.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    literal_column,
)

from presort.job import JobState
from presort.request import RequestState, Route

REVISION = "0001"
"""The Alembic revision these tables stand for."""
VERSION_TABLE = "presort_version"

_Id = Text().with_variant(Text(collation="C"), "postgresql")
"""Ids are compared byte by byte, whatever the database's language."""

metadata = MetaData()

batch_keys = Table(
    "presort_batch_keys",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("provider", Text, nullable=False),
    Column("base_url", Text, nullable=False),
    Column("account", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("headers", Text, nullable=False),
    sqlite_with_rowid=False,
)

runs = Table(
    "presort_runs",
    metadata,
    Column("name", Text, primary_key=True),
    Column("opened_at", Double, nullable=False),
    Column("touched_at", Double, nullable=False),
    Column("finished_at", Double),
    sqlite_with_rowid=False,
)

owners = Table(
    "presort_owners",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("lease_until", Double, nullable=False),
    sqlite_with_rowid=False,
)

requests = Table(
    "presort_requests",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("run", Text),  # the run it was admitted in; stays when that run is finished
    Column("open_run", Text),  # the run it is matched in: as `run`, until that is finished
    Column("payload_hash", _Id, nullable=False),
    Column("occurrence", Integer, nullable=False),
    Column("key_id", _Id, nullable=False),
    Column("owner", _Id, nullable=False),  # "" is nobody, and thus dead
    Column("shared", Integer, nullable=False),  # 1: a second owner waits for it
    Column("state", Text, nullable=False),
    Column("route", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("job_id", _Id),
    Column("sender", _Id),
    Column("body_bytes", BigInteger, nullable=False),
    Column("deadline", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("outcome", Text),
    Column("status", Integer),
    Column("outcome_route", Text),
    Column("reason", Text),
    Column("batch_id", Text),
    Column("settled_at", Double),
    Column("handed_out", Integer, nullable=False),  # 1: somebody got the answer, or it is gone
    sqlite_with_rowid=False,
)

bodies = Table(
    "presort_bodies",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

answers = Table(
    "presort_answers",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("body", LargeBinary, nullable=False),
    Column("usage", Text),  # JSON list in the order of `Usage`
)

jobs = Table(
    "presort_jobs",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("key_id", _Id, nullable=False),
    Column("state", Text, nullable=False),
    Column("count", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("deadline", Double, nullable=False),
    Column("due_at", Double, nullable=False),
    Column("input_ref", Text),
    Column("create_at", Double),
    Column("batch_id", Text),
    Column("submitted_at", Double),
    Column("ended_at", Double),
    Column("cancelled_at", Double),
    Column("failures", Integer, nullable=False),
    Column("note", Text),
    Column("fence", BigInteger, nullable=False),
    Column("lease_owner", _Id),
    Column("lease_until", Double),
    Column("completed_at", Double),
    sqlite_with_rowid=False,
)

ledger = Table(
    "presort_ledger",
    metadata,
    Column("custom_id", _Id, primary_key=True),
    Column("spend", Text, nullable=False),
    Column("route", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("account", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("input_tokens", BigInteger),
    Column("cache_write_5m_tokens", BigInteger),
    Column("cache_write_1h_tokens", BigInteger),
    Column("cache_write_tokens", BigInteger),
    Column("cache_read_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("baseline_usd", Text),  # decimal digits: SQLite has no exact fractions
    Column("actual_usd", Text),
    Column("run", Text),
    Column("batch_id", Text),
    sqlite_with_rowid=False,
)

accounts = Table(
    "presort_accounts",
    metadata,
    Column("account", Text, primary_key=True),
    Column("organisation", Text, nullable=False),
    sqlite_with_rowid=False,
)


# Constants in the SQL text, not parameters: only so does SQLite see that a partial index fits.
QUEUED: ColumnElement[str] = literal_column(f"'{RequestState.QUEUED}'")
SETTLED: ColumnElement[str] = literal_column(f"'{RequestState.SETTLED}'")
BATCH: ColumnElement[str] = literal_column(f"'{Route.BATCH}'")
STANDARD: ColumnElement[str] = literal_column(f"'{Route.STANDARD}'")
NO: ColumnElement[int] = literal_column("0")
YES: ColumnElement[int] = literal_column("1")

queued_for_batch = (requests.c.state == QUEUED) & (requests.c.route == BATCH)
queued_for_standard = (requests.c.state == QUEUED) & (requests.c.route == STANDARD)
on_standard = requests.c.state == literal_column(f"'{RequestState.ON_STANDARD}'")
awaits_caller = requests.c.open_run.is_(None) & (requests.c.handed_out == NO)
unfinished = jobs.c.state != literal_column(f"'{JobState.COMPLETED}'")


def _index(name: str, *columns: ColumnElement[object], unique: bool = False, where: ColumnElement[bool]) -> None:
    Index(name, *columns, unique=unique, sqlite_where=where, postgresql_where=where)


# admit: the row that stands for a payload of a named run; no two racing processes can store it twice
_index(
    "presort_requests_identity",
    requests.c.open_run,
    requests.c.payload_hash,
    requests.c.occurrence,
    unique=True,
    where=requests.c.open_run.is_not(None),
)
# admit: rows without a run that a dead owner may have left; shrinks as answers are handed out
_index("presort_requests_awaits_caller", requests.c.payload_hash, where=awaits_caller)
# adopt, queue_views, prune: what waits for a batch, by whose it is
_index("presort_requests_for_batch", requests.c.owner, where=queued_for_batch)
# claim_standard: the oldest first
_index("presort_requests_for_standard", requests.c.created_at, requests.c.id, where=queued_for_standard)
# rescue_standard: what is in doubt, by who sent it
_index("presort_requests_on_standard", requests.c.sender, where=on_standard)
# rows, unsettled, custom_ids, complete_job, job_views: a job's requests in order; the state spares the row
_index(
    "presort_requests_job",
    requests.c.job_id,
    requests.c.id,
    requests.c.state,
    where=requests.c.job_id.is_not(None),
)
# settled_since, prune
_index("presort_requests_settled", requests.c.settled_at, requests.c.id, where=requests.c.settled_at.is_not(None))
# claim_jobs, next_due, job_views, batch_keys, mark_creating: few are unfinished at any time
_index("presort_jobs_due", jobs.c.due_at, jobs.c.id, where=unfinished)
# leave: the leases of one owner; renew has the ids
_index("presort_jobs_lease", jobs.c.lease_owner, where=jobs.c.lease_owner.is_not(None))
# knows_batch
_index("presort_jobs_batch", jobs.c.batch_id, where=jobs.c.batch_id.is_not(None))
# totals of a run
_index("presort_ledger_run", ledger.c.run, where=ledger.c.run.is_not(None))
# totals since a time
Index("presort_ledger_at", ledger.c.at)
