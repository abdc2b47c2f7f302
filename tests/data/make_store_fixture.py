"""Makes `store-v1`: a store with jobs in flight, and the emulator that they are in flight at.

python tests/data/make_store_fixture.py [FOLDER]

It stands for a process of this version that was killed at the worst of moments. Later versions must open the store and
finish everything: `tests/test_store_fixture.py`. Made once for each version of the schema; what is kept is never made
anew, or it would no longer be what an old version left.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from emulator_server import EmulatorServer
from presort.engine.accumulator import new_job
from presort.engine.core import machine, new_id
from presort.job import Job, JobState
from presort.pricing import cost
from presort.providers import provider
from presort.providers.base import Prompt
from presort.providers.channel import HttpChannel
from presort.request import BatchKey, Outcome, OutcomeKind, Payload, split_custom_id
from presort.store import Store
from presort.store.base import ClaimedJob, LedgerRow, NewRequest, Settlement, Spend

PORT = 18_473
"""Below every system's range of ports that come and go: it has to be free again when the store is opened."""
CENTURY = 100 * 365 * 86_400.0
RUN = "nightly"
KEYS = {"acme": "key-of-acme", "other": "key-of-other"}
ACCOUNTS = {"acme": "org-acme", "other": "org-other"}


class Rows:
    """A job's requests, as the engine gives them to a provider."""

    def __init__(self, store: Store, job: Job) -> None:
        self._store, self._job = store, job
        self.count, self.size_bytes = job.count, job.size_bytes

    async def __aiter__(self) -> AsyncIterator[tuple[str, bytes]]:
        for row in self._store.rows(self._job.id, None, 1000):
            yield row


class Killed(Exception):
    """Where the process dies."""


class Maker:
    """Brings jobs to a state and leaves them there."""

    def __init__(self, store: Store, emulator: EmulatorServer) -> None:
        self.store = store
        self.emulator = emulator
        self.now = time.time()
        self.owner = new_id(self.now)
        self.expected: list[dict[str, Any]] = []
        self._numbers = count()
        store.join(self.owner, machine(), 4_194_304, self.now, 600)

    def key(self, vendor: str, account: str) -> BatchKey:
        """Return what requests of a vendor and account have in common."""
        wire = provider(vendor)
        path = wire.default_base_url.partition("://")[2].partition("/")[2]
        base_url = f"{self.emulator.url}/{path}".rstrip("/")
        endpoint, _, headers = wire.compose(wire.default_model, Prompt("", ""))
        return BatchKey(vendor, base_url, account, endpoint, wire.default_model, headers)

    def admit(self, key: BatchKey, number: int, what: str, run: str | None = RUN, kind: str = "succeeded") -> list[str]:
        """Store requests, and write down what must become of them."""
        wire = provider(key.provider)
        items = []
        for _ in range(number):
            text = f"{what}, document {next(self._numbers)}"
            _, body, _ = wire.compose(key.model, Prompt("Name the topic.", text, {"type": "object"}, max_tokens=64))
            wanted = {"what": what, "vendor": key.provider, "account": key.account, "run": run, "kind": kind}
            self.expected.append({**wanted, "body": body.decode()})
            items.append(NewRequest(new_id(self.now), key, Payload(key, body).hash, body, self.now + CENTURY))
        return [admitted.request.id for admitted in self.store.admit(self.owner, run, items, self.now)]

    def form(self, key: BatchKey, ids: list[str]) -> ClaimedJob:
        """Put requests into a job and lease it."""
        job = new_job(key, self.now)
        assert len(ids) == self.store.form_job(job, ids)
        [claimed] = self.store.claim_jobs(self.owner, self.now, 600, 10)
        assert claimed.job.id == job.id
        return claimed

    def channel(self, key: BatchKey) -> HttpChannel:
        """Return a way to the emulator."""
        return HttpChannel(key.base_url, provider(key.provider).key_headers(KEYS[key.account]))

    def submit(self, claimed: ClaimedJob, *, die: str | None = None) -> Job:
        """Submit a job; `die` is where the process is killed: uploaded, creating or created."""
        maker, key = self, claimed.key
        vendor = provider(key.provider)

        class Steps:
            job = claimed.job

            async def uploaded(self, ref: str) -> None:
                changed = maker.store.update_job(self.job, {"input_ref": ref})
                assert changed is not None
                self.job = changed
                if die == "uploaded":
                    raise Killed

            async def creating(self) -> None:
                changed = maker.store.mark_creating(self.job, key, time.time())
                assert changed is not None
                self.job = changed
                if die == "creating":
                    raise Killed

        steps = Steps()

        async def send() -> str | None:
            channel = self.channel(key)
            try:
                return await vendor.submit(channel, key, claimed.job, Rows(self.store, claimed.job), steps)
            except Killed:
                return None
            finally:
                await channel.aclose()

        batch_id = asyncio.run(send())
        if die is not None:
            return steps.job
        changed = self.store.update_job(
            steps.job, {"state": JobState.SUBMITTED, "batch_id": batch_id, "submitted_at": self.now}
        )
        assert changed is not None
        return changed

    def collect(self, job: Job, key: BatchKey, most: int) -> None:
        """Begin to collect an ended batch, and die when so many answers are stored."""
        changed = self.store.update_job(job, {"state": JobState.COLLECTING, "ended_at": self.now})
        assert changed is not None

        async def read() -> list[Any]:
            channel = self.channel(key)
            try:
                return [row async for row in provider(key.provider).collect(channel, key, changed)]
            finally:
                await channel.aclose()

        for row in asyncio.run(read())[:most]:
            parts = split_custom_id(row.custom_id)
            assert parts is not None
            self.settle(parts[0], row.custom_id, key, row.outcome)

    def settle(self, request_id: str, custom_id: str, key: BatchKey, outcome: Outcome) -> None:
        """Store an outcome and what it cost."""
        ledger = None
        if outcome.succeeded:
            price = cost(key.provider, key.base_url, key.model, outcome.usage, outcome.route, self.now)
            ledger = LedgerRow(
                custom_id=custom_id,
                spend=Spend.PAID,
                route=outcome.route,
                provider=key.provider,
                model=key.model,
                account=key.account,
                at=self.now,
                usage=outcome.usage,
                baseline_usd=price.baseline_usd,
                actual_usd=price.actual_usd,
                run=RUN,
                batch_id=outcome.batch_id,
            )
        assert [request_id] == self.store.settle([Settlement(request_id, outcome, ledger)], self.now)

    def end(self) -> None:
        """Let every lease run out, as those of a dead process do."""
        self.store.renew(self.owner, [view.job.id for view in self.store.job_views(self.now)], self.now, 0)
        self.store.heartbeat(self.owner, self.now, 0)


def make(store: Store, emulator: EmulatorServer) -> dict[str, Any]:
    """Fill store and emulator; return what must become of it."""
    for account, organisation in ACCOUNTS.items():
        emulator.key(KEYS[account], organization=organisation, only_listed=True)
    maker = Maker(store, emulator)
    claude, gpt = maker.key("anthropic", "acme"), maker.key("openai", "acme")
    claude_other, gpt_other = maker.key("anthropic", "other"), maker.key("openai", "other")

    # batches that have ended
    emulator.set(batch_seconds=0)
    for key in (claude, gpt):
        job = maker.submit(maker.form(key, maker.admit(key, 4, "collecting, two of four are safe")))
        maker.collect(job, key, 2)
    [row] = maker.admit(claude, 1, "an error nobody has read yet", kind="errored")
    body = provider("anthropic").error_body(400, "no such thing")
    maker.settle(row, f"{row}-00", claude, Outcome(OutcomeKind.ERRORED, 400, body, reason="no such thing"))

    # batches that run on
    emulator.set(batch_seconds=3600)
    for key in (claude, gpt):
        maker.submit(maker.form(key, maker.admit(key, 3, "submitted")))
        maker.submit(maker.form(key, maker.admit(key, 2, "submitted, without a run", run=None)))
    for key in (claude_other, gpt_other):
        job = maker.submit(maker.form(key, maker.admit(key, 2, "needs a key, with a batch")))
        assert store.update_job(job, {"state": JobState.NEEDS_KEY, "note": "no key for its account"})
        job = maker.form(key, maker.admit(key, 2, "needs a key, never sent")).job
        assert store.update_job(job, {"state": JobState.NEEDS_KEY, "note": "no key for its account"})
    maker.submit(maker.form(gpt, maker.admit(gpt, 2, "pending, its file uploaded")), die="uploaded")
    for key in (claude, gpt):
        maker.form(key, maker.admit(key, 2, "pending"))

    # creates in doubt: at most one for each account
    maker.submit(maker.form(claude, maker.admit(claude, 2, "in doubt, and there")), die="created")
    maker.submit(maker.form(gpt, maker.admit(gpt, 2, "in doubt, and not there")), die="creating")

    # without a job
    for key in (claude, gpt):
        maker.admit(key, 2, "queued")
        store.reroute(maker.admit(key, 1, "on the standard route, cut off"), "expired")
    assert 2 == len(store.claim_standard(maker.owner, maker.now, 10))
    for key in (claude, gpt):
        store.reroute(maker.admit(key, 1, "queued for the standard route"), "expired")
        maker.admit(key, 1, "queued, without a run", run=None)
    maker.end()
    return {"made_at": maker.now, "port": emulator.port, "run": RUN, "keys": KEYS, "requests": maker.expected}


def main() -> None:
    """Make it."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("store-v1")
    folder.mkdir(parents=True)
    with EmulatorServer(port=PORT, state=folder / "emulator.db") as emulator:
        store = Store.open(f"sqlite:///{folder / 'presort.db'}")
        try:
            expected = make(store, emulator)
        finally:
            store.close()
    (folder / "expected.json").write_text(json.dumps(expected, indent=1), encoding="utf-8")
    for name in ("presort", "emulator"):
        (folder / f"{name}.db").rename(folder / f"{name}.sqlite")  # git ignores what ends in .db
        database = sqlite3.connect(folder / f"{name}.sqlite")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("VACUUM")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
    print(*(f"{path.name}: {path.stat().st_size} bytes" for path in sorted(folder.iterdir())), sep="\n")


if __name__ == "__main__":
    main()
