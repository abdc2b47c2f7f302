from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from presort.errors import InputError
from presort.indexing import records
from presort.indexing.extraction import MAX_ANSWER_TOKENS, Classification, Subcategories
from presort.indexing.records import Record, RecordWriter, record_from_outcome
from presort.request import Outcome, OutcomeKind, Route, Usage

posix = pytest.mark.skipif(sys.platform == "win32", reason="locks and links as POSIX has them")

CLASSIFICATION = Classification(
    departments=["Sales"],
    category="Commerce",
    subcategories=Subcategories(level1="Retail", level2="Shops", level3=""),
    languages=["German"],
    sentiment="Positive",
    confidence_score=0.8,
    topics=["Läden", "prices", "opening hours"],
    summary="A list of shops.",
)


def failed(document_id: str = "a", reason: str = "why") -> Record:
    """Make a record of a failure."""
    return Record(document_id, f"docs/{document_id}", reason=reason)


def rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of records."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


# Rows


def test_a_success_is_written_in_a_fixed_order() -> None:
    """A successful row holds id, source, status and classification, in that order and as UTF-8."""
    line = Record("ä", "docs/ä", CLASSIFICATION).line()
    assert line.startswith('{"id": "ä", "source": "docs/ä", "status": "succeeded", "classification": {'.encode())
    assert json.loads(line)["classification"] == CLASSIFICATION.model_dump()
    assert "Läden".encode() in line
    assert list(json.loads(line)) == ["id", "source", "status", "classification"]


def test_a_failure_says_how_far_it_came() -> None:
    """A failed row holds its reason, and route, batch and usage where there are any."""
    record = Record("a", "b", None, "why", Route.BATCH, "batch_1", Usage(input_tokens=5))
    assert json.loads(record.line()) == {
        "id": "a",
        "source": "b",
        "status": "failed",
        "reason": "why",
        "route": "batch",
        "batch_id": "batch_1",
        "usage": {
            "input_tokens": 5,
            "cache_write_5m_tokens": 0,
            "cache_write_1h_tokens": 0,
            "cache_write_tokens": 0,
            "cache_read_tokens": 0,
            "output_tokens": 0,
        },
    }


@pytest.mark.parametrize("text", ["two\nlines", "\u2028\x85", '"quoted"\\', "\ud83d half", "\U0001f600", "\0"])
def test_any_text_is_one_line_and_comes_back(text: str) -> None:
    """Whatever a text holds, even half a surrogate pair, its row is one line of UTF-8 and gives it back."""
    line = failed(reason=text).line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line.decode("utf-8"))["reason"] == text


def test_a_record_has_one_end() -> None:
    """A record with both a classification and a reason, or with neither, cannot be made."""
    with pytest.raises(ValueError, match="either"):
        Record("a", "b")
    with pytest.raises(ValueError, match="either"):
        Record("a", "b", CLASSIFICATION, "why")


# The file


def test_the_output_appears_at_the_end(tmp_path: Path) -> None:
    """Until it is finished the output is what it was; then it holds all rows and no other file is left."""
    path = tmp_path / "records.jsonl"
    path.write_text("before")
    with RecordWriter(path) as writer:
        for index in range(1000):
            writer.write(failed(str(index)))
        assert path.read_text() == "before"
        assert writer.partial == tmp_path / "records.jsonl.partial"
        assert writer.count == 1000
    assert [row["id"] for row in rows(path)] == [str(index) for index in range(1000)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["records.jsonl"]


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    """The same records give the same file, byte for byte."""
    for name in ("a", "b"):
        with RecordWriter(tmp_path / name) as writer:
            writer.write(Record("ä", "x", CLASSIFICATION, usage=Usage(1, 2, 3, 4, 5, 6)))
            writer.write(failed())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_rows_are_an_empty_file(tmp_path: Path) -> None:
    """A run without rows leaves an empty output, not none."""
    with RecordWriter(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_bytes() == b""


def test_an_abort_leaves_the_output_and_shows_the_rows(tmp_path: Path) -> None:
    """An exception leaves the output as it was and the rows so far in the partial file."""
    path = tmp_path / "out"
    path.write_text("before")
    writer = RecordWriter(path)
    with contextlib.suppress(KeyboardInterrupt), writer:
        writer.write(failed())
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert [row["id"] for row in rows(writer.partial)] == ["a"]


def test_an_abort_without_rows_leaves_nothing(tmp_path: Path) -> None:
    """A writer that is aborted before its first row leaves no file behind."""
    writer = RecordWriter(tmp_path / "out")
    writer.abort()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_left_over_partial_file_is_emptied(tmp_path: Path) -> None:
    """A partial file from a crash does not get into the next result."""
    (tmp_path / "out.partial").write_text("torn row " * 100)
    with RecordWriter(tmp_path / "out") as writer:
        writer.write(failed())
    assert len(rows(tmp_path / "out")) == 1


def test_finishing_twice_is_once(tmp_path: Path) -> None:
    """A second `finish` does nothing, and no row can be written after the first."""
    writer = RecordWriter(tmp_path / "out")
    writer.finish()
    (tmp_path / "out").unlink()
    writer.finish()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is closed"):
        writer.write(failed())


def test_a_process_that_dies_leaves_the_output(tmp_path: Path) -> None:
    """A process killed in the middle leaves the earlier output whole."""
    path = tmp_path / "out"
    path.write_text("before")
    code = f"""
import os
from pathlib import Path
from presort.indexing.records import Record, RecordWriter
with RecordWriter(Path({str(path)!r})) as writer:
    for index in range(5000):
        writer.write(Record(str(index), "x", reason="y"))
    os._exit(9)
"""
    source = Path(records.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(source)})
    assert done.returncode == 9
    assert path.read_text() == "before"
    with RecordWriter(path) as writer:
        writer.write(failed())
    assert len(rows(path)) == 1


@posix
def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """A second writer of one output is refused until the first is done, and harms nothing."""
    path = tmp_path / "out"
    with RecordWriter(path) as writer:
        writer.write(failed())
        with pytest.raises(InputError, match="another process is writing"):
            RecordWriter(path)
    assert len(rows(path)) == 1
    RecordWriter(path).abort()


@posix
def test_links_and_rights_of_the_output_are_kept(tmp_path: Path) -> None:
    """An output that is a link stays one, and what it leads to keeps its permissions."""
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "data"
    target.write_text("before")
    target.chmod(0o600)
    link = tmp_path / "out"
    link.symlink_to(target)
    with RecordWriter(link) as writer:
        assert writer.partial.stat().st_mode & 0o777 == 0o600
        writer.write(failed())
    assert link.is_symlink()
    assert len(rows(target)) == 1
    assert target.stat().st_mode & 0o777 == 0o600


def test_impossible_outputs_are_refused_at_once(tmp_path: Path) -> None:
    """A folder, a missing folder, a file in the way and a device are refused in one line naming the path."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken.partial").mkdir()
    cases = [
        (tmp_path, "it is a folder; name a file"),
        (tmp_path / "none" / "out", "does not exist; make it first"),
        (tmp_path / "file" / "out", "does not exist; make it first"),
        (tmp_path / "taken", "taken.partial"),
        (tmp_path / ("x" * 250), "cannot write"),
    ]
    if sys.platform != "win32":
        cases.append((Path(os.devnull), "not a regular file"))
    before = sorted(tmp_path.iterdir())
    for path, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            RecordWriter(path)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everything")
def test_outputs_without_permission_are_refused(tmp_path: Path) -> None:
    """A read-only output and a folder that may not be written to are refused at once."""
    (tmp_path / "out").write_text("x")
    (tmp_path / "out").chmod(0o400)
    with pytest.raises(InputError, match="read-only"):
        RecordWriter(tmp_path / "out")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(InputError, match="no permission"):
        RecordWriter(locked / "out")


@posix
def test_a_write_that_fails_names_the_file(tmp_path: Path) -> None:
    """Where the system takes no more bytes, writing raises and the output stays."""
    import resource

    path = tmp_path / "out"
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = RecordWriter(path)
    for _ in range(200):
        writer.write(failed())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(InputError, match=r"cannot write `.*out\.partial`"):
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.abort()
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full; make room"),
        (errno.EROFS, "no permission; choose another folder"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_system_errors_become_advice(number: int, message: str) -> None:
    """A full disk, a read-only one and a broken one each say so, with the path."""
    error = records._unwritable(Path("out.partial"), OSError(number, os.strerror(number)))
    assert message in str(error)
    assert "out.partial" in str(error)


# Outcomes


class Reader:
    """A provider whose answers are their own text, unless they are cut off."""

    def read_text(self, body: bytes) -> str:
        """Return the body; raise for the one that says so."""
        if body == b"cut":
            raise ValueError("the answer was cut off: `max_tokens`")
        return body.decode()


def record_of(kind: OutcomeKind, status: int, body: bytes, **more: Any) -> Record:
    """Make the record of one outcome."""
    return record_from_outcome("a", "docs/a", Reader(), Outcome(kind, status, body, **more))


def test_an_answer_becomes_its_classification() -> None:
    """A good answer becomes a success with its route, batch and usage."""
    usage = Usage(output_tokens=9)
    body = CLASSIFICATION.model_dump_json().encode()
    record = record_of(OutcomeKind.SUCCEEDED, 200, body, usage=usage, batch_id="b")
    assert record == Record("a", "docs/a", CLASSIFICATION, None, Route.BATCH, "b", usage)


def test_departments_are_those_of_the_question() -> None:
    """An answer is read with the departments that were offered."""
    body = CLASSIFICATION.model_dump_json().replace("Sales", "Zoo").encode()
    outcome = Outcome(OutcomeKind.SUCCEEDED, 200, body)
    assert record_from_outcome("a", "b", Reader(), outcome, ["Zoo"]).status == "succeeded"
    assert record_from_outcome("a", "b", Reader(), outcome).status == "failed"


LIMIT = Usage(output_tokens=MAX_ANSWER_TOKENS)


@pytest.mark.parametrize(
    ("kind", "status", "body", "more", "reason"),
    [
        (
            "succeeded",
            200,
            b"hello",
            {},
            "the answer cannot be used: the answer is not JSON: Expecting value at",
        ),
        ("succeeded", 200, b"cut", {}, "the answer cannot be used: the answer was cut off: `max_tokens`"),
        (
            "succeeded",
            200,
            b'{"departments": [',
            {"usage": LIMIT},
            "(it reached the limit of 4,096 output tokens)",
        ),
        ("succeeded", 200, b"\xff", {}, "the answer cannot be used: 'utf-8' codec"),
        ("errored", 400, b'{"error": {"message": "prompt is too long"}}', {}, "HTTP 400: prompt is too long"),
        ("errored", 400, b'{"type": "error", "error": {"type": "x", "message": "no"}}', {}, "HTTP 400: no"),
        (
            "errored",
            429,
            b'{"error": {"message": "slow"}}',
            {"reason": "rate_limit"},
            "HTTP 429: slow (rate_limit)",
        ),
        ("errored", 404, b'{"error": "no such model"}', {}, "HTTP 404: no such model"),
        ("errored", 422, b'{"object": "error", "message": "bad"}', {}, "HTTP 422: bad"),
        ("errored", 502, b"<html>Bad\n Gateway</html>", {}, "HTTP 502: <html>Bad Gateway</html>"),
        ("errored", 500, b"", {}, "HTTP 500"),
        ("errored", 500, b"[1]", {}, "HTTP 500"),
        ("errored", 500, b'{"error": {"message": 5}}', {}, "HTTP 500"),
        ("errored", 500, b"\xff\xfe", {"reason": "missing"}, "HTTP 500: \ufffd\ufffd (missing)"),
        ("expired", 504, b'{"error": {"message": "late"}}', {}, "not answered in time, HTTP 504: late"),
        ("cancelled", 499, b"{}", {}, "withdrawn before it was answered, HTTP 499"),
    ],
)
def test_every_way_of_failing_has_a_reason(
    kind: str, status: int, body: bytes, more: dict[str, Any], reason: str
) -> None:
    """Each outcome without a usable answer becomes a failed record with a reason in one line."""
    record = record_of(OutcomeKind(kind), status, body, **more)
    assert record.status == "failed"
    assert record.reason is not None
    assert reason in record.reason
    assert "\n" not in record.reason
    assert record.route is Route.BATCH


def test_a_long_message_is_cut() -> None:
    """A vendor's page-long message is cut to a bearable length."""
    record = record_of(OutcomeKind.ERRORED, 500, json.dumps({"message": "x " * 5000}).encode())
    assert record.reason is not None
    assert len(record.reason) == records.MAX_REASON_CHARS
