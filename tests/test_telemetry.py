"""The log of a guest: one logger, nothing at the root, no flood."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from presort import telemetry
from presort.telemetry import MOST_CAUSES, QUIET_SECONDS, fell_back, warn


@pytest.fixture
def clock(monkeypatch):
    """Give the test a clock of its own, and a log that has not warned of anything yet."""

    class Clock:
        now = 1_000.0

        def monotonic(self) -> float:
            return self.now

    made = Clock()
    monkeypatch.setattr(telemetry, "time", made)
    monkeypatch.setattr(telemetry, "_last", type(telemetry._last)())
    return made


@pytest.fixture
def said(caplog):
    """Collect the messages of presort's logger."""
    caplog.set_level(logging.DEBUG, "presort")
    return lambda: [record.message for record in caplog.records if record.name == "presort"]


def test_one_warning_a_minute(clock, said):
    """Of one cause there is one warning a minute; the next one tells how many were held back."""
    for _ in range(5):
        warn("cause", "trouble")
        clock.now += 1
    assert ["trouble"] == said()

    clock.now += QUIET_SECONDS
    warn("cause", "trouble")
    assert ["trouble", "trouble (and 4 more like it since the last warning)"] == said()

    clock.now += QUIET_SECONDS
    warn("cause", "trouble")
    assert "trouble" == said()[-1]


def test_sixty_seconds(clock, said):
    """A minute is 60 s: a second warning at 59.9 s is held back, one at 60 s is not."""
    warn("cause", "first")
    clock.now += 59.9
    warn("cause", "second")
    clock.now += 0.1
    warn("cause", "third")

    assert ["first", "third (and 1 more like it since the last warning)"] == said()


def test_causes_are_apart(clock, said):
    """One cause does not silence another."""
    warn("one", "first")
    warn("other", "second")

    assert ["first", "second"] == said()


def test_memory_is_bounded(clock):
    """However many causes there are, and they hold job ids, only so many are remembered; the latest are."""
    for number in range(3 * MOST_CAUSES):
        warn(f"job:{number}", "trouble")

    assert MOST_CAUSES == len(telemetry._last)
    assert f"job:{3 * MOST_CAUSES - 1}" in telemetry._last


def test_a_cause_that_goes_on_is_kept(clock, said):
    """A cause that is warned of again and again is not forgotten for others that came once."""
    for number in range(MOST_CAUSES):
        if number % 100 == 0:
            clock.now += QUIET_SECONDS
            warn("steady", "steady trouble")
        warn(f"job:{number}", "trouble")
    clock.now += 1
    warn("steady", "steady trouble")

    assert 10 == said().count("steady trouble")


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, "Falling back to standard API: its deadline passed (1 request)"),
        (7, "Falling back to standard API: its deadline passed (7 requests)"),
    ],
)
def test_fallback(clock, said, count, expected):
    """A fallback says 'Falling back to standard API', why, and for how many requests."""
    fell_back("its deadline passed", count)

    assert [expected] == said()


def test_fallbacks_for_two_reasons(clock, said):
    """Fallbacks are counted as one cause for each reason."""
    fell_back("one")
    fell_back("one")
    fell_back("other")

    assert 2 == len(said())


def test_threads(clock, said):
    """Of many threads that warn of one cause at once exactly one is heard."""
    gate = threading.Barrier(8)

    def one() -> None:
        gate.wait()
        warn("cause", "trouble")

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert ["trouble"] == said()


def test_text_is_no_format(clock, said):
    """A message with a percent sign, as vendors write them, is logged as it is."""
    warn("cause", "100% of %s and %d")

    assert ["100% of %s and %d"] == said()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork_while_the_lock_is_held():
    """A child that was forked while another thread was just warning can warn."""
    telemetry._lock.acquire()
    try:
        child = os.fork()
        if child == 0:
            warn("in the child", "trouble")
            os._exit(7)
    finally:
        telemetry._lock.release()
    assert 7 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_quiet_by_default():
    """A program that configures no logging sees nothing of presort's warnings, and its root logger stays as it was."""
    source = """
import logging
from presort.telemetry import fell_back, logger
fell_back("a reason")
print(logging.root.handlers, logging.root.level)
print([type(each).__name__ for each in logger.handlers], logger.propagate, logger.level)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(telemetry.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)

    assert ("[] 30\n['NullHandler'] True 0\n", "") == (done.stdout, done.stderr)


def test_heard_when_asked_for():
    """A program that configures logging sees the warnings under `presort`, once each."""
    source = """
import logging
logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
from presort.telemetry import fell_back
fell_back("a reason")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(telemetry.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)

    assert "presort WARNING Falling back to standard API: a reason (1 request)\n" == done.stderr
