"""How the emulator counts tokens.

A token is four characters of text, rounded up per text; an image or a binary
document is a flat 1,500. No vendor counts like this. What matters is
that the count is the same for the same text, grows with it, and that
everything the emulator bills and reports comes from this one place.
"""

from __future__ import annotations

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_ATTACHMENT = 1_500


def count(text: str) -> int:
    """Count the tokens of a text."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def cut(text: str, limit: int) -> tuple[str, bool]:
    """Cut a text to at most `limit` tokens and say whether anything was cut."""
    if count(text) <= limit:
        return text, False
    return text[: limit * CHARACTERS_PER_TOKEN], True
