"""Runs the emulator as a process of its own, for tests.

with EmulatorServer() as emulator:
    client = anthropic.Anthropic(base_url=emulator.url, api_key="any")
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import presort

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EmulatorServer:
    """An emulator on a free port; stops it on exit."""

    def __init__(
        self,
        *,
        state: Path | None = None,
        batch_seconds: float | None = None,
        port: int = 0,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self._command = [sys.executable, "-m", "presort.emulator", "--port", str(port), *arguments]
        if state is not None:
            self._command += ["--state", str(state)]
        if batch_seconds is not None:
            self._command += ["--batch-seconds", str(batch_seconds)]
        self.url = ""

    def __enter__(self) -> Self:
        """Start it and wait until it listens."""
        source = str(Path(presort.__file__).parent.parent)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
        }
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.banner = self.process.stdout.readline().strip()
        if "http://" not in self.banner:
            self.stop()
            raise RuntimeError(f"the emulator did not start: {' '.join(self._command)}")
        self.url = self.banner.rsplit(" ", 1)[1]
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rsplit(":", 1)[1])

    def stop(self) -> int:
        """End it as a user would, and return its exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """End it as a crash would."""
        return self._end(signal.SIGKILL)

    def _end(self, with_signal: signal.Signals) -> int:
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        status = self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Send JSON and return (status, JSON)."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try:
            with _OPENER.open(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                text = error.read()
                return error.code, json.loads(text) if text[:1] in b"{[" else text

    def admin(self, method: str, name: str, body: Any = None) -> dict[str, Any]:
        """Use an endpoint of the emulator's own; raises ValueError with its explanation."""
        status, answer = self.request(method, f"/_emulator/{name}", body)
        if status != 200:
            raise ValueError(answer["error"])
        return answer

    def advance(self, seconds: float) -> None:
        """Let time pass, and all that happens in it."""
        self.admin("POST", "clock", {"advance_seconds": seconds})

    def now(self) -> float:
        """The emulator's time."""
        return self.admin("GET", "clock")["now"]

    def fault(self, kind: str, **parameters: Any) -> int:
        """Arm a fault and return its number."""
        return self.admin("POST", "faults", {"kind": kind, **parameters})["id"]

    def clear_faults(self) -> None:
        """Disarm all faults."""
        self.admin("DELETE", "faults")

    def set(self, **settings: Any) -> None:
        """Change settings."""
        self.admin("POST", "settings", settings)

    def key(self, key: str, **parameters: Any) -> None:
        """Define an API key: organization, workspace, revoked."""
        self.admin("POST", "keys", {"key": key, **parameters})

    def invoice(self) -> dict[str, Any]:
        """The bill so far."""
        return self.admin("GET", "invoice")

    def billed(self) -> dict[tuple[str, str, str, str], int]:
        """Billed tokens by (vendor, model, lane, class)."""
        counts: dict[tuple[str, str, str, str], int] = {}
        for line in self.invoice()["lines"]:
            key = line["vendor"], line["model"], line["lane"], line["class"]
            counts[key] = counts.get(key, 0) + line["tokens"]
        return counts

    def record(self) -> dict[str, Any]:
        """Everything that was asked."""
        return self.admin("GET", "record")

    def asked(self) -> list[str]:
        """Hashes of all requests ever accepted, in batches and as standard calls; other tenants' left out."""
        record = self.record()
        batches = [sha256 for batch in record["batches"] if not batch["foreign"] for sha256 in batch["sha256"]]
        return batches + [call["sha256"] for call in record["calls"]]


def sha256_of(params: Any) -> str:
    """The hash under which the record lists a request."""
    text = json.dumps(params, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
