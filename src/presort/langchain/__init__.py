"""LangChain chat models that batch: `OptimizedLLMWrapper(model)`. The only part that imports LangChain."""

from __future__ import annotations

from presort.errors import MissingExtraError

try:
    import langchain_core as _langchain_core  # noqa: F401 - only to see whether it is there
except ModuleNotFoundError as error:
    if error.name != "langchain_core":
        raise
    raise MissingExtraError('LangChain is not installed: pip install "presort[langchain]"') from error

from presort.langchain.wrapper import OptimizedLLMWrapper

__all__ = ["OptimizedLLMWrapper"]
