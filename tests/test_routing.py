"""Which way a request goes, and the names it goes by."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from presort.config import Batching
from presort.request import (
    BatchKey,
    Outcome,
    OutcomeKind,
    Payload,
    Route,
    Usage,
    custom_id,
    split_custom_id,
)
from presort.routing import (
    MAX_BATCH_ATTEMPTS,
    RETRYABLE_STATUSES,
    Choice,
    Step,
    choose_route,
    cut,
    flush_due,
    next_step,
)

ON = Batching()
OFF = Batching(enabled=False)
NO_FALLBACK = Batching(fallback=False)

ids = st.text("0123456789abcdef", min_size=32, max_size=32)


# -- choose_route --------------------------------------------------------------------------------------------------
def choose(
    wanted: Route = Route.BATCH,
    unbatchable: str | None = None,
    has_batch_api: bool = True,
    seconds_left: float = 60.0,
    batching: Batching = ON,
) -> Choice:
    """Choose for a call that may batch, but for what is given."""
    return choose_route(
        wanted, unbatchable=unbatchable, has_batch_api=has_batch_api, seconds_left=seconds_left, batching=batching
    )


@pytest.mark.parametrize(
    ("expected", "given_"),
    [
        (Choice(Route.BATCH), {}),
        (Choice(Route.STANDARD, "batching is switched off"), {"batching": OFF}),
        (Choice(Route.STANDARD, "it streams"), {"unbatchable": "it streams"}),
        (Choice(Route.STANDARD, "no Batch API at this base URL"), {"has_batch_api": False}),
        (Choice(Route.STANDARD, "the deadline has passed"), {"seconds_left": 0}),
        (Choice(Route.STANDARD, "the deadline has passed"), {"seconds_left": -1}),
        (Choice(Route.BATCH), {"seconds_left": 1e-9}),
        (Choice(Route.BATCH), {"batching": NO_FALLBACK}),
    ],
)
def test_choose_route(expected, given_):
    """A batch is chosen unless something speaks against it, and then the reason says what."""
    assert expected == choose(**given_)


@given(st.none() | st.text(), st.booleans(), st.floats(allow_nan=False), st.sampled_from([ON, OFF, NO_FALLBACK]))
def test_standard_is_never_argued_with(unbatchable, has_batch_api, seconds_left, batching):
    """Who wanted the standard route gets it, without a reason, whatever else holds."""
    chosen = choose(Route.STANDARD, unbatchable, has_batch_api, seconds_left, batching)

    assert Choice(Route.STANDARD) == chosen


@given(st.none() | st.text(), st.booleans(), st.floats(allow_nan=False), st.sampled_from([ON, OFF, NO_FALLBACK]))
def test_a_fallback_has_a_reason(unbatchable, has_batch_api, seconds_left, batching):
    """A batch that was wanted and not chosen always has a reason; one that was chosen has none."""
    chosen = choose(Route.BATCH, unbatchable, has_batch_api, seconds_left, batching)

    assert (chosen.route is Route.STANDARD) == (chosen.reason is not None)


# -- next_step -----------------------------------------------------------------------------------------------------
def outcome(kind: OutcomeKind, status: int = 200) -> Outcome:
    """Make an outcome."""
    return Outcome(kind, status, b"")


SUCCEEDED = outcome(OutcomeKind.SUCCEEDED)
INVALID = outcome(OutcomeKind.ERRORED, 400)
BROKEN = outcome(OutcomeKind.ERRORED, 500)
EXPIRED = outcome(OutcomeKind.EXPIRED, 504)
CANCELLED = outcome(OutcomeKind.CANCELLED, 504)
LAST = MAX_BATCH_ATTEMPTS - 1


@pytest.mark.parametrize(
    ("expected", "of", "attempt", "left", "batching"),
    [
        (Step.FINAL, SUCCEEDED, 0, 60, ON),
        (Step.FINAL, SUCCEEDED, 0, -60, ON),
        (Step.FINAL, INVALID, 0, 60, ON),
        (Step.FINAL, INVALID, LAST, 0, ON),
        (Step.REBATCH, BROKEN, 0, 60, ON),
        (Step.REBATCH, EXPIRED, 0, 60, ON),
        (Step.REBATCH, CANCELLED, 0, 60, ON),
        (Step.REBATCH, EXPIRED, LAST - 1, 60, ON),
        (Step.REBATCH, EXPIRED, 0, 60, NO_FALLBACK),
        (Step.STANDARD, EXPIRED, LAST, 60, ON),
        (Step.STANDARD, BROKEN, LAST, 60, ON),
        (Step.STANDARD, EXPIRED, 0, 0, ON),
        (Step.STANDARD, CANCELLED, 0, -1, ON),
        (Step.STANDARD, EXPIRED, 0, 60, OFF),
        (Step.FINAL, EXPIRED, LAST, 60, NO_FALLBACK),
        (Step.FINAL, BROKEN, 0, 0, NO_FALLBACK),
    ],
)
def test_next_step(expected, of, attempt, left, batching):
    """What was answered or is invalid is final; the rest is batched again in time, then sent, or else stands."""
    assert expected is next_step(of, attempt=attempt, seconds_left=left, batching=batching)


@pytest.mark.parametrize("status", range(400, 600))
def test_which_statuses_are_sent_again(status):
    """Exactly the statuses that the official clients retry are sent again."""
    step = next_step(outcome(OutcomeKind.ERRORED, status), attempt=0, seconds_left=60, batching=ON)

    assert (Step.REBATCH if status in {408, 409, 425, 429, 500, 502, 503, 504, 529} else Step.FINAL) is step


@given(
    st.builds(outcome, st.sampled_from(OutcomeKind), st.sampled_from([200, 400, 404, *RETRYABLE_STATUSES])),
    st.integers(0, 99),
    st.floats(allow_nan=False),
    st.sampled_from([ON, OFF, NO_FALLBACK]),
)
def test_nothing_goes_round_for_ever(of, attempt, left, batching):
    """However often a request comes back it is batched at most so many times, and never late."""
    step = next_step(of, attempt=attempt, seconds_left=left, batching=batching)

    assert step is not Step.REBATCH or (attempt < LAST and left > 0 and batching.enabled)
    assert step is not Step.STANDARD or batching.fallback
    assert step is Step.FINAL or not of.succeeded


# -- flush_due -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("expected", "waiting", "age"),
    [
        (False, 0, 1000),
        (False, 1, 0),
        (False, 1, 29.9),
        (True, 1, 30),
        (True, 1, 31),
        (False, 99, 29.9),
        (True, 100, 0),
        (True, 101, 0),
    ],
)
def test_flush_due(expected, waiting, age):
    """Calls that trickle in are sent at the 100th, or 30 s after the oldest came, whichever is first."""
    assert expected is flush_due(waiting=waiting, oldest_at=1000.0, now=1000.0 + age, batching=ON)


@given(st.integers(0, 10_000), st.floats(0, 1e9), st.floats(0, 1e6))
def test_flush_due_stays_due(waiting, oldest_at, age):
    """What is due stays due when time passes or more calls come."""
    now = oldest_at + age
    due = flush_due(waiting=waiting, oldest_at=oldest_at, now=now, batching=ON)

    assert not due or flush_due(waiting=waiting + 1, oldest_at=oldest_at, now=now + 1, batching=ON)


# -- cut -----------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 10), st.integers(1, 100))
@example([], 1, 1)
@example([101], 10, 100)
@example([50, 50, 1], 10, 100)
def test_cut(sizes, max_requests, max_bytes):
    """A cut loses and reorders nothing, and no batch is empty or over a limit, but one request too large alone."""
    counts = cut(sizes, max_requests=max_requests, max_bytes=max_bytes)
    rest = iter(sizes)
    batches = [list(itertools.islice(rest, count)) for count in counts]

    assert sizes == [size for batch in batches for size in batch]
    for batch in batches:
        assert 0 < len(batch) <= max_requests
        assert sum(batch) <= max_bytes or 1 == len(batch)


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 10), st.integers(1, 100))
def test_cut_is_tight(sizes, max_requests, max_bytes):
    """No batch could have taken the next one's first request as well."""
    counts = cut(sizes, max_requests=max_requests, max_bytes=max_bytes)
    starts = [0, *itertools.accumulate(counts)]
    for start, end in itertools.pairwise(starts):
        if end < len(sizes):
            assert end - start == max_requests or sum(sizes[start : end + 1]) > max_bytes


# -- names ---------------------------------------------------------------------------------------------------------
@given(ids, st.integers(0, 99))
def test_custom_id_round_trip(request_id, attempt):
    """A custom_id is read back as what it was made of, has 35 characters, and only ones that every vendor takes."""
    text = custom_id(request_id, attempt)

    assert (request_id, attempt) == split_custom_id(text)
    assert 35 == len(text)
    assert set(text) <= set("0123456789abcdef-")


@given(ids, ids, st.integers(0, 99), st.integers(0, 99))
def test_custom_ids_differ(one, other, attempt, again):
    """Two requests, or two attempts of one, never share a custom_id."""
    assert (custom_id(one, attempt) == custom_id(other, again)) == ((one, attempt) == (other, again))


ascii_text = st.text(st.characters(codec="ascii"), max_size=40)


@given(ascii_text | ids | st.builds("{}-{}".format, ids, st.text("0123456789-", max_size=3)))
@example("")
@example("-")
@example("a" * 32 + "-1")
@example("a" * 32 + "-001")
def test_foreign_custom_ids(text):
    """Whatever a vendor returns as custom_id, reading it raises nothing, and is ours only if it would be written so."""
    parts = split_custom_id(text)

    assert parts is None or text == custom_id(*parts)


def key(**changes: object) -> BatchKey:
    """Make a batch key."""
    fields = {
        "provider": "anthropic",
        "base_url": "https://api.anthropic.com",
        "account": "acme",
        "endpoint": "/v1/messages",
        "model": "claude-haiku-4-5",
        "headers": (("anthropic-version", "2023-06-01"),),
    }
    return BatchKey(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"provider": "openai"},
        {"base_url": "https://gateway.example"},
        {"account": "other"},
        {"endpoint": "/v1/other"},
        {"model": "claude-opus-5"},
        {"headers": ()},
        {"headers": (("anthropic-version", "2026-10-21"),)},
    ],
)
def test_batch_key_counts_every_field(change):
    """Two batch keys that differ in any field have different ids, and so have equal payloads under them."""
    assert key().id != key(**change).id
    assert Payload(key(), b"{}").hash != Payload(key(**change), b"{}").hash


def test_batch_key_fields_do_not_run_together():
    """A character that moves from one field to the next makes another id."""
    assert key(endpoint="/a", model="bc").id != key(endpoint="/ab", model="c").id


def test_payload_hash_is_its_content():
    """A payload's hash depends on key and body, not on the headers that go along."""
    with_headers = Payload(key(), b'{"a":1}', {"x-api-key": "sk-planted"})

    assert Payload(key(), b'{"a":1}').hash == with_headers.hash
    assert Payload(key(), b'{"a": 1}').hash != with_headers.hash
    assert "sk-planted" not in repr(with_headers)


counts = st.builds(Usage, *[st.integers(0, 10**9)] * 6)


@given(counts, counts)
def test_usage_adds_up(one, other):
    """Usages add class by class, and their input is the sum of all that was read."""
    both = one + other

    assert one.total_input_tokens + other.total_input_tokens == both.total_input_tokens
    assert one.output_tokens + other.output_tokens == both.output_tokens
    assert one + other == other + one
    assert one == one + Usage()
