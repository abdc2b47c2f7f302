"""What the emulator knows about models, as data with sources."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_DATE = re.compile(r"-(\d{8}|\d{4}-\d{2}-\d{2})$")


def undated(model: str) -> str:
    """Drop the date from a model's snapshot name: `gpt-4o-2024-11-20` → `gpt-4o`."""
    return _DATE.sub("", model)


@dataclass(frozen=True)
class AnthropicModel:
    """Facts of one Claude model.

    `minimum_cache_tokens` is the shortest prefix that is cached at all.
    """

    minimum_cache_tokens: int
    max_output_tokens: int


ANTHROPIC: Final = {
    "claude-fable-5-2": AnthropicModel(512, 128_000),
    "claude-mythos-5-2": AnthropicModel(512, 128_000),
    "claude-fable-5-1": AnthropicModel(512, 128_000),
    "claude-mythos-5-1": AnthropicModel(512, 128_000),
    "claude-fable-5": AnthropicModel(512, 128_000),
    "claude-mythos-5": AnthropicModel(512, 128_000),
    "claude-opus-5-5": AnthropicModel(512, 128_000),
    "claude-opus-5": AnthropicModel(512, 128_000),
    "claude-opus-4-8": AnthropicModel(1_024, 128_000),
    "claude-opus-4-7": AnthropicModel(2_048, 128_000),
    "claude-opus-4-6": AnthropicModel(4_096, 128_000),
    "claude-opus-4-5": AnthropicModel(4_096, 64_000),
    "claude-sonnet-5-5": AnthropicModel(1_024, 128_000),
    "claude-sonnet-5": AnthropicModel(1_024, 128_000),
    "claude-sonnet-4-6": AnthropicModel(1_024, 128_000),
    "claude-sonnet-4-5": AnthropicModel(1_024, 64_000),
    "claude-haiku-5-5": AnthropicModel(4_096, 64_000),
    "claude-haiku-4-5": AnthropicModel(4_096, 64_000),
}
"""Minimum cache tokens: Anthropic docs, "Prompt caching" (2026-08); those of
fable-5-2, mythos-5-2, sonnet-5-5 and haiku-5-5 are not published and assumed equal to their
predecessors' (the setting `minimum_cache_tokens` overrides any of them).
Output limits: Anthropic docs, "Models overview", assumed 128,000 where not found."""


@dataclass(frozen=True)
class ImplicitCaching:
    """Prefixes are cached by themselves, at every `step` tokens from `minimum` on; writing is free."""

    step: int
    minimum: int
    idle_seconds: int


@dataclass(frozen=True)
class BreakpointCaching:
    """Prefixes are cached at breakpoints only, and writing costs extra."""

    minimum: int
    max_writes: int
    ttl_seconds: dict[str, int]


OPENAI_BREAKPOINTS: Final = BreakpointCaching(1_024, 4, {"30m": 1_800, "12h": 43_200})
OPENAI_IMPLICIT_5_5: Final = ImplicitCaching(2_048, 2_048, 1_800)
OPENAI_IMPLICIT: Final = ImplicitCaching(128, 1_024, 600)

OPENAI: Final = frozenset(
    """
    gpt-6-astra gpt-6.2-astra gpt-6.1-sol gpt-6.2-sol gpt-6.1-terra gpt-6-sol gpt-6-luna
    gpt-5.6-sol gpt-5.6-terra gpt-5.6-luna gpt-5.5 gpt-5.4 gpt-5.4-mini gpt-5.4-nano gpt-5.2 gpt-5.2-pro
    gpt-5.1 gpt-5 gpt-5-mini gpt-5-nano gpt-4.1 gpt-4.1-mini gpt-4.1-nano gpt-4o gpt-4o-mini
    o4-mini o3 o3-mini o1 gpt-4-turbo gpt-4 gpt-3.5-turbo
    """.split()
)
"""Chat models that the openai package 3.54 names, without their dated snapshots."""


def openai_caching(model: str) -> ImplicitCaching | BreakpointCaching:
    """Which of OpenAI's caching regimes a model follows (OpenAI docs, "Prompt caching", 2026-09)."""
    if re.match(r"gpt-(5\.6|6)", model):
        return OPENAI_BREAKPOINTS
    return OPENAI_IMPLICIT_5_5 if model.startswith("gpt-5.5") else OPENAI_IMPLICIT


def forbids_sampling(model: str) -> bool:
    """GPT-6 refuses a custom temperature and top_p (OpenAI changelog, 2026-09-03)."""
    return model.startswith("gpt-6")


def forbids_chat_tools(model: str) -> bool:
    """GPT-6 calls tools in the Responses API only (OpenAI changelog, 2026-09-03)."""
    return model.startswith("gpt-6")
