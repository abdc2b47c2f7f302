"""The commands and their options; `presort.cli` starts them.

What takes long to import is imported where it is used, so that help and plain mistakes are answered at once.
"""

from __future__ import annotations

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from presort import __version__
from presort.command_line import FAILED, NOTHING_DONE, configure, fail, one_line_errors, print_json, store_file
from presort.index_command import Options, index_command
from presort.providers import provider, providers

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
def _index(
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
    options = Options(
        paths=paths,
        output=output,
        provider=provider(provider_name.value),
        model=model,
        base_url=base_url,
        context_tokens=context_tokens,
        batch_size=batch_size,
        deadline_seconds=deadline,
        emulate=emulate,
        as_json=as_json,
    )
    if not index_command(options):
        raise typer.Exit(FAILED)


@app.command("jobs", help=_JOBS_HELP)
def _jobs(
    all_jobs: Annotated[
        bool, typer.Option("--all", "-a", help="Show completed jobs of the last 30 days too.", **_FLAG)
    ] = False,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Show the EMULATED work instead of the real.", **_FLAG)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", **_FLAG)] = False,
) -> None:
    """Show jobs; the help text stands above."""
    with one_line_errors():
        from presort import runtime
        from presort.store import Store

        settings = configure(None, None, emulate=emulate)
        url = runtime.store_url(settings.store)
        now = time.time()
        file = store_file(url)
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
        print_json(_jobs_json(location, jobs, queues, emulate=emulate))
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
def _emulator(
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
        fail('the emulator needs an extra: pip install "presort[emulator]"', NOTHING_DONE)
    raise typer.Exit(serve(port=port, state=state, batch_seconds=batch_seconds, idle_exit_seconds=idle_exit_seconds))


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
