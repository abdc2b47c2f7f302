"""What version 1 left when it was killed, every later version opens and finishes: `data/make_store_fixture.py`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import until
from emulator_server import EmulatorServer, sha256_of
from presort.config import load
from presort.engine import Engine, Link, Run, worker
from presort.job import JobState
from presort.providers import provider
from presort.providers.base import Prompt
from presort.request import BatchKey, Payload, Route
from presort.store import Store
from presort.store.base import Spend

KEPT = Path(__file__).parent / "data" / "store-v1"


@pytest.fixture
def left(tmp_path) -> dict[str, Any]:
    """Copy the kept files, and read what must become of them."""
    for name in ("presort", "emulator"):
        shutil.copy(KEPT / f"{name}.sqlite", tmp_path / f"{name}.db")
    expected: dict[str, Any] = json.loads((KEPT / "expected.json").read_text(encoding="utf-8"))
    return expected


@contextmanager
def vendors(left: dict[str, Any], folder: Path) -> Iterator[EmulatorServer]:
    """Run the kept emulator where it ran: at its port, which is part of the store's rows, and in its time."""
    end = time.monotonic() + 30
    while not _free(left["port"]):  # somebody else may be running this very test
        if time.monotonic() > end:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"port {left['port']} is taken")
        time.sleep(0.2)
    state = sqlite3.connect(folder / "emulator.db")
    offset = json.dumps(left["made_at"] - time.time())
    state.execute("INSERT OR REPLACE INTO setting (name, value) VALUES ('clock_offset_seconds', ?)", (offset,))
    state.commit()
    state.close()
    with EmulatorServer(port=left["port"], state=folder / "emulator.db") as emulator:
        yield emulator


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@contextmanager
def process(left: dict[str, Any], folder: Path) -> Iterator[Engine]:
    """Open the store as a new process that has every account's key."""
    settings = load(
        batching={"flush_seconds": 0.05, "poll_interval_seconds": 0.05},
        reconcile_window_seconds=1,
        replay_seconds=1e10,
        lease_seconds=5,
        keys=lambda _provider, account: left["keys"][account],
    )
    engine = Engine(settings, Store.open(f"sqlite:///{folder / 'presort.db'}"))
    try:
        yield engine
    finally:
        engine.close()


def payload(left: dict[str, Any], wanted: dict[str, Any]) -> Payload:
    """Make a request's payload once more."""
    wire = provider(wanted["vendor"])
    path = wire.default_base_url.partition("://")[2].partition("/")[2]
    base_url = f"http://127.0.0.1:{left['port']}/{path}".rstrip("/")
    model = json.loads(wanted["body"])["model"]
    endpoint, _, headers = wire.compose(model, Prompt("", ""))
    key = BatchKey(wire.name, base_url, wanted["account"], endpoint, model, headers)
    return Payload(key, wanted["body"].encode())


def test_every_state_is_there(left, tmp_path):
    """The kept store holds jobs in every state but the last, and requests without a job in every way there is."""
    database = sqlite3.connect(tmp_path / "presort.db")
    states = {row[0] for row in database.execute("SELECT state FROM presort_jobs")}
    loose = {
        tuple(row)
        for row in database.execute(
            "SELECT state, route, open_run IS NOT NULL FROM presort_requests WHERE job_id IS NULL"
        )
    }
    in_doubt = database.execute("SELECT count(*) FROM presort_jobs WHERE create_at IS NOT NULL AND batch_id IS NULL")
    sizes = sum(path.stat().st_size for path in KEPT.iterdir())
    in_doubts = in_doubt.fetchone()[0]
    database.close()

    assert set(JobState) - {JobState.COMPLETED} == states
    assert {
        ("queued", "batch", 1),
        ("queued", "batch", 0),
        ("queued", "standard", 1),
        ("on_standard", "standard", 1),
        ("settled", "batch", 1),
    } == loose
    assert 2 == in_doubts
    assert sizes < 300_000


def test_everything_is_finished(left, tmp_path, monkeypatch):
    """Each call of the run gets its answer, none is asked twice, and a second process replays the answers unasked."""
    monkeypatch.setattr(worker, "KEEP_ROWS_SECONDS", 1e10)  # years may have passed since the rows were settled
    named = [wanted for wanted in left["requests"] if wanted["run"] == left["run"]]
    others = [wanted for wanted in left["requests"] if wanted["run"] is None]
    # the error had not been read: it is replayed once, and tried anew by the process after
    everything = Counter(sha256_of(json.loads(wanted["body"])) for wanted in left["requests"])
    answers: list[list[bytes]] = []
    with vendors(left, tmp_path) as emulator:
        emulator.set(batch_seconds=0.1)
        emulator.advance(4000)
        for turn in range(2):
            with process(left, tmp_path) as engine:
                links = {account: Link(key) for account, key in left["keys"].items()}
                run = Run(left["run"])
                futures = [
                    engine.park(payload(left, wanted), run=run, link=links[wanted["account"]]) for wanted in named
                ]
                outcomes = [future.result(60) for future in futures]
                answers.append([outcome.body for outcome in outcomes])
                kinds = [wanted["kind"] if turn == 0 else "succeeded" for wanted in named]
                assert kinds == [outcome.kind.value for outcome in outcomes]
                if turn == 0:
                    unnamed = [
                        engine.park(payload(left, wanted), link=links[wanted["account"]]).result(60)
                        for wanted in others
                    ]
                    assert all(outcome.succeeded for outcome in unnamed)
                    until(lambda: {JobState.COMPLETED} == {view.job.state for view in engine.jobs(all_jobs=True)[0]})
                    assert [] == engine.jobs()[1]
                totals = engine.totals()
        assert everything == Counter(emulator.asked())

    first, second = (
        [body for body, wanted in zip(each, named, strict=True) if wanted["kind"] == "succeeded"] for each in answers
    )
    assert len(named) - 1 == len(set(first))
    assert first == second
    rows = Counter[Spend]()
    for total in totals:
        rows[total.spend] += total.rows
    assert {Spend.PAID: sum(everything.values()), Spend.IN_DOUBT: 2} == rows
    standard = sum(total.rows for total in totals if total.route is Route.STANDARD and total.spend is Spend.PAID)
    assert 4 == standard


def test_it_finishes_unasked(left, tmp_path, monkeypatch):
    """A process that only opens the store collects and sends what the run left, though nobody makes its calls again."""
    monkeypatch.setattr(worker, "KEEP_ROWS_SECONDS", 1e10)
    with vendors(left, tmp_path) as emulator:
        emulator.set(batch_seconds=0.1)
        emulator.advance(4000)
        with process(left, tmp_path) as engine:
            named = [wanted for wanted in left["requests"] if wanted["run"] and wanted["kind"] == "succeeded"]

            def finished() -> bool:
                done = {JobState.COMPLETED} == {view.job.state for view in engine.jobs(all_jobs=True)[0]}
                return done and all(view.run is None for view in engine.jobs()[1])

            until(finished, 60)
            until(lambda: {sha256_of(json.loads(wanted["body"])) for wanted in named} <= set(emulator.asked()))
        asked = Counter(emulator.asked())

    assert {1} == set(asked.values())
    unsent = [wanted for wanted in left["requests"] if wanted["what"] == "queued, without a run"]
    assert not {sha256_of(json.loads(wanted["body"])) for wanted in unsent} & set(asked)
