"""presort sends ordinary LLM calls by the cheapest route that meets their deadline.

>>> import presort
>>> model = presort.wrap(ChatAnthropic(model="claude-haiku-5-5"))
>>> answers = model.batch(prompts)  # Batch API, half price
>>> with presort.batch(deadline=6 * 3600):  # everything below
...     answers = chain.map().invoke(documents)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from presort import errors
    from presort.api import payload, stream, submit, wrap
    from presort.context import batch, run, urgent
    from presort.langchain import OptimizedLLMWrapper
    from presort.runtime import close, configure, drain, finish_run, flush, jobs
    from presort.seam import transport

_HOMES = {
    "OptimizedLLMWrapper": "presort.langchain",
    "batch": "presort.context",
    "close": "presort.runtime",
    "configure": "presort.runtime",
    "drain": "presort.runtime",
    "finish_run": "presort.runtime",
    "flush": "presort.runtime",
    "jobs": "presort.runtime",
    "payload": "presort.api",
    "run": "presort.context",
    "stream": "presort.api",
    "submit": "presort.api",
    "transport": "presort.seam",
    "urgent": "presort.context",
    "wrap": "presort.api",
}

__all__ = [
    "OptimizedLLMWrapper",
    "batch",
    "close",
    "configure",
    "drain",
    "errors",
    "finish_run",
    "flush",
    "jobs",
    "payload",
    "run",
    "stream",
    "submit",
    "transport",
    "urgent",
    "wrap",
]


def __getattr__(name: str) -> Any:
    # nothing is loaded before it is used: a guest keeps the host's start fast
    if name == "errors":
        return importlib.import_module("presort.errors")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module `presort` has no attribute `{name}`")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
