"""Makes a text that matches a regular expression.

A word of the document if one fits, otherwise a text built from the parsed expression.
"""

from __future__ import annotations

import importlib
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

_PARSER: Any = importlib.import_module("re._parser")
_ALPHABET = string.ascii_lowercase + string.digits + string.ascii_uppercase + "-_ .,:/@#"
_CLASSES = {
    "DIGIT": r"\d",
    "WORD": r"\w",
    "SPACE": r"\s",
    "NOT_DIGIT": r"\D",
    "NOT_WORD": r"\W",
    "NOT_SPACE": r"\S",
}


def example(pattern: str, words: Iterable[str], least: int = 0, most: int | None = None) -> str:
    """A text that the pattern finds, `least` to `most` characters long where that is possible."""
    try:
        expression, parsed = re.compile(pattern), _PARSER.parse(pattern)
    except re.error:
        return "EMULATED"
    for word in words:
        if least <= len(word) <= (most or len(word)) and expression.search(word):
            return word
    for generous in range(20):
        text = "".join(_part(token, generous) for token in parsed)
        if len(text) >= least and expression.search(text):
            return text
    return "EMULATED"


def _part(token: tuple[Any, Any], generous: int) -> str:  # noqa: PLR0911 - one per kind of token
    operation, argument = token
    match str(operation):
        case "LITERAL":
            return chr(argument)
        case "NOT_LITERAL":
            return next(character for character in _ALPHABET if ord(character) != argument)
        case "ANY":
            return "a"
        case "IN":
            return _one_of(argument)
        case "CATEGORY":
            return _one_of([(operation, argument)])
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            least, most, inner = argument
            times = min(int(most), max(int(least), 1) + generous)
            return "".join("".join(_part(token, 0) for token in inner) for _ in range(times))
        case "SUBPATTERN":
            return "".join(_part(token, generous) for token in argument[-1])
        case "ATOMIC_GROUP":
            return "".join(_part(token, generous) for token in argument)
        case "BRANCH":
            return "".join(_part(token, generous) for token in argument[1][0])
        case _:
            return ""


def _one_of(choices: Sequence[tuple[Any, Any]]) -> str:
    negated = str(choices[0][0]) == "NEGATE"
    for character in _ALPHABET:
        if any(_fits(character, choice) for choice in choices[negated:]) != negated:
            return character
    operation, argument = choices[0]
    return chr(argument[0] if str(operation) == "RANGE" else argument) if not negated else "~"


def _fits(character: str, choice: tuple[Any, Any]) -> bool:
    operation, argument = choice
    match str(operation):
        case "LITERAL":
            return ord(character) == int(argument)
        case "RANGE":
            return int(argument[0]) <= ord(character) <= int(argument[1])
        case "CATEGORY":
            name = str(argument).removeprefix("CATEGORY_")
            return re.match(_CLASSES[name], character) is not None
        case _:
            return False
