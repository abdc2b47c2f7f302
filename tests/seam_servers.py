"""Real HTTP/1.1 on loopback, byte for byte: an origin that speaks as four vendors do, and a forward proxy.

Both run in threads of their own, so that synchronous clients, asyncio and trio all meet the same thing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

TEXT = '{"title": "T", "year": 2026}'
_WAIT_SECONDS = 20.0


@dataclass(frozen=True)
class Heard:
    """One request as it arrived, to the last byte."""

    raw: bytes
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    connection: int
    client_certificate: str | None

    def header(self, name: str) -> str | None:
        """The value of a header, or `None`."""
        return next((value for each, value in self.headers if each.lower() == name), None)

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


Answers = Callable[[Heard], "bytes | Iterable[bytes]"]


def reply(body: bytes = b"", status: int = 200, *headers: str, reason: str = "OK", length: int | None = None) -> bytes:
    """Write a whole response of known length."""
    size = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status} {reason}", *headers, f"Content-Length: {size}", "", ""]
    return "\r\n".join(lines).encode() + body


def json_reply(value: Any, status: int = 200, *headers: str) -> bytes:
    """Write a JSON response."""
    return reply(json.dumps(value).encode(), status, "Content-Type: application/json", *headers)


def chunked(parts: Iterable[bytes], content_type: str) -> Iterable[bytes]:
    """Write a response whose body goes out piece by piece, as the parts come."""
    yield f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for part in parts:
        yield b"%x\r\n%s\r\n" % (len(part), part)
    yield b"0\r\n\r\n"


class Server:
    """An origin. `answers` turns each request into bytes, at once or piece by piece.

    An answer that is `b""` hangs up. The raw bytes of every request are kept in `heard`.
    """

    def __init__(self, answers: Answers, *, tls: ssl.SSLContext | None = None) -> None:
        self.answers = answers
        self.heard: list[Heard] = []
        self.stopping = threading.Event()
        self._tls = tls
        self._connections = 0
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Start listening."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up on everybody."""
        self.stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            still_open = list(self._open)
        for connection in still_open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_WAIT_SECONDS)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections += 1
            self._start(self._guard, connection, self._connections)

    def _guard(self, connection: socket.socket, number: int) -> None:
        connection.settimeout(_WAIT_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.add(connection)
        try:
            self.converse(connection, number)
        except (OSError, EOFError, ValueError):
            pass
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def converse(self, connection: socket.socket, number: int) -> None:
        """Serve one connection until either side hangs up."""
        peer = connection
        certificate = None
        if self._tls is not None:
            peer = self._tls.wrap_socket(connection, server_side=True)
            found = peer.getpeercert()
            if found:
                certificate = dict(pair[0] for pair in found["subject"]).get("commonName", "?")
            with self._lock:
                self._open.discard(connection)
                self._open.add(peer)
        try:
            reader = peer.makefile("rb")
            with reader:
                while True:
                    heard = read_request(reader, number, certificate)
                    self.heard.append(heard)
                    answer = self.answers(heard)
                    if answer == b"":
                        return
                    for part in [answer] if isinstance(answer, bytes) else answer:
                        peer.sendall(part)
                    if heard.header("connection") == "close":
                        return
        finally:
            with self._lock:
                self._open.discard(peer)
            peer.close()


def read_request(reader: Any, number: int, certificate: str | None = None) -> Heard:
    """Read one request and keep every byte of it."""
    raw = bytearray()

    def line() -> bytes:
        found = reader.readline()
        if not found.endswith(b"\n"):
            raise EOFError
        raw.extend(found)
        return bytes(found.rstrip(b"\r\n"))

    def exactly(count: int) -> bytes:
        found = reader.read(count)
        if len(found) < count:
            raise EOFError
        raw.extend(found)
        return bytes(found)

    method, target, _ = line().decode("latin-1").split(" ")
    headers = []
    while text := line().decode("latin-1"):
        name, _, value = text.partition(":")
        headers.append((name, value.strip()))
    by_name = {name.lower(): value for name, value in headers}
    body = b""
    if by_name.get("transfer-encoding") == "chunked":
        while size := int(line(), 16):
            body += exactly(size)
            line()
        line()
    elif "content-length" in by_name:
        body = exactly(int(by_name["content-length"]))
    return Heard(bytes(raw), method, target, tuple(headers), body, number, certificate)


class Proxy(Server):
    """A forward proxy: CONNECT tunnels, and requests in absolute form. It may want a name and a password."""

    def __init__(self, credentials: str | None = None) -> None:
        super().__init__(lambda _: b"")
        self._wanted = credentials and "Basic " + base64.b64encode(credentials.encode()).decode()

    @property
    def asked(self) -> list[tuple[str, str]]:
        """What it was asked for, and answered: (method, target)."""
        return [(heard.method, heard.target) for heard in self.heard]

    def converse(self, connection: socket.socket, number: int) -> None:
        """Serve one connection, which is a tunnel from its CONNECT on."""
        with connection.makefile("rb", buffering=0) as reader:
            while True:
                heard = read_request(reader, number)
                if self._wanted and heard.header("proxy-authorization") != self._wanted:
                    connection.sendall(reply(b"", 407, reason="Proxy Authentication Required"))
                    continue
                self.heard.append(heard)
                if heard.method == "CONNECT":
                    host, _, port = heard.target.rpartition(":")
                    with socket.create_connection((host, int(port))) as upstream:
                        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                        self._pipe(connection, upstream)
                    return
                self._forward(connection, heard)

    def _forward(self, connection: socket.socket, heard: Heard) -> None:
        where = urlsplit(heard.target)
        path = where.path + (f"?{where.query}" if where.query else "")
        own = {"connection", "proxy-authorization", "proxy-connection"}
        kept = [f"{name}: {value}" for name, value in heard.headers if name.lower() not in own]
        head = "\r\n".join([f"{heard.method} {path} HTTP/1.1", *kept, "Connection: close", "", ""])
        with socket.create_connection((where.hostname or "", where.port or 80)) as upstream:
            upstream.sendall(head.encode("latin-1") + heard.body)
            upstream.settimeout(_WAIT_SECONDS)
            while data := upstream.recv(65536):
                connection.sendall(data)

    def _pipe(self, one: socket.socket, other: socket.socket) -> None:
        while not self.stopping.is_set():
            ready, _, _ = select.select([one, other], [], [], 0.2)
            for end in ready:
                data = end.recv(65536)
                if not data:
                    return
                (other if end is one else one).sendall(data)


# -- four vendors ------------------------------------------------------------------------------------------------


def vendors(heard: Heard) -> bytes | Iterable[bytes]:
    """Answer as Anthropic, OpenAI, Gemini and Ollama do; streamed where the request asks for it."""
    path = heard.target.partition("?")[0]
    body = json.loads(heard.body) if heard.body else {}
    if body.get("stream") or ":streamGenerateContent" in path:
        return chunked(stream_parts(path), stream_type(path))
    return json_reply(answer(path, body))


def sse(value: Any, event: str | None = None) -> bytes:
    """Write a server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value)
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()


def stream_type(path: str) -> str:
    """Return the content type of a streamed answer."""
    return "application/x-ndjson" if path.endswith("/api/chat") else "text/event-stream"


def stream_parts(path: str) -> list[bytes]:
    """Write the parts of a streamed answer."""
    if path.endswith("/v1/messages"):
        return [sse(event, event["type"]) for event in anthropic_events()]
    if path.endswith("/api/chat"):
        return [json.dumps(event).encode() + b"\n" for event in ollama_events()]
    if ":streamGenerateContent" in path:
        return [sse(event) for event in gemini_events()]
    return [*(sse(event) for event in openai_events()), sse("[DONE]")]


def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON that a vendor's standard API would."""
    if path.endswith("/v1/messages"):
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [{"type": "text", "text": TEXT}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 11, "output_tokens": 7},
        }
    if path.endswith("/chat/completions"):
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": TEXT, "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
        }
    if ":generateContent" in path:
        return gemini_piece(TEXT, last=True)
    if path.endswith("/api/chat"):
        return {**ollama_events()[-1], "message": {"role": "assistant", "content": TEXT}}
    return {"path": path}


def anthropic_events() -> list[dict[str, Any]]:
    """Return the events of one streamed message, in two pieces of text."""
    message = {**answer("/v1/messages", {"model": "claude-haiku-4-5"}), "content": [], "stop_reason": None}
    message["usage"] = {"input_tokens": 11, "output_tokens": 1}
    pieces = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
        for text in (TEXT[:9], TEXT[9:])
    ]
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    return [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *pieces,
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": end, "usage": {"output_tokens": 7}},
        {"type": "message_stop"},
    ]


def openai_events() -> list[dict[str, Any]]:
    """Return the chunks of one streamed completion, the last with its usage."""
    frame = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4.1-mini"}

    def piece(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**frame, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None}

    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    return [
        piece({"role": "assistant", "content": TEXT[:9]}),
        piece({"content": TEXT[9:]}),
        piece({}, "stop"),
        {**frame, "choices": [], "usage": usage},
    ]


def gemini_piece(text: str, *, last: bool = False) -> dict[str, Any]:
    """Return one chunk of a streamed answer; the last one is what a whole answer looks like."""
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": [{"text": text}]}, "index": 0}
    piece: dict[str, Any] = {"candidates": [candidate], "modelVersion": "gemini-x", "responseId": "r1"}
    if last:
        candidate["finishReason"] = "STOP"
        piece["usageMetadata"] = {"promptTokenCount": 11, "candidatesTokenCount": 7, "totalTokenCount": 18}
    return piece


def gemini_events() -> list[dict[str, Any]]:
    """Return the chunks of one streamed answer."""
    return [gemini_piece(TEXT[:9]), gemini_piece(TEXT[9:], last=True)]


def ollama_events() -> list[dict[str, Any]]:
    """Return the lines of one streamed answer."""
    frame = {"model": "llama3.3", "created_at": "2026-11-23T00:00:00Z"}
    end = {"done": True, "done_reason": "stop", "prompt_eval_count": 11, "eval_count": 7}
    return [
        {**frame, "message": {"role": "assistant", "content": TEXT}, "done": False},
        {**frame, "message": {"role": "assistant", "content": ""}, **end},
    ]
