"""The front doors: wrap what a program already has, or hand in payloads of one's own making."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from presort import runtime
from presort.engine import Group, Run
from presort.engine.accumulator import ADMIT_CHUNK
from presort.errors import ConfigurationError, InputError, MissingKeyError
from presort.providers import provider as provider_named
from presort.providers.base import Prompt, one_line
from presort.request import BatchKey, Outcome, Payload
from presort.seam import transport

if TYPE_CHECKING:
    from presort.engine import Engine

T = TypeVar("T")

_SDK_CLIENTS = frozenset({"SyncAPIClient", "AsyncAPIClient"})
_LOOK_SECONDS = 0.01
_ANY_PROMPT = Prompt("", "")


def wrap(thing: T) -> T:
    """Return a copy of a client or chat model whose calls go through presort; the argument is left unchanged.

    Args:
        thing: A LangChain chat model; a client of `anthropic`, `openai` (their Azure, Bedrock and Vertex
            clients included), any other SDK generated as these two are, or `ollama`; a client or transport
            of httpx or httpx2.

    Example:
        >>> client = presort.wrap(anthropic.Anthropic())
        >>> with presort.batch():
        ...     message = client.messages.create(...)

    Raises:
        TypeError: It is none of these.
    """
    # what is not loaded cannot be what we were given: no SDK is imported here
    chat_models = sys.modules.get("langchain_core.language_models.chat_models")
    if chat_models is not None and isinstance(thing, chat_models.BaseChatModel):
        from presort.langchain import OptimizedLLMWrapper

        model: T = OptimizedLLMWrapper(thing)
        return model
    classes = [(cls.__module__, cls.__name__) for cls in type(thing).__mro__]
    client: Any = thing
    if any(name in _SDK_CLIENTS and module.endswith("._base_client") for module, name in classes):
        wrapped: T = client.copy(http_client=transport(client._client))  # noqa: SLF001 - there is no public name for it
        return wrapped
    if any(module.startswith("ollama.") and name == "BaseClient" for module, name in classes):
        twin = copy.copy(client)
        twin._client = transport(client._client)  # noqa: SLF001 - as above
        copied: T = twin
        return copied
    if any(module.startswith("google.genai.") for module, _ in classes):
        raise TypeError(
            "a google-genai client makes its HTTP clients itself; give it wrapped ones: "
            "genai.Client(http_options=types.HttpOptions(httpx_client=presort.transport(httpx.Client()), "
            "httpx_async_client=presort.transport(httpx.AsyncClient())))"
        )
    try:
        wrapped = transport(thing)
    except TypeError:
        raise TypeError(
            "expected a LangChain chat model, a client of anthropic, openai or ollama, or a client or "
            f"transport of httpx or httpx2, got {type(thing).__module__}.{type(thing).__qualname__}"
        ) from None
    return wrapped


def payload(
    provider: str,
    body: Mapping[str, Any],
    *,
    base_url: str | None = None,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Payload:
    """Make a payload of a call's JSON, for `stream` and `submit`.

    Args:
        provider: `anthropic` or `openai`.
        body: What the vendor's API takes, `model` included; it is sent as it is.
        base_url: Where, if not at the vendor's own.
        key: API key, if not the one of `configure(keys=…)` or of the environment. Held in memory only.
        headers: To be sent along, such as `anthropic-beta`.

    Raises:
        ConfigurationError: There is no such provider.
        InputError: The body is none of the provider's calls, or none that a batch accepts.
        MissingKeyError: There is no key.
    """
    vendor = provider_named(provider)
    model = body.get("model")
    endpoint, _, usual = vendor.compose(model if isinstance(model, str) else "", _ANY_PROMPT)
    try:
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"the body cannot be written as JSON: {error}") from error
    settings = runtime.settings()
    account = settings.account
    if key is None and settings.keys is not None:
        key = settings.keys(provider, account or "")
    key = key or os.environ.get(vendor.key_variable)
    if not key:
        raise MissingKeyError(f"no API key for {vendor.title}: set {vendor.key_variable}, or pass `key`")
    sent = {name.lower(): value for name, value in {**dict(usual), **(headers or {})}.items()}
    sent |= {"content-type": "application/json", **vendor.key_headers(key)}
    where = (base_url or os.environ.get(vendor.base_url_variable) or vendor.default_base_url).rstrip("/")
    call = vendor.recognise("POST", where + endpoint, sent, text)
    if call is None:
        raise InputError(f"this is no call of {vendor.title} that presort knows: it needs a `model`")
    if call.unbatchable is not None:
        raise InputError(f"no batch accepts this call: {call.unbatchable}")
    account = account or runtime.engine().account(key)
    batch_key = BatchKey(vendor.name, call.base_url, account, call.endpoint, call.model, call.headers)
    return Payload(batch_key, one_line(text), sent)


def stream(
    payloads: Iterable[Payload], *, run: str | None = None, deadline: float | None = None
) -> Iterator[tuple[int, Outcome]]:
    """Send payloads by the batch route and yield (position from 0, outcome), in the order they came.

    The iterable is drawn while earlier ones are under way; its end sends what is left. Neither prompts nor
    answers pile up in memory, so it may be a million.

    Args:
        payloads: As `presort.api.payload` makes them.
        run: A name under which answers are replayed if the program is run again, until `finish_run`.
        deadline: Seconds from each payload's drawing until its answer must be there.
    """
    _check(run, deadline)
    return runtime.engine().stream(payloads, run=run, deadline_seconds=deadline)


def submit(payloads: Iterable[Payload], *, run: str, deadline: float | None = None) -> int:
    """Store payloads as calls of a named run, and return how many once all of them are safe.

    Nobody waits for the answers: this process, or the next one if it ends, sends them and collects what comes.
    A later `stream` of the same payloads and run yields the outcomes.
    """
    _check(run, deadline)
    engine = runtime.engine()
    session, group = Run(run), Group()
    source = iter(payloads)
    count = 0
    while chunk := list(islice(source, ADMIT_CHUNK)):
        engine.check_open()
        parcels = [engine.parcel(each, None, deadline, None, session, group, None) for each in chunk]
        engine.accumulator.put(parcels)
        count += len(chunk)
        _wait_until_stored(engine, group, count)
    group.close()
    engine.nudge()
    return count


def _wait_until_stored(engine: Engine, group: Group, count: int) -> None:
    while group.admitted < count:
        engine.check_open()
        time.sleep(_LOOK_SECONDS)


def _check(run: str | None, deadline: float | None) -> None:
    if run is not None and not 0 < len(run) <= 200:
        raise ConfigurationError(f"a run's name has 1 to 200 characters, got {run!r}")
    if deadline is not None and not deadline > 0:
        raise ConfigurationError(f"`deadline` must be a positive number of seconds, got {deadline!r}")
