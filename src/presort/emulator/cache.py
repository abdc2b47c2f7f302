"""The vendors' prompt caches.

Common to both: an entry is a hash over everything from the start of the prompt
to some place in it, so one changed byte loses the entry and all behind it.
Entries belong to one scope (vendor, organisation, workspace, model) and are
visible once the answer of the request that wrote them has begun. Their time
runs from the start of that request, and a read starts it anew.

A request is handled in two steps: `plan` looks up what can be read when the
request starts, `commit` writes when its answer begins. Requests that start
in between see nothing of it, as with the vendors.

Inside one batch, requests are carried out one after another, so with
`batch_hit_percent` at 100 the first writes and the others read (that is what
live captures of two-line batches showed). Vendors promise less: "best effort, 30%
to 98%". `batch_hit_percent` makes a share of a batch's requests miss, the same ones
each time; `batch_own_hit_percent` does so only for entries that the
same batch wrote, as when all of its requests start at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from presort.emulator.billing import Usage
from presort.emulator.models import ImplicitCaching
from presort.emulator.state import State
from presort.emulator.tokens import CHARACTERS_PER_TOKEN

LOOK_BACK_BLOCKS = 20
"""How far a breakpoint looks back for entries, itself included (Anthropic docs, "Prompt caching")."""


@dataclass(frozen=True)
class Block:
    """A piece of a prompt that can end a cached prefix.

    `ttl_seconds` is set where the request placed a cache breakpoint.
    """

    content: str
    tokens: int
    ttl_seconds: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a request reads and will write, decided at its start."""

    usage: Usage
    scope: str = ""
    read: Sequence[str] = ()
    writes: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class Reader:
    """Who asks: a request with its own luck.

    `writer` names the entries it writes; batches use their id.
    """

    scope: str
    now: float
    writer: str = "standard"
    hit_percent: int = 100
    own_hit_percent: int = 100
    luck: bytes = b""

    def may_read(self, writer: str) -> bool:
        """Whether this request hits an entry that is there; always the same for the same request."""
        percent = min(self.hit_percent, self.own_hit_percent if writer == self.writer else 100)
        return crc32(self.luck) % 100 < percent


@dataclass(frozen=True)
class PromptCache:
    """The entries of all vendors."""

    state: State

    def commit(self, plan: Plan, reader: Reader) -> None:
        """Make a plan come true: refresh what was read, write what was missing."""
        if plan.read:
            self.state.refresh_cached(plan.scope, plan.read, reader.now)
        if plan.writes:
            self.state.put_cached(plan.scope, plan.writes, reader.now, reader.writer)

    def plan_anthropic(self, blocks: Sequence[Block], minimum_tokens: int, reader: Reader) -> Plan:
        """Read and write at `cache_control` breakpoints.

        Of two breakpoints the later one wins if both would hit. Prefixes below the
        model's minimum are silently not cached. Tokens up to the hit are
        read, those from there to each further breakpoint are written at that breakpoint's
        price, the rest is plain input.
        """
        total = sum(block.tokens for block in blocks)
        marks = [place for place, block in enumerate(blocks) if block.ttl_seconds]
        if not marks:
            return Plan(Usage(input=total))
        prefixes = _prefixes(blocks[: marks[-1] + 1])
        marks = [place for place in marks if prefixes[place][1] >= minimum_tokens]
        candidates = {place for mark in marks for place in range(max(0, mark - LOOK_BACK_BLOCKS + 1), mark + 1)}
        hit = self._longest(reader, {place: prefixes[place][0] for place in candidates})
        read_tokens = prefixes[hit][1] if hit is not None else 0
        written = {300: 0, 3600: 0}
        covered = read_tokens
        writes = []
        for mark in marks:
            prefix, tokens = prefixes[mark]
            ttl = blocks[mark].ttl_seconds
            if ttl is None or (hit is not None and mark <= hit):
                continue
            written[ttl] += tokens - covered
            covered = tokens
            writes.append((prefix, ttl))
        usage = Usage(
            input=total - covered,
            cache_read=read_tokens,
            cache_write_5m=written[300],
            cache_write_1h=written[3600],
        )
        refreshed = [] if hit is None else [prefixes[place][0] for place in {hit, *marks} if place <= hit]
        return Plan(usage, reader.scope, refreshed, writes)

    def plan_breakpoints(self, blocks: Sequence[Block], lookups: set[int], minimum_tokens: int, reader: Reader) -> Plan:
        """Read at any of `lookups`, write at the blocks that carry a TTL (OpenAI, GPT-5.6 and later)."""
        total = sum(block.tokens for block in blocks)
        prefixes = _prefixes(blocks)
        eligible = {place: prefixes[place][0] for place in lookups if prefixes[place][1] >= minimum_tokens}
        hit = self._longest(reader, eligible)
        read_tokens = prefixes[hit][1] if hit is not None else 0
        covered = read_tokens
        writes = []
        for place, block in enumerate(blocks):
            prefix, tokens = prefixes[place]
            if block.ttl_seconds and tokens >= minimum_tokens and tokens > covered:
                covered = tokens
                writes.append((prefix, block.ttl_seconds))
        usage = Usage(input=total - covered, cache_read=read_tokens, cache_write=covered - read_tokens)
        return Plan(usage, reader.scope, [] if hit is None else [prefixes[hit][0]], writes)

    def plan_implicit(self, blocks: Sequence[Block], caching: ImplicitCaching, reader: Reader) -> Plan:
        """Read the longest known prefix at multiples of `step` tokens (OpenAI before GPT-5.6)."""
        total = sum(block.tokens for block in blocks)
        prefixes = _stepped("".join(block.content for block in blocks), caching)
        if not prefixes:
            return Plan(Usage(input=total))
        hit = self._longest(reader, dict(prefixes))
        cached = min(hit or 0, total)
        read = [prefix for tokens, prefix in prefixes if hit is not None and tokens <= hit]
        writes = [(prefix, caching.idle_seconds) for tokens, prefix in prefixes if hit is None or tokens > hit]
        return Plan(Usage(input=total - cached, cache_read=cached), reader.scope, read, writes)

    def _longest(self, reader: Reader, prefixes: dict[int, str]) -> int | None:
        """The highest place whose prefix is there and not missed by bad luck."""
        known = self.state.cached(reader.scope, list(prefixes.values()), reader.now)
        hits = [place for place, prefix in prefixes.items() if prefix in known and reader.may_read(known[prefix])]
        return max(hits, default=None)


def _prefixes(blocks: Sequence[Block]) -> list[tuple[str, int]]:
    """For each block, the hash and token count of the prompt up to its end."""
    digest, tokens, prefixes = hashlib.sha256(), 0, []
    for block in blocks:
        content = block.content.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8))
        digest.update(content)
        tokens += block.tokens
        prefixes.append((digest.hexdigest(), tokens))
    return prefixes


def _stepped(content: str, caching: ImplicitCaching) -> list[tuple[int, str]]:
    """Hashes at multiples of `step` tokens of a prompt."""
    step = caching.step * CHARACTERS_PER_TOKEN
    digest, prefixes = hashlib.sha256(), []
    for n in range(len(content) // step):
        digest.update(content[n * step : (n + 1) * step].encode("utf-8", "surrogatepass"))
        if (tokens := (n + 1) * caching.step) >= caching.minimum:
            prefixes.append((tokens, digest.hexdigest()))
    return prefixes
