"""presort is a guest: it brings nothing along, starts nothing unasked, and leaves without a word."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench import Bench, Guest, run, until
from emulator_server import EmulatorServer
from presort import telemetry
from presort.engine import Engine, Link
from presort.errors import ClosedError, DeadlockError
from presort.request import Outcome, RequestState, Route
from presort.store import Store

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

EXTRAS = """
anthropic openai google.genai ollama langchain langchain_core langchain_anthropic langchain_openai langgraph
fastapi starlette uvicorn typer rich click selectolax psycopg
aiokafka confluent_kafka kafka faststream redis pypdf docx bs4 lxml
""".split()
"""What a bare `pip install presort` does not bring."""

BLOCKED = f"""
class _Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == extra or name.startswith(extra + ".") for extra in {EXTRAS!r}):
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

sys.meta_path.insert(0, _Blocker())
"""


@pytest.fixture(scope="module")
def emulator():
    """Run one emulator for all tests of the file: each counts only what its own programs asked."""
    with EmulatorServer(batch_seconds=0.2) as server:
        yield server


@pytest.fixture
def slow_emulator():
    """Run an emulator whose batches do not end while the test looks."""
    with EmulatorServer(batch_seconds=3600) as server:
        yield server


def python(source: str) -> subprocess.CompletedProcess[str]:
    """Run a program that knows of no emulator and no store."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRESORT_")}
    environment["PYTHONPATH"] = str(Path(telemetry.__file__).parent.parent)
    command = [sys.executable, "-c", source]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


# -- imports -------------------------------------------------------------------------------------------------------
def test_import_is_light():
    """`import presort` loads the package itself and the standard library, nothing else."""
    source = """
import sys
before = set(sys.modules)
import presort
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
print(*sorted(name for name in sys.modules if name.startswith("presort.")))
"""
    done = python(source)

    assert ("presort\n\n", "") == (done.stdout, done.stderr)


def test_import_starts_nothing():
    """Importing every public name starts no thread, opens no file and touches no logger but presort's own."""
    source = """
import logging, sys, threading
import presort
for name in presort.__all__:
    if name != "OptimizedLLMWrapper":
        getattr(presort, name)
print(threading.active_count(), logging.root.handlers, logging.root.level == logging.WARNING)
print(presort.runtime._engine if hasattr(presort, "runtime") else None)
"""
    done = python(source)

    assert ("1 [] True\nNone\n", "") == (done.stdout, done.stderr)


def test_from_import():
    """`from presort import …` works for every public name, submodules included."""
    done = python("from presort import errors, configure, batch, stream; print(errors.PresortError, batch.__name__)")

    assert ("<class 'presort.errors.PresortError'> batch\n", "") == (done.stdout, done.stderr)


def test_unknown_name():
    """A name that presort does not have raises `AttributeError`, as of any module."""
    done = python("import presort; print(hasattr(presort, 'nonsense'), 'wrap' in dir(presort))")

    assert "False True\n" == done.stdout


def test_bare_install_batches(emulator, tmp_path):
    """With no extra installed a plain HTTP client batches, and only the dependencies' own modules are loaded."""
    source = f"""
{BLOCKED}
route = ask(1)
extras = {EXTRAS!r}
say(route=route, loaded=[name for name in extras if name in sys.modules])
"""
    assert [{"route": "batch", "loaded": []}] == run(emulator, tmp_path, source)


@pytest.mark.parametrize(
    ("attempt", "command"),
    [
        ("presort.OptimizedLLMWrapper", 'pip install "presort[langchain]"'),
        ("presort.configure(store='postgresql://a@b/c'); presort.jobs()", 'pip install "presort[postgres]"'),
        ("from presort import cli; cli.main()", 'pip install "presort[cli]"'),
    ],
)
def test_missing_extra_names_the_command(tmp_path, attempt, command):
    """What needs an extra that is not installed says the command that installs it, in one line."""
    source = f"""
{BLOCKED}
try:
    {attempt}
except (presort.errors.MissingExtraError, SystemExit) as error:
    say(message=str(error))
"""
    [said] = run(None, tmp_path, source)

    assert command in said["message"]
    assert "\n" not in said["message"]


# -- the end of the interpreter ------------------------------------------------------------------------------------
ENDS = {
    "asyncio in the main thread": """
async def main():
    calls = [asyncio.create_task(aask(n)) for n in range(6)]
    await asyncio.to_thread(until, lambda: submitted() >= 6)
asyncio.run(main())
""",
    "a pool's workers": """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(6)
for n in range(6):
    pool.submit(ask, n)
until(lambda: submitted() >= 6)
""",
    "plain threads": """
for n in range(6):
    threading.Thread(target=ask, args=(n,)).start()
until(lambda: submitted() >= 6)
""",
    "daemon threads": """
for n in range(6):
    threading.Thread(target=ask, args=(n,), daemon=True).start()
until(lambda: submitted() >= 6)
""",
    "a loop in a thread": """
async def main():
    await asyncio.gather(*(aask(n) for n in range(6)))
threading.Thread(target=asyncio.run, args=(main(),)).start()
until(lambda: submitted() >= 6)
""",
    "calls that still accumulate": """
presort.configure(batching={"flush_seconds": 3600})
for n in range(6):
    threading.Thread(target=ask, args=(n,)).start()
until(lambda: sum(view.count for view in presort.jobs()[1]) >= 6)
""",
    "threads in drain": """
for n in range(6):
    threading.Thread(target=ask, args=(n,)).start()
until(lambda: submitted() >= 6)
threading.Thread(target=presort.drain).start()
""",
    "a stream's reader": """
from presort.api import payload
made = [payload("anthropic", body(n), base_url=os.environ["EMULATOR"], key="test-key") for n in range(6)]
def read():
    for answer in presort.stream(made):
        pass
threading.Thread(target=read).start()
until(lambda: submitted() >= 6)
""",
    "sys.exit": """
threading.Thread(target=ask, args=(1,)).start()
until(lambda: submitted() >= 1)
say(at=time.time())
sys.exit(0)
""",
}


@pytest.mark.parametrize("where", ENDS)
def test_exit_with_calls_parked(slow_emulator, tmp_path, where):
    """The interpreter ends within 2 s of the main thread, quietly, whoever is still parked."""
    said = run(slow_emulator, tmp_path, f"{ENDS[where]}\nsay(at=time.time())\n")

    assert time.time() - said[0]["at"] < 2.0


def test_interrupt(slow_emulator, tmp_path):
    """Ctrl-C frees a parked call at once; its request was submitted and stays in the store, for whoever asks again."""
    source = """
threading.Thread(target=lambda: (until(lambda: submitted() >= 1), say(parked=True)), daemon=True).start()
try:
    ask(1)
except KeyboardInterrupt:
    say(at=time.time())
"""
    guest = Guest(slow_emulator, tmp_path, source)
    guest.heard()
    started = time.time()
    guest.process.send_signal(signal.SIGINT)
    [said] = guest.finish()

    assert said["at"] - started < 1.0
    assert time.time() - started < 3.0
    assert [RequestState.IN_JOB] == [row["state"] for row in rows(tmp_path)]


def test_interrupt_before_submission(slow_emulator, tmp_path):
    """Ctrl-C withdraws a call that still accumulates: nothing of it stays in the store, and nobody is asked."""
    source = """
presort.configure(batching={"flush_seconds": 3600})
stored = lambda: sum(view.count for view in presort.jobs()[1]) >= 1
threading.Thread(target=lambda: (until(stored), say(parked=True)), daemon=True).start()
try:
    ask(1)
except KeyboardInterrupt:
    pass
"""
    guest = Guest(slow_emulator, tmp_path, source)
    guest.heard()
    guest.process.send_signal(signal.SIGINT)
    guest.finish()

    assert [] == rows(tmp_path)
    assert [] == slow_emulator.asked()


def test_call_at_exit(emulator, tmp_path):
    """A call on the way out, from an `atexit` handler, still gets its answer by the standard route, and none parks."""
    source = """
import atexit
def late():
    with presort.transport(httpx2.Client()) as client:
        response = client.post(URL, json=body("late"), headers=HEADERS)
    try:
        ask("parked")
    except presort.errors.ClosedError as error:
        say(status=response.status_code, parked=str(error))
atexit.register(late)
say(route=ask("early"))
"""
    early, late = run(emulator, tmp_path, source)

    assert {"route": "batch"} == early
    assert {"status": 200, "parked": "the interpreter is shutting down"} == late


# -- forks ---------------------------------------------------------------------------------------------------------
def rows(home: Path) -> list[dict[str, object]]:
    """Read the requests of a store that nobody uses any more; it must be whole."""
    database = sqlite3.connect(home / "presort.db")
    database.row_factory = sqlite3.Row
    try:
        assert "ok" == database.execute("PRAGMA integrity_check").fetchone()[0]
        return [dict(row) for row in database.execute("SELECT * FROM presort_requests ORDER BY id")]
    finally:
        database.close()


@needs_fork
def test_fork_with_parked_work(tmp_path):
    """A forked child works by itself with an owner of its own, and the parent's parked calls are answered."""
    source = """
from presort import runtime
routes = []
threads = [threading.Thread(target=lambda n=n: routes.append(ask(n))) for n in range(4)]
for thread in threads:
    thread.start()
until(lambda: submitted() >= 4)
mine = runtime.engine().core.owner
child = os.fork()
if child == 0:
    route = ask("of the child")
    say(child=route, other_owner=runtime.engine().core.owner != mine)
    sys.exit(0)
_, status = os.waitpid(child, 0)
for thread in threads:
    thread.join()
say(parent=routes, status=status, same_owner=runtime.engine().core.owner == mine)
"""
    with EmulatorServer(batch_seconds=1.5) as emulator:
        child, parent = run(emulator, tmp_path, source)
        asked = emulator.asked()

    assert {"child": "batch", "other_owner": True} == child
    assert {"parent": ["batch"] * 4, "status": 0, "same_owner": True} == parent
    assert 5 == len(asked) == len(set(asked))
    assert [RequestState.SETTLED] * 5 == [row["state"] for row in rows(tmp_path)]


@needs_fork
def test_parent_ends_before_its_child(emulator, tmp_path):
    """What a child stores after its parent has closed the store, and ended, is safe: it holds locks of its own."""
    source = """
ask("of the parent")
parent = os.getpid()
ready, begun = os.pipe()
if os.fork() == 0:
    ask("of the child, before")
    os.write(begun, b"x")
    until(lambda: os.getppid() != parent)
    ask("of the child, after")
    say(child=True)
    sys.exit(0)
os.read(ready, 1)
presort.close()
say(parent=True)
"""
    said = run(emulator, tmp_path, source)

    assert [{"parent": True}, {"child": True}] == said
    assert [RequestState.SETTLED] * 3 == [row["state"] for row in rows(tmp_path)]


@needs_fork
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/locks tells whose locks there are")
def test_child_holds_its_own_locks(emulator, tmp_path):
    """A child that uses the store holds file locks of its own on it, not only what SQLite remembers of its parent's."""
    source = """
def mine():
    inode = os.stat(os.environ["PRESORT_STORE"]).st_ino
    lines = [line.split() for line in open("/proc/locks")]
    return any(int(line[4]) == os.getpid() and line[5].endswith(f":{inode}") for line in lines if line[1] != "->")
ask("of the parent")
held = mine()
child = os.fork()
if child == 0:
    ask("of the child")
    say(child=mine())
    os._exit(0)
os.waitpid(child, 0)
say(parent=held)
"""
    assert [{"child": True}, {"parent": True}] == run(emulator, tmp_path, source)


@needs_fork
def test_prefork_server(emulator, tmp_path):
    """Workers forked by a parent that has used presort each batch by themselves."""
    before = len(emulator.asked())
    source = """
ask("of the master")
workers = []
for number in range(3):
    worker = os.fork()
    if worker == 0:
        async def serve():
            return await asyncio.gather(*(aask(f"{number}.{n}") for n in range(2)))
        say(worker=asyncio.run(serve()))
        sys.exit(0)
    workers.append(worker)
statuses = [os.waitpid(worker, 0)[1] for worker in workers]
say(statuses=statuses, master=ask("of the master, again"))
"""
    *workers, master = run(emulator, tmp_path, source)

    assert [{"worker": ["batch", "batch"]}] * 3 == workers
    assert {"statuses": [0, 0, 0], "master": "batch"} == master
    assert 8 == len(emulator.asked()) - before


@needs_fork
def test_multiprocessing_fork(emulator, tmp_path):
    """The processes of a forking pool batch, after their parent has."""
    source = """
import multiprocessing
ask("of the parent")
with multiprocessing.get_context("fork").Pool(2) as pool:
    say(routes=pool.map(ask, ["a", "b", "c", "d"], chunksize=2))
"""
    assert [{"routes": ["batch"] * 4}] == run(emulator, tmp_path, source)


@needs_fork
def test_forks_while_calls_are_under_way(emulator, tmp_path):
    """Forks at any moment harm neither the parent's calls nor its store, and no child hangs."""
    source = """
ask("first")
done = []
threads = [threading.Thread(target=lambda n=n: done.extend(ask(f"{n}.{m}") for m in range(2))) for n in range(4)]
for thread in threads:
    thread.start()
forks = 0
while any(thread.is_alive() for thread in threads):
    child = os.fork()
    if child == 0:
        presort.telemetry.warn("fork", "nobody listens, but the lock may have been held")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    forks += 1
    time.sleep(0.01)
say(done=len(done), forked=forks > 5)
"""
    assert [{"done": 8, "forked": True}] == run(emulator, tmp_path, source)
    assert [RequestState.SETTLED] * 9 == [row["state"] for row in rows(tmp_path)]


@needs_fork
def test_parents_call_in_a_child(slow_emulator, tmp_path):
    """A child that waits for a call of its parent's is told that the answer goes to the parent."""
    source = """
from concurrent.futures import ThreadPoolExecutor
from presort import runtime
threading.Thread(target=ask, args=(1,), daemon=True).start()
until(lambda: submitted() >= 1)
[future] = runtime.engine()._futures
child = os.fork()
if child == 0:
    try:
        future.result()
    except presort.errors.ClosedError as error:
        say(error=str(error))
    os._exit(0)
os.waitpid(child, 0)
"""
    [said] = run(slow_emulator, tmp_path, source)

    assert "forked" in said["error"]


# -- loops and threads ---------------------------------------------------------------------------------------------
def test_notebook(emulator, tmp_path):
    """Where a loop runs in the main thread, as in a notebook's cell, sync calls are answered."""
    source = """
async def cell():
    routes = [ask(1), await aask(2)]
    presort.flush()
    return routes, presort.drain(5), len(presort.jobs(all_jobs=True)[0])
say(cell=asyncio.run(cell()))
"""
    assert [{"cell": [["batch", "batch"], True, 2]}] == run(emulator, tmp_path, source)


def test_nested_loops(emulator, tmp_path):
    """Where loops are made to nest, calls inside a nested one are answered, and presort's own loop is not nested."""
    pytest.importorskip("nest_asyncio")
    source = """
import nest_asyncio
nest_asyncio.apply()
async def outer():
    async def inner():
        return await asyncio.gather(aask(1), aask(2))
    return asyncio.run(inner()) + [await aask(3)]
say(routes=asyncio.run(outer()))
"""
    assert [{"routes": ["batch"] * 3}] == run(emulator, tmp_path, source)


@pytest.mark.skipif(sys.platform == "win32", reason="uvloop is not for Windows")
@pytest.mark.parametrize("way", ["uvloop.run(main())", "uvloop.install(); asyncio.run(main())"])
def test_uvloop(emulator, tmp_path, way):
    """On uvloop parked calls, sync and async, are answered; also where every new loop is one of uvloop's."""
    pytest.importorskip("uvloop")
    source = f"""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
import uvloop
async def main():
    say(loop=type(asyncio.get_running_loop()).__module__)
    say(routes=await asyncio.gather(aask(1), aask(2), asyncio.to_thread(ask, 3)) + [ask(4)])
{way}
"""
    assert [{"loop": "uvloop"}, {"routes": ["batch"] * 4}] == run(emulator, tmp_path, source)


def test_loop_per_thread(emulator, tmp_path):
    """Loops in many threads, one after the other, share the one engine and get their answers in one batch or few."""
    source = """
from presort import runtime
engines = set()
routes = []
def work(n):
    routes.append(asyncio.run(aask(n)))
    engines.add(id(runtime.engine()))
for turn in range(2):
    threads = [threading.Thread(target=work, args=(f"{turn}.{n}",)) for n in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
say(routes=routes, engines=len(engines), left=[thread.name for thread in threading.enumerate() if thread in threads])
"""
    assert [{"routes": ["batch"] * 8, "engines": 1, "left": []}] == run(emulator, tmp_path, source)


def test_wait_on_the_engines_thread(emulator, tmp_path):
    """A call that would wait on the engine's own thread raises `DeadlockError`, and the engine goes on."""
    raised: list[type[BaseException]] = []
    first = Bench(emulator, "anthropic", tmp_path)
    first.emulator.fault("status", on="create_batch", status=429, retry_after=0.1, times=2)
    first.park(*first.payloads(1))
    until(lambda: first.states)
    first.engine.close()
    engine: Engine

    def keys(provider: str, account: str) -> str:
        for wait in (
            lambda: engine.park(bench.payloads(1, prefix="inside")[0], link=Link("test-key")).result(),
            engine.flush,
            engine.jobs,
            lambda: engine.drain(1),
            lambda: next(engine.stream([])),
        ):
            try:
                wait()
            except (DeadlockError, StopIteration) as error:
                raised.append(type(error))
        return "test-key"

    bench = Bench(emulator, "anthropic", tmp_path)
    engine = bench.engine
    bench.engine.reconfigure(bench.settings)
    try:
        engine.core.settings._keys = keys
        until(lambda: raised)
        [outcome] = bench.ask(1)
    finally:
        engine.close()

    assert [DeadlockError] * 5 == raised[:5]
    assert outcome.succeeded


def test_close_frees_everybody(slow_emulator, tmp_path):
    """Whoever waits in any way when the engine is closed gets `ClosedError`; nobody waits on."""
    bench = Bench(slow_emulator, "anthropic", tmp_path)
    engine = bench.engine
    [future] = bench.park(*bench.payloads(1))
    stream = engine.stream(bench.payloads(2, prefix="streamed"), link=Link("test-key"))
    heard: list[type[BaseException]] = []

    def wait(action) -> None:
        try:
            action()
        except ClosedError as error:
            heard.append(type(error))

    threads = [
        threading.Thread(target=wait, args=(action,)) for action in (future.result, lambda: next(stream), engine.drain)
    ]
    for thread in threads:
        thread.start()
    until(lambda: len(bench.states) == 2)
    engine.close()
    for thread in threads:
        thread.join(5)

    assert [ClosedError] * 3 == heard
    with pytest.raises(ClosedError):
        engine.park(bench.payloads(1)[0])
    with pytest.raises(ClosedError):
        engine.jobs()


def test_a_keys_function_that_fails(emulator, tmp_path, caplog):
    """A `keys` function that raises is one without a key: logged by its error's type alone, never its text."""

    def keys(provider: str, account: str) -> str:
        raise LookupError("planted-secret")

    bench = Bench(emulator, "anthropic", tmp_path, more={"keys": keys})
    try:
        with caplog.at_level(logging.WARNING, "presort"):
            payload = bench.payloads(1, key="nobody's")[0]
            future = bench.engine.park(payload)
            until(lambda: bench.states and "waits for a key" in caplog.text)
    finally:
        future.cancel()
        bench.engine.close()

    assert "the `keys` function that was configured raised LookupError" in caplog.text
    assert "planted-secret" not in caplog.text


def test_fallback_names_itself(emulator, tmp_path, caplog):
    """What leaves the batch route is warned of in the words 'Falling back to standard API'."""
    bench = Bench(emulator, "anthropic", tmp_path, min_requests=3)
    telemetry._last.clear()
    try:
        with caplog.at_level(logging.WARNING, "presort"):
            outcomes: list[Outcome] = bench.ask(2)
    finally:
        bench.engine.close()

    assert [Route.STANDARD] * 2 == [outcome.route for outcome in outcomes]
    [message] = [record.message for record in caplog.records if "Falling back" in record.message]
    assert "Falling back to standard API: fewer than `batching.min_requests` (3) (2 requests)" == message


def test_store_is_the_next_processs(emulator, tmp_path):
    """A store that a guest closed can be opened by the next at once, and shows no owner alive."""
    run(emulator, tmp_path, "say(route=ask(1))")
    store = Store.open(f"sqlite:///{tmp_path / 'presort.db'}")
    try:
        assert [] == store.owners(time.time())
    finally:
        store.close()
