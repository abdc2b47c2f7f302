"""What the emulated models say: a function of the prompt and nothing else.

Free text begins with EMULATED and quotes the prompt. Where a JSON schema must be
obeyed, `instances.py` fills it from a `Document`.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property
from zlib import crc32

QUOTED_CHARACTERS = 160
READ_CHARACTERS = 4_000
"""How much of a long document is looked at."""

_ELEMENT = re.compile(r"<(\w[\w-]*)[^<>]*>(.*?)</\1>", re.DOTALL)
_LABEL = re.compile(
    r"^\s*(?:the )?(?:document|text|input|content|article|transcript)\s*:\s*", re.IGNORECASE | re.MULTILINE
)
_WORD = re.compile(r"[^\W\d_][\w'-]*")
_SENTENCE = re.compile(r"[^.!?\n]*[^.!?\s][^.!?\n]*[.!?]*")
_COMMON = frozenset(
    """
    about after also and any are been before but can could does each for from had has have her his how into
    its may more most not one only other our out over she should some such than that the their them then there
    these they this those through under was were what when where which while who will with would you your
    """.split()
)


class Document:
    """The text an answer is made of: the last user message, or the part of it that is the document.

    Instructions are told apart from a document where the prompt does so, by an element
    such as `<document>...</document>` or a line such as `Text:`.
    """

    def __init__(self, prompt: str) -> None:
        self.text = _inner(prompt).strip()[:READ_CHARACTERS] or "EMULATED"
        self.seed = crc32(prompt.encode("utf-8", "surrogatepass"))

    @cached_property
    def words(self) -> list[str]:
        """All words in order."""
        return _WORD.findall(self.text) or ["EMULATED"]

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """All words in lower case."""
        return frozenset(_WORD.findall(self.text.lower()))

    @cached_property
    def sentences(self) -> list[str]:
        """All sentences in order."""
        return [" ".join(sentence.split()) for sentence in _SENTENCE.findall(self.text)] or [self.text]

    @cached_property
    def keywords(self) -> list[str]:
        """Words that say what it is about, most frequent first."""
        said = [word.lower() for word in self.words if len(word) > 3]
        counted = Counter(word for word in said if word not in _COMMON)
        return [word for word, _ in counted.most_common(20)] or [self.words[0].lower()]

    def number(self, *salt: object) -> int:
        """A number that depends on the prompt and the salt only."""
        return crc32(repr(salt).encode("utf-8", "surrogatepass"), self.seed)


def _inner(prompt: str) -> str:
    if elements := [match.group(2) for match in _ELEMENT.finditer(prompt)]:
        return max(elements, key=len)
    label = _LABEL.search(prompt)
    return prompt[label.end() :] if label else prompt


def plain(document: Document) -> str:
    """Answer in free text."""
    quoted = " ".join(document.text[:QUOTED_CHARACTERS].split())
    return f'EMULATED answer. You wrote: "{quoted}"'


def stop_at(text: str, sequences: list[str]) -> tuple[str, str | None]:
    """Cut a text before the first stop sequence in it, and say which that was."""
    found = [(place, sequence) for sequence in sequences if sequence and (place := text.find(sequence)) >= 0]
    if not found:
        return text, None
    place, sequence = min(found)
    return text[:place], sequence
