"""What the commands show: progress, tables, a receipt."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from presort.config import Settings
from presort.engine import Engine
from presort.errors import PresortError
from presort.indexing.index import IndexResult
from presort.indexing.index import Progress as Work
from presort.job import JobState
from presort.monitoring.receipt import Receipt
from presort.request import Usage
from presort.store.base import JobView, QueueView, Spend

_REFRESH_SECONDS = 0.5
_LINE_SECONDS = 10.0


class Display:
    """Shows how far an index run is, on stderr: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, engine: Engine, work: Work, settings: Settings, *, emulate: bool, quiet: bool) -> None:
        self._engine = engine
        self._work = work
        self._settings = settings
        self._emulate = emulate
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)

    def run(self, stop: threading.Event) -> None:
        """Show until told to stop."""
        if self._quiet:
            return
        if self._console.is_terminal:
            self._live(stop)
        else:
            self._lines(stop)

    def _live(self, stop: threading.Event) -> None:
        label = "EMULATED " if self._emulate else ""
        bar = Progress(
            TextColumn(f"{label}[bold]index[/bold]"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        task = bar.add_task("index", total=self._work.total, status="")
        with Live(bar, console=self._console, transient=False, refresh_per_second=4):
            while True:
                last = stop.wait(_REFRESH_SECONDS)
                done, status = self._status()
                bar.update(task, total=self._work.total, completed=done, status=status)
                if last:
                    return

    def _lines(self, stop: threading.Event) -> None:
        started = time.monotonic()
        while not stop.wait(_LINE_SECONDS):
            done, status = self._status()
            total = "?" if self._work.total is None else self._work.total
            self._console.print(f"{done}/{total} {status} {time.monotonic() - started:.0f} s", soft_wrap=True)

    def _status(self) -> tuple[int, str]:
        stream = self._work.stream
        if stream is None:
            return 0, "reading"
        done = stream.settled + self._work.rejected
        failed = stream.failed + self._work.rejected
        try:
            jobs, _queues = self._engine.jobs()
        except PresortError:
            return done, ""
        sent = {JobState.SUBMITTED, JobState.COLLECTING}
        submitted = sum(view.job.count - view.settled for view in jobs if view.job.state in sent)
        waiting = [view.job for view in jobs if view.job.state in {JobState.NEEDS_KEY, JobState.SUBMITTING}]
        open_requests = max(0, stream.admitted - stream.settled)
        submitted = min(submitted, open_requests)
        parts = [f"accumulating {open_requests - submitted}", f"submitted {submitted}", f"done {done - failed}"]
        parts.append(f"[red]failed {failed}[/red]" if failed else "failed 0")
        parts += [escape(job.note) for job in waiting if job.note][:1]
        return done, "  ".join(parts)


def result_lines(result: IndexResult, *, emulate: bool) -> Iterator[str]:
    """Say in a few lines what became of the documents."""
    emulated = " (EMULATED answers)" if emulate else ""
    routes = ", ".join(f"{count} by {route}" for route, count in sorted(result.routes.items()) if count)
    yield (
        f"{result.documents} documents: {result.succeeded} succeeded{f' ({routes})' if routes else ''}, "
        f"{result.failed} failed -> {escape(str(result.output))}{emulated}"
    )
    for reason, count in result.reasons.most_common(5):
        yield f"  failed {count}: {escape(reason)}"
    more = len(result.reasons) - 5
    if more > 0:
        yield f"  and {more} more reasons; see the rows with status `failed`"
    if result.skipped.total:
        kinds = ", ".join(
            f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(result.skipped.by_suffix.items())
        )
        others = [f"{result.skipped.hidden} hidden"] if result.skipped.hidden else []
        others += [f"{result.skipped.links} linked folders"] if result.skipped.links else []
        yield f"  skipped: {escape(', '.join(filter(None, [kinds, *others])))}"


def receipt_table(receipt: Receipt, *, emulate: bool) -> Table:
    """Draw the receipt: tokens by class for each model and route, then the money."""
    table = Table(
        title="Receipt, EMULATED: no money was spent" if emulate else "Receipt",
        title_justify="left",
        show_header=False,
        box=box.SIMPLE_HEAD,
    )
    table.add_column()
    table.add_column(justify="right")
    for line in receipt.lines:
        note = "" if line.spend == Spend.PAID else f", {line.spend.replace('_', ' ')}"
        table.add_row(f"[bold]{escape(line.model)}[/bold], {line.route}{note}", f"{line.requests:,} requests")
        for name, count in _classes(line.usage):
            table.add_row(f"  {name}", f"{count:,} tokens")
        table.add_row("  list price", dollars(None if line.unknown else line.baseline_usd))
        table.add_row("  paid", dollars(None if line.unknown else line.actual_usd))
        table.add_section()
    percent = receipt.saved_percent
    saved = dollars(receipt.saved_usd) + (f" ({percent:.1f}%)" if percent is not None else "")
    table.add_row("list price", dollars(receipt.baseline_usd))
    table.add_row("paid", dollars(receipt.paid_usd))
    table.add_row("[bold]saved[/bold]", f"[bold green]{saved}[/bold green]")
    table.add_row("in doubt", f"{receipt.in_doubt:,} calls")
    table.add_row("price unknown", f"{receipt.unknown:,} answers")
    return table


def _classes(usage: Usage) -> Iterator[tuple[str, int]]:
    writes = usage.cache_write_tokens + usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
    yield "input", usage.input_tokens
    yield "cache write", writes
    yield "cache read", usage.cache_read_tokens
    yield "output", usage.output_tokens


def job_table(jobs: Sequence[JobView], queues: Sequence[QueueView], now: float) -> Table:
    """Draw the jobs and what is queued without one."""
    table = Table()
    for name in ("job", "state", "provider", "model"):
        table.add_column(name)
    table.add_column("settled", justify="right")
    for name in ("batch", "deadline", "leader", "note"):
        table.add_column(name)
    for queue in queues:
        state = "accumulating" if queue.route == "batch" else "waiting for the standard route"
        age = f"oldest {now - queue.oldest_at:.0f} s"
        table.add_row("", state, queue.key.provider, escape(queue.key.model), f"0/{queue.count}", "", "", "", age)
    for view in jobs:
        job = view.job
        table.add_row(
            job.id[-8:],
            job.state.value,
            view.key.provider,
            escape(view.key.model),
            f"{view.settled}/{job.count}",
            escape(job.batch_id or ""),
            _when(job.deadline),
            escape(view.leader or ""),
            escape(job.note or ""),
        )
    return table


def dollars(value: Decimal | None) -> str:
    """Write an amount for people: cents where that says it, more digits where it is small."""
    if value is None:
        return "unknown"
    digits = 2 if abs(value) >= 1 or value == 0 else 6
    return f"${value:,.{digits}f}"


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%MZ")
