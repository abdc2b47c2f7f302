"""What the store promises, on every database it runs on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test
from sqlalchemy.exc import DBAPIError

import presort
from presort.errors import StoreError, StoreVersionError
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
from presort.store import Store, migrations
from presort.store.base import (
    Admitted,
    JobView,
    LedgerRow,
    LedgerTotal,
    NewRequest,
    QueueView,
    Settlement,
    Spend,
)
from presort.store.database import _SCHEMA_LOCK
from presort.store.schema import REVISION, VERSION_TABLE, metadata

KEY = BatchKey("anthropic", "https://api.anthropic.com", "acme", "/v1/messages", "claude", (("beta", "ü"),))
OTHER_MODEL = replace(KEY, model="other")
OTHER_ACCOUNT = replace(KEY, account="umbrella")

LEASE = 10.0
DAY = 86_400.0
EXAMPLES = int(os.environ.get("PRESORT_TEST_EXAMPLES", "10"))
"""How many stories the model is told; they are the same in each run."""


# -- the databases -------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a new SQLite store to be copied, which is quicker than to make one."""
    path = tmp_path_factory.mktemp("template") / "presort.db"
    Store.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="session")
def postgres_database(postgres_url: str) -> Iterator[Callable[[], str]]:
    """Give a function that makes a new, empty database on the server; they are dropped at the end."""
    server = sqlalchemy.create_engine(postgres_url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
    made: list[str] = []

    def new() -> str:
        name = f"presort_{uuid.uuid4().hex}"
        with server.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        made.append(name)
        url = sqlalchemy.make_url(postgres_url).set(database=name)
        return url.render_as_string(hide_password=False)

    yield new
    if "PRESORT_TEST_POSTGRES" not in os.environ:
        return  # the server is thrown away as a whole
    with server.connect() as connection:
        for name in made:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres_store(postgres_database: Callable[[], str]) -> tuple[str, sqlalchemy.Engine]:
    """Give one database for all tests that start with empty tables, and a way to empty them."""
    url = postgres_database()
    Store.open(url).close()
    return url, sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give the URL of a store with empty tables."""
    if request.param == "sqlite":
        path = tmp_path / "presort.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        return f"sqlite:///{path}"
    postgres, engine = request.getfixturevalue("postgres_store")
    with engine.begin() as connection:
        for table in metadata.sorted_tables:
            connection.execute(table.delete())
    return str(postgres)


@pytest.fixture(params=["sqlite", "postgres"])
def unmade_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give the URL of a database without any tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new' / 'presort.db'}"
    return str(request.getfixturevalue("postgres_database")())


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """Give an open store with empty tables, in which `me` is alive until 1e9."""
    opened = Store.open(url)
    opened.join("me", "host", 1, 0, 1e9)
    yield opened
    opened.close()


# -- short words ---------------------------------------------------------------------------------------------
def new(payload: str = "a", *, key: BatchKey = KEY, occurrence: int = 0, **more: Any) -> NewRequest:
    """Return a request to be admitted, with a new id."""
    body = more.pop("body", payload.encode())
    fields = {"id": uuid.uuid4().hex, "deadline": DAY} | more
    return NewRequest(key=key, payload_hash=payload, body=body, occurrence=occurrence, **fields)


def admit(store: Store, *items: NewRequest, owner: str = "me", run: str | None = None, now: float = 1) -> list[Request]:
    """Admit requests and return what stands for them."""
    return [admitted.request for admitted in store.admit(owner, run, items, now)]


def ids(requests: Sequence[Request]) -> list[str]:
    """Return the ids of requests."""
    return [request.id for request in requests]


def pending(name: str = "1", *, key: BatchKey = KEY, due_at: float = 1, created_at: float = 1) -> Job:
    """Return a job that is about to be formed."""
    return Job(name * 32, key.id, JobState.PENDING, 0, 0, created_at, 0, due_at)


def form(
    store: Store, count: int = 3, name: str = "1", *, key: BatchKey = KEY, **more: Any
) -> tuple[Job, list[Request]]:
    """Admit requests, put them into a job, and return both."""
    requests = admit(store, *(new(f"{name}{number}", key=key) for number in range(count)), **more)
    assert count == store.form_job(pending(name, key=key), ids(requests))
    job = store.job(name * 32)
    assert job is not None
    return job, sorted(requests, key=lambda request: request.id)


def claim(store: Store, owner: str = "me", now: float = 1) -> Job:
    """Lease the one job that is due."""
    (claimed,) = store.claim_jobs(owner, now, LEASE, 10)
    return claimed.job


def answer(body: bytes = b"yes", **more: Any) -> Outcome:
    """Return a success."""
    return Outcome(**({"kind": OutcomeKind.SUCCEEDED, "status": 200, "body": body} | more))


def error(**more: Any) -> Outcome:
    """Return a refusal."""
    return answer(b"no", kind=OutcomeKind.ERRORED, status=400, reason="refused", **more)


def cost(name: str, spend: Spend = Spend.PAID, actual: str | None = "1", **more: Any) -> LedgerRow:
    """Return a ledger row."""
    amount = None if actual is None else Decimal(actual)
    fields: dict[str, Any] = {
        "custom_id": name,
        "spend": spend,
        "route": Route.BATCH,
        "provider": "anthropic",
        "model": "claude",
        "account": "acme",
        "at": 5.0,
        "usage": Usage(input_tokens=1),
        "baseline_usd": amount,
        "actual_usd": amount,
    }
    return LedgerRow(**(fields | more))


def settle(store: Store, *requests: Request, outcome: Outcome | None = None, now: float = 5) -> list[str]:
    """Settle requests, with their costs."""
    items = [Settlement(each.id, outcome or answer(), cost(each.custom_id)) for each in requests]
    return store.settle(items, now)


def spent(store: Store) -> dict[Spend, int]:
    """Return how many ledger rows there are of each kind."""
    return {total.spend: total.rows for total in store.totals()}


def racing(*steps: Callable[[], Any]) -> list[Any]:
    """Run steps in threads that begin together, and return their results."""
    barrier = threading.Barrier(len(steps))

    def run(step: Callable[[], Any]) -> Any:
        barrier.wait()
        return step()

    with ThreadPoolExecutor(len(steps)) as pool:
        return list(pool.map(run, steps))


def blocked(url: str, step: Callable[[], Any], *, by: str) -> Any:
    """Run a step against what another PostgreSQL session does, which commits once the step waits for it."""
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(1) as pool, engine.connect() as holder, engine.connect() as watcher:
        with holder.begin():
            holder.exec_driver_sql(by)
            result = pool.submit(step)
            while not watcher.exec_driver_sql(waiting).scalar():
                assert not result.done(), "nothing was waited for"
                watcher.rollback()
        return result.result(10)


def python(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start another process that can import presort and this module."""
    source = str(Path(presort.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": source},
        stdout=subprocess.PIPE,
        text=True,
    )


# -- opening -------------------------------------------------------------------------------------------------
def test_migrations_make_the_schema(unmade_url: str) -> None:
    """The migrations make exactly the tables that the code uses."""
    Store.open(unmade_url).close()

    engine = sqlalchemy.create_engine(unmade_url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        differences = compare_metadata(context, metadata)

    assert [] == differences
    assert [REVISION] == ScriptDirectory.from_config(migrations.config()).get_heads()


def test_first_start_is_raced(unmade_url: str) -> None:
    """Of processes that open a new store at the same moment one makes it, and all can use it."""
    program = (
        "import sys; from presort.store import Store; store = Store.open(sys.argv[1]);"
        "store.join(sys.argv[2], 'h', 1, 0, 9); store.close()"
    )
    processes = [python(program, unmade_url, str(number)) for number in range(2)]

    assert [0, 0] == [process.wait(60) for process in processes]
    for process in processes:
        process.communicate()
    store = Store.open(unmade_url)
    assert ["0", "1"] == [owner for owner, _, _ in store.owners(1)]
    store.close()


@pytest.mark.parametrize("unmade_url", ["postgres"], indirect=True)
def test_schema_is_made_by_one_at_a_time(unmade_url: str) -> None:
    """Who opens a PostgreSQL store while another makes its schema waits for that."""
    lock = f"SELECT pg_advisory_xact_lock({_SCHEMA_LOCK})"

    store = blocked(unmade_url, lambda: Store.open(unmade_url), by=lock)

    assert [] == store.owners(0)
    store.close()


def test_newer_store_is_refused(unmade_url: str) -> None:
    """A store of an unknown, thus newer, revision is refused with the way out, and nothing in it changes."""
    Store.open(unmade_url).close()
    engine = sqlalchemy.create_engine(unmade_url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")

    with pytest.raises(StoreVersionError, match=r"newer presort.*9999.*upgrade presort"):
        Store.open(unmade_url)

    with engine.begin() as connection:
        assert "9999" == connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar()


def test_closed_store_says_so(store: Store) -> None:
    """A store that was closed raises instead of opening itself again."""
    store.close()

    with pytest.raises(StoreError, match="was closed"):
        store.next_due()


# -- owners --------------------------------------------------------------------------------------------------
def test_lease_ends_at_its_time(store: Store) -> None:
    """An owner is listed until the moment its lease runs out, and no longer."""
    store.join("short", "there", 42, 0, LEASE)

    assert [("me", "host", 1), ("short", "there", 42)] == store.owners(LEASE - 0.001)
    assert [("me", "host", 1)] == store.owners(LEASE)


def test_heartbeat_prolongs(store: Store) -> None:
    """A heartbeat makes the lease run from now."""
    store.join("short", "there", 42, 0, LEASE)

    assert store.heartbeat("short", LEASE - 1, LEASE)
    assert 2 == len(store.owners(LEASE + 1))


def test_late_heartbeat_revives(store: Store) -> None:
    """A lease that ran out while nobody looked is prolonged as if it had not."""
    store.join("short", "there", 42, 0, LEASE)

    assert store.heartbeat("short", LEASE + 5, LEASE)


@pytest.mark.parametrize(
    "act",
    [
        lambda store: admit(store, new(), now=LEASE),
        lambda store: store.adopt("me", LEASE, 1),
        lambda store: store.rescue_standard(LEASE),
        lambda store: store.prune(LEASE, 1, 1),
    ],
    ids=["admit", "adopt", "rescue_standard", "prune"],
)
def test_dead_owner_learns_of_it(store: Store, act: Callable[[Store], Any]) -> None:
    """Once somebody has acted on an owner's absence its heartbeat is refused, until it joins anew."""
    store.join("short", "there", 42, 0, LEASE)

    act(store)

    assert not store.heartbeat("short", LEASE + 1, LEASE)
    store.join("short", "there", 42, LEASE + 1, LEASE)
    assert store.heartbeat("short", LEASE + 2, LEASE)


def test_acting_owner_is_alive(store: Store) -> None:
    """An owner whose own lease has run out does not bury itself by what it does."""
    store.join("late", "there", 42, 0, LEASE)

    admit(store, new(), owner="late", now=LEASE + 1)

    assert store.heartbeat("late", LEASE + 1, LEASE)


def test_unknown_owner_has_no_heartbeat(store: Store) -> None:
    """The heartbeat of an owner that never joined is refused."""
    assert not store.heartbeat("nobody", 1, LEASE)


def test_leave_ends_all_leases(store: Store) -> None:
    """When an owner leaves, its jobs can be claimed at once and nobody else's."""
    store.join("you", "there", 2, 0, 1e9)
    form(store, name="1")
    claim(store, "me")
    form(store, name="2")
    claim(store, "you")

    store.leave("me")

    assert ["you"] == [owner for owner, _, _ in store.owners(1)]
    assert ["1" * 32] == [claimed.job.id for claimed in store.claim_jobs("you", 1, LEASE, 10)]


# -- admission without a run ---------------------------------------------------------------------------------
def test_admitted_requests_are_queued(store: Store) -> None:
    """Requests are stored as QUEUED and come back in the order they were given."""
    items = [new("b"), new("a", deadline=7.5), new("c", key=OTHER_MODEL)]

    admitted = store.admit("me", None, items, 1.25)

    expected = [
        Admitted(
            Request(item.id, item.key.id, item.payload_hash, RequestState.QUEUED, 0, item.deadline, 1.25),
            attached=False,
        )
        for item in items
    ]
    assert expected == admitted
    assert sorted(item.id for item in items) == store.queued([item.id for item in items])


def test_nothing_is_admitted(store: Store) -> None:
    """No items are admitted without complaint."""
    assert [] == store.admit("me", None, [], 1)


def test_living_owners_request_is_never_attached(store: Store) -> None:
    """Without a run an equal payload of a living owner, or of oneself, is another request."""
    store.join("you", "there", 2, 0, LEASE)
    (mine,) = admit(store, new())

    (again,) = admit(store, new())
    (yours,) = admit(store, new(), owner="you")

    assert 3 == len({mine.id, again.id, yours.id})


def test_own_request_is_never_attached(store: Store) -> None:
    """A process whose lease ran out unnoticed does not attach to what its other callers wait for."""
    store.join("late", "there", 2, 0, LEASE)
    (first,) = admit(store, new(), owner="late")

    (second,) = admit(store, new(), owner="late", now=LEASE + 1)

    assert first.id != second.id


def test_dead_owners_request_is_attached_once(store: Store) -> None:
    """Of two equal payloads the first takes a dead owner's request over and the second is new."""
    (left,) = admit(store, new(deadline=3), owner="dead")

    first, second, third = store.admit("me", None, [new(), new(), new("b")], 2)

    assert Admitted(replace(left, deadline=DAY), attached=True) == first
    assert not second.attached
    assert not third.attached


def test_dead_owners_other_key_is_not_attached(store: Store) -> None:
    """What a dead owner left for another payload hash stays left."""
    admit(store, new("a"), owner="dead")

    assert [False] == [admitted.attached for admitted in store.admit("me", None, [new("b")], 2)]


def test_dead_owners_answer_is_attached(store: Store) -> None:
    """A request that was settled after its owner had died comes back with its outcome."""
    (left,) = admit(store, new(), owner="dead")
    outcome = answer(b"\0\xff", usage=Usage(1, 2, 3, 4, 5, 6), batch_id="b", reason="r")
    settle(store, left, outcome=outcome)

    (attached,) = admit(store, new(), now=6)

    assert replace(left, state=RequestState.SETTLED, outcome=outcome) == attached


def test_answer_that_was_handed_out_is_not_attached(store: Store) -> None:
    """What a dead owner had already been given is asked again."""
    (left,) = admit(store, new(), owner="dead")
    settle(store, left)
    store.hand_out([left.id])

    (asked,) = admit(store, new(), now=6)

    assert left.id != asked.id


def test_furthest_request_is_attached_first(store: Store) -> None:
    """Of several requests that a dead owner left, the one with an answer is taken first, then one in a job."""
    queued, in_job, settled = admit(store, new(), new(), new(), owner="dead")
    assert 1 == store.form_job(pending(), [in_job.id])
    settle(store, settled)

    taken = admit(store, new(), new(), new(), now=6)

    assert [settled.id, in_job.id, queued.id] == ids(taken)


def test_attached_request_has_a_living_owner(store: Store) -> None:
    """Once taken over, a request is not up for the next one."""
    admit(store, new(), owner="dead")
    (mine,) = admit(store, new())
    store.join("you", "there", 2, 0, 1e9)

    (yours,) = admit(store, new(), owner="you")

    assert mine.id != yours.id


def test_racing_attachers(store: Store) -> None:
    """Of processes that look for what a dead owner left at the same moment, exactly one gets each request."""
    owners = [f"racer{number}" for number in range(4)]
    for owner in owners:
        store.join(owner, "there", 2, 0, 1e9)
    left = admit(store, *(new(f"p{number}") for number in range(20)), owner="dead")

    def attach(owner: str) -> list[Admitted]:
        return store.admit(owner, None, [new(f"p{number}") for number in range(20)], 2)

    results = racing(*(lambda owner=owner: attach(owner) for owner in owners))

    attached = [each.request.id for result in results for each in result if each.attached]
    assert sorted(ids(left)) == sorted(attached)


def test_repeated_admission_does_no_harm(store: Store) -> None:
    """Admitted again with the same ids, as after a commit that nobody heard of, requests are not doubled."""
    items = [new("a"), new("a"), new("b")]
    first = store.admit("me", None, items, 1)

    again = store.admit("me", None, [*items, new("c")], 2)

    assert [each.request for each in first] == [each.request for each in again[:3]]
    assert [True, True, True, False] == [each.attached for each in again]


def test_any_body_and_name(store: Store) -> None:
    """Bodies come back byte for byte, and names in any script, with NUL bytes and very long ones too."""
    bodies = [b"\0", b"", "日本語 \N{ROCKET}".encode(), b"\xff\xfe", os.urandom(300_000)]
    items = [new(f"p{number}", body=body) for number, body in enumerate(bodies)]
    admitted = admit(store, *items, run="夜 'run' \N{ROCKET}")
    store.form_job(pending(), ids(admitted))

    assert dict(zip((each.custom_id for each in admitted), bodies, strict=True)) == dict(store.rows("1" * 32, None, 10))
    assert {"夜 'run' \N{ROCKET}"} == {request.run for request in store.unsettled("1" * 32, 10)}


def test_vendors_words_are_stored(store: Store) -> None:
    """What a vendor says is stored even if it holds characters that no database takes."""
    (request,) = admit(store, new())

    settle(store, request, outcome=answer(reason="a\0b\ud800c\n", batch_id="b"))

    outcome = store.outcomes([request.id])[request.id].outcome
    assert outcome is not None
    assert "a\ufffdb?c\n" == outcome.reason


# -- admission in a named run --------------------------------------------------------------------------------
def test_run_finds_its_requests_again(store: Store) -> None:
    """In a named run the same payload and occurrence is the same request, whoever asks."""
    first = admit(store, new(), new(occurrence=1), new("b"), run="r")

    again = store.admit("me", "r", [new(), new(occurrence=1), new(occurrence=2)], 2)

    assert first[:2] == [each.request for each in again[:2]]
    assert [True, True, False] == [each.attached for each in again]


def test_same_identity_twice_in_one_call(store: Store) -> None:
    """Two items of one call that name the same payload and occurrence stand for one request."""
    first, second = store.admit("me", "r", [new(), new()], 1)

    assert first.request == second.request
    assert [False, True] == [first.attached, second.attached]


def test_runs_are_apart(store: Store) -> None:
    """A payload of one run is not that of another, nor of none."""
    requests = [*admit(store, new(), run="r"), *admit(store, new(), run="s"), *admit(store, new())]

    assert 3 == len(set(ids(requests)))


def test_requests_of_a_run_are_not_left_to_others(store: Store) -> None:
    """A dead owner's request of a named run is not attached without the run's name."""
    (left,) = admit(store, new(), owner="dead", run="r")

    (asked,) = admit(store, new())

    assert left.id != asked.id


def test_success_replays(store: Store) -> None:
    """In a named run an answer comes back as often as it is asked for, also after it was handed out."""
    (request,) = admit(store, new(), run="r")
    settle(store, request)
    store.hand_out([request.id])

    for now in (6, 7):
        (again,) = admit(store, new(), run="r", now=now)
        assert answer() == again.outcome


def test_error_comes_back_until_it_was_handed_out(store: Store) -> None:
    """In a named run an error that nobody has seen is the outcome; once handed out, the request starts again."""
    (request,) = admit(store, new(), run="r")
    settle(store, request, outcome=error())

    (unseen,) = admit(store, new(), run="r", now=6)
    store.hand_out([request.id])
    (admitted,) = store.admit("me", "r", [new(deadline=2 * DAY)], 7)

    assert error() == unseen.outcome
    restarted = replace(request, attempt=1, deadline=2 * DAY, created_at=7)
    assert Admitted(restarted, attached=True) == admitted
    assert {} == store.outcomes([request.id])


def test_restarted_request_runs_like_a_new_one(store: Store) -> None:
    """A request that starts again has its body, goes into a job, and takes a new outcome."""
    (request,) = admit(store, new(), run="r")
    store.reroute([request.id], "too few")
    settle(store, request, outcome=error())
    store.hand_out([request.id])
    (again,) = admit(store, new(), run="r", now=6)

    assert 1 == store.form_job(pending(), [request.id])
    assert [(again.custom_id, b"a")] == store.rows("1" * 32, None, 10)
    assert [request.id] == settle(store, again, now=8)
    assert answer() == store.outcomes([request.id])[request.id].outcome
    assert {Spend.PAID: 2} == spent(store)


def test_racing_admissions_to_a_run(store: Store) -> None:
    """Processes that admit the same payloads to a run at the same moment share their requests."""

    def ask(owner: str) -> list[Admitted]:
        return store.admit(owner, "r", [new(f"p{number}") for number in range(20)], 1)

    results = racing(*(lambda owner=f"o{number}": ask(owner) for number in range(4)))

    assert 1 == len({tuple(each.request.id for each in result) for result in results})
    assert 20 == sum(not each.attached for result in results for each in result)


def test_dead_owners_queued_request_is_taken_over(store: Store) -> None:
    """In a named run a dead owner's QUEUED request belongs to whoever attaches to it, with its deadline."""
    admit(store, new(deadline=3), owner="dead", run="r")

    (mine,) = admit(store, new(), run="r")
    store.join("you", "there", 2, 0, 1e9)

    assert DAY == mine.deadline
    assert [] == store.adopt("you", 2, 10)


def test_withdrawing_a_shared_request_gives_it_up(store: Store) -> None:
    """A request that another owner waits for is not deleted when the first one withdraws: others may adopt it."""
    store.join("you", "there", 2, 0, 1e9)
    (shared, mine) = admit(store, new("a"), new("b"), run="r")
    admit(store, new("a"), owner="you", run="r")

    assert [mine.id] == store.withdraw([shared.id, mine.id])
    assert [shared.id] == [request.id for request, _, _ in store.adopt("you", 2, 10)]
    assert [shared.id] == store.withdraw([shared.id])


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
def test_request_taken_over_meanwhile(store: Store, url: str) -> None:
    """A request that a process which has just joined takes over at the same moment is not taken from it."""
    (left,) = admit(store, new(), owner="dead")
    taken = "INSERT INTO presort_owners VALUES ('late', 'h', 1, 1e9);UPDATE presort_requests SET owner = 'late'"

    (asked,) = blocked(url, lambda: admit(store, new()), by=taken)

    assert left.id != asked.id


# -- before a job --------------------------------------------------------------------------------------------
def test_only_queued_requests_are_withdrawn(store: Store) -> None:
    """Withdrawing deletes what is QUEUED and leaves what is on its way."""
    in_job, queued = admit(store, new(), new())
    store.form_job(pending(), [in_job.id])

    assert [queued.id] == store.withdraw([in_job.id, queued.id, "unknown"])
    assert [] == store.queued([queued.id])
    assert [in_job.id] == ids(store.unsettled("1" * 32, 10))


def test_adoption(store: Store) -> None:
    """Queued batch requests of named runs pass from dead owners to whoever adopts them, up to a limit."""
    store.join("you", "there", 2, 0, 1e9)
    left = admit(store, *(new(f"p{number}", body=b"12345") for number in range(3)), owner="dead", run="r")
    standard, in_job = admit(store, new("s"), new("j"), owner="dead", run="r")
    store.reroute([standard.id], "late")
    store.form_job(pending(), [in_job.id])
    admit(store, new("unnamed"), owner="dead")
    admit(store, new("yours"), owner="you", run="r")

    adopted = store.adopt("me", 2, 2)
    rest = store.adopt("me", 2, 10)

    by_id = sorted(left, key=lambda request: request.id)
    assert [(request, KEY, 5) for request in by_id] == adopted + rest
    assert [] == store.adopt("me", 2, 10)
    assert [] == store.adopt("you", 2, 10)


def test_racing_adopters(store: Store) -> None:
    """A dead owner's request is adopted by one of the processes that want it."""
    for number in range(4):
        store.join(f"o{number}", "there", 2, 0, 1e9)
    left = admit(store, *(new(f"p{number}") for number in range(30)), owner="dead", run="r")

    results = racing(*(lambda owner=f"o{number}": store.adopt(owner, 2, 10) for number in range(4)))
    results.append(store.adopt("me", 2, 100))

    assert sorted(ids(left)) == sorted(request.id for result in results for request, _, _ in result)


def test_reroute(store: Store) -> None:
    """Queued and batched requests go to the standard queue with a new attempt; settled ones stay, repeats too."""
    job, (first, second, third) = form(store)
    queued = admit(store, new("q"))[0]
    settle(store, third)

    assert 3 == store.reroute([*ids([first, second, third, queued]), "unknown"], "too late")
    assert 0 == store.reroute(ids([first, queued]), "again")

    assert [third.custom_id] == store.custom_ids(job.id)
    assert sorted(ids([first, second, queued])) == store.queued(ids([first, second, third, queued]))
    claimed = store.claim_standard("me", 2, 10)
    assert {("too late", 1)} == {(each.reason, each.request.attempt) for each in claimed}


# -- the standard route --------------------------------------------------------------------------------------
def on_standard(store: Store, *items: NewRequest, now: float = 1, **more: Any) -> list[Request]:
    """Admit requests and send them to the standard queue."""
    requests = admit(store, *items, now=now, **more)
    assert len(items) == store.reroute(ids(requests), "too few")
    return [replace(request, attempt=1) for request in requests]


def test_oldest_are_claimed_first(store: Store) -> None:
    """The standard queue is served by age, up to a limit, with bodies; batch requests are not in it."""
    (young,) = on_standard(store, new("y", body=b"young"), now=3)
    (old,) = on_standard(store, new("o", body=b"old", key=OTHER_MODEL), now=2)
    admit(store, new("b"))

    (first,) = store.claim_standard("me", 4, 1)
    (second,) = store.claim_standard("me", 4, 10)

    sent = replace(old, state=RequestState.ON_STANDARD, body=b"old")
    assert (sent, OTHER_MODEL, "too few") == (first.request, first.key, first.reason)
    assert young.id == second.request.id
    assert [] == store.claim_standard("me", 4, 10)


def test_dead_owner_claims_nothing(store: Store) -> None:
    """An owner whose lease has run out, or that never joined, may not send: it would be taken for cut off."""
    on_standard(store, new())
    store.join("late", "there", 2, 0, LEASE)

    assert [] == store.claim_standard("late", LEASE, 10)
    assert [] == store.claim_standard("nobody", 1, 10)
    assert 1 == len(store.claim_standard("late", LEASE - 1, 10))


def test_racing_senders(store: Store) -> None:
    """A queued request is claimed by one sender only."""
    requests = on_standard(store, *(new(f"p{number}") for number in range(30)))

    results = racing(*[lambda: store.claim_standard("me", 2, 10)] * 4)
    results.append(store.claim_standard("me", 2, 100))

    assert sorted(ids(requests)) == sorted(each.request.id for result in results for each in result)


def test_cut_off_calls_are_rescued_and_booked(store: Store) -> None:
    """What a dead sender may have sent is queued again, once, and stands in the ledger as in doubt."""
    store.join("cut", "there", 2, 0, LEASE)
    (mine,) = on_standard(store, new("m"), run="r")
    store.claim_standard("me", 1, 10)
    (doubtful,) = on_standard(store, new("d"), run="r")
    store.claim_standard("cut", 1, 10)

    assert [] == store.rescue_standard(LEASE - 1)
    (rescued,) = store.rescue_standard(LEASE)

    assert replace(doubtful, state=RequestState.ON_STANDARD) == rescued.request
    assert [] == store.rescue_standard(LEASE)
    (total,) = store.totals("r")
    assert (Spend.IN_DOUBT, Route.STANDARD, 1, 1) == (total.spend, total.route, total.rows, total.unknown)
    (again,) = store.claim_standard("me", LEASE, 10)
    assert (doubtful.id, 2, b"d") == (again.request.id, again.request.attempt, again.request.body)
    assert mine.id != again.request.id


def test_rescue_is_raced(store: Store) -> None:
    """A call that was cut off is rescued by one process only."""
    store.join("cut", "there", 2, 0, LEASE)
    on_standard(store, *(new(f"p{number}") for number in range(20)))
    store.claim_standard("cut", 1, 100)

    results = racing(*[lambda: store.rescue_standard(LEASE)] * 4)

    assert 20 == sum(map(len, results))
    assert {1} == {each.request.attempt for result in results for each in result}


def test_known_cost_ends_the_doubt(store: Store) -> None:
    """A call that was taken for cut off and is answered after all is booked once, with what it cost."""
    store.join("slow", "there", 2, 0, LEASE)
    (request,) = on_standard(store, new())
    store.claim_standard("slow", 1, 10)
    store.rescue_standard(LEASE)

    assert [request.id] == settle(store, request)
    store.book([cost(request.custom_id, Spend.IN_DOUBT)])

    assert {Spend.PAID: 1} == spent(store)


def test_release(store: Store) -> None:
    """Only its sender puts a request that was not sent back, with a new attempt."""
    (request,) = on_standard(store, new())
    store.claim_standard("me", 1, 10)

    store.release_standard("you", [request.id])
    assert [] == store.queued([request.id])
    store.release_standard("me", [request.id])
    store.release_standard("me", [request.id])

    (claimed,) = store.claim_standard("me", 2, 10)
    assert 2 == claimed.request.attempt


def test_release_of_what_was_not_sent(store: Store) -> None:
    """A request that waits for a key keeps its attempt, however often it is looked at."""
    (request,) = on_standard(store, new())
    for now in range(1, 150):
        (claimed,) = store.claim_standard("me", now, 10)
        store.release_standard("me", [request.id], sent=False)

    assert 1 == claimed.request.attempt


# -- outcomes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(OutcomeKind.SUCCEEDED, 200, b'{"\xc3\xa4": 1}', Usage(1, 2, 3, 4, 5, 6), Route.STANDARD),
        Outcome(OutcomeKind.ERRORED, 400, b"", None, Route.BATCH, "invalid_request", "msgbatch_1"),
        Outcome(OutcomeKind.EXPIRED, 408, b"\0"),
        Outcome(OutcomeKind.CANCELLED, 499, b"{}", Usage()),
    ],
    ids=lambda outcome: outcome.kind.value,
)
def test_outcome_comes_back_as_it_was(store: Store, outcome: Outcome) -> None:
    """Every field of an outcome is stored, and only settled requests have one."""
    settled, queued = admit(store, new("a"), new("b"))

    assert [settled.id] == settle(store, settled, outcome=outcome)

    expected = replace(settled, state=RequestState.SETTLED, outcome=outcome)
    assert {settled.id: expected} == store.outcomes([settled.id, queued.id, "unknown"])


def test_first_outcome_counts(store: Store) -> None:
    """A second outcome changes nothing, and what it cost is booked as wasted."""
    _, (first, *_) = form(store)
    settle(store, first)
    late = Settlement(first.id, error(), cost("late"))

    assert [] == store.settle([late], 6)

    assert answer() == store.outcomes([first.id])[first.id].outcome
    assert {Spend.PAID: 1, Spend.WASTED: 1} == spent(store)


def test_first_outcome_counts_within_a_call(store: Store) -> None:
    """Of two outcomes for one request in one call the first counts."""
    _, (first, *_) = form(store)

    settled = store.settle([Settlement(first.id, answer(), cost("1")), Settlement(first.id, error(), cost("2"))], 5)

    assert [first.id] == settled
    assert answer() == store.outcomes([first.id])[first.id].outcome
    assert {Spend.PAID: 1, Spend.WASTED: 1} == spent(store)


def test_settling_again_books_nothing(store: Store) -> None:
    """The same settlement repeated, as after a commit that nobody heard of, is not paid and not wasted again."""
    _, requests = form(store)

    assert ids(requests) == settle(store, *requests)
    assert [] == settle(store, *requests)

    assert {Spend.PAID: 3} == spent(store)


def test_racing_settlers(store: Store) -> None:
    """Of outcomes that arrive at the same moment in different orders each request keeps one; the rest is waste."""
    _, requests = form(store, 20)

    def arrive(number: int) -> list[str]:
        order = random.Random(number).sample(requests, len(requests))
        return store.settle(
            [Settlement(each.id, answer(f"{number}".encode()), cost(f"{number}{each.id}")) for each in order], 5
        )

    results = racing(*(lambda number=number: arrive(number) for number in range(4)))

    assert sorted(ids(requests)) == sorted(settled for result in results for settled in result)
    assert {Spend.PAID: 20, Spend.WASTED: 60} == spent(store)
    kept = store.outcomes(ids(requests))
    assert all(
        f"{number}".encode() == kept[settled].outcome.body  # type: ignore[union-attr]
        for number, result in enumerate(results)
        for settled in result
    )


def test_outcome_of_an_unknown_request_is_waste(store: Store) -> None:
    """An outcome for a request that is gone is not stored, and what it cost is booked as wasted."""
    assert [] == store.settle([Settlement("gone", answer(), cost("1")), Settlement("gone", answer())], 5)

    assert {Spend.WASTED: 1} == spent(store)


def test_late_answer_counts_after_regrouping(store: Store) -> None:
    """An answer from the old batch settles a request that waits in the next one, whose own answer is then waste."""
    old, requests = form(store)
    store.regroup(pending("2"), old.id, ids(requests))
    (again, *_) = store.unsettled("2" * 32, 10)

    assert [requests[0].id] == settle(store, requests[0])
    assert [] == settle(store, again)

    assert requests[0].custom_id != again.custom_id
    assert {Spend.PAID: 1, Spend.WASTED: 1} == spent(store)
    assert 2 == len(store.unsettled("2" * 32, 10))


@pytest.mark.parametrize("where", ["queue", "standard queue", "standard"])
def test_outcome_comes_in_time_wherever_the_request_is(store: Store, where: str) -> None:
    """An answer settles a request that meanwhile waits elsewhere, and takes it out of there."""
    (request,) = admit(store, new())
    if where != "queue":
        store.reroute([request.id], "late")
    if where == "standard":
        store.claim_standard("me", 1, 10)

    assert [request.id] == settle(store, request)

    assert [] == store.queued([request.id])
    assert [] == store.claim_standard("me", 9, 10)
    store.leave("me")
    assert [] == store.rescue_standard(9)


def test_prompt_goes_with_the_outcome(store: Store, url: str) -> None:
    """Once a request is settled its body is not in the database any more, and its answer goes when handed out."""
    _, requests = form(store, 2)

    settle(store, requests[0])

    assert [requests[1].custom_id] == [name for name, _ in store.rows("1" * 32, None, 10)]
    assert (1, 1) == (count(url, "presort_bodies"), count(url, "presort_answers"))
    store.hand_out(ids(requests))
    assert (1, 0) == (count(url, "presort_bodies"), count(url, "presort_answers"))


def count(url: str, table: str) -> int:
    """Count a table's rows, past the store."""
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one())


def test_settled_since(store: Store) -> None:
    """Settled requests are listed by time and id from a time on; those of one time are never cut apart."""
    _, requests = form(store, 7)
    early, tied, late = requests[:2], requests[2:6], requests[6:]
    settle(store, *late, now=9)
    settle(store, *tied, now=7.5)
    settle(store, *early, now=5)

    everything = [(each.id, at) for each, at in zip(requests, [5, 5, 7.5, 7.5, 7.5, 7.5, 9], strict=True)]
    assert everything == store.settled_since(0, 100)
    assert everything[2:] == store.settled_since(7.5, 100)
    assert everything[:6] == store.settled_since(0, 3)
    assert everything[6:] == store.settled_since(8, 100)
    assert [] == store.settled_since(10, 100)


def test_answer_without_run_is_handed_out_once(store: Store) -> None:
    """Handing out deletes the answer of a request without a run; that it was settled stays known."""
    _, requests = form(store, 2)
    settle(store, requests[0])

    store.hand_out([*ids(requests), "unknown"])

    settled = store.outcomes(ids(requests))[requests[0].id]
    assert settled.outcome is not None
    assert (OutcomeKind.SUCCEEDED, b"") == (settled.outcome.kind, settled.outcome.body)
    assert [requests[1].id] == ids(store.unsettled("1" * 32, 10))
    assert [] == settle(store, requests[0])


def test_answer_of_a_run_stays_when_handed_out(store: Store) -> None:
    """Handing out leaves the answers of a named run for replay."""
    (request,) = admit(store, new(), run="r")
    settle(store, request)

    store.hand_out([request.id])

    assert answer() == store.outcomes([request.id])[request.id].outcome


# -- runs ----------------------------------------------------------------------------------------------------
def test_finished_run_starts_anew(store: Store, url: str) -> None:
    """Finishing a run deletes its answers, and the same payload under the same name is a new request."""
    settled, waiting = admit(store, new("s"), new("w"), run="r")
    settle(store, settled)

    store.finish_run("r", 6)

    assert {} == store.outcomes([settled.id])
    assert 0 == count(url, "presort_answers")
    again = store.admit("me", "r", [new("s"), new("w")], 7)
    assert [False, False] == [each.attached for each in again]
    assert waiting.id not in {each.request.id for each in again}


def test_unfinished_requests_of_a_finished_run_are_collected(store: Store) -> None:
    """What is under way when its run is finished is settled and booked to it, and kept for nobody."""
    requests = admit(store, new("a"), new("b"), run="r")
    store.form_job(pending(), ids(requests))
    store.finish_run("r", 2)

    (first, second) = store.unsettled("1" * 32, 10)
    assert {"r"} == {first.run, second.run}
    assert ids([first]) == store.settle([Settlement(first.id, answer(), cost("1", run=first.run))], 5)
    assert answer() == store.outcomes([first.id])[first.id].outcome
    store.hand_out([first.id])

    handed_out = store.outcomes([first.id])[first.id].outcome
    assert handed_out is not None
    assert b"" == handed_out.body
    assert 1 == sum(total.rows for total in store.totals("r"))


def test_finishing_is_about_one_run(store: Store) -> None:
    """Finishing a run touches no other, and finishing one that never was does nothing."""
    (other,) = admit(store, new(), run="s")
    (none,) = admit(store, new())
    settle(store, other, none)

    store.finish_run("r", 6)

    assert {other.id, none.id} == set(store.outcomes([other.id, none.id]))
    assert store.opened_at("r") is None


def test_opening_of_a_run(store: Store) -> None:
    """A run was opened when it was first admitted to, or first admitted to after it was finished."""
    admit(store, new(), run="r", now=1)
    admit(store, new("b"), run="r", now=2)
    assert 1 == store.opened_at("r")

    store.finish_run("r", 3)
    assert 1 == store.opened_at("r")
    admit(store, new(), run="r", now=4)

    assert 4 == store.opened_at("r")


def test_prune_deletes_answers_nobody_replays(store: Store) -> None:
    """Answers of runs untouched for the time go, the others stay; a payload whose answer is gone starts again."""
    (old,) = admit(store, new(), run="old", now=1)
    (young,) = admit(store, new(), run="young", now=1)
    (recent,) = admit(store, new("late"), run="old", now=1)
    settle(store, old, young, now=5)
    settle(store, recent, now=95)
    admit(store, new(), run="young", now=90)

    assert 1 == store.prune(105, 100, DAY)
    assert 0 == store.prune(105, 100, DAY)

    answers = {
        name: each.outcome.body for name, each in store.outcomes(ids([old, young, recent])).items() if each.outcome
    }
    assert {old.id: b"", young.id: b"yes", recent.id: b"yes"} == answers
    (again,) = admit(store, new(), run="old", now=106)
    assert (old.id, RequestState.QUEUED, 1) == (again.id, again.state, again.attempt)


def test_prune_deletes_old_rows(store: Store) -> None:
    """Settled requests older than the time go with their completed job, whatever is unsettled stays, the ledger too."""
    job, requests = form(store, 2)
    settle(store, requests[0], now=5)
    assert 1 == store.prune(105, DAY, 100)
    assert store.job(job.id) is not None

    settle(store, requests[1], now=200)
    assert store.complete_job(job, 200)
    assert 0 == store.prune(299, DAY, 100)
    assert 1 == store.prune(300, DAY, 100)

    assert {} == store.outcomes(ids(requests))
    assert store.job(job.id) is None
    assert {Spend.PAID: 2} == spent(store)


def test_prune_deletes_what_nobody_waits_for(store: Store, url: str) -> None:
    """A dead owner's queued prompts go when they are old and past their deadline; those of the living stay."""
    admit(store, new(deadline=10), owner="dead")
    admit(store, new("b", deadline=10), owner="me")
    (late,) = admit(store, new("c"), owner="dead")

    assert 0 == store.prune(100, DAY, 100)
    assert 1 == store.prune(101, DAY, 100)

    assert 2 == count(url, "presort_bodies")
    assert [late.id] == store.queued([late.id])


# -- jobs ----------------------------------------------------------------------------------------------------
def test_job_is_formed_of_its_rows(store: Store) -> None:
    """A job has the count, the size and the earliest deadline of its requests, and says so when read."""
    requests = admit(store, new("a", body=b"123", deadline=9), new("b", body=b"4567", deadline=8))

    assert 2 == store.form_job(replace(pending(due_at=3), count=99, state=JobState.SUBMITTED), ids(requests))

    expected = Job("1" * 32, KEY.id, JobState.PENDING, 2, 7, 1, 8, 3)
    assert expected == store.job("1" * 32)
    assert {RequestState.IN_JOB} == {each.state for each in store.unsettled("1" * 32, 10)}
    assert {"1" * 32} == {each.job_id for each in store.unsettled("1" * 32, 10)}
    assert [] == store.queued(ids(requests))


def test_job_takes_only_what_is_queued_for_its_batch(store: Store) -> None:
    """Requests that are elsewhere, of another key or unknown are left out of the job and of its count."""
    queued, settled, rerouted, other = admit(store, new("a"), new("b"), new("c"), new("d", key=OTHER_MODEL))
    settle(store, settled)
    store.reroute([rerouted.id], "late")
    _, taken = form(store, 1, "2")

    wanted = [*ids([queued, settled, rerouted, other, *taken]), "unknown"]

    assert 1 == store.form_job(pending(), wanted)
    assert [queued.custom_id] == store.custom_ids("1" * 32)


def test_empty_job_is_not_stored(store: Store) -> None:
    """A job none of whose requests are left is not stored."""
    assert 0 == store.form_job(pending(), ["unknown"])
    assert 0 == store.form_job(pending(), [])
    assert store.job("1" * 32) is None


def test_forming_again_does_no_harm(store: Store) -> None:
    """Forming a job that is stored, as after a commit that nobody heard of, tells its count."""
    job, requests = form(store)
    claim(store)

    assert 3 == store.form_job(pending(), ids(requests))
    assert replace(job, fence=1) == store.job(job.id)


def test_racing_formers(store: Store) -> None:
    """A request that two jobs want at the same moment is in one of them."""
    requests = admit(store, *(new(f"p{number}") for number in range(20)))

    counts = racing(*(lambda name=name: store.form_job(pending(name), ids(requests)) for name in "1234"))

    assert [0, 0, 0, 20] == sorted(counts)


def test_regroup(store: Store) -> None:
    """Unsettled requests move into the next job with a new attempt; settled ones stay in the old job."""
    old, (settled, first, second) = form(store)
    settle(store, settled)
    (queued,) = admit(store, new("q"))

    assert 2 == store.regroup(pending("2"), old.id, ids([settled, first, second, queued]))
    assert 2 == store.regroup(pending("2"), old.id, ids([settled, first, second, queued]))
    assert 0 == store.regroup(pending("3"), old.id, ids([first]))

    assert [settled.custom_id] == store.custom_ids(old.id)
    again = [replace(each, attempt=1) for each in (first, second)]
    assert [each.custom_id for each in again] == store.custom_ids("2" * 32)
    assert 2 == len(store.rows("2" * 32, None, 10))
    assert store.job("3" * 32) is None


def test_claim(store: Store) -> None:
    """A job is claimed when due, by one owner at a time, and its fence rises by one with each lease."""
    job, _ = form(store)

    assert [] == store.claim_jobs("me", 0.5, LEASE, 10)
    (first,) = store.claim_jobs("me", 1, LEASE, 10)
    assert [] == store.claim_jobs("me", 1, LEASE, 10)
    assert [] == store.claim_jobs("you", LEASE, LEASE, 10)
    (second,) = store.claim_jobs("you", 1 + LEASE, LEASE, 10)

    assert (replace(job, fence=1), KEY) == (first.job, first.key)
    assert replace(job, fence=2) == second.job == store.job(job.id)


def test_claims_are_limited_and_by_due_time(store: Store) -> None:
    """The jobs that have been due longest are claimed first, up to a limit."""
    for name, due_at in [("1", 3), ("2", 1), ("3", 2)]:
        (request,) = admit(store, new(name))
        store.form_job(pending(name, due_at=due_at), [request.id])

    assert ["2" * 32, "3" * 32] == [each.job.id for each in store.claim_jobs("me", 5, LEASE, 2)]
    assert ["1" * 32] == [each.job.id for each in store.claim_jobs("me", 5, LEASE, 2)]


def test_racing_claimers(store: Store) -> None:
    """Threads that claim at the same moment never get the same job."""
    for number in range(16):
        form(store, 1, f"{number:x}")

    results = racing(*[lambda: store.claim_jobs("me", 2, LEASE, 5)] * 4)
    results.append(store.claim_jobs("me", 2, LEASE, 100))

    claimed = [each.job.id for result in results for each in result]
    assert [f"{number:x}" * 32 for number in range(16)] == sorted(claimed)


def test_racing_claimer_processes(store: Store, url: str) -> None:
    """Processes that claim at the same moment never get the same job, and together they get all."""
    for number in range(16):
        form(store, 1, f"{number:x}")
    program = (
        "import sys; from presort.store import Store; store = Store.open(sys.argv[1]);"
        "claimed = lambda: store.claim_jobs(sys.argv[2], 2, 9, 1);"
        "print('\\n'.join(each.job.id for batch in iter(claimed, []) for each in batch)); store.close()"
    )

    processes = [python(program, url, f"o{number}") for number in range(2)]
    claimed = [line for process in processes for line in process.communicate(timeout=60)[0].split()]

    assert [f"{number:x}" * 32 for number in range(16)] == sorted(claimed)


def test_fence(store: Store) -> None:
    """Who lost its lease to another can change the job no more, in whatever way."""
    _, requests = form(store)
    old = claim(store, "me", 1)
    fresh = claim(store, "you", 1 + LEASE)
    settle(store, *requests)

    assert store.update_job(old, {"note": "late"}) is None
    assert store.update_job(old, {}, release=True) is None
    assert store.mark_creating(old, KEY, 20) is None
    assert not store.complete_job(old, 20)
    assert [] == store.renew("me", [old.id], 20, LEASE)
    assert fresh == store.job(old.id)


def test_lease_that_ran_out_unnoticed(store: Store) -> None:
    """Who lost its lease to nobody may still change the job and renew the lease."""
    form(store)
    job = claim(store)

    assert store.update_job(job, {"note": "n"}) == replace(job, note="n")
    assert [job.id] == store.renew("me", [job.id, "unknown"], 2 * LEASE, LEASE)
    assert [] == store.claim_jobs("you", 3 * LEASE - 1, LEASE, 10)


def test_renewal(store: Store) -> None:
    """A renewed lease runs from now, and only its holder can renew it."""
    form(store)
    job = claim(store)

    assert [] == store.renew("you", [job.id], LEASE, LEASE)
    assert [job.id] == store.renew("me", [job.id], LEASE, LEASE)
    assert [] == store.claim_jobs("you", LEASE + 1, LEASE, 10)
    assert 1 == len(store.claim_jobs("you", 2 * LEASE, LEASE, 10))
    assert [] == store.renew("me", [], LEASE, LEASE)


def test_update_of_every_field(store: Store) -> None:
    """Every field of a job but its names and fence can be changed, and the job is returned as it then is."""
    form(store)
    job = claim(store)
    changes: dict[str, Any] = {
        "state": JobState.COLLECTING,
        "count": 7,
        "size_bytes": 2**40,
        "created_at": 1.5,
        "deadline": 2.5,
        "due_at": 3.5,
        "input_ref": "file",
        "create_at": 4.5,
        "batch_id": "b",
        "submitted_at": 5.5,
        "ended_at": 6.5,
        "cancelled_at": 7.5,
        "failures": 8,
        "note": "\N{SNOWMAN}",
    }

    changed = store.update_job(job, changes)

    assert replace(job, **changes) == changed == store.job(job.id)
    assert [] == store.claim_jobs("you", 4, LEASE, 10)


def test_update_with_release(store: Store) -> None:
    """A released job can be claimed at once."""
    form(store)
    job = claim(store)

    assert store.update_job(job, {"due_at": 2}, release=True)

    (again,) = store.claim_jobs("you", 2, LEASE, 10)
    assert 2 == again.job.fence


@pytest.mark.parametrize("name", ["id", "key_id", "fence", "lease_owner", "colour"])
def test_update_of_something_else(store: Store, name: str) -> None:
    """What is no field of a job, or names it, cannot be changed."""
    form(store)

    with pytest.raises(TypeError, match=f"`{name}`"):
        store.update_job(claim(store), {name: "x"})


def test_one_create_in_doubt_per_account(store: Store) -> None:
    """While a create of an account is in doubt no other may begin there, and those of other accounts may."""
    for name, key in [("1", KEY), ("2", OTHER_MODEL), ("3", OTHER_ACCOUNT)]:
        form(store, 1, name, key=key)
    jobs = {each.job.id[0]: each.job for each in store.claim_jobs("me", 1, LEASE, 10)}

    first = store.mark_creating(jobs["1"], KEY, 2)

    assert replace(jobs["1"], state=JobState.SUBMITTING, create_at=2) == first == store.job("1" * 32)
    assert store.mark_creating(jobs["2"], OTHER_MODEL, 3) is None
    assert jobs["2"] == store.job("2" * 32)
    assert store.mark_creating(jobs["3"], OTHER_ACCOUNT, 3) is not None
    assert store.mark_creating(jobs["1"], KEY, 4) is not None
    store.update_job(jobs["1"], {"state": JobState.SUBMITTED, "batch_id": "b"})
    assert store.mark_creating(jobs["2"], OTHER_MODEL, 5) is not None


def test_create_that_was_not_sent_is_not_in_doubt(store: Store) -> None:
    """A job that is SUBMITTING without `create_at` keeps nobody waiting."""
    form(store, 1, "1")
    form(store, 1, "2")
    one, two = (each.job for each in store.claim_jobs("me", 1, LEASE, 10))
    store.update_job(one, {"state": JobState.SUBMITTING})

    assert store.mark_creating(two, KEY, 2) is not None


def test_racing_creates(store: Store) -> None:
    """Of creates of one account that begin at the same moment, one does."""
    for name in "12345678":
        form(store, 1, name)
    jobs = [each.job for each in store.claim_jobs("me", 1, LEASE, 10)]

    results = racing(*(lambda job=job: store.mark_creating(job, KEY, 2) for job in jobs))

    assert 1 == sum(result is not None for result in results)


def test_completion(store: Store) -> None:
    """A job is completed once nothing in it is unsettled; it is then released, and due no more."""
    _, (first, second) = form(store, 2)
    job = claim(store)
    settle(store, first)

    assert not store.complete_job(job, 5)
    store.reroute([second.id], "late")
    assert store.complete_job(job, 6)
    assert store.complete_job(job, 7)

    assert replace(job, state=JobState.COMPLETED) == store.job(job.id)
    assert store.next_due() is None
    assert [] == store.claim_jobs("me", 1e6, LEASE, 10)
    assert [] == store.renew("me", [job.id], 5, LEASE)


def test_rows_in_pages(store: Store) -> None:
    """A job's rows come in the order of their ids, page after page, as do its custom_ids."""
    _, requests = form(store, 7)
    expected = [custom_id(each.id, 0) for each in requests]

    pages = [store.rows("1" * 32, None, 3)]
    while pages[-1]:
        pages.append(store.rows("1" * 32, pages[-1][-1][0], 3))

    assert [3, 3, 1, 0] == [len(page) for page in pages]
    assert expected == [name for page in pages for name, _ in page]
    assert expected == store.custom_ids("1" * 32)
    assert [] == store.rows("2" * 32, None, 3)
    with pytest.raises(ValueError, match="not a custom_id"):
        store.rows("1" * 32, "nonsense", 3)


def test_unsettled(store: Store) -> None:
    """The unsettled requests of a job are listed in the order of their ids, up to a limit."""
    job, requests = form(store, 4)
    settle(store, requests[1])

    left = [replace(each, state=RequestState.IN_JOB, job_id=job.id) for each in requests]
    assert [left[0], left[2], left[3]] == store.unsettled(job.id, 10)
    assert [left[0], left[2]] == store.unsettled(job.id, 2)


def test_known_batches(store: Store) -> None:
    """A vendor's batch is known if a job, even a completed one, has its id."""
    _, requests = form(store)
    job = claim(store)
    store.update_job(job, {"batch_id": "msgbatch_1"})
    settle(store, *requests)
    store.complete_job(job, 5)

    assert store.knows_batch("msgbatch_1")
    assert not store.knows_batch("msgbatch_2")


def test_next_due(store: Store) -> None:
    """The next due time is the earliest of the jobs that are not completed, leased or not."""
    assert store.next_due() is None
    form(store, 1, "1")
    job = claim(store)
    form(store, 1, "2")

    store.update_job(job, {"due_at": 0.5})

    assert 0.5 == store.next_due()


# -- people --------------------------------------------------------------------------------------------------
def test_job_views(store: Store) -> None:
    """Jobs are listed oldest first, with what is settled and who holds the lease; completed ones if asked for."""
    for name, created_at in [("1", 3), ("2", 2), ("3", 1)]:
        requests = admit(store, new(f"{name}a"), new(f"{name}b"))
        store.form_job(pending(name, created_at=created_at), ids(requests))
    jobs = {each.job.id[0]: each.job for each in store.claim_jobs("me", 1, LEASE, 10)}
    settle(store, *store.unsettled("3" * 32, 10))
    settle(store, *store.unsettled("2" * 32, 1))
    store.complete_job(jobs["3"], 5)

    under_way = [JobView(jobs["2"], KEY, 1, "host:1"), JobView(jobs["1"], KEY, 0, "host:1")]
    completed = JobView(replace(jobs["3"], state=JobState.COMPLETED), KEY, 2, None)
    assert under_way == store.job_views(5)
    assert [completed, *under_way] == store.job_views(5, all_jobs=True)
    assert {None} == {view.leader for view in store.job_views(1 + LEASE)}


def test_queue_views(store: Store) -> None:
    """What is queued is counted by batch key, run and route."""
    admit(store, new("a"), new("b"), now=2)
    admit(store, new("c"), now=1)
    admit(store, new("d"), run="r", now=3)
    admit(store, new("e", key=OTHER_MODEL), now=4)
    on_standard(store, new("f"), now=5)
    form(store)

    assert [
        QueueView(KEY, None, Route.BATCH, 3, 1),
        QueueView(KEY, "r", Route.BATCH, 1, 3),
        QueueView(OTHER_MODEL, None, Route.BATCH, 1, 4),
        QueueView(KEY, None, Route.STANDARD, 1, 5),
    ] == store.queue_views()


def test_keys_of_unfinished_work(store: Store, url: str) -> None:
    """The keys of whatever is queued, sent or in an unfinished job are told, also to a process that never saw them."""
    keys = {name: replace(KEY, model=name) for name in ("queued", "standard", "sent", "job", "done")}
    on_standard(store, new(key=keys["sent"]))
    store.claim_standard("me", 1, 10)
    on_standard(store, new(key=keys["standard"]))
    admit(store, new(key=keys["queued"]))
    form(store, 1, "1", key=keys["job"])
    settle(store, *admit(store, new(key=keys["done"])))

    other = Store.open(url)

    assert {"queued", "standard", "sent", "job"} == {key.model for key in other.batch_keys()}
    assert keys["job"] in set(other.batch_keys())
    other.close()


def test_organisations(store: Store) -> None:
    """The organisation last told for an account is remembered."""
    assert store.organisation("acme") is None

    store.remember_organisation("acme", "org-1")
    store.remember_organisation("acme", "org-2")

    assert "org-2" == store.organisation("acme")


# -- money ---------------------------------------------------------------------------------------------------
def test_ledger_rows_are_booked_once(store: Store) -> None:
    """A custom_id is booked once: the same answer is not paid and wasted, nor paid twice."""
    store.book([cost("1", actual="1"), cost("1", actual="2")])
    store.book([cost("1", Spend.WASTED, actual="4"), cost("1", actual="8")])
    store.book([])

    (total,) = store.totals()
    assert (Spend.PAID, 1, Decimal(1)) == (total.spend, total.rows, total.actual_usd)


def test_sums_are_exact(store: Store) -> None:
    """Amounts are added without rounding, however small or far apart."""
    amounts = ["0.1", "0.2", "0.0000000001", "1E-10", "123456789012345678901234567890", "-0.3", "0"]
    store.book([cost(f"{number}", actual=amount) for number, amount in enumerate(amounts)])

    (total,) = store.totals()

    assert Decimal("123456789012345678901234567890.0000000002") == total.actual_usd == total.baseline_usd
    assert 0 == total.unknown


def test_unknown_amounts_are_counted(store: Store) -> None:
    """A row whose baseline or cost is unknown is counted as such, and adds what is known of it."""
    store.book(
        [
            cost("1", actual="0.5"),
            cost("2", actual=None),
            replace(cost("3"), baseline_usd=None),
            replace(cost("4"), actual_usd=None, usage=None),
        ]
    )

    (total,) = store.totals()

    assert (4, 3) == (total.rows, total.unknown)
    assert (Decimal("1.5"), Decimal("1.5")) == (total.baseline_usd, total.actual_usd)
    assert Usage(input_tokens=3) == total.usage


def test_totals_are_apart(store: Store) -> None:
    """The ledger is summed by provider, model, route and spend."""
    usage = Usage(1, 2, 3, 4, 5, 2**40)
    store.book(
        [
            cost("1", usage=usage),
            cost("2", usage=usage),
            cost("3", Spend.WASTED),
            cost("4", route=Route.STANDARD),
            cost("5", model="a"),
            cost("6", provider="openai"),
        ]
    )

    assert [
        ("a", Route.BATCH, Spend.PAID, 1),
        ("claude", Route.BATCH, Spend.PAID, 2),
        ("claude", Route.BATCH, Spend.WASTED, 1),
        ("claude", Route.STANDARD, Spend.PAID, 1),
        ("claude", Route.BATCH, Spend.PAID, 1),
    ] == [(total.model, total.route, total.spend, total.rows) for total in store.totals()]
    assert (
        LedgerTotal(
            "anthropic",
            "claude",
            Route.BATCH,
            Spend.PAID,
            2,
            Usage(2, 4, 6, 8, 10, 2**41),
            Decimal(2),
            Decimal(2),
            0,
        )
        == store.totals()[1]
    )


def test_totals_of_a_run_or_since(store: Store) -> None:
    """The ledger is summed for one run, or from a time on, or both."""
    store.book([cost("1", run="r", at=1), cost("2", run="r", at=2), cost("3", run="s", at=3), cost("4", at=4)])

    def rows(run: str | None = None, since: float | None = None) -> int:
        return sum(total.rows for total in store.totals(run, since))

    assert (4, 2, 1) == (rows(), rows("r"), rows("s"))
    assert (3, 1, 0) == (rows(since=2), rows("r", 2), rows("unknown"))


# -- size ----------------------------------------------------------------------------------------------------
def test_long_lists(store: Store) -> None:
    """Lists longer than any database takes as parameters are worked on in one call."""
    items = [NewRequest(f"{number:032x}", KEY, f"{number}", b"x", DAY) for number in range(300)]
    names = [item.id for item in items] + [f"{number:032x}" for number in range(1_000_000, 1_066_000)]
    admit(store, *items)

    assert 300 == len(store.queued(names))
    assert 300 == store.form_job(pending(), names)
    assert 300 == len(store.settle([Settlement(name, answer()) for name in names], 5))
    assert 300 == len(store.outcomes(names))
    assert [] == store.withdraw(names)


# -- kill -9 -------------------------------------------------------------------------------------------------
GROUP = 40

CHILD = """
import sys
from presort.request import *
from presort.store import Store
from presort.store.base import *
key = BatchKey("anthropic", "https://api.anthropic.com", "acme", "/v1/messages", "claude")
store = Store.open(sys.argv[1])
print("ready", flush=True)
for group in range(10_000):
    names = [f"{group:016x}{number:016x}" for number in range(int(sys.argv[2]))]
    GROUP
    print(group, flush=True)
"""

ADMITTING = CHILD.replace(
    "GROUP",
    'store.admit("child", None, [NewRequest(name, key, name, b"x" * 2_000, 86_400) for name in names], 1)',
)

SETTLING = CHILD.replace(
    "GROUP",
    """
    costs = [LedgerRow(f"{name}-00", Spend.PAID, Route.BATCH, "p", "m", "a", 5, None, None, None) for name in names]
    answer = Outcome(OutcomeKind.SUCCEEDED, 200, b"y" * 2_000)
    store.settle([Settlement(name, answer, cost) for name, cost in zip(names, costs)], 5)
    """,
)


def killed(program: str, url: str, groups: int) -> int:
    """Run a program until it has reported some groups, kill it a little later, and return how many it reported."""
    process = python(program, url, str(GROUP))
    assert process.stdout is not None
    reported = -1
    while reported < groups:
        line = process.stdout.readline()
        assert line, "the program ended by itself"
        reported = reported if line == "ready\n" else int(line)
    threading.Event().wait(random.random() / 100)  # somewhere inside a transaction
    os.kill(process.pid, signal.SIGKILL)
    rest = process.communicate()[0].split()
    return int(rest[-1]) + 1 if rest else reported + 1


def names_of(group: int) -> list[str]:
    """Return the ids of a group that the programs above store."""
    return [f"{group:016x}{number:016x}" for number in range(GROUP)]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_kill_while_admitting(store: Store, url: str) -> None:
    """A process killed at any instruction has admitted each group wholly or not at all, and all it heard of."""
    reported = killed(ADMITTING, url, 5)
    again = Store.open(url)
    stored = [len(again.queued(names_of(group))) for group in range(reported + 3)]

    assert [GROUP] * reported == stored[:reported]
    assert stored[reported] in {0, GROUP}
    assert [0, 0] == stored[reported + 1 :]
    assert sum(stored) == count(url, "presort_bodies")
    again.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_kill_while_settling(store: Store, url: str) -> None:
    """A process killed at any instruction has settled each group with its costs wholly or not at all."""
    groups = 250
    admit(store, *(NewRequest(name, KEY, name, b"x", DAY) for group in range(groups) for name in names_of(group)))

    reported = killed(SETTLING, url, 5)
    again = Store.open(url)
    settled = [len(again.outcomes(names_of(group))) for group in range(reported + 3)]

    assert [GROUP] * reported == settled[:reported]
    assert settled[reported] in {0, GROUP}
    assert [0, 0] == settled[reported + 1 :]
    assert sum(settled) == count(url, "presort_answers") == sum(spent(again).values())
    assert groups * GROUP - sum(settled) == count(url, "presort_bodies")
    again.close()


# -- speed ---------------------------------------------------------------------------------------------------
def test_no_table_is_read_whole(tmp_path: Path, sqlite_template: Path) -> None:
    """In every method that the engine repeats, SQLite finds its rows by an index."""
    path = tmp_path / "presort.db"
    shutil.copy(sqlite_template, path)
    store = Store.open(f"sqlite:///{path}")
    store.join("me", "host", 1, 0, 1e9)
    seen: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        seen.append((statement, parameters[0] if many else parameters))

    sqlalchemy.event.listen(store._db._engine, "before_cursor_execute", note)
    exercise(store)
    sqlalchemy.event.remove(store._db._engine, "before_cursor_execute", note)

    tables = ("requests", "bodies", "answers", "jobs", "ledger")
    with store._db.read() as connection:
        plans = {
            (statement, row[3])
            for statement, parameters in seen
            if statement.split()[0] in {"SELECT", "UPDATE", "DELETE", "INSERT"}
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        }
    store.close()
    assert len(plans) > 50
    assert [] == [
        (plan, statement)
        for statement, plan in plans
        if plan.startswith(tuple(f"SCAN presort_{table}" for table in tables)) and " INDEX " not in plan
    ]


def exercise(store: Store) -> None:
    """Call every method that the engine calls again and again."""
    requests = admit(store, new("a"), new("b"), new("c"), new("d"))
    run = admit(store, new("a"), new("b"), run="r", owner="dead")
    admit(store, new("a"), run="r", owner="me")
    store.adopt("me", 2, 10)
    store.form_job(pending(), ids(requests[:2]))
    store.regroup(pending("2"), "1" * 32, ids(requests[1:2]))
    job = claim_all(store)
    store.renew("me", [job.id], 2, LEASE)
    store.mark_creating(job, KEY, 2)
    store.update_job(job, {"batch_id": "b"})
    store.rows(job.id, custom_id("0" * 32, 0), 10)
    store.unsettled(job.id, 10)
    store.custom_ids(job.id)
    store.knows_batch("b")
    store.next_due()
    store.reroute(ids(requests[2:]), "late")
    store.claim_standard("me", 2, 1)
    store.release_standard("me", ids(requests))
    store.rescue_standard(2)
    store.queued(ids(requests))
    settle(store, *requests[:3], *run)
    store.complete_job(job, 5)
    store.outcomes(ids(requests))
    store.settled_since(0, 10)
    store.hand_out(ids(requests))
    store.withdraw(ids(requests))
    store.job_views(1)
    store.queue_views()
    list(store.batch_keys())
    store.finish_run("r", 6)
    store.totals(run="r")
    store.leave("me")


def claim_all(store: Store) -> Job:
    """Lease what is due and return one of the jobs."""
    return store.claim_jobs("me", 1, LEASE, 10)[0].job


# -- threads -------------------------------------------------------------------------------------------------
def test_threads_in_disorder(store: Store) -> None:
    """Threads that work on the same rows in any order neither block one another nor lose a cost."""
    owners = [f"o{number}" for number in range(4)]
    for owner in owners:
        store.join(owner, "there", 2, 0, 1e9)

    def work(owner: str) -> None:
        luck = random.Random(owner)
        for turn in range(8):
            mine = admit(store, *(new(f"p{number}") for number in range(10)), owner=owner, run="r")
            names = luck.sample(ids(mine), len(mine))
            store.form_job(replace(pending(), id=uuid.uuid4().hex), names[:5])
            store.reroute(names[3:7], "late")
            claimed = store.claim_standard(owner, 2, 3)
            store.settle([Settlement(name, error(), cost(uuid.uuid4().hex)) for name in names[2:]], 5 + turn)
            store.settle([Settlement(each.request.id, answer(), cost(uuid.uuid4().hex)) for each in claimed], 6)
            store.hand_out(luck.sample(names, 5))
            store.prune(7, 1e9, 1e9)
            if turn % 4 == 3:
                store.finish_run("r", 8)

    racing(*(lambda owner=owner: work(owner) for owner in owners))

    booked = spent(store)
    assert 4 * 8 * 8 <= sum(booked.values())


# -- a model -------------------------------------------------------------------------------------------------
@dataclass
class ModelRow:
    """What the model knows of a request."""

    payload: str
    run: str | None
    occurrence: int
    owner: str
    state: RequestState = RequestState.QUEUED
    attempt: int = 0
    job: str | None = None
    kind: OutcomeKind | None = None
    handed_out: bool = False
    answer: bytes | None = None


class Model(RuleBasedStateMachine):
    """The store beside a dictionary that does the same."""

    requests = Bundle("requests")
    make: Callable[[], Store]

    def __init__(self) -> None:
        super().__init__()
        self.store = type(self).make()
        self.rows: dict[str, ModelRow] = {}
        self.alive = {"a", "b"}
        self.paid: dict[str, Spend] = {}
        self.jobs: dict[str, int] = {}
        self.fences: dict[str, int] = {}
        for owner in sorted(self.alive):
            self.store.join(owner, "h", 1, 0, 1e9)

    def teardown(self) -> None:
        """Close the store."""
        self.store.close()

    @rule(owner=st.sampled_from("ab"))
    def die(self, owner: str) -> None:
        """A process ends."""
        self.store.leave(owner)
        self.alive.discard(owner)

    @rule(owner=st.sampled_from("ab"))
    def live(self, owner: str) -> None:
        """A process begins."""
        self.store.join(owner, "h", 1, 0, 1e9)
        self.alive.add(owner)

    @rule(
        target=requests,
        owner=st.sampled_from("ab"),
        run=st.sampled_from([None, "r"]),
        payloads=st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 1)), min_size=1, max_size=3),
    )
    def admit(self, owner: str, run: str | None, payloads: list[tuple[str, int]]) -> Any:
        """Requests come in."""
        items = [new(payload, occurrence=occurrence) for payload, occurrence in payloads]
        admitted = self.store.admit(owner, run, items, 1)
        taken: set[str] = set()
        for item, each in zip(items, admitted, strict=True):
            row = self.rows.get(each.request.id)
            expected = self.expected(item, owner, run, taken)
            assert bool(expected) == each.attached
            if not expected:
                assert each.request.id == item.id
                row = self.rows[item.id] = ModelRow(item.payload_hash, run, item.occurrence, owner)
            else:
                assert each.request.id in expected
                assert row is not None
                if run is None:
                    taken.add(each.request.id)
                failed = row.kind is not None and (
                    row.answer is None or (row.kind is OutcomeKind.ERRORED and row.handed_out)
                )
                if run is not None and failed:
                    restarted = ModelRow(row.payload, run, row.occurrence, owner, attempt=row.attempt + 1)
                    row = self.rows[each.request.id] = restarted
                elif run is None or (row.kind is None and row.owner not in self.alive):
                    row.owner = owner
            assert (row.state, row.attempt) == (each.request.state, each.request.attempt)
            assert (row.answer if row.kind else None) == (each.request.outcome and each.request.outcome.body)
        return multiple(*(each.request.id for each in admitted))

    def expected(self, item: NewRequest, owner: str, run: str | None, taken: set[str]) -> set[str]:
        """Return the rows that may stand for a payload."""
        if run is not None:
            return {
                name
                for name, row in self.rows.items()
                if (row.run, row.payload, row.occurrence) == (run, item.payload_hash, item.occurrence)
            }
        left = {
            name: row
            for name, row in self.rows.items()
            if row.run is None
            and row.payload == item.payload_hash
            and not row.handed_out
            and row.owner not in self.alive | {owner}
            and name not in taken
        }
        order = [RequestState.QUEUED, RequestState.ON_STANDARD, RequestState.IN_JOB, RequestState.SETTLED]
        best = max((order.index(row.state) for row in left.values()), default=None)
        return {name for name, row in left.items() if order.index(row.state) == best}

    @rule(names=st.lists(requests, unique=True, min_size=1, max_size=4))
    def form(self, names: list[str]) -> None:
        """A job is formed."""
        job_id = uuid.uuid4().hex
        formed = self.store.form_job(replace(pending(), id=job_id), names)
        eligible = [name for name in names if name in self.rows and self.rows[name].state is RequestState.QUEUED]
        assert len(eligible) == formed
        for name in eligible:
            self.rows[name].state = RequestState.IN_JOB
            self.rows[name].job = job_id
        if eligible:
            self.jobs[job_id] = len(eligible)
            self.fences[job_id] = 0

    @rule(owner=st.sampled_from("ab"), now=st.integers(2, 40))
    def claim(self, owner: str, now: int) -> None:
        """Jobs are claimed, given back, and the fence is tried."""
        claimed = self.store.claim_jobs(owner, now, LEASE, 2)
        for each in claimed:
            self.fences[each.job.id] += 1
            assert self.fences[each.job.id] == each.job.fence
            assert self.store.update_job(replace(each.job, fence=each.job.fence - 1), {"note": "x"}) is None
            assert self.store.update_job(each.job, {"note": "y"}, release=now % 2 == 0) is not None

    @rule(
        names=st.lists(requests, min_size=1, max_size=4),
        kind=st.sampled_from([OutcomeKind.SUCCEEDED, OutcomeKind.ERRORED]),
        repeat=st.booleans(),
    )
    def settle(self, names: list[str], kind: OutcomeKind, repeat: bool) -> None:
        """Outcomes arrive."""
        marks = [uuid.uuid4().hex for _ in names]
        items = [
            Settlement(name, Outcome(kind, 200, mark.encode()), cost(mark))
            for name, mark in zip(names, marks, strict=True)
        ]
        first = self.store.settle(items, 5)
        for name, mark in zip(names, marks, strict=True):
            row = self.rows.get(name)
            won = row is not None and row.kind is None
            assert not won or name in first
            self.paid[mark] = Spend.PAID if won else Spend.WASTED
            if row is not None and won:
                row.state, row.kind, row.answer = RequestState.SETTLED, kind, mark.encode()
        if repeat:
            assert [] == self.store.settle(items, 6)

    @rule(names=st.lists(requests, min_size=1, max_size=3))
    def hand_out(self, names: list[str]) -> None:
        """Answers are given to their callers."""
        self.store.hand_out(names)
        for name in names:
            row = self.rows.get(name)
            if row is not None and row.kind is not None:
                row.handed_out = True
                if row.run is None:
                    row.answer = b""

    @invariant()
    def same_money(self) -> None:
        """The ledger is what the model paid."""
        booked = {spend: list(self.paid.values()).count(spend) for spend in set(self.paid.values())}
        assert booked == spent(self.store)

    @invariant()
    def same_rows(self) -> None:
        """Every request is where the model has it."""
        queued = {name for name, row in self.rows.items() if row.state is RequestState.QUEUED}
        assert sorted(queued) == self.store.queued(list(self.rows))
        outcomes = {
            name: each.outcome.body for name, each in self.store.outcomes(list(self.rows)).items() if each.outcome
        }
        assert {name: row.answer for name, row in self.rows.items() if row.kind is not None} == outcomes


def test_store_does_what_the_model_does(url: str, tmp_path: Path) -> None:
    """Whatever is admitted, formed, claimed, settled and handed out, the store agrees with a model."""
    numbers = iter(range(1_000_000))
    engine = None if url.startswith("sqlite") else sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)

    def make() -> Store:
        if engine is None:
            path = tmp_path / f"{next(numbers)}.db"
            shutil.copy(tmp_path / "presort.db", path)
            return Store.open(f"sqlite:///{path}")
        with engine.begin() as connection:
            for table in metadata.sorted_tables:
                connection.execute(table.delete())
        return Store.open(url)

    machine = type("MachineOfThisDatabase", (Model,), {"make": staticmethod(make)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_errors_hold_no_prompt(store: Store) -> None:
    """What the database refuses is reported without a single value of the request."""
    with pytest.raises(StoreError) as caught:
        store.admit("me", None, [new("a", body=b"my words", deadline=None)], 1)

    assert isinstance(caught.value.__cause__, DBAPIError)
    assert "my words" not in str(caught.value) + str(caught.value.__cause__)
    assert "\n" not in str(caught.value)


def test_withdraw_from_an_unsent_job(store: Store) -> None:
    """A request leaves a job that nobody has begun to submit; the job shrinks, and goes with its last request."""
    first, second = admit(store, new("one"), new("two"))
    store.form_job(pending(), [first.id, second.id])
    job_id = pending().id

    assert [first.id] == store.withdraw_unsent([first.id])
    left = store.job(job_id)
    assert left is not None
    assert (1, [second.custom_id]) == (left.count, store.custom_ids(job_id))
    assert sum(len(body) for _, body in store.rows(job_id, None, 9)) == left.size_bytes

    assert [second.id] == store.withdraw_unsent([first.id, second.id])
    assert store.job(job_id) is None


def test_withdraw_from_a_job_in_hand(store: Store) -> None:
    """Nothing leaves a job that is under lease or was sent: its requests are counted already."""
    [only] = admit(store, new("one"))
    store.form_job(pending(), [only.id])
    [claimed] = store.claim_jobs("me", 10.0, 60.0, 9)
    assert [] == store.withdraw_unsent([only.id])

    store.update_job(claimed.job, {"state": JobState.SUBMITTED, "batch_id": "b"}, release=True)
    assert [] == store.withdraw_unsent([only.id])
    assert [] == store.withdraw([only.id])
