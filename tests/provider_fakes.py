"""The engine's side of a provider, for tests: rows, steps and what is known of batches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from presort.job import Job, JobState

CREATED = 1_800_000_000.0
"""2027-01-15T08:00:00Z"""


class FakeRows:
    """Rows as the store would stream them: `count` bodies made one at a time."""

    def __init__(self, ids: list[str], body: Callable[[int], bytes]) -> None:
        self.ids = ids
        self._body = body
        self.count = len(ids)
        self.size_bytes = sum(len(body(n)) for n in range(len(ids)))

    async def __aiter__(self) -> AsyncIterator[tuple[str, bytes]]:
        for n, custom_id in enumerate(self.ids):
            yield custom_id, self._body(n)


class FakeSteps:
    """Remembers the steps that a submit took, in order."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    async def uploaded(self, ref: str) -> None:
        """Note an upload."""
        self.taken.append(f"uploaded {ref}")

    async def creating(self) -> None:
        """Note that the create is next."""
        self.taken.append("creating")


def rows_of(ids: list[str], *bodies: bytes) -> FakeRows:
    """Return rows of these bodies."""
    return FakeRows(ids[: len(bodies)], lambda n: bodies[n])


def job_of(**fields: Any) -> Job:
    """Return a submitted job of three requests, created at `CREATED`."""
    given = {
        "id": "0123456789abcdef" * 2,
        "key_id": "k",
        "state": JobState.SUBMITTED,
        "count": 3,
        "size_bytes": 3,
        "created_at": CREATED,
        "create_at": CREATED,
        "deadline": CREATED + 90_000,
        "due_at": CREATED,
    }
    return Job(**{**given, **fields})


async def unknown(_: str) -> bool:
    """Know no batch."""
    return False
