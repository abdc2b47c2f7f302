"""What tokens cost: `genai-prices`, with its silent fallback detected. Unknown is `None`, never 0."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING

from presort.request import Route, Usage
from presort.telemetry import warn

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice
    from genai_prices.types import Usage as PricedUsage

_BATCH = {"processing": "batch"}

_PRICED_ELSEWHERE = (
    "api.groq.com",
    "api.together.xyz",
    "api.fireworks.ai",
    "api.x.ai",
    "api.deepseek.com",
    "openrouter.ai",
)
"""Hosts that speak OpenAI's format and are priced under a name of their own."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one answer cost, in USD. A figure that is not known is `None`."""

    baseline_usd: Decimal | None
    """The same tokens, standard route, nothing cached."""
    actual_usd: Decimal | None
    """On the route and in the classes they were billed in."""


def cost(provider: str, base_url: str, model: str, usage: Usage | None, route: Route, at: float) -> Cost:
    """Price an answer exactly.

    Args:
        provider: Registry name of the wire format's vendor.
        base_url: Where it was sent; a known reseller's prices are looked up under its own name.
        model: The model's id as requested.
        usage: What was billed; `None` if the vendor did not say.
        route: The route it took.
        at: Unix time in seconds.
    """
    if usage is None:
        return Cost(None, None)
    try:
        found = _prices(provider, _reseller(base_url), model, int(at // 3600))
        if found is None:
            return Cost(None, None)
        standard, batch = found
        baseline = Usage(input_tokens=usage.total_input_tokens, output_tokens=usage.output_tokens)
        rates = batch if route is Route.BATCH else standard
        return Cost(_total(standard, baseline), _total(rates, usage) if rates is not None else None)
    except Exception as error:  # noqa: BLE001 - an answer must never be lost because its price cannot be told
        warn("pricing", f"the price of `{model}` cannot be told: {type(error).__name__}: {error}")
        return Cost(None, None)


def _reseller(base_url: str) -> str | None:
    return base_url if any(host in base_url for host in _PRICED_ELSEWHERE) else None


@lru_cache(maxsize=1024)
def _prices(provider: str, url: str | None, model: str, hour: int) -> tuple[ModelPrice, ModelPrice | None] | None:
    """Return (standard, batch) rates; batch is `None` where the data has no batch rates of its own."""
    from genai_prices.data_snapshot import get_snapshot

    at = datetime.fromtimestamp(hour * 3600, UTC)
    try:
        _provider, info = get_snapshot().find_provider_model(
            model, None, None if url else provider, provider_api_url=url
        )
    except LookupError:
        return None
    return _rates(info, at)


def _rates(info: ModelInfo, at: datetime) -> tuple[ModelPrice, ModelPrice | None]:
    standard = info.get_prices(at)
    batch = info.get_prices(at, price_context=_BATCH)
    # an unknown variant silently yields the standard rates
    return standard, None if batch == standard else batch


def _total(rates: ModelPrice, usage: Usage) -> Decimal:
    return rates.calc_price(_priced(usage))["total_price"]


def _priced(usage: Usage) -> PricedUsage:
    from genai_prices import Usage as PricedUsage

    writes = usage.cache_write_tokens + usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
    counts = {"input_tokens": usage.total_input_tokens, "output_tokens": usage.output_tokens}
    if usage.cache_read_tokens:
        counts["cache_read_tokens"] = usage.cache_read_tokens
    if writes:
        counts["cache_write_tokens"] = writes
    if usage.cache_write_5m_tokens or usage.cache_write_1h_tokens:
        counts["cache_write_5m_tokens"] = usage.cache_write_5m_tokens
        counts["cache_write_1h_tokens"] = usage.cache_write_1h_tokens
    return PricedUsage(**counts)
