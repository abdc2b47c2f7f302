"""Records out: one row of JSON per document, in a file that is there as a whole or not at all.

Rows go to `<name>.partial` beside the output. `finish` makes them durable and renames the file over the
output in one step, so whoever reads the output never sees half of a run, and an earlier result stays until
the new one is complete.

What happens if the process dies: anywhere before the rename, the output is what it was and the partial file
is left; the next writer empties it. After the rename the output is complete; only the rename itself may be
undone by a power cut, until the folder is synchronised.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

from presort.errors import InputError
from presort.indexing.extraction import DEPARTMENTS, MAX_ANSWER_TOKENS, Classification, parse
from presort.request import Outcome, OutcomeKind, Route, Usage

if sys.platform != "win32":
    import fcntl

MAX_REASON_CHARS = 500
"""A vendor's error message is cut here."""


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one document: a classification, or the reason why there is none.

    Raises:
        ValueError: Both of them are given, or neither.
    """

    id: str
    source: str
    classification: Classification | None = None
    reason: str | None = None
    """One line in plain words."""
    route: Route | None = None
    """How the document was served; `None` if it was never sent."""
    batch_id: str | None = None
    usage: Usage | None = None

    def __post_init__(self) -> None:
        if (self.classification is None) == (self.reason is None):
            raise ValueError(f"the record of `{self.id}` needs either a classification or a reason")

    @property
    def status(self) -> str:
        """`succeeded` or `failed`."""
        return "failed" if self.classification is None else "succeeded"

    def line(self) -> bytes:
        r"""Write the record as one line of UTF-8 JSON with its `\n`; equal records give equal bytes."""
        row: dict[str, Any] = {"id": self.id, "source": self.source, "status": self.status}
        if self.classification is not None:
            row["classification"] = self.classification.model_dump()
        optional = {"reason": self.reason, "route": self.route, "batch_id": self.batch_id}
        row |= {name: value for name, value in optional.items() if value is not None}
        if self.usage is not None:
            row["usage"] = asdict(self.usage)
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        # A message may hold half a surrogate pair: that becomes JSON's own escape for it.
        return text.encode("utf-8", "backslashreplace") + b"\n"


class RecordWriter:
    """Writes records to a file that replaces the output when all of them are in it.

    Used as a context manager it finishes at the end of the block, or aborts if the block raised. One writer
    per output at a time.

    Example:
        ```python
        with RecordWriter(Path("records.jsonl")) as writer:
            for record in records:
                writer.write(record)
        ```

    Attributes:
        path: The output, with links followed.
        partial: Where the rows are until then.
        count: Rows written so far.

    Raises:
        InputError: The output is a folder or a device, its folder is missing or cannot be written to, or
            another process is writing it. Nothing was changed then.
    """

    def __init__(self, path: Path) -> None:
        self.path = check_output(path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.count = 0
        self._file: BinaryIO | None = _open(self.partial)
        with contextlib.suppress(OSError):  # the output need not exist, nor let its rights be copied
            self.partial.chmod(stat.S_IMODE(self.path.stat().st_mode))

    def write(self, record: Record) -> None:
        """Append one row; the caller sees to the order.

        Raises:
            InputError: It cannot be written, as on a full disk. Abort then: the last row may be cut.
        """
        file = self._opened()
        with _named_errors(self.partial):
            file.write(record.line())
        self.count += 1

    def finish(self) -> None:
        """Make all rows durable and put them in the place of the output. Finishing twice does nothing more.

        Raises:
            InputError: They cannot be written, as on a full disk; the output is unchanged and the partial
                file left.
        """
        if self._file is None:
            return
        with _named_errors(self.partial):
            self._file.flush()
            os.fsync(self._file.fileno())
            # Windows renames no open file. Elsewhere closing gives up the lock, so it comes last.
            if sys.platform == "win32":
                self._file.close()
            self.partial.replace(self.path)
        self._close()
        _synchronise(self.path.parent)

    def abort(self) -> None:
        """Stop without touching the output.

        The partial file stays, as it would after a crash, so that its rows can be looked at; without rows it
        goes.
        """
        if self._file is None:
            return
        empty = self.count == 0
        if empty:
            self._remove()
        self._close()
        if empty and sys.platform == "win32":  # It removes no open file.
            self._remove()

    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise ValueError(f"the writer of `{self.path}` is closed")
        return self._file

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self.partial.unlink()

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # after a full disk it tries the same bytes again
                self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.finish()
        except BaseException:
            self.abort()
            raise


class TextReader(Protocol):
    """The one verb of a provider that is needed to read an answer."""

    def read_text(self, body: bytes) -> str:
        """Return the text of an answer; raises `ValueError` with the reason if there is none."""
        ...


def record_from_outcome(
    document_id: str,
    source: str,
    provider: TextReader,
    outcome: Outcome,
    departments: Sequence[str] = DEPARTMENTS,
) -> Record:
    """Turn the outcome of a document's request into its record, whatever the outcome is."""
    classification, reason = None, None
    if outcome.succeeded:
        try:
            classification = parse(provider.read_text(outcome.body), departments)
        except ValueError as error:
            reason = _one_line(f"the answer cannot be used: {error}{_limit_hint(outcome.usage)}")
    else:
        reason = _failure(outcome)
    return Record(document_id, source, classification, reason, outcome.route, outcome.batch_id, outcome.usage)


def _failure(outcome: Outcome) -> str:
    """Say why there is no answer: what happened, the status, the vendor's message, presort's word for it."""
    message = _message(outcome.body)
    what = {
        OutcomeKind.EXPIRED: "not answered in time, ",
        OutcomeKind.CANCELLED: "withdrawn before it was answered, ",
    }.get(outcome.kind, "")
    text = f"{what}HTTP {outcome.status}" + (f": {message}" if message else "")
    known = outcome.reason is None or outcome.reason.casefold() in text.casefold()
    return _one_line(text if known else f"{text} ({outcome.reason})")


def _message(body: bytes) -> str:
    """Find the message in a vendor's error, which all of them call `message` or put in `error` itself."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")
    inner = value
    while isinstance(inner, dict):
        message = inner.get("message")
        if isinstance(message, str) and message:
            return message
        inner = inner.get("error")
    return inner if isinstance(inner, str) else ""


def _limit_hint(usage: Usage | None) -> str:
    """Add what a cut answer does not say itself."""
    if usage is None or usage.output_tokens < MAX_ANSWER_TOKENS:
        return ""
    return f" (it reached the limit of {MAX_ANSWER_TOKENS:,} output tokens)"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON_CHARS else f"{line[: MAX_REASON_CHARS - 3]}..."


# The file -----------------------------------------------------------------------------------------------


def check_output(path: Path) -> Path:
    """Return where the output really lies, links followed; raises `InputError` if a file cannot be put there."""
    problem = None
    with _named_errors(path):
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            problem = f"the folder `{target.parent}` does not exist; make it first"
        elif target.is_dir():
            problem = f"it is a folder; name a file, such as `{path / 'records.jsonl'}`"
        elif target.exists() and not target.is_file():
            problem = "it is not a regular file, and would be replaced by one"
        elif target.exists() and not os.access(target, os.W_OK):
            problem = "it is read-only; name another output"
    if problem is not None:
        raise InputError(f"cannot write `{path}`: {problem}")
    return target


def _open(partial: Path) -> BinaryIO:
    """Open the partial file, empty and locked; raises `InputError` if that cannot be had."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    with _named_errors(partial):
        file = os.fdopen(os.open(partial, flags, 0o666), "wb")
        try:
            _lock(file, partial)
            file.truncate(0)
        except BaseException:
            file.close()
            raise
    return file


def _lock(file: BinaryIO, partial: Path) -> None:
    """Take the partial file for this process alone, where the system can, until it is closed."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking, its writer may have finished: then this is the output by another name.
        ours = os.path.samestat(os.fstat(file.fileno()), partial.stat())
    except (BlockingIOError, FileNotFoundError):
        ours = False
    except OSError:  # a file system without locks
        return
    if not ours:
        raise InputError(f"another process is writing `{partial}`: wait for it, or name another output")


def _synchronise(folder: Path) -> None:
    """Make a rename in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    """Name the file that cannot be written and, where there is one, the way out."""
    if error.errno in {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}:
        return InputError(f"cannot write `{path}`: the disk is full; make room and run the same again")
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return InputError(f"cannot write `{path}`: no permission; choose another folder for the output")
    return InputError(f"cannot write `{path}`: {error.strerror or error}")
