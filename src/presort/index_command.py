"""What `presort index` does on the terminal: look that all is well, index, show what came of it.

What takes long to import is imported where it is used, so that plain mistakes are answered at once.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote, urlsplit

from presort import emulated
from presort.command_line import (
    FAILED,
    INTERRUPTED,
    NOTHING_DONE,
    TERMINATED,
    close,
    configure,
    fail,
    one_line_errors,
    print_json,
)
from presort.errors import ConfigurationError, MissingKeyError, PresortError, StoreError
from presort.providers import providers
from presort.providers.base import AnswerLostError, ChannelError, NotSentError, Provider, Refusal, RefusedError
from presort.telemetry import logger

if TYPE_CHECKING:
    from presort.display import Bill
    from presort.engine import Engine
    from presort.indexing.index import IndexJob, IndexResult, Progress
    from presort.providers.base import Reply

EMULATED_KEY = "emulated-key"

STORE_PATIENCE_SECONDS = 5.0
"""How long a store may refuse to be written before the command gives up: a full disk seldom mends itself."""

_WATCH_SECONDS = 1.0
_LOOK_TRIES = 2


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for; `None` is the default."""

    paths: list[Path]
    output: Path
    provider: Provider
    model: str | None = None
    base_url: str | None = None
    context_tokens: int | None = None
    batch_size: int | None = None
    deadline_seconds: float | None = None
    emulate: bool = False
    as_json: bool = False


def index_command(options: Options) -> bool:
    """Index documents; return whether a record was extracted from any."""
    vendor, emulate = options.provider, options.emulate
    with one_line_errors():
        key = EMULATED_KEY if emulate else _find_key(vendor)
        _check_files(options.paths, options.output)
        server = _begin_emulator() if emulate and options.base_url is None else None
        engine = _start_engine(options)
        job = _index_job(options, _base_url(vendor, options.base_url, server), key)
        _greet(engine, job, emulate=emulate)
        result = _run_index(engine, job, options)
        bill = _compare(engine, emulated.invoice(server.result())) if server is not None else None
        close()
    if options.as_json:
        print_json(_result_json(result, job, bill, emulate=emulate))
    else:
        _show_result(result, job, bill, emulate=emulate)
    return result.succeeded > 0


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


def _start_engine(options: Options) -> Engine:
    from presort import runtime

    configure(options.batch_size, options.deadline_seconds, emulate=options.emulate)
    return runtime.engine()


def _base_url(vendor: Provider, given: str | None, server: Future[str] | None) -> str:
    if server is not None:
        return server.result() + urlsplit(vendor.default_base_url).path
    url = given or os.environ.get(vendor.base_url_variable) or vendor.default_base_url
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise ConfigurationError(f"`{url}` is no base URL; give one such as {vendor.default_base_url}")
    return url.rstrip("/")


def _index_job(options: Options, url: str, key: str) -> IndexJob:
    from presort.indexing.extraction import DEFAULT_CONTEXT_TOKENS
    from presort.indexing.index import IndexJob

    return IndexJob(
        paths=options.paths,
        output=options.output,
        provider=options.provider,
        model=options.model or options.provider.default_model,
        base_url=url,
        key=key,
        context_tokens=options.context_tokens or DEFAULT_CONTEXT_TOKENS,
    )


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


def _run_index(engine: Engine, job: IndexJob, options: Options) -> IndexResult:
    from presort.display import Display
    from presort.indexing.index import Progress, index

    progress, emulate = Progress(), options.emulate
    try:
        with (
            _stoppable(),
            Display(engine, progress, emulate=emulate, quiet=options.as_json) as display,
            _watched(engine, progress, display.say, emulate=emulate),
        ):
            return index(engine, job, progress)
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # who cannot wait for the end may have it at once
        done, total = progress.settled, "?" if progress.total is None else progress.total
        flag, who = (" --emulate", f"the EMULATED {job.provider.title}") if emulate else ("", job.provider.title)
        fail(
            f"stopped, {done} of {total} documents are done. What was submitted goes on at {who}: run "
            f"the same command again to resume, `presort jobs{flag}` to look",
            stop.status if isinstance(stop, _Terminated) else INTERRUPTED,
        )
    except StoreError as error:
        fail(f"{error}. Nothing that was stored is lost: run the same command again after that to resume", FAILED)
    except (PresortError, OSError) as error:
        fail(str(error), FAILED if progress.stream is not None else NOTHING_DONE)


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
