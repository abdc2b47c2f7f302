"""Between the tables' rows and the vocabulary: each conversion once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from decimal import Decimal
from operator import attrgetter
from typing import Any

from sqlalchemy import Column, ColumnElement, Select, select

from presort.job import Job, JobState
from presort.request import BatchKey, Outcome, OutcomeKind, Request, RequestState, Route, Usage
from presort.store.base import LedgerRow, Settlement
from presort.store.schema import answers, batch_keys, jobs, ledger, requests

REQUEST: Sequence[ColumnElement[Any]] = (
    requests.c.id,
    requests.c.key_id,
    requests.c.payload_hash,
    requests.c.state,
    requests.c.attempt,
    requests.c.deadline,
    requests.c.created_at,
    requests.c.run,
    requests.c.job_id,
)
"""What `request_of` reads first."""

OUTCOME: Sequence[ColumnElement[Any]] = (
    requests.c.outcome,
    requests.c.status,
    answers.c.body,
    answers.c.usage,
    requests.c.outcome_route,
    requests.c.reason,
    requests.c.batch_id,
)
"""What `outcome_of` reads."""

JOB: Sequence[ColumnElement[Any]] = tuple(jobs.c[field.name] for field in fields(Job))
"""What `job_of` reads."""

USAGE: Sequence[Column[Any]] = tuple(ledger.c[field.name] for field in fields(Usage))
"""The ledger's columns for the fields of `Usage`, in their order."""

_USAGE_NAMES = tuple(field.name for field in fields(Usage))
_tokens = attrgetter(*_USAGE_NAMES)  # `astuple` is fifty times slower


def with_outcomes(*more: ColumnElement[Any]) -> Select[Any]:
    """Select requests with their outcomes, and some columns besides at the end."""
    return select(*REQUEST, *OUTCOME, *more).select_from(requests.outerjoin(answers, answers.c.id == requests.c.id))


def request_of(row: Sequence[Any]) -> Request:
    """Read `REQUEST`."""
    return Request(row[0], row[1], row[2], RequestState(row[3]), row[4], row[5], row[6], row[7], row[8])


def settled_of(row: Sequence[Any]) -> Request:
    """Read `REQUEST` and `OUTCOME`."""
    kind, status, body, usage, route, reason, batch_id = row[9:16]
    outcome = None
    if kind is not None:
        outcome = Outcome(
            OutcomeKind(kind),
            status,
            bytes(body or b""),
            None if usage is None else Usage(*json.loads(usage)),
            Route(route),
            reason,
            batch_id,
        )
    return Request(row[0], row[1], row[2], RequestState(row[3]), row[4], row[5], row[6], row[7], row[8], None, outcome)


def outcome_row(item: Settlement, now: float) -> dict[str, Any]:
    """Write an outcome into its request's row, which `of_id` names."""
    outcome = item.outcome
    return {
        "of_id": item.request_id,
        "outcome": outcome.kind.value,
        "status": outcome.status,
        "outcome_route": outcome.route.value,
        "reason": clean(outcome.reason),
        "batch_id": clean(outcome.batch_id),
        "settled_at": now,
    }


def answer_row(item: Settlement) -> dict[str, Any]:
    """Write an outcome's answer."""
    usage = item.outcome.usage
    return {
        "id": item.request_id,
        "body": item.outcome.body,
        "usage": None if usage is None else json.dumps(_tokens(usage)),
    }


def job_of(row: Sequence[Any]) -> Job:
    """Read `JOB`."""
    return Job(row[0], row[1], JobState(row[2]), *row[3 : len(JOB)])


def job_row(changes: dict[str, Any]) -> dict[str, Any]:
    """Write some or all of a job's fields."""
    written = dict(changes)
    if "state" in written:
        written["state"] = JobState(written["state"]).value
    for name in ("input_ref", "batch_id", "note"):
        if name in written:
            written[name] = clean(written[name])
    return written


def key_of(row: Sequence[Any]) -> BatchKey:
    """Read a row of `batch_keys`."""
    return BatchKey(row[1], row[2], row[3], row[4], row[5], tuple(map(tuple, json.loads(row[6]))))


def key_row(key: BatchKey) -> dict[str, Any]:
    """Write a batch key."""
    return {
        batch_keys.c.id.name: key.id,
        "provider": key.provider,
        "base_url": key.base_url,
        "account": key.account,
        "endpoint": key.endpoint,
        "model": key.model,
        "headers": json.dumps(key.headers),
    }


def ledger_row(row: LedgerRow) -> dict[str, Any]:
    """Write what an answer cost."""
    usage = (None,) * len(USAGE) if row.usage is None else _tokens(row.usage)
    return {
        "custom_id": row.custom_id,
        "spend": row.spend.value,
        "route": row.route.value,
        "provider": row.provider,
        "model": row.model,
        "account": row.account,
        "at": row.at,
        **dict(zip(_USAGE_NAMES, usage, strict=True)),
        "baseline_usd": _digits(row.baseline_usd),
        "actual_usd": _digits(row.actual_usd),
        "run": row.run,
        "batch_id": clean(row.batch_id),
    }


def clean(text: str | None) -> str | None:
    """Replace what PostgreSQL or UTF-8 cannot hold: vendors' words may contain anything."""
    if text is None or text.isprintable():
        return text
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _digits(amount: Decimal | None) -> str | None:
    return None if amount is None else str(amount)
