"""Callers that go away, keys that change, runs that are named, calls that trickle in, processes that share a store."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import presort
from bench import Bench, Guest, kinds, until
from emulator_server import EmulatorServer
from presort import runtime
from presort.config import load
from presort.engine import Group, Link, Run, poller, submitter
from presort.job import JobState
from presort.monitoring.receipt import make_receipt, usd_text
from presort.request import Outcome, OutcomeKind, Payload, Route
from presort.store.base import Spend

SLOW = {"flush_seconds": 3600}
"""Calls accumulate until somebody says flush."""

VENDORS = pytest.mark.parametrize("vendor", ["anthropic", "openai"])

MakeBench = Callable[..., Bench]


@pytest.fixture
def emulator() -> Iterator[EmulatorServer]:
    """Run an emulator whose batches end when its clock is moved."""
    with EmulatorServer(batch_seconds=1000) as running:
        yield running


@pytest.fixture
def make_bench(emulator, tmp_path, monkeypatch) -> Iterator[MakeBench]:
    """Make engines on one store, one for each process that there would be; no key is in the environment."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(submitter, "KEY_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(poller, "KEY_PAUSE_SECONDS", 0.1)
    with contextlib.ExitStack() as stack:

        def make(vendor: str = "anthropic", **options: Any) -> Bench:
            bench = Bench(emulator, vendor, tmp_path, **options)
            stack.callback(bench.engine.close)
            return bench

        yield make


def submitted(bench: Bench) -> bool:
    """Whether there are jobs, and the vendor has all of them."""
    return bool(bench.states) and {JobState.SUBMITTED} == set(bench.states)


def waiting(bench: Bench) -> int:
    """Count the requests that accumulate."""
    return sum(view.count for view in bench.engine.jobs()[1])


def results(futures: Any) -> list[Outcome]:
    """Wait for outcomes."""
    return [future.result(30) for future in futures]


def twins(payload: Payload, count: int) -> list[Payload]:
    """Return the same payload several times."""
    return [payload] * count


# -- cancelled callers ---------------------------------------------------------------------------------------------
@VENDORS
def test_cancelled_before_submission(make_bench, vendor):
    """A call that is cancelled while it accumulates is withdrawn: the vendor is asked the others only."""
    bench = make_bench(vendor, **SLOW)
    futures = bench.park(*bench.payloads(3))
    until(lambda: waiting(bench) == 3)
    assert futures[1].cancel()
    until(lambda: waiting(bench) == 2)
    bench.engine.flush()
    until(lambda: submitted(bench))
    bench.emulator.advance(2000)

    assert [OutcomeKind.SUCCEEDED] * 2 == kinds(results([futures[0], futures[2]]))
    assert [2] == bench.batches
    assert 2 == len(bench.emulator.asked())


@VENDORS
def test_cancelled_after_submission(make_bench, vendor):
    """A call cancelled after submission is collected and paid for all the same; the batch and its other calls go on."""
    bench = make_bench(vendor)
    futures = bench.park(*bench.payloads(3))
    until(lambda: submitted(bench) and sum(view.job.count for view in bench.jobs()) == 3)
    batches = bench.batches
    assert futures[1].cancel()
    bench.emulator.advance(2000)

    assert [OutcomeKind.SUCCEEDED] * 2 == kinds(results([futures[0], futures[2]]))
    until(lambda: {JobState.COMPLETED} == set(bench.states))
    assert {"completed"} == {batch["status"] for batch in bench.emulator.record()["batches"]}
    assert batches == bench.batches
    receipt = make_receipt(bench.engine.totals())
    assert 3 == sum(total.rows for total in bench.engine.totals())
    assert bench.emulator.invoice()["total_usd"] == usd_text(receipt.paid_usd)


def test_detached_call_is_attached_again(make_bench):
    """What a cancelled caller left is handed to the same call of a later process, once, and not asked again."""
    first = make_bench()
    futures = first.park(*first.payloads(2))
    until(lambda: submitted(first) and sum(view.job.count for view in first.jobs()) == 2)
    futures[0].cancel()
    first.emulator.advance(2000)
    results(futures[1:])
    until(lambda: {JobState.COMPLETED} == set(first.states))
    first.engine.close()
    assert 2 == len(first.emulator.asked())

    second = make_bench()
    [again] = results(second.park(second.payloads(1)[0]))
    assert (OutcomeKind.SUCCEEDED, Route.BATCH) == (again.kind, again.route)
    assert 2 == len(second.emulator.asked())

    third = make_bench()
    second.engine.close()
    [anew] = third.park(third.payloads(1)[0])
    until(lambda: 3 == len(third.emulator.asked()))
    anew.cancel()


def test_cancelled_in_an_unsent_job(make_bench):
    """A call cancelled while its job waits to be submitted for the first time is withdrawn, and never asked."""
    bench = make_bench()
    bench.emulator.fault("status", on="create_batch", status=429, retry_after=1)
    futures = bench.park(*bench.payloads(2), group=Group(expected=2))
    until(lambda: any("429" in (view.job.note or "") for view in bench.jobs()))
    futures[0].cancel()
    until(bench.emulator.asked)

    assert 1 == len(bench.emulator.asked())


def test_living_process_keeps_its_own(make_bench):
    """While the process of a detached call lives, no other process is given its answer."""
    first, second = make_bench(), make_bench()
    [future] = first.park(first.payloads(1)[0])
    until(lambda: submitted(first))
    future.cancel()
    [other] = second.park(second.payloads(1)[0])

    until(lambda: 2 == len(first.emulator.asked()))
    other.cancel()


def test_cancelled_in_an_unsent_group(make_bench):
    """A group of which a member is cancelled before it was handed in is sent without waiting for that one."""
    bench = make_bench(**SLOW)
    group = Group(expected=3)
    payloads = bench.payloads(3)
    futures = bench.park(*payloads[:2], group=group)
    until(lambda: waiting(bench) == 2)
    group.leave()

    until(lambda: [2] == bench.batches)
    bench.emulator.advance(2000)
    assert [OutcomeKind.SUCCEEDED] * 2 == kinds(results(futures))


@pytest.fixture
def process(emulator, tmp_path, monkeypatch):
    """Configure this very process, as a host would, and undo it."""
    runtime.close()
    monkeypatch.setattr(runtime, "_settings", None)
    presort.configure(
        store=tmp_path / "presort.db",
        batching={"flush_seconds": 0.05, "poll_interval_seconds": 0.05},
        lease_seconds=5,
    )
    yield runtime
    runtime.close()
    monkeypatch.setattr(runtime, "_settings", None)


async def ask(emulator: EmulatorServer, text: str = "Document", key: str = "test-key") -> bytes:
    """Ask through a client of one's own, by the batch route."""
    body = {"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": text}]}
    headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
    async with presort.transport(httpx2.AsyncClient()) as client:
        with presort.batch():
            response = await client.post(f"{emulator.url}/v1/messages", json=body, headers=headers, timeout=None)
    response.raise_for_status()
    return response.content


async def sent() -> None:
    """Wait until the vendor has a batch of this process."""
    await asyncio.to_thread(until, lambda: [view for view in presort.jobs()[0] if view.job.batch_id])


@pytest.mark.parametrize("early", [True, False], ids=["accumulating", "submitted"])
def test_wait_for(emulator, process, early):
    """`asyncio.wait_for` around a parked call ends when its time is up, at once, whatever the batch does."""
    if early:
        presort.configure(store=process.settings().store, batching=SLOW)

    async def main() -> float:
        task = asyncio.create_task(ask(emulator))
        await (asyncio.to_thread(until, lambda: presort.jobs()[1]) if early else sent())
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 0.2)
        return time.monotonic() - started

    assert asyncio.run(main()) < 1.0
    if early:
        until(lambda: not presort.jobs()[1])
    assert (0 if early else 1) == len(emulator.asked())


def test_task_group(emulator, process):
    """A task group whose one member fails ends its parked ones at once, and withdraws them."""
    presort.configure(store=process.settings().store, batching=SLOW)

    async def fail() -> None:
        await asyncio.to_thread(until, lambda: sum(view.count for view in presort.jobs()[1]) == 3)
        raise LookupError("of the host's own")

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(ask(emulator, f"Document {number}"))
            group.create_task(fail())

    started = time.monotonic()
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(main())

    assert caught.group_contains(LookupError)
    assert time.monotonic() - started < 10
    until(lambda: not presort.jobs()[1])
    presort.flush()
    assert [] == emulator.asked()


def test_configure_with_another_store_while_work_runs(emulator, process, tmp_path):
    """`configure` with another store while a call waits is an error that says what to do, and the call goes on."""

    async def main() -> bytes:
        task = asyncio.create_task(ask(emulator))
        await sent()
        with pytest.raises(presort.errors.ConfigurationError, match=r"presort.close\(\)"):
            presort.configure(store=tmp_path / "other.db")
        presort.configure(store=tmp_path / "presort.db", batching={"poll_interval_seconds": 0.01})
        emulator.advance(2000)
        return await asyncio.wait_for(task, 30)

    assert b"message" in asyncio.run(main())
    assert not (tmp_path / "other.db").exists()
    assert 1 == len(emulator.asked())


def test_engine_that_failed_is_replaced(emulator, process):
    """After the engine has failed, waiting calls get a `ClosedError`, and the next call gets a new engine."""
    engine = process.engine()
    future = asyncio.run_coroutine_threadsafe(_break(engine), engine._loop)
    with contextlib.suppress(Exception, asyncio.CancelledError):
        future.result(5)
    until(lambda: engine.closed)

    async def main() -> bytes:
        task = asyncio.create_task(ask(emulator))
        await sent()
        emulator.advance(2000)
        return await asyncio.wait_for(task, 30)

    assert b"message" in asyncio.run(main())
    assert engine is not process.engine()


async def _break(engine: Any) -> None:
    """Make one of the engine's loops end, as a bug of ours would."""
    for task in asyncio.all_tasks():
        if "Accumulator.run" in repr(task.get_coro()):
            task.cancel()


# -- keys ----------------------------------------------------------------------------------------------------------
KEY_VARIABLE = {"anthropic": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}


@pytest.fixture
def organisations(emulator) -> EmulatorServer:
    """Define two keys of one organisation and one of another; nobody else may ask."""
    emulator.key("key-a", organization="org-x", only_listed=True)
    emulator.key("key-b", organization="org-x")
    emulator.key("key-c", organization="org-y")
    return emulator


def leave_a_job(bench: Bench, key: str) -> None:
    """Submit three calls and go."""
    bench.park(*bench.payloads(3, key), key=key)
    until(lambda: submitted(bench) and sum(view.job.count for view in bench.jobs()) == 3)
    bench.engine.close()


@VENDORS
def test_rotated_key(make_bench, organisations, monkeypatch, vendor):
    """A job whose key is gone is collected with another key of the same organisation from the environment."""
    leave_a_job(make_bench(vendor), "key-a")
    organisations.key("key-a", organization="org-x", revoked=True)
    organisations.advance(2000)
    monkeypatch.setenv(KEY_VARIABLE[vendor], "key-b")
    second = make_bench(vendor)

    until(lambda: {JobState.COMPLETED} == set(second.states))
    assert 3 == sum(view.settled for view in second.jobs())
    receipt = make_receipt(second.engine.totals())
    assert organisations.invoice()["total_usd"] == usd_text(receipt.paid_usd)
    assert 3 == len(organisations.asked())


@VENDORS
def test_rotated_key_under_an_alias(make_bench, organisations, vendor):
    """With an alias for the account a call made again with the rotated key is attached to what was asked before."""
    alias = {"account": "acme"}
    leave_a_job(make_bench(vendor, more=alias), "key-a")
    organisations.advance(2000)
    second = make_bench(vendor, more=alias)

    outcomes = results(second.park(*second.payloads(3, "key-b"), key="key-b"))
    assert [OutcomeKind.SUCCEEDED] * 3 == kinds(outcomes)
    assert 3 == len(organisations.asked())


@VENDORS
@pytest.mark.parametrize("way", ["function", "environment"])
def test_key_of_another_organisation(make_bench, organisations, monkeypatch, vendor, way):
    """With only a stranger's key a job waits in needs_key, is shown, and resumes when the right key comes."""
    leave_a_job(make_bench(vendor), "key-a")
    organisations.advance(2000)
    monkeypatch.setenv(KEY_VARIABLE[vendor], "key-c")
    second = make_bench(vendor)
    until(lambda: {JobState.NEEDS_KEY} == set(second.states))
    views = second.engine.jobs()[0]
    assert 3 == sum(view.job.count for view in views)
    assert all(KEY_VARIABLE[vendor] in (view.job.note or "") for view in views)

    if way == "function":
        second.engine.reconfigure(load(keys=lambda _provider, _account: "key-b", **_same(second)))
    else:
        monkeypatch.setenv(KEY_VARIABLE[vendor], "key-b")
    until(lambda: {JobState.COMPLETED} == set(second.states))

    assert 3 == sum(view.settled for view in second.jobs())
    assert 3 == len(organisations.asked())


def _same(bench: Bench) -> dict[str, Any]:
    """Return the batching settings of a bench, to be set again."""
    return {"batching": bench.settings.batching.model_dump(), "lease_seconds": bench.settings.lease_seconds}


@VENDORS
def test_unsent_job_without_a_key(make_bench, organisations, monkeypatch, vendor):
    """A job that was never sent and has no key is not sent with a stranger's; it goes out when its own comes."""
    first = make_bench(vendor)
    operation = "create_batch" if vendor == "anthropic" else "upload_file"
    organisations.fault("status", on=operation, status=429, retry_after=2, times=-1)
    first.park(*first.payloads(2, "key-a"), key="key-a", run=Run("nightly"))
    until(lambda: any("429" in (view.job.note or "") for view in first.jobs()))
    first.engine.close()
    organisations.clear_faults()
    monkeypatch.setenv(KEY_VARIABLE[vendor], "key-c")
    second = make_bench(vendor)
    until(lambda: {JobState.NEEDS_KEY} == set(second.states))
    assert [] == organisations.asked()

    monkeypatch.setenv(KEY_VARIABLE[vendor], "key-a")
    until(lambda: {JobState.SUBMITTED} == set(second.states))
    [organisation] = {batch["organization"] for batch in organisations.record()["batches"]}
    assert "org-x" == organisation


def test_revoked_key_while_a_caller_waits(emulator, process):
    """A caller whose key was revoked waits, and gets its answer once `configure(keys=…)` brings a good one."""
    emulator.key("key-a", organization="org-x", only_listed=True)

    async def main() -> bytes:
        task = asyncio.create_task(ask(emulator, key="key-a"))
        await sent()
        emulator.key("key-a", organization="org-x", revoked=True)
        await asyncio.to_thread(until, lambda: JobState.NEEDS_KEY in {view.job.state for view in presort.jobs()[0]})
        emulator.key("key-b", organization="org-x")
        emulator.advance(2000)
        presort.configure(
            store=process.settings().store,
            keys={"anthropic": "key-b"},
            batching={"flush_seconds": 0.05, "poll_interval_seconds": 0.05},
        )
        return await asyncio.wait_for(task, 30)

    assert b"message" in asyncio.run(main())
    assert 1 == len(emulator.asked())


# -- named runs ----------------------------------------------------------------------------------------------------
def test_equal_calls_of_a_run(make_bench):
    """Ten equal payloads of a run are ten calls; made again they get the same ten answers, each its own, unasked."""
    first = make_bench()
    payloads = twins(first.payloads(1)[0], 10)
    futures = first.park(*payloads, run=Run("nightly"))
    until(lambda: 10 == len(first.emulator.asked()))
    first.emulator.advance(2000)
    answers = [outcome.body for outcome in results(futures)]
    first.engine.close()
    assert 10 == len(set(answers))
    assert 1 == len(set(first.emulator.asked()))

    second = make_bench()
    again = Run("nightly")
    assert answers == [outcome.body for outcome in results(second.park(*payloads, run=again))]
    assert 10 == len(second.emulator.asked())

    second.park(payloads[0], run=again)
    until(lambda: 11 == len(second.emulator.asked()))


def test_runs_are_apart(make_bench):
    """The same payload in two runs, and in none, is three calls."""
    bench = make_bench()
    [payload] = bench.payloads(1)
    bench.park(payload, run=Run("one"))
    bench.park(payload, run=Run("two"))
    bench.park(payload)

    until(lambda: 3 == len(bench.emulator.asked()))


def test_error_that_was_handed_out(make_bench):
    """A call of a run that ended in an error is tried anew when it is made again; its neighbours are replayed."""
    first = make_bench()
    first.emulator.fault("row_error", index=[1], status=400, message="no such thing")
    payloads = first.payloads(3)
    futures = first.park(*payloads, run=Run("nightly"), group=Group(expected=3))
    until(lambda: [3] == first.batches)
    first.emulator.advance(2000)
    before = results(futures)
    assert [OutcomeKind.SUCCEEDED, OutcomeKind.ERRORED, OutcomeKind.SUCCEEDED] == kinds(before)
    first.engine.close()
    first.emulator.clear_faults()

    second = make_bench()
    futures = second.park(*payloads, run=Run("nightly"))
    until(lambda: [3, 1] == second.batches)
    second.emulator.advance(2000)
    after = results(futures)
    assert [OutcomeKind.SUCCEEDED] * 3 == kinds(after)
    assert (before[0].body, before[2].body) == (after[0].body, after[2].body)


def test_finish_run(make_bench):
    """A finished run starts anew: the same calls are asked again."""
    bench = make_bench()
    [payload] = bench.payloads(1)
    for turn in (1, 2):
        futures = bench.park(payload, run=Run("nightly"))
        until(lambda: turn == len(bench.emulator.asked()))  # noqa: B023 - called within the turn
        bench.emulator.advance(2000)
        results(futures)
        bench.engine.finish_run("nightly")

    assert [1, 1] == bench.batches


@pytest.mark.parametrize("way", ["block", "variable"])
def test_finish_run_within_it(emulator, process, monkeypatch, way):
    """After `finish_run` the process's own calls count from the first again, so that the next process replays them."""
    emulator.set(batch_seconds=0.05)
    named = contextlib.nullcontext()
    if way == "variable":
        monkeypatch.setenv("PRESORT_RUN", "nightly")
    else:
        named = presort.run("nightly")
    with named:
        asyncio.run(ask(emulator))
        presort.finish_run("nightly")
        second = asyncio.run(ask(emulator))
    runtime.close()
    monkeypatch.delenv("PRESORT_RUN", raising=False)

    with presort.run("nightly"):
        assert second == asyncio.run(ask(emulator))
    assert 2 == len(emulator.asked())


# -- trickling calls -----------------------------------------------------------------------------------------------
def test_hundredth_call(make_bench):
    """Calls that trickle in are sent at the 100th, by default, long before their 30 s are over."""
    bench = make_bench(flush_seconds=30)
    payloads = bench.payloads(100)
    bench.park(*payloads[:99])
    until(lambda: waiting(bench) == 99)
    assert [] == bench.batches
    bench.park(payloads[99])

    until(lambda: [100] == bench.batches)


def test_timer_of_its_own(make_bench):
    """A lone call is sent when its time is up, though no other call ever arrives; and not before."""
    bench = make_bench(flush_seconds=1.0)
    started = time.monotonic()
    bench.park(*bench.payloads(1))
    until(lambda: bench.batches)

    assert 1.0 <= time.monotonic() - started < 5.0


def test_oldest_counts(make_bench):
    """Calls that keep arriving do not put off the ones that wait: the oldest's time counts."""
    bench = make_bench(flush_seconds=1.0)
    payloads = iter(bench.payloads(200))
    started = time.monotonic()
    while not bench.batches and time.monotonic() - started < 8:
        bench.park(next(payloads))
        time.sleep(0.1)

    assert time.monotonic() - started < 5.0


def test_groups_do_not_wait(make_bench):
    """A group that knows its size is sent whole as soon as its last call has come, whatever trickles in beside."""
    bench = make_bench(flush_seconds=3600, flush_requests=3)
    payloads = bench.payloads(8)
    bench.park(*payloads[:2])
    bench.park(*payloads[2:], group=Group(expected=6))

    until(lambda: [6] == bench.batches)
    assert 2 == waiting(bench)


@pytest.mark.parametrize(("count", "route", "calls"), [(2, Route.STANDARD, 2), (3, Route.BATCH, 0)])
def test_min_requests(make_bench, count, route, calls):
    """A group smaller than `min_requests` goes by the standard route, one as large by a batch."""
    bench = make_bench(min_requests=3)
    bench.emulator.set(batch_seconds=0.05)
    outcomes = bench.ask(count)

    assert [route] * count == [outcome.route for outcome in outcomes]
    assert calls == bench.calls


def test_drain(make_bench):
    """`drain` sends what accumulates and returns once every call has its answer; in time or it says `False`."""
    bench = make_bench(**SLOW)
    futures = bench.park(*bench.payloads(3))

    assert False is bench.engine.drain(0.3)
    assert [3] == bench.batches
    bench.emulator.advance(2000)
    assert True is bench.engine.drain(30)
    assert all(future.done() for future in futures)


# -- processes that share a store ----------------------------------------------------------------------------------
def test_killed_process(make_bench, emulator, tmp_path):
    """A living process finishes, once the lease is over, the job that a killed one had submitted, asking nothing."""
    second = make_bench(more={"lease_seconds": 1, "keys": {"anthropic": "test-key"}})
    guest = Guest(
        emulator,
        tmp_path,
        """
presort.configure(lease_seconds=1, batching={"flush_seconds": 0.05, "poll_interval_seconds": 0.05})
for n in range(4):
    threading.Thread(target=ask, args=(n,), daemon=True).start()
until(lambda: submitted() >= 4)
say(submitted=True)
time.sleep(60)
""",
    )
    guest.heard()
    guest.kill()
    emulator.advance(2000)

    until(lambda: {JobState.COMPLETED} == set(second.states))
    assert 4 == sum(view.settled for view in second.jobs())
    assert 4 == len(emulator.asked())
    assert {Spend.PAID: 4} == {total.spend: total.rows for total in second.engine.totals()}


def test_two_engines_share_work(make_bench):
    """Of two processes on one store each is told the outcome of its own calls, whichever of them collected the job."""
    first, second = make_bench(), make_bench()
    one = first.park(*first.payloads(3, prefix="of the first"))
    other = second.park(*second.payloads(3, prefix="of the second"))
    until(lambda: 6 == len(first.emulator.asked()))
    first.emulator.advance(2000)

    assert [OutcomeKind.SUCCEEDED] * 6 == kinds(results([*one, *other]))
    assert 6 == len(first.emulator.asked())


def test_next_process_starts_where_the_last_ended(make_bench):
    """What a process of a named run left unsent is sent by the next one that has a key, though nobody asks again."""
    first = make_bench(**SLOW)
    first.park(*first.payloads(2), run=Run("nightly"))
    until(lambda: waiting(first) == 2)
    first.engine.close()
    assert [] == first.emulator.asked()

    second = make_bench()
    second.engine.look(second.base_url, "anthropic", "/v1/models", Link("test-key"))
    until(lambda: 2 == len(second.emulator.asked()), 20)


def test_store_folder_holds_the_store_only(make_bench, tmp_path: Path):
    """A store is its file and SQLite's own two beside it; nothing else is left in its folder."""
    bench = make_bench()
    bench.emulator.set(batch_seconds=0.05)
    bench.ask(1)

    assert {"presort.db"} <= {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} <= {"presort.db", "presort.db-wal", "presort.db-shm"}
