"""The emulated prompt caches, seen through usage."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from emulator_server import EmulatorServer

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

SONNET = "claude-sonnet-4-6"  # caches from 1,024 tokens
PREFIX = "You are a careful archivist. " * 200  # 5,800 characters, 1,450 tokens
LONG = {"type": "ephemeral", "ttl": "1h"}
SHORT = {"type": "ephemeral"}
tenants = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[EmulatorServer]:
    """Start one emulator for all tests here; each has an organisation of its own."""
    with EmulatorServer(batch_seconds=10) as emulator:
        yield emulator


@functools.cache
def anthropic_client(url: str) -> Any:
    """Make one client, whose connections all tests share."""
    return anthropic.Anthropic(api_key="none", base_url=url, max_retries=0)


@functools.cache
def openai_client(url: str) -> Any:
    """As above, for OpenAI."""
    return openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)


@pytest.fixture
def claude(server: EmulatorServer) -> Any:
    """Give an Anthropic client of a fresh tenant."""
    key = f"cache-{next(tenants)}"
    server.key(key, organization=key, workspace="w")
    return anthropic_client(server.url).with_options(api_key=key)


@pytest.fixture
def gpt(server: EmulatorServer) -> Any:
    """Give an OpenAI client of a fresh tenant."""
    key = f"cache-{next(tenants)}"
    server.key(key, organization=key, workspace="p")
    return openai_client(server.url).with_options(api_key=key)


def params(question: str, control: Any = None, prefix: str = PREFIX, **more: Any) -> dict[str, Any]:
    """Make a request whose system prompt is long enough to be cached."""
    block = {"type": "text", "text": prefix, **({"cache_control": control} if control else {})}
    message = {"role": "user", "content": question}
    return {"model": SONNET, "max_tokens": 50, "system": [block], "messages": [message], **more}


def used(message: Any) -> tuple[int, int, int, int]:
    """Uncached input, written for 5 minutes, written for 1 hour, read."""
    usage = message.usage
    created = usage.cache_creation
    assert created.ephemeral_5m_input_tokens + created.ephemeral_1h_input_tokens == usage.cache_creation_input_tokens
    return (
        usage.input_tokens,
        created.ephemeral_5m_input_tokens,
        created.ephemeral_1h_input_tokens,
        usage.cache_read_input_tokens,
    )


def ask(client: Any, *args: Any, **kwargs: Any) -> tuple[int, int, int, int]:
    """Ask, and give the usage."""
    return used(client.messages.create(**params(*args, **kwargs)))


def test_write_then_read(claude: Any) -> None:
    """The first request writes the marked prefix and the second reads it; the rest is plain input."""
    assert (2, 0, 1450, 0) == ask(claude, "question", LONG)
    assert (3, 0, 0, 1450) == ask(claude, "new question", LONG)


def test_unmarked_is_not_cached(claude: Any) -> None:
    """Without `cache_control` nothing is written and nothing read."""
    ask(claude, "question", LONG)

    assert (1452, 0, 0, 0) == ask(claude, "question")


def test_one_byte_changes_everything(claude: Any) -> None:
    """A prefix that differs by one character is written anew."""
    ask(claude, "question", SHORT)

    assert (2, 1450, 0, 0) == ask(claude, "question", SHORT, prefix="y" + PREFIX[1:])


def test_below_the_minimum(server: EmulatorServer, claude: Any) -> None:
    """A prefix below the model's minimum is silently plain input; the setting moves the minimum."""
    assert (1452, 0, 0, 0) == ask(claude, "question", SHORT, model="claude-opus-4-5")
    server.set(minimum_cache_tokens={"claude-opus-4-5": 1_000})
    try:
        assert (2, 1450, 0, 0) == ask(claude, "question", SHORT, model="claude-opus-4-5")
    finally:
        server.set(minimum_cache_tokens={})


@pytest.mark.parametrize(("control", "seconds"), [(SHORT, 300), (LONG, 3_600)])
def test_time_to_live(server: EmulatorServer, claude: Any, control: Any, seconds: int) -> None:
    """An entry lives for its TTL, each read starts it anew, and without a read it is gone."""
    ask(claude, "question", control)
    server.advance(seconds - 10)
    still = ask(claude, "question", control)
    server.advance(seconds - 10)
    refreshed = ask(claude, "question", control)
    server.advance(seconds)
    gone = ask(claude, "question", control)

    assert (1450, 1450, 0) == (still[3], refreshed[3], gone[3])


def test_automatic_marker(claude: Any) -> None:
    """A top-level `cache_control` marks the last block."""
    assert (0, 1452, 0, 0) == ask(claude, "question", cache_control=SHORT)
    assert (0, 0, 0, 1452) == ask(claude, "question", cache_control=SHORT)


def test_conversation_grows(claude: Any) -> None:
    """A longer conversation reads what an earlier turn wrote and writes only what is new."""
    turns = [{"role": "user", "content": PREFIX}, {"role": "assistant", "content": "x" * 400}]
    first = params("", messages=turns[:1], cache_control=SHORT, system="")
    more = params("", messages=[*turns, {"role": "user", "content": "y" * 40}], cache_control=SHORT, system="")

    assert (0, 1450, 0, 0) == used(claude.messages.create(**first))
    assert (0, 110, 0, 1450) == used(claude.messages.create(**more))


@pytest.mark.parametrize(("blocks", "read"), [(19, 1450), (20, 0)])
def test_look_back(claude: Any, blocks: int, read: int) -> None:
    """A breakpoint finds an entry 19 blocks before it, but not one 20 blocks before it."""
    content = [{"type": "text", "text": PREFIX, "cache_control": SHORT}]
    later = [{"type": "text", "text": PREFIX}] + [{"type": "text", "text": "word"}] * (blocks - 1)
    later.append({"type": "text", "text": "last", "cache_control": SHORT})
    claude.messages.create(**params("", system="", messages=[{"role": "user", "content": content}]))
    message = claude.messages.create(**params("", system="", messages=[{"role": "user", "content": later}]))

    assert read == message.usage.cache_read_input_tokens


def test_mixed_ttls(claude: Any) -> None:
    """A 1h breakpoint before a 5m one writes each stretch in its own class."""
    message = {"role": "user", "content": [{"type": "text", "text": "x" * 400, "cache_control": SHORT}]}

    assert (0, 100, 1450, 0) == ask(claude, "", LONG, messages=[message])


REFUSED = [
    ({"system": [{"type": "text", "text": "x", "cache_control": SHORT}] * 5}, "A maximum of 4 blocks"),
    (
        {"system": [{"type": "text", "text": "x", "cache_control": SHORT}] * 4, "cache_control": SHORT},
        "A maximum of 4 blocks",
    ),
    (
        {"system": [{"type": "text", "text": "x", "cache_control": each} for each in (SHORT, LONG)]},
        "must not come after",
    ),
    ({"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "2h"}}]}, "'5m' or '1h'"),
    (
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": SHORT}]}],
            "cache_control": LONG,
        },
        "ttl",
    ),
]


@pytest.mark.parametrize(("more", "words"), REFUSED)
def test_refused_markers(claude: Any, more: dict[str, Any], words: str) -> None:
    """Too many breakpoints, a 1h one after a 5m one, an unknown TTL and a contradictory one are 400s."""
    with pytest.raises(anthropic.BadRequestError, match=words):
        claude.messages.create(**params("x", **more))


def test_tool_choice_spares_tools_and_system(claude: Any) -> None:
    """Another `tool_choice` still reads the system prefix, but not the messages behind it."""
    tools = [{"name": "t", "input_schema": {"type": "object"}}]
    content = [{"type": "text", "text": "z" * 400, "cache_control": SHORT}]
    common = {"tools": tools, "messages": [{"role": "user", "content": content}]}
    ask(claude, "", SHORT, **common, tool_choice={"type": "auto"})
    again = ask(claude, "", SHORT, **common, tool_choice={"type": "any"})

    assert 100 == again[1]
    assert again[3] > 1450


def test_workspaces_do_not_share(claude: Any) -> None:
    """An entry of one workspace is not read in another."""
    ask(claude, "question", SHORT)
    other = claude.with_options(default_headers={"anthropic-workspace-id": "elsewhere"})

    assert 0 == ask(other, "question", SHORT)[3]
    assert 1450 == ask(claude, "question", SHORT)[3]


def test_parallel_first_requests_all_write(server: EmulatorServer, claude: Any) -> None:
    """An entry is invisible until the answer that writes it begins, so parallel requests all write."""
    server.set(answer_seconds=0.4)
    try:
        with ThreadPoolExecutor(4) as pool:
            first = list(pool.map(lambda n: ask(claude, f"q{n}", SHORT), range(4)))
    finally:
        server.set(answer_seconds=0)

    assert [1450] * 4 == [written for _, written, _, _ in first]
    assert 1450 == ask(claude, "late", SHORT)[3]


def run_batch(server: EmulatorServer, client: Any, count: int) -> list[tuple[int, int, int, int]]:
    """Run a batch of questions behind one 1-hour marker; give the usage of each."""
    requests = [{"custom_id": f"r{n}", "params": params(f"question {n}", LONG)} for n in range(count)]
    batch = client.messages.batches.create(requests=requests)
    server.advance(11)
    return [used(row.result.message) for row in client.messages.batches.results(batch.id)]


def test_batch_reads_its_own_write(server: EmulatorServer, claude: Any) -> None:
    """In a cold batch one request writes and the others read, billed in the batch lane."""
    before = server.billed().get(("anthropic", SONNET, "batch", "cache_read"), 0)
    usages = run_batch(server, claude, 10)

    assert [0] * 9 + [1450] == sorted(written for _, _, written, _ in usages)
    assert before + 9 * 1450 == server.billed()["anthropic", SONNET, "batch", "cache_read"]


def test_batch_hits_are_best_effort(server: EmulatorServer, claude: Any) -> None:
    """With `batch_hit_percent` at 30 some requests of a primed batch hit and some write again."""
    ask(claude, "prime", LONG)
    server.set(batch_hit_percent=30)
    try:
        primed = run_batch(server, claude, 50)
    finally:
        server.set(batch_hit_percent=100)
    hits = sum(read > 0 for _, _, _, read in primed)

    assert 5 < hits < 30
    assert 50 - hits == sum(written > 0 for _, _, written, _ in primed)


def test_batch_own_hits_can_be_rare(server: EmulatorServer, claude: Any) -> None:
    """With `batch_own_hit_percent` at 0 every request of a cold batch writes, the next batch reads all."""
    server.set(batch_own_hit_percent=0)
    try:
        cold = run_batch(server, claude, 10)
        warm = run_batch(server, claude, 10)
    finally:
        server.set(batch_own_hit_percent=100)

    assert [1450] * 10 == [written for _, _, written, _ in cold]
    assert [1450] * 10 == [read for _, _, _, read in warm]


# OpenAI


def chat(client: Any, model: str, system: Any, question: str, **more: Any) -> tuple[int, int, int]:
    """Plain input, written, read."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    usage = client.chat.completions.create(model=model, messages=messages, **more).usage
    details = usage.prompt_tokens_details
    read, written = details.cached_tokens, details.cache_write_tokens or 0
    return usage.prompt_tokens - read - written, written, read


def test_implicit_prefix(gpt: Any) -> None:
    """Before GPT-5.6 a second prompt with the same start reads a multiple of 128 tokens, and writing is free."""
    first = chat(gpt, "gpt-5-mini", PREFIX, "What is in document one?")
    second = chat(gpt, "gpt-5-mini", PREFIX, "And in two?")

    assert (0, 0) == first[1:]
    assert (0, 1408) == second[1:]


def test_implicit_minimum(gpt: Any) -> None:
    """A common start below 1,024 tokens is never read."""
    for question in ("one", "two"):
        assert (0, 0) == chat(gpt, "gpt-5-mini", PREFIX[:3_000], question)[1:]


def test_implicit_idle_time(server: EmulatorServer, gpt: Any) -> None:
    """An implicit entry that nobody reads for ten minutes is gone."""
    chat(gpt, "gpt-4.1", PREFIX, "one")
    server.advance(601)

    assert 0 == chat(gpt, "gpt-4.1", PREFIX, "two")[2]


def test_new_models_never_hit_by_default(gpt: Any) -> None:
    """From GPT-5.6 on, "same prefix, other question" pays a write each time and never reads."""
    usages = [chat(gpt, "gpt-6.1-sol", PREFIX, f"question number {n}") for n in range(3)]

    assert [(0, 0)] * 3 == [(plain, read) for plain, _, read in usages]
    assert all(written > 1450 for _, written, _ in usages)


def test_new_models_hit_at_explicit_breakpoints(gpt: Any) -> None:
    """With an explicit breakpoint the prefix is written once and read after, the question stays plain."""
    marked = [{"type": "text", "text": PREFIX, "prompt_cache_breakpoint": {"mode": "explicit"}}]
    options = {"prompt_cache_options": {"mode": "explicit"}}
    first = chat(gpt, "gpt-6.1-sol", marked, "question one", extra_body=options)
    second = chat(gpt, "gpt-6.1-sol", marked, "question two", extra_body=options)

    assert first[1] == second[2] > 1450
    assert (0, 0) == (first[2], second[1])
    assert second[0] > 0


def test_explicit_mode_without_breakpoints(gpt: Any) -> None:
    """Explicit mode without a breakpoint neither writes nor reads."""
    options = {"prompt_cache_options": {"mode": "explicit"}}
    for _ in range(2):
        assert (0, 0) == chat(gpt, "gpt-5.6-luna", PREFIX, "same", extra_body=options)[1:]


def test_identical_prompt_hits_on_new_models(gpt: Any) -> None:
    """The very same prompt is read whole on a GPT-5.6 model."""
    chat(gpt, "gpt-5.6-luna", PREFIX, "same")
    plain, written, read = chat(gpt, "gpt-5.6-luna", PREFIX, "same")

    assert (0, 0) == (plain, written)
    assert read > 1450


def test_cache_key_separates(gpt: Any) -> None:
    """Another `prompt_cache_key` is another cache."""
    chat(gpt, "gpt-5-mini", PREFIX, "one", prompt_cache_key="a")

    assert 0 == chat(gpt, "gpt-5-mini", PREFIX, "two", prompt_cache_key="b")[2]
    assert 1408 == chat(gpt, "gpt-5-mini", PREFIX, "two", prompt_cache_key="a")[2]
