"""A small streaming parser for multipart/form-data (RFC 7578).

Parts are handed out piece by piece, so a 200 MB upload needs no 200 MB of memory.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

MAX_HEADER_BYTES = 16_384

_PARAMETER = re.compile(r';\s*(name|filename)="((?:[^"\\]|\\.)*)"', re.IGNORECASE)
_BOUNDARY = re.compile(r'boundary="?([^";]+)"?', re.IGNORECASE)


@dataclass(frozen=True)
class Piece:
    """A piece of a part's content; `filename` is None for ordinary fields."""

    name: str
    filename: str | None
    data: bytes


async def parse(content_type: str, stream: AsyncIterator[bytes]) -> AsyncIterator[Piece]:
    """Split a body into pieces of its parts, in order.

    Raises:
        ValueError: if the body is not well-formed multipart/form-data.
    """
    match = _BOUNDARY.search(content_type)
    if match is None or not content_type.lower().startswith("multipart/form-data"):
        raise ValueError(f"expected multipart/form-data with a boundary, got {content_type!r}")
    delimiter = b"\r\n--" + match.group(1).encode("latin-1")
    buffer = bytearray(b"\r\n")  # so that the first delimiter looks like any other
    part: tuple[str, str | None] | None = None
    ended = False
    async for chunk in stream:
        buffer += chunk
        while not ended:
            if part is None:
                opening = _opening(buffer, delimiter)
                if opening is None:
                    break
                end, part = opening
                del buffer[:end]
                ended = part is None
            elif (place := buffer.find(delimiter)) >= 0:
                yield Piece(*part, bytes(buffer[:place]))
                del buffer[:place]
                part = None
            else:
                sure = len(buffer) - len(delimiter)
                if sure > 0:
                    yield Piece(*part, bytes(buffer[:sure]))
                    del buffer[:sure]
                break
    if not ended:
        raise ValueError("the multipart body ends without its closing boundary")


def _opening(buffer: bytearray, delimiter: bytes) -> tuple[int, tuple[str, str | None] | None] | None:
    """Where the next part's content begins and how it is called, or None if more data is needed.

    The part is None at the closing boundary.
    """
    place = buffer.find(delimiter)
    if place < 0 or len(buffer) < place + len(delimiter) + 2:
        return None
    after = place + len(delimiter)
    if buffer[after : after + 2] == b"--":
        return after + 2, None
    end = buffer.find(b"\r\n\r\n", after)
    if end < 0:
        if len(buffer) - after > MAX_HEADER_BYTES:
            raise ValueError(f"a part's headers exceed {MAX_HEADER_BYTES} bytes")
        return None
    for line in buffer[after:end].decode("utf-8", "replace").split("\r\n"):
        if line.lower().startswith("content-disposition:"):
            found = {name.lower(): re.sub(r"\\(.)", r"\1", value) for name, value in _PARAMETER.findall(line)}
            if "name" in found:
                return end + 4, (found["name"], found.get("filename"))
    raise ValueError("a part has no name")
