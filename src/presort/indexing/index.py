"""Documents in, records out: one call each through the engine, in a named run that resumes where it was cut off.

If the process dies, everything that was admitted is in the store, and the same call again attaches to it: the run is
named after its input and output. The run is finished only once the records lie on the disk.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from presort.engine import Engine, Link, Stream
from presort.indexing.documents import Document, Rejected, Skipped, count_documents, read_documents
from presort.indexing.extraction import DEFAULT_CONTEXT_TOKENS, DEPARTMENTS, TooLargeError, prompt
from presort.indexing.records import Record, RecordWriter, record_from_outcome
from presort.monitoring.receipt import Receipt, make_receipt
from presort.providers.base import Provider
from presort.request import BatchKey, Outcome, Payload

MAX_REASONS = 100
"""Reasons of failures that are counted apart."""

OTHER_REASONS = "other reasons; see the rows with status `failed`"


@dataclass(frozen=True, slots=True)
class IndexJob:
    """What is to be indexed, by whom, into what."""

    paths: Sequence[Path]
    output: Path
    provider: Provider
    model: str
    base_url: str
    key: str = field(repr=False)
    departments: Sequence[str] = DEPARTMENTS
    context_tokens: int = DEFAULT_CONTEXT_TOKENS

    @property
    def run(self) -> str:
        """The name of the run: the same input and output resume each other."""
        parts = [*(str(path.resolve()) for path in self.paths), "->", str(self.output.resolve())]
        return (
            "index:" + hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
        )


@dataclass(slots=True)
class IndexResult:
    """What became of the documents."""

    output: Path
    documents: int = 0
    succeeded: int = 0
    failed: int = 0
    resumed: int = 0
    """Documents that an earlier, cut-off run of the same name had handed in."""
    routes: Counter[str] = field(default_factory=Counter)
    """Answers by the route they came by."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Failures by reason; past `MAX_REASONS` different ones under `OTHER_REASONS`."""
    skipped: Skipped = field(default_factory=Skipped)
    receipt: Receipt | None = None

    def count(self, record: Record) -> None:
        """Count a record that was written."""
        self.documents += 1
        if record.reason is None:
            self.succeeded += 1
            if record.route is not None:
                self.routes[record.route.value] += 1
            return
        self.failed += 1
        known = record.reason in self.reasons or len(self.reasons) < MAX_REASONS
        self.reasons[record.reason if known else OTHER_REASONS] += 1


@dataclass(slots=True)
class Progress:
    """What a progress display can look at while `index` runs."""

    total: int | None = None
    rejected: int = 0
    stream: Stream | None = None

    @property
    def settled(self) -> int:
        """Documents whose record is decided."""
        return self.rejected + (0 if self.stream is None else self.stream.settled)

    def fail(self, error: BaseException) -> None:
        """End the run with an error, from another thread."""
        if self.stream is not None:
            self.stream.fail(error)


def index(engine: Engine, job: IndexJob, progress: Progress | None = None) -> IndexResult:
    """Extract one record from each document and write them in input order.

    Raises:
        InputError: Input or output cannot be used at all and nothing was sent, or the output's disk is full.
        PresortError: The engine or the store failed; what was admitted is kept, the same call resumes.
    """
    progress = progress or Progress()
    result = IndexResult(job.output)
    with RecordWriter(job.output) as writer:
        exclude = [job.output, writer.path, writer.partial]
        progress.total = count_documents(job.paths, exclude=exclude)
        documents = read_documents(job.paths, exclude=exclude, skipped=result.skipped)
        source = _Source(engine, job, documents, progress)

        def write(record: Record) -> None:
            writer.write(record)
            result.count(record)

        progress.stream = engine.stream(source, run=job.run, link=Link(job.key))
        for _position, outcome in progress.stream:
            for entry in source.until_asked():
                write(entry)
            write(source.answered(outcome))
        for entry in source.until_asked():
            write(entry)
        writer.finish()
    result.resumed = progress.stream.attached
    result.receipt = make_receipt(engine.run_totals(job.run))
    engine.finish_run(job.run)
    return result


@dataclass(frozen=True, slots=True)
class _Asked:
    id: str
    source: str


class _Source:
    """Turns documents into payloads, and remembers in order what it asked and what it could not ask."""

    def __init__(
        self, engine: Engine, job: IndexJob, documents: Iterator[Document | Rejected], progress: Progress
    ) -> None:
        self._job = job
        self._documents = documents
        self._progress = progress
        self._entries: deque[_Asked | Record] = deque()
        self._account = engine.account(job.key)

    def __iter__(self) -> Iterator[Payload]:
        job = self._job
        for document in self._documents:
            if isinstance(document, Rejected):
                self._reject(document, document.reason)
                continue
            try:
                question = prompt(document, job.departments, context_tokens=job.context_tokens)
            except TooLargeError as error:
                self._reject(document, str(error))
                continue
            endpoint, body, headers = job.provider.compose(job.model, question)
            key = BatchKey(job.provider.name, job.base_url, self._account, endpoint, job.model, headers)
            self._entries.append(_Asked(document.id, document.source))
            yield Payload(key, body)

    def until_asked(self) -> Iterator[Record]:
        """Take the records of documents that could not be asked about, up to the next that was."""
        while self._entries and isinstance(entry := self._entries[0], Record):
            self._entries.popleft()
            yield entry

    def answered(self, outcome: Outcome) -> Record:
        """Take the record of the next document that was asked about."""
        job = self._job
        asked = self._entries.popleft()
        assert isinstance(asked, _Asked)  # noqa: S101 - `until_asked` was drawn dry before
        return record_from_outcome(asked.id, asked.source, job.provider, outcome, job.departments)

    def _reject(self, document: Document | Rejected, reason: str) -> None:
        self._progress.rejected += 1
        self._entries.append(Record(id=document.id, source=document.source, reason=reason))
