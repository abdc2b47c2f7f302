"""EMULATED Anthropic and OpenAI APIs on loopback.

A server that stands in for the vendors' Messages, Chat Completions, Files and
Batch APIs: with their limits, states, error texts, prompt caches and prices, a clock that
can be moved, and faults that can be ordered. It knows nothing of the rest of presort and
shares no code with it, so agreement between the two means something.

    python -m presort.emulator --port 8471

Point a vendor's SDK at it with `base_url="http://127.0.0.1:8471"` (Anthropic) or
`base_url="http://127.0.0.1:8471/v1"` (OpenAI) and any API key.
"""

from presort.emulator.server import serve

__all__ = ["serve"]
