"""The commands as a stranger meets them: real processes, one clear line for each mistake, never a traceback."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from command_runner import Home, stranger, wait_for_batches, write_documents

KEYS = {"ANTHROPIC_API_KEY": "test-key", "OPENAI_API_KEY": "test-key"}


@pytest.fixture
def home(tmp_path) -> Home:
    """A home with six documents."""
    home = Home(tmp_path)
    write_documents(home.work / "docs", 6)
    return home


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A home whose emulator runs, with six documents, for commands that fail."""
    home = Home(tmp_path_factory.mktemp("shared"))
    write_documents(home.work / "docs", 6)
    (home.work / "empty").mkdir()
    (home.work / "empty.jsonl").write_text("\n")
    with home.emulator() as emulator:
        yield home, emulator


def failed(done: subprocess.CompletedProcess[str], status: int) -> str:
    """Return the one line that a command said when it failed."""
    assert status == done.returncode, done.stderr
    assert "" == done.stdout
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert 1 == len(lines), done.stderr
    assert lines[0].startswith("presort: ")
    return lines[0]


# Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("provider", "variable"), [("anthropic", "ANTHROPIC_API_KEY"), ("openai", "OPENAI_API_KEY")])
def test_no_key(home, provider, variable):
    """Without a key one line names its variable and `--emulate`, and the status is 2."""
    line = failed(home.run("index", "docs", "--provider", provider), 2)

    assert f"no API key: set {variable}, or add --emulate to try it without a key and without cost" in line


INPUTS = [
    (["missing"], "`missing` does not exist"),
    (["empty"], "`empty` holds no document"),
    (["empty.jsonl"], "`empty.jsonl` is empty"),
    (["docs", "docs/00"], "hold the same documents"),
    (["docs", "-o", "nowhere/records.jsonl"], "the folder `{work}/nowhere` does not exist; make it first"),
    (["docs", "-o", "docs"], "it is a folder; name a file, such as `docs/records.jsonl`"),
    (["docs", "-o", "/dev/full"], "it is not a regular file"),
    (["docs", "--model", "claude-none"], "Anthropic does not know the model `claude-none`"),
    (["docs", "-p", "openai", "-m", "gpt-none"], "OpenAI does not know the model `gpt-none`"),
    (["docs", "--base-url", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer"),
    (["docs", "--base-url", "nonsense"], "`nonsense` is no base URL; give one such as https://api.anthropic.com"),
]


@pytest.mark.parametrize(("arguments", "message"), INPUTS, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_input(shared, arguments, message):
    """Input that makes the run pointless is told in one line that names it, with status 2, before anything is sent."""
    home, emulator = shared

    line = failed(home.run("index", *arguments, "--emulate"), 2)

    assert message.format(work=home.work) in line
    assert [] == emulator.asked()


SETTINGS = [
    ({"PRESORT_STOR": "x"}, "no setting for the environment variable `PRESORT_STOR`; did you mean `PRESORT_STORE`?"),
    ({"PRESORT_BATCHING__FLUSH_SECONDS": "soon"}, "`batching.flush_seconds`: input should be a valid number"),
    ({"PRESORT_STORE": "{work}/docs"}, "{work}/docs is a folder; name a file in it"),
    ({"PRESORT_STORE": "{work}/docs/00/0000.txt"}, "is not an SQLite database; choose another path"),
    ({"PRESORT_STORE": "mysql://somewhere/x"}, "the store cannot be in mysql; use sqlite or postgresql"),
    ({"PRESORT_CONFIG": "{work}/docs/00/0000.txt"}, "cannot read the configuration file `{work}/docs/00/0000.txt`"),
    ({"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer"),
]


@pytest.mark.parametrize(("environment", "message"), SETTINGS, ids=lambda value: next(iter(value)) if value else "")
def test_wrong_setting(shared, environment, message):
    """A wrong setting is told in one line that names it, with status 2."""
    home, _ = shared
    environment = {name: value.format(work=home.work) for name, value in environment.items()}

    line = failed(home.run("index", "docs", **KEYS, **environment), 2)

    assert message.format(work=home.work) in line


def test_rejected_key(home):
    """A key that the vendor rejects is told by its variable's name, never by its value."""
    with home.emulator() as emulator, stranger(emulator.url) as url:
        emulator.admin("POST", "keys", {"only_listed": True})
        line = failed(home.run("index", "docs", "--base-url", url, **KEYS), 2)

    assert "Anthropic rejected the key in ANTHROPIC_API_KEY (HTTP 401): set a valid one" in line
    assert "test-key" not in line


def test_another_server(home):
    """A server that answers with something else is told from the vendor's API before anything is sent."""

    class Website(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Website) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        line = failed(home.run("index", "docs", "--base-url", url, **KEYS), 2)
        server.shutdown()

    assert f"{url} answers, but not as Anthropic's API does: check the base URL" in line


def test_newer_store(shared, tmp_path):
    """A store that a newer presort wrote is left alone, by `index` and by `jobs`."""
    home, _ = shared
    store = tmp_path / "newer.db"
    assert 0 == home.run("jobs", PRESORT_STORE=str(store)).returncode
    assert not store.exists(), "looking made a store"
    with sqlite3.connect(store) as connection:
        connection.execute("CREATE TABLE presort_version (version_num TEXT)")
        connection.execute("INSERT INTO presort_version VALUES ('9999')")
    connection.close()

    for command in (["index", "docs"], ["jobs"]):
        line = failed(home.run(*command, PRESORT_STORE=str(store), **KEYS), 2)
        assert f"the store {store} was written by a newer presort (its schema is 9999" in line


def test_port_taken(home):
    """If another program has the emulator's port, one line names the port and the folder bound to it."""
    home.emulated.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (home.emulated / "emulator.json").write_text(json.dumps({"port": port}))
        taken.settimeout(0)
        line = failed(home.run("index", "docs", "--emulate"), 2)

    assert f"the emulator's port {port} is taken, and the work in `{home.emulated}` is bound to it" in line


def test_same_output_twice(home):
    """A second command with the same output stops with one line, and the first is not disturbed."""
    with home.emulator(batch_seconds=600) as emulator:
        first = home.start("index", "docs", "--emulate")
        wait_for_batches(emulator, 1, first)
        line = failed(home.run("index", "docs", "--emulate"), 2)
        emulator.advance(600)
        _, err = first.communicate(timeout=60)

        assert "another process is writing" in line
        assert 0 == first.returncode, err
        assert 6 == len(emulator.asked()) == len(home.rows())


def test_broken_rows(home):
    """Rows of a JSONL that cannot be used become failed rows in their place, each with its reason."""
    lines = ['{"id": "a", "text": "An invoice for cables."}', '{"id": "b"', '{"id": "a", "text": "again"}', "[]"]
    (home.work / "rows.jsonl").write_text("\n".join([*lines, '{"id": "c", "text": " "}']))
    with home.emulator() as emulator:
        result = home.json("index", "rows.jsonl", "--emulate")
        assert 1 == len(emulator.asked())

    reasons = [row.get("reason", "") for row in home.rows()]
    assert ["a", "rows.jsonl:2", "a", "rows.jsonl:4", "c"] == [row["id"] for row in home.rows()]
    assert (1, 4) == (result["succeeded"], result["failed"])
    expected = ("", "broken JSON", "ids must be unique", "expected an object", "is empty")
    for part, reason in zip(expected, reasons, strict=True):
        assert part in reason


def test_all_fail(home):
    """If no document succeeds the rows are written all the same, with the reason, and the status is 1."""
    for path in (home.work / "docs").rglob("*.*"):
        path.write_bytes(bytes(range(64)))
    with home.emulator():
        done = home.run("index", "docs", "--emulate")

    assert 1 == done.returncode, done.stderr
    assert ["failed"] * 6 == [row["status"] for row in home.rows()]
    assert "failed 6: not text but binary: NUL byte at offset 0" in done.stdout


IN_A_NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-euc"]


def namespaces() -> bool:
    """Whether this machine lets us mount a small disk that nobody else sees."""
    if shutil.which("unshare") is None:
        return False
    probe = "mount -t tmpfs -o size=1m tmpfs /tmp"
    return 0 == subprocess.run([*IN_A_NAMESPACE, probe], capture_output=True).returncode


@pytest.mark.skipif(not namespaces(), reason="no user namespaces here")
@pytest.mark.parametrize("what", ["output", "store"])
def test_full_disk(home, what):
    """On a full disk one line names what cannot be written; with room the same command ends, asking nothing twice."""
    write_documents(home.work / "docs", 60)
    small = home.folder / "small"
    small.mkdir()
    output = small / "records.jsonl" if what == "output" else home.work / "records.jsonl"
    store = small / "presort.db" if what == "store" else home.folder / "presort.db"
    fill = "dd if=/dev/zero of=fill bs=1k count=4000 2>/dev/null || true" if what == "output" else ":"
    index = f"{sys.executable} -m presort.cli index {home.work}/docs --base-url $URL -o {output}"
    script = f"""
        mount -t tmpfs -o size={"300k" if what == "store" else "1m"} tmpfs {small}; cd {small}
        {fill}
        {index} && exit 99
        rm -f fill
        mount -o remount,size=50m {small}
        {index}
        cp {output} {home.work}/after.jsonl
    """
    more = {"PRESORT_STORE": str(store), "PRESORT_BATCHING__POLL_INTERVAL_SECONDS": "0.3", **KEYS}
    with home.emulator() as emulator, stranger(emulator.url) as url:
        environment = home.environment(URL=url, **more)
        done = subprocess.run([*IN_A_NAMESPACE, script], env=environment, capture_output=True, text=True, timeout=120)

        assert 0 == done.returncode, done.stderr
        assert 60 == len(emulator.asked()) == len(set(emulator.asked()))
    said = [line for line in done.stderr.splitlines() if line.startswith("presort: ")]
    assert 1 == len(said), done.stderr
    assert "disk is full" in said[0]
    assert str(small) in said[0]
    assert "Traceback" not in done.stderr
    assert ["succeeded"] * 60 == [row["status"] for row in home.rows("after.jsonl")]


# What works -------------------------------------------------------------------------------------------------


def test_first_try(home):
    """`--emulate` alone starts the emulator, says EMULATED on every part of the screen, and names what to try next."""
    try:
        done = home.run("index", "docs", "--emulate")

        assert 0 == done.returncode, done.stderr
        assert "6 documents by the EMULATED Anthropic -> records.jsonl" in done.stdout
        assert "EMULATED receipt: no money was spent" in done.stdout
        assert "(50.0%)" in done.stdout
        invoice, ledger = (
            line.split()[-1] for line in done.stdout.splitlines() if "all runs" in line or "ledger" in line
        )
        assert invoice == ledger
        steps = done.stdout.partition("Next:\n")[2].splitlines()
        assert 3 == len(steps)
        assert "presort jobs --emulate --all" in steps[1]
        assert "ANTHROPIC_API_KEY=… presort index docs" in steps[2]
        assert ["succeeded"] * 6 == [row["status"] for row in home.rows()]
        assert not home.real_store.exists()
    finally:
        home.stop_own_emulator()


def test_real_and_emulated_never_share(home):
    """Emulated and real work keep to stores of their own, and neither can be sent into the other's."""
    with home.emulator() as emulator, stranger(emulator.url) as url:
        poll = {"PRESORT_BATCHING__POLL_INTERVAL_SECONDS": "0.3"}
        assert home.json("index", "docs", "--emulate")["emulated"]
        real = home.run("index", "docs", "--base-url", url, **KEYS, **poll)
        assert 0 == real.returncode, real.stderr
        assert "EMULATED" not in real.stdout + real.stderr
        assert "6 documents by Anthropic -> records.jsonl" in real.stdout
        jobs = {flags: home.json("jobs", "--all", *flags)["jobs"] for flags in [(), ("--emulate",)]}
        assert [url] == [job["base_url"] for job in jobs[()]]
        assert [emulator.url] == [job["base_url"] for job in jobs["--emulate",]]

        line = failed(home.run("index", "docs", "--base-url", emulator.url, **KEYS), 2)
        assert "is an EMULATED vendor: add --emulate" in line
        line = failed(home.run("index", "docs", "--base-url", url, "--emulate"), 2)
        assert "is no emulator: leave out --emulate or --base-url" in line
        line = failed(home.run("index", "docs", PRESORT_STORE=str(home.emulated / "presort.db"), **KEYS), 2)
        assert "is for EMULATED work, and this is real" in line


def test_jobs(home):
    """While a run waits, and after it was killed, `jobs` shows its batch; once it is done only `--all` does."""
    with home.emulator(batch_seconds=600) as emulator:
        process = home.start("index", "docs", "--emulate")
        wait_for_batches(emulator, 1, process)
        during = home.run("jobs", "--emulate").stdout
        process.kill()
        process.communicate()
        (after,) = home.json("jobs", "--emulate")["jobs"]
        emulator.advance(600)
        home.json("index", "docs", "--emulate")
        done, (every,) = home.run("jobs", "--emulate").stdout, home.json("jobs", "--emulate", "--all")["jobs"]

    assert "(EMULATED)" in during
    assert "0 of 6 settled" in during
    assert emulator_batch(after) in during
    assert ("submitted", 6, 0) == (after["state"], after["requests"], after["settled"])
    assert "nothing is under way; --all shows what is completed" in done
    assert ("completed", after["id"]) == (every["state"], every["id"])


def emulator_batch(job: dict) -> str:
    """Return a job's batch id, which it must have."""
    assert job["batch_id"].startswith("msgbatch_")
    return job["batch_id"]


def test_json(home):
    """`--json` prints one JSON object with the receipt on stdout and nothing on stderr."""
    with home.emulator():
        done = home.run("index", "docs", "--emulate", "--json")

    result = json.loads(done.stdout)
    assert "" == done.stderr
    expected = {"emulated", "output", "provider", "model", "documents", "succeeded", "failed", "resumed", "routes"}
    expected |= {"failures", "skipped", "receipt", "emulated_invoice_usd", "emulated_ledger_usd"}
    assert expected == set(result)
    assert result["emulated_invoice_usd"] == result["emulated_ledger_usd"] == result["receipt"]["paid_usd"]
    assert 6 == result["receipt"]["lines"][0]["requests"]


@pytest.mark.parametrize("command", ["", "index", "jobs", "emulator"])
def test_help(home, command):
    """Every command has a help text that names all its options and fits into 80 columns."""
    done = home.run(*command.split(), "--help", COLUMNS="80")

    assert 0 == done.returncode, done.stderr
    assert done.stdout.strip()
    assert 80 >= max(map(len, done.stdout.splitlines()))
    assert ["--help"] == [line.split()[1] for line in done.stdout.splitlines() if "<bool>" in line]


def test_version(home):
    """`--version` tells the version of the package."""
    from presort import __version__

    assert f"presort {__version__}\n" == home.run("--version").stdout


def test_light_start():
    """Help and plain mistakes load neither SQLAlchemy nor pydantic, an HTTP client or LangChain."""
    heavy = ("sqlalchemy", "pydantic", "httpx2", "httpx", "langchain_core", "anthropic", "openai", "alembic")
    program = f"import presort.commands, sys; print([name for name in {heavy!r} if name in sys.modules])"
    source = str(Path(sys.modules["presort"].__file__ or "").parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": source}, capture_output=True, text=True, check=True
    )

    assert "[]" == done.stdout.strip()
