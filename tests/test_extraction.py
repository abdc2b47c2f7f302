from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presort.errors import InputError
from presort.indexing import extraction
from presort.indexing.documents import Document
from presort.indexing.extraction import (
    DEPARTMENTS,
    MAX_ANSWER_TOKENS,
    Classification,
    TooLargeError,
    estimate_tokens,
    instructions,
    parse,
    prompt,
    schema,
)

ANSWER: dict[str, Any] = {
    "departments": ["Sales"],
    "category": "Commerce",
    "subcategories": {"level1": "Retail", "level2": "Shops", "level3": ""},
    "languages": ["English"],
    "sentiment": "Neutral",
    "confidence_score": 0.8,
    "topics": ["shops", "prices", "opening hours"],
    "summary": "A list of shops.",
}


def answer(**changes: object) -> str:
    """Write a right answer with some fields changed."""
    return json.dumps(ANSWER | changes)


# Schema


def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Walk through every subschema."""
    yield node
    for child in node.get("properties", {}).values():
        yield from nodes(child)
    if "items" in node:
        yield from nodes(node["items"])


def test_schema_keeps_to_what_every_strict_mode_takes() -> None:
    """Every subschema has one plain type, and only keywords that all vendors' strict modes share."""
    for node in nodes(schema()):
        assert set(node) <= {"type", "properties", "required", "additionalProperties", "items", "enum"}
        assert node["type"] in {"object", "array", "string", "number"}
        if node["type"] == "object":
            assert node["additionalProperties"] is False
            assert node["required"] == list(node["properties"])
        if node["type"] == "array":
            assert "items" in node


def test_openai_client_finds_nothing_to_mend() -> None:
    """The OpenAI client's own strictening leaves the schema as it is."""
    pydantic_part = pytest.importorskip("openai.lib._pydantic")
    ours = schema()
    strict = pydantic_part._ensure_strict_json_schema(json.loads(json.dumps(ours)), path=(), root=ours)
    assert strict == ours


def test_schema_and_model_name_the_same_fields() -> None:
    """The schema's keys are the fields of `Classification`, in the order the instructions list them."""
    assert list(schema()["properties"]) == list(Classification.model_fields)
    headings = re.findall(r"^# ([a-z_]+)", instructions(), re.MULTILINE)
    assert headings == [name for name in Classification.model_fields if name != "subcategories"]


def test_schema_holds_the_departments_that_were_given() -> None:
    """The departments of the schema are the caller's, in the caller's order."""
    assert schema(["Zoo", "Aviary"])["properties"]["departments"]["items"]["enum"] == ["Zoo", "Aviary"]


# Instructions


def test_prefix_is_long_enough_to_be_cached() -> None:
    """Instructions and schema make 1,500 tokens at four characters each, with any list of departments."""
    for departments in (DEPARTMENTS, ("One",)):
        text = instructions(departments)
        assert len(text) >= 6_500
        assert (len(text) + len(json.dumps(schema(departments)))) / 4 >= 1_500


def test_prefix_is_the_same_for_all_documents() -> None:
    """Two documents differ in nothing but the document part of their prompt."""
    first = prompt(Document("a", "one", "x/a.txt"))
    second = prompt(Document("b", "two", "x/b.txt"))
    assert first.instructions.encode() == second.instructions.encode()
    assert json.dumps(first.schema) == json.dumps(second.schema)
    assert first.document != second.document


def test_prompt_tells_nothing_but_the_text() -> None:
    """Neither id nor source of a document is sent: equal texts are equal payloads."""
    assert prompt(Document("a", "one", "x")) == prompt(Document("b", "one", "y"))


def test_examples_are_right_answers() -> None:
    """Each example in the instructions is an answer that `parse` takes, and keeps to the summary's length."""
    blocks = re.findall(r"^</document>\n(.*)\n</example>$", instructions(), re.MULTILINE)
    assert len(blocks) == 3
    answers = [parse(block) for block in blocks]
    assert {item.sentiment for item in answers} == {"Positive", "Neutral", "Negative"}
    assert all(40 <= len(item.summary.split()) <= 120 for item in answers)


def test_every_department_is_offered() -> None:
    """The instructions list every department on a line of its own, whatever characters it has."""
    names = ["R&D {core}", "Ventes / Europe", "日本支社"]
    lines = instructions(names).split("\n")
    assert all(f"- {name}" in lines for name in names)


def test_examples_do_not_lead_astray() -> None:
    """With departments other than the examples', the instructions say that the list counts, and only then."""
    assert "organisation with other departments" in instructions(["Zoo"])
    assert "organisation with other departments" not in instructions()
    assert "organisation with other departments" not in instructions([*DEPARTMENTS, "Zoo"])


@pytest.mark.parametrize(
    ("departments", "message"),
    [
        ([], "is empty"),
        ([f"d{n}" for n in range(251)], "251 departments are too many"),
        (["Sales", " sales "], "`sales` is listed twice"),
        (["Sales", " "], "cannot name a department"),
        (["a\nb"], "cannot name a department"),
        (["x" * 101], "cannot name a department"),
    ],
)
def test_a_useless_list_of_departments_is_refused(departments: list[str], message: str) -> None:
    """A list that cannot be offered to a model raises before anything is sent."""
    for call in (instructions, schema, lambda names: prompt(Document("a", "b", "c"), names)):
        with pytest.raises(InputError, match=message):
            call(departments)


# Size


def test_a_document_is_measured_against_the_context() -> None:
    """A document may fill what instructions, schema and answer leave; one byte more is refused."""
    fixed = estimate_tokens(instructions()) + estimate_tokens(json.dumps(schema())) + MAX_ANSWER_TOKENS
    marks = len("<document>\n\n</document>")
    context = fixed + 1000
    fits = prompt(Document("a", "x" * (3000 - marks), "a"), context_tokens=context)
    assert fits.max_tokens == MAX_ANSWER_TOKENS
    with pytest.raises(TooLargeError, match=r"about 1,001 tokens, and 1,000 fit"):
        prompt(Document("a", "x" * (3001 - marks), "a"), context_tokens=context)


def test_a_context_smaller_than_the_instructions_takes_nothing() -> None:
    """A context smaller than the instructions refuses every document, with 0 and not less to spare."""
    with pytest.raises(TooLargeError, match=r"and 0 fit"):
        prompt(Document("a", "x", "a"), context_tokens=100)


def test_tokens_are_estimated_by_script() -> None:
    """Three letters of English are a token, and so is one character of Chinese."""
    assert [estimate_tokens(text) for text in ("", "abc", "abcd", "漢字", "é")] == [0, 1, 2, 2, 1]


# Answers


def test_a_right_answer_is_read() -> None:
    """An answer that fits is read as it is."""
    assert parse(answer()).model_dump() == ANSWER


@pytest.mark.parametrize("around", ["{}", "\n {}\n", "```json\n{}\n```", "```\n{}```", "```JSON {} ```\n"])
def test_a_fence_is_forgiven(around: str) -> None:
    """White space and a code fence around the JSON are ignored."""
    assert parse(around.replace("{}", answer())) == parse(answer())


def test_departments_are_matched_to_the_list() -> None:
    """Departments take the list's spelling; unknown and repeated ones go; three of the rest stay."""
    names = ["sales", "Astrology", " SALES ", 7, "it operations", "Procurement", "Recruiting"]
    assert parse(answer(departments=names)).departments == ["Sales", "IT Operations", "Procurement"]
    assert parse(answer(departments=["zoo"]), ["Zoo"]).departments == ["Zoo"]


def test_too_many_topics_are_cut() -> None:
    """Of more than six topics the first six count."""
    assert parse(answer(topics=list("abcdefgh"))).topics == list("abcdef")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the answer is empty"),
        ("```json\n```", "the answer is empty"),
        ("I cannot do that.", "not JSON: Expecting value at character 0"),
        (answer() + " Hope this helps!", "not JSON: Extra data"),
        ("Here it is:\n```json\n" + answer() + "\n```", "not JSON"),
        (answer()[:-1], "ends too early"),
        (answer()[:-5], "ends too early"),
        ("```json\n" + answer()[:60], "ends too early"),
        ("[" * 100_000, "not JSON"),
        ("[]", "must be a JSON object, got []"),
        ("null", "must be a JSON object, got null"),
        (answer(departments=["Astrology"]), '`departments`: none of ["Astrology"] is in the list'),
        (answer(departments=[]), "`departments`: none of [] is in the list"),
        (answer(departments="Sales"), '`departments`: input should be a valid list, got "Sales"'),
        (answer(category=" "), "`category`: string should have at least 1 character"),
        (answer(category=None), "`category`: input should be a valid string, got null"),
        (answer(subcategories={"level1": "x", "level2": ""}), "`subcategories.level3`: field required"),
        (answer(languages=[]), "`languages`: list should have at least 1 item"),
        (answer(sentiment="positive"), "`sentiment`: input should be 'Positive', 'Neutral' or 'Negative'"),
        (
            answer(confidence_score=1.01),
            "`confidence_score`: input should be less than or equal to 1, got 1.01",
        ),
        (answer(confidence_score=-1), "`confidence_score`: input should be greater than or equal to 0"),
        (answer(confidence_score="0.9"), "`confidence_score`: input should be a valid number"),
        (answer(confidence_score=True), "`confidence_score`: input should be a valid number"),
        (answer(confidence_score=float("nan")), "`confidence_score`: input should be a finite number"),
        (answer(topics=[]), "`topics`: list should have at least 1 item"),
        (answer(topics=["a", "b", 3]), "`topics.2`: input should be a valid string, got 3"),
        (answer(summary="\ud83d"), "`summary`: input should be a valid string"),
        (answer(mood="good"), "`mood`: extra inputs are not permitted"),
        (json.dumps({"departments": ["Sales"]}), "`category`: field required (and 6 more)"),
    ],
)
def test_a_wrong_answer_is_named(text: str, message: str) -> None:
    """An answer that does not fit raises `ValueError`, in one short line that names the field."""
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse(text)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_every_cut_answer_is_an_error() -> None:
    """An answer cut off anywhere never passes for a whole one."""
    whole = answer()
    for end in range(len(whole)):
        with pytest.raises(ValueError, match="answer"):
            parse(whole[:end])


@settings(max_examples=50, deadline=None)
@given(st.none() | st.booleans() | st.floats() | st.text() | st.lists(st.text() | st.lists(st.none())))
def test_no_answer_raises_anything_else(value: object) -> None:
    """Whatever stands in a field, the outcome is a `Classification` or a `ValueError`."""
    for name in ANSWER:
        try:
            parse(answer(**{name: value}))
        except ValueError as error:
            assert type(error) is ValueError  # noqa: PT017 - raising nothing is fine too


def test_departments_are_listed_once() -> None:
    """The default list holds 24 departments that are a valid list themselves."""
    assert len(DEPARTMENTS) == 24
    assert extraction._checked(DEPARTMENTS) == DEPARTMENTS
