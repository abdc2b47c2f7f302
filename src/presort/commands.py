"""What each command does on the terminal; `presort.cli` starts it.

What takes long to import is imported where it is used, so that help and plain mistakes are answered at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import quote, urlsplit

import typer

from presort import __version__, emulated
from presort.errors import ConfigurationError, MissingKeyError, PresortError, StoreError
from presort.providers import provider, providers
from presort.providers.base import AnswerLostError, ChannelError, NotSentError, Provider, Refusal, RefusedError
from presort.telemetry import logger

if TYPE_CHECKING:
    from presort.config import Settings
    from presort.display import Bill
    from presort.engine import Engine
    from presort.indexing.index import IndexJob, IndexResult, Progress
    from presort.providers.base import Reply

NOTHING_DONE = 2
"""Exit status: wrong usage, input or settings, no key; nothing was sent."""

FAILED = 1
"""Exit status: it began and could not end, or no document succeeded."""

INTERRUPTED = 130
TERMINATED = 143

EMULATED_KEY = "emulated-key"
EMULATED_POLL_SECONDS = 0.5
EMULATED_RECONCILE_SECONDS = 10.0
"""The emulator's list of batches never lags, so a lost create is ruled out quickly."""

STORE_PATIENCE_SECONDS = 10.0
"""How long a store may refuse to be written before the command gives up: a full disk seldom mends itself."""

_WATCH_SECONDS = 1.0
_LOOK_TRIES = 2

_HELP = """Send LLM calls by the cheapest route that meets their deadline.

Try it without a key and without cost:

  presort index docs --emulate"""

_INDEX_HELP = """Extract a record from every document, by the Batch API at half price.

Each document becomes one row of the output: departments, category, topics, languages, sentiment, a summary; or the \
reason why it could not be read. The work survives Ctrl-C, kill and power cuts: run the same command again and it goes \
on where it was, and nothing is asked twice.

Examples:

  presort index docs --emulate
  ANTHROPIC_API_KEY=… presort index docs notes.jsonl --output records.jsonl
  OPENAI_API_KEY=… presort index docs --provider openai --model gpt-5-mini

The exit status is 0 if a record was extracted, 1 if none was or the work could not end, 2 if nothing was sent."""

_JOBS_HELP = """Show what is under way: every job, its state, its batch at the vendor, and what it waits for.

Nothing is sent and nothing is changed. To go on with the work, run the command that began it again."""

_EMULATOR_HELP = """Run an EMULATED Anthropic and OpenAI on this machine, for trying out and testing.

Any key will do, no answer is real, and nothing costs money. Point a client at the address it prints:

  presort emulator --port 8421
  ANTHROPIC_BASE_URL=http://127.0.0.1:8421 OPENAI_BASE_URL=http://127.0.0.1:8421/v1 …"""

_ASK, _BATCH, _OUT, _TRY = "What is asked, of whom", "Batches", "Output", "Trying it out"
_FLAG = {"metavar": ""}
"""A flag takes no value, and typer would show one."""

app = typer.Typer(help=_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_Providers = StrEnum("_Providers", {name: name for name in providers()})  # type: ignore[misc]


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"presort {__version__}\n")
        raise typer.Exit


@app.callback()
def _all(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.", **_FLAG),
    ] = False,
) -> None:
    pass


@app.command("index", help=_INDEX_HELP)
def index_command(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Folders of text, Markdown and HTML, and JSONL files of {id, text}."),
    ],
    provider_name: Annotated[
        _Providers, typer.Option("--provider", "-p", help="Whose API to use.", rich_help_panel=_ASK)
    ] = next(iter(_Providers)),
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="ID", help="Model; by default a cheap one of the provider.", rich_help_panel=_ASK
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url",
            metavar="URL",
            help="Another server that speaks the provider's format.",
            rich_help_panel=_ASK,
        ),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            "--context-tokens",
            metavar="N",
            min=1,
            help="How much the model takes: a larger document becomes a row with the reason; by default 200,000.",
            rich_help_panel=_ASK,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            min=1,
            help="Most requests in one batch; by default the configuration's, 10,000.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            "--deadline",
            metavar="SECONDS",
            min=1,
            help="When every answer must be there; what a batch has not answered then goes by the standard route, at "
            "list price; by default the configuration's, 86,400.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where the records go, one JSON row per document, in input order.",
            rich_help_panel=_OUT,
        ),
    ] = Path("records.jsonl"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_OUT, **_FLAG)
    ] = False,
    emulate: Annotated[
        bool,
        typer.Option(
            "--emulate",
            help="Use an EMULATED vendor on this machine: no key, no cost, no real answers.",
            rich_help_panel=_TRY,
            **_FLAG,
        ),
    ] = False,
) -> None:
    """Index documents; the help text stands above."""
    with _one_line_errors():
        vendor = provider(provider_name.value)
        key = EMULATED_KEY if emulate else _find_key(vendor)
        _check_files(paths, output)
        server = _begin_emulator() if emulate and base_url is None else None
        engine = _start_engine(batch_size, deadline, emulate=emulate)
        url = _base_url(vendor, base_url, server)
        job = _index_job(paths, output, vendor, model or vendor.default_model, url, key, context_tokens)
        _greet(engine, job, emulate=emulate)
        result = _run_index(engine, job, emulate=emulate, as_json=as_json)
        bill = _compare(engine, emulated.invoice(server.result())) if server is not None else None
        _close()
    if as_json:
        _print_json(_result_json(result, job, bill, emulate=emulate))
    else:
        _show_result(result, job, bill, emulate=emulate)
    if not result.succeeded:
        raise typer.Exit(FAILED)


@app.command("jobs", help=_JOBS_HELP)
def jobs_command(
    all_jobs: Annotated[
        bool, typer.Option("--all", "-a", help="Show completed jobs of the last 30 days too.", **_FLAG)
    ] = False,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Show the EMULATED work instead of the real.", **_FLAG)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", **_FLAG)] = False,
) -> None:
    """Show jobs; the help text stands above."""
    with _one_line_errors():
        from presort import runtime
        from presort.store import Store

        settings = _settings(None, None, emulate=emulate)
        url = runtime.store_url(settings.store)
        now = time.time()
        file = _store_file(url)
        if file is not None and not file.exists():
            location, jobs, queues = str(file), [], []  # looking makes no store
        else:
            store = Store.open(url)
            try:
                location = str(store.location)
                jobs, queues = store.job_views(now, all_jobs=all_jobs), store.queue_views()
            finally:
                store.close()
    if as_json:
        _print_json(_jobs_json(location, jobs, queues, emulate=emulate))
        return
    from rich.console import Console
    from rich.markup import escape

    from presort.display import job_lines

    console = Console(highlight=False)
    console.print(f"store: {escape(location)}{' ([bold]EMULATED[/bold])' if emulate else ''}", soft_wrap=True)
    if not jobs and not queues:
        console.print("nothing is under way" + ("" if all_jobs else "; --all shows what is completed"))
    for line in job_lines(jobs, queues, now):
        console.print(line, soft_wrap=True)


@app.command("emulator", help=_EMULATOR_HELP)
def emulator_command(
    port: Annotated[int, typer.Option("--port", metavar="N", help="Port to listen on; 0 picks a free one.")] = 0,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="FILE", help="Keep everything here; in memory otherwise.")
    ] = None,
    batch_seconds: Annotated[
        float | None, typer.Option("--batch-seconds", metavar="S", help="How long a batch takes; by default 2.")
    ] = None,
    idle_exit_seconds: Annotated[
        float | None, typer.Option("--idle-exit-seconds", metavar="S", help="Stop after so long without a request.")
    ] = None,
) -> None:
    """Run the emulator; the help text stands above."""
    try:
        from presort.emulator.server import serve
    except ModuleNotFoundError:
        _fail('the emulator needs an extra: pip install "presort[emulator]"', NOTHING_DONE)
    raise typer.Exit(serve(port=port, state=state, batch_seconds=batch_seconds, idle_exit_seconds=idle_exit_seconds))


# Before anything is sent ------------------------------------------------------------------------------------


def _find_key(vendor: Provider) -> str:
    """Return the provider's key from its usual variable; raises `MissingKeyError`."""
    key = os.environ.get(vendor.key_variable, "").strip()
    if not key:
        raise MissingKeyError(
            f"no API key: set {vendor.key_variable}, or add --emulate to try it without a key and without cost"
        )
    return key


def _check_files(paths: list[Path], output: Path) -> None:
    """Raise `InputError` at once for input and output that cannot be used."""
    from presort.indexing.documents import check_documents
    from presort.indexing.records import check_output

    target = check_output(output)
    check_documents(paths, exclude=[output, target, target.with_name(f"{target.name}.partial")])


def _begin_emulator() -> Future[str]:
    """Have the emulator started, if it does not run, while we get ready ourselves."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="presort-emulator")
    server = pool.submit(emulated.ensure, emulated.folder())
    pool.shutdown(wait=False)
    return server


def _start_engine(batch_size: int | None, deadline: float | None, *, emulate: bool) -> Engine:
    from presort import runtime

    _settings(batch_size, deadline, emulate=emulate)
    return runtime.engine()


def _settings(batch_size: int | None, deadline: float | None, *, emulate: bool) -> Settings:
    from presort import runtime

    where = emulated.folder()
    options: dict[str, Any] = {"batching": {}}
    if batch_size is not None:
        options["batching"]["max_batch_requests"] = batch_size
    if deadline is not None:
        options["batching"]["deadline_seconds"] = deadline
    if emulate:
        options["store"] = str(where / "presort.db")
        options["batching"]["poll_interval_seconds"] = EMULATED_POLL_SECONDS
        options["reconcile_window_seconds"] = EMULATED_RECONCILE_SECONDS
        options["account"] = "emulated"
    settings = runtime.configure(**options)
    file = _store_file(runtime.store_url(settings.store))
    if not emulate and file is not None and file.resolve().is_relative_to(where.resolve()):
        raise ConfigurationError(
            f"the store {file} is for EMULATED work, and this is real: choose another, or add --emulate"
        )
    return settings


def _store_file(url: str) -> Path | None:
    """Return the file of an SQLite store; `None` if the store is a server's."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def _base_url(vendor: Provider, given: str | None, server: Future[str] | None) -> str:
    if server is not None:
        return server.result() + urlsplit(vendor.default_base_url).path
    url = given or os.environ.get(vendor.base_url_variable) or vendor.default_base_url
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise ConfigurationError(f"`{url}` is no base URL; give one such as {vendor.default_base_url}")
    return url.rstrip("/")


def _index_job(
    paths: list[Path], output: Path, vendor: Provider, model: str, url: str, key: str, context_tokens: int | None
) -> IndexJob:
    from presort.indexing.extraction import DEFAULT_CONTEXT_TOKENS
    from presort.indexing.index import IndexJob

    tokens = context_tokens or DEFAULT_CONTEXT_TOKENS
    return IndexJob(paths, output, vendor, model, url, key, context_tokens=tokens)


def _greet(engine: Engine, job: IndexJob, *, emulate: bool) -> None:
    """See that the vendor answers, takes the key and knows the model, before anything is read or sent."""
    vendor = job.provider
    try:
        reply = _look(engine, job, vendor.probe_path)
        if not _is_json(reply.body):
            raise ConfigurationError(
                f"{job.base_url} answers, but not as {vendor.title}'s API does: check the base URL"
            )
        if (emulated.HEADER in reply.headers) is not emulate:
            raise ConfigurationError(
                f"{job.base_url} is no emulator: leave out --emulate or --base-url"
                if emulate
                else f"{job.base_url} is an EMULATED vendor: add --emulate, which keeps its rows apart from real ones"
            )
        _look(engine, job, f"{vendor.probe_path}/{quote(job.model, safe=':@')}")
    except (NotSentError, AnswerLostError) as error:
        raise PresortError(
            f"{job.base_url} does not answer ({error}): check the network, the proxy and the base URL"
        ) from error
    except RefusedError as refusal:
        if vendor.classify(refusal) is Refusal.KEY:
            what = f"the key `{EMULATED_KEY}`" if emulate else f"the key in {vendor.key_variable}"
            raise MissingKeyError(
                f"{vendor.title} rejected {what} (HTTP {refusal.status}): set a valid one"
            ) from refusal
        if refusal.status == 404 and job.model.encode() in refusal.body:
            raise ConfigurationError(
                f"{vendor.title} does not know the model `{job.model}`, or not for this key: choose one with --model"
            ) from refusal
        # a server without a list of models may still batch
    except ChannelError as error:
        logger.info("the look at %s failed, going on: %s", job.base_url, error)


def _look(engine: Engine, job: IndexJob, path: str) -> Reply:
    """Ask for something harmless, twice if the answer gets lost."""
    from presort.engine import Link

    for tries in range(1, _LOOK_TRIES + 1):
        try:
            return engine.look(job.base_url, job.provider.name, path, Link(job.key))
        except AnswerLostError:
            if tries == _LOOK_TRIES:
                raise
    raise AssertionError


def _is_json(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body), dict)
    except ValueError:
        return False


# While it runs ----------------------------------------------------------------------------------------------


def _run_index(engine: Engine, job: IndexJob, *, emulate: bool, as_json: bool) -> IndexResult:
    from presort.display import Display
    from presort.indexing.index import Progress, index

    progress = Progress()
    try:
        with (
            _stoppable(),
            Display(engine, progress, emulate=emulate, quiet=as_json) as display,
            _watched(engine, progress, display.say, emulate=emulate),
        ):
            return index(engine, job, progress)
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # who cannot wait for the end may have it at once
        done, total = progress.settled, "?" if progress.total is None else progress.total
        flag, who = (" --emulate", f"the EMULATED {job.provider.title}") if emulate else ("", job.provider.title)
        _fail(
            f"stopped, {done} of {total} documents are done. What was submitted goes on at {who}: run "
            f"the same command again to resume, `presort jobs{flag}` to look",
            stop.status if isinstance(stop, _Terminated) else INTERRUPTED,
        )
    except StoreError as error:
        _fail(f"{error}. Nothing that was stored is lost: run the same command again after that to resume", FAILED)
    except (PresortError, OSError) as error:
        _fail(str(error), FAILED if progress.stream is not None else NOTHING_DONE)


class _Terminated(KeyboardInterrupt):
    """Somebody asked the process to end."""

    status = TERMINATED


@contextmanager
def _stoppable() -> Iterator[None]:
    """Take a request to end as Ctrl-C, so that the terminal is left in order."""

    def stop(_number: int, _frame: object) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _watched(engine: Engine, progress: Progress, say: Callable[[str], None], *, emulate: bool) -> Iterator[None]:
    """Meanwhile keep the emulator running, and end the run if the store cannot be written for long."""
    where = emulated.folder()
    ours = emulate and emulated.runs(where)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_WATCH_SECONDS):
            trouble = engine.trouble
            if trouble is not None and time.time() - trouble[0] >= STORE_PATIENCE_SECONDS:
                progress.fail(StoreError(trouble[1]))
                return
            if ours and not emulated.runs(where):
                try:
                    emulated.ensure(where)
                    say("[yellow]warning:[/yellow] the EMULATED vendor had stopped, and was started again")
                except PresortError as error:
                    progress.fail(error)
                    return

    thread = threading.Thread(target=watch, name="presort-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


# What came of it --------------------------------------------------------------------------------------------


def _compare(engine: Engine, invoice: dict[str, Any]) -> Bill:
    """Hold presort's ledger against the emulated vendors' own invoice, of everything ever emulated here."""
    from presort.display import Bill
    from presort.monitoring.receipt import make_receipt, usd_text

    ledger = usd_text(make_receipt(engine.totals()).paid_usd) or "unknown"
    return Bill(str(invoice["total_usd"]), ledger, under_way=bool(engine.jobs()[0]))


def _show_result(result: IndexResult, job: IndexJob, bill: Bill | None, *, emulate: bool) -> None:
    from rich.console import Console

    from presort.display import receipt_lines, result_lines

    console = Console(highlight=False)
    for line in result_lines(result, job.provider.title, emulate=emulate):
        console.print(line, soft_wrap=True)
    console.print()
    for line in receipt_lines(result, bill, emulate=emulate):
        console.print(line, soft_wrap=True)
    if emulate:
        _next_steps(console, job)


def _next_steps(console: Any, job: IndexJob) -> None:
    from rich.markup import escape

    shown = " ".join(str(path) for path in job.paths)
    option = "" if job.provider.name == next(iter(providers())) else f" --provider {job.provider.name}"
    steps = {
        f"head -n 1 {job.output} | python3 -m json.tool": "look at a record",
        "presort jobs --emulate --all": "look at the batches it took",
        f"{job.provider.key_variable}=… presort index {shown}{option}": "the same for real",
    }
    width = max(map(len, steps))
    console.print("\nNext:")
    for command, meaning in steps.items():
        console.print(f"  {escape(command):<{width}}  {meaning}", soft_wrap=True)


def _result_json(result: IndexResult, job: IndexJob, bill: Bill | None, *, emulate: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "emulated": emulate,
        "output": str(result.output),
        "provider": job.provider.name,
        "model": job.model,
        "documents": result.documents,
        "succeeded": result.succeeded,
        "failed": result.failed,
        "resumed": result.resumed,
        "routes": dict(result.routes),
        "failures": dict(result.reasons.most_common()),
        "skipped": {
            "by_suffix": result.skipped.by_suffix,
            "hidden": result.skipped.hidden,
            "linked_folders": result.skipped.links,
        },
        "receipt": result.receipt.as_json() if result.receipt is not None else None,
    }
    if bill is not None:
        answer |= {"emulated_invoice_usd": bill.invoice_usd, "emulated_ledger_usd": bill.ledger_usd}
    return answer


def _jobs_json(location: str, jobs: list[Any], queues: list[Any], *, emulate: bool) -> dict[str, Any]:
    return {
        "store": location,
        "emulated": emulate,
        "accumulating": [
            {"provider": q.key.provider, "model": q.key.model, "route": q.route.value, "requests": q.count}
            for q in queues
        ],
        "jobs": [
            {
                "id": view.job.id,
                "state": view.job.state.value,
                "provider": view.key.provider,
                "model": view.key.model,
                "base_url": view.key.base_url,
                "account": view.key.account,
                "requests": view.job.count,
                "settled": view.settled,
                "batch_id": view.job.batch_id,
                "created_at": view.job.created_at,
                "deadline": view.job.deadline,
                "leader": view.leader,
                "note": view.job.note,
            }
            for view in jobs
        ],
    }


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# Errors -----------------------------------------------------------------------------------------------------


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what can go wrong into one line and an exit status."""
    try:
        yield
    except PresortError as error:
        _fail(str(error), NOTHING_DONE)
    except KeyboardInterrupt:
        _fail("stopped", INTERRUPTED)
    except OSError as error:
        _fail(f"{error.strerror or error}{f': `{error.filename}`' if error.filename else ''}", FAILED)


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"presort: {' '.join(message.split())}\n")
    _close()
    raise typer.Exit(status)


def _close() -> None:
    """Stop the engine, if it was started."""
    if "presort.runtime" in sys.modules:
        sys.modules["presort.runtime"].close()


__all__ = ["app"]
