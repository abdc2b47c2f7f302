"""HTML in, text for reading out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from presort.errors import MissingExtraError

if TYPE_CHECKING:
    from selectolax.lexbor import LexborHTMLParser, LexborNode

MAX_HTML_DEPTH = 5_000
"""Block elements inside one another. Parsing takes time with its square: 0.2 s here, minutes at 200,000."""

_DROPPED = frozenset(
    {
        "audio",
        "canvas",
        "datalist",
        "iframe",
        "math",
        "nav",
        "noscript",
        "object",
        "script",
        "select",
        "style",
        "svg",
        "template",
        "video",
    }
)
_BLOCKS = frozenset(
    {
        "address",
        "article",
        "aside",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "dialog",
        "div",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "header",
        "hgroup",
        "legend",
        "main",
        "search",
        "section",
        "summary",
        "tbody",
        "tfoot",
        "thead",
        "tr",
    }
)
_PARAGRAPHS = frozenset(
    {"blockquote", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "menu", "ol", "p", "pre", "table", "ul"}
)
_CELLS = frozenset({"td", "th"})
_BULLET = "- "

_NESTING = re.compile(
    r"<(/?)(?:address|article|aside|blockquote|center|details|dialog|dir|div|dl|fieldset|figcaption|figure"
    r"|footer|form|header|hgroup|main|menu|nav|ol|search|section|summary|ul)\b",
    re.IGNORECASE,
)
_SPACES = re.compile(r"[ \t\n\r\f\xa0]+")


def html_to_text(html: str) -> str:
    """Turn HTML into text for reading: the title, then the body with a line break at every block element.

    Scripts, styles, navigation and embedded media are left out, entities are decoded, white space is
    collapsed except in `<pre>`, list items begin with `- `, the cells of a table row are separated by ` | `.

    Raises:
        MissingExtraError: `selectolax` is not installed.
        ValueError: It is nested too deep to be parsed in reasonable time.
    """
    if _depth(html) > MAX_HTML_DEPTH:
        raise ValueError(f"its elements are nested more than {MAX_HTML_DEPTH:,} deep: mend the HTML")
    page = _html_parser()(html)
    title = page.head.css_first("title") if page.head is not None else None
    heading = _SPACES.sub(" ", title.text()).strip() if title is not None else ""
    lines = _Lines()
    if page.body is not None:
        for node, entering in _walk(page.body):
            if node.is_text_node:
                lines.add(node.text_content or "")
            else:
                lines.cross(node.tag or "", entering=entering)
    body = lines.text()
    return "\n\n".join(part for part in (heading, body) if part)


def _html_parser() -> type[LexborHTMLParser]:
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError as error:
        raise MissingExtraError('HTML files need `selectolax`: pip install "presort[cli]"') from error
    return LexborHTMLParser


def _depth(html: str) -> int:
    """Estimate how deep block elements are nested, without building the tree."""
    depth = deepest = 0
    for tag in _NESTING.finditer(html):
        depth = max(0, depth - 1) if tag[1] else depth + 1
        deepest = max(deepest, depth)
    return deepest


class _Lines:
    """Lines of text, made from a page's text nodes and the borders of its elements."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._line: list[str] = []
        self._preformatted = 0

    def add(self, text: str) -> None:
        """Append to the line."""
        if not self._preformatted:
            self._line.append(text)
            return
        first, *rest = text.split("\n")
        self._line.append(first)
        for line in rest:
            self._end_line()
            self._line.append(line)

    def cross(self, tag: str, *, entering: bool) -> None:
        """Pass the beginning or the end of an element."""
        if tag in _PARAGRAPHS:
            self._end_paragraph()
            if tag == "pre":
                self._preformatted += 1 if entering else -1
        elif tag in _BLOCKS or (tag == "br" and entering):
            self._end_line()
        elif tag == "li":
            self._end_line()
            self._line = [_BULLET] if entering else []
        elif tag in _CELLS and entering and "".join(self._line).strip():
            self._line.append(" | ")

    def text(self) -> str:
        """Return all lines, with one blank line at most between two."""
        self._end_line()
        return re.sub(r"\n{3,}", "\n\n", "\n".join(self._lines)).strip()

    def _end_line(self) -> None:
        text = "".join(self._line)
        if self._line[:1] == [_BULLET] and text.strip() == _BULLET.strip():
            return  # The item's text comes in a block of its own.
        self._line = []
        text = text.rstrip() if self._preformatted else _SPACES.sub(" ", text).strip()
        if text or self._preformatted:
            self._lines.append(text)

    def _end_paragraph(self) -> None:
        self._end_line()
        if not self._line and self._lines and self._lines[-1]:
            self._lines.append("")


def _walk(root: LexborNode) -> Iterator[tuple[LexborNode, bool]]:
    """Yield elements on entering (`True`) and on leaving them (`False`), text nodes once, dropped ones never.

    A loop and not a recursion: pages may be nested deeper than Python's stack.
    """
    node = root
    while True:
        kept = node.tag not in _DROPPED
        if kept:
            yield node, True
            child = node.child
            if child is not None:
                node = child
                continue
        while True:
            if kept and not node.is_text_node:
                yield node, False
            parent, following = node.parent, node.next
            if node.mem_id == root.mem_id or parent is None:
                return
            if following is not None:
                node = following
                break
            node, kept = parent, True
