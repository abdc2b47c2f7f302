"""The receipt: sums of the ledger that never guess."""

from __future__ import annotations

from decimal import Decimal

import pytest

from presort.display import dollars, duration
from presort.monitoring.receipt import make_receipt, usd_text
from presort.request import Route, Usage
from presort.store.base import LedgerTotal, Spend


def total(spend: Spend = Spend.PAID, route: Route = Route.BATCH, **more: object) -> LedgerTotal:
    """Make a ledger total: one batch answer of 100 tokens in and 10 out, unless said otherwise."""
    given = {"rows": 1, "usage": Usage(100, output_tokens=10), "baseline_usd": Decimal(2), "actual_usd": Decimal(1)}
    return LedgerTotal(provider="anthropic", model="m", route=route, spend=spend, unknown=0, **{**given, **more})


def test_nothing():
    """A receipt of nothing is zero throughout, and has no percentage."""
    receipt = make_receipt([])

    assert (Decimal(0), Decimal(0), Decimal(0)) == (receipt.baseline_usd, receipt.paid_usd, receipt.saved_usd)
    assert receipt.saved_percent is None


def test_saved():
    """Savings are the list price of what was used, minus all that was paid."""
    receipt = make_receipt([total(), total(route=Route.STANDARD, actual_usd=Decimal(2))])

    assert (Decimal(4), Decimal(3), Decimal(1)) == (receipt.baseline_usd, receipt.paid_usd, receipt.saved_usd)
    assert Decimal(25) == receipt.saved_percent


def test_waste():
    """What bought nothing counts as paid and not as list price, and its tokens are not among those used."""
    receipt = make_receipt([total(), total(Spend.WASTED)])

    assert (Decimal(2), Decimal(2), Decimal(0)) == (receipt.baseline_usd, receipt.paid_usd, receipt.saved_usd)
    assert Decimal(1) == receipt.wasted_usd
    assert Usage(100, output_tokens=10) == receipt.usage


def test_in_doubt():
    """Calls in doubt are counted and change no sum."""
    doubt = total(Spend.IN_DOUBT, Route.STANDARD, rows=3, usage=Usage(), baseline_usd=Decimal(0), actual_usd=Decimal(0))
    receipt = make_receipt([total(), LedgerTotal(**{**as_dict(doubt), "unknown": 3})])

    assert (3, 0) == (receipt.in_doubt, receipt.unknown)
    assert Decimal(1) == receipt.paid_usd


def test_unknown():
    """One unknown price makes every sum it belongs to unknown, never too small."""
    receipt = make_receipt([total(rows=5), LedgerTotal(**{**as_dict(total()), "unknown": 1})])

    assert 1 == receipt.unknown
    assert (None, None, None, None) == (
        receipt.baseline_usd,
        receipt.paid_usd,
        receipt.saved_usd,
        receipt.saved_percent,
    )
    assert receipt.as_json()["paid_usd"] is None


def as_dict(line: LedgerTotal) -> dict:
    """Return the fields of a total."""
    return {name: getattr(line, name) for name in LedgerTotal.__slots__}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (Decimal(0), "0"),
        (Decimal("1E+3"), "1000"),
        (Decimal("1E-9"), "0.000000001"),
        (Decimal("0.10"), "0.1"),
        (Decimal("123456789.123456789123456789"), "123456789.123456789123456789"),
    ],
)
def test_exact_text(value, expected):
    """Amounts for machines are exact, without exponent and without trailing zeros."""
    assert expected == usd_text(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "unknown"),
        (Decimal(0), "$0.00"),
        (Decimal("0.5"), "$0.50"),
        (Decimal("0.00012345"), "$0.000123"),
        (Decimal("1234.567"), "$1,234.57"),
        (Decimal("-0.25"), "-$0.25"),
    ],
)
def test_dollars(value, expected):
    """Amounts for people have cents, and more digits where they are small."""
    assert expected == dollars(value)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-1, "0 s"), (59.4, "59 s"), (60, "1 min"), (3_599, "59 min 59 s"), (7_260, "2 h 1 min"), (90_000, "1 d 1 h")],
)
def test_duration(seconds, expected):
    """Durations for people have their two largest units."""
    assert expected == duration(seconds)
