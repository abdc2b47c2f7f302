"""Create everything."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "presort_accounts",
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("organisation", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("account"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "presort_answers",
        sa.Column("id", _ID, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("usage", sa.Text),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "presort_batch_keys",
        sa.Column("id", _ID, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("base_url", sa.Text, nullable=False),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("headers", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "presort_bodies",
        sa.Column("id", _ID, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "presort_jobs",
        sa.Column("id", _ID, nullable=False),
        sa.Column("key_id", _ID, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("count", sa.Integer, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("deadline", sa.Double, nullable=False),
        sa.Column("due_at", sa.Double, nullable=False),
        sa.Column("input_ref", sa.Text),
        sa.Column("create_at", sa.Double),
        sa.Column("batch_id", sa.Text),
        sa.Column("submitted_at", sa.Double),
        sa.Column("ended_at", sa.Double),
        sa.Column("cancelled_at", sa.Double),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("note", sa.Text),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("lease_owner", _ID),
        sa.Column("lease_until", sa.Double),
        sa.Column("completed_at", sa.Double),
        sa.PrimaryKeyConstraint("id"),
        sqlite_with_rowid=False,
    )
    op.create_index("presort_jobs_batch", "presort_jobs", ["batch_id"], **_where("batch_id IS NOT NULL"))
    op.create_index("presort_jobs_due", "presort_jobs", ["due_at", "id"], **_where("state != 'completed'"))
    op.create_index("presort_jobs_lease", "presort_jobs", ["lease_owner"], **_where("lease_owner IS NOT NULL"))
    op.create_table(
        "presort_ledger",
        sa.Column("custom_id", _ID, nullable=False),
        sa.Column("spend", sa.Text, nullable=False),
        sa.Column("route", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("input_tokens", sa.BigInteger),
        sa.Column("cache_write_5m_tokens", sa.BigInteger),
        sa.Column("cache_write_1h_tokens", sa.BigInteger),
        sa.Column("cache_write_tokens", sa.BigInteger),
        sa.Column("cache_read_tokens", sa.BigInteger),
        sa.Column("output_tokens", sa.BigInteger),
        sa.Column("baseline_usd", sa.Text),
        sa.Column("actual_usd", sa.Text),
        sa.Column("run", sa.Text),
        sa.Column("batch_id", sa.Text),
        sa.PrimaryKeyConstraint("custom_id"),
        sqlite_with_rowid=False,
    )
    op.create_index("presort_ledger_at", "presort_ledger", ["at"], unique=False)
    op.create_index("presort_ledger_run", "presort_ledger", ["run"], **_where("run IS NOT NULL"))
    op.create_table(
        "presort_owners",
        sa.Column("id", _ID, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "presort_requests",
        sa.Column("id", _ID, nullable=False),
        sa.Column("run", sa.Text),
        sa.Column("open_run", sa.Text),
        sa.Column("payload_hash", _ID, nullable=False),
        sa.Column("occurrence", sa.Integer, nullable=False),
        sa.Column("key_id", _ID, nullable=False),
        sa.Column("owner", _ID, nullable=False),
        sa.Column("shared", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("route", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("job_id", _ID),
        sa.Column("sender", _ID),
        sa.Column("body_bytes", sa.BigInteger, nullable=False),
        sa.Column("deadline", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("outcome", sa.Text),
        sa.Column("status", sa.Integer),
        sa.Column("outcome_route", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("batch_id", sa.Text),
        sa.Column("settled_at", sa.Double),
        sa.Column("handed_out", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "presort_requests_awaits_caller",
        "presort_requests",
        ["payload_hash"],
        **_where("open_run IS NULL AND handed_out = 0"),
    )
    op.create_index(
        "presort_requests_for_batch",
        "presort_requests",
        ["owner"],
        **_where("state = 'queued' AND route = 'batch'"),
    )
    op.create_index(
        "presort_requests_for_standard",
        "presort_requests",
        ["created_at", "id"],
        **_where("state = 'queued' AND route = 'standard'"),
    )
    op.create_index(
        "presort_requests_identity",
        "presort_requests",
        ["open_run", "payload_hash", "occurrence"],
        unique=True,
        **_where("open_run IS NOT NULL"),
    )
    op.create_index(
        "presort_requests_job", "presort_requests", ["job_id", "id", "state"], **_where("job_id IS NOT NULL")
    )
    op.create_index("presort_requests_on_standard", "presort_requests", ["sender"], **_where("state = 'on_standard'"))
    op.create_index(
        "presort_requests_settled",
        "presort_requests",
        ["settled_at", "id"],
        **_where("settled_at IS NOT NULL"),
    )
    op.create_table(
        "presort_runs",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("opened_at", sa.Double, nullable=False),
        sa.Column("touched_at", sa.Double, nullable=False),
        sa.Column("finished_at", sa.Double),
        sa.PrimaryKeyConstraint("name"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    for table in (
        "presort_accounts",
        "presort_answers",
        "presort_batch_keys",
        "presort_bodies",
        "presort_jobs",
        "presort_ledger",
        "presort_owners",
        "presort_requests",
        "presort_runs",
    ):
        op.drop_table(table)
