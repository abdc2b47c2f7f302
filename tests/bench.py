"""An engine on the emulator, and programs that are guests of it: what scenarios share."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import presort
from emulator_server import EmulatorServer
from presort.config import load
from presort.engine import Engine, Link
from presort.job import JobState
from presort.providers import provider
from presort.providers.base import Prompt
from presort.request import BatchKey, Outcome, OutcomeKind, Payload
from presort.store import Store
from presort.store.base import JobView

COUNT = 10
KEY = "test-key"


def until(condition: Callable[[], Any], seconds: float = 30.0, pause: float = 0.02) -> Any:
    """Wait for a condition and return its value; fail if it does not come true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(pause)
    return value


def kinds(outcomes: list[Outcome]) -> list[OutcomeKind]:
    """Return how each ended."""
    return [outcome.kind for outcome in outcomes]


class Bench:
    """An engine on the emulator, and what the emulator saw of it."""

    def __init__(
        self,
        emulator: EmulatorServer,
        vendor: str,
        folder: Path,
        *,
        more: dict[str, Any] | None = None,
        **batching: Any,
    ) -> None:
        self.emulator = emulator
        self.vendor = provider(vendor)
        path = self.vendor.default_base_url.partition("://")[2].partition("/")[2]
        self.base_url = f"{emulator.url}/{path}".rstrip("/")
        self.settings = load(
            batching={"flush_seconds": 0.05, "poll_interval_seconds": 0.05, "deadline_seconds": 3600, **batching},
            **{"reconcile_window_seconds": 1.5, "lease_seconds": 5, **(more or {})},
        )
        self.engine = Engine(self.settings, Store.open(f"sqlite:///{folder / 'presort.db'}"))

    def payloads(self, count: int = COUNT, key: str = KEY, prefix: str = "Document") -> list[Payload]:
        """Compose some questions."""
        made = []
        for number in range(count):
            prompt = Prompt("Name the topic.", f"{prefix} {number}", {"type": "object"}, max_tokens=64)
            endpoint, body, headers = self.vendor.compose(self.vendor.default_model, prompt)
            account = self.engine.account(key)
            batch_key = BatchKey(self.vendor.name, self.base_url, account, endpoint, self.vendor.default_model, headers)
            made.append(Payload(batch_key, body))
        return made

    def ask(self, count: int = COUNT, *, deadline: float | None = None, key: str = KEY) -> list[Outcome]:
        """Send them as one group and wait."""
        stream = self.engine.stream(self.payloads(count, key), deadline_seconds=deadline, link=Link(key))
        assert stream.wait(40), "somebody waits for ever"
        return [outcome for _position, outcome in stream]

    def park(self, *payloads: Payload, key: str = KEY, **options: Any) -> list[Future[Outcome]]:
        """Park them one by one, as calls that trickle in."""
        return [self.engine.park(payload, link=Link(key), **options) for payload in payloads]

    def jobs(self) -> list[JobView]:
        """Return the jobs, completed ones too."""
        return self.engine.jobs(all_jobs=True)[0]

    @property
    def states(self) -> list[JobState]:
        """States of the jobs, oldest first."""
        return [view.job.state for view in self.jobs()]

    @property
    def batches(self) -> list[int]:
        """Sizes of the batches the vendor made of ours, oldest first."""
        return [len(batch["custom_ids"]) for batch in self.emulator.record()["batches"] if not batch["foreign"]]

    @property
    def calls(self) -> int:
        """Standard calls the vendor took."""
        return len(self.emulator.record()["calls"])


@functools.cache
def _empty_store() -> bytes:
    """Return a store with its tables: making them takes longer than most programs here."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "presort.db"
        Store.open(f"sqlite:///{path}").close()
        return path.read_bytes()


PRELUDE = """
import asyncio, json, os, sys, threading, time
import httpx2
import presort

URL = os.environ["EMULATOR"] + "/v1/messages"
HEADERS = {"x-api-key": os.environ.get("GUEST_KEY", "test-key"), "anthropic-version": "2023-06-01"}

def body(n):
    return {"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": f"Document {n}"}]}

def ask(n):
    with presort.transport(httpx2.Client()) as client, presort.batch():
        response = client.post(URL, json=body(n), headers=HEADERS, timeout=None)
    assert response.status_code == 200, response.text
    return response.headers["x-presort-route"]

async def aask(n):
    async with presort.transport(httpx2.AsyncClient()) as client:
        with presort.batch():
            response = await client.post(URL, json=body(n), headers=HEADERS, timeout=None)
    assert response.status_code == 200, response.text
    return response.headers["x-presort-route"]

def submitted():
    return sum(view.job.count for view in presort.jobs()[0] if view.job.batch_id)

def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)

def say(**facts):
    print(json.dumps(facts), flush=True)
"""
"""What every guest program has at hand: a sync and an async call by the batch route, of a client it makes itself."""


class Guest:
    """A program of somebody else's that uses presort, in a process and with folders of its own."""

    def __init__(self, emulator: EmulatorServer | None, home: Path, source: str, **environment: str) -> None:
        package = str(Path(presort.__file__).parent.parent)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PRESORT_")}
        inherited.pop("ANTHROPIC_API_KEY", None)
        self.environment = {
            **inherited,
            "PYTHONPATH": os.pathsep.join([package, inherited.get("PYTHONPATH", "")]),
            "XDG_CONFIG_HOME": str(home),
            "XDG_STATE_HOME": str(home),
            "EMULATOR": emulator.url if emulator else "",
            "PRESORT_STORE": str(home / "presort.db"),
            "PRESORT_LEASE_SECONDS": "2",
            "PRESORT_BATCHING__FLUSH_SECONDS": "0.05",
            "PRESORT_BATCHING__POLL_INTERVAL_SECONDS": "0.05",
            **environment,
        }
        if not (store := home / "presort.db").exists():
            store.write_bytes(_empty_store())
        command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", PRELUDE + source]
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def heard(self) -> dict[str, Any]:
        """Wait for the next thing it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        return json.loads(line)

    def finish(self, status: int = 0, seconds: float = 60) -> list[dict[str, Any]]:
        """Wait for its end, which must be a quiet one; return what else it said."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it never ended: {self.process.communicate()}") from None
        if (status, "") != (self.process.returncode, err):
            raise AssertionError(f"it ended with {self.process.returncode}, saying:\n{out}{err}")
        return [json.loads(line) for line in out.splitlines()]

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.communicate()


def run(emulator: EmulatorServer | None, home: Path, source: str, **environment: str) -> list[dict[str, Any]]:
    """Run a program to its end, which must be a quiet one, and return what it said."""
    return Guest(emulator, home, source, **environment).finish()
