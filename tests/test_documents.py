from __future__ import annotations

import inspect
import json
import os
import sys
import tracemalloc
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presort.errors import InputError, MissingExtraError
from presort.indexing import documents
from presort.indexing.documents import (
    SUFFIXES,
    Document,
    Rejected,
    Skipped,
    count_documents,
    read_documents,
)
from presort.indexing.html import html_to_text

posix = pytest.mark.skipif(sys.platform == "win32", reason="names and links as POSIX has them")


def put(folder: Path, name: str, content: str | bytes = "text") -> Path:
    """Write a file and the folders above it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(*paths: Path, **options: object) -> list[Document | Rejected]:
    """Read everything, and check on the way that it was counted right."""
    items = list(read_documents(paths, **options))  # type: ignore[arg-type]
    counted = {name: value for name, value in options.items() if name != "skipped"}
    assert count_documents(paths, **counted) == len(items)  # type: ignore[arg-type]
    return items


def ids(items: list[Document | Rejected]) -> list[str]:
    """List the ids."""
    return [item.id for item in items]


def only_reason(*paths: Path, **options: object) -> str:
    """Read what holds one rejected document, and return the reason."""
    (item,) = read(*paths, **options)
    assert isinstance(item, Rejected)
    assert "\n" not in item.reason
    return item.reason


def row(document_id: object = "a", text: object = "text") -> str:
    """Write one line of JSONL."""
    return json.dumps({"id": document_id, "text": text}) + "\n"


# Order and ids


def test_order_is_that_of_the_relative_paths(tmp_path: Path) -> None:
    """A folder's documents come sorted by their whole relative path, not folder by folder."""
    names = ["b.txt", "a/x.txt", "a-b/x.txt", "a.txt", "a/b/c/d.md", "a b.txt", "A.txt", "a0/x.rst"]
    for name in names:
        put(tmp_path, name)
    assert ids(read(tmp_path)) == sorted(names)


NAMES = st.text("a-.0é", min_size=1, max_size=3).filter(lambda name: name.strip("."))


@settings(max_examples=50, deadline=None)
@given(
    st.sets(
        st.lists(NAMES, min_size=1, max_size=3).map("/".join),
        max_size=8,
    )
)
def test_any_tree_is_read_whole_and_sorted(tmp_path_factory: pytest.TempPathFactory, paths: set[str]) -> None:
    """Whatever the tree, exactly its visible documents come out, sorted by path."""
    folder = tmp_path_factory.mktemp("tree")
    put(folder, "always.txt")
    expected = {"always.txt"}
    for path in paths:
        name = f"{path}.txt"
        put(folder, name)
        if not any(part.startswith(".") for part in name.split("/")):
            expected.add(name)
    assert ids(read(folder)) == sorted(expected)


def test_several_paths_come_in_the_order_given(tmp_path: Path) -> None:
    """Several paths come in the order given, and each folder's ids begin with its name."""
    put(tmp_path, "old/x.txt")
    put(tmp_path, "new/x.txt")
    single = put(tmp_path, "letter.txt")
    items = read(tmp_path / "old", single, tmp_path / "new")
    assert ids(items) == ["old/x.txt", "letter.txt", "new/x.txt"]


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Folders with the same name get as much of their path into the ids as it takes to differ."""
    for name in ("2024/docs/x.txt", "2025/docs/x.txt", "other/y.txt"):
        put(tmp_path, name)
    items = read(tmp_path / "2024" / "docs", tmp_path / "2025" / "docs", tmp_path / "other")
    assert ids(items) == ["2024/docs/x.txt", "2025/docs/x.txt", "other/y.txt"]


def test_ids_do_not_depend_on_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative and an absolute path give the same ids; the source is the path as it was given."""
    put(tmp_path, "docs/a/x.txt")
    monkeypatch.chdir(tmp_path)
    (relative,) = read(Path("docs"))
    (absolute,) = read(tmp_path / "docs")
    assert relative.id == absolute.id == "a/x.txt"
    assert relative.source == "docs/a/x.txt"
    assert absolute.source == (tmp_path / "docs/a/x.txt").as_posix()


def test_a_folder_of_dot_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder and another one give ids with the real names of both."""
    put(tmp_path, "here/x.txt")
    put(tmp_path, "there/x.txt")
    monkeypatch.chdir(tmp_path / "here")
    assert ids(read(Path(), Path("../there"))) == ["here/x.txt", "there/x.txt"]


@posix
def test_names_are_composed(tmp_path: Path) -> None:
    """A decomposed file name gives the composed id, and sorts as it."""
    decomposed = unicodedata.normalize("NFD", "é.txt")
    put(tmp_path, decomposed)
    put(tmp_path, "z.txt")
    put(tmp_path, "日本語/ファイル.txt")
    assert ids(read(tmp_path)) == ["z.txt", "é.txt", "日本語/ファイル.txt"]


@posix
def test_composed_and_decomposed_twins_clash(tmp_path: Path) -> None:
    """Of two files whose names differ in Unicode form only, the second is rejected."""
    put(tmp_path, unicodedata.normalize("NFC", "é.txt"))
    put(tmp_path, unicodedata.normalize("NFD", "é.txt"))
    if len(list(tmp_path.iterdir())) == 1:
        pytest.skip("this file system takes both names for one")
    first, second = read(tmp_path)
    assert isinstance(first, Document)
    assert isinstance(second, Rejected)
    assert first.id == second.id == "é.txt"
    assert first.source != second.source


@posix
def test_a_name_that_is_not_unicode_is_rejected(tmp_path: Path) -> None:
    """A file name with bytes that are no UTF-8 is rejected, under a name that can be printed and stored."""
    put(tmp_path, "fine.txt")
    try:
        put(tmp_path, os.fsdecode(b"caf\xe9.txt"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    bad, fine = read(tmp_path)
    assert isinstance(bad, Rejected)
    assert "not valid UTF-8" in bad.reason
    assert (bad.id + bad.source).encode("utf-8")
    assert isinstance(fine, Document)


def test_deep_folders_are_read(tmp_path: Path) -> None:
    """A folder nested deeper than Python's recursion limit is read."""
    folder, depth = tmp_path, 200
    for _ in range(depth):
        folder /= "d"
        folder.mkdir()
    put(folder, "x.txt")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + depth // 2)
    try:
        (item,) = read(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert item.id == "d/" * depth + "x.txt"


# What is read


def test_every_suffix_is_found_in_any_case(tmp_path: Path) -> None:
    """A folder is searched for all suffixes, in upper case too."""
    for index, suffix in enumerate(sorted(SUFFIXES)):
        content = row(f"row{index}") if suffix in {".jsonl", ".ndjson"} else "<p>text"
        put(tmp_path, f"{index}{suffix.upper()}", content)
    assert all(isinstance(item, Document) for item in read(tmp_path))


def test_what_is_skipped_is_counted(tmp_path: Path) -> None:
    """Other suffixes, hidden names and linked folders are skipped and counted, each kind for itself."""
    for name in ("a.txt", "b.PDF", "c.pdf", "README", ".hidden.txt", ".git/x.txt", ".git/y.txt"):
        put(tmp_path, name)
    expected = {".pdf": 2, "": 1}
    skipped = Skipped()
    assert ids(read(tmp_path, skipped=skipped)) == ["a.txt"]
    assert skipped.by_suffix == expected
    assert skipped.hidden == 2
    assert skipped.total == 5


def test_a_named_file_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    """A file that is given itself is read as text, with an unknown suffix, without one, or hidden."""
    paths = [put(tmp_path, name) for name in ("notes.log", "README", ".profile")]
    assert ids(read(*paths)) == ["notes.log", "README", ".profile"]


@posix
def test_links_are_safe(tmp_path: Path) -> None:
    """Linked files are read; linked folders, loops among them, are counted and not entered."""
    put(tmp_path, "docs/a.txt", "one")
    (tmp_path / "docs/loop").symlink_to(tmp_path / "docs")
    (tmp_path / "docs/named.txt").symlink_to(tmp_path)
    (tmp_path / "docs/b.txt").symlink_to("a.txt")
    (tmp_path / "docs/c.txt").symlink_to("c.txt")
    (tmp_path / "docs/d.txt").symlink_to("nothing")
    skipped = Skipped()
    items = read(tmp_path / "docs", skipped=skipped)
    assert [type(item) for item in items] == [Document, Document, Rejected, Rejected]
    assert skipped.links == 2
    assert [item.reason for item in items if isinstance(item, Rejected)] == [
        "cannot be read: too many levels of symbolic links",
        "cannot be read: no such file or directory",
    ]


@posix
def test_a_folder_may_be_given_as_a_link(tmp_path: Path) -> None:
    """A linked folder that is given itself is read."""
    put(tmp_path, "real/a.txt")
    (tmp_path / "link").symlink_to("real")
    assert ids(read(tmp_path / "link")) == ["a.txt"]


def test_a_folder_named_like_a_file_is_a_folder(tmp_path: Path) -> None:
    """A folder called `x.txt` is searched, not read."""
    put(tmp_path, "x.txt/y.md")
    assert ids(read(tmp_path)) == ["x.txt/y.md"]


@posix
def test_a_pipe_in_a_folder_does_not_block(tmp_path: Path) -> None:
    """A named pipe with a document's suffix is rejected instead of being waited for."""
    put(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    os.mkfifo(tmp_path / "c.jsonl")
    assert [item.reason for item in read(tmp_path) if isinstance(item, Rejected)] == ["not a regular file"] * 2


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_rejected(tmp_path: Path) -> None:
    """A file or folder without permission is rejected by name; the rest is read."""
    put(tmp_path, "a.txt")
    put(tmp_path, "b.txt").chmod(0)
    locked = put(tmp_path, "c/d.txt").parent
    locked.chmod(0)
    try:
        items = read(tmp_path)
    finally:
        locked.chmod(0o755)
    assert ids(items) == ["a.txt", "b.txt", "c/"]
    assert all("permission denied" in item.reason for item in items if isinstance(item, Rejected))


def test_the_output_is_no_input(tmp_path: Path) -> None:
    """An excluded file is neither read nor counted as skipped, another one of that name is read."""
    put(tmp_path, "a.txt")
    output = put(tmp_path, "records.jsonl", "{}\n")
    partial = put(tmp_path, "records.jsonl.partial")
    put(tmp_path, "sub/records.jsonl", row("kept"))
    skipped = Skipped()
    items = read(tmp_path, exclude=[output, partial], skipped=skipped)
    assert ids(items) == ["a.txt", "kept"]
    assert skipped.total == 0


@posix
def test_a_linked_output_is_no_input(tmp_path: Path) -> None:
    """An output that is a link in the input folder to elsewhere is left out too."""
    put(tmp_path, "docs/a.txt")
    put(tmp_path, "elsewhere.jsonl", "{}\n")
    (tmp_path / "docs/records.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert ids(read(tmp_path / "docs", exclude=[tmp_path / "docs/records.jsonl"])) == ["a.txt"]


def test_reading_is_lazy(tmp_path: Path) -> None:
    """Nothing but the document that was asked for is held: 40 files of 1 MB take less than 5 MB."""
    for index in range(40):
        put(tmp_path, f"{index}.txt", b"x" * 1_000_000)
    tracemalloc.start()
    count = sum(1 for _ in read_documents([tmp_path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40
    assert peak < 5_000_000


# Texts


def test_line_ends_and_marks_do_not_matter(tmp_path: Path) -> None:
    """A text is the same with any system's line ends, and with or without a byte order mark."""
    for index, content in enumerate((b"a\n\nb\n", b"a\r\n\r\nb\r\n", b"a\r\rb\r", b"\xef\xbb\xbfa\n\nb\n")):
        put(tmp_path, f"{index}.txt", content)
    assert {item.text for item in read(tmp_path) if isinstance(item, Document)} == {"a\n\nb\n"}


def test_markdown_is_kept_as_it_is(tmp_path: Path) -> None:
    """Markdown and reStructuredText are texts like any other: nothing is removed or decoded."""
    content = "---\ntitle: x\n---\n# A &amp; B\n\n<b>c</b>  \n"
    put(tmp_path, "a.md", content)
    (item,) = read(tmp_path)
    assert isinstance(item, Document)
    assert item.text == content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b" \r\n\t\n", "it holds nothing but white space"),
        (b"\xef\xbb\xbf", "it holds nothing but white space"),
        (
            "Café crème".encode("latin-1"),
            "such as Latin-1 or Windows-1252: byte 0xE9 at offset 3",
        ),
        (b"\xef\xbb\xbf\xe9t\xe9", "byte 0xE9 at offset 3"),
        ("naïve".encode()[:3], "ends in the middle of a character (byte 0xC3 at offset 2)"),
        ("héllo wörld".encode("utf-16"), "UTF-16"),
        ("hello world".encode("utf-16-le"), "UTF-16"),
        ("hello world".encode("utf-16-be"), "UTF-16"),
        ("hello world".encode("utf-32"), "UTF-32"),
        (b"text with a\0 in it", "binary: NUL byte at offset 11"),
        (b"\x89\x01\x02\x03", "binary: byte 0x89 at offset 0"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
        (b"PK\x03\x04\x14\0", "a ZIP archive or an office document"),
        (b"\x1f\x8b\x08\0", "compressed with gzip"),
    ],
)
def test_what_is_not_utf8_text_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    """A file that is no UTF-8 text, or none at all, is rejected with what it is instead."""
    put(tmp_path, "x.txt", content)
    assert reason in only_reason(tmp_path)


def test_a_file_above_the_limit_is_rejected(tmp_path: Path) -> None:
    """The size limit is inclusive, and a file above it is rejected with both numbers."""
    put(tmp_path, "a.txt", "x" * 1000)
    put(tmp_path, "b.txt", "x" * 1001)
    fits, large = read(tmp_path, max_bytes=1000)
    assert isinstance(fits, Document)
    assert isinstance(large, Rejected)
    assert large.reason == "too large: 1,001 bytes, the limit is 1,000"


def test_a_huge_single_line_is_a_text(tmp_path: Path) -> None:
    """A text of 5 MB without a line end is read whole."""
    put(tmp_path, "a.txt", "x " * 2_500_000)
    (item,) = read(tmp_path)
    assert isinstance(item, Document)
    assert len(item.text) == 5_000_000


# JSONL


def test_rows_come_in_line_order_with_their_own_ids(tmp_path: Path) -> None:
    """Rows keep their id and text; their source is the file and the line as an editor counts it."""
    content = row("z", "one\r\ntwo") + "\n  \n" + row("a", " é\u2028 ") + row("m").rstrip("\n")
    path = put(tmp_path, "in.jsonl", "\ufeff" + content)
    name = path.as_posix()
    assert read(path) == [
        Document("z", "one\r\ntwo", f"{name}:1"),
        Document("a", " é\u2028 ", f"{name}:4"),
        Document("m", "text", f"{name}:5"),
    ]


@pytest.mark.parametrize(
    ("line", "document_id", "reason"),
    [
        (b'{"id": "x", "text": "cut', "in.jsonl:2", "line 2: broken JSON at column 21"),
        (b"not json", "in.jsonl:2", "line 2: broken JSON at column 1"),
        (b"[" * 100_000, "in.jsonl:2", "line 2: broken JSON"),
        (b"1" * 10_000, "in.jsonl:2", "line 2: broken JSON"),
        (b'["x"]', "in.jsonl:2", "line 2: expected an object with `id` and `text`, got an array"),
        (b"null", "in.jsonl:2", "got null"),
        (b'{"text": "t"}', "in.jsonl:2", "line 2: `id` is missing"),
        (b'{"id": 7, "text": "t"}', "in.jsonl:2", "`id` must be a string, got a number"),
        (b'{"id": " ", "text": "t"}', "in.jsonl:2", "`id` is empty"),
        (b'{"id": "\\ud800", "text": "t"}', "in.jsonl:2", "`id` holds half of a surrogate pair"),
        (b'{"id": "x"}', "x", "line 2: `text` is missing"),
        (b'{"id": "x", "text": null}', "x", "`text` must be a string, got null"),
        (b'{"id": "x", "text": true}', "x", "`text` must be a string, got a boolean"),
        (b'{"id": "x", "text": "\\n"}', "x", "`text` is empty"),
        (b'{"id": "x", "text": "\\udc00"}', "x", "`text` holds half of a surrogate pair"),
        (b'{"id": "x", "text": "caf\xe9"}', "in.jsonl:2", "line 2: not UTF-8 but an older encoding"),
        (b'{"id": "x", "text": "a\0"}', "in.jsonl:2", "line 2: broken JSON"),
    ],
)
def test_one_broken_row_costs_only_itself(tmp_path: Path, line: bytes, document_id: str, reason: str) -> None:
    """A bad row in the middle is rejected with its line number; the rows around it are read."""
    # The first row is longer than what is looked at to tell text from other things.
    around = row("first", "x" * 5000).encode()
    path = put(tmp_path, "in.jsonl", around + line + b"\n" + row("last").encode())
    first, bad, last = read(path)
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert isinstance(bad, Rejected)
    assert bad.id == document_id
    assert bad.source == f"{path.as_posix()}:2"
    assert reason in bad.reason


def test_a_row_above_the_limit_is_passed_over(tmp_path: Path) -> None:
    """A row above the size limit is rejected without being held, and the next one is read."""
    path = put(tmp_path, "in.jsonl", row("a") + row("b", "x" * 3_000_000) + row("c"))
    tracemalloc.start()
    items = list(read_documents([path], max_bytes=1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(type(item), item.id) for item in items] == [
        (Document, "a"),
        (Rejected, "in.jsonl:2"),
        (Document, "c"),
    ]
    assert count_documents([path], max_bytes=1000) == 3
    assert peak < 1_000_000


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_at_the_limit_is_read(tmp_path: Path, end: str) -> None:
    """A row of exactly the limit is read, whatever its line end; one byte more is too large."""
    line = row().rstrip("\n")
    path = put(tmp_path, "in.jsonl", line + end + line + end)
    assert [type(item) for item in read_documents([path], max_bytes=len(line))] == [Document, Rejected]
    assert all("too large" in i.reason for i in read(path, max_bytes=len(line) - 1) if isinstance(i, Rejected))


def test_jsonl_of_another_encoding_is_rejected_once(tmp_path: Path) -> None:
    """A JSONL file that is no UTF-8 at all is one rejected file, not one per line."""
    path = put(tmp_path, "in.jsonl", (row() * 100).encode("utf-16"))
    assert "UTF-16" in only_reason(path)


def test_rows_in_a_folder_without_content(tmp_path: Path) -> None:
    """An empty JSONL file among others is rejected in its place."""
    put(tmp_path, "a.txt")
    put(tmp_path, "b.jsonl", "\n\n")
    first, second = read(tmp_path)
    assert isinstance(first, Document)
    assert second == Rejected("b.jsonl", (tmp_path / "b.jsonl").as_posix(), "it holds no row")


def test_one_id_twice_is_rejected_across_files(tmp_path: Path) -> None:
    """The second document with an id is rejected, naming both sources, in one file or several."""
    put(tmp_path, "a.jsonl", row("x") + row("x"))
    put(tmp_path, "b.jsonl", row("x") + row("new.txt"))
    put(tmp_path, "new.txt")
    items = read(tmp_path)
    rejected = [item for item in items if isinstance(item, Rejected)]
    assert ids(items) == ["x", "x", "x", "new.txt", "new.txt"]
    assert [item.source.rpartition("/")[2] for item in rejected] == ["a.jsonl:2", "b.jsonl:1", "new.txt"]
    for item, first in zip(rejected, ("a.jsonl:1", "a.jsonl:1", "b.jsonl:2"), strict=True):
        assert item.source in item.reason
        assert f"{tmp_path.as_posix()}/{first}`" in item.reason


def test_a_file_read_before_a_row_with_its_id_is_named(tmp_path: Path) -> None:
    """A row with the id of a file that was read before is rejected, naming that file's whole path."""
    first = put(tmp_path, "docs/sub/a.txt")
    rows = put(tmp_path, "rows.jsonl", row("docs/sub/a.txt"))
    _, second = read(tmp_path / "docs", rows)
    assert isinstance(second, Rejected)
    assert f"`{first.as_posix()}`" in second.reason


# HTML


def html(tmp_path: Path, content: str) -> str:
    """Read a page that is a document, and return its text."""
    path = put(tmp_path, "page.html", content)
    (item,) = read(path)
    assert isinstance(item, Document), item
    return item.text


def test_html_becomes_text_for_reading(tmp_path: Path) -> None:
    """The title comes first, scripts, styles and navigation go, entities are decoded, blocks become lines."""
    page = """<!DOCTYPE html><html><head><title> Tea &amp;
      Coffee </title><style>p { color: red }</style><script>alert("x < y")</script></head>
      <body><nav><a href="/">Home</a></nav><!-- no comment -->
      <h1>Caf&eacute;&nbsp;&lt;menu&gt;</h1><p>Black
         <b>tea</b>, green&#32;tea<br>and coffee</p>
      <div>One</div><div>Two<noscript>enable it</noscript></div><script>more()</script>
      <ul><li>sugar<li><p>milk</p><li></li></ul>
      <table><tr><th>Cup</th><td>2.50</td></tr><tr><td>Pot<td>4.00</table>
      <pre>
  keep
    this</pre><template><p>not this</p></template><svg><title>nor this</title></svg></body></html>"""
    assert html(tmp_path, page).split("\n") == [
        "Tea & Coffee",
        "",
        "Café <menu>",
        "",
        "Black tea, green tea",
        "and coffee",
        "",
        "One",
        "Two",
        "",
        "- sugar",
        "- milk",
        "",
        "Cup | 2.50",
        "Pot | 4.00",
        "",
        "  keep",
        "    this",
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("no markup &amp; no body", "no markup & no body"),
        ("<p>unclosed <b>bold <p>next", "unclosed bold\n\nnext"),
        ("<title>title only</title>", "title only"),
        ("a<script>if (a</b) {}</script>b", "ab"),
        ("&lt;script&gt;kept&lt;/script&gt;", "<script>kept</script>"),
        ("&#x1F600;&unknown;", "\U0001f600&unknown;"),
        ("<p>a</p></body></html><p>after", "a\n\nafter"),
    ],
)
def test_broken_html_is_read_as_a_browser_would(tmp_path: Path, content: str, text: str) -> None:
    """Pieces, unclosed elements and text in odd places come out as a browser shows them."""
    assert html(tmp_path, content) == text


def test_html_without_text_is_rejected(tmp_path: Path) -> None:
    """A page of nothing but scripts and navigation is rejected."""
    path = put(tmp_path, "page.htm", "<script>x</script><nav>y</nav><p> &nbsp; </p>")
    assert only_reason(path) == "no text is left once its markup is removed"


def test_deep_html_is_read(tmp_path: Path) -> None:
    """A page nested deeper than Python's stack is read, and one nested absurdly deep is rejected."""
    assert html(tmp_path, "<div>" * 3000 + "deep <b>" * 3000 + "x").startswith("deep deep")
    path = put(tmp_path, "absurd.html", "<div>" * 100_000 + "x")
    assert "nested more than 5,000 deep" in only_reason(path)


@settings(max_examples=150, deadline=None)
@given(st.text("<>/&;-!abpdivlscrt =\"'\n\xa0é", max_size=200))
def test_no_html_breaks_the_reader(content: str) -> None:
    """Any text at all can be read as HTML, and comes out without white space around it."""
    text = html_to_text(content)
    assert text == text.strip()
    assert "\n\n\n" not in text


def test_html_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `selectolax` an HTML file raises the error that names the command to install it."""
    monkeypatch.setitem(sys.modules, "selectolax.lexbor", None)
    path = put(tmp_path, "page.html", "<p>x")
    with pytest.raises(MissingExtraError, match=r'pip install "presort\[cli\]"'):
        list(read_documents([path]))


# What is refused at once


def refusals(folder: Path) -> Iterator[tuple[list[Path], str]]:
    """List inputs that make a run pointless, and what is said about them."""
    empty = folder / "empty"
    empty.mkdir()
    put(folder, "docs/sub/a.txt")
    put(folder, "other/b.pdf")
    put(folder, "other/c.docx")
    put(folder, "other/d.pdf")
    docs = folder / "docs"
    yield [], "no path was given"
    yield [folder / "missing"], "missing` does not exist"
    yield [docs, folder / "missing"], "missing` does not exist"
    yield [empty], "empty` holds no document: looked for .htm, .html, .jsonl, .markdown, .md, .ndjson, .rst"
    yield [folder / "other"], "other files there: 2 .pdf, 1 .docx"
    yield [put(folder, "none.jsonl", "")], "none.jsonl` is empty: write one"
    yield [put(folder, "blank.ndjson", "\n  \r\n")], "blank.ndjson` is empty"
    yield [docs, docs], "hold the same documents"
    yield [docs / "sub", docs], "hold the same documents"
    yield [docs / "sub/a.txt", folder / "other/b.pdf", docs], "hold the same documents"
    yield [Path("a\0b")], "cannot be used"


def test_hopeless_inputs_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    """Each hopeless input raises at the call, in one line that names the path; the counting agrees."""
    for paths, message in refusals(tmp_path):
        for call in (read_documents, count_documents):
            with pytest.raises(InputError) as caught:
                call(paths)
            assert message in str(caught.value)
            assert "\n" not in str(caught.value)


def test_paths_inside_one_another_are_fine_where_nothing_is_read_twice(tmp_path: Path) -> None:
    """A folder together with what it would skip is no overlap; what is behind such a path still is one."""
    put(tmp_path, "docs/a.txt")
    extra = put(tmp_path, "docs/README")
    hidden = put(tmp_path, "docs/.drafts/b.txt").parent
    items = read(tmp_path / "docs", extra, hidden)
    assert ids(items) == ["docs/a.txt", "README", ".drafts/b.txt"]
    with pytest.raises(InputError, match="same documents"):
        read_documents([tmp_path / "docs", hidden, tmp_path / "docs/a.txt"])


@posix
def test_special_paths_are_refused(tmp_path: Path) -> None:
    """A pipe, a device and a link to nothing are refused when they are given themselves."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")
    for path, message in (
        (tmp_path / "pipe", "save what it holds to a file first"),
        (Path(os.devnull), "neither a file nor a folder"),
        (tmp_path / "dangling", "is a link to nothing"),
    ):
        with pytest.raises(InputError, match=message):
            read_documents([path])


def test_the_output_as_input_is_refused(tmp_path: Path) -> None:
    """A path that is the run's own output is refused."""
    path = put(tmp_path, "records.jsonl", row())
    with pytest.raises(InputError, match="is the output of this run"):
        read_documents([path], exclude=[path])


def test_counting_gives_up_on_very_large_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit for counting the total is unknown, not wrong."""
    path = put(tmp_path, "in.jsonl", row("a") + row("b"))
    assert count_documents([path]) == 2
    monkeypatch.setattr(documents, "MAX_COUNTED_BYTES", 10)
    assert count_documents([path]) is None
