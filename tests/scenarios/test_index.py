"""`presort index` on hundreds of documents: a row each, the exact money, and no way of killing it that costs more."""

from __future__ import annotations

import json
import random
import signal
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from command_runner import Home, wait_for_batches, write_documents

COUNT = 320
BATCH_SIZE = 60

BROKEN = {
    "03/empty.txt": (b"", "it is empty"),
    "05/latin.md": ("Größe".encode("latin-1") * 20, "Latin-1"),
    "05/picture.txt": (b"\x89PNG\r\n\x1a\n\x00\x00", "a PNG image"),
    "06/huge.txt": (b"word " * 130_000, "too large: about"),
}
"""Documents that nothing can be asked about, and part of the reason that stands in their row."""


def make_home(tmp_path: Path, count: int = COUNT) -> Home:
    """Make a home with documents, some of them broken."""
    home = Home(tmp_path)
    write_documents(home.work / "docs", count)
    for name, (content, _) in BROKEN.items():
        path = home.work / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return home


def command(provider: str) -> list[str]:
    """Return the command that indexes them."""
    return ["index", "docs", "--emulate", "--provider", provider, "--batch-size", str(BATCH_SIZE)]


def without_batch(rows: list[dict[str, Any]]) -> list[str]:
    """Write rows as they are in the file, but for the vendor's batch id, which is another in every run."""
    return [json.dumps({name: value for name, value in row.items() if name != "batch_id"}) for row in rows]


@dataclass(frozen=True)
class Undisturbed:
    """What a run that nobody disturbed left behind."""

    home: Home
    result: dict[str, Any]
    invoice: dict[str, Any]
    asked: list[str]


@pytest.fixture(scope="module", params=["anthropic", "openai"])
def provider(request) -> str:
    """Name each provider."""
    return request.param


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, provider) -> Undisturbed:
    """Run the command once, in peace."""
    home = make_home(tmp_path_factory.mktemp(provider))
    with home.emulator() as emulator:
        result = home.json(*command(provider))
        return Undisturbed(home, result, emulator.invoice(), emulator.asked())


def test_index(undisturbed):
    """Each of 324 documents gets one row in input order, and the receipt is the vendor's invoice to the last digit."""
    home, result, asked = undisturbed.home, undisturbed.result, undisturbed.asked
    files = [path for path in (home.work / "docs").rglob("*") if path.is_file()]
    expected = sorted(path.relative_to(home.work / "docs").as_posix() for path in files)

    rows = home.rows()
    assert expected == [row["id"] for row in rows]
    assert COUNT + len(BROKEN) == len(rows) == result["documents"]
    assert {row["id"] for row in rows if row["status"] == "failed"} == set(BROKEN)
    for row in rows:
        if row["id"] in BROKEN:
            assert BROKEN[row["id"]][1] in row["reason"]
    assert (COUNT, len(BROKEN)) == (result["succeeded"], result["failed"])
    assert {"batch": COUNT} == result["routes"]
    assert COUNT == len(asked) == len(set(asked))
    receipt = result["receipt"]
    assert Decimal(undisturbed.invoice["total_usd"]) == Decimal(receipt["paid_usd"]) > 0
    assert Decimal(receipt["saved_usd"]) == Decimal(receipt["baseline_usd"]) - Decimal(receipt["paid_usd"])
    assert (0, 0) == (receipt["in_doubt"], receipt["unknown"])
    for name in ("input", "cache_read", "output"):
        assert receipt["tokens"][name] == sum(row["usage"][f"{name}_tokens"] for row in rows if "usage" in row)


def test_kill(tmp_path, provider, undisturbed):
    """Killed thrice at random, the same command writes what an undisturbed run does, batch ids aside, asking once."""
    killed = make_home(tmp_path)
    chance = random.Random(provider)

    with killed.emulator(batch_seconds=1.0) as emulator:
        for batches in (1, 3, 5):
            process = killed.start(*command(provider))
            wait_for_batches(emulator, batches, process)
            time.sleep(chance.random() * 0.6)
            process.kill()
            process.communicate(timeout=30)
            assert -signal.SIGKILL == process.returncode
            assert not (killed.work / "records.jsonl").exists()
        result = killed.json(*command(provider))
        invoice, asked = emulator.invoice(), emulator.asked()

    assert without_batch(undisturbed.home.rows()) == without_batch(killed.rows())
    assert COUNT == len(asked) == len(set(asked))
    assert COUNT == result["resumed"]
    assert Decimal(invoice["total_usd"]) == Decimal(result["receipt"]["paid_usd"])


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stop(tmp_path, stop, status):
    """Ctrl-C and a request to end leave at once with a line that says how to go on, and the same command does."""
    home = make_home(tmp_path, 70)
    with home.emulator(batch_seconds=2.0) as emulator:
        process = home.start(*command("anthropic"))
        wait_for_batches(emulator, 1, process)
        stopped_at = time.monotonic()
        process.send_signal(stop)
        out, err = process.communicate(timeout=30)
        assert time.monotonic() - stopped_at < 5
        assert (status, "") == (process.returncode, out)
        assert "run the same command again to resume" in err.splitlines()[-1]
        assert "Traceback" not in err

        result = home.json(*command("anthropic"))
        asked = emulator.asked()

    assert 70 == result["succeeded"] == len(asked) == len(set(asked))


def test_emulator_dies(tmp_path):
    """If the emulator is killed in the middle it is started again, and the run ends with every row, each asked once."""
    home = make_home(tmp_path, 70)
    try:
        with home.emulator(batch_seconds=4.0) as emulator:
            process = home.start(*command("anthropic"))
            wait_for_batches(emulator, 1, process)
            emulator.kill()
            _, err = process.communicate(timeout=60)
            assert 0 == process.returncode, err
            assert "the EMULATED vendor had stopped, and was started again" in err
            asked = emulator.asked()

        assert 70 == len(asked) == len(set(asked))
        assert 70 == len([row for row in home.rows() if row["status"] == "succeeded"])
    finally:
        home.stop_own_emulator()
