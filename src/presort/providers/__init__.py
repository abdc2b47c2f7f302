"""The providers presort knows: the one list of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from presort.errors import ConfigurationError
from presort.providers.anthropic import Anthropic
from presort.providers.base import Call, Provider
from presort.providers.openai import OpenAI

_REGISTRY: tuple[type[Provider], ...] = (Anthropic, OpenAI)


@cache
def providers() -> Mapping[str, Provider]:
    """Return every provider by name."""
    return {cls.name: cls() for cls in _REGISTRY}


def provider(name: str) -> Provider:
    """Return the provider called `name`; raises `ConfigurationError` naming those there are."""
    try:
        return providers()[name]
    except KeyError:
        known = ", ".join(f"`{known}`" for known in providers())
        raise ConfigurationError(f"there is no provider `{name}`; there are {known}") from None


def recognise(method: str, url: str, headers: Mapping[str, str], body: bytes) -> tuple[Provider, Call] | None:
    """Find the provider that knows this request, and read it; `None` if nobody does."""
    for candidate in providers().values():
        call = candidate.recognise(method, url, headers, body)
        if call is not None:
            return candidate, call
    return None
