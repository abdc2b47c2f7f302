"""Every fault that rivals die of: finished rows kept, only the rest sent again, nobody waits for ever."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bench import COUNT, KEY, Bench, kinds
from emulator_server import EmulatorServer
from presort.engine import Link
from presort.job import JobState
from presort.monitoring.receipt import make_receipt, usd_text
from presort.request import OutcomeKind, Route


@pytest.fixture(scope="module")
def server() -> Iterator[EmulatorServer]:
    """Run one emulator for all tests of the file."""
    with EmulatorServer(batch_seconds=0.05) as running:
        yield running


@pytest.fixture
def emulator() -> Iterator[EmulatorServer]:
    """Run an emulator of the test's own: what it saw is counted."""
    with EmulatorServer(batch_seconds=0.05) as running:
        yield running


@pytest.fixture(params=["anthropic", "openai"])
def vendor(request: pytest.FixtureRequest) -> str:
    """Run each test for every vendor with batches."""
    return request.param


@pytest.fixture
def make_bench(emulator, tmp_path):
    """Make benches and close them."""
    with contextlib.ExitStack() as stack:

        def make(vendor: str, **batching: Any) -> Bench:
            bench = Bench(emulator, vendor, tmp_path, **batching)
            stack.callback(bench.engine.close)
            return bench

        yield make


ALL_WELL = [OutcomeKind.SUCCEEDED] * COUNT


def test_nothing_wrong(make_bench, vendor):
    """Ten requests are one batch, and the ledger is the vendor's invoice exactly."""
    bench = make_bench(vendor)
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT] == bench.batches
    assert 0 == bench.calls
    receipt = make_receipt(bench.engine.totals())
    assert bench.emulator.invoice()["total_usd"] == usd_text(receipt.paid_usd)
    assert receipt.saved_usd == receipt.paid_usd


def test_one_bad_row(make_bench, vendor):
    """A row the vendor refuses is answered with the vendor's words; its neighbours keep their answers."""
    bench = make_bench(vendor)
    bench.emulator.fault("row_error", index=[3], status=400, message="no such thing")
    outcomes = bench.ask()

    expected = list(ALL_WELL)
    expected[3] = OutcomeKind.ERRORED
    assert expected == kinds(outcomes)
    assert (400, True) == (outcomes[3].status, b"no such thing" in outcomes[3].body)
    assert [COUNT] == bench.batches
    assert 0 == bench.calls


@pytest.mark.parametrize("fault", ["row_expired", "row_missing", "row_garbled", "row_null_response"])
def test_one_lost_row(make_bench, vendor, fault):
    """A row without an answer is sent again by itself; the nine others are not."""
    bench = make_bench(vendor)
    bench.emulator.fault(fault, index=[2])
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT, 1] == bench.batches
    assert 0 == bench.calls


@pytest.mark.parametrize("fault", ["row_twice", "row_foreign"])
def test_rows_too_many(make_bench, vendor, fault):
    """Repeated and foreign rows change nothing."""
    bench = make_bench(vendor)
    bench.emulator.fault(fault, index=[2])
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT] == bench.batches


def test_broken_service_in_a_row(make_bench, vendor):
    """A row that met a server error is retried in a batch, and by the standard route when that does not help."""
    bench = make_bench(vendor)
    bench.emulator.fault("row_error", index=[0], status=500, message="boom", times=-1)
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT, 1, 1] == bench.batches
    assert Route.STANDARD is outcomes[0].route
    assert 1 == bench.calls


def test_half_expired(make_bench, vendor):
    """Of a batch that expires half done the finished half is kept and only the rest is sent again."""
    bench = make_bench(vendor)
    bench.emulator.fault("expire_half")
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT, 5] == bench.batches


@pytest.mark.parametrize("on", ["retrieve_batch", "results"])
@pytest.mark.parametrize("status", [500, 503, 429])
def test_looks_that_fail(make_bench, vendor, on, status):
    """Polls and downloads that fail are repeated; nothing is sent again."""
    bench = make_bench(vendor)
    bench.emulator.fault("status", on=on, status=status, times=3)
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT] == bench.batches


@pytest.mark.parametrize("kind", ["truncate", "garble", "drop_after", "drop_before"])
def test_downloads_that_break(make_bench, vendor, kind):
    """A download that breaks off or comes garbled keeps what arrived and is read again where it was cut."""
    bench = make_bench(vendor)
    bench.emulator.fault(kind, on="results", times=2)
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    # a garbled line cannot be told from a missing one: those may go again
    assert COUNT == bench.batches[0]
    assert (kind == "garble") or [COUNT] == bench.batches


def test_lost_create(make_bench, vendor):
    """A create whose answer was lost is found again: one batch, asked once."""
    bench = make_bench(vendor)
    bench.emulator.fault("drop_after", on="create_batch")
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT] == bench.batches


def test_garbled_create(make_bench, vendor):
    """A create whose answer makes no sense is found again: one batch, asked once."""
    bench = make_bench(vendor)
    bench.emulator.fault("garble", on="create_batch")
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT] == bench.batches


def test_create_that_never_arrived(make_bench, vendor):
    """A create that made nothing is repeated once the window has passed, and not before."""
    bench = make_bench(vendor)
    bench.emulator.fault("drop_before", on="create_batch")
    started = time.monotonic()
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT] == bench.batches
    assert time.monotonic() - started >= bench.settings.reconcile_window_seconds


def test_create_that_comes_late(make_bench, vendor):
    """A create that comes into being after its answer was lost is found within the window."""
    bench = make_bench(vendor)
    bench.emulator.fault("late_create", seconds=0.7)
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT] == bench.batches


def test_lost_create_among_strangers(make_bench, vendor):
    """A lost create is told from a stranger's batch of the same size and moment."""
    bench = make_bench(vendor)
    bench.emulator.fault("foreign_batch")
    bench.emulator.fault("drop_after", on="create_batch")
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT] == bench.batches


def test_list_that_lags(make_bench, vendor):
    """A lost create that the list shows only later is found then."""
    bench = make_bench(vendor)
    bench.emulator.fault("late_list", seconds=0.7)
    bench.emulator.fault("drop_after", on="create_batch")
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT] == bench.batches


@pytest.mark.parametrize("status", [429, 503, 529])
def test_create_refused_for_now(make_bench, vendor, status):
    """A create refused for now is sent again after the pause the vendor asks for."""
    bench = make_bench(vendor)
    bench.emulator.fault("status", on="create_batch", status=status, retry_after=0.2, times=2)
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [COUNT] == bench.batches


@pytest.mark.parametrize("status", [404, 405, 501])
def test_no_batch_api(make_bench, vendor, status, caplog):
    """Where there is no Batch API the standard route answers, with one warning, and the base URL is remembered."""
    bench = make_bench(vendor)
    on = "create_batch" if vendor == "anthropic" else "upload_file"
    bench.emulator.fault("status", on=on, status=status, times=-1)
    with caplog.at_level(logging.WARNING, "presort"):
        outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [Route.STANDARD] * COUNT == [outcome.route for outcome in outcomes]
    assert COUNT == bench.calls
    assert bench.engine.lacks_batch_api(bench.base_url)
    warnings = [record.message for record in caplog.records if "Falling back to standard API" in record.message]
    assert len(warnings) <= 1


def test_no_fallback(make_bench, vendor):
    """Without fallback a request no batch answers ends in a named error, not in a call at list price."""
    bench = make_bench(vendor, fallback=False)
    bench.emulator.fault("row_missing", index=[1], times=-1)
    outcomes = bench.ask(1 + 1)

    assert [OutcomeKind.SUCCEEDED, OutcomeKind.SUCCEEDED] == kinds(outcomes)  # alone in its batch it has index 0
    bench.emulator.clear_faults()
    bench.emulator.fault("row_missing", index=[0], times=-1)
    [outcome] = bench.ask(1)
    assert OutcomeKind.ERRORED is outcome.kind
    assert b"presort" in outcome.body
    assert 0 == bench.calls


def test_deadline(make_bench, vendor):
    """A batch past its deadline is cancelled; what it finished is kept, only the rest goes by the standard route."""
    bench = make_bench(vendor)
    bench.emulator.fault("never_ends", fraction=0.4)
    outcomes = bench.ask(deadline=1.5)

    assert ALL_WELL == kinds(outcomes)
    routes = [outcome.route for outcome in outcomes]
    assert routes.count(Route.BATCH) == COUNT - bench.calls
    assert [COUNT] == bench.batches


def test_cancelled_without_files(make_bench):
    """An OpenAI batch that ends cancelled without any file does not keep its callers waiting."""
    bench = make_bench("openai")
    bench.emulator.fault("never_ends")
    bench.emulator.fault("cancel_without_files")
    outcomes = bench.ask(deadline=1.0)

    assert ALL_WELL == kinds(outcomes)
    assert COUNT == bench.calls


def test_queue_limit(make_bench):
    """A batch rejected for its size in the queue goes again in halves."""
    bench = make_bench("openai")
    bench.emulator.fault("fail_batch", code="token_limit_exceeded", message="Enqueued token limit reached")
    outcomes = bench.ask()

    assert ALL_WELL == kinds(outcomes)
    assert [0, 5, 5] == bench.batches  # nothing of the rejected one ran
    assert 0 == bench.calls


def test_a_line_that_fails_the_file(make_bench):
    """The line that makes OpenAI reject a whole file gets the vendor's words; the others are sent again."""
    bench = make_bench("openai")
    bench.emulator.fault("fail_batch", code="invalid_request", message="line is wrong", line=4)
    outcomes = bench.ask()

    expected = list(ALL_WELL)
    expected[3] = OutcomeKind.ERRORED
    assert expected == kinds(outcomes)
    assert [0, COUNT - 1] == bench.batches


def test_rejected_key(make_bench, vendor):
    """A job whose key is rejected waits, is shown, and goes on when a good key arrives; nothing is lost."""
    bench = make_bench(vendor)
    bench.emulator.key(KEY, organization="org-a", revoked=True)
    stream = bench.engine.stream(bench.payloads(), link=Link(KEY))
    states: set[JobState] = set()
    give_up_at = time.monotonic() + 20
    while JobState.NEEDS_KEY not in states and time.monotonic() < give_up_at:
        states |= {view.job.state for view in bench.engine.jobs()[0]}
        time.sleep(0.05)
    assert JobState.NEEDS_KEY in states
    bench.emulator.key(KEY, organization="org-a", revoked=False)
    again = bench.engine.stream(bench.payloads(prefix="Another"), link=Link(KEY))

    assert stream.wait(30)
    assert again.wait(30)
    assert ALL_WELL == kinds([outcome for _, outcome in stream])


def test_spend_limit(make_bench):
    """A spend limit stops the creates, and says so."""
    bench = make_bench("anthropic")
    bench.emulator.fault("status", on="create_batch", status=429, error_code="enforced_spend_limit_reached", times=-1)
    stream = bench.engine.stream(bench.payloads(), link=Link(KEY))
    assert not stream.wait(2.0)

    [view] = bench.engine.jobs()[0]
    assert JobState.PENDING is view.job.state
    assert view.job.due_at - time.time() > 60
    assert [] == bench.batches
