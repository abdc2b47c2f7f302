"""The receipt: what a piece of work cost, by the ledger, beside what it would have cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from presort.request import Usage
from presort.store.base import LedgerTotal, Spend


@dataclass(frozen=True, slots=True)
class Line:
    """One (model, route, spend) of the receipt."""

    provider: str
    model: str
    route: str
    spend: str
    requests: int
    usage: Usage
    baseline_usd: Decimal
    actual_usd: Decimal
    unknown: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """Sums of the ledger. A figure that includes something unknown is `None`; `unknown` counts what it is."""

    lines: tuple[Line, ...]
    usage: Usage
    """Tokens of answers that were used."""
    baseline_usd: Decimal | None
    """Those tokens by the standard route, nothing cached."""
    paid_usd: Decimal | None
    """What was paid in all, waste included."""
    wasted_usd: Decimal
    """The part of it that bought nothing."""
    in_doubt: int
    """Standard calls cut off by a crash, possibly billed; not part of `paid_usd`."""
    unknown: int
    """Answers without a known price or usage."""

    @property
    def saved_usd(self) -> Decimal | None:
        """Baseline minus everything paid; `None` if either is not known."""
        if self.baseline_usd is None or self.paid_usd is None:
            return None
        return self.baseline_usd - self.paid_usd

    @property
    def saved_percent(self) -> Decimal | None:
        """Savings in percent of the baseline; `None` if they are not known or there was nothing to pay."""
        saved = self.saved_usd
        if saved is None or not self.baseline_usd:
            return None
        return 100 * saved / self.baseline_usd

    def as_json(self) -> dict[str, Any]:
        """Return the receipt for machines; money as exact decimal strings."""
        return {
            "tokens": tokens_json(self.usage),
            "baseline_usd": usd_text(self.baseline_usd),
            "paid_usd": usd_text(self.paid_usd),
            "wasted_usd": usd_text(self.wasted_usd),
            "saved_usd": usd_text(self.saved_usd),
            "saved_percent": None if self.saved_percent is None else f"{self.saved_percent:.1f}",
            "in_doubt": self.in_doubt,
            "unknown": self.unknown,
            "lines": [
                {
                    "provider": line.provider,
                    "model": line.model,
                    "route": line.route,
                    "spend": line.spend,
                    "requests": line.requests,
                    "tokens": tokens_json(line.usage),
                    "baseline_usd": usd_text(line.baseline_usd),
                    "actual_usd": usd_text(line.actual_usd),
                    "unknown": line.unknown,
                }
                for line in self.lines
            ],
        }


def make_receipt(totals: Iterable[LedgerTotal]) -> Receipt:
    """Sum ledger totals into a receipt."""
    lines = tuple(
        Line(
            total.provider,
            total.model,
            total.route.value,
            total.spend.value,
            total.rows,
            total.usage,
            total.baseline_usd,
            total.actual_usd,
            total.unknown,
        )
        for total in totals
    )
    paid = [line for line in lines if line.spend == Spend.PAID]
    wasted = [line for line in lines if line.spend == Spend.WASTED]
    unknown = sum(line.unknown for line in (*paid, *wasted))
    nothing = Decimal(0)
    return Receipt(
        lines=lines,
        usage=sum((line.usage for line in paid), Usage()),
        baseline_usd=None if unknown else sum((line.baseline_usd for line in paid), nothing),
        paid_usd=None if unknown else sum((line.actual_usd for line in (*paid, *wasted)), nothing),
        wasted_usd=sum((line.actual_usd for line in wasted), nothing),
        in_doubt=sum(line.requests for line in lines if line.spend == Spend.IN_DOUBT),
        unknown=unknown,
    )


def usd_text(value: Decimal | None) -> str | None:
    """Write an amount exactly, without an exponent; `None` stays `None`."""
    if value is None:
        return None
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def tokens_json(usage: Usage) -> dict[str, int]:
    """Return the token classes by name."""
    return {
        "input": usage.input_tokens,
        "cache_write_5m": usage.cache_write_5m_tokens,
        "cache_write_1h": usage.cache_write_1h_tokens,
        "cache_write": usage.cache_write_tokens,
        "cache_read": usage.cache_read_tokens,
        "output": usage.output_tokens,
    }
