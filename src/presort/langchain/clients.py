"""Where LangChain's chat models keep their SDK clients: all that is known here of their private parts.

`ChatAnthropic` makes its clients when they are first used and keeps them as cached properties. `ChatOpenAI` makes them
while it is validated and keeps them as fields. A wrapped model answers for these attributes with copies of the
clients whose HTTP goes through presort; `tests/contracts/test_langchain_clients.py` fails when they move.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import ModuleType
from typing import Any

from presort.network import library
from presort.seam import transport

through_sync_client: ContextVar[bool] = ContextVar("presort_through_sync_client", default=False)
"""Whether asynchronous calls go out through the model's synchronous client: those of a synchronous `batch` do, since
that is the client it would use without us, and an asynchronous one's connections belong to other loops."""

_SEAT = "_presort_seat"


@dataclass(frozen=True, slots=True)
class Family:
    """Chat models that keep their SDK clients in the same places."""

    module: str
    name: str
    clients: Mapping[str, str]
    """Attributes with an SDK client or a resource of one: synchronous -> its asynchronous counterpart."""
    root: tuple[str, str] | None = None
    """The attributes with the SDK clients that the others are resources of; `None` if all are clients."""
    remake: str | None = None
    """The method that makes the clients anew; `None` if that happens where they are first used."""
    unstreamed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of a call that overrule a `streaming=True` of the model."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Every attribute that holds a client."""
        return (*self.clients, *self.clients.values())


FAMILIES = (
    Family("langchain_anthropic.chat_models", "ChatAnthropic", {"_client": "_async_client"}),
    Family(
        "langchain_openai.chat_models.base",
        "BaseChatOpenAI",
        {"client": "async_client", "root_client": "root_async_client"},
        root=("root_client", "root_async_client"),
        remake="validate_environment",
        unstreamed={"stream": False},
    ),
)


def family_of(cls: type[Any]) -> Family | None:
    """Return the family a class belongs to, without importing any; `None` if to none."""
    names = {(base.__module__, base.__qualname__) for base in cls.__mro__}
    return next((family for family in FAMILIES if (family.module, family.name) in names), None)


@dataclass(slots=True)
class _Seat:
    """What a wrapped object has besides its fields. It holds no reference to the object: nothing is left to collect."""

    owner: object = field(default_factory=object)
    """Whom a wish is for."""
    made: dict[str, Any] = field(default_factory=dict)
    """Clients that the model made, by attribute. Not among its fields, so that a rebuilt model makes its own."""
    twins: dict[tuple[int, bool], tuple[Any, Any]] = field(default_factory=dict)
    """(original, copy that goes through presort) by (id of the original, through the synchronous client)."""
    stale: bool = False
    """Whether the clients must be made anew before the first use."""

    def shared(self) -> _Seat:
        """Return the seat of a copy: the same connections, other wishes."""
        return _Seat(made=dict(self.made), stale=self.stale)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Seat:
        return self.shared()


def _seat(model: Any) -> _Seat:
    seat: _Seat = model.__dict__.get(_SEAT) or model.__dict__.setdefault(_SEAT, _Seat())
    return seat


def owner_of(model: Any) -> object:
    """Return whom wishes for this object name."""
    return _seat(model).owner


def install(cls: type[Any], base: type[Any], family: Family) -> None:
    """Have a wrapped class know what it was made of, and answer for its base's client attributes."""
    cls.presort_base, cls.presort_family = base, family
    sync_of = {theirs: ours for ours, theirs in family.clients.items()}
    for name in family.attributes:
        # set here and not in the class body, where pydantic would refuse a field's name
        setattr(cls, name, _attribute(name, sync_of.get(name), base, family))


def adopt(model: Any, family: Family) -> None:
    """Take the clients that a copied model has made out of its fields; one that the user gave it stays."""
    held = model.__dict__
    seat = held[_SEAT] = _Seat()
    sides = (tuple(family.clients), tuple(family.clients.values()))
    for names, root in zip(sides, family.root or (None, None), strict=True):
        for name in names:
            if family.root is None and name in held:
                seat.made[name] = held.pop(name)
            elif root is not None and held.get(root) is not None:
                seat.made[name] = held[name]
        for name in names:
            if root is not None and name in seat.made:
                held[name] = None


def share(model: Any, original: Any) -> None:
    """Give a copy of a wrapped object a seat of its own: the same connections, other wishes."""
    model.__dict__[_SEAT] = _seat(original).shared()


def renew(model: Any) -> None:
    """Drop what was made of other values: clients, and whatever else is cached beside the fields."""
    for name in set(model.__dict__) - set(type(model).model_fields):
        del model.__dict__[name]
    model.__dict__[_SEAT] = _Seat(stale=True)


def has_synchronous_client(model: Any, family: Family) -> bool:
    """Whether the model can make synchronous calls: one with an asynchronous source of keys cannot."""
    return getattr(model, next(iter(family.clients))) is not None


def _attribute(name: str, sync_name: str | None, base: type[Any], family: Family) -> property:
    """Make the property that stands for a client attribute of a wrapped class."""

    def read(model: Any) -> Any:
        client = _original(model, name, base, family)
        through = None
        if sync_name is not None and through_sync_client.get():
            through = _original(model, sync_name, base, family)
        return None if client is None else _twin(_seat(model), client, through)

    def write(model: Any, client: Any) -> None:
        seat = _seat(model)
        seat.made[name] = _untwinned(seat, client)

    return property(read, write)


def _original(model: Any, name: str, base: type[Any], family: Family) -> Any:
    """Return the client the model would use without us, having it made if need be."""
    seat = _seat(model)
    if seat.stale:
        seat.stale = False
        if family.remake is not None:
            getattr(model, family.remake)()
    client = seat.made.get(name) or model.__dict__.get(name)
    if client is not None:
        return client
    maker = inspect.getattr_static(base, name, None)
    if maker is None:
        return None
    # not through `cached_property` itself: it would look for its value where `pickle` and `copy` find it
    made = maker.func(model) if isinstance(maker, cached_property) else maker.__get__(model, base)
    return seat.made.setdefault(name, made)


def _twin(seat: _Seat, client: Any, through: Any | None) -> Any:
    """Return the copy of an SDK client, or of a resource of one, whose HTTP goes through presort."""
    key = (id(client), through is not None)
    known = seat.twins.get(key)
    if known is None:
        known = seat.twins[key] = (client, _copied(seat, client, through))
    return known[1]


def _untwinned(seat: _Seat, client: Any) -> Any:
    """Return the original of a twin, or of a resource of one: models read one attribute to set the next."""
    for original, twin in seat.twins.values():
        if client is twin:
            return original
        if getattr(client, "_client", None) is twin:
            return type(client)(original)
    return client


def _copied(seat: _Seat, client: Any, through: Any | None) -> Any:
    inner = getattr(client, "_client", None)
    if _is_http(inner):
        http = inner if through is None else asynchronous_face(through._client)  # noqa: SLF001 - it has no public name
        return client.copy(http_client=transport(http, owner=seat.owner))
    if _is_http(getattr(inner, "_client", None)):
        # a resource, such as `chat.completions`: its `_client` is the SDK's client
        resource: Any = type(client)
        return resource(_twin(seat, inner, None if through is None else through._client))  # noqa: SLF001
    # a stand-in of the user's own
    return client


def _is_http(thing: Any) -> bool:
    try:
        lib = library(thing)
    except TypeError:
        return False
    return isinstance(thing, (lib.Client, lib.AsyncClient))


def asynchronous_face(client: Any) -> Any:
    """Return an asynchronous httpx or httpx2 client that sends through a synchronous one's transports, from threads.

    It has all that the synchronous one has: headers, cookies, authentication, hooks, timeouts, mounts.
    """
    lib = library(client)
    face_class = _face_class(lib)
    face = lib.AsyncClient.__new__(lib.AsyncClient)
    face.__dict__.update(client.__dict__)
    face._transport = face_class(client._transport)  # noqa: SLF001 - as in presort.network, which says why
    face._mounts = {  # noqa: SLF001
        pattern: None if mounted is None else face_class(mounted)
        for pattern, mounted in client._mounts.items()  # noqa: SLF001
    }
    face._event_hooks = {  # noqa: SLF001
        event: [_asynchronous_hook(hook) for hook in hooks]
        for event, hooks in client._event_hooks.items()  # noqa: SLF001
    }
    face._state = type(client._state).UNOPENED  # noqa: SLF001
    return face


def _asynchronous_hook(hook: Callable[[Any], Any]) -> Callable[[Any], Awaitable[None]]:
    async def run(message: Any) -> None:
        # a synchronous hook may call `read()`, which needs what is read already
        await message.aread()
        hook(message)

    return run


@cache
def _face_class(lib: ModuleType) -> type[Any]:
    class Face(lib.AsyncBaseTransport):  # type: ignore[name-defined,misc]
        """Sends through a synchronous transport, from a worker thread."""

        def __init__(self, inner: Any) -> None:
            self.presort_face_of = inner

        async def handle_async_request(self, request: Any) -> Any:
            return await asyncio.to_thread(self._send, request)

        def _send(self, request: Any) -> Any:
            response = self.presort_face_of.handle_request(request)
            if response.is_stream_consumed:
                return response
            try:
                body = b"".join(response.stream)
            finally:
                response.close()
            return lib.Response(
                response.status_code,
                headers=response.headers,
                stream=lib.ByteStream(body),
                extensions=response.extensions,
            )

    return Face
