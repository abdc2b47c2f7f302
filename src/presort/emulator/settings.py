"""What can be set while the emulator runs, with its defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from presort.emulator.state import State


@dataclass
class Settings:
    """The emulator's settings; each is stored under its own name."""

    batch_seconds: float = 2.0
    """How long a batch takes."""
    cancel_seconds: float = 1.0
    """How long a cancelled batch takes to end."""
    answer_seconds: float = 0.0
    """How long a standard call takes to begin its answer."""
    batch_hit_percent: int = 100
    """Share of a batch's requests that hit a prompt-cache entry which is there."""
    batch_own_hit_percent: int = 100
    """The same, for entries that the same batch wrote."""
    eager_tools: bool = False
    """Call the first tool where the choice is left to the model, unless it was called already."""
    minimum_cache_tokens: dict[str, int] = field(default_factory=dict)
    """Claude model → shortest cached prefix, where it differs from `models.py`."""
    models: list[str] = field(default_factory=list)
    """Further models to know, of either vendor."""
    only_listed_keys: bool = False
    """Refuse API keys that nobody defined."""
    shuffle_openai_results: bool = False
    """Return OpenAI's rows in arbitrary order; live captures kept the input's order."""
    anthropic_max_requests: int = 100_000
    anthropic_max_bytes: int = 256_000_000
    """Anthropic docs, "Message Batches": 100,000 requests or 256 MB, whichever comes first."""
    openai_max_requests: int = 50_000
    openai_max_bytes: int = 200_000_000
    """OpenAI docs, "Batch API": 50,000 requests and 200 MB per file."""

    @classmethod
    def load(cls, state: State) -> Settings:
        """Read what was set before a restart."""
        settings = cls()
        for name in settings.names():
            setattr(settings, name, state.setting(name, getattr(settings, name)))
        return settings

    @classmethod
    def names(cls) -> list[str]:
        """All setting names."""
        return [item.name for item in fields(cls)]

    def change(self, changes: dict[str, Any], state: State) -> None:
        """Change settings and remember them.

        Raises:
            ValueError: for an unknown name or a value of the wrong kind; nothing is changed.
        """
        for name, value in changes.items():
            if name not in self.names():
                raise ValueError(f"unknown setting `{name}`, valid are {', '.join(self.names())}")
            _check(name, value, getattr(self, name))
        for name, value in changes.items():
            setattr(self, name, value)
            state.set_setting(name, value)


def _check(name: str, value: Any, current: Any) -> None:
    number = isinstance(current, int | float) and not isinstance(current, bool)
    fits = (
        isinstance(value, int | float) and not isinstance(value, bool) if number else isinstance(value, type(current))
    )
    if not fits:
        kind = "number" if number else type(current).__name__
        raise ValueError(f"`{name}` must be a {kind}, got {value!r}")
    if number and value < 0:
        raise ValueError(f"`{name}` must not be negative, got {value!r}")
    if name.endswith("_percent") and value > 100:
        raise ValueError(f"`{name}` must be at most 100, got {value!r}")
