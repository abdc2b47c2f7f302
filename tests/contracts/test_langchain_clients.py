"""What `presort.langchain.clients` knows of LangChain's private parts is true of the installed versions."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_core")

import httpx
import httpx2
from langchain_core.language_models import BaseChatModel

import presort
from presort import OptimizedLLMWrapper, runtime
from presort.context import Ticket, Wish, asked
from presort.engine import Group
from presort.langchain import clients
from presort.langchain.clients import FAMILIES, Family
from presort.request import Route

KEY = "sk-test"
ANSWERS = {
    "ChatAnthropic": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-4-5",
        "content": [{"type": "text", "text": "Hi."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    },
    "BaseChatOpenAI": {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-5.4-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    },
}


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """Take a family whose package is installed."""
    pytest.importorskip(request.param.module.partition(".")[0])
    monkeypatch.setattr(runtime, "_settings", None)
    presort.configure(store=str(tmp_path / "presort.db"))
    yield request.param
    presort.close()


def bare(family: Family) -> Any:
    """Make a bare model of a family."""
    if family.name == "ChatAnthropic":
        from langchain_anthropic import ChatAnthropic

        return ChatAnthropic(model="claude-haiku-4-5", api_key=KEY, max_tokens=99)
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model="gpt-5.4-mini", api_key=KEY)


def test_the_family_is_where_it_is_said_to_be(family: Family) -> None:
    """The named module has the named class, and a model's class is recognised by it."""
    cls = getattr(importlib.import_module(family.module), family.name)
    assert issubclass(cls, BaseChatModel)
    assert clients.family_of(type(bare(family))) is family
    if family.remake is not None:
        assert callable(getattr(cls, family.remake))


def test_the_clients_are_where_they_are_said_to_be(family: Family) -> None:
    """Each attribute is a field or a property of the class, and holds an SDK's client or a resource of one."""
    model = bare(family)
    for name in family.attributes:
        assert name in type(model).model_fields or inspect.getattr_static(type(model), name) is not None
        client = getattr(model, name)
        root = client if hasattr(client, "copy") else client._client
        assert isinstance(root._client, (httpx.Client, httpx.AsyncClient, httpx2.Client, httpx2.AsyncClient))
        assert callable(root.copy)


def test_all_clients_are_known(family: Family) -> None:
    """Nothing else in a used model holds an HTTP client."""
    model = bare(family)
    _ = [getattr(model, name) for name in family.attributes]
    holders = {
        name
        for name, value in model.__dict__.items()
        if hasattr(value, "_client") or "httpx" in type(value).__module__.partition(".")[0]
    }
    assert set(family.attributes) == holders


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.anyio
async def test_calls_go_through_the_wrapped_clients(family: Family, asynchronous: bool) -> None:
    """A wrapped model's calls reach our transport with its wish, and take the transport of the bare model's client."""
    # Given a wrapped model over a transport of the test's own
    heard: list[Any] = []
    model = OptimizedLLMWrapper(bare(family))
    name = list(family.clients.values() if asynchronous else family.clients)[-1]
    lib = httpx if isinstance(getattr(model, name)._client, (httpx.Client, httpx.AsyncClient)) else httpx2

    def reply(request: Any) -> Any:
        heard.append(json.loads(request.content))
        return lib.Response(200, json=ANSWERS[family.name])

    kind = lib.AsyncClient if asynchronous else lib.Client
    http = kind(transport=lib.MockTransport(reply))
    sdk = clients._original(model, name, type(model).presort_base, family).copy(http_client=http)
    setattr(model, name, sdk)
    if family.root is not None:
        setattr(model, "async_client" if asynchronous else "client", sdk.chat.completions)
    # When a call is made that asks for a batch, which is switched off
    group = Group(expected=1)
    batching = runtime.settings().batching.model_copy(update={"enabled": False})
    wish = Wish(Route.BATCH, owner=clients.owner_of(model), ticket=Ticket(group), batching=batching)
    with asked(wish):
        answer = await model.ainvoke("Hello.") if asynchronous else model.invoke("Hello.")
    # Then our transport gave the ticket back and let the call pass
    assert "Hi." == answer.content
    assert ["Hello."] == [message["content"] for message in heard[0]["messages"]]
    assert group.complete


def test_streaming_is_decided_where_it_is_said_to_be(family: Family) -> None:
    """LangChain asks `_should_stream` with the run manager before it makes a call a stream."""
    assert "run_manager" in inspect.signature(BaseChatModel._should_stream).parameters
    source = inspect.getsource(BaseChatModel._agenerate_with_cache)
    assert "_should_stream(" in source
    assert "run_manager=run_manager" in source


def test_an_asynchronous_face_has_what_its_client_has(family: Family) -> None:
    """The asynchronous face of a synchronous HTTP client has all attributes that its class would make."""
    for lib in (httpx, httpx2):
        client = lib.Client(headers={"x-a": "b"}, base_url="http://localhost/v1", timeout=7, auth=("u", "p"))
        face = clients.asynchronous_face(client)
        made = lib.AsyncClient()
        assert set(made.__dict__) == set(face.__dict__)
        assert ("b", "http://localhost/v1/", client.timeout, client.auth) == (
            face.headers["x-a"],
            str(face.base_url),
            face.timeout,
            face.auth,
        )
        client.close()
