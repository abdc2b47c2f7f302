"""`OptimizedLLMWrapper`: an ordinary LangChain chat model that batches.

A wrapped model is an object of a subclass made for its class: all that the class has works, and only this differs:

- `batch` and `abatch` make their calls as one group by the batch route; all others take the standard route unless
  `presort.batch()` says otherwise;
- a call on the batch route does not stream;
- the SDK clients are copies whose HTTP goes through presort (`presort.langchain.clients`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from langchain_core.runnables.config import get_config_list
from pydantic import Field, create_model

from presort import runtime
from presort.config import Batching, Settings, override
from presort.context import Wish, asked, wish_for
from presort.errors import ConfigurationError
from presort.langchain import clients
from presort.langchain.calls import Beside, Spread, iterate_beside
from presort.request import Route
from presort.telemetry import warn

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel as _Base
    from langchain_core.outputs import ChatResult
else:
    _Base = object

M = TypeVar("M")

_classes: dict[type[Any], type[Any]] = {}
_lock = threading.Lock()


class _Kind(type):
    def __instancecheck__(cls, thing: object) -> bool:
        return isinstance(thing, _Optimized)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, _Optimized)


class OptimizedLLMWrapper(metaclass=_Kind):
    """Make a chat model of LangChain batch; returns an object of the model's own class, the argument is left unchanged.

    Args:
        model: A `ChatAnthropic` or `ChatOpenAI`, or a subclass of them. One that is wrapped already is returned as it
            is, or with the settings given here added to its own.
        batching: Settings for this model's calls alone, by name, as in `presort.configure(batching=…)`.
        caching: As `batching`.

    Example:
        >>> model = OptimizedLLMWrapper(ChatAnthropic(model="claude-haiku-4-5"))
        >>> answers = (prompt | model | parser).batch(questions)  # Batch API, half price
        >>> answer = model.invoke("Now!")  # standard API

    Raises:
        TypeError: The model is of no class that this knows.
        ConfigurationError: A setting is unknown or wrong.
    """

    def __new__(  # type: ignore[misc]  # what comes back is the model's own class
        cls, model: M, *, batching: Mapping[str, Any] | None = None, caching: Mapping[str, Any] | None = None
    ) -> M:
        """Wrap the model."""
        own = _Own(_frozen(batching), _frozen(caching))
        own.settings()
        if isinstance(model, _Optimized):
            if own == _NOTHING_OWN:
                return model
            wrapped = copy.copy(model)
            wrapped.presort_settings = model.presort_settings.with_(own)
            return wrapped
        kind = _class_for(type(model))
        twin = copy.copy(model)
        object.__setattr__(twin, "__class__", kind)
        clients.adopt(twin, kind.presort_family)
        twin.__dict__["presort_settings"] = own
        return twin


@dataclass(frozen=True, slots=True)
class _Own:
    """A wrapped model's own settings, beside the process's."""

    batching: tuple[tuple[str, Any], ...] = ()
    caching: tuple[tuple[str, Any], ...] = ()

    def settings(self) -> Settings:
        """Return the process's settings with these put over them."""
        general = runtime.settings()
        if self == _NOTHING_OWN:
            return general
        try:
            return _merged(general, self)
        except TypeError:
            # no setting is a list or mapping: it will say which
            return _merged.__wrapped__(general, self)

    def with_(self, later: _Own) -> _Own:
        """Return these with others put over them."""
        return _Own(
            _frozen({**dict(self.batching), **dict(later.batching)}),
            _frozen({**dict(self.caching), **dict(later.caching)}),
        )


_NOTHING_OWN = _Own()


def _frozen(section: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    if section is not None and not isinstance(section, Mapping):
        raise ConfigurationError(f"expected settings by name, got {section!r}")
    return tuple(sorted((section or {}).items()))


@lru_cache(64)
def _merged(general: Settings, own: _Own) -> Settings:
    return override(general, batching=dict(own.batching), caching=dict(own.caching))


def _class_for(base: type[Any]) -> type[Any]:
    """Return the subclass of a chat model's class whose objects batch, making it if it is the first."""
    with _lock:
        kind = _classes.get(base)
        if kind is None:
            family = clients.family_of(base)
            if family is None:
                raise TypeError(
                    "OptimizedLLMWrapper takes ChatAnthropic, ChatOpenAI and their subclasses (the model itself, "
                    f"before anything is bound to it), got {base.__module__}.{base.__qualname__}"
                )
            kind = create_model(
                base.__name__,
                __base__=(_Optimized, base),
                __module__=base.__module__,
                __doc__=base.__doc__,
                # a field, so that a model rebuilt from its fields keeps it
                presort_settings=(Any, Field(_NOTHING_OWN, exclude=True, repr=False)),
            )
            kind.__qualname__ = base.__qualname__
            clients.install(kind, base, family)
            _classes[base] = kind
        return kind


def _unpickled(base: type[Any]) -> Any:
    kind: Any = _class_for(base)
    return kind.__new__(kind)


class _Optimized(_Base):
    """What the subclasses made for chat models' classes have of ours."""

    if TYPE_CHECKING:
        presort_settings: _Own
        presort_base: type[Any]
        presort_family: clients.Family

    # -- routes
    def _batching(self) -> Batching:
        return self.presort_settings.settings().batching

    def _asked(self) -> Wish | None:
        """Return the wish for the batch route that holds now, with our settings; `None` without one."""
        wish = wish_for(clients.owner_of(self))
        if wish is None or wish.route is not Route.BATCH:
            return None
        return wish if wish.batching is not None else replace(wish, batching=self._batching())

    def _batches(self) -> bool:
        """Whether a call made now takes the batch route, as far as can be known here."""
        wish = self._asked()
        return wish is not None and wish.batching is not None and wish.batching.enabled

    def _wish_for_many(self, count: int) -> Wish | None:
        """Return what to ask for a group of calls; `None` is nothing: leave them to LangChain."""
        owner = clients.owner_of(self)
        batching = self._batching()
        outer = wish_for(owner)
        if not batching.enabled or count < batching.min_requests or count == 0:
            return None
        if outer is None:
            return Wish(Route.BATCH, owner=owner, batching=batching)
        if outer.route is not Route.BATCH:
            return None
        return Wish(Route.BATCH, outer.deadline_seconds, owner=owner, batching=batching)

    async def abatch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Make the calls as one group, by the batch route where their vendor and the configuration allow."""
        wish = self._wish_for_many(len(inputs))
        if wish is None:
            return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        return await self._spread(wish, inputs, config, return_exceptions=return_exceptions, **kwargs).results()

    def batch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Make the calls as one group, by the batch route where their vendor and the configuration allow."""
        wish = self._wish_for_many(len(inputs))
        if wish is None or not self._can_run_beside("batch"):
            return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

        async def work() -> list[Any]:
            return await self._spread(wish, inputs, config, return_exceptions=return_exceptions, **kwargs).results()

        return Beside(work).result()

    async def abatch_as_completed(
        self, inputs: Any, config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> AsyncIterator[tuple[int, Any]]:
        """Make calls and yield (position, result) as they come; by the batch route under `presort.batch()` only."""
        wish = self._wish_as_completed("abatch_as_completed", len(inputs))
        if wish is None:
            results: AsyncIterator[tuple[int, Any]] = super().abatch_as_completed(  # type: ignore[call-overload]
                inputs, config, return_exceptions=return_exceptions, **kwargs
            )
        else:
            results = self._spread(wish, inputs, config, return_exceptions=return_exceptions, **kwargs).as_completed()
        async for item in results:
            yield item

    def batch_as_completed(
        self, inputs: Any, config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> Iterator[tuple[int, Any]]:
        """Make calls and yield (position, result) as they come; by the batch route under `presort.batch()` only."""
        wish = self._wish_as_completed("batch_as_completed", len(inputs))
        if wish is None or not self._can_run_beside("batch_as_completed"):
            yield from super().batch_as_completed(  # type: ignore[call-overload]
                inputs, config, return_exceptions=return_exceptions, **kwargs
            )
            return

        async def items() -> AsyncIterator[tuple[int, Any]]:
            async for item in self._spread(
                wish, inputs, config, return_exceptions=return_exceptions, **kwargs
            ).as_completed():
                yield item

        yield from iterate_beside(items)

    def _wish_as_completed(self, method: str, count: int) -> Wish | None:
        if self._batches():
            return self._wish_for_many(count)
        if self._wish_for_many(count) is not None:
            warn(
                f"langchain:{method}",
                f"`{method}` takes the standard route; under `with presort.batch():` it takes the batch route",
            )
        return None

    def _can_run_beside(self, method: str) -> bool:
        """Whether the synchronous calls may be made by the asynchronous path, without a difference to the caller."""
        order = self.presort_base.__mro__
        sync, asynchronous = (
            next(place for place, cls in enumerate(order) if name in cls.__dict__)
            for name in ("_generate", "_agenerate")
        )
        if sync < asynchronous:
            warn(
                f"langchain:{self.presort_base.__qualname__}",
                f"`{method}` of {self.presort_base.__qualname__} does not batch: it has a `_generate` of its own "
                "and no `_agenerate`",
            )
            return False
        return clients.has_synchronous_client(self, self.presort_family)

    def _spread(
        self, wish: Wish, inputs: Any, config: Any, /, *, return_exceptions: bool, **kwargs: Any
    ) -> Spread[Any]:
        configs = get_config_list(config, len(inputs))
        calls = [partial(self.ainvoke, value, each, **kwargs) for value, each in zip(inputs, configs, strict=True)]
        return Spread(calls, wish, configs[0].get("max_concurrency"), return_exceptions=return_exceptions)

    # -- no streaming on the batch route: no Batch API accepts it
    def _should_stream(self, *, async_api: bool, run_manager: Any = None, **kwargs: Any) -> bool:
        # only a call that is under way has a run manager; without one somebody asks for `stream()` itself
        if run_manager is not None and self._batches():
            return False
        return super()._should_stream(async_api=async_api, run_manager=run_manager, **kwargs)

    def _should_use_protocol_streaming(self, *, async_api: bool, run_manager: Any = None, **kwargs: Any) -> bool:
        if run_manager is not None and self._batches():
            return False
        return super()._should_use_protocol_streaming(async_api=async_api, run_manager=run_manager, **kwargs)

    def _generate(
        self, messages: list[Any], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        wish = self._asked()
        if wish is None:
            return super()._generate(messages, stop, run_manager, **kwargs)  # type: ignore[safe-super]
        with asked(wish):
            return super()._generate(messages, stop, run_manager, **self._unstreamed(kwargs))  # type: ignore[safe-super]

    async def _agenerate(
        self, messages: list[Any], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        wish = self._asked()
        if wish is None:
            return await super()._agenerate(messages, stop, run_manager, **kwargs)
        with asked(wish):
            return await super()._agenerate(messages, stop, run_manager, **self._unstreamed(kwargs))

    def _unstreamed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not self._batches():
            return kwargs
        kwargs.pop("stream", None)
        return {**kwargs, **self.presort_family.unstreamed}

    # -- copies
    def __copy__(self) -> Any:
        copied = super().__copy__()
        clients.share(copied, self)
        return copied

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Any:
        """Copy the model; one with other values makes clients of its own."""
        copied = super().model_copy(update=update, deep=deep)
        if update:
            clients.renew(copied)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__()
        fields = type(self).model_fields
        held = {name: value for name, value in state["__dict__"].items() if name in fields}
        return _unpickled, (self.presort_base,), {**state, "__dict__": held}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        clients.renew(self)
