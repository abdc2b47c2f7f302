"""A program that batches through presort and dies where it is told: the subject of the kill tests.

usage: worker_program.py JSON, with {url, store, provider, count, mode, run, output, kill_at, kill_after, ...}.

Modes: `stream` hands the engine a named run; `park` parks unnamed calls, as a wrapped client does. Each answer is
appended to `output` as `position sha256-of-body kind route`, durably, before the next is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
from typing import Any

from presort.config import load
from presort.engine import Engine, Link, failpoints
from presort.providers import provider
from presort.providers.base import Prompt
from presort.request import BatchKey, Payload
from presort.runtime import store_url
from presort.store import Store

KEY = "test-key"


def payloads(engine: Engine, options: dict[str, Any]) -> list[Payload]:
    """Compose the questions: deterministic, so that a second process asks the very same ones."""
    vendor = provider(options["provider"])
    base_url = options["url"] + vendor.default_base_url.partition("://")[2].partition("/")[1]
    base_url += vendor.default_base_url.partition("://")[2].partition("/")[2]
    made = []
    for number in range(options["count"]):
        prompt = Prompt("Name the topic.", f"Document {number}", {"type": "object"}, max_tokens=64)
        endpoint, body, headers = vendor.compose(vendor.default_model, prompt)
        account = engine.account(options.get("key", KEY))
        key = BatchKey(vendor.name, base_url, account, endpoint, vendor.default_model, headers)
        made.append(Payload(key, body))
    return made


def main() -> None:
    """Run."""
    options = json.loads(sys.argv[1])
    kill_at, kill_after = options.get("kill_at"), options.get("kill_after", 0)
    reached: dict[str, int] = {}
    lock = threading.Lock()

    def hook(name: str) -> None:
        with lock:
            reached[name] = reached.get(name, 0) + 1
            if name == kill_at and reached[name] > kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    failpoints.hook = hook
    settings = load(
        store=options["store"],
        batching={
            "flush_seconds": 0.05,
            "poll_interval_seconds": 0.05,
            "max_batch_requests": options.get("batch", 10),
            "deadline_seconds": options.get("deadline", 3600),
        },
        reconcile_window_seconds=options.get("window", 1.0),
        lease_seconds=2.0,
    )
    engine = Engine(settings, Store.open(store_url(options["store"])))
    link = Link(options.get("key", KEY))
    with open(options["output"], "a", encoding="utf-8") as output:  # noqa: PTH123

        def note(position: int, outcome: Any) -> None:
            digest = hashlib.sha256(outcome.body).hexdigest()
            output.write(f"{position} {digest} {outcome.kind} {outcome.route}\n")
            output.flush()
            failpoints.reach("caller.noted")

        if options.get("mode", "stream") == "stream":
            for position, outcome in engine.stream(iter(payloads(engine, options)), run="kill", link=link):
                note(position, outcome)
        else:
            futures = [engine.park(payload, link=link) for payload in payloads(engine, options)]
            for position, future in enumerate(futures):
                note(position, future.result())
    engine.close()
    print(json.dumps(reached))


if __name__ == "__main__":
    main()
