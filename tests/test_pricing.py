"""Prices: the figures of `facts/providers.md` (read on 2026-11-23), and `None` for whatever is not known."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import genai_prices.data_snapshot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presort.pricing import Cost, cost
from presort.request import Route, Usage

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()
BEFORE_BATCH_RATES = datetime(2026, 10, 1, tzinfo=UTC).timestamp()
"""genai-prices has batch rates from 2026-10-14 on; before, it silently answers with the standard ones."""

HOME = {"anthropic": "https://api.anthropic.com", "openai": "https://api.openai.com/v1"}
UNKNOWN = Cost(None, None)


def price(provider: str, model: str, usage: Usage | None, route: Route = Route.STANDARD, at: float = NOW) -> Cost:
    """Price an answer of the vendor's own API."""
    return cost(provider, HOME[provider], model, usage, route, at)


# -- figures -------------------------------------------------------------------------------------------------------
CHECK_SUM = Usage(
    input_tokens=11, cache_write_5m_tokens=500, cache_write_1h_tokens=1500, cache_read_tokens=3000, output_tokens=7
)
"""Facts §6: claude-sonnet-5-5, 5,011 in (3,000 read, 500 written for 5 minutes, 1,500 for an hour), 7 out."""


def test_check_sum():
    """The check sum of facts §6 comes out to the last digit, on both routes, against 5,011 uncached tokens."""
    standard = price("anthropic", "claude-sonnet-5-5", CHECK_SUM)
    batch = price("anthropic", "claude-sonnet-5-5", CHECK_SUM, Route.BATCH)

    assert Cost(Decimal("0.010092"), Decimal("0.007642")) == standard
    assert Cost(Decimal("0.010092"), Decimal("0.003821")) == batch


# model: standard in/out/read/write 5m/write 1h, batch the same; facts §1.9
ANTHROPIC = {
    "claude-fable-5-2": ("8 40 0.20 10 16", "4 20 0.1 5 8"),
    "claude-opus-5-5": ("4 20 0.20 5 8", "2 10 0.1 2.5 4"),
    "claude-opus-5": ("5 25 0.50 6.25 10", "2.5 12.5 0.25 3.125 5"),
    "claude-sonnet-5-5": ("2 10 0.10 2.5 4", "1 5 0.05 1.25 2"),
    "claude-sonnet-5": ("2 10 0.20 2.5 4", "1 5 0.1 1.25 2"),
    "claude-sonnet-4-6": ("3 15 0.30 3.75 6", "1.5 7.5 0.15 1.875 3"),
    "claude-sonnet-4-5": ("3 15 0.30 3.75 6", "1.5 7.5 0.15 1.875 3"),
    "claude-haiku-5-5": ("0.10 0.50 0.01 0.125 0.20", "0.05 0.25 0.005 0.0625 0.10"),
    "claude-haiku-4-5": ("1 5 0.10 1.25 2", "0.5 2.5 0.05 0.625 1"),
}
ANTHROPIC_CLASSES = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_5m_tokens",
    "cache_write_1h_tokens",
)

# model: standard in/out/read/write, batch the same, as far as there are any; facts §2.8
OPENAI = {
    "gpt-6-astra": ("10 50 1 12.5", "5 25 0.5 6.25"),
    "gpt-6.1-sol": ("2 10 0.10 2.5", "1 5 0.05 1.25"),
    "gpt-6.1-terra": ("1 5 0.05 1.25", "0.5 2.5 0.025 0.625"),
    "gpt-6-luna": ("0.10 0.50 0.01 0.125", "0.05 0.25 0.005 0.0625"),
    "gpt-5.6-luna": ("0.20 1.20 0.02 0.25", "0.10 0.60 0.01 0.125"),
    "gpt-5.5": ("5 30 0.5", "2.5 15 0.25"),
    "gpt-5.4-mini": ("0.75 4.5 0.075", "0.375 2.25 0.0375"),
    "gpt-5-mini": ("0.25 2 0.025", "0.125 1 0.0125"),
    "gpt-4.1": ("2 8 0.5", "1 4 0.5"),
    "gpt-4o": ("2.5 10 1.25", "1.25 5 1.25"),
    "gpt-4o-mini": ("0.15 0.6 0.075", "0.075 0.3 0.075"),
}
OPENAI_CLASSES = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")

PER = 100_000
"""Few enough that no model's long-prompt price counts."""

FIGURES = [
    (provider, classes, model, route, text)
    for provider, classes, table in (
        ("anthropic", ANTHROPIC_CLASSES, ANTHROPIC),
        ("openai", OPENAI_CLASSES, OPENAI),
    )
    for model, texts in table.items()
    for route, text in zip((Route.STANDARD, Route.BATCH), texts, strict=True)
]


@pytest.mark.parametrize(("provider", "classes", "model", "route", "text"), FIGURES)
def test_figures(provider, classes, model, route, text):
    """Each class of tokens costs what the vendor's table says, per million, on either route."""
    expected = [Decimal(figure) * PER / 1_000_000 for figure in text.split()]

    assert expected == [
        price(provider, model, Usage(**{name: PER}), route).actual_usd
        for name, _ in zip(classes, expected, strict=False)
    ]


def test_baseline_is_uncached_and_standard():
    """The baseline is the same tokens at the live uncached price, whatever the route and the cache did."""
    usage = Usage(input_tokens=1_000, cache_read_tokens=8_000, cache_write_5m_tokens=1_000, output_tokens=100)
    plain = price("anthropic", "claude-haiku-4-5", Usage(input_tokens=10_000, output_tokens=100))

    assert Decimal("0.0105") == plain.actual_usd == plain.baseline_usd
    for route in Route:
        assert plain.baseline_usd == price("anthropic", "claude-haiku-4-5", usage, route).baseline_usd


def test_long_prompts():
    """A prompt over a model's threshold costs more as a whole, cached tokens counted in."""
    short = price("anthropic", "claude-haiku-5-5", Usage(input_tokens=100_000))
    long = price("anthropic", "claude-haiku-5-5", Usage(input_tokens=1, cache_read_tokens=100_000))

    assert Decimal("0.01") == short.baseline_usd
    assert Decimal("0.0500005") == long.baseline_usd
    assert Decimal("0.0050005") == long.actual_usd


def test_dated_names():
    """A model named with its date costs what it costs without."""
    usage = Usage(input_tokens=1_000)

    assert price("anthropic", "claude-haiku-4-5", usage) == price("anthropic", "claude-haiku-4-5-20251001", usage)


# -- the unknown ---------------------------------------------------------------------------------------------------
def test_batch_rate_nobody_knows():
    """A model whose batch rate the data lacks has a baseline and no batch cost: never the standard price."""
    usage = Usage(input_tokens=1_000_000)

    assert Cost(Decimal(15), None) == price("anthropic", "claude-opus-4-1", usage, Route.BATCH)
    assert Cost(Decimal(15), Decimal(15)) == price("anthropic", "claude-opus-4-1", usage)
    assert price("openai", "text-embedding-3-small", usage, Route.BATCH).actual_usd is None


def test_batch_rate_before_its_time():
    """Before the data's batch rates begin, a batch's cost is unknown, not the standard price."""
    found = price("anthropic", "claude-sonnet-5-5", CHECK_SUM, Route.BATCH, BEFORE_BATCH_RATES)

    assert Cost(Decimal("0.010092"), None) == found


@pytest.mark.parametrize("model", ["nobody-9", "", "claude-haiku-4-5"])
def test_unknown_model(model):
    """A model that the vendor is not known to have has no price."""
    assert UNKNOWN == price("openai", model, Usage(input_tokens=1))


def test_unknown_provider():
    """A provider that nobody knows has no price."""
    assert UNKNOWN == cost("nobody", "https://nobody.example", "gpt-4o", Usage(input_tokens=1), Route.STANDARD, NOW)


def test_unknown_usage():
    """An answer that does not say its usage has no price, which is not 0."""
    assert UNKNOWN == price("openai", "gpt-4o", None)


def test_no_tokens():
    """Usage that is known and nothing costs exactly 0."""
    assert Cost(Decimal(0), Decimal(0)) == price("openai", "gpt-4o", Usage(), Route.BATCH)


def test_reseller():
    """A reseller's prices are looked up under its own name; an unknown host speaks for the vendor it imitates."""
    usage = Usage(input_tokens=1_000_000)

    groq = cost("openai", "https://api.groq.com/openai/v1", "openai/gpt-oss-20b", usage, Route.STANDARD, NOW)
    assert Decimal("0.075") == groq.actual_usd
    assert UNKNOWN == cost("openai", "https://api.groq.com/openai/v1", "gpt-4o", usage, Route.STANDARD, NOW)
    assert Decimal("2.5") == cost("openai", "http://127.0.0.1:1/v1", "gpt-4o", usage, Route.STANDARD, NOW).actual_usd


def test_broken_data(monkeypatch, caplog):
    """If the price library fails the price is unknown, with a warning; the answer is not lost over it."""

    def broken() -> None:
        raise AttributeError("moved")

    monkeypatch.setattr(genai_prices.data_snapshot, "get_snapshot", broken)

    assert UNKNOWN == price("openai", "gpt-4o-never-priced-before", Usage(input_tokens=1))
    assert "the price of `gpt-4o-never-priced-before` cannot be told: AttributeError: moved" in caplog.text


# -- exactness -----------------------------------------------------------------------------------------------------
tokens = st.integers(0, 10_000)


@settings(max_examples=50, deadline=None)
@given(tokens, tokens, tokens, tokens, tokens)
def test_exact(uncached, five, hour, read, output):
    """A price is the exact sum of its parts, in decimal digits, and half of it in a batch."""
    usage = Usage(uncached, five, hour, 0, read, output)
    standard = price("anthropic", "claude-haiku-4-5", usage)
    batch = price("anthropic", "claude-haiku-4-5", usage, Route.BATCH)
    millionths = uncached * 100 + five * 125 + hour * 200 + read * 10 + output * 500

    assert Decimal(millionths) / 100_000_000 == standard.actual_usd
    assert batch.actual_usd is not None
    assert standard.actual_usd == 2 * batch.actual_usd
    assert Decimal((uncached + five + hour + read) + 5 * output) / 1_000_000 == standard.baseline_usd


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 999), min_size=1, max_size=50))
def test_exact_in_sums(counts):
    """Prices of many answers add up to the price of all their tokens, without a rounding error."""
    each = [price("openai", "gpt-5.4-mini", Usage(output_tokens=count), Route.BATCH).actual_usd for count in counts]
    whole = price("openai", "gpt-5.4-mini", Usage(output_tokens=sum(counts)), Route.BATCH).actual_usd

    assert whole == sum(amount for amount in each if amount is not None)
