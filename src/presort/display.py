"""What the commands show: progress, results, a receipt, jobs. Plain lines, so that a pipe gets them as well."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from presort.engine import Engine
from presort.errors import PresortError
from presort.indexing.index import IndexResult
from presort.indexing.index import Progress as Work
from presort.job import JobState
from presort.monitoring.receipt import Receipt, usd_text
from presort.request import Usage
from presort.store.base import JobView, QueueView, Spend
from presort.telemetry import logger

_PAINT_SECONDS = 0.25
_LOOK_SECONDS = 1.0
_LINE_SECONDS = 10.0
_LEAVE_SECONDS = 2.0
_MOST_REASONS = 5

_AT_VENDOR = frozenset({JobState.SUBMITTED, JobState.COLLECTING})
_STUCK = frozenset({JobState.NEEDS_KEY, JobState.SUBMITTING, JobState.PENDING})


class Display:
    """Shows how far an index run is, on stderr: a live bar on a terminal, a line now and then elsewhere.

    Warnings of presort's logger appear between, one line each. Used as a context manager.
    """

    def __init__(self, engine: Engine, work: Work, *, emulate: bool, quiet: bool) -> None:
        self._engine = engine
        self._work = work
        self._label = "EMULATED " if emulate else ""
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presort-display", daemon=True)
        self._warnings = _Warnings(self)
        self._looked_at = 0.0
        self._status = "reading"

    def __enter__(self) -> Self:
        logger.addHandler(self._warnings)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(_LEAVE_SECONDS)  # a store that hangs must not hold up who wants to go
        logger.removeHandler(self._warnings)

    def say(self, line: str) -> None:
        """Print a line of markup above the bar."""
        self._console.print(line, soft_wrap=True)

    def _run(self) -> None:
        if self._console.is_terminal:
            self._live()
        elif not self._quiet:
            self._lines()

    def _live(self) -> None:
        bar = Progress(
            TextColumn(f"{self._label}[bold]index[/bold]"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            expand=True,
        )
        task = bar.add_task("index", total=self._work.total)
        with Live(console=self._console, auto_refresh=False) as live:
            while True:
                last = self._stop.wait(_PAINT_SECONDS)
                self._look(at_once=last)
                bar.update(task, total=self._work.total, completed=self._work.settled)
                live.update(Group(bar, Text.from_markup(self._status)), refresh=True)
                if last:
                    return

    def _lines(self) -> None:
        started = time.monotonic()
        while not self._stop.wait(_LINE_SECONDS):
            self._look(at_once=True)
            total = "?" if self._work.total is None else self._work.total
            seconds = time.monotonic() - started
            status = " ".join(self._status.split("\n"))
            self.say(f"{self._label}{self._work.settled}/{total}  {status}  {duration(seconds)}")

    def _look(self, *, at_once: bool) -> None:
        """Read anew how things stand, unless that was a moment ago."""
        now = time.monotonic()
        if at_once or now >= self._looked_at + _LOOK_SECONDS:
            self._looked_at = now
            self._status = _status(self._engine, self._work)


class _Warnings(logging.Handler):
    """Prints presort's warnings where they do not break the bar."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        self._display.say(f"[yellow]warning:[/yellow] {escape(text)}")


def _status(engine: Engine, work: Work) -> str:
    """Say in a line of markup how things stand."""
    stream = work.stream
    if stream is None:
        return "reading"
    try:
        jobs, _queues = engine.jobs()
    except PresortError:
        jobs = []
    failed = stream.failed + work.rejected
    waiting = max(0, stream.admitted - stream.settled)
    batches = [view for view in jobs if view.job.state in _AT_VENDOR]
    submitted = min(waiting, sum(view.job.count - view.settled for view in batches))
    parts = [
        f"accumulating {waiting - submitted}",
        f"submitted {submitted}",
        f"done {work.settled - failed}",
        f"[red]failed {failed}[/red]" if failed else "failed 0",
    ]
    if stream.attached:
        parts.append(f"resumed {stream.attached}")
    if submitted:
        seconds = max(0.0, min(view.job.due_at for view in batches) - time.time())
        look = f", next look in {duration(seconds)}" if seconds >= 1 else ""
        parts.append(f"{len(batches)} {_plural('batch', len(batches), 'es')}{look}")
    stuck = next((view.job.note for view in jobs if view.job.note and view.job.state in _STUCK), None)
    stuck = stuck or next((view.job.note for view in batches if view.job.note), None)
    if waiting and stuck:
        parts.append(f"\n{escape(stuck)}")
    return "  ".join(parts)


def result_lines(result: IndexResult, vendor: str, *, emulate: bool) -> Iterator[str]:
    """Say in a few lines of markup what became of the documents."""
    who = f"the [bold]EMULATED[/bold] {vendor}" if emulate else vendor
    resumed = f", {result.resumed:,} of them handed in by an earlier run" if result.resumed else ""
    yield f"{_count(result.documents, 'document')} by {who}{resumed} -> {escape(str(result.output))}"
    for reason, count in result.reasons.most_common(_MOST_REASONS):
        yield f"  [red]failed {count:,}[/red]: {escape(reason)}"
    more = len(result.reasons) - _MOST_REASONS
    if more > 0:
        yield f"  and {_count(more, 'more reason')}: see the rows with status `failed`"
    skipped = [f"{count:,} {suffix or 'without suffix'}" for suffix, count in sorted(result.skipped.by_suffix.items())]
    skipped += [f"{result.skipped.hidden:,} hidden"] if result.skipped.hidden else []
    skipped += [f"{result.skipped.links:,} linked folders"] if result.skipped.links else []
    if skipped:
        yield f"  skipped: {escape(', '.join(skipped))}"


@dataclass(frozen=True, slots=True)
class Bill:
    """What the emulated vendors would bill and what presort's ledger says, in USD, of everything emulated so far."""

    invoice_usd: str
    ledger_usd: str
    under_way: bool
    """Whether other work goes on, which the ledger cannot know the price of yet."""


def receipt_lines(result: IndexResult, bill: Bill | None, *, emulate: bool) -> Iterator[str]:
    """Draw the receipt in markup: documents, tokens by class for each model and route, then the money.

    Args:
        result: What became of the documents.
        bill: What the emulated vendors would bill, if this was emulated.
        emulate: Whether all of this was emulated.
    """
    receipt = result.receipt
    if receipt is None:
        return
    rows: list[tuple[str, str] | None] = [("documents", f"{result.documents:,}")]
    rows += [(f"  by the {route} route", f"{count:,}") for route, count in sorted(result.routes.items())]
    rows.append(("  failed", f"{result.failed:,}"))
    for line in receipt.lines:
        note = "" if line.spend == Spend.PAID else f", {line.spend.replace('_', ' ')}"
        rows += [None, (f"{line.model}, {line.route}{note}", _count(line.requests, "request"))]
        rows += [(f"  {name}", f"{count:,} tokens") for name, count in _classes(line.usage)]
        if len(receipt.lines) > 1:
            rows.append(("  list price", dollars(None if line.unknown else line.baseline_usd)))
            rows.append(("  paid", dollars(None if line.unknown else line.actual_usd)))
    rows += [None, *_money(receipt)]
    if bill is not None:
        rows += [None, ("EMULATED invoice, all runs so far", f"${bill.invoice_usd}")]
        rows.append(("presort's ledger of the same", f"${bill.ledger_usd}"))
    left = max(len(row[0]) for row in rows if row)
    right = max(len(row[1]) for row in rows if row)
    rule = "─" * (left + 2 + right)
    yield "[bold]EMULATED receipt[/bold]: no money was spent" if emulate else "[bold]Receipt[/bold]"
    yield rule
    for row in rows:
        text = "" if row is None else escape(f"{row[0]:<{left}}  {row[1]:>{right}}")
        yield f"[bold green]{text}[/bold green]" if row and row[0] == "saved" else text
    yield rule
    if bill is not None and bill.invoice_usd != bill.ledger_usd:
        yield (
            "The two differ: other work is under way."
            if bill.under_way
            else "[red]The two differ: that is a bug.[/red]"
        )


def _money(receipt: Receipt) -> Iterator[tuple[str, str]]:
    percent = receipt.saved_percent
    yield "list price", dollars(receipt.baseline_usd)
    yield "paid", dollars(receipt.paid_usd)
    if receipt.wasted_usd:
        yield "  of it wasted", dollars(receipt.wasted_usd)
    yield "saved", dollars(receipt.saved_usd) + (f" ({percent:.1f}%)" if percent is not None else "")
    yield "in doubt", _count(receipt.in_doubt, "call")
    yield "price unknown", _count(receipt.unknown, "answer")


def _classes(usage: Usage) -> Iterator[tuple[str, int]]:
    writes = usage.cache_write_tokens + usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
    yield "input", usage.input_tokens
    yield "cache write", writes
    yield "cache read", usage.cache_read_tokens
    yield "output", usage.output_tokens


def job_lines(jobs: Sequence[JobView], queues: Sequence[QueueView], now: float) -> Iterator[str]:
    """Show in markup the jobs, two or three lines each, and what is queued without one."""
    for queue in queues:
        state = "accumulating" if queue.route == "batch" else "waiting for the standard route"
        yield (
            f"[bold]{state}[/bold]  {queue.key.provider}  {escape(queue.key.model)}  "
            f"{_count(queue.count, 'request')}, the oldest for {duration(now - queue.oldest_at)}"
        )
    for view in jobs:
        job = view.job
        done = job.state is JobState.COMPLETED
        requests = _count(job.count, "request") if done else f"{view.settled:,} of {job.count:,} settled"
        colour = "green" if done else "yellow" if job.state in _STUCK else "cyan"
        yield (
            f"[bold]{job.id[-8:]}[/bold]  [{colour}]{job.state.value:<10}[/{colour}]  {view.key.provider}  "
            f"{escape(view.key.model)}  {requests}"
        )
        facts = [f"batch {escape(job.batch_id)}" if job.batch_id else "no batch yet"]
        facts.append(f"formed {duration(now - job.created_at)} ago")
        if not done:
            left = job.deadline - now
            facts.append(f"deadline in {duration(left)}" if left > 0 else f"deadline {duration(-left)} ago")
            if job.due_at > now:
                facts.append(f"next look in {duration(job.due_at - now)}")
            if view.leader:
                host, _, pid = view.leader.rpartition(":")
                facts.append(f"worked on by process {pid} on {escape(host.partition('/')[0])}")
        yield f"          {', '.join(facts)}"
        if job.note and not done:
            yield f"          [yellow]{escape(job.note)}[/yellow]"


def dollars(value: Decimal | None) -> str:
    """Write an amount for people: cents where that says it, more digits where it is small."""
    if value is None:
        return "unknown"
    exact = usd_text(abs(value)) or ""
    digits = 2 if abs(value) >= 1 or not value else min(6, max(2, len(exact.partition(".")[2])))
    return f"{'-' if value < 0 else ''}${abs(value):,.{digits}f}"


def duration(seconds: float) -> str:
    """Write a duration for people, in its two largest units."""
    whole = max(0, round(seconds))
    for size, unit, below in ((86_400, "d", "h"), (3_600, "h", "min"), (60, "min", "s")):
        if whole >= size:
            rest = whole % size // {"h": 3_600, "min": 60, "s": 1}[below]
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {_plural(noun, count)}"


def _plural(noun: str, count: int, ending: str = "s") -> str:
    return noun if count == 1 else noun + ending
