r"""Documents in: folders, single files and JSONL become a stream of texts, each with an id and a source.

Nothing is left out in silence. A file that cannot be used comes out as a `Rejected` in its place in the
order, files of other kinds are counted in a `Skipped`, and only an input that makes the whole run pointless
raises `InputError`, before anything was read.

One text is held at a time. What grows with the input are names: those of one folder while it is sorted, and
the ids seen so far.

The same input gives the same ids and texts on every platform: names are compared in Unicode's composed form
(NFC) with `/` between folders, a byte order mark is dropped, and the line ends of files become `\n`.
"""

# ruff: noqa: PTH100, PTH114, PTH116, PTH118, PTH119, PTH122, PTH123, PTH202
# A million names are handled as plain strings: a `Path` for each costs more than reading the file.

from __future__ import annotations

import json
import os
import stat
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from presort.errors import InputError
from presort.indexing.html import html_to_text

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst"})
HTML_SUFFIXES = frozenset({".html", ".htm"})
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
SUFFIXES = TEXT_SUFFIXES | HTML_SUFFIXES | JSONL_SUFFIXES
"""What a folder is searched for, in lower case; a file's own suffix may be in any case."""

MAX_DOCUMENT_BYTES = 20_000_000
"""Default size limit of one file, or of one JSONL line: far above any model's context, far below memory."""

MAX_COUNTED_BYTES = 1 << 30
"""How much JSONL `count_documents` reads before it gives up."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text to be indexed."""

    id: str
    """Path below the given folder with `/` between its parts, or the JSONL row's own `id`; never twice."""
    text: str = field(repr=False)
    """Never empty or blank."""
    source: str
    """Where it was read: the file's path, and `:` with the line number for a JSONL row."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """Something that should have been a document and cannot be used."""

    id: str
    """As in `Document`, if it is known, else the file's id, and `:` with the line number for a JSONL row."""
    source: str
    reason: str
    """One line in plain words."""


@dataclass(slots=True)
class Skipped:
    """What a folder held beside documents; filled while the reading goes on."""

    by_suffix: dict[str, int] = field(default_factory=dict)
    """Files of other kinds per suffix, in lower case and with its dot; `""` for names without one."""
    hidden: int = 0
    """Files and folders whose name begins with a dot; a folder counts once, whatever it holds."""
    links: int = 0
    """Symbolic links to folders. They are not followed: what they hold would be read, and paid for, twice."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_suffix.values()) + self.hidden + self.links


@dataclass(frozen=True, slots=True)
class _Root:
    """One path as it was given, checked."""

    path: str
    label: str
    """Enough of the path's end to tell it from the other paths."""
    is_folder: bool
    prefix: str
    """Goes before the relative path in the ids of a folder's documents."""

    def source_of(self, document_id: str) -> str:
        """Return where a document of this root lies, from its id."""
        if not self.is_folder:
            return _shown(self.path)
        return _shown(os.path.join(self.path, document_id.removeprefix(self.prefix)))


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file to be read, or a folder that cannot be listed."""

    path: str
    id: str
    root: _Root
    error: str | None = None

    @property
    def suffix(self) -> str:
        return _suffix(self.path)


def read_documents(
    paths: Sequence[Path],
    *,
    exclude: Collection[Path] = (),
    max_bytes: int = MAX_DOCUMENT_BYTES,
    skipped: Skipped | None = None,
) -> Iterator[Document | Rejected]:
    """Read all documents below the given paths, one at a time and always in the same order.

    Folders are searched to any depth for the suffixes in `SUFFIXES` and come sorted by relative path; several
    paths come in the order given, JSONL in the order of its lines. A file that is named itself is read
    whatever its suffix is. Hidden files and folders are skipped; linked files are read, linked folders are
    not.

    Ids are relative paths. If several paths are given, the documents of each folder carry its name in front
    (`reports/2024/a.txt`), whether or not there is a clash: an id never changes because another file came
    along.

    Args:
        paths: Folders and files.
        exclude: Files that are no input though they lie in a folder, such as the run's own output.
        max_bytes: Size limit in bytes of one file, or of one JSONL line. JSONL files have none themselves.
        skipped: Counts what is left out, if given.

    Returns:
        A lazy stream with a `Document`, or a `Rejected` with the reason, for every file and JSONL row.

    Raises:
        InputError: At the call, before anything is read: no path, a missing path, a folder without any
            document, a JSONL file without any row, one path inside another, a path that is excluded.
        MissingExtraError: While reading, at the first HTML file, if `selectolax` is not installed.
    """
    excluded = _excluded(exclude)
    roots = _check(paths, excluded)
    return _read(roots, excluded, max_bytes, Skipped() if skipped is None else skipped)


def count_documents(
    paths: Sequence[Path], *, exclude: Collection[Path] = (), max_bytes: int = MAX_DOCUMENT_BYTES
) -> int | None:
    """Count what `read_documents` yields for the same arguments, rejected ones included.

    Names are listed and the lines of JSONL files are counted; `None` if those are larger than
    `MAX_COUNTED_BYTES` in all, which would take longer than a progress bar is worth.

    Raises:
        InputError: As `read_documents`.
    """
    excluded = _excluded(exclude)
    count = counted_bytes = 0
    for root in _check(paths, excluded):
        for entry in _entries(root, excluded, Skipped()):
            if entry.error is not None or entry.suffix not in JSONL_SUFFIXES:
                count += 1
                continue
            try:
                counted_bytes += os.path.getsize(entry.path)
                if counted_bytes > MAX_COUNTED_BYTES:
                    return None
                with _open(entry.path) as file:
                    count += sum(1 for _ in _lines(file, max_bytes)) or 1
            except (OSError, ValueError):
                count += 1
    return count


def check_documents(paths: Sequence[Path], *, exclude: Collection[Path] = ()) -> None:
    """Raise the `InputError` that `read_documents` would raise at the call, without reading anything."""
    _check(paths, _excluded(exclude))


# Paths --------------------------------------------------------------------------------------------------


def _excluded(exclude: Collection[Path]) -> frozenset[str]:
    """Name the files to leave out, both as they are given and as what they are links to."""
    return frozenset(name for path in exclude for name in (os.path.abspath(path), os.path.realpath(path)))


def _check(paths: Sequence[Path], excluded: frozenset[str]) -> list[_Root]:
    """Look at every path once; raises `InputError` for what `read_documents` promises to refuse at once."""
    if not paths:
        raise InputError("no path was given: name at least one folder or file")
    labels = _labels(paths)
    roots = []
    for path, label in zip(paths, labels, strict=True):
        is_folder = _is_folder(path)
        if os.path.realpath(path) in excluded:
            raise InputError(f"`{_shown(path)}` is the output of this run: leave it out, or write elsewhere")
        prefix = f"{label}/" if is_folder and label and len(paths) > 1 else ""
        roots.append(_Root(os.fspath(path), label, is_folder, prefix))
    _refuse_overlap(roots)
    for root in roots:
        if root.is_folder:
            _refuse_barren(root, excluded)
        elif _suffix(root.path) in JSONL_SUFFIXES:
            _refuse_rowless(root)
    return roots


def _is_folder(path: Path) -> bool:
    """Say whether a path is a folder; raises `InputError` if it is neither folder nor regular file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        problem = "is a link to nothing" if os.path.islink(path) else "does not exist"
        raise InputError(f"`{_shown(path)}` {problem}: check its spelling and the current folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"`{_shown(path)}` cannot be used: {_why(error)}") from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        # It is listed, counted and read in turn, and a pipe can be read only once.
        raise InputError(f"`{_shown(path)}` is neither a file nor a folder: save what it holds to a file first")
    return stat.S_ISDIR(mode)


def _labels(paths: Sequence[Path]) -> list[str]:
    """Name each path by as few of its last parts as tell it from the others."""
    parts = [[part for part in Path(os.path.abspath(path)).parts[1:] if part] for path in paths]
    lengths = [1] * len(parts)
    while True:
        labels = ["/".join(_nfc(name) for name in names[-n:]) for names, n in zip(parts, lengths, strict=True)]
        seen: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            seen.setdefault(label, []).append(index)
        longer = [i for same in seen.values() if len(same) > 1 for i in same if lengths[i] < len(parts[i])]
        if not longer:
            return [_shown(label) for label in labels]
        for index in longer:
            lengths[index] += 1


def _refuse_overlap(roots: Sequence[_Root]) -> None:
    """Raise `InputError` if a document would be read through two of the paths."""
    outer: list[tuple[tuple[str, ...], _Root]] = []
    for parts, index in sorted((Path(os.path.realpath(root.path)).parts, i) for i, root in enumerate(roots)):
        while outer and parts[: len(outer[-1][0])] != outer[-1][0]:
            outer.pop()
        root = roots[index]
        for above, other in outer:
            below = parts[len(above) :]
            found = root.is_folder or not below or _suffix(below[-1]) in SUFFIXES
            if found and not any(name.startswith(".") for name in below):
                a, b = _shown(root.path), _shown(other.path)
                raise InputError(f"`{a}` and `{b}` hold the same documents, to be paid for twice: leave one out")
        outer.append((parts, root))


def _refuse_barren(root: _Root, excluded: frozenset[str]) -> None:
    """Raise `InputError` if a folder holds no document, or cannot be listed."""
    skipped = Skipped()
    first = next(_entries(root, excluded, skipped), None)
    if first is None:
        others = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in _most(skipped.by_suffix))
        found = f"; other files there: {others}" if others else ""
        raise InputError(
            f"`{_shown(root.path)}` holds no document: looked for {', '.join(sorted(SUFFIXES))}{found}. "
            "Give another folder, or name a file itself to have it read as text"
        )
    if first.path == root.path:
        raise InputError(f"`{_shown(root.path)}` cannot be listed: {first.error}")


def _refuse_rowless(root: _Root) -> None:
    """Raise `InputError` if a JSONL file holds blank lines at most; other faults are left to the reading."""
    try:
        with _open(root.path) as file:
            if next(_lines(file, MAX_DOCUMENT_BYTES), None) is not None:
                return
    except (OSError, ValueError):
        return
    raise InputError(f'`{_shown(root.path)}` is empty: write one {{"id": "...", "text": "..."}} per line')


def _most(counts: dict[str, int], limit: int = 5) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]


# Folders ------------------------------------------------------------------------------------------------


def _entries(root: _Root, excluded: frozenset[str], skipped: Skipped) -> Iterator[_Entry]:
    """Yield every file of a root that is to be read, sorted by id."""
    if not root.is_folder:
        yield _Entry(root.path, root.label, root)
        return
    pending: list[tuple[str, str, list[str]]] = []
    folder, prefix = root.path, root.prefix
    while True:
        try:
            pending.append((folder, prefix, _list(folder, excluded, skipped)))
        except OSError as error:
            problem: str | None = f"the folder cannot be listed: {_why(error)}"
            yield _Entry(folder, _shown(prefix) or root.label, root, problem)
        while True:
            while pending and not pending[-1][2]:
                pending.pop()
            if not pending:
                return
            parent, prefix, names = pending[-1]
            name = names.pop()
            path = os.path.join(parent, name)
            if name.endswith("/"):
                folder, prefix = path[:-1], prefix + _nfc(name)
                break
            problem = None if _encodable(name) else "its name is not valid UTF-8: rename it"
            yield _Entry(path, _shown(prefix + _nfc(name)), root, problem)


def _list(folder: str, excluded: frozenset[str], skipped: Skipped) -> list[str]:
    """List a folder's documents and subfolders, the latter with a `/` at the end, last one first.

    With that `/` names sort as the paths below them do, so a walk yields them as if all paths were sorted at
    once.
    """
    names = []
    excluded_names = {os.path.basename(path) for path in excluded}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name in excluded_names and os.path.realpath(entry.path) in excluded:
                continue
            if name.startswith("."):
                skipped.hidden += 1
            elif entry.is_dir(follow_symlinks=False):
                names.append(f"{name}/")
            elif entry.is_symlink() and _leads_to_folder(entry):
                skipped.links += 1
            elif _suffix(name) in SUFFIXES:
                names.append(name)
            else:
                suffix = _shown(_suffix(name))
                skipped.by_suffix[suffix] = skipped.by_suffix.get(suffix, 0) + 1
    names.sort(reverse=True)
    names.sort(key=_nfc, reverse=True)
    return names


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reading it will say so
        return False


# Files --------------------------------------------------------------------------------------------------


def _read(
    roots: Sequence[_Root], excluded: frozenset[str], max_bytes: int, skipped: Skipped
) -> Iterator[Document | Rejected]:
    """Yield all documents; the second of two with one id is rejected."""
    seen: dict[str, str | _Root] = {}
    for root in roots:
        for entry in _entries(root, excluded, skipped):
            for item in _read_entry(entry, max_bytes):
                if isinstance(item, Document):
                    first = seen.get(item.id)
                    if first is not None:
                        where = first if isinstance(first, str) else first.source_of(item.id)
                        reason = f"`{item.source}` has the id of `{where}`, read before: ids must be unique"
                        yield Rejected(item.id, item.source, reason)
                        continue
                    # A file's source follows from its id, so a folder's million files need not be held twice.
                    seen[item.id] = item.source if entry.suffix in JSONL_SUFFIXES else root
                yield item


def _read_entry(entry: _Entry, max_bytes: int) -> Iterator[Document | Rejected]:
    """Yield what one file holds: one item, or one per row of a JSONL file."""
    source = _shown(entry.path)
    try:
        if entry.error is not None:
            raise ValueError(entry.error)
        if entry.suffix in JSONL_SUFFIXES:
            yield from _read_rows(entry.path, entry.id, source, max_bytes)
        else:
            text = _read_text(entry.path, max_bytes)
            if entry.suffix in HTML_SUFFIXES:
                text = html_to_text(text)
                if not text:
                    raise ValueError("no text is left once its markup is removed")
            yield Document(entry.id, text, source)
    except OSError as error:
        yield Rejected(entry.id, source, f"cannot be read: {_why(error)}")
    except ValueError as error:
        yield Rejected(entry.id, source, str(error))


def _read_text(path: str, max_bytes: int) -> str:
    """Read a whole file; raises `ValueError` with the reason if it is too large, not UTF-8 text, or empty."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"too large: {size:,} bytes, the limit is {max_bytes:,}")
        text = _decode(file.read(size))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ValueError("it is empty" if size == 0 else "it holds nothing but white space")
    return text


def _open(path: str) -> BinaryIO:
    """Open a regular file; raises `ValueError` for anything else, which might never answer."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    return open(path, "rb")


def _read_rows(path: str, file_id: str, source: str, max_bytes: int) -> Iterator[Document | Rejected]:
    """Yield one item per row of a JSONL file; raises `OSError` and `ValueError` if it is not even that."""
    number = 0
    with _open(path) as file:
        for number, line in _lines(file, max_bytes):
            row_source = f"{source}:{number}"
            row: dict[str, object] = {}
            try:
                if line is None:
                    raise ValueError(f"line {number}: too large, the limit is {max_bytes:,} bytes")
                row = _row(line, number)
                yield Document(_string(row, "id", number), _string(row, "text", number), row_source)
            except ValueError as error:
                row_id = row.get("id")
                known = isinstance(row_id, str) and row_id.strip() and _encodable(row_id)
                yield Rejected(str(row_id) if known else f"{file_id}:{number}", row_source, str(error))
    if number == 0:
        raise ValueError("it holds no row")


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines that are not blank, numbered from 1 as an editor does; `None` for one above the limit.

    Raises:
        ValueError: With the reason, at the first line, if the file is not UTF-8 text at all.
    """
    head = file.read(4096)
    foreign = _foreign(head)
    if foreign is not None:
        raise ValueError(foreign)
    file.seek(len(_BOM) if head.startswith(_BOM) else 0)
    number = 0
    while line := file.readline(max_bytes + 2):
        number += 1
        content = line.rstrip(b"\r\n")
        if len(content) > max_bytes:
            while not line.endswith(b"\n") and (line := file.readline(1 << 16)):
                pass
            yield number, None
        elif content.strip():
            yield number, content


def _row(line: bytes, number: int) -> dict[str, object]:
    """Parse one line of JSONL; raises `ValueError` naming the line."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number}: {_undecodable(line, error)}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: broken JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"line {number}: expected an object with `id` and `text`, got {_kind(value)}")
    return value


def _string(row: dict[str, object], name: str, number: int) -> str:
    """Take a string that is not blank out of a row; raises `ValueError` naming line and field."""
    if name not in row:
        raise ValueError(f"line {number}: `{name}` is missing")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"line {number}: `{name}` must be a string, got {_kind(value)}")
    if not value.strip():
        raise ValueError(f"line {number}: `{name}` is empty")
    if not _encodable(value):
        raise ValueError(f"line {number}: `{name}` holds half of a surrogate pair, which no UTF-8 text can")
    return value


def _kind(value: object) -> str:
    """Name a JSON value's type."""
    if value is None:
        return "null"
    kinds = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return kinds[type(value)]


# Encodings ----------------------------------------------------------------------------------------------

_BOM = b"\xef\xbb\xbf"

_SIGNATURES = (
    (b"%PDF-", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive or an office document"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old office document"),
    (b"{\\rtf", "an RTF document"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x7fELF", "a program"),
    # UTF-32's little-endian mark begins with UTF-16's.
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)

_CONTROLS = bytes(range(9)) + bytes(range(14, 27)) + b"\x1c\x1d\x1e\x1f\x7f"
"""What no text holds: the control characters but for tab, line and page ends, and escape."""


def _foreign(data: bytes) -> str | None:
    """Say what the beginning of a file is if it is clearly not UTF-8 text; `None` if it may be."""
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return f"not UTF-8 text but {name}: {_remedy(name)}"
    nul = data.find(b"\0")
    if nul < 0:
        return None
    evens, odds = data[0::2].count(0), data[1::2].count(0)
    if min(evens, odds) == 0 and max(evens, odds) > len(data) // 4:
        return f"not UTF-8 text but UTF-16: {_remedy('UTF-16')}"
    return f"not text but binary: NUL byte at offset {nul}"


def _remedy(name: str) -> str:
    return (
        f"convert it (`iconv -f {name} -t UTF-8`)"
        if name.startswith(("UTF-", "WINDOWS-"))
        else "extract its text first"
    )


def _decode(data: bytes) -> str:
    """Decode UTF-8, without its byte order mark; raises `ValueError` saying what the bytes are instead."""
    foreign = _foreign(data)
    if foreign is not None:
        raise ValueError(foreign)
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_undecodable(data, error)) from None


def _undecodable(data: bytes, error: UnicodeDecodeError) -> str:
    """Say what bytes that are not UTF-8 look like."""
    at = error.start + (len(_BOM) if data.startswith(_BOM) else 0)
    where = f"byte 0x{data[at]:02X} at offset {at}"
    if len(data.translate(None, _CONTROLS)) < len(data):
        return f"not UTF-8 text but binary: {where}"
    if error.reason == "unexpected end of data":
        return f"not UTF-8: it ends in the middle of a character ({where})"
    return f"not UTF-8 but an older encoding such as Latin-1 or Windows-1252: {where}; {_remedy('WINDOWS-1252')}"


# Names --------------------------------------------------------------------------------------------------


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _nfc(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: Path | str) -> str:
    """Write a path with `/`, and bytes that are no Unicode as escapes, so that it can be stored."""
    text = os.fspath(path)
    if os.sep != "/":
        text = text.replace(os.sep, "/")
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _why(error: Exception) -> str:
    """Say in a few words what the system said."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]
