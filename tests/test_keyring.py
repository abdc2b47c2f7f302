"""Who pays: accounts are stable names, and keys stay in memory."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import platformdirs
import pytest

from bench import Bench, run, until
from emulator_server import EmulatorServer
from presort.config import Settings, load
from presort.engine import Link, keyring
from presort.engine.keyring import Keyring
from presort.errors import ConfigurationError
from presort.job import Job, JobState
from presort.request import BatchKey

SECRET = "sk-planted-0123456789"
posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions are different there")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """Give the test a configuration folder of its own."""
    folder = tmp_path / "home"
    monkeypatch.setattr(platformdirs, "user_config_path", lambda *_, **__: folder)
    return folder


def make(settings: Settings | None = None, organisation: str | None = None) -> Keyring:
    """Make a keyring whose store knows of one organisation, or none."""

    async def db(*_: object) -> str | None:
        return organisation

    core = SimpleNamespace(db=db, store=SimpleNamespace(organisation=None, remember_organisation=None))
    return Keyring(settings or load(), core)  # type: ignore[arg-type]


def account(key: str = SECRET) -> str:
    """Name a key's account as a new process would."""
    return make().account(key)


def batch_key(of: str) -> BatchKey:
    """Make a batch key of an account, at a vendor that nobody can reach."""
    return BatchKey("anthropic", "http://127.0.0.1:1", of, "/v1/messages", "claude-haiku-4-5")


# -- the account ---------------------------------------------------------------------------------------------------
def test_account_is_stable(home):
    """A key's account has the same name in every process that shares the salt."""
    assert account() == account()
    assert re.fullmatch(r"key-[0-9a-f]{24}", account())


def test_accounts_differ(home):
    """Two keys have two accounts."""
    assert account() != account(SECRET + "x")


def test_account_needs_the_salt(home):
    """With another salt the same key has another name: nobody can try keys on a store that was copied."""
    before = account()
    (home / "salt").unlink()

    assert before != account()


def test_account_across_processes(tmp_path):
    """Two processes name a key alike if they share the configuration folder, and differently if not."""
    source = "from presort import runtime\nsay(name=runtime.engine().account('sk-planted'))"
    (tmp_path / "other").mkdir()
    [one], [same] = run(None, tmp_path, source), run(None, tmp_path, source)
    [other] = run(None, tmp_path / "other", source)

    assert one == same
    assert one != other


def test_alias(home):
    """With an alias every key pays for it, and no salt is made."""
    ring = make(load(account="acme"))

    assert {"acme"} == {ring.account(SECRET), ring.account("another")}
    assert not home.exists()


@posix
def test_salt_is_for_this_user_only(home):
    """The salt lies in the configuration folder, readable by this user alone; nothing else is left there."""
    account()

    assert ["salt"] == [path.name for path in home.iterdir()]
    assert 0o600 == (home / "salt").stat().st_mode & 0o777
    assert 0o700 == home.stat().st_mode & 0o777
    assert 32 == (home / "salt").stat().st_size


def test_salt_without_hard_links(home, monkeypatch):
    """Where the file system knows no hard links the salt is made all the same, once."""

    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    first = account()

    assert first == account()
    assert ["salt"] == [path.name for path in home.iterdir()]


def test_salt_of_a_faster_process(home, monkeypatch):
    """If another process makes the salt in the same moment, its salt counts."""
    link = os.link

    def slow(draft: Path, path: Path) -> None:
        path.write_bytes(b"z" * 32)
        link(draft, path)

    monkeypatch.setattr(os, "link", slow)
    first = account()

    assert b"z" * 32 == (home / "salt").read_bytes()
    assert first == account()


def test_damaged_salt(home):
    """A salt that was cut short is refused, with the way out, rather than used."""
    home.mkdir()
    (home / "salt").write_bytes(b"short")

    with pytest.raises(ConfigurationError, match="PRESORT_ACCOUNT"):
        account()


def test_no_place_for_the_salt(home):
    """Where no salt can be kept the message says how to do without."""
    home.write_text("a file, not a folder")

    with pytest.raises(ConfigurationError, match=r"PRESORT_ACCOUNT=… or `presort.configure\(account=…\)`"):
        account()


# -- which key -----------------------------------------------------------------------------------------------------
def secret_for(ring: Keyring, key: BatchKey, job: Job | None = None) -> str | None:
    """Return the key that a channel would be opened with."""

    async def look() -> str | None:
        channel = await ring.channel(key, job)
        await ring.close()
        return None if channel is None else channel._headers["x-api-key"]

    return asyncio.run(look())


@pytest.fixture
def environment(monkeypatch):
    """Set the key in the environment, or leave it out."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    return lambda key: monkeypatch.setenv("ANTHROPIC_API_KEY", key)


def test_live_key(home, environment):
    """A live client's key is used for its account, before any other."""
    ring = make(load(keys=lambda *_: "from-function"))
    environment("from-environment")
    key = batch_key(ring.account(SECRET))
    ring.remember(key, Link(SECRET))

    assert SECRET == secret_for(ring, key)


def test_keys_function(home, environment):
    """Without a live client the function that was configured is asked, for provider and account."""
    asked: list[tuple[str, str]] = []
    ring = make(load(keys=lambda provider, of: asked.append((provider, of)) or SECRET))

    assert SECRET == secret_for(ring, batch_key("acme"))
    assert [("anthropic", "acme")] == asked


def test_environment_key_of_the_account(home, environment):
    """The key in the environment is used for the account that it hashes to, and only for that."""
    environment(SECRET)
    ring = make()

    assert SECRET == secret_for(ring, batch_key(ring.account(SECRET)))
    assert None is secret_for(ring, batch_key("key-of-somebody-else"))


def test_mapping_is_no_proof(home, environment):
    """A key from a mapping is not taken for an account that it does not hash to: it names a provider only."""
    ring = make(load(keys={"anthropic": SECRET}))

    assert SECRET == secret_for(ring, batch_key(ring.account(SECRET)))
    assert None is secret_for(ring, batch_key("key-of-somebody-else"))


def test_alias_takes_any_key(home, environment):
    """Under an alias the key in the environment is the account's, whichever it is."""
    environment("rotated")
    ring = make(load(account="acme"))

    assert "rotated" == secret_for(ring, batch_key("acme"))


def test_refused_key_is_forgotten(home, environment):
    """A live key that the vendor refused is not used again; another of the account is."""
    ring = make(load(account="acme"))
    key = batch_key("acme")
    ring.remember(key, Link(SECRET))
    environment("rotated")

    async def refuse() -> None:
        await ring.refused(key)

    asyncio.run(refuse())
    assert "rotated" == secret_for(ring, key)


def test_unproven_key(home, environment):
    """A key that may or may not see an account's batch is not used while the vendor cannot be asked."""
    environment(SECRET)
    ring = make(organisation="org-of-the-account")
    key = batch_key("key-of-somebody-else")
    job = Job("0" * 32, key.id, JobState.SUBMITTED, 1, 1, 0.0, 1e12, 0.0, batch_id="msgbatch_1")

    assert None is secret_for(ring, key)
    assert None is secret_for(ring, key, job)


# -- nowhere -------------------------------------------------------------------------------------------------------
def test_key_is_nowhere(tmp_path, caplog):
    """A planted key is in no file of store or configuration, no log line, no text of any object and no error."""
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    with EmulatorServer(batch_seconds=0.05) as emulator:
        emulator.key(SECRET, organization="org-a")
        bench = Bench(emulator, "anthropic", tmp_path)
        try:
            emulator.fault("status", on="create_batch", status=500)
            emulator.fault("row_error", index=[0], status=400, message="no")
            bench.ask(2, key=SECRET)
            emulator.key(SECRET, organization="org-a", revoked=True)
            payload = replace(bench.payloads(1, SECRET, "revoked")[0], headers={"x-api-key": SECRET})
            [parked] = bench.park(payload, key=SECRET)
            until(lambda: JobState.NEEDS_KEY in bench.states)
            texts += [repr(bench.engine.core.requested), repr(keyring._Candidate(SECRET))]
            texts += [repr(bench.jobs()), repr(bench.engine.jobs()), repr(Link(SECRET)), repr(bench.settings)]
            texts += [repr(vars(bench.engine.core)), repr(bench.payloads(1, SECRET))]
            parked.cancel()
        finally:
            bench.engine.close()

    assert SECRET not in caplog.text
    assert all(SECRET not in text for text in texts)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_salt_is_not_in_the_store(home, tmp_path):
    """The salt is not in the store: who has only that cannot tell whose key an account is."""
    with EmulatorServer(batch_seconds=0.05) as emulator:
        bench = Bench(emulator, "anthropic", tmp_path)
        try:
            bench.ask(1, key=SECRET)
        finally:
            bench.engine.close()
    salt = keyring._salt()

    assert all(salt not in path.read_bytes() for path in tmp_path.glob("presort.db*"))
