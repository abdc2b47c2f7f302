"""One Chat Completions request and its answer: validation, tokens, cache, usage.

Nothing here knows HTTP or batches; `openai.py` does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from presort.emulator import answers
from presort.emulator.billing import Usage
from presort.emulator.cache import Block, Plan, PromptCache, Reader
from presort.emulator.instances import instance
from presort.emulator.models import (
    OPENAI,
    BreakpointCaching,
    forbids_chat_tools,
    forbids_sampling,
    openai_caching,
    undated,
)
from presort.emulator.settings import Settings
from presort.emulator.state import Tenant
from presort.emulator.tokens import CHARACTERS_PER_TOKEN, TOKENS_PER_ATTACHMENT, count, cut
from presort.emulator.wire import VendorError

REASONING_TOKENS: Final = {"low": 32, "medium": 64, "high": 128, "xhigh": 256}
"""Tokens spent on thinking, for requests that set `reasoning_effort`; invented, billed as output."""

LATEST_EXPLICIT: Final = 50
FIRST_EXPLICIT: Final = 2
LATEST_MESSAGE_ENDS: Final = 20
"""Where entries are looked up: the first 2 and latest 50 explicit breakpoints and, in
implicit mode, 20 message ends (OpenAI docs, "Prompt caching", 2026-09)."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> VendorError:
    """A 400."""
    return VendorError(400, message, "invalid_request_error", code=code, param=param)


def check_model(model: Any, settings: Settings) -> None:
    """Refuse a model that does not exist."""
    known = isinstance(model, str) and (undated(model) in OPENAI or model in settings.models)
    if not known:
        text = f"The model `{model}` does not exist or you do not have access to it."
        raise VendorError(404, text, "invalid_request_error", code="model_not_found")


def validate(body: Any, settings: Settings) -> None:
    """Refuse what the Chat Completions API refuses.

    Raises:
        VendorError: with OpenAI's status, type, code and parameter.
    """
    if not isinstance(body, dict):
        raise invalid("We could not parse the JSON body of your request. (Expected an object.)")
    if not body.get("model"):
        raise invalid("you must provide a model parameter")
    check_model(body["model"], settings)
    _validate_messages(body)
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise invalid(f"Invalid type for '{name}': expected an integer.", name, "invalid_type")
        if value is not None and value < 1:
            text = f"Invalid '{name}': integer below minimum value."
            text += f" Expected a value >= 1, but got {value} instead."
            raise invalid(text, name, "integer_below_min_value")
    _validate_for_model(body)
    _validate_format(body)
    _validate_tools(body)


def _validate_messages(body: dict[str, Any]) -> None:
    if "messages" not in body:
        raise invalid("Missing required parameter: 'messages'.", "messages", "missing_required_parameter")
    messages = body["messages"]
    if not isinstance(messages, list):
        raise invalid("Invalid type for 'messages': expected an array of objects.", "messages", "invalid_type")
    if not messages:
        text = "Invalid 'messages': empty array. Expected an array with minimum length 1."
        raise invalid(text, "messages", "empty_array")
    roles = ("system", "developer", "user", "assistant", "tool", "function")
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if not isinstance(message, dict):
            raise invalid(f"Invalid type for '{where}': expected an object.", where, "invalid_type")
        if message.get("role") not in roles:
            supported = ", ".join(map(repr, roles))
            text = f"Invalid value: '{message.get('role')}'. Supported values are: {supported}."
            raise invalid(text, f"{where}.role", "invalid_value")
        content = message.get("content")
        if content is None and message["role"] != "assistant":
            text = f"Invalid value for 'content': expected a string, got null. ({where}.content)"
            raise invalid(text, f"{where}.content")
        if content is not None and not isinstance(content, str | list):
            raise invalid(f"Invalid type for '{where}.content'.", f"{where}.content", "invalid_type")


def _validate_for_model(body: dict[str, Any]) -> None:
    model = body["model"]
    for name in ("temperature", "top_p"):
        if forbids_sampling(model) and body.get(name) not in (None, 1):
            text = f"Unsupported value: '{name}' does not support {body[name]} with this model."
            raise invalid(f"{text} Only the default (1) value is supported.", name, "unsupported_value")
    if forbids_chat_tools(model) and body.get("tools"):
        text = "Unsupported parameter: 'tools' is not supported with this model in Chat Completions."
        raise invalid(f"{text} Use the Responses API instead.", "tools", "unsupported_parameter")


def _validate_format(body: dict[str, Any]) -> None:
    chosen = body.get("response_format")
    if chosen is None:
        return
    kind = chosen.get("type") if isinstance(chosen, dict) else chosen
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid(f"Invalid value: {kind!r}.", "response_format.type", "invalid_value")
    if kind == "json_schema" and not (chosen.get("json_schema") or {}).get("name"):
        name = "response_format.json_schema.name"
        raise invalid(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")


def _validate_tools(body: dict[str, Any]) -> None:
    choice = body.get("tool_choice")
    if choice in (None, "none", "auto"):
        return
    if not body.get("tools"):
        raise invalid("'tool_choice' is only allowed when 'tools' are specified.", "tool_choice")
    if isinstance(choice, dict) and _chosen_tool(body, eager=False) is None:
        raise invalid("Invalid value for 'tool_choice': no such tool in 'tools'.", "tool_choice")


# Tokens and cache blocks


@dataclass(frozen=True)
class Marked:
    """A block with what the cache wants to know of it."""

    block: Block
    ends_message: bool
    breakpoint: bool


def prompt_blocks(body: dict[str, Any]) -> list[Marked]:
    """The prompt as the cache sees it: output format, tools, then content parts."""
    options = body.get("prompt_cache_options") or {}
    default_ttl = options.get("ttl") or "30m"
    settings = [body[name] for name in ("response_format", "tools", "functions") if body.get(name)]
    texts = [json.dumps(each, ensure_ascii=False) for each in settings]
    blocks = [Marked(_block(text), ends_message=False, breakpoint=False) for text in texts]
    for message in body["messages"]:
        parts = _parts(message)
        for k, part in enumerate(parts):
            marker = part.get("prompt_cache_breakpoint")
            ttl = _ttl((marker.get("ttl") if isinstance(marker, dict) else None) or default_ttl) if marker else None
            # the role belongs to the text: the same words from another speaker are another prompt
            text = _part_text(part, f"{message['role']}\n" if k == 0 else "")
            blocks.append(Marked(_block(text, ttl), k == len(parts) - 1, marker is not None))
    return blocks


def _block(text: str, ttl: int | None = None) -> Block:
    return Block(text, count(text), ttl)


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
    calls = message.get("tool_calls")
    return [*parts, {"type": "tool_calls", "tool_calls": calls}] if calls else parts or [{"type": "text", "text": ""}]


def _part_text(part: dict[str, Any], role: str) -> str:
    if part.get("type") == "text":
        return role + str(part.get("text") or "")
    plain_part = {name: value for name, value in part.items() if name != "prompt_cache_breakpoint"}
    if part.get("type") in ("image_url", "input_audio", "file"):
        digest = hashlib.sha256(json.dumps(plain_part).encode()).hexdigest()
        size = TOKENS_PER_ATTACHMENT * CHARACTERS_PER_TOKEN - len(role)
        return role + (digest * (size // len(digest) + 1))[:size]
    return role + json.dumps(plain_part, ensure_ascii=False)


def _ttl(name: str) -> int:
    seconds = BREAKPOINT_TTLS.get(name)
    if seconds is None:
        text = f"Invalid value: '{name}'. Supported values are: '30m' and '12h'."
        raise invalid(text, "prompt_cache_options.ttl", "invalid_value")
    return seconds


BREAKPOINT_TTLS: Final = {"30m": 1_800, "12h": 43_200}


def plan(body: dict[str, Any], cache: PromptCache, reader: Reader) -> Plan:
    """Decide what a request reads from the cache and writes to it, by its model's regime."""
    marked = prompt_blocks(body)
    caching = openai_caching(undated(body["model"]))
    if not isinstance(caching, BreakpointCaching):
        return cache.plan_implicit([each.block for each in marked], caching, reader)
    options = body.get("prompt_cache_options") or {}
    implicit = options.get("mode", "implicit") != "explicit"
    explicit = [place for place, each in enumerate(marked) if each.breakpoint]
    ends = [place for place, each in enumerate(marked) if each.ends_message]
    lookups = {*explicit[:FIRST_EXPLICIT], *explicit[-LATEST_EXPLICIT:]}
    writes = set(explicit[-(caching.max_writes - implicit) :])
    blocks = [replace(each.block, ttl_seconds=each.block.ttl_seconds if place in writes else None)
              for place, each in enumerate(marked)]  # fmt: skip
    if implicit:
        lookups |= set(ends[-LATEST_MESSAGE_ENDS:])
        blocks[-1] = replace(blocks[-1], ttl_seconds=blocks[-1].ttl_seconds or _ttl(options.get("ttl") or "30m"))
    return cache.plan_breakpoints(blocks, lookups, caching.minimum, reader)


def scope(tenant: Tenant, body: dict[str, Any]) -> str:
    """Who shares cache entries: one project, one model, one `prompt_cache_key`."""
    group = body.get("prompt_cache_key") or ""
    return f"openai:{tenant.organization}:{tenant.workspace}:{body['model']}:{group}"


# Answers


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    message: dict[str, Any]
    finish_reason: str
    output_tokens: int
    reasoning_tokens: int


def answer(body: dict[str, Any], *, eager_tools: bool = False) -> Answer:
    """Answer a valid request."""
    document = answers.Document(prompt_text(body))
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 1_000_000
    reasoning = min(limit, REASONING_TOKENS.get(body.get("reasoning_effort") or "", 0))
    room = limit - reasoning
    if (tool := _chosen_tool(body, eager=eager_tools)) is not None:
        function = tool["function"]
        text = json.dumps(instance(function.get("parameters") or {"type": "object"}, document), ensure_ascii=False)
        text, was_cut = cut(text, room)
        call = {
            "id": "call_" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24],
            "type": "function",
            "function": {"name": function["name"], "arguments": text},
        }
        message = {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "tool_calls": [call],
        }
        named = isinstance(body.get("tool_choice"), dict)
        reason = "length" if was_cut else "stop" if named else "tool_calls"
        return Answer(message, reason, count(text) + reasoning, reasoning)
    text = _formatted_text(body, document) or answers.plain(document)
    stop = body.get("stop")
    text, _ = answers.stop_at(text, [stop] if isinstance(stop, str) else stop or [])
    text, was_cut = cut(text, room)
    message = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    return Answer(message, "length" if was_cut else "stop", count(text) + reasoning, reasoning)


def prompt_text(body: dict[str, Any]) -> str:
    """The text of the last user message."""
    users = [message for message in body["messages"] if message["role"] == "user"] or body["messages"]
    return "\n".join(str(part["text"]) for part in _parts(users[-1]) if part.get("type") == "text")


def _chosen_tool(body: dict[str, Any], *, eager: bool) -> dict[str, Any] | None:
    """The function that must be called, or that an eager model calls once."""
    choice = body.get("tool_choice") or "auto"
    functions = [tool for tool in body.get("tools") or [] if tool.get("type") == "function"]
    called = body["messages"][-1]["role"] == "tool"
    if choice == "required" or (choice == "auto" and eager and not called):
        return functions[0] if functions else None
    if not isinstance(choice, dict):
        return None
    name = (choice.get("function") or {}).get("name")
    return next((tool for tool in functions if tool["function"].get("name") == name), None)


def _formatted_text(body: dict[str, Any], document: answers.Document) -> str | None:
    chosen = body.get("response_format") or {}
    match chosen.get("type"):
        case "json_schema":
            schema = chosen["json_schema"].get("schema") or {"type": "object"}
            return json.dumps(instance(schema, document), ensure_ascii=False)
        case "json_object":
            value = {
                "notice": "EMULATED",
                "summary": document.sentences[0][:300],
                "keywords": document.keywords[:5],
            }
            return json.dumps(value, ensure_ascii=False)
        case _:
            return None


def completion(
    body: dict[str, Any], answer: Answer, usage: Usage, completion_id: str, created: float
) -> dict[str, Any]:
    """The ChatCompletion object; batches too report the default service tier."""
    return {
        "id": completion_id,
        "object": "chat.completion",
        "created": int(created),
        "model": body["model"],
        "choices": [{"index": 0, "message": answer.message, "logprobs": None, "finish_reason": answer.finish_reason}],
        "usage": {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.output,
            "total_tokens": usage.prompt + usage.output,
            "prompt_tokens_details": {
                "cached_tokens": usage.cache_read,
                "cache_write_tokens": usage.cache_write,
                "audio_tokens": 0,
            },
            "completion_tokens_details": {
                "reasoning_tokens": answer.reasoning_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        "service_tier": "default",
        "system_fingerprint": "fp_emulated",
    }


_PIECE = re.compile(r".{1,20}", re.DOTALL)


def chunks(completion: dict[str, Any], *, include_usage: bool) -> Iterator[dict[str, Any]]:
    """A completion as streamed chunks."""
    choice = completion["choices"][0]
    shared = {name: completion[name] for name in ("id", "created", "model", "service_tier", "system_fingerprint")}
    shared = {**shared, "object": "chat.completion.chunk", **({"usage": None} if include_usage else {})}

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {
            **shared,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
        }

    message = choice["message"]
    yield chunk({"role": "assistant", "content": None if message.get("tool_calls") else "", "refusal": None})
    for piece in _PIECE.findall(message["content"] or ""):
        yield chunk({"content": piece})
    for index, call in enumerate(message.get("tool_calls", [])):
        function = {"name": call["function"]["name"], "arguments": ""}
        yield chunk({"tool_calls": [{**call, "index": index, "function": function}]})
        for piece in _PIECE.findall(call["function"]["arguments"]):
            yield chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    yield chunk({}, choice["finish_reason"])
    if include_usage:
        yield {**shared, "choices": [], "usage": completion["usage"]}
