"""LangChain chat models on the batch route: real SDKs, real HTTP, an emulated vendor."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

import presort
from emulator_server import EmulatorServer
from presort import OptimizedLLMWrapper, runtime, telemetry
from presort.engine import Engine

pytestmark = [
    pytest.mark.anyio,
    # LangChain shares HTTP clients among models and closes none: their connections outlive each test's loop
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

VENDORS = pytest.mark.parametrize("vendor", ["anthropic", "openai"])
PATIENCE_SECONDS = 60
HELLO = ChatPromptTemplate.from_messages([("system", "You are brief."), ("human", "Greet {name}.")])


class Sentiment(BaseModel):
    """How a text feels."""

    label: str
    score: float


@tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"Rain in {city}."


@pytest.fixture
def emulator() -> Iterator[EmulatorServer]:
    """Run an emulator whose batches take no time."""
    with EmulatorServer(batch_seconds=0) as server:
        yield server


@pytest.fixture(autouse=True)
def _presort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runtime, "_settings", None)
    telemetry._last.clear()
    presort.configure(
        store=str(tmp_path / "presort.db"), batching={"flush_seconds": 0.05, "poll_interval_seconds": 0.1}
    )
    yield
    presort.close()


def bare(emulator: EmulatorServer, vendor: str, **more: Any) -> Any:
    """Make a chat model of a vendor, at the emulator."""
    if vendor == "anthropic":
        return ChatAnthropic(model="claude-haiku-4-5", api_key="k", base_url=emulator.url, max_tokens=500, **more)
    return ChatOpenAI(model="gpt-5.4-mini", api_key="k", base_url=f"{emulator.url}/v1", **more)


def wrapped(emulator: EmulatorServer, vendor: str, **more: Any) -> Any:
    """Make it and wrap it."""
    return OptimizedLLMWrapper(bare(emulator, vendor, **more))


def sizes(emulator: EmulatorServer) -> list[int]:
    """Return how many rows each batch had, oldest first."""
    return [len(batch["custom_ids"]) for batch in emulator.record()["batches"]]


def calls(emulator: EmulatorServer) -> int:
    """Return how many standard calls there were."""
    return len(emulator.record()["calls"])


def prompts(count: int) -> list[str]:
    """Make different prompts."""
    return [f"Greet guest {number}." for number in range(count)]


def bad_request(vendor: str) -> type[Exception]:
    """Return the SDK's own exception for a request that is refused."""
    return anthropic.BadRequestError if vendor == "anthropic" else openai.BadRequestError


# Lists


@VENDORS
async def test_ten_equal_prompts_are_ten_calls(emulator: EmulatorServer, vendor: str) -> None:
    """Ten equal prompts in one abatch get ten answers from ten rows of one batch."""
    # Given a wrapped model
    model = wrapped(emulator, vendor)
    # When ten equal prompts are asked at once
    answers = await asyncio.wait_for(model.abatch(["Hello."] * 10), PATIENCE_SECONDS)
    # Then each has an answer, and the vendor had one batch of ten
    assert ['EMULATED answer. You wrote: "Hello."'] * 10 == [answer.content for answer in answers]
    assert ([10], 0) == (sizes(emulator), calls(emulator))


@VENDORS
async def test_answers_are_those_of_the_standard_route(emulator: EmulatorServer, vendor: str) -> None:
    """Answers of a batch are in the order of the inputs and have the content, usage and metadata of standard ones."""
    # Given what the bare model answers
    expected = [await bare(emulator, vendor).ainvoke(prompt) for prompt in prompts(3)]
    # When the wrapped model is asked for the batch
    answers = await asyncio.wait_for(wrapped(emulator, vendor).abatch(prompts(3)), PATIENCE_SECONDS)
    # Then all but ids and the service tier is the same
    ignored = {"id", "usage", "service_tier"}
    for one, other in zip(expected, answers, strict=True):
        assert type(one) is type(other)
        assert one.content == other.content
        assert one.usage_metadata == other.usage_metadata
        assert {key: value for key, value in one.response_metadata.items() if key not in ignored} == {
            key: value for key, value in other.response_metadata.items() if key not in ignored
        }


@VENDORS
@pytest.mark.parametrize("limit", [None, 5])
def test_a_thousand_calls_are_one_batch(emulator: EmulatorServer, vendor: str, limit: int | None) -> None:
    """A synchronous batch of 1,000 is one batch of the vendor, with max_concurrency=5 too, and takes no thread each."""
    # Given a wrapped model
    model, most = wrapped(emulator, vendor), 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.05):
            most = max(most, threading.active_count())

    watcher = threading.Thread(target=watch)
    watcher.start()
    # When a thousand prompts are asked synchronously
    try:
        answers = model.batch(prompts(1000), {} if limit is None else {"max_concurrency": limit})
    finally:
        stop.set()
        watcher.join()
    # Then there is one batch, in order, and a handful of threads
    assert [f'EMULATED answer. You wrote: "{prompt}"' for prompt in prompts(1000)] == [a.content for a in answers]
    assert ([1000], 0) == (sizes(emulator), calls(emulator))
    assert most < 40


@VENDORS
async def test_other_calls_stay_standard(emulator: EmulatorServer, vendor: str) -> None:
    """ainvoke, invoke, stream and astream take the standard route."""
    # Given a wrapped model
    model = wrapped(emulator, vendor)
    # When it is asked one by one
    await model.ainvoke("a")
    await asyncio.to_thread(model.invoke, "b")
    assert [chunk async for chunk in model.astream("c")]
    assert await asyncio.to_thread(lambda: list(model.stream("d")))
    # Then the vendor had four calls and no batch
    assert ([], 4) == (sizes(emulator), calls(emulator))


async def test_one_config_for_each_input(emulator: EmulatorServer) -> None:
    """A list of configs goes to the inputs one by one, and callbacks are called once per request."""

    class Note(BaseCallbackHandler):
        def __init__(self) -> None:
            self.seen: Counter[tuple[str, Any]] = Counter()

        def on_chat_model_start(self, *_: Any, **more: Any) -> None:
            self.seen["start", more["metadata"]["number"]] += 1

        def on_llm_end(self, *_: Any, **__: Any) -> None:
            self.seen["end", None] += 1

    for run in ("abatch", "batch"):
        # Given a config for each of three inputs, sharing a handler
        note = Note()
        configs = [{"metadata": {"number": number}, "callbacks": [note]} for number in range(3)]
        model = wrapped(emulator, "openai")
        # When they are asked
        if run == "abatch":
            await model.abatch(prompts(3), configs)
        else:
            await asyncio.to_thread(model.batch, prompts(3), configs)
        # Then the handler heard of each once
        assert Counter({("start", 0): 1, ("start", 1): 1, ("start", 2): 1, ("end", None): 3}) == note.seen


# Composites


@VENDORS
async def test_a_chain_batches(emulator: EmulatorServer, vendor: str) -> None:
    """`prompt | model | parser` batches by abatch and batch, and returns what the parser makes of the answers."""
    # Given a chain
    chain = HELLO | wrapped(emulator, vendor) | StrOutputParser()
    names = [{"name": name} for name in ("Ada", "Bob", "Cy")]
    # When it is run both ways
    one = await asyncio.wait_for(chain.abatch(names), PATIENCE_SECONDS)
    other = await asyncio.to_thread(chain.batch, names)
    # Then each is one batch of three
    assert one == other
    assert ["Greet Ada." in one[0], "Greet Bob." in one[1], "Greet Cy." in one[2]] == [True] * 3
    assert ([3, 3], 0) == (sizes(emulator), calls(emulator))


COMPOSITES: dict[str, Callable[[Any], Any]] = {
    "bind": lambda model: model.bind(stop=["never"]),
    "with_config": lambda model: model.with_config(tags=["x"]),
    "with_retry": lambda model: model.with_retry(),
    "with_fallbacks": lambda model: model.with_fallbacks([model]),
    "bind_tools": lambda model: model.bind_tools([weather]),
    "json_schema": lambda model: model.with_structured_output(Sentiment, method="json_schema"),
    "function_calling": lambda model: model.with_structured_output(Sentiment, method="function_calling"),
    "copy": lambda model: model.model_copy(update={"max_tokens": 77}),
}


@VENDORS
@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("synchronous", [False, True], ids=["abatch", "batch"])
async def test_composites_that_pass_abatch_down_batch(
    emulator: EmulatorServer, vendor: str, name: str, synchronous: bool
) -> None:
    """Bound, configured, retrying, falling back, tool calling and structured models batch like the model itself."""
    # Given a composite
    model = COMPOSITES[name](wrapped(emulator, vendor))
    plain = COMPOSITES[name](bare(emulator, vendor))
    # When it is asked for three
    work = asyncio.to_thread(model.batch, prompts(3)) if synchronous else model.abatch(prompts(3))
    answers = await asyncio.wait_for(work, PATIENCE_SECONDS)
    # Then it was one batch, and the answers are of the types that the bare composite returns
    assert ([3], 0) == (sizes(emulator), calls(emulator))
    expected = await plain.ainvoke(prompts(3)[0])
    assert type(expected) is type(answers[0])
    if isinstance(expected, Sentiment):
        assert expected == answers[0]
    else:
        assert expected.content == answers[0].content
        assert [call["args"] for call in expected.tool_calls] == [call["args"] for call in answers[0].tool_calls]


@VENDORS
async def test_parallel_branches_batch_when_asked(emulator: EmulatorServer, vendor: str) -> None:
    """RunnableParallel's branches batch under `presort.batch()` and take the standard route without it."""
    # Given two branches of one model
    model = wrapped(emulator, vendor)
    both = RunnableParallel(one=HELLO | model, other=HELLO | model | StrOutputParser())
    names = [{"name": "Ada"}, {"name": "Bob"}]
    # When it runs without and with `presort.batch()`
    await both.abatch(names)
    assert ([], 4) == (sizes(emulator), calls(emulator))
    with presort.batch():
        answers = await asyncio.wait_for(both.abatch(names), PATIENCE_SECONDS)
    # Then the second run's four calls were batched
    assert ["Greet Bob." in answers[1]["other"], "Greet Ada." in answers[0]["one"].content] == [True, True]
    assert (4, 4) == (sum(sizes(emulator)), calls(emulator))


async def test_urgent_wins_over_a_list(emulator: EmulatorServer) -> None:
    """Under `presort.urgent()` a list takes the standard route."""
    with presort.urgent():
        await wrapped(emulator, "openai").abatch(prompts(3))
    assert ([], 3) == (sizes(emulator), calls(emulator))


async def test_a_tools_own_call_is_not_swept_along(emulator: EmulatorServer) -> None:
    """A call of another wrapped model made inside a batched model's callback takes the standard route."""
    other = wrapped(emulator, "anthropic")

    class Asks(BaseCallbackHandler):
        run_inline = True

        def on_chat_model_start(self, *_: Any, **__: Any) -> None:
            other.invoke("Now!")

    # Given a handler that asks another model synchronously
    # When the first model is batched
    await asyncio.wait_for(wrapped(emulator, "openai").abatch(prompts(2), {"callbacks": [Asks()]}), PATIENCE_SECONDS)
    # Then the handler's two calls were standard ones
    assert ([2], 2) == (sizes(emulator), calls(emulator))


# As completed


@VENDORS
async def test_as_completed_is_standard_and_says_so_once(
    emulator: EmulatorServer, vendor: str, caplog: pytest.LogCaptureFixture
) -> None:
    """abatch_as_completed takes the standard route without `presort.batch()`, and one warning says so."""
    model = wrapped(emulator, vendor)
    with caplog.at_level(logging.WARNING, "presort"):
        for _ in range(2):
            assert {0, 1} == {position async for position, _ in model.abatch_as_completed(prompts(2))}
    assert ([], 4) == (sizes(emulator), calls(emulator))
    assert ["abatch_as_completed" in record.getMessage() for record in caplog.records] == [True]


@VENDORS
@pytest.mark.parametrize("synchronous", [False, True])
async def test_as_completed_batches_when_asked(emulator: EmulatorServer, vendor: str, synchronous: bool) -> None:
    """Under `presort.batch()` (a)batch_as_completed is one batch, whatever max_concurrency says."""
    model, config = wrapped(emulator, vendor), {"max_concurrency": 2}

    def run() -> list[tuple[int, Any]]:
        with presort.batch():
            return list(model.batch_as_completed(prompts(20), config))

    if synchronous:
        answers = await asyncio.wait_for(asyncio.to_thread(run), PATIENCE_SECONDS)
    else:
        with presort.batch():
            answers = [item async for item in model.abatch_as_completed(prompts(20), config)]
    assert {number: f'EMULATED answer. You wrote: "{prompt}"' for number, prompt in enumerate(prompts(20))} == {
        number: answer.content for number, answer in answers
    }
    assert ([20], 0) == (sizes(emulator), calls(emulator))


# Streaming


@VENDORS
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_batched_call_never_streams(emulator: EmulatorServer, vendor: str, streaming: bool) -> None:
    """A handler that makes LangChain stream, a model set to stream and `stream=True` do not keep calls off a batch."""
    model = wrapped(emulator, vendor, **({"streaming": True} if streaming else {}))
    chain = HELLO | model.bind(stream=True) if streaming else HELLO | model

    async def all_of(inputs: list[Any]) -> list[Any]:
        return await chain.abatch(inputs)

    events = [
        event["event"]
        async for event in RunnableLambda(all_of).astream_events([{"name": "Ada"}, {"name": "Bob"}], version="v2")
    ]
    assert 2 == events.count("on_chat_model_end")
    assert ([2], 0) == (sizes(emulator), calls(emulator))


# Errors


@VENDORS
@pytest.mark.parametrize("synchronous", [False, True])
async def test_a_failing_row_raises_the_sdks_exception(
    emulator: EmulatorServer, vendor: str, synchronous: bool
) -> None:
    """A row the vendor refuses raises the SDK's own exception, after one attempt."""
    # Given a row that fails
    model = wrapped(emulator, vendor)
    emulator.fault("row_error", index=1, status=400, message="No thanks.")
    # When three are asked
    with pytest.raises(bad_request(vendor), match="No thanks"):
        await asyncio.wait_for(
            asyncio.to_thread(model.batch, prompts(3)) if synchronous else model.abatch(prompts(3)), PATIENCE_SECONDS
        )
    # Then nothing was sent again
    assert ([3], 0) == (sizes(emulator), calls(emulator))


@VENDORS
@pytest.mark.parametrize("synchronous", [False, True])
async def test_a_failing_row_is_returned_in_its_place(emulator: EmulatorServer, vendor: str, synchronous: bool) -> None:
    """With return_exceptions a refused row's exception takes its place, and the others have their answers."""
    model = HELLO | wrapped(emulator, vendor)
    emulator.fault("row_error", index=1, status=400, message="No thanks.")
    names = [{"name": str(number)} for number in range(3)]
    if synchronous:
        answers = await asyncio.to_thread(model.batch, names, return_exceptions=True)
    else:
        answers = await asyncio.wait_for(model.abatch(names, return_exceptions=True), PATIENCE_SECONDS)
    failed = [isinstance(answer, bad_request(vendor)) for answer in answers]
    assert 1 == sum(failed)
    assert [True, True] == [
        f"Greet {number}." in answer.content
        for number, (answer, bad) in enumerate(zip(answers, failed, strict=True))
        if not bad
    ]
    assert ([3], 0) == (sizes(emulator), calls(emulator))


@VENDORS
async def test_what_fails_before_the_transport_holds_nobody_up(emulator: EmulatorServer, vendor: str) -> None:
    """An input the model cannot even send fails, and the others' batch goes without waiting for it."""
    model = wrapped(emulator, vendor)
    started = time.monotonic()
    answers = await model.abatch(["a", 42, "b"], return_exceptions=True)
    assert isinstance(answers[1], ValueError)
    assert ([2], 0) == (sizes(emulator), calls(emulator))
    assert time.monotonic() - started < 4


@VENDORS
async def test_a_retry_is_a_batch_of_its_own(emulator: EmulatorServer, vendor: str) -> None:
    """with_retry asks failed rows again, and those only."""
    model = wrapped(emulator, vendor).with_retry(wait_exponential_jitter=False, stop_after_attempt=2)
    emulator.fault("row_error", index=1, status=400)
    answers = await asyncio.wait_for(model.abatch(prompts(3)), PATIENCE_SECONDS)
    assert 3 == len(answers)
    assert ([3, 1], 0) == (sizes(emulator), calls(emulator))


async def test_a_fallback_model_batches_what_failed(emulator: EmulatorServer) -> None:
    """with_fallbacks asks the second model for the failed rows, in a batch."""
    model = wrapped(emulator, "openai").with_fallbacks([wrapped(emulator, "anthropic")])
    emulator.fault("row_error", index=[0, 2], status=400, vendor="openai")
    answers = await asyncio.wait_for(model.abatch(prompts(3)), PATIENCE_SECONDS)
    assert Counter(anthropic=2, openai=1) == Counter(answer.response_metadata["model_provider"] for answer in answers)
    assert [True] * 3 == [prompt in answer.content for prompt, answer in zip(prompts(3), answers, strict=True)]
    assert ([3, 2], 0) == (sizes(emulator), calls(emulator))


# Cancellation


async def test_a_cancelled_list_ends_at_once(emulator: EmulatorServer) -> None:
    """A list that is cancelled while its batch runs ends at once, and what others asked for is not touched."""
    # Given a batch that takes long, and another list beside it
    emulator.fault("slow_batch", seconds=3600, vendor="openai", times=-1)
    long = asyncio.create_task(wrapped(emulator, "openai").abatch(prompts(3)))
    other = asyncio.create_task(wrapped(emulator, "anthropic").abatch(prompts(4)))
    while 3 not in sizes(emulator):  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.05)
    # When the first is given up
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(long, 0.01)
    # Then it ended at once, the other has its answers, and the batch was not cancelled
    assert time.monotonic() - started < 1
    assert 4 == len(await asyncio.wait_for(other, PATIENCE_SECONDS))
    assert ["in_progress"] == [b["status"] for b in emulator.record()["batches"] if b["vendor"] == "openai"]


async def test_one_cancelled_call_leaves_the_others(emulator: EmulatorServer) -> None:
    """One call that is cancelled while it waits for its batch does not take others of the batch with it."""
    # Given three calls under `presort.batch()` that trickle in
    presort.configure(store=runtime.settings().store, batching={"flush_requests": 3, "poll_interval_seconds": 0.1})
    model = wrapped(emulator, "openai")
    with presort.batch():
        tasks = [asyncio.create_task(model.ainvoke(prompt)) for prompt in prompts(3)]
    while [3] != sizes(emulator):  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.01)
    # When one is cancelled
    tasks[0].cancel()
    # Then the others have their answers
    with contextlib.suppress(asyncio.CancelledError):
        await tasks[0]
    answers = await asyncio.wait_for(asyncio.gather(*tasks[1:]), PATIENCE_SECONDS)
    assert 2 == len(answers)


# Groups


async def test_answers_from_langchains_cache_hold_nobody_up(emulator: EmulatorServer) -> None:
    """Inputs that LangChain's cache answers are counted out: the rest goes at once, and all hits make no batch."""
    model = wrapped(emulator, "openai", cache=InMemoryCache())
    await asyncio.wait_for(model.abatch(prompts(3)), PATIENCE_SECONDS)
    started = time.monotonic()
    answers = await asyncio.wait_for(model.abatch(prompts(5)), PATIENCE_SECONDS)
    again = await asyncio.wait_for(model.abatch(prompts(5)), PATIENCE_SECONDS)
    assert [answer.content for answer in answers] == [answer.content for answer in again]
    assert ([3, 2], 0) == (sizes(emulator), calls(emulator))
    assert time.monotonic() - started < 4


async def test_a_mixed_list_is_split_by_model(emulator: EmulatorServer) -> None:
    """Two lists at once make a batch each, and each is complete."""
    one, other = wrapped(emulator, "openai"), wrapped(emulator, "anthropic")
    await asyncio.wait_for(asyncio.gather(one.abatch(prompts(4)), other.abatch(prompts(5))), PATIENCE_SECONDS)
    assert Counter([4, 5]) == Counter(sizes(emulator))


async def test_fewer_than_the_minimum_take_the_standard_route(emulator: EmulatorServer) -> None:
    """A list shorter than the wrapper's `min_requests` takes the standard route."""
    model = OptimizedLLMWrapper(bare(emulator, "openai"), batching={"min_requests": 3})
    await model.abatch(prompts(2))
    assert ([], 2) == (sizes(emulator), calls(emulator))
    await asyncio.wait_for(model.abatch(prompts(3)), PATIENCE_SECONDS)
    assert ([3], 2) == (sizes(emulator), calls(emulator))


async def test_a_wrappers_settings_hold_under_batch(emulator: EmulatorServer) -> None:
    """A single call under `presort.batch()` follows the wrapper's own settings."""
    model = OptimizedLLMWrapper(bare(emulator, "openai"), batching={"enabled": False})
    with presort.batch():
        await model.ainvoke("a")
    assert ([], 1) == (sizes(emulator), calls(emulator))


# Where it runs


@VENDORS
async def test_a_collected_model_leaves_the_connections_open(emulator: EmulatorServer, vendor: str) -> None:
    """The garbage collection of a wrapped model leaves the bare one's HTTP client, which others share, as it was."""
    model = bare(emulator, vendor)
    for _ in range(3):
        await OptimizedLLMWrapper(model).ainvoke("a")
        gc.collect()
        await asyncio.sleep(0.01)
    await model.ainvoke("a")
    assert 4 == calls(emulator)


async def test_a_synchronous_batch_inside_a_running_loop(emulator: EmulatorServer) -> None:
    """`batch` works on the thread of a running event loop, as in a notebook, and nested in another one's callback."""
    # Given a loop that runs here, and a handler that batches too
    inner: list[Any] = []

    class Nests(BaseCallbackHandler):
        def on_chat_model_start(self, *_: Any, **__: Any) -> None:
            if not inner:
                inner.append(None)
                inner[:] = wrapped(emulator, "anthropic").batch(prompts(2))

    # When `batch` is called right here
    answers = wrapped(emulator, "openai").batch(prompts(3), {"callbacks": [Nests()]})
    # Then both are answered
    assert (3, 2) == (len(answers), len(inner))
    assert Counter([2, 3]) == Counter(sizes(emulator))


def test_a_synchronous_batch_with_uvloop(emulator: EmulatorServer) -> None:
    """`batch` and `abatch` work on uvloop."""
    uvloop = pytest.importorskip("uvloop")
    model = wrapped(emulator, "openai")

    async def both() -> None:
        await model.abatch(prompts(2))
        model.batch(prompts(3))

    uvloop.run(both())
    assert ([2, 3], 0) == (sizes(emulator), calls(emulator))


def test_synchronous_batches_use_the_synchronous_client(
    emulator: EmulatorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a synchronous `batch` sends by the standard route goes through the model's synchronous HTTP client."""
    # Given a model with a synchronous client of the user's own, at a place without a Batch API
    heard: list[str] = []
    client = httpx2.Client(event_hooks={"request": [lambda request: heard.append(request.url.path)]})
    model = wrapped(emulator, "openai", http_client=client)
    monkeypatch.setattr(Engine, "lacks_batch_api", lambda self, base_url: True)
    # When it is batched, twice, on loops that end
    with client:
        answers = model.batch(prompts(3), {"max_concurrency": 2}) + model.batch(prompts(3))
    # Then six standard calls went through that client
    assert 6 == len(answers)
    assert ([], 6) == (sizes(emulator), calls(emulator))
    assert ["/v1/chat/completions"] * 6 == heard


def test_a_generate_of_ones_own_is_not_passed_by(emulator: EmulatorServer, caplog: pytest.LogCaptureFixture) -> None:
    """`batch` of a class that overrides `_generate` alone calls it, by the standard route, and says why."""

    class Shouts(ChatOpenAI):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            result = super()._generate(*args, **kwargs)
            result.generations[0].message.content += "!"
            return result

    model = OptimizedLLMWrapper(Shouts(model="gpt-5.4-mini", api_key="k", base_url=f"{emulator.url}/v1"))
    with caplog.at_level(logging.WARNING, "presort"):
        assert [True, True] == [answer.content.endswith("!") for answer in model.batch(prompts(2))]
    assert ([], 2) == (sizes(emulator), calls(emulator))
    assert ["does not batch" in record.getMessage() for record in caplog.records] == [True]


def test_closing_presort_ends_a_synchronous_batch(emulator: EmulatorServer) -> None:
    """Closing presort while a synchronous batch waits ends it at once with an error that says so."""
    emulator.fault("slow_batch", seconds=3600)
    model, raised = wrapped(emulator, "openai"), []

    def run() -> None:
        try:
            model.batch(prompts(3))
        except Exception as error:  # noqa: BLE001
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while [3] != sizes(emulator):
        time.sleep(0.05)
    presort.close()
    thread.join(10)
    assert ["presort was closed" in str(error) for error in raised] == [True]
