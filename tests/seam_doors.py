"""The ways an application calls a vendor, each with the HTTP settings it is given: four SDKs, four LangChain classes.

A door that is not installed here is not in `DOORS`. `wrapped=True` puts presort's transport in by the door's own
public means, or where it has none by the way that `presort.langchain` takes.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import presort
from presort.network import library

KEYS = {"anthropic": "sk-ant-x", "openai": "sk-x", "google": "g-x"}
QUESTION = [{"role": "user", "content": "hello"}]


@dataclass
class Session:
    """An open door. `ask` and `stream` return what the SDK does: something to await if it is asynchronous."""

    ask: Callable[[], Any]
    read: Callable[[Any], Any]
    stream: Callable[[], Any]
    closing: list[Callable[[], Any]] = field(default_factory=list)

    async def close(self) -> None:
        """Close every HTTP client."""
        for close in self.closing:
            await settle(close())


@dataclass(frozen=True)
class Door:
    """How to open a session: (URL, HTTP settings, wrapped, asynchronous)."""

    name: str
    needs: tuple[str, ...]
    open: Callable[[str, dict[str, Any], bool, bool], Session]
    metered: bool = False

    def __str__(self) -> str:
        return self.name


async def settle(value: Any) -> Any:
    """Await what an asynchronous client returned; pass what a synchronous one did."""
    return await value if inspect.isawaitable(value) else value


async def each(items: Any) -> AsyncIterator[Any]:
    """Iterate what is iterable either way."""
    if hasattr(items, "__aiter__"):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def http_client(lib: ModuleType, settings: dict[str, Any], wrapped: bool, asynchronous: bool) -> Any:
    """Make an HTTP client of the user's own."""
    client = (lib.AsyncClient if asynchronous else lib.Client)(**settings)
    return presort.transport(client) if wrapped else client


def closing(client: Any) -> Callable[[], Any]:
    """Return what closes an HTTP client."""
    return getattr(client, "aclose", None) or client.close


@cache
def lib_of(sdk: str) -> ModuleType:
    """Return the HTTP library of an SDK, read off its client."""
    if sdk == "google":
        from google import genai

        client = genai.Client(api_key="x")
        found = library(client._api_client._httpx_client)
        client.close()
        return found
    module = importlib.import_module(sdk)
    maker = module.Client if sdk == "ollama" else getattr(module, {"anthropic": "Anthropic", "openai": "OpenAI"}[sdk])
    client = maker() if sdk == "ollama" else maker(api_key="x")
    found = library(client._client)
    client._client.close()
    return found


# -- SDKs --------------------------------------------------------------------------------------------------------


def anthropic_client(url: str, http: Any, asynchronous: bool, **options: Any) -> Any:
    """Make an Anthropic client."""
    import anthropic

    cls = anthropic.AsyncAnthropic if asynchronous else anthropic.Anthropic
    return cls(base_url=url, api_key=KEYS["anthropic"], http_client=http, **{"max_retries": 0, **options})


def openai_client(url: str, http: Any, asynchronous: bool, **options: Any) -> Any:
    """Make an OpenAI client."""
    import openai

    cls = openai.AsyncOpenAI if asynchronous else openai.OpenAI
    return cls(base_url=f"{url}/v1", api_key=KEYS["openai"], http_client=http, **{"max_retries": 0, **options})


def _anthropic(url: str, settings: dict[str, Any], wrapped: bool, asynchronous: bool) -> Session:
    http = http_client(lib_of("anthropic"), settings, wrapped, asynchronous)
    create = anthropic_client(url, http, asynchronous).messages.create
    call = {"model": "claude-haiku-4-5", "max_tokens": 64, "messages": QUESTION}
    return Session(
        lambda: create(**call),
        lambda message: message.content[0].text,
        lambda: create(**call, stream=True),
        [closing(http)],
    )


def _openai(url: str, settings: dict[str, Any], wrapped: bool, asynchronous: bool) -> Session:
    http = http_client(lib_of("openai"), settings, wrapped, asynchronous)
    create = openai_client(url, http, asynchronous).chat.completions.create
    call = {"model": "gpt-4.1-mini", "messages": QUESTION}
    return Session(
        lambda: create(**call),
        lambda completion: completion.choices[0].message.content,
        lambda: create(**call, stream=True, stream_options={"include_usage": True}),
        [closing(http)],
    )


def _google(url: str, settings: dict[str, Any], wrapped: bool, asynchronous: bool) -> Session:
    from google import genai
    from google.genai import types

    lib = lib_of("google")
    sync_http = http_client(lib, settings, wrapped, asynchronous=False)
    async_http = http_client(lib, settings, wrapped, asynchronous=True)
    # it has a timeout of its own, in milliseconds, that wins over its client's
    timeout = {"timeout": int(settings["timeout"].read * 1000)} if "timeout" in settings else {}
    options = types.HttpOptions(base_url=url, httpx_client=sync_http, httpx_async_client=async_http, **timeout)
    client = genai.Client(api_key=KEYS["google"], vertexai=False, http_options=options)
    models = client.aio.models if asynchronous else client.models
    call = {"model": "gemini-3.8-flash", "contents": "hello"}
    return Session(
        lambda: models.generate_content(**call),
        lambda response: response.text,
        lambda: models.generate_content_stream(**call),
        [sync_http.close, async_http.aclose],
    )


def _ollama(url: str, settings: dict[str, Any], wrapped: bool, asynchronous: bool) -> Session:
    import ollama

    client = (ollama.AsyncClient if asynchronous else ollama.Client)(host=url, **settings)
    if wrapped:
        client = presort.wrap(client)
    call = {"model": "llama3.3", "messages": QUESTION}
    return Session(
        lambda: client.chat(**call),
        lambda response: response.message.content,
        lambda: client.chat(**call, stream=True),
        [closing(client._client)],
    )


# -- LangChain ---------------------------------------------------------------------------------------------------


def _langchain(model: Any, asynchronous: bool, https: list[Any]) -> Session:
    return Session(
        lambda: model.ainvoke("hello") if asynchronous else model.invoke("hello"),
        lambda message: str(message.content),
        lambda: model.astream("hello") if asynchronous else model.stream("hello"),
        [closing(http) for http in https],
    )


def _chat_anthropic(url: str, settings: dict[str, Any], wrapped: bool, asynchronous: bool) -> Session:
    from langchain_anthropic import ChatAnthropic

    http = http_client(lib_of("anthropic"), settings, wrapped, asynchronous)
    model = ChatAnthropic(model="claude-haiku-4-5", max_tokens=64, base_url=url, api_key=KEYS["anthropic"])
    # no public way: langchain.md, 1
    model.__dict__["_async_client" if asynchronous else "_client"] = anthropic_client(url, http, asynchronous)
    return _langchain(model, asynchronous, [http])


def _chat_openai(url: str, settings: dict[str, Any], wrapped: bool, asynchronous: bool) -> Session:
    from langchain_openai import ChatOpenAI

    http = http_client(lib_of("openai"), settings, wrapped, asynchronous)
    model = ChatOpenAI(
        model="gpt-4.1-mini",
        base_url=f"{url}/v1",
        api_key=KEYS["openai"],
        use_responses_api=False,
        max_retries=0,
        stream_usage=True,
        **{"http_async_client" if asynchronous else "http_client": http},
    )
    return _langchain(model, asynchronous, [http])


def _chat_google(url: str, settings: dict[str, Any], wrapped: bool, asynchronous: bool) -> Session:
    from langchain_google_genai import ChatGoogleGenerativeAI

    lib = lib_of("google")
    both = both_transports(lib, settings)
    model = ChatGoogleGenerativeAI(
        model="gemini-3.8-flash",
        base_url=url,
        api_key=KEYS["google"],
        vertexai=False,
        max_retries=1,
        client_args={"transport": presort.transport(both) if wrapped else both},
    )
    return _langchain(model, asynchronous, [both.one, both.other])


def _chat_ollama(url: str, settings: dict[str, Any], wrapped: bool, asynchronous: bool) -> Session:
    from langchain_ollama import ChatOllama

    lib = lib_of("ollama")
    inner = (lib.AsyncHTTPTransport if asynchronous else lib.HTTPTransport)(**settings)
    used = {"transport": presort.transport(inner) if wrapped else inner}
    model = ChatOllama(
        model="llama3.3",
        base_url=url,
        **{"async_client_kwargs" if asynchronous else "sync_client_kwargs": used},
    )
    return _langchain(model, asynchronous, [inner])


def both_transports(lib: ModuleType, settings: dict[str, Any]) -> Any:
    """Make a transport that is synchronous and asynchronous at once, as `client_args` of langchain-google wants."""

    class Both(lib.BaseTransport, lib.AsyncBaseTransport):
        def __init__(self) -> None:
            self.one, self.other = lib.HTTPTransport(**settings), lib.AsyncHTTPTransport(**settings)

        def handle_request(self, request: Any) -> Any:
            return self.one.handle_request(request)

        async def handle_async_request(self, request: Any) -> Any:
            return await self.other.handle_async_request(request)

    return Both()


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


ALL_DOORS = [
    Door("anthropic", ("anthropic",), _anthropic, metered=True),
    Door("openai", ("openai",), _openai, metered=True),
    Door("google-genai", ("google.genai",), _google),
    Door("ollama", ("ollama",), _ollama),
    Door("ChatAnthropic", ("langchain_anthropic",), _chat_anthropic, metered=True),
    Door("ChatOpenAI", ("langchain_openai",), _chat_openai, metered=True),
    Door("ChatGoogleGenerativeAI", ("langchain_google_genai",), _chat_google),
    Door("ChatOllama", ("langchain_ollama",), _chat_ollama),
]
DOORS = [door for door in ALL_DOORS if all(_installed(name) for name in door.needs)]
