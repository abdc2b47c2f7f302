"""One Claude request and its answer: validation, tokens, cache breakpoints, usage.

Nothing here knows HTTP or batches; `anthropic.py` does.
Wordings of errors: live captures of the Message Batches API (2026-08/09) and the
Anthropic docs; where none was found the wording follows the API's style.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from presort.emulator import answers
from presort.emulator.billing import Lane, Usage
from presort.emulator.cache import Block, Plan, PromptCache, Reader
from presort.emulator.instances import instance
from presort.emulator.models import ANTHROPIC, AnthropicModel, undated
from presort.emulator.settings import Settings
from presort.emulator.state import Tenant
from presort.emulator.tokens import TOKENS_PER_ATTACHMENT, count, cut
from presort.emulator.wire import VendorError

VERSIONS: Final = ("2023-06-01", "2026-10-21")
STRICT_VERSION: Final = "2026-10-21"
"""The version that refuses sampling parameters (Anthropic docs, "Migration to 2026-10-21")."""

TTL_SECONDS: Final = {"5m": 300, "1h": 3600}
MAX_BREAKPOINTS: Final = 4
EXTENDED_OUTPUT_BETA: Final = "output-300k-2026-03-24"
EXTENDED_OUTPUT_TOKENS: Final = 300_000

NOT_IN_BATCHES: Final = {
    "speed": "speed is not supported in the Message Batches API",
    "store": "store is not supported in the Message Batches API",
    "previous_thread_event_id": "previous_thread_event_id is not supported in the Message Batches API",
    "cache_hint": "cache_hint is not supported in the Message Batches API",
    "context_hint": "context_hint is not supported in the Message Batches API",
}
"""Anthropic docs, "Batch processing", what is not supported."""


@dataclass(frozen=True)
class Rules:
    """Under which rules a request is judged."""

    version: str
    lane: Lane
    betas: str
    settings: Settings


def invalid(message: str) -> VendorError:
    """A 400."""
    return VendorError(400, message, "invalid_request_error")


def validate(params: Any, rules: Rules, *, counting: bool = False) -> None:
    """Refuse what the Messages API refuses.

    Raises:
        VendorError: with the vendor's status, type and wording.
    """
    if not isinstance(params, dict):
        raise invalid("Input should be a valid dictionary")
    if rules.lane == "batch":
        _validate_batchable(params)
    needed = ("model", "messages") if counting else ("model", "messages", "max_tokens")
    for name in needed:
        if name not in params:
            raise invalid(f"{name}: Field required")
    model = _known(params["model"], rules.settings)
    _validate_messages(params["messages"])
    if not counting:
        _validate_max_tokens(params["max_tokens"], params["model"], model, rules)
    if rules.version == STRICT_VERSION:
        _validate_strictly(params)
    _validate_tools(params)
    _validate_breakpoints(params)


def _validate_batchable(params: dict[str, Any]) -> None:
    if params.get("stream"):
        raise invalid('"stream=True" is not supported in the Message Batches API')
    for name, message in NOT_IN_BATCHES.items():
        if params.get(name) is not None:
            raise invalid(message)
    if params.get("max_tokens") == 0:
        raise invalid("max_tokens: 0 is not supported in the Message Batches API")


def _known(model: Any, settings: Settings) -> AnthropicModel:
    if not isinstance(model, str):
        raise invalid("model: Input should be a valid string")
    known = ANTHROPIC.get(undated(model).removesuffix("-latest"))
    if known is None and model in settings.models:
        known = AnthropicModel(1_024, 64_000)
    if known is None:
        raise VendorError(404, f"model: {model}", "not_found_error")
    return known


def _validate_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise invalid("messages: Input should be a valid list")
    if not messages:
        raise invalid("messages: at least one message is required")
    for n, message in enumerate(messages):
        _validate_message(f"messages.{n}", message)


def _validate_message(where: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise invalid(f"{where}: Input should be a valid dictionary")
    for name in ("role", "content"):
        if name not in message:
            raise invalid(f"{where}.{name}: Field required")
    if message["role"] not in ("user", "assistant", "system"):
        raise invalid(f"{where}.role: Input should be 'user' or 'assistant'")
    if not isinstance(message["content"], str | list):
        raise invalid(f"{where}.content: Input should be a valid list")
    blocks: list[Any] = _content(message["content"])
    for k, block in enumerate(blocks):
        if not isinstance(block, dict) or "type" not in block:
            raise invalid(f"{where}.content.{k}.type: Field required")
        if block["type"] == "text" and not isinstance(block.get("text"), str):
            raise invalid(f"{where}.content.{k}.text.text: Field required")


def _validate_max_tokens(value: Any, name: str, model: AnthropicModel, rules: Rules) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid("max_tokens: Input should be a valid integer")
    if value < 0:
        raise invalid("max_tokens: must be greater than or equal to 0")
    extended = rules.lane == "batch" and EXTENDED_OUTPUT_BETA in rules.betas
    cap = EXTENDED_OUTPUT_TOKENS if extended else model.max_output_tokens
    if value > cap:
        limit = f"max_tokens: {value} > {cap}, which is the maximum allowed number of output tokens for {name}"
        raise invalid(limit)


def _validate_strictly(params: dict[str, Any]) -> None:
    for name in ("temperature", "top_p", "top_k"):
        if name in params:
            raise invalid(f"{name}: Extra inputs are not permitted")
    for n, message in enumerate(params["messages"]):
        for k, block in enumerate(_content(message["content"])):
            where = f"messages.{n}.content.{k}"
            if message["role"] == "assistant" and block["type"] == "document":
                raise invalid(f"{where}: `document` blocks are not permitted in assistant messages")
            if message["role"] == "user" and block["type"] == "text" and block.get("citations"):
                raise invalid(f"{where}.text.citations: Extra inputs are not permitted")


def _validate_tools(params: dict[str, Any]) -> None:
    choice = params.get("tool_choice") or {}
    names = [tool.get("name") for tool in params.get("tools") or []]
    if choice.get("type") in ("any", "tool") and not names:
        raise invalid("tool_choice: tool_choice may only be specified while providing tools.")
    if choice.get("type") == "tool" and choice.get("name") not in names:
        raise invalid(f"Tool '{choice.get('name')}' not found in provided tools")


def _validate_breakpoints(params: dict[str, Any]) -> None:
    explicit = [(where, block["cache_control"]) for where, block in _cacheable(params) if block.get("cache_control")]
    for where, control in [*explicit, *_automatic(params)]:
        if control.get("type") != "ephemeral":
            raise invalid(f"{where}.cache_control.type: Input should be 'ephemeral'")
        if control.get("ttl", "5m") not in TTL_SECONDS:
            raise invalid(f"{where}.cache_control.ttl: Input should be '5m' or '1h'")
    total = len(explicit) + len(_automatic(params))
    last: dict[str, Any] = next((block for _, block in reversed(list(_cacheable(params)))), {})
    if _automatic(params) and last.get("cache_control"):
        total -= 1
        if _ttl(last["cache_control"]) != _ttl(params["cache_control"]):
            raise invalid("cache_control.ttl: conflicts with the ttl of the last block's own `cache_control`")
    if total > MAX_BREAKPOINTS:
        raise invalid(f"A maximum of 4 blocks with cache_control may be provided. Found {total}.")
    seen_short = False
    for where, control in explicit:
        seen_short = seen_short or _ttl(control) == 300
        if seen_short and _ttl(control) == 3600:
            raise invalid(
                f"{where}.cache_control.ttl: a ttl='1h' cache_control block must not come after a ttl='5m' "
                "cache_control block. Note that blocks are processed in the following order: "
                "`tools`, `system`, `messages`."
            )


def _automatic(params: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("", params["cache_control"])] if params.get("cache_control") else []


def _ttl(control: dict[str, Any]) -> int:
    return TTL_SECONDS[control.get("ttl", "5m")]


# Tokens and cache blocks


def _content(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _cacheable(params: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All blocks of a prompt in the order in which they are cached, with their places."""
    for n, tool in enumerate(params.get("tools") or []):
        yield f"tools.{n}", tool
    for n, block in enumerate(_content(params.get("system") or [])):
        yield f"system.{n}", block
    for n, message in enumerate(params["messages"]):
        for k, block in enumerate(_content(message["content"])):
            yield f"messages.{n}.content.{k}", block


def prompt_blocks(params: dict[str, Any]) -> list[Block]:
    """The prompt as the cache sees it.

    What changes a whole level without being a block of it is mixed into the level's
    first block: the output format into `system`, tool choice and thinking into `messages`
    (Anthropic docs, "Prompt caching", what invalidates the cache).
    """
    levels = {
        "system": _levels(params, "output_config"),
        "messages": _levels(params, "output_config", "tool_choice", "thinking"),
    }
    blocks = []
    before = ""
    for where, block in _cacheable(params):
        level, number, *_ = where.split(".")
        role = params["messages"][int(number)]["role"] if level == "messages" else ""
        mixed = f"{levels.get(level, '')}" if level != before else ""
        before = level
        control = block.get("cache_control")
        plain_block = {name: value for name, value in block.items() if name != "cache_control"}
        content = f"{level}.{number}.{role}{mixed}{json.dumps(plain_block)}"
        blocks.append(Block(content, _block_tokens(plain_block), _ttl(control) if control else None))
    if automatic := _automatic(params):
        blocks[-1] = replace(blocks[-1], ttl_seconds=_ttl(automatic[0][1]))
    return blocks


def _levels(params: dict[str, Any], *names: str) -> str:
    return json.dumps([params.get(name) for name in names]) if any(params.get(name) for name in names) else ""


def _block_tokens(block: dict[str, Any]) -> int:
    match block.get("type"):
        case "text":
            return count(block.get("text") or "")
        case "image":
            return TOKENS_PER_ATTACHMENT
        case "document":
            source = block.get("source") or {}
            return count(source["data"]) if source.get("type") == "text" else TOKENS_PER_ATTACHMENT
        case "tool_result":
            return sum(_block_tokens(each) for each in _content(block.get("content") or []))
        case _:
            return count(json.dumps(block, ensure_ascii=False))


def count_tokens(params: dict[str, Any]) -> int:
    """What the prompt counts, cached or not."""
    return sum(block.tokens for block in prompt_blocks(params))


# Answers


@dataclass(frozen=True)
class Answer:
    """A finished answer: the message without its usage, and its output tokens."""

    content: list[dict[str, Any]]
    stop_reason: str
    stop_sequence: str | None
    output_tokens: int


def prompt_text(params: dict[str, Any]) -> str:
    """The text of the last user message."""
    users = [message for message in params["messages"] if message["role"] == "user"] or params["messages"]
    return "\n".join(_texts(_content(users[-1]["content"])))


def _texts(blocks: list[dict[str, Any]]) -> Iterator[str]:
    for block in blocks:
        match block.get("type"):
            case "text":
                yield block["text"]
            case "document" if (block.get("source") or {}).get("type") == "text":
                yield block["source"]["data"]
            case "tool_result":
                yield from _texts(_content(block.get("content") or []))


def answer(params: dict[str, Any], *, eager_tools: bool = False) -> Answer:
    """Answer a valid request."""
    document = answers.Document(prompt_text(params))
    limit = params["max_tokens"]
    if (tool := _chosen_tool(params, eager=eager_tools)) is not None:
        value = instance(tool.get("input_schema") or {"type": "object"}, document)
        tokens = count(json.dumps(value, ensure_ascii=False))
        complete = tokens <= limit
        block = {
            "type": "tool_use",
            "id": "toolu_" + hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24],
            "name": tool["name"],
            "input": value if complete else {},
        }
        return Answer([block], "tool_use" if complete else "max_tokens", None, min(tokens, limit))
    text = _schema_text(params, document) or answers.plain(document)
    text, sequence = answers.stop_at(text, params.get("stop_sequences") or [])
    text, was_cut = cut(text, limit)
    reason = "max_tokens" if was_cut else "stop_sequence" if sequence else "end_turn"
    content = [{"type": "text", "text": text}] if text else []
    return Answer(content, reason, None if was_cut else sequence, count(text))


def _chosen_tool(params: dict[str, Any], *, eager: bool) -> dict[str, Any] | None:
    """The tool that must be called, or that an eager model calls once."""
    choice = (params.get("tool_choice") or {"type": "auto"})["type"]
    tools: list[dict[str, Any]] = params.get("tools") or []
    if choice == "tool":
        return next(tool for tool in tools if tool.get("name") == params["tool_choice"]["name"])
    called = any(block.get("type") == "tool_result" for block in _content(params["messages"][-1]["content"]))
    if choice == "any" or (choice == "auto" and eager and not called):
        return next((tool for tool in tools if "input_schema" in tool), None)
    return None


def _schema_text(params: dict[str, Any], document: answers.Document) -> str | None:
    chosen = (params.get("output_config") or {}).get("format") or params.get("output_format") or {}
    if chosen.get("type") != "json_schema":
        return None
    return json.dumps(instance(chosen.get("schema") or {"type": "object"}, document), ensure_ascii=False)


def plan(params: dict[str, Any], cache: PromptCache, reader: Reader, settings: Settings) -> Plan:
    """Decide what a request reads from the cache and writes to it."""
    model = _known(params["model"], settings)
    override = settings.minimum_cache_tokens
    minimum = override.get(params["model"], override.get(undated(params["model"]), model.minimum_cache_tokens))
    return cache.plan_anthropic(prompt_blocks(params), minimum, reader)


def scope(tenant: Tenant, model: str) -> str:
    """Who shares cache entries: one workspace, one model."""
    return f"anthropic:{tenant.organization}:{tenant.workspace}:{model}"


def message(params: dict[str, Any], answer: Answer, usage: Usage, message_id: str, lane: Lane) -> dict[str, Any]:
    """The Message object."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": params["model"],
        "content": answer.content,
        "stop_reason": answer.stop_reason,
        "stop_sequence": answer.stop_sequence,
        "usage": {
            "input_tokens": usage.input,
            "cache_creation_input_tokens": usage.cache_write_5m + usage.cache_write_1h,
            "cache_read_input_tokens": usage.cache_read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": usage.cache_write_5m,
                "ephemeral_1h_input_tokens": usage.cache_write_1h,
            },
            "output_tokens": usage.output,
            "service_tier": lane,
            "inference_geo": "not_available",
        },
    }


_PIECE = re.compile(r".{1,20}", re.DOTALL)


def events(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A message as server-sent events."""
    begun = {**message, "content": [], "stop_reason": None, "stop_sequence": None}
    begun["usage"] = {**message["usage"], "output_tokens": min(1, message["usage"]["output_tokens"])}
    yield "message_start", {"message": begun}
    for index, block in enumerate(message["content"]):
        if block["type"] == "text":
            start, deltas = {**block, "text": ""}, [("text_delta", "text", block["text"])]
        else:
            start, deltas = (
                {**block, "input": {}},
                [("input_json_delta", "partial_json", json.dumps(block["input"]))],
            )
        yield "content_block_start", {"index": index, "content_block": start}
        if index == 0:
            yield "ping", {}
        for kind, name, text in deltas:
            for piece in _PIECE.findall(text):
                yield "content_block_delta", {"index": index, "delta": {"type": kind, name: piece}}
        yield "content_block_stop", {"index": index}
    stop = {"stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"]}
    usage = {name: message["usage"][name] for name in ("input_tokens", "cache_creation_input_tokens")}
    usage |= {name: message["usage"][name] for name in ("cache_read_input_tokens", "output_tokens")}
    yield "message_delta", {"delta": stop, "usage": usage}
    yield "message_stop", {}
