"""What a wrapped chat model is, before anything is sent."""

from __future__ import annotations

import asyncio
import builtins
import copy
import gc
import importlib
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.load import dumpd
from langchain_core.runnables import ConfigurableField
from langchain_ollama import ChatOllama
from langchain_openai import AzureChatOpenAI, ChatOpenAI

import presort
from presort import OptimizedLLMWrapper, runtime
from presort.context import Ticket, Wish, asked, current_wish, wish_for
from presort.engine import Group
from presort.errors import ConfigurationError, MissingExtraError
from presort.langchain import clients
from presort.langchain.calls import Beside, Spread
from presort.request import Route

KEY = "sk-secret-of-the-test"


class Custom(ChatOpenAI):
    """A user's own class."""

    flavour: str = "plain"


def claude(**more: Any) -> ChatAnthropic:
    """Make a bare Claude."""
    return ChatAnthropic(model="claude-haiku-4-5", api_key=KEY, **more)


def gpt(**more: Any) -> ChatOpenAI:
    """Make a bare GPT."""
    return ChatOpenAI(model="gpt-5.4-mini", api_key=KEY, **more)


def custom(**more: Any) -> Custom:
    """Make a model of a user's own class."""
    return Custom(model="gpt-5.4-mini", api_key=KEY, flavour="mint", **more)


def azure(**more: Any) -> AzureChatOpenAI:
    """Make an Azure model."""
    return AzureChatOpenAI(
        azure_deployment="d", azure_endpoint="https://x.openai.azure.com", api_version="2025-01-01", api_key=KEY, **more
    )


each_model = pytest.mark.parametrize("bare", [claude, gpt, custom, azure])
each_client = pytest.mark.parametrize(
    ("bare", "attribute"),
    [
        (claude, "_client"),
        (claude, "_async_client"),
        (gpt, "root_client"),
        (gpt, "root_async_client"),
        (gpt, "client"),
        (gpt, "async_client"),
    ],
)


@pytest.fixture(autouse=True)
def _own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runtime, "_settings", None)
    presort.configure(store=str(tmp_path / "presort.db"))
    yield
    presort.close()


def http_of(client: Any) -> Any:
    """Return the HTTP client below an SDK client or a resource."""
    below = client._client
    return below if hasattr(below, "_transport") else below._client


# What it is


@each_model
def test_it_is_an_object_of_the_models_own_class(bare: Callable[[], Any]) -> None:
    """A wrapped model passes isinstance for its class, keeps the class's names, and is an OptimizedLLMWrapper."""
    model = bare()
    wrapped = OptimizedLLMWrapper(model)
    cls, kind = type(model), type(wrapped)
    assert isinstance(wrapped, cls)
    assert (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__) == (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
        kind.__doc__,
    )
    assert isinstance(wrapped, OptimizedLLMWrapper)
    assert not isinstance(model, OptimizedLLMWrapper)


@each_model
def test_it_serialises_like_the_bare_model(bare: Callable[[], Any]) -> None:
    """LangChain's serialisation, the model's dump and its cache key are those of the bare model."""
    model = bare()
    wrapped = OptimizedLLMWrapper(model)
    assert dumpd(model) == dumpd(wrapped)
    left_out = set(clients.family_of(type(model)).attributes)
    assert model.model_dump(exclude=left_out) == wrapped.model_dump(exclude=left_out)
    assert model._get_llm_string() == wrapped._get_llm_string()
    assert model._get_ls_params() == wrapped._get_ls_params()


@each_model
def test_the_argument_is_left_unchanged(bare: Callable[[], Any]) -> None:
    """Wrapping a model and reading all its clients changes nothing in the model."""
    model = bare()
    before = dict(model.__dict__), set(model.model_fields_set)
    wrapped = OptimizedLLMWrapper(model, batching={"flush_seconds": 5})
    for name in clients.family_of(type(model)).attributes:
        getattr(wrapped, name)
    assert before == (dict(model.__dict__), set(model.model_fields_set))
    assert "presort_settings" not in type(model).model_fields


def test_one_class_is_made_for_each_class() -> None:
    """Two wrapped models of one class are of one class."""
    assert type(OptimizedLLMWrapper(gpt())) is type(OptimizedLLMWrapper(gpt()))
    assert type(OptimizedLLMWrapper(gpt())) is not type(OptimizedLLMWrapper(custom()))


def test_wrapping_takes_less_than_a_millisecond() -> None:
    """Wrapping a model costs less than 1 ms: hosts do it for each call."""
    model = gpt()
    OptimizedLLMWrapper(model)
    started = time.perf_counter()
    for _ in range(100):
        OptimizedLLMWrapper(model, batching={"flush_seconds": 5})
    assert (time.perf_counter() - started) / 100 < 0.001


def test_wrapping_twice_is_wrapping_once() -> None:
    """A wrapped model comes back as it is."""
    wrapped = OptimizedLLMWrapper(gpt())
    assert wrapped is OptimizedLLMWrapper(wrapped)


def test_wrapping_again_adds_settings() -> None:
    """Wrapping a wrapped model with settings returns another one, with both its settings and these."""
    first = OptimizedLLMWrapper(gpt(), batching={"flush_seconds": 5, "min_requests": 2})
    second = OptimizedLLMWrapper(first, batching={"min_requests": 3})
    assert (5.0, 2) == (first._batching().flush_seconds, first._batching().min_requests)
    assert (5.0, 3) == (second._batching().flush_seconds, second._batching().min_requests)
    assert type(first) is type(second)


@pytest.mark.parametrize("model", [ChatOllama(model="x"), gpt().bind(stop=["x"]), "gpt"])
def test_other_things_are_refused(model: Any) -> None:
    """What is no ChatAnthropic or ChatOpenAI raises a TypeError that names these and what it got."""
    with pytest.raises(TypeError, match=f"ChatAnthropic, ChatOpenAI and their subclasses.*{type(model).__name__}"):
        OptimizedLLMWrapper(model)


def test_its_repr_shows_no_key() -> None:
    """Neither repr nor str of a wrapped model hold its key."""
    for bare in (claude, gpt):
        wrapped = OptimizedLLMWrapper(bare())
        _ = [getattr(wrapped, name) for name in clients.family_of(type(wrapped)).attributes]
        assert KEY not in repr(wrapped) + str(wrapped)


@each_client
def test_a_wrapped_model_is_freed_with_its_last_reference(bare: Callable[[], Any], attribute: str) -> None:
    """Nothing holds a wrapped model whose clients were used, not even a reference cycle."""
    wrapped = OptimizedLLMWrapper(bare())
    getattr(wrapped, attribute)
    seen = weakref.ref(wrapped)
    gc.disable()
    try:
        del wrapped
        assert seen() is None
    finally:
        gc.enable()


def test_its_clients_are_freed_too() -> None:
    """A hundred wrapped and dropped models leave no SDK client behind."""
    model, seen = gpt(), weakref.WeakSet()
    for _ in range(100):
        wrapped = OptimizedLLMWrapper(model)
        for name in clients.family_of(ChatOpenAI).attributes:
            seen.add(getattr(wrapped, name))
    assert len(seen) >= 4
    del wrapped
    gc.collect()
    assert len(seen) == 0


# Settings


def test_its_settings_go_over_the_process_ones() -> None:
    """A setting given to the wrapper holds for it, the others are the process's of the moment."""
    wrapped = OptimizedLLMWrapper(gpt(), batching={"flush_seconds": 5})
    presort.configure(store=presort.runtime.settings().store, batching={"min_requests": 7})
    assert (5.0, 7) == (wrapped._batching().flush_seconds, wrapped._batching().min_requests)


@pytest.mark.parametrize("batching", [{"flush_second": 5}, {"flush_seconds": []}, {"flush_seconds": -1}, True])
def test_wrong_settings_are_refused_at_once(batching: Any) -> None:
    """An unknown name, a wrong type and a wrong value raise ConfigurationError when the model is wrapped."""
    with pytest.raises(ConfigurationError):
        OptimizedLLMWrapper(gpt(), batching=batching)


# Clients


@each_client
def test_its_clients_are_copies_over_the_models_connections(bare: Callable[[], Any], attribute: str) -> None:
    """A wrapped client is of the same class and settings, and sends through the transport of the bare model's."""
    model = bare()
    wrapped = OptimizedLLMWrapper(model)
    ours = getattr(wrapped, attribute)
    theirs = getattr(model, attribute)
    assert type(theirs) is type(ours)
    assert theirs is not ours
    assert http_of(theirs)._transport is http_of(ours)._transport._inner
    assert ours is getattr(wrapped, attribute)


def test_the_resources_and_their_client_are_one() -> None:
    """`client` is a resource of `root_client`, as in the bare model."""
    wrapped = OptimizedLLMWrapper(gpt())
    assert wrapped.root_client is wrapped.client._client
    assert wrapped.root_async_client is wrapped.async_client._client


def test_a_client_the_user_gave_is_used() -> None:
    """A `client` or `http_client` given to the model is what the wrapped model sends through."""
    http = httpx2.Client()
    given = openai.OpenAI(api_key=KEY, http_client=http)
    by_client = OptimizedLLMWrapper(gpt(client=given.chat.completions))
    by_http = OptimizedLLMWrapper(gpt(http_client=http))
    assert http._transport is http_of(by_client.client)._transport._inner
    assert http._transport is http_of(by_http.client)._transport._inner
    rebuilt = by_client.model_copy(update={"temperature": 0.5})
    assert http._transport is http_of(rebuilt.client)._transport._inner


def test_a_client_that_is_no_sdks_is_left_alone() -> None:
    """A stand-in for a client is used as it is."""
    stand_in = object()
    model = claude()
    model.__dict__["_client"] = stand_in
    assert stand_in is OptimizedLLMWrapper(model)._client


def test_a_missing_synchronous_client_stays_missing() -> None:
    """A model whose key can only be had asynchronously has no synchronous client, wrapped or not."""

    async def key() -> str:
        return KEY

    model = ChatOpenAI(model="gpt-5.4-mini", api_key=key)
    wrapped = OptimizedLLMWrapper(model)
    assert (None, None) == (model.client, wrapped.client)
    with pytest.raises(ValueError, match="Sync client is not available"):
        wrapped.batch(["a", "b"])


# Copies


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "model_copy": lambda model: model.model_copy(),
    "update": lambda model: model.model_copy(update={"temperature": 0.5}),
    "fields": lambda model: (
        model.configurable_fields(temperature=ConfigurableField(id="t"))
        .with_config(configurable={"t": 0.5})
        .prepare()[0]
    ),
}


@each_client
@pytest.mark.parametrize("way", COPIES)
def test_copies_batch_too(bare: Callable[[], Any], attribute: str, way: str) -> None:
    """However a wrapped model is copied, the copy is one with the same settings, with clients and wishes of its own."""
    wrapped = OptimizedLLMWrapper(bare(), batching={"min_requests": 4})
    getattr(wrapped, attribute)
    copied = COPIES[way](wrapped)
    assert type(wrapped) is type(copied)
    assert 4 == copied._batching().min_requests
    transport = http_of(getattr(copied, attribute))._transport
    assert clients.owner_of(copied) is transport._owner
    assert clients.owner_of(copied) is not clients.owner_of(wrapped)


@pytest.mark.parametrize("way", ["update", "fields"])
def test_a_model_with_other_values_makes_its_own_clients(way: str) -> None:
    """A copy with another base URL sends there."""
    for bare, field, attribute in ((claude, "anthropic_api_url", "_client"), (gpt, "openai_api_base", "root_client")):
        wrapped = OptimizedLLMWrapper(bare())
        getattr(wrapped, attribute)
        if way == "update":
            other = wrapped.model_copy(update={field: "http://127.0.0.1:1/v9"})
        else:
            configurable = wrapped.configurable_fields(**{field: ConfigurableField(id="u")})
            other = configurable.with_config(configurable={"u": "http://127.0.0.1:1/v9"}).prepare()[0]
        assert "http://127.0.0.1:1/v9" == str(getattr(other, attribute).base_url).rstrip("/")


def test_a_plain_copy_shares_the_connections() -> None:
    """A copy with the same values sends through the same connections."""
    model = gpt()
    wrapped = OptimizedLLMWrapper(model)
    for way in ("copy", "deepcopy", "model_copy"):
        assert model.root_client._client._transport is COPIES[way](wrapped).root_client._client._transport._inner


def test_a_pickle_holds_no_client() -> None:
    """A wrapped ChatOpenAI can be pickled even after its clients were used, which a bare one cannot at all."""
    wrapped = OptimizedLLMWrapper(gpt())
    _ = wrapped.root_client, wrapped.root_async_client
    assert b"httpx" not in pickle.dumps(wrapped)


# Wishes


def wish(model: Any) -> Wish | None:
    """What holds for a model's calls now."""
    return wish_for(clients.owner_of(model))


def test_a_wish_holds_for_its_owner_only() -> None:
    """A wish of one wrapped model does not hold for another, nor for a copy of the first."""
    one, other = OptimizedLLMWrapper(gpt()), OptimizedLLMWrapper(gpt())
    with asked(Wish(Route.BATCH, owner=clients.owner_of(one))):
        assert wish(one) is not None
        assert wish(other) is None
        assert wish(copy.copy(one)) is None


def test_what_is_asked_for_many_calls() -> None:
    """Many calls ask for the batch route, unless urgent, too few, or switched off; a deadline outside holds inside."""
    model = OptimizedLLMWrapper(gpt(), batching={"min_requests": 2})
    off = OptimizedLLMWrapper(gpt(), batching={"enabled": False})
    found = model._wish_for_many(2)
    assert (Route.BATCH, None, clients.owner_of(model)) == (found.route, found.deadline_seconds, found.owner)
    assert model._wish_for_many(1) is None
    assert off._wish_for_many(2) is None
    with presort.urgent():
        assert model._wish_for_many(2) is None
    with presort.batch(deadline=60):
        assert 60 == model._wish_for_many(2).deadline_seconds


# Groups


def test_a_ticket_counts_once() -> None:
    """A ticket is taken or given back, whichever is first, and counts its call out only in the second case."""
    taken, returned = Group(expected=1), Group(expected=1)
    first, second = Ticket(taken), Ticket(returned)
    assert first.take() is taken
    assert first.take() is None
    first.give_back()
    assert not taken.complete
    second.give_back()
    second.give_back()
    assert second.take() is None
    assert returned.complete


def test_a_group_tells_when_nothing_more_will_come() -> None:
    """A group that is watched tells when its last missing call is counted out, and not before."""
    group, told = Group(expected=2), []
    group.watch(lambda: told.append(True))
    group.leave()
    assert told == []
    group.leave()
    assert told == [True]


@pytest.mark.anyio
async def test_a_limit_holds_for_calls_on_the_wire_and_not_for_parked_ones() -> None:
    """Of ten calls with a limit of two, at most two run at once, and parked ones do not count."""
    on_the_wire, most, parked = 0, 0, asyncio.Event()
    left = asyncio.Semaphore(0)

    async def standard() -> str:
        nonlocal on_the_wire, most
        on_the_wire += 1
        most = max(most, on_the_wire)
        await asyncio.sleep(0)
        on_the_wire -= 1
        left.release()
        return "standard"

    async def batch() -> str:
        assert current_wish().ticket.take() is not None
        await parked.wait()
        return "batch"

    calls = [batch, standard] * 5
    spread = Spread(calls, Wish(Route.BATCH), 2, return_exceptions=False)
    async with asyncio.timeout(5):
        for _ in range(5):
            await left.acquire()
    parked.set()
    assert ["batch", "standard"] * 5 == await spread.results()
    assert most <= 2


@pytest.mark.anyio
async def test_calls_that_never_reach_the_transport_are_counted_out() -> None:
    """A group is complete once its calls have failed, returned or been cancelled without being handed in."""

    async def fails() -> None:
        raise ValueError("before the transport")

    async def returns() -> None:
        pass

    async def waits() -> None:
        await asyncio.Event().wait()

    spread = Spread([fails, returns, waits, waits], Wish(Route.BATCH), 3, return_exceptions=True)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not spread._group.complete
    spread.cancel()
    await asyncio.gather(*spread._tasks, return_exceptions=True)
    assert spread._group.complete


@pytest.mark.anyio
async def test_the_first_error_ends_the_others() -> None:
    """Without return_exceptions the first error is raised at once and the other calls are cancelled."""
    ended = []

    async def fails() -> None:
        raise KeyError("first")

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(True)
            raise

    with pytest.raises(KeyError):
        await Spread([waits, fails, waits], Wish(Route.BATCH), None, return_exceptions=False).results()
    await asyncio.sleep(0)
    assert [True, True] == ended


# Beside


def test_whoever_stops_waiting_cancels_what_runs_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while waiting is raised at once, and the coroutine beside is cancelled."""
    started, cancelled = threading.Event(), threading.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    beside = Beside(work)
    assert started.wait(5)

    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("presort.langchain.calls.concurrent.futures.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        beside.result()
    assert cancelled.wait(5)


def test_what_runs_beside_has_the_callers_context() -> None:
    """Context variables of the caller hold beside, and what is set there does not come back."""

    async def work() -> Any:
        return wish_for(None)

    with presort.batch(deadline=9):
        assert 9 == Beside(work).result().deadline_seconds
    assert not clients.through_sync_client.get()


# The missing extra


def test_without_langchain_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing `presort.langchain` without langchain-core raises MissingExtraError with the command to run."""
    real = builtins.__import__

    def no_langchain(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "langchain_core":
            raise ModuleNotFoundError("No module named 'langchain_core'", name="langchain_core")
        return real(name, *rest)

    for name in [name for name in sys.modules if name.startswith("presort.langchain")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", no_langchain)
    with pytest.raises(MissingExtraError, match=r'pip install "presort\[langchain\]"'):
        importlib.import_module("presort.langchain")


def test_the_sdks_are_what_they_are() -> None:
    """The wrapped models' clients pass isinstance for their SDK's classes."""
    assert isinstance(OptimizedLLMWrapper(claude())._async_client, anthropic.AsyncAnthropic)
    assert isinstance(OptimizedLLMWrapper(azure()).root_client, openai.AzureOpenAI)
