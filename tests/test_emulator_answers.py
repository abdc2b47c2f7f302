from __future__ import annotations

import json
import re
from typing import Any

import pytest

from presort.emulator.answers import Document, plain, stop_at
from presort.emulator.instances import instance
from presort.emulator.patterns import example

jsonschema = pytest.importorskip("jsonschema")

TEXT = """Summarise the document.

<document>
Solar panels spread across Portugal in 2024. Rooftop panels paid for themselves in six years, said the ministry.
The grid operator warned of losses! Storage remains expensive; a report on storage follows.
</document>"""

TREE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "children": {"type": "array", "items": {"$ref": "#"}},
        "parent": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "children", "parent"],
    "additionalProperties": False,
}

SCHEMAS: dict[str, Any] = {
    "const": {"const": {"a": [1]}},
    "enum": {"enum": ["x", 3, None]},
    "string": {"type": "string"},
    "long string": {"type": "string", "minLength": 5_000, "maxLength": 5_000},
    "short string": {"type": "string", "maxLength": 3},
    "empty string": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": r"^[A-Z]{2}-\d{3,}(x|y)?$"},
    "pattern and length": {"type": "string", "pattern": "^[a-f0-9]+$", "minLength": 12},
    "integer range": {"type": "integer", "minimum": 3, "maximum": 4},
    "integer exclusive": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
    "integer multiple": {"type": "integer", "minimum": 8, "maximum": 14, "multipleOf": 7},
    "integer fractional bounds": {"type": "integer", "minimum": 0.5, "maximum": 1.5},
    "number range": {"type": "number", "minimum": -0.001, "maximum": 0.001},
    "number exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "number multiple": {"type": "number", "multipleOf": 0.01, "minimum": 2},
    "only a maximum": {"type": "integer", "maximum": -5},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "nullable": {"type": ["string", "null"]},
    "nullable enum": {"type": ["string", "null"], "enum": ["report", None]},
    "array": {"type": "array", "items": {"type": "string"}, "minItems": 7},
    "array at most": {"type": "array", "items": {"type": "string"}, "maxItems": 1},
    "empty array": {"type": "array", "items": {"type": "string"}, "maxItems": 0},
    "unique": {"type": "array", "items": {"enum": ["a", "b", "c", "d"]}, "minItems": 4, "uniqueItems": True},
    "unique integers": {
        "type": "array",
        "items": {"type": "integer", "minimum": 1, "maximum": 5},
        "minItems": 5,
        "uniqueItems": True,
    },
    "same items": {"type": "array", "items": {"const": 1}, "minItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
    "object": {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {"type": "number"}}, "required": ["b"]}},
        "required": ["a"],
    },
    "undeclared required": {"type": "object", "required": ["x"], "additionalProperties": {"type": "integer"}},
    "dictionary": {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 2},
    "definitions": {
        "$defs": {"part": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
        "type": "object",
        "properties": {"parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "minItems": 2}},
        "required": ["parts"],
    },
    "any of": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 9}]},
    "one of": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]},
            {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]},
        ]
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 5}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 6}, "b": {"type": "string"}}, "required": ["b"]},
        ]
    },
    "recursive": TREE,
    **{name: {"type": "string", "format": name} for name in (
        "date", "date-time", "time", "duration", "email", "uri", "hostname", "uuid", "ipv4", "ipv6")},
}  # fmt: skip


@pytest.mark.parametrize(
    "text", [TEXT, "", "...", "猫 は 寝る", "x" * 10_000], ids=["document", "empty", "dots", "cats", "x"]
)
@pytest.mark.parametrize("name", SCHEMAS)
def test_instances_obey_their_schema(name: str, text: str) -> None:
    """Whatever the text, the instance of a schema is valid under it, formats included, and stays the same."""
    schema = SCHEMAS[name]
    value = instance(schema, Document(text))

    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)
    assert value == instance(schema, Document(text))
    json.dumps(value)


def record(**properties: Any) -> Any:
    """Fill an object with these properties."""
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return instance(schema, Document(TEXT))


def test_strings_come_from_the_document() -> None:
    """A title is the document's first sentence, not the instruction's, and topics are its frequent words."""
    made = record(title={"type": "string"}, topics={"type": "array", "items": {"type": "string"}})

    assert "Solar panels spread across Portugal in 2024." == made["title"]
    assert ["panels", "storage"] == sorted(made["topics"][:2])
    assert 3 == len(made["topics"])


def test_names_guide_values() -> None:
    """A language is English, and a confidence lies between a half and one, on whatever scale."""
    made = record(
        language={"type": "string"},
        confidence={"type": "number", "minimum": 0, "maximum": 1},
        confidence_score={"type": "number"},
        confidence_percent={"type": "integer", "minimum": 0, "maximum": 100},
    )

    assert "English" == made["language"]
    assert 0.5 <= made["confidence"] <= 0.99
    assert 0.5 <= made["confidence_score"] <= 0.99
    assert 50 <= made["confidence_percent"] <= 99


def test_enum_by_the_text() -> None:
    """Of an enum the value that the document mentions is chosen."""
    assert "report" == instance({"enum": ["letter", "invoice", "report"]}, Document(TEXT))
    assert "grid_operator" == instance({"enum": ["mayor", "grid_operator"]}, Document(TEXT))


def test_length_cuts_at_a_word() -> None:
    """A string is shortened to `maxLength` between words where that is possible."""
    assert "Solar panels spread" == record(title={"type": "string", "maxLength": 20})["title"]


@pytest.mark.parametrize(
    "pattern", [r"^\d{4}-\d{2}$", "^(foo|bar)+$", r"^[^a-z]{3}$", r"\w+@\w+\.com", "^$", "^[A-Z]?x.y$", "^a{2,3}b*$"]
)
def test_patterns(pattern: str) -> None:
    """An example of a pattern matches it."""
    assert re.search(pattern, example(pattern, ["word"]))


def test_plain_answers() -> None:
    """A free answer begins with EMULATED and quotes the document, not the instructions."""
    text = plain(Document(TEXT))

    assert text.startswith("EMULATED")
    assert "Solar panels spread" in text
    assert "Summarise" not in text


def test_earliest_stop_sequence() -> None:
    """Of several stop sequences the first in the text cuts it."""
    assert ("one ", "two") == stop_at("one two three", ["three", "two"])
    assert ("one", None) == stop_at("one", ["x", ""])
