"""Fills a JSON schema with values taken from a document.

Covers what vendors' structured output allows and a little more: objects, arrays
(tuples too), strings with lengths, formats and patterns, numbers with ranges and
multiples, enums, constants, references, unions and intersections. `not`,
`if` and the dependency keywords are ignored.
"""

from __future__ import annotations

import json
import math
import uuid
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any, Final
from urllib.parse import unquote

from presort.emulator.answers import Document
from presort.emulator.patterns import example

Schema = dict[str, Any]

SENTENCE_NAMES: Final = tuple(
    """
    title headline subject summary abstract description content text answer reason explanation comment note
    quote evidence overview message question
    """.split()
)
WORD_NAMES: Final = (
    "keyword",
    "topic",
    "tag",
    "categor",
    "entit",
    "name",
    "term",
    "concept",
    "label",
    "theme",
)
SURE_NAMES: Final = ("confidence", "probability", "certainty", "relevance")
SHALLOW: Final = 5
"""Below this depth only what is required is filled, so that recursive schemas end."""

ANYTHING: Final[Schema] = {"type": "string"}


def instance(schema: Any, document: Document) -> Any:
    """A value that obeys the schema."""
    return _Filler(schema, document).fill(schema, "", (), 0)


class _Filler:
    def __init__(self, root: Any, document: Document) -> None:
        self.root = root
        self.document = document

    def fill(self, schema: Any, name: str, path: tuple[object, ...], depth: int) -> Any:
        schema = self._flatten(schema, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._enum(schema["enum"], path)
        match _kind(schema):
            case "object":
                value: Any = self._object(schema, path, depth)
            case "array":
                value = self._array(schema, name, path, depth)
            case "integer":
                value = int(self._number(schema, name, path, whole=True))
            case "number":
                value = float(self._number(schema, name, path, whole=False))
            case "boolean":
                value = self.document.number(path) % 2 == 0
            case "null":
                value = None
            case _:
                value = self._string(schema, name, path)
        return value

    # References, unions, intersections

    def _flatten(self, schema: Any, depth: int) -> Schema:
        if not isinstance(schema, dict):
            return ANYTHING
        for _ in range(100):
            if "$ref" in schema:
                rest = {key: value for key, value in schema.items() if key != "$ref"}
                schema = _merge(self._resolve(schema["$ref"]), rest)
            elif "allOf" in schema:
                parts = [self._flatten(part, depth) for part in schema["allOf"]]
                schema = {key: value for key, value in schema.items() if key != "allOf"}
                for part in parts:
                    schema = _merge(part, schema)
            elif options := schema.get("anyOf") or schema.get("oneOf"):
                rest = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf")}
                schema = _merge(self._choose(options, depth), rest)
            else:
                break
        else:
            return {"type": "null"}
        return dict(schema)

    def _resolve(self, reference: str) -> Schema:
        found: Any = self.root
        for part in reference.removeprefix("#").split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            found = found[int(key)] if isinstance(found, list) else found.get(key, {})
        return found if isinstance(found, dict) else ANYTHING

    def _choose(self, options: list[Any], depth: int) -> Schema:
        usable = [option for option in options if isinstance(option, dict)] or [ANYTHING]
        if depth >= SHALLOW:
            return min(usable, key=lambda option: "$ref" in option or _kind(option) in ("object", "array"))
        return next((option for option in usable if _kind(option) != "null"), usable[0])

    # Containers

    def _object(self, schema: Schema, path: tuple[object, ...], depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        extra = schema.get("additionalProperties")
        names = [name for name in properties if name in required or depth < SHALLOW]
        names += [name for name in required if name not in properties]
        missing = schema.get("minProperties", 0) - len(names)
        spare = [*self.document.keywords, *(f"key_{n}" for n in range(max(0, missing)))]
        names += [name for name in spare if name not in names][: max(0, missing)]
        return {name: self.fill(properties.get(name, extra), name, (*path, name), depth + 1) for name in names}

    def _array(self, schema: Schema, name: str, path: tuple[object, ...], depth: int) -> list[Any]:
        first = schema.get("prefixItems", [])
        least = schema.get("minItems", 0)
        most = schema.get("maxItems", max(least, len(first), 3))
        wanted = least if depth >= SHALLOW else max(least, min(most, max(3, len(first))))
        items = schema.get("items", ANYTHING)
        if items is False:
            wanted = min(wanted, len(first))
        values: list[Any] = []
        seen: set[str] = set()
        for salt in range(wanted * 20):
            if len(values) == wanted:
                break
            element = first[len(values)] if len(values) < len(first) else items
            value = self.fill(element, name, (*path, salt), depth + 1)
            text = json.dumps(value, sort_keys=True)
            if text in seen and schema.get("uniqueItems", isinstance(value, str)):
                continue
            seen.add(text)
            values.append(value)
        while len(values) < least and not schema.get("uniqueItems"):
            values.append(values[-1])
        return values

    # Scalars

    def _enum(self, values: list[Any], path: tuple[object, ...]) -> Any:
        salt = next((part for part in reversed(path) if isinstance(part, int)), 0)
        said = [value for value in values if isinstance(value, str) and self._says(value)]
        if salt < len(said):
            return said[salt]
        usable = [value for value in values if value is not None] or values
        return usable[(self.document.number(path) + salt) % len(usable)]

    def _says(self, value: str) -> bool:
        words = value.lower().replace("_", " ").replace("-", " ").split()
        return bool(words) and all(word in self.document.vocabulary for word in words)

    def _string(self, schema: Schema, name: str, path: tuple[object, ...]) -> str:
        if "format" in schema and (made := self._format(schema["format"], path)) is not None:
            return made
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if "pattern" in schema:
            return example(schema["pattern"], [*self.document.keywords, *self.document.words[:50]], least, most)
        text = self._text(name.lower(), path)
        while len(text) < least:
            text = f"{text} {self.document.text or 'EMULATED'}"[: max(least, most or least)].ljust(least, ".")
        if most is not None and len(text) > most:
            whole = text[: most + 1].rsplit(" ", 1)[0]
            text = whole if least <= len(whole) <= most else text[:most]
        return text

    def _text(self, name: str, path: tuple[object, ...]) -> str:
        salt = next((part for part in reversed(path) if isinstance(part, int)), 0)
        document = self.document
        if "language" in name:
            return "English"
        if any(part in name for part in WORD_NAMES):
            return document.keywords[salt % len(document.keywords)]
        if any(part in name for part in SENTENCE_NAMES):
            return document.sentences[salt % len(document.sentences)][:300]
        start = (document.number(name) + salt * 3) % len(document.words)
        return " ".join(document.words[start : start + 3])

    def _format(self, name: str, path: tuple[object, ...]) -> str | None:
        number = self.document.number(path)
        word = "".join(filter(str.isascii, self.document.keywords[0])).strip("'-") or "emulated"
        moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number % 400_000)
        made = {
            "date": moment.strftime("%Y-%m-%d"),
            "date-time": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "time": moment.strftime("%H:%M:%SZ"),
            "duration": f"P{number % 30 + 1}D",
            "email": f"{word}@example.com",
            "uri": f"https://example.com/{word}",
            "url": f"https://example.com/{word}",
            "hostname": f"{word}.example.com",
            "uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, str(number))),
            "ipv4": f"192.0.2.{number % 254 + 1}",
            "ipv6": f"2001:db8::{number % 65_535:x}",
        }
        return made.get(name)

    def _number(self, schema: Schema, name: str, path: tuple[object, ...], *, whole: bool) -> Fraction:
        step = Fraction(str(schema["multipleOf"])) if schema.get("multipleOf") else None
        if whole:
            step = Fraction(step.numerator) if step else Fraction(1)
        low, high = _bounds(schema)
        if any(part in name.lower() for part in SURE_NAMES):
            low, high = _sure(low, high)
        span = 9 * (step or 1)
        if low is None:
            low = (step or Fraction(1)) if high is None else high - span
        if high is None:
            high = low + span
        chance = Fraction(self.document.number(path, name) % 998 + 1, 1_000)
        if step is None:
            value = low + (high - low) * chance
            rounded = round(value, 2)
            return rounded if low < rounded < high else value
        least, most = math.ceil(low / step), math.floor(high / step)
        least += "exclusiveMinimum" in schema and least * step == low
        most -= "exclusiveMaximum" in schema and most * step == high
        size = max(1, most - least + 1)
        multiples = [step * (least + (math.floor(size * chance) + n) % size) for n in range(min(size, 20))]
        # validators divide floats, so not every decimal multiple passes for one
        return next((each for each in multiples if (float(each) / float(step)).is_integer()), multiples[0])


def _kind(schema: Schema) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((each for each in kind if each != "null"), "null")
    if kind is not None:
        return str(kind)
    if "properties" in schema or "required" in schema:
        return "object"
    if "items" in schema or "prefixItems" in schema:
        return "array"
    if schema.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}:
        return "number"
    return "string"


def _merge(base: Schema, more: Schema) -> Schema:
    """Both schemas at once."""
    merged = {**base, **more}
    if "properties" in base and "properties" in more:
        shared = base["properties"].keys() & more["properties"].keys()
        both = {name: {"allOf": [base["properties"][name], more["properties"][name]]} for name in shared}
        merged["properties"] = {**base["properties"], **more["properties"], **both}
    if "required" in base and "required" in more:
        merged["required"] = list(dict.fromkeys([*base["required"], *more["required"]]))
    if "enum" in base and "enum" in more:
        merged["enum"] = [value for value in base["enum"] if value in more["enum"]]
    for key, choose in {"minimum": max, "minLength": max, "minItems": max}.items():
        if key in base and key in more:
            merged[key] = choose(base[key], more[key])
    for key in ("maximum", "maxLength", "maxItems"):
        if key in base and key in more:
            merged[key] = min(base[key], more[key])
    return merged


def _bounds(schema: Schema) -> tuple[Fraction | None, Fraction | None]:
    lows = [Fraction(str(schema[key])) for key in ("minimum", "exclusiveMinimum") if _is_number(schema.get(key))]
    highs = [Fraction(str(schema[key])) for key in ("maximum", "exclusiveMaximum") if _is_number(schema.get(key))]
    return max(lows, default=None), min(highs, default=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sure(low: Fraction | None, high: Fraction | None) -> tuple[Fraction | None, Fraction | None]:
    """Narrow a range to its upper half, as a model sure of itself would."""
    if low is None and high is None:
        return Fraction(1, 2), Fraction(99, 100)
    if low is None or high is None:
        return low, high
    return low + (high - low) / 2, high - (high - low) / 100
