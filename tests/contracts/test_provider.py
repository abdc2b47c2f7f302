"""What every provider promises, whichever vendor it speaks to: run against the emulator."""

from __future__ import annotations

import json
import secrets
import tracemalloc
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from emulator_server import EmulatorServer, sha256_of
from presort.job import Job, JobProgress
from presort.providers import providers, recognise
from presort.providers.base import (
    AnswerLostError,
    Finding,
    GarbledError,
    Look,
    Prompt,
    Provider,
    Refusal,
    RefusedError,
    Row,
    Rows,
    one_line,
)
from presort.providers.channel import HttpChannel
from presort.request import BatchKey, OutcomeKind, custom_id
from provider_fakes import FakeRows, FakeSteps, job_of, unknown

pytestmark = pytest.mark.anyio

DAY = 86_400.0
TEXTS = ("Grüße aus Ōsaka 🗾", 'line\u2028separator, "quotes" and \\', "\u0000\u007f control and &lt;")
SCHEMA = {
    "type": "object",
    "properties": {"title": {"type": "string"}},
    "required": ["title"],
    "additionalProperties": False,
}


@dataclass
class Account:
    """One provider at one emulated vendor, with an account of its own."""

    provider: Provider
    emulator: EmulatorServer
    channel: HttpChannel
    key: BatchKey

    def body(self, text: str = "hello") -> bytes:
        """Write a call as the vendor's own client might."""
        return self.provider.compose(self.provider.default_model, Prompt("Be brief.", text))[1]

    def job(self, count: int, **fields: Any) -> Job:
        """Return a job that is about to be created."""
        now = self.emulator.now()
        return job_of(id=uuid.uuid4().hex, count=count, created_at=now, create_at=now, **fields)

    async def submit(self, rows: Rows) -> Job:
        """Submit rows and return the job with its batch."""
        job = self.job(rows.count, size_bytes=rows.size_bytes)
        batch_id = await self.provider.submit(self.channel, self.key, job, rows, FakeSteps())
        return replace(job, batch_id=batch_id)

    async def lose(self, rows: Rows, fault: str = "drop_after") -> Job:
        """Submit rows to a vendor whose answer gets lost, and return the job in doubt."""
        self.emulator.fault(fault, on="create_batch")
        steps = FakeSteps()
        job = self.job(rows.count, size_bytes=rows.size_bytes)
        with pytest.raises((AnswerLostError, GarbledError)):
            await self.provider.submit(self.channel, self.key, job, rows, steps)
        assert "creating" == steps.taken[-1]
        return job

    async def find(self, job: Job, rows: FakeRows, *known: str) -> Finding:
        """Search for a lost job."""

        async def among(batch_id: str) -> bool:
            return batch_id in known

        return await self.provider.find(self.channel, self.key, job, rows.ids, among)

    async def collect(self, job: Job, into: list[Row] | None = None) -> list[Row]:
        """Collect all rows, one by one, into a list."""
        rows = [] if into is None else into
        async for row in self.provider.collect(self.channel, self.key, job):
            rows.append(row)
        return rows

    async def ended(self, job: Job) -> bool:
        """Look whether the job's batch has ended."""
        return (await self.provider.check(self.channel, self.key, job)).progress.ended

    def batches(self) -> list[dict[str, Any]]:
        """List what the vendor remembers of this account's batches, newest first."""
        return [each for each in self.emulator.record()["batches"] if each["workspace"] == self.key.account]


def rows_of(account: Account, *texts: str) -> FakeRows:
    """Return a row with a fresh custom_id for each text."""
    bodies = [account.body(text) for text in texts]
    return FakeRows([custom_id(uuid.uuid4().hex, 0) for _ in texts], lambda n: bodies[n])


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorServer]:
    """Serve both vendors, with batches that take an hour."""
    with EmulatorServer(batch_seconds=3_600.0) as server:
        yield server


@pytest.fixture(params=sorted(providers()))
async def account(request: pytest.FixtureRequest, emulator: EmulatorServer) -> AsyncIterator[Account]:
    """Open an account at each vendor that no other test has used."""
    provider = providers()[request.param]
    base_url = provider.default_base_url.replace("https://api.anthropic.com", emulator.url)
    base_url = base_url.replace("https://api.openai.com", emulator.url)
    key, workspace = f"sk-{secrets.token_hex(8)}", f"w-{secrets.token_hex(4)}"
    emulator.key(key, workspace=workspace)
    endpoint, _, headers = provider.compose(provider.default_model, Prompt("", ""))
    channel = HttpChannel(base_url, provider.key_headers(key))
    batch_key = BatchKey(provider.name, base_url, workspace, endpoint, provider.default_model, headers)
    yield Account(provider, emulator, channel, batch_key)
    await channel.aclose()
    emulator.clear_faults()


# The way it should go


async def test_requests_come_back_as_answers(account: Account):
    """Every request of a batch comes back once, answered, with its own usage, as it was sent."""
    rows = rows_of(account, *TEXTS)
    job = await account.submit(rows)
    early = await account.ended(job)
    account.emulator.advance(3_600)
    after = await account.provider.check(account.channel, account.key, job)
    read = await account.collect(job)

    assert (False, Look(JobProgress(ended=True, succeeded=3))) == (early, after)
    assert sorted(rows.ids) == sorted(row.custom_id for row in read)
    assert {(OutcomeKind.SUCCEEDED, 200, job.batch_id)} == {
        (row.outcome.kind, row.outcome.status, row.outcome.batch_id) for row in read
    }
    assert all(row.outcome.usage == account.provider.read_usage(row.outcome.body) is not None for row in read)
    sent = [sha256_of(json.loads(account.body(text))) for text in TEXTS]
    assert sent == account.batches()[0]["sha256"]


async def test_pretty_printed_bodies_are_batched(account: Account):
    """A body of many lines, put on one line as the engine does, is answered like any other."""
    pretty = json.dumps(json.loads(account.body()), indent=2).replace("\n", "\r\n").encode()
    job = await account.submit(FakeRows([custom_id(uuid.uuid4().hex, 0)], lambda _: one_line(pretty)))
    account.emulator.advance(3_600)
    read = await account.collect(job)

    assert [OutcomeKind.SUCCEEDED] == [row.outcome.kind for row in read]


async def test_composed_prompt_is_answered(account: Account):
    """A composed prompt sent by the standard route is answered with text that fits its schema, and usage."""
    prompt = Prompt("Be brief.", "Some document.", SCHEMA)
    endpoint, body, headers = account.provider.compose(account.key.model, prompt)
    reply = await account.channel.send("POST", endpoint, headers=dict(headers), content=body)

    assert ["title"] == list(json.loads(account.provider.read_text(reply.body)))
    usage = account.provider.read_usage(reply.body)
    assert usage is not None
    assert min(usage.total_input_tokens, usage.output_tokens) > 0
    assert account.key.account == account.provider.organisation(reply.headers)


async def test_stream_says_what_it_costs(account: Account):
    """The usage of a streamed answer is that of the same answer read whole."""
    payload = json.loads(account.body())
    endpoint, headers = account.key.endpoint, dict(account.key.headers)
    options: dict[str, Any] = {"stream": True}
    if account.provider.name == "openai":
        options["stream_options"] = {"include_usage": True}
    whole = await account.channel.send("POST", endpoint, headers=headers, content=account.body())
    streamed = await account.channel.send(
        "POST", endpoint, headers=headers, content=json.dumps(payload | options).encode()
    )
    meter = account.provider.stream_meter()
    meter.feed(streamed.body)

    assert account.provider.read_usage(whole.body) == meter.usage


async def test_own_calls_are_recognised(account: Account):
    """A composed call is recognised as this provider's and nobody else's, by its base URL."""
    _, body, headers = account.provider.compose("m", Prompt("", "x"))
    url = account.key.base_url + account.key.endpoint
    found = recognise("POST", url, dict(headers), body)

    assert found is not None
    assert (account.provider, account.key.base_url, "m") == (found[0], found[1].base_url, found[1].model)


async def test_large_batch_is_streamed(account: Account):
    """10,000 requests of 25 MB together are uploaded and collected within 8 MB of memory."""
    ids = [custom_id(uuid.uuid4().hex, 0) for _ in range(10_000)]
    body = account.body("x" * 2_400)
    rows = FakeRows(ids, lambda _: body)
    tracemalloc.start()
    try:
        job = await account.submit(rows)
        _, uploading = tracemalloc.get_traced_memory()
        account.emulator.advance(3_600)
        tracemalloc.reset_peak()
        count = 0
        async for _ in account.provider.collect(account.channel, account.key, job):
            count += 1
        _, collecting = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert 25_000_000 < rows.size_bytes
    assert 10_000 == count
    assert max(uploading, collecting) < 8_000_000


# Ends other than the good one


async def test_cancelled_batch_ends(account: Account):
    """A cancelled batch ends with a row for every request, and cancelling it again is no error."""
    account.emulator.fault("never_ends")
    rows = rows_of(account, *TEXTS)
    job = await account.submit(rows)
    account.emulator.advance(10)
    await account.provider.cancel(account.channel, account.key, job)
    account.emulator.advance(60)
    ended = await account.ended(job)
    await account.provider.cancel(account.channel, account.key, job)
    read = await account.collect(job)

    assert ended
    assert dict.fromkeys(rows.ids, (OutcomeKind.CANCELLED, "cancelled")) == {
        row.custom_id: (row.outcome.kind, row.outcome.reason) for row in read
    }


async def test_half_expired_batch_keeps_the_other_half(account: Account):
    """A batch that expires half done yields its answers and an expired row for each of the rest."""
    account.emulator.fault("expire_half")
    rows = rows_of(account, *"abcd")
    job = await account.submit(rows)
    account.emulator.advance(DAY + 60)
    read = await account.collect(job)

    assert await account.ended(job)
    assert [OutcomeKind.EXPIRED] * 2 + [OutcomeKind.SUCCEEDED] * 2 == sorted(row.outcome.kind for row in read)
    assert sorted(rows.ids) == sorted(row.custom_id for row in read)
    assert all(row.outcome.usage is None for row in read if row.outcome.kind is OutcomeKind.EXPIRED)


@pytest.mark.parametrize("status", [400, 404, 429, 500])
async def test_error_row_is_an_outcome(account: Account, status: int):
    """A refused request is an errored row with its status and JSON, and the others are answered."""
    account.emulator.fault("row_error", index=1, status=status, message="EMULATED no")
    rows = rows_of(account, *TEXTS)
    job = await account.submit(rows)
    account.emulator.advance(3_600)
    read = {row.custom_id: row.outcome for row in await account.collect(job)}

    bad = read.pop(rows.ids[1])
    assert (OutcomeKind.ERRORED, status, None) == (bad.kind, bad.status, bad.usage)
    assert "EMULATED no" == json.loads(bad.body)["error"]["message"]
    assert [OutcomeKind.SUCCEEDED] * 2 == [outcome.kind for outcome in read.values()]


@pytest.mark.parametrize(
    ("fault", "lines"),
    [
        ("row_missing", [0, 2]),
        ("row_twice", [0, 1, 1, 2]),
        ("row_garbled", [0, 2]),
        ("row_foreign", [0, 1, 2, "foreign"]),
        ("row_null_response", [0, 2]),
    ],
)
async def test_spoilt_row_spoils_no_other(account: Account, fault: str, lines: list[object]):
    """A missing, doubled, garbled, foreign or empty row leaves the other rows as they are."""
    account.emulator.fault(fault, index=1)
    rows = rows_of(account, *TEXTS)
    job = await account.submit(rows)
    account.emulator.advance(3_600)
    read = await account.collect(job)

    found = [rows.ids.index(row.custom_id) if row.custom_id in rows.ids else "foreign" for row in read]
    assert lines == sorted(found, key=str)
    assert {OutcomeKind.SUCCEEDED} == {row.outcome.kind for row in read}


async def test_expired_row_is_an_outcome(account: Account):
    """A single expired row is an outcome of its own kind."""
    account.emulator.fault("row_expired", index=1)
    rows = rows_of(account, *TEXTS)
    job = await account.submit(rows)
    account.emulator.advance(3_600)
    read = {row.custom_id: row.outcome for row in await account.collect(job)}

    assert OutcomeKind.EXPIRED is read[rows.ids[1]].kind


async def test_garbled_line_is_skipped(account: Account):
    """A line garbled on its way is skipped, and the rest is read."""
    rows = rows_of(account, *"abcde")
    job = await account.submit(rows)
    account.emulator.advance(3_600)
    account.emulator.fault("garble", on="results")
    read = await account.collect(job)

    assert 4 == len({row.custom_id for row in read} & set(rows.ids))


async def test_broken_download_raises_after_the_rows(account: Account):
    """A download that breaks off hands out what arrived and raises, and the next one is whole."""
    rows = rows_of(account, *map(str, range(20)))
    job = await account.submit(rows)
    account.emulator.advance(3_600)
    account.emulator.fault("truncate", on="results", fraction=0.5)
    arrived: list[Row] = []
    with pytest.raises(AnswerLostError):
        await account.collect(job, arrived)
    again = await account.collect(job)

    assert 5 < len(arrived) < 20
    assert (set(rows.ids), 20) == ({row.custom_id for row in again}, len(again))


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"kind": "status", "status": 500}, RefusedError),
        ({"kind": "drop_before"}, AnswerLostError),
        ({"kind": "drop_after"}, AnswerLostError),
        ({"kind": "garble"}, GarbledError),
    ],
)
async def test_failed_look_changes_nothing(account: Account, fault: dict[str, Any], error: type[Exception]):
    """A look that fails raises, and the next one sees the batch as it is."""
    job = await account.submit(rows_of(account, "a"))
    account.emulator.fault(on="retrieve_batch", **fault)
    with pytest.raises(error):
        await account.ended(job)

    assert not await account.ended(job)


async def test_unknown_batch_is_refused(account: Account):
    """A batch that the vendor does not know is `RefusedError` with status 404."""
    job = account.job(1, batch_id="batch_that/never?was")
    with pytest.raises(RefusedError, match="HTTP 404"):
        await account.ended(job)


# Keys and refusals


async def test_wrong_key_is_a_matter_of_the_key(account: Account):
    """A revoked key is refused on every verb, and the refusal is classified as the key's."""
    rows = rows_of(account, "a")
    job = await account.submit(rows)
    account.emulator.key("sk-revoked-0123456789", revoked=True)
    channel = HttpChannel(account.key.base_url, account.provider.key_headers("sk-revoked-0123456789"))
    provider, key = account.provider, account.key
    for attempt in (
        provider.submit(channel, key, job, rows, FakeSteps()),
        provider.check(channel, key, job),
        provider.cancel(channel, key, job),
        provider.find(channel, key, job, rows.ids, unknown),
        anext(provider.collect(channel, key, job)),
    ):
        with pytest.raises(RefusedError) as caught:
            await attempt
        assert Refusal.KEY is provider.classify(caught.value)
        assert "sk-revoked-0123456789" not in str(caught.value)
    await channel.aclose()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, Refusal.INVALID),
        (404, Refusal.NO_BATCH),
        (413, Refusal.SMALLER),
        (429, Refusal.LATER),
        (503, Refusal.LATER),
    ],
)
async def test_refused_create_leaves_nothing(account: Account, status: int, expected: Refusal):
    """A create that is refused raises, says what to do, and leaves no batch to find."""
    account.emulator.fault("status", on="create_batch", status=status, retry_after=7)
    rows = rows_of(account, *TEXTS)
    job = account.job(3)
    with pytest.raises(RefusedError) as caught:
        await account.provider.submit(account.channel, account.key, job, rows, FakeSteps())

    refusal = caught.value
    assert (expected, 7.0) == (account.provider.classify(refusal), refusal.retry_after_seconds)
    assert Finding() == await account.find(job, rows)
    assert [] == account.batches()


# Creates in doubt


@pytest.mark.parametrize("fault", ["drop_after", "truncate", "garble"])
async def test_lost_create_is_found(account: Account, fault: str):
    """A batch whose create was answered to nobody is found, at the latest when it has ended."""
    rows = rows_of(account, *TEXTS)
    job = await account.lose(rows, fault)
    early = await account.find(job, rows)
    account.emulator.advance(3_600)
    late = await account.find(job, rows)

    batch_id = account.batches()[0]["id"]
    assert Finding(batch_id=batch_id) == late
    if account.provider.reconcile_by_label:
        assert late == early
    else:
        assert early.waiting_for is not None
        assert batch_id in early.waiting_for
    assert 3 == len(await account.collect(replace(job, batch_id=late.batch_id)))


async def test_create_that_never_arrived_is_not_found(account: Account):
    """A create that the vendor never saw leaves nothing, even beside a known batch of the same size."""
    other = await account.submit(rows_of(account, *TEXTS))
    rows = rows_of(account, *TEXTS)
    job = await account.lose(rows, "drop_before")

    assert other.batch_id is not None
    assert Finding() == await account.find(job, rows, other.batch_id)


async def test_foreign_batch_of_equal_size_is_told_apart(account: Account):
    """Of two batches of the same moment and size, ours is found and somebody else's is not."""
    account.emulator.fault("foreign_batch")
    rows = rows_of(account, *TEXTS)
    job = await account.lose(rows)
    account.emulator.advance(3_600)
    finding = await account.find(job, rows)

    ours = [each["id"] for each in account.batches() if not each["foreign"]]
    assert (1, 2) == (len(ours), len(account.batches()))
    assert Finding(batch_id=ours[0]) == finding


async def test_only_a_foreign_batch_is_not_ours(account: Account):
    """Somebody else's batch of the same moment and size is ruled out once it has ended."""
    await account.submit(rows_of(account, *TEXTS))
    rows = rows_of(account, *TEXTS)
    job = await account.lose(rows, "drop_before")
    account.emulator.advance(3_600)

    assert Finding() == await account.find(job, rows)


async def test_cancelled_batch_is_still_found(account: Account):
    """A lost batch that somebody cancelled is found by the rows that it leaves."""
    account.emulator.fault("never_ends")
    rows = rows_of(account, *TEXTS)
    job = await account.lose(rows)
    batch_id = account.batches()[0]["id"]
    await account.provider.cancel(account.channel, account.key, replace(job, batch_id=batch_id))
    account.emulator.advance(60)

    assert Finding(batch_id=batch_id) == await account.find(job, rows)


async def test_late_batch_is_found_when_it_surfaces(account: Account):
    """A batch that comes to be a minute after its lost create is found from then on."""
    account.emulator.fault("late_create", seconds=60)
    rows = rows_of(account, *TEXTS)
    job = account.job(3)
    with pytest.raises(AnswerLostError):
        await account.provider.submit(account.channel, account.key, job, rows, FakeSteps())
    before = await account.find(job, rows)
    account.emulator.advance(3_700)
    after = await account.find(job, rows)

    assert (Finding(), Finding(batch_id=account.batches()[0]["id"])) == (before, after)


async def test_search_that_fails_says_so(account: Account):
    """A list that cannot be read raises and is never taken for an empty one."""
    rows = rows_of(account, *TEXTS)
    job = await account.lose(rows)
    account.emulator.fault("garble", on="list_batches")
    with pytest.raises(GarbledError):
        await account.find(job, rows)
