"""What each command does on the terminal; `presort.cli` starts it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from presort import emulated, runtime
from presort.config import Settings
from presort.display import Display, job_table, receipt_table, result_lines
from presort.engine import Engine, Link
from presort.errors import MissingKeyError, PresortError
from presort.indexing.extraction import DEFAULT_CONTEXT_TOKENS
from presort.indexing.index import IndexJob, IndexResult, Progress, find_key, index
from presort.monitoring.receipt import make_receipt, usd_text
from presort.providers import provider, providers
from presort.providers.base import ChannelError, NotSentError, Provider, Refusal, RefusedError
from presort.telemetry import logger

EMULATED_KEY = "emulated-key"
EMULATED_POLL_SECONDS = 0.5
EMULATED_RECONCILE_SECONDS = 10.0
"""The emulator's list of batches never lags, so a lost create is ruled out quickly."""

app = typer.Typer(
    help="Send LLM calls by the cheapest route that meets their deadline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_errors = Console(stderr=True, soft_wrap=True, highlight=False)
_Providers = StrEnum("_Providers", {name: name for name in providers()})  # type: ignore[misc]


@app.command("index")
def index_command(
    paths: Annotated[
        list[Path], typer.Argument(help="Folders of text, Markdown and HTML files, or JSONL files of {id, text}.")
    ],
    provider_name: Annotated[_Providers, typer.Option("--provider", "-p", help="Whose API to use.")] = next(
        iter(_Providers)
    ),
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model id; by default a cheap one of the provider.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option("--base-url", help="Another server that speaks the provider's format.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the records go, one JSON row per document.")
    ] = Path("records.jsonl"),
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Most requests in one batch.")] = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", min=1, help="Seconds until every answer must be there.")
    ] = None,
    context_tokens: Annotated[
        int, typer.Option("--context-tokens", min=1, help="How much the model takes; larger documents are refused.")
    ] = DEFAULT_CONTEXT_TOKENS,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Use an EMULATED vendor on this machine: no key, no cost, no real answers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Extract a record from every document, by the Batch API at half price.

    Each document becomes one row of the output: departments, category, topics, languages, sentiment, a summary. The
    work survives Ctrl-C, kill and power cuts: run the same command again and it goes on where it was.

    Examples:

      presort index docs --emulate

      ANTHROPIC_API_KEY=… presort index docs notes.jsonl --output records.jsonl

      OPENAI_API_KEY=… presort index docs --provider openai --model gpt-5-mini
    """
    with _one_line_errors():
        vendor = provider(provider_name.value)
        settings = _settings(batch_size, deadline, emulate=emulate)
        if emulate:
            url = emulated.ensure(emulated.folder())
            base_url = base_url or vendor.default_base_url.replace(_origin(vendor.default_base_url), url)
            key = EMULATED_KEY
        else:
            key = find_key(vendor, os.environ.get)
            base_url = base_url or os.environ.get(vendor.base_url_variable) or vendor.default_base_url
        job = IndexJob(
            paths=paths,
            output=output,
            provider=vendor,
            model=model or vendor.default_model,
            base_url=base_url.rstrip("/"),
            key=key,
            context_tokens=context_tokens,
        )
        engine = runtime.engine()
        _greet(engine, job)
        result = _run_index(engine, job, settings, emulate=emulate, as_json=as_json)
        bill = _compare(engine, emulated.invoice(url)) if emulate else None
        runtime.close()
    if as_json:
        _print_json(_result_json(result, job, bill, emulate=emulate))
    else:
        console = Console(highlight=False)
        for line in result_lines(result, emulate=emulate):
            console.print(line, soft_wrap=True)
        if result.receipt is not None and result.receipt.lines:
            console.print(receipt_table(result.receipt, emulate=emulate))
        if bill is not None:
            console.print(bill["text"], soft_wrap=True)
            _next_steps(console, job, paths)
    if result.documents and not result.succeeded:
        raise typer.Exit(1)


@app.command("jobs")
def jobs_command(
    all_jobs: Annotated[bool, typer.Option("--all", "-a", help="Show completed jobs too.")] = False,
    emulate: Annotated[bool, typer.Option("--emulate", help="Show the emulated work instead of the real.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is under way: every job, its state, its batch at the vendor, and what it waits for."""
    from presort.store import Store  # noqa: PLC0415 - looking must not start an engine that works

    with _one_line_errors():
        settings = _settings(None, None, emulate=emulate)
        url = runtime.store_url(settings.store)
        store = Store.open(url)
        try:
            now = time.time()
            jobs, queues = store.job_views(now, all_jobs=all_jobs), store.queue_views()
            location = str(store.location)
        finally:
            store.close()
    if as_json:
        _print_json(
            {
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
        )
        return
    console = Console(highlight=False)
    console.print(f"store: {escape(location)}{' (EMULATED)' if emulate else ''}", soft_wrap=True)
    if not jobs and not queues:
        console.print("nothing is under way" + ("" if all_jobs else "; --all shows what is completed"))
        return
    console.print(job_table(jobs, queues, now))


@app.command("emulator", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def emulator_command(context: typer.Context) -> None:
    """Run an EMULATED Anthropic and OpenAI on loopback, for trying out and testing.

    Options: --port N, --state FILE, --batch-seconds S, --idle-exit-seconds N.
    """
    try:
        from presort.emulator.__main__ import main as emulator_main  # noqa: PLC0415 - an extra of its own
    except ModuleNotFoundError:
        _fail('the emulator needs an extra: pip install "presort[emulator]"', 2)
    raise typer.Exit(emulator_main(context.args))


def _settings(batch_size: int | None, deadline: float | None, *, emulate: bool) -> Settings:
    options: dict[str, Any] = {"batching": {}}
    if batch_size is not None:
        options["batching"]["max_batch_requests"] = batch_size
    if deadline is not None:
        options["batching"]["deadline_seconds"] = deadline
    if emulate:
        options["store"] = str(emulated.folder() / "presort.db")
        options["batching"]["poll_interval_seconds"] = EMULATED_POLL_SECONDS
        options["reconcile_window_seconds"] = EMULATED_RECONCILE_SECONDS
        options["account"] = "emulated"
        emulated.folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    return runtime.configure(**options)


def _greet(engine: Engine, job: IndexJob) -> None:
    """See that the vendor answers, takes the key and knows the model, before anything is read or sent."""
    vendor = job.provider
    link = Link(job.key)
    try:
        engine.look(job.base_url, vendor.name, vendor.probe_path, link)
        engine.look(job.base_url, vendor.name, f"{vendor.probe_path}/{job.model}", link)
    except NotSentError as error:
        raise PresortError(
            f"{job.base_url} does not answer ({error}); check the network, the proxy and --base-url"
        ) from error
    except RefusedError as refusal:
        meaning = vendor.classify(refusal)
        if meaning is Refusal.KEY:
            raise MissingKeyError(
                f"{vendor.title} rejected the key in {vendor.key_variable} (HTTP {refusal.status}); set a valid one"
            ) from refusal
        if refusal.status == 404 and _names_model(refusal, job.model):  # noqa: PLR2004
            raise PresortError(
                f"{vendor.title} does not know the model `{job.model}` for this key; choose another with --model"
            ) from refusal
        # a server without a list of models may still batch
    except ChannelError as error:
        logger.info("the look at %s failed, going on: %s", job.base_url, error)


def _names_model(refusal: RefusedError, model: str) -> bool:
    return model.encode() in refusal.body


def _run_index(engine: Engine, job: IndexJob, settings: Settings, *, emulate: bool, as_json: bool) -> IndexResult:
    progress = Progress()
    stop = threading.Event()
    display = Display(engine, progress, settings, emulate=emulate, quiet=as_json)
    painter = threading.Thread(target=display.run, args=(stop,), name="presort-display", daemon=True)
    painter.start()
    try:
        return index(engine, job, progress)
    except KeyboardInterrupt:
        stop.set()
        painter.join()
        runtime.close()
        _errors.print("stopped; what was submitted goes on. Run the same command again to resume, `presort jobs` to look.")
        raise typer.Exit(130) from None
    finally:
        stop.set()
        painter.join()


def _compare(engine: Engine, bill: dict[str, Any]) -> dict[str, Any]:
    """Hold the ledger against the emulated vendors' own invoice; both cover everything ever emulated here."""
    ledger = make_receipt(engine.totals())
    paid = usd_text(ledger.paid_usd) or "unknown"
    total = str(bill["total_usd"])
    return {
        "invoice_usd": total,
        "ledger_usd": paid,
        "text": f"EMULATED vendors' own invoice, all runs so far: ${total}; presort's ledger of the same: ${paid}",
    }


def _result_json(result: IndexResult, job: IndexJob, bill: dict[str, Any] | None, *, emulate: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "emulated": emulate,
        "output": str(result.output),
        "provider": job.provider.name,
        "model": job.model,
        "documents": result.documents,
        "succeeded": result.succeeded,
        "failed": result.failed,
        "routes": dict(result.routes),
        "failures": dict(result.reasons.most_common()),
        "receipt": result.receipt.as_json() if result.receipt is not None else None,
    }
    if bill is not None:
        answer |= {"invoice_usd": bill["invoice_usd"], "ledger_usd": bill["ledger_usd"]}
    return answer


def _next_steps(console: Console, job: IndexJob, paths: list[Path]) -> None:
    shown = " ".join(str(path) for path in paths)
    table = Table.grid(padding=(0, 3))
    table.add_row(f"head -n 1 {escape(str(job.output))}", "look at a record")
    table.add_row("presort jobs --emulate --all", "look at the batches it took")
    table.add_row(f"{job.provider.key_variable}=… presort index {escape(shown)}", "the same for real")
    console.print("\nNext:")
    console.print(table)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what can go wrong into one line and an exit status."""
    try:
        yield
    except MissingKeyError as error:
        _fail(str(error), 2)
    except PresortError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.strerror or error}{f': `{error.filename}`' if error.filename else ''}", 1)


def _fail(message: str, status: int) -> NoReturn:
    _errors.print(f"presort: {escape(message)}")
    closing: Callable[[], None] = runtime.close
    closing()
    raise typer.Exit(status)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _origin(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


__all__ = ["Provider", "app"]
