"""The vendor's side of the money: what was used, and what it costs.

Every token is counted here when its answer is made, by (vendor, model, lane,
class), whether or not anybody fetches the answer. Requests that
errored, expired or were cancelled before they ran are not billed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Literal

from presort.emulator.models import undated
from presort.emulator.rates import RATES, Rate
from presort.emulator.state import State

Lane = Literal["standard", "batch"]
MILLION: Final = Decimal(1_000_000)
NOTICE: Final = "EMULATED invoice: no vendor was called and no money is owed."


@dataclass(frozen=True)
class Usage:
    """Tokens of one answered request in disjoint classes."""

    input: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    cache_write: int = 0
    cache_read: int = 0
    output: int = 0

    @property
    def prompt(self) -> int:
        """All tokens that went in."""
        return self.input + self.cache_write_5m + self.cache_write_1h + self.cache_write + self.cache_read


class Meter:
    """Collects usage; `store` adds it to the bill."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._tokens: Counter[tuple[str, str, str, str, str]] = Counter()

    def add(self, vendor: str, model: str, lane: Lane, usage: Usage) -> None:
        """Count one answered request."""
        rate = RATES.get((vendor, undated(model)))
        prompt = "long" if rate and rate.long_prompt and usage.prompt > rate.long_prompt.over_tokens else "normal"
        for name, tokens in vars(usage).items():
            if tokens:
                self._tokens[vendor, model, lane, name, prompt] += tokens

    def store(self) -> None:
        """Write what was collected, inside the caller's transaction."""
        self._state.add_tokens([(*key, tokens) for key, tokens in self._tokens.items()])
        self._tokens.clear()


def price(rate: Rate | None, lane: str, name: str, prompt: str) -> Decimal | None:
    """USD per million tokens, or None if nobody published it."""
    prices: Mapping[str, Decimal] = {} if rate is None else rate.batch if lane == "batch" else rate.standard
    figure = prices.get(name)
    return figure and figure * _factor(rate, name, prompt)


def _factor(rate: Rate | None, name: str, prompt: str) -> Decimal:
    if rate is None or rate.long_prompt is None or prompt == "normal":
        return Decimal(1)
    return rate.long_prompt.output_factor if name == "output" else rate.long_prompt.input_factor


def invoice(tallies: list[dict[str, Any]], requests: Mapping[str, int]) -> dict[str, Any]:
    """Write the bill; exact decimals as strings, unknown prices as null."""
    lines = [_line(tally) for tally in tallies]
    total = sum((Decimal(line["usd"]) for line in lines if line["usd"] is not None), Decimal(0))
    return {
        "notice": NOTICE,
        "currency": "USD",
        "lines": lines,
        "total_usd": _text(total),
        "unpriced_tokens": sum(line["tokens"] for line in lines if line["usd"] is None),
        "requests": dict(requests),
    }


def _line(tally: dict[str, Any]) -> dict[str, Any]:
    rate = RATES.get((tally["vendor"], undated(tally["model"])))
    figure = price(rate, tally["lane"], tally["class"], tally["prompt"])
    other = rate.disputed.get((tally["lane"], tally["class"])) if rate else None
    line = {
        **tally,
        "usd_per_mtok": _text(figure),
        "usd": _text(figure and figure * tally["tokens"] / MILLION),
        "disputed": other is not None,
    }
    if other is not None:
        line["other_usd_per_mtok"] = _text(other)
    return line


def _text(number: Decimal | None) -> str | None:
    if number is None:
        return None
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
