"""kill -9 at every durable step: nothing lost, nothing asked twice."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from emulator_server import EmulatorServer
from killing import COUNT, answers, finish, options_for, start
from presort.store import Store
from presort.store.base import Spend

POINTS = (
    "accumulator.admit",
    "accumulator.admitted",
    "accumulator.formed",
    "worker.claimed",
    "submitter.submit",
    "submitter.uploaded",
    "submitter.creating",
    "submitter.created",
    "submitter.submitted",
    "poller.ended",
    "poller.collecting",
    "poller.collected",
    "settler.settled",
    "settler.completed",
    "caller.noted",
)
"""What an undisturbed run passes; a test below holds it against the real thing."""

ONLY_WITH_FILES = {"submitter.uploaded"}
TWICE = {"worker.claimed", "submitter.created", "poller.collected", "caller.noted"}
"""Points where the second time is another story: one job is through, others are not."""


@pytest.fixture
def emulator():
    """Run an emulator whose batches take a moment."""
    with EmulatorServer(batch_seconds=0.2) as server:
        yield server


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
def test_points(emulator, tmp_path, provider):
    """An undisturbed run passes every point the kill test kills at, and gives every answer once."""
    passed = finish(start(options_for(emulator, tmp_path, provider), tmp_path))

    expected = set(POINTS) - (ONLY_WITH_FILES if provider == "anthropic" else set())
    assert expected == set(passed) & set(POINTS)
    assert list(range(COUNT)) == [row[0] for row in answers(tmp_path)]
    assert {"succeeded"} == {row[2] for row in answers(tmp_path)}


TRIALS = [
    (provider, point, after)
    for provider in ("anthropic", "openai")
    for point in POINTS
    for after in (0, 1)
    if (provider == "openai" or point not in ONLY_WITH_FILES) and (not after or point in TWICE)
]


@pytest.mark.parametrize(("provider", "point", "after"), TRIALS)
def test_kill_at_every_point(emulator, tmp_path, provider, point, after):
    """Killed at any durable step, the same program again loses nothing and asks nothing twice."""
    options = options_for(emulator, tmp_path, provider)
    first = start({**options, "kill_at": point, "kill_after": after}, tmp_path)
    first.communicate(timeout=60)
    assert -signal.SIGKILL == first.returncode, f"{point} was not reached {after + 1} times"

    finish(start(options, tmp_path))

    delivered: dict[int, str] = {}
    for position, digest, kind, route in answers(tmp_path):
        assert ("succeeded", "batch") == (kind, route)
        assert digest == delivered.setdefault(position, digest), f"two different answers for {position}"
    assert set(range(COUNT)) == set(delivered)
    asked = emulator.asked()
    assert COUNT == len(asked) == len(set(asked))


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
def test_kill_at_random(emulator, tmp_path, provider):
    """Killed at random moments again and again, the program ends with every answer, each request asked once."""
    chance = random.Random(provider)
    options = options_for(emulator, tmp_path, provider, count=60)
    kills = 0
    while kills < 8:
        process = start(options, tmp_path)
        try:
            process.communicate(timeout=0.4 + chance.random() * 1.2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        break

    finish(start(options, tmp_path))

    delivered: dict[int, str] = {}
    for position, digest, _kind, _route in answers(tmp_path):
        assert digest == delivered.setdefault(position, digest)
    assert set(range(60)) == set(delivered)
    asked = emulator.asked()
    assert 60 == len(asked) == len(set(asked))


@pytest.mark.parametrize("point", ["submitter.submitted", "poller.collecting", "poller.collected"])
def test_unnamed_calls_are_attached_again(emulator, tmp_path, point):
    """Unnamed calls killed before or after collection, but before hand-out, are not asked again by the next process."""
    options = options_for(emulator, tmp_path, "anthropic", mode="park", batch=100)
    first = start({**options, "kill_at": point}, tmp_path)
    first.communicate(timeout=60)
    assert -signal.SIGKILL == first.returncode

    finish(start(options, tmp_path))

    assert list(range(COUNT)) == sorted(row[0] for row in answers(tmp_path))
    assert COUNT == len(emulator.asked())


def test_handed_out_calls_are_new_calls(emulator, tmp_path):
    """Unnamed calls whose answers were handed out are asked anew by the next process."""
    options = options_for(emulator, tmp_path, "anthropic", mode="park")
    finish(start(options, tmp_path))

    finish(start(options, tmp_path))

    assert 2 * COUNT == len(emulator.asked())


def test_two_live_processes(emulator, tmp_path):
    """Two living processes with the same unnamed prompts get two rows each prompt, and neither the other's answer."""
    emulator.fault("slow_batch", on="create_batch", times=-1, seconds=2)
    options = options_for(emulator, tmp_path, "anthropic", mode="park")
    first = start({**options, "output": str(tmp_path / "first")}, tmp_path)
    time.sleep(1.0)
    second = start({**options, "output": str(tmp_path / "second")}, tmp_path)
    finish(first)
    finish(second)

    assert 2 * COUNT == len(emulator.asked())
    assert COUNT == len((tmp_path / "first").read_text().splitlines())
    assert COUNT == len((tmp_path / "second").read_text().splitlines())


TROUBLE = {
    "settler.regrouped": {"kind": "row_missing", "index": [1]},
    "settler.rerouted": {"kind": "status", "on": "create_batch", "status": 404, "times": -1},
    "standard.sending": {"kind": "status", "on": "create_batch", "status": 404, "times": -1},
    "standard.sent": {"kind": "status", "on": "create_batch", "status": 404, "times": -1},
    "standard.settled": {"kind": "status", "on": "create_batch", "status": 404, "times": -1},
    "submitter.absent": {"kind": "drop_before", "on": "create_batch"},
    "settler.halved": {"kind": "status", "on": "create_batch", "status": 413},
    "poller.cancelled": {"kind": "never_ends", "fraction": 0.5},
}
"""Points that only trouble leads to, and the trouble."""


@pytest.mark.parametrize("point", sorted(TROUBLE))
def test_kill_in_trouble(tmp_path, point):
    """Killed on the way out of trouble, the same program gives every answer; only a standard call may go twice."""
    with EmulatorServer(batch_seconds=0.2) as emulator:
        fault = TROUBLE[point]
        emulator.fault(**fault)
        options = options_for(emulator, tmp_path, "anthropic", deadline=8 if point == "poller.cancelled" else 3600)
        first = start({**options, "kill_at": point}, tmp_path)
        first.communicate(timeout=60)
        assert -signal.SIGKILL == first.returncode, f"{point} was not reached"

        finish(start(options, tmp_path))

        assert set(range(COUNT)) == {row[0] for row in answers(tmp_path)}
        assert {"succeeded"} == {row[2] for row in answers(tmp_path)}
        billed_rows = emulator.asked()
        extra = len(billed_rows) - COUNT
        doubt = doubtful(tmp_path)
        if point == "settler.regrouped":
            assert 1 == extra  # the row the first batch lost was billed, and asked again
        elif point == "poller.cancelled":
            assert extra >= 0  # what the cancelled batches did not finish is asked again, by the standard route
            assert len(billed_rows) - len(set(billed_rows)) <= COUNT
        else:
            assert extra <= doubt  # every call too many was on the books as in doubt


def doubtful(tmp_path: Path) -> int:
    """Count the calls the ledger holds as in doubt."""
    store = Store.open(f"sqlite:///{tmp_path / 'presort.db'}")
    try:
        return sum(total.rows for total in store.totals() if total.spend is Spend.IN_DOUBT)
    finally:
        store.close()
