"""What SQLAlchemy Core costs the store: against the standard library's sqlite3 doing the same SQL.

Rows are admitted, put into jobs and settled in groups, first by `Store`, then by `Plain` below, which runs the same
statements in the same transactions under the same pragmas, and takes and gives the same objects. The two take turns
group by group, so that a busy machine slows both. The rule: `Store` stays on SQLAlchemy Core unless it is over twice
as slow.

    python benchmarks/bench_store.py [--rows 100000] [--group 5000] [--body-bytes 1024] [--json]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any

from presort.job import Job, JobState
from presort.request import (
    BatchKey,
    Outcome,
    OutcomeKind,
    Request,
    RequestState,
    Route,
    Usage,
    custom_id,
)
from presort.store import Store
from presort.store.base import Admitted, LedgerRow, NewRequest, Settlement, Spend

KEY = BatchKey("anthropic", "https://api.anthropic.com", "acme", "/v1/messages", "claude-opus-4-1")
RATIO_LIMIT = 2.0


class Plain:
    """The same three verbs without SQLAlchemy."""

    def __init__(self, path: Path) -> None:
        raw = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "fullfsync = ON",
            "secure_delete = ON",
            "wal_autocheckpoint = 4000",
            "journal_size_limit = 67108864",
            "cache_size = -16384",
            "temp_store = MEMORY",
        ):
            raw.execute(f"PRAGMA {pragma}")
        self.raw = raw

    def admit(self, owner: str, items: Sequence[NewRequest], now: float) -> list[Admitted]:
        raw = self.raw
        raw.execute("BEGIN IMMEDIATE")
        raw.execute("DELETE FROM presort_owners WHERE lease_until <= ? AND id != ?", (now, owner))
        raw.execute(
            f"{_STANDING} WHERE r.open_run IS NULL AND r.handed_out = 0"
            " AND r.payload_hash IN (SELECT value FROM json_each(?)) AND r.owner != ?"
            " AND r.owner NOT IN (SELECT id FROM presort_owners) ORDER BY r.id",
            (json.dumps([item.payload_hash for item in items]), owner),
        ).fetchall()
        raw.execute(
            f"{_STANDING} WHERE r.id IN (SELECT value FROM json_each(?)) ORDER BY r.id",
            (json.dumps([item.id for item in items]),),
        ).fetchall()
        raw.execute("SELECT id FROM presort_owners").fetchall()
        key_id = KEY.id
        raw.executemany(
            "INSERT INTO presort_requests (id, run, open_run, payload_hash, occurrence, key_id, owner, shared,"
            " state, route, attempt, body_bytes, deadline, created_at, handed_out)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, 0, 'queued', 'batch', 0, ?, ?, ?, 0) ON CONFLICT DO NOTHING",
            [
                (
                    item.id,
                    None,
                    None,
                    item.payload_hash,
                    item.occurrence,
                    key_id,
                    owner,
                    len(item.body),
                    item.deadline,
                    now,
                )
                for item in items
            ],
        )
        raw.executemany(
            "INSERT INTO presort_bodies (id, body) VALUES (?, ?) ON CONFLICT DO NOTHING",
            [(item.id, item.body) for item in items],
        )
        admitted = [
            Admitted(
                Request(item.id, key_id, item.payload_hash, RequestState.QUEUED, 0, item.deadline, now),
                attached=False,
            )
            for item in items
        ]
        raw.execute("COMMIT")
        return admitted

    def form_job(self, job: Job, ids: Sequence[str]) -> int:
        raw = self.raw
        raw.execute("BEGIN IMMEDIATE")
        raw.execute("SELECT count FROM presort_jobs WHERE id = ?", (job.id,)).fetchone()
        found = raw.execute(
            "SELECT id, body_bytes, deadline FROM presort_requests WHERE state = 'queued' AND route = 'batch'"
            " AND key_id = ? AND id IN (SELECT value FROM json_each(?)) ORDER BY id",
            (job.key_id, json.dumps(ids)),
        ).fetchall()
        names = [field.name for field in fields(Job)]
        values = {name: getattr(job, name) for name in names}
        values |= {
            "state": "pending",
            "count": len(found),
            "size_bytes": sum(row[1] for row in found),
            "deadline": min(row[2] for row in found),
        }
        raw.execute(
            f"INSERT INTO presort_jobs ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
            [values[name] for name in names],
        )
        raw.execute(
            "UPDATE presort_requests SET state = ?, attempt = attempt + ?, job_id = ?"
            " WHERE id IN (SELECT value FROM json_each(?))",
            ("in_job", 0, job.id, json.dumps([row[0] for row in found])),
        )
        raw.execute("COMMIT")
        return len(found)

    def claim_jobs(self, owner: str, now: float, lease_seconds: float, limit: int) -> list[Job]:
        raw = self.raw
        raw.execute("BEGIN IMMEDIATE")
        found = raw.execute(
            f"SELECT {', '.join(field.name for field in fields(Job))} FROM presort_jobs"
            " WHERE state != 'completed' AND due_at <= ? AND (lease_until IS NULL OR lease_until <= ?)"
            " ORDER BY due_at, id LIMIT ?",
            (now, now, limit),
        ).fetchall()
        raw.execute(
            "UPDATE presort_jobs SET lease_owner = ?, lease_until = ?, fence = fence + 1"
            " WHERE id IN (SELECT value FROM json_each(?))",
            (owner, now + lease_seconds, json.dumps([row[0] for row in found])),
        )
        raw.execute("COMMIT")
        return [Job(row[0], row[1], JobState(row[2]), *row[3:16], row[16] + 1) for row in found]

    def settle(self, items: Sequence[Settlement], now: float) -> list[str]:
        raw = self.raw
        ids = json.dumps([item.request_id for item in items])
        raw.execute("BEGIN IMMEDIATE")
        found = raw.execute(
            "SELECT id, state FROM presort_requests WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id",
            (ids,),
        ).fetchall()
        still_open = {row[0] for row in found if row[1] != "settled"}
        winners = [item for item in items if item.request_id in still_open]
        raw.executemany(
            "UPDATE presort_requests SET state = 'settled', sender = ?, outcome = ?, status = ?,"
            " outcome_route = ?, reason = ?, batch_id = ?, settled_at = ? WHERE id = ?",
            [
                (
                    None,
                    item.outcome.kind.value,
                    item.outcome.status,
                    item.outcome.route.value,
                    item.outcome.reason,
                    item.outcome.batch_id,
                    now,
                    item.request_id,
                )
                for item in winners
            ],
        )
        raw.executemany(
            "INSERT INTO presort_answers (id, body, usage) VALUES (?, ?, ?)",
            [(item.request_id, item.outcome.body, json.dumps(_tokens(item.outcome.usage))) for item in winners],
        )
        raw.execute("DELETE FROM presort_bodies WHERE id IN (SELECT value FROM json_each(?))", (ids,))
        raw.executemany(
            _BOOK,
            [
                (
                    row.custom_id,
                    row.spend.value,
                    row.route.value,
                    row.provider,
                    row.model,
                    row.account,
                    row.at,
                    *_tokens(row.usage),
                    str(row.baseline_usd),
                    str(row.actual_usd),
                    row.run,
                    row.batch_id,
                )
                for row in (item.ledger for item in items)
                if row is not None
            ],
        )
        raw.execute("COMMIT")
        return [item.request_id for item in winners]


_STANDING = (
    "SELECT r.id, r.key_id, r.payload_hash, r.state, r.attempt, r.deadline, r.created_at, r.run, r.job_id,"
    " r.outcome, r.status, a.body, a.usage, r.outcome_route, r.reason, r.batch_id, r.occurrence, r.owner,"
    " r.shared, r.handed_out, a.id FROM presort_requests r LEFT JOIN presort_answers a ON a.id = r.id"
)
_LEDGER = (
    "custom_id spend route provider model account at input_tokens cache_write_5m_tokens cache_write_1h_tokens"
    " cache_write_tokens cache_read_tokens output_tokens baseline_usd actual_usd run batch_id"
).split()
_BOOK = (
    f"INSERT INTO presort_ledger ({', '.join(_LEDGER)}) VALUES ({', '.join('?' * len(_LEDGER))})"
    f" ON CONFLICT (custom_id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _LEDGER)}"
    " WHERE presort_ledger.spend = 'in_doubt' AND excluded.spend != 'in_doubt'"
)


def _tokens(usage: Usage | None) -> tuple[int, ...]:
    assert usage is not None
    return (
        usage.input_tokens,
        usage.cache_write_5m_tokens,
        usage.cache_write_1h_tokens,
        usage.cache_write_tokens,
        usage.cache_read_tokens,
        usage.output_tokens,
    )


def measure(rows: int, group: int, body_bytes: int, folder: Path) -> dict[str, Any]:
    """Return seconds by verb and side, and the ratios."""
    stores = [Store.open(f"sqlite:///{folder / name}.db") for name in ("core", "plain")]
    stores[1].close()
    core, plain = stores[0], Plain(folder / "plain.db")
    core.join("me", "here", 1, 0.0, 1e9)
    sides: dict[str, Any] = {"sqlalchemy": core, "sqlite3": plain}
    verbs = ("insert", "claim", "settle")
    taken: dict[str, dict[str, list[float]]] = {side: {verb: [] for verb in verbs} for side in sides}

    def clock(side: str, verb: str, step: Callable[..., Any], *arguments: Any) -> Any:
        gc.collect()
        began = time.perf_counter()
        result = step(*arguments)
        taken[side][verb].append(time.perf_counter() - began)
        return result

    def form_and_claim(store: Any, job: Job, ids: list[str]) -> int:
        count: int = store.form_job(job, ids)
        return count * len(store.claim_jobs("me", 2.0, 1e9, 10))

    for number in range(rows // group):
        names = [f"{n:032x}" for n in range(number * group, (number + 1) * group)]
        items = [NewRequest(name, KEY, name, os.urandom(body_bytes), 1e6) for name in names]
        settlements = [_settlement(name) for name in names]
        job = Job(f"{number:032x}", KEY.id, JobState.PENDING, 0, 0, 1.0, 0.0, 1.0)
        order = list(sides.items())
        for side, store in order if number % 2 else order[::-1]:
            run = (None,) if side == "sqlalchemy" else ()
            assert group == len(clock(side, "insert", store.admit, "me", *run, items, 1.0))
            assert group == clock(side, "claim", form_and_claim, store, job, names)
            assert group == len(clock(side, "settle", store.settle, settlements, 3.0))
    core.close()
    plain.raw.close()
    median = {side: {verb: statistics.median(times) for verb, times in by.items()} for side, by in taken.items()}
    for by in median.values():
        by["all"] = sum(by.values())
    return {
        "rows": rows,
        "group": group,
        "body_bytes": body_bytes,
        "sqlite": sqlite3.sqlite_version,
        "total_seconds": {side: sum(map(sum, by.values())) for side, by in taken.items()},
        "median_seconds_per_group": median,
        "ratio": {verb: median["sqlalchemy"][verb] / median["sqlite3"][verb] for verb in (*verbs, "all")},
    }


def _settlement(request_id: str) -> Settlement:
    usage = Usage(input_tokens=1200, cache_read_tokens=800, output_tokens=300)
    outcome = Outcome(OutcomeKind.SUCCEEDED, 200, os.urandom(1024), usage, batch_id="msgbatch_1")
    cost = LedgerRow(
        custom_id(request_id, 0),
        Spend.PAID,
        Route.BATCH,
        KEY.provider,
        KEY.model,
        KEY.account,
        3.0,
        usage,
        Decimal("0.0135"),
        Decimal("0.00675"),
        None,
        "msgbatch_1",
    )
    return Settlement(request_id, outcome, cost)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--group", type=int, default=5_000)
    parser.add_argument("--body-bytes", type=int, default=1_024)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.rows, arguments.group, arguments.body_bytes, Path(folder))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['rows']} rows of {result['body_bytes']} bytes, SQLite {result['sqlite']}")
        print(f"median seconds for {result['group']} rows")
        print(f"{'':8}{'SQLAlchemy':>12}{'sqlite3':>12}{'ratio':>8}")
        for verb, ratio in result["ratio"].items():
            ours, theirs = (result["median_seconds_per_group"][side][verb] for side in ("sqlalchemy", "sqlite3"))
            print(f"{verb:8}{ours:12.3f}{theirs:12.3f}{ratio:8.2f}")
    return 0 if result["ratio"]["all"] <= RATIO_LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
