"""What the vendors charge, in USD per million tokens, as data.

Source: the vendors' price pages as bundled in genai-prices 0.2.3, valid on
2026-11-23. The emulator keeps its own copy on purpose: a bill computed from
the table of the program under test would agree with that program's mistakes.

Columns are the classes of `billing.py`; a missing cell means "no such class".
`batch` is half of everything unless a row says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

ANTHROPIC_COLUMNS: Final = ("input", "output", "cache_read", "cache_write_5m", "cache_write_1h")
OPENAI_COLUMNS: Final = ("input", "output", "cache_read", "cache_write")


@dataclass(frozen=True)
class LongPrompt:
    """The whole request costs more once its prompt exceeds `over_tokens`."""

    over_tokens: int
    input_factor: Decimal
    output_factor: Decimal


@dataclass(frozen=True)
class Rate:
    """The prices of one model, by lane and class."""

    standard: Mapping[str, Decimal]
    batch: dict[str, Decimal]
    long_prompt: LongPrompt | None = None
    disputed: Mapping[tuple[str, str], Decimal] = field(default_factory=dict)
    """(lane, class) → the figure of a second source that disagrees with ours."""


HAIKU_5_5_LONG: Final = LongPrompt(100_000, Decimal(5), Decimal(5))
SONNET_4_5_LONG: Final = LongPrompt(200_000, Decimal(2), Decimal("1.5"))
OPENAI_LONG: Final = LongPrompt(272_000, Decimal(2), Decimal("1.5"))

ANTHROPIC: Final = {
    "claude-fable-5-2": "8 40 0.20 10 16",
    "claude-mythos-5-2": "8 40 0.20 10 16",
    "claude-fable-5-1": "10 50 0.25 12.5 20",
    "claude-fable-5": "10 50 1 12.5 20",
    "claude-opus-5-5": "4 20 0.20 5 8",
    "claude-opus-5": "5 25 0.50 6.25 10",
    "claude-opus-4-8": "5 25 0.50 6.25 10",
    "claude-opus-4-7": "5 25 0.50 6.25 10",
    "claude-opus-4-6": "5 25 0.50 6.25 10",
    "claude-opus-4-5": "5 25 0.50 6.25 10",
    "claude-sonnet-5-5": "2 10 0.10 2.5 4",
    "claude-sonnet-5": "2 10 0.20 2.5 4",
    "claude-sonnet-4-6": "3 15 0.30 3.75 6",
    "claude-sonnet-4-5": "3 15 0.30 3.75 6",
    "claude-haiku-5-5": "0.10 0.50 0.01 0.125 0.20",
    "claude-haiku-4-5": "1 5 0.10 1.25 2",
}
ANTHROPIC_LONG: Final = {"claude-haiku-5-5": HAIKU_5_5_LONG, "claude-sonnet-4-5": SONNET_4_5_LONG}

OPENAI: Final = {
    "gpt-6-astra": "10 50 1 12.5",
    "gpt-6-sol": "2 10 0.20 2.5",
    "gpt-6.1-sol": "2 10 0.10 2.5",
    "gpt-6.1-terra": "1 5 0.05 1.25",
    "gpt-6-luna": "0.10 0.50 0.01 0.125",
    "gpt-5.6-sol": "4 20 0.4 5",
    "gpt-5.6-terra": "2 12 0.2 2.5",
    "gpt-5.6-luna": "0.20 1.20 0.02 0.25",
    "gpt-5.5": "5 30 0.5",
    "gpt-5.4": "2.5 15 0.25",
    "gpt-5.4-mini": "0.75 4.5 0.075",
    "gpt-5.4-nano": "0.2 1.25 0.02",
    "gpt-5.2": "1.75 14 0.175",
    "gpt-5.1": "1.25 10 0.125",
    "gpt-5": "1.25 10 0.125",
    "gpt-5-mini": "0.25 2 0.025",
    "gpt-5-nano": "0.05 0.4 0.005",
    "gpt-4.1": "2 8 0.5",
    "gpt-4.1-mini": "0.4 1.6 0.1",
    "gpt-4.1-nano": "0.1 0.4 0.025",
    "gpt-4o": "2.5 10 1.25",
    "gpt-4o-mini": "0.15 0.6 0.075",
    "o4-mini": "1.1 4.4 0.275",
    "o3": "2 8 0.5",
    "o3-mini": "1.1 4.4 0.55",
    "o1": "15 60 7.5",
}
OPENAI_LONG_MODELS: Final = frozenset(
    {"gpt-6-astra", "gpt-6-sol", "gpt-6.1-sol", "gpt-6.1-terra", "gpt-6-luna", "gpt-5.6-sol"}
    | {"gpt-5.6-terra", "gpt-5.6-luna", "gpt-5.5", "gpt-5.4"}
)
OPENAI_UNHALVED_READS: Final = frozenset(
    {"gpt-4.1", "gpt-4.1-mini", "gpt-4.1-nano", "gpt-4o", "gpt-4o-mini", "o4-mini", "o3", "o3-mini", "o1"}
)
"""OpenAI's Batch table prints no cached rate for these, so cached input keeps
the standard rate; OpenRouter's `:batch` rows halve it. Disputed: we bill the
higher figure and show the other."""

OPENAI_ROUNDED: Final = {("gpt-5.4", "cache_read"): Decimal("0.13")}
"""Batch rates that OpenAI's table prints rounded."""


def _rate(columns: tuple[str, ...], cells: str, long_prompt: LongPrompt | None, *, unhalved_reads: bool) -> Rate:
    standard = dict(zip(columns, map(Decimal, cells.split()), strict=False))
    batch = {name: price / 2 for name, price in standard.items()}
    disputed: dict[tuple[str, str], Decimal] = {}
    if unhalved_reads:
        disputed["batch", "cache_read"] = batch["cache_read"]
        batch["cache_read"] = standard["cache_read"]
    return Rate(standard, batch, long_prompt, disputed)


def _table() -> dict[tuple[str, str], Rate]:
    table = {}
    for model, cells in ANTHROPIC.items():
        long_prompt = ANTHROPIC_LONG.get(model)
        table["anthropic", model] = _rate(ANTHROPIC_COLUMNS, cells, long_prompt, unhalved_reads=False)
    for model, cells in OPENAI.items():
        long_prompt = OPENAI_LONG if model in OPENAI_LONG_MODELS else None
        unhalved = model in OPENAI_UNHALVED_READS
        table["openai", model] = _rate(OPENAI_COLUMNS, cells, long_prompt, unhalved_reads=unhalved)
    for (model, column), price in OPENAI_ROUNDED.items():
        table["openai", model].batch[column] = price
    return table


RATES: Final = _table()
"""(vendor, model without its date) → its rate."""
