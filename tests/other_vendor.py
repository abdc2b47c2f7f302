"""Both vendors' batch endpoints once more, on the standard library's server: presort must not need our emulator.

Written from the documented wire only, as plain as it comes: HTTP/1.1 by threads, a connection per request, chunked
downloads, no header beyond what the vendors document. Faults are a set of names, each a column of the table of faults
in the tests.
"""

from __future__ import annotations

import json
import re
import threading
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class OtherVendor:
    """A server with `faults`, and what it was asked: `asked`, `creates`, `calls`."""

    def __init__(self, *faults: str) -> None:
        self.faults = set(faults)
        self.batches: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.calls = 0
        self.trouble = 3 if "poll500" in faults else 0
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        """Start."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"vendor": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.server.shutdown()
        self.server.server_close()

    def outcomes(self, ids: list[str]) -> dict[str, str]:
        """Say how each request of a batch ends; every fault strikes the first batch only."""
        first = len(self.batches) == 1
        ends = dict.fromkeys(ids, "succeeded")
        if first and "bad_row" in self.faults:
            ends[ids[1]] = "errored"
        if first and "expired_row" in self.faults:
            ends[ids[1]] = "expired"
        if first and "half_expired" in self.faults:
            ends |= dict.fromkeys(ids[len(ids) // 2 :], "expired")
        if first and "missing_row" in self.faults:
            del ends[ids[1]]
        return ends


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    vendor: OtherVendor

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer a look."""
        vendor, path = self.vendor, self.path.partition("?")[0]
        with vendor.lock:
            if vendor.trouble and not path.endswith("batches"):
                vendor.trouble -= 1
                return self._send(500, {"error": {"message": "trouble", "type": "server_error"}})
            if path.endswith("batches"):
                found = list(reversed(vendor.batches.values()))
                for batch in found:
                    self._end(batch)
                return self._send(200, {"object": "list", "data": found, "has_more": False})
            if match := re.fullmatch(r"/v1/messages/batches/(\w+)/results", path):
                return self._download(vendor.files[match[1]])
            if match := re.fullmatch(r"/v1/files/(\w+)/content", path):
                return self._download(vendor.files[match[1]])
            if match := re.search(r"batches/(\w+)$", path):
                batch = vendor.batches[match[1]]
                self._end(batch)
                return self._send(200, batch)
        return self._send(404, {"error": {"message": "not found"}})

    def do_POST(self) -> None:
        """Take something in."""
        vendor = self.vendor
        body = self._body()
        with vendor.lock:
            if self.path.startswith("/v1/files"):
                name = f"file{len(vendor.files)}"
                vendor.files[name] = _part(self.headers["content-type"], body)
                return self._send(200, {"id": name, "object": "file"})
            if self.path.startswith("/v1/messages/batches"):
                rows = [(row["custom_id"], row["params"]) for row in json.loads(body)["requests"]]
                return self._create(rows, {"type": "message_batch"})
            if self.path.startswith("/v1/batches"):
                order = json.loads(body)
                lines = [json.loads(line) for line in vendor.files[order["input_file_id"]].splitlines()]
                rows = [(line["custom_id"], line["body"]) for line in lines]
                return self._create(rows, {"object": "batch", "metadata": order.get("metadata")})
            vendor.calls += 1
            return self._send(200, _answer(self.path, json.loads(body)))

    def _create(self, rows: list[tuple[str, Any]], shape: dict[str, Any]) -> None:
        vendor = self.vendor
        name = f"batch{len(vendor.batches)}"
        anthropic = shape.get("type") == "message_batch"
        batch: dict[str, Any] = {"id": name, "rows": rows, **shape}
        if anthropic:
            batch |= {"processing_status": "in_progress", "created_at": _now(), "results_url": None}
            nothing = dict.fromkeys(("succeeded", "errored", "canceled", "expired"), 0)
            batch["request_counts"] = {"processing": len(rows), **nothing}
        else:
            batch |= {"status": "in_progress", "created_at": _unix(), "output_file_id": None, "error_file_id": None}
            batch["request_counts"] = {"total": len(rows), "completed": 0, "failed": 0}
        vendor.batches[name] = batch
        vendor.asked += [custom_id for custom_id, _ in rows]
        batch["ends"] = vendor.outcomes([custom_id for custom_id, _ in rows])
        if "lost_create" in vendor.faults and len(vendor.batches) == 1:
            self.close_connection = True
            self.connection.close()
            return
        self._send(200, batch)

    def _end(self, batch: dict[str, Any]) -> None:
        vendor, bodies, name = self.vendor, dict(batch["rows"]), batch["id"]
        if "processing_status" in batch:
            lines = []
            for custom_id, kind in reversed(batch["ends"].items()):
                result: dict[str, Any] = {"type": kind}
                if kind == "succeeded":
                    result["message"] = _answer("/v1/messages", bodies[custom_id])
                if kind == "errored":
                    error = {"type": "invalid_request_error", "message": "no such thing"}
                    result["error"] = {"type": "error", "error": error}
                lines.append({"custom_id": custom_id, "result": result})
            vendor.files[name] = _jsonl(lines)
            batch["processing_status"] = "ended"
            return
        good, bad = [], []
        for custom_id, kind in batch["ends"].items():
            row: dict[str, Any] = {"id": f"r{custom_id}", "custom_id": custom_id, "response": None, "error": None}
            if kind == "succeeded":
                row["response"] = {"status_code": 200, "body": _answer("/chat/completions", bodies[custom_id])}
                good.append(row)
            elif kind == "errored":
                row["response"] = {"status_code": 400, "body": {"error": {"message": "no such thing"}}}
                bad.append(row)
            else:
                row["error"] = {"code": "batch_expired", "message": "too late"}
                bad.append(row)
        for field, rows in (("output_file_id", good), ("error_file_id", bad)):
            if rows:
                batch[field] = f"{name}{field[:3]}"
                vendor.files[batch[field]] = _jsonl(rows)
        expired = any(kind == "expired" for kind in batch["ends"].values())
        batch["status"] = "expired" if expired else "completed"

    def _body(self) -> bytes:
        length = self.headers.get("content-length")
        assert length is not None, "bodies are sent with their length"
        return self.rfile.read(int(length))

    def _send(self, status: int, value: Any) -> None:
        if isinstance(value, dict):
            value = {name: item for name, item in value.items() if name not in {"rows", "ends"}}
            if "data" in value:
                hidden = {"rows", "ends"}
                value["data"] = [{k: v for k, v in item.items() if k not in hidden} for item in value["data"]]
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def _download(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(content), 97):
            piece = content[start : start + 97]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")


def _answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if "messages" in path:
        usage = {"input_tokens": 10, "output_tokens": 5}
        content = [{"type": "text", "text": "{}"}]
        shape = {"id": "msg_1", "type": "message", "role": "assistant", "stop_reason": "end_turn"}
        return {**shape, "stop_sequence": None, "model": body["model"], "content": content, "usage": usage}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "{}"}}
    shape = {"id": "c1", "object": "chat.completion", "created": 1}
    return {**shape, "model": body["model"], "choices": [choice], "usage": usage}


def _part(content_type: str, body: bytes) -> bytes:
    """Take the file out of a multipart form."""
    message = BytesParser(policy=HTTP).parsebytes(b"content-type: " + content_type.encode() + b"\r\n\r\n" + body)
    for part in message.iter_parts():
        if part.get_filename():
            return part.get_payload(decode=True)
    raise AssertionError("no file in the form")


def _jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _unix() -> int:
    import time

    return int(time.time())


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
