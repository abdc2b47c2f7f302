"""Documents in, records out: one call each through the engine, in a named run that resumes where it was cut off.

If the process dies, everything that was admitted is in the store, and the same call again attaches to it: the run is
named after its input and output. The run is finished only once the records lie on the disk.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from presort.engine import Engine, Link, Stream
from presort.errors import InputError, MissingKeyError, PresortError
from presort.indexing.documents import Rejected, Skipped, count_documents, read_documents
from presort.indexing.extraction import DEFAULT_CONTEXT_TOKENS, DEPARTMENTS, TooLargeError, prompt
from presort.indexing.records import Record, RecordWriter, record_from_outcome
from presort.monitoring.receipt import Receipt, make_receipt
from presort.providers.base import Provider
from presort.request import BatchKey, Outcome, Payload


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
        return "index:" + hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


@dataclass(slots=True)
class IndexResult:
    """What became of the documents."""

    output: Path
    documents: int = 0
    succeeded: int = 0
    failed: int = 0
    routes: Counter[str] = field(default_factory=Counter)
    """Answers by the route they came by."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Failures by reason."""
    skipped: Skipped = field(default_factory=Skipped)
    receipt: Receipt | None = None


@dataclass(slots=True)
class Progress:
    """What a progress display can look at while `index` runs."""

    total: int | None = None
    rejected: int = 0
    stream: Stream | None = None


def index(engine: Engine, job: IndexJob, progress: Progress | None = None) -> IndexResult:
    """Extract one record from each document and write them in input order.

    Raises:
        InputError: Input or output cannot be used at all; nothing was sent.
        PresortError: The engine or the store failed; what was admitted is kept, the same call resumes.
    """
    progress = progress or Progress()
    result = IndexResult(job.output)
    exclude = [job.output, job.output.with_name(job.output.name + ".partial")]
    progress.total = count_documents(job.paths, exclude=exclude)
    documents = read_documents(job.paths, exclude=exclude, skipped=result.skipped)
    source = _Source(engine, job, documents, progress)
    with RecordWriter(job.output) as writer:

        def write(record: Record) -> None:
            writer.write(record)
            result.documents += 1
            if record.status == "succeeded":
                result.succeeded += 1
            else:
                result.failed += 1
                result.reasons[record.reason or "unknown"] += 1

        progress.stream = engine.stream(source, run=job.run, link=Link(job.key))
        for _position, outcome in progress.stream:
            for entry in source.until_asked():
                write(entry)
            write(source.answered(outcome))
            result.routes[outcome.route.value] += outcome.succeeded
        for entry in source.until_asked():
            write(entry)
        writer.finish()
    result.receipt = make_receipt(engine.run_totals(job.run))
    engine.finish_run(job.run)
    return result


def find_key(provider: Provider, environment: Callable[[str], str | None]) -> str:
    """Return the provider's key from its usual variable.

    Raises:
        MissingKeyError: It is not set.
    """
    key = environment(provider.key_variable)
    if not key:
        raise MissingKeyError(
            f"no API key: set {provider.key_variable}, or add --emulate to try it without a key and without cost"
        )
    return key


@dataclass(frozen=True, slots=True)
class _Asked:
    id: str
    source: str


class _Source:
    """Turns documents into payloads, and remembers in order what it asked and what it could not ask."""

    def __init__(
        self, engine: Engine, job: IndexJob, documents: Iterator[object], progress: Progress
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
                self._reject(document.id, document.source, document.reason)
                continue
            try:
                question = prompt(document, job.departments, context_tokens=job.context_tokens)  # type: ignore[arg-type]
            except TooLargeError as error:
                self._reject(document.id, document.source, str(error))  # type: ignore[attr-defined]
                continue
            endpoint, body, headers = job.provider.compose(job.model, question)
            key = BatchKey(job.provider.name, job.base_url, self._account, endpoint, job.model, headers)
            self._entries.append(_Asked(document.id, document.source))  # type: ignore[attr-defined]
            yield Payload(key, body)

    def until_asked(self) -> Iterator[Record]:
        """Take the records of documents that could not be asked about, up to the next that was."""
        while self._entries and isinstance(self._entries[0], Record):
            record = self._entries.popleft()
            assert isinstance(record, Record)  # noqa: S101 - for the type checker
            yield record

    def answered(self, outcome: Outcome) -> Record:
        """Take the record of the next document that was asked about."""
        job = self._job
        asked = self._entries.popleft()
        assert isinstance(asked, _Asked)  # noqa: S101 - `until_asked` was drawn dry before
        return record_from_outcome(asked.id, asked.source, job.provider, outcome, job.departments)

    def _reject(self, document_id: str, source: str, reason: str) -> None:
        self._progress.rejected += 1
        self._entries.append(Record(id=document_id, source=source, reason=reason))


__all__ = ["IndexJob", "IndexResult", "InputError", "PresortError", "Progress", "find_key", "index"]
