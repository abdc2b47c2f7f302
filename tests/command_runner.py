"""Runs the `presort` command as a process of its own, in a home of its own, against an emulator of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import presort
from emulator_server import EmulatorServer

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

WORDS = (
    "account agreement archive audit backup balance board branch budget cable carrier claim clause client "
    "committee compressor contract course customs database deadline delivery department deposit design discount "
    "employee engine estimate evidence failure filter finance forecast freight guideline harbour heating holiday "
    "hygiene incident index insurance interest inventory invoice kitchen ladder laser lease ledger library "
    "licence loading maintenance margin meeting membrane minutes mortgage network notice nurse office order "
    "packaging parcel patent payment pension permit pipeline plaintiff platform policy premium privacy procedure "
    "project protocol pump purchase quarter receipt refund region release rental repair report reserve resolution "
    "salary sample schedule school security server shift signal software storage supplier survey tariff tax "
    "tender terminal timber training transfer turbine update vaccine valve vendor vessel visa volunteer wage "
    "warehouse warranty water window workshop"
).split()


def write_documents(folder: Path, count: int, seed: int = 7) -> None:
    """Write so many documents of different lengths and kinds, in folders, the same ones for the same seed."""
    chance = random.Random(seed)

    def sentence() -> str:
        words = [chance.choice(WORDS) for _ in range(chance.randint(6, 16))]
        return f"{words[0].capitalize()} {' '.join(words[1:])}."

    for number in range(count):
        title = " ".join(chance.choice(WORDS) for _ in range(4)).title()
        paragraphs = [" ".join(sentence() for _ in range(chance.randint(2, 6))) for _ in range(chance.randint(1, 5))]
        path = folder / f"{number % 7:02}" / f"{number:04}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 3 == 0:
            path.with_suffix(".txt").write_text("\n\n".join([title, *paragraphs]), encoding="utf-8")
        elif number % 3 == 1:
            path.with_suffix(".md").write_text("\n\n".join([f"# {title}", *paragraphs]), encoding="utf-8")
        else:
            body = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
            html = f"<html><head><title>{title}</title></head><body><h1>{title}</h1>{body}</body></html>"
            path.with_suffix(".html").write_text(html, encoding="utf-8")


class Home:
    """Where a user of the command lives: state, configuration, and nothing of the developer's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.emulated = folder / "state" / "presort" / "emulated"
        self.real_store = folder / "state" / "presort" / "presort.db"

    def environment(self, **more: str) -> dict[str, str]:
        """Return the command's environment."""
        dropped = ("PRESORT_", "ANTHROPIC_", "OPENAI_", "COLUMNS", "NO_COLOR", "FORCE_COLOR")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        source = str(Path(presort.__file__).parent.parent)
        homes = {"XDG_STATE_HOME": str(self.folder / "state"), "XDG_CONFIG_HOME": str(self.folder / "config")}
        return {**kept, **homes, "PYTHONPATH": source, "PYTHONUNBUFFERED": "1", **more}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start the command in the work folder."""
        return subprocess.Popen(
            [sys.executable, "-m", "presort.cli", *arguments],
            cwd=self.work,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command in the work folder to its end."""
        with self.start(*arguments, **environment) as process:
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def json(self, *arguments: str, **environment: str) -> dict[str, Any]:
        """Run the command with `--json`, which must succeed, and return what it said."""
        done = self.run(*arguments, "--json", **environment)
        assert 0 == done.returncode, done.stderr
        return json.loads(done.stdout)

    def rows(self, name: str = "records.jsonl") -> list[dict[str, Any]]:
        """Read the records."""
        return [json.loads(line) for line in (self.work / name).read_text(encoding="utf-8").splitlines()]

    @contextmanager
    def emulator(self, batch_seconds: float = 0.3):
        """Run this home's emulator, the one that `--emulate` looks for."""
        self.emulated.mkdir(parents=True, exist_ok=True)
        with EmulatorServer(state=self.emulated / "emulator.db", batch_seconds=batch_seconds) as server:
            (self.emulated / "emulator.json").write_text(json.dumps({"port": server.port}))
            yield server

    def stop_own_emulator(self) -> None:
        """End the emulator that the command started itself."""
        with suppress(OSError, KeyError, ValueError):
            os.kill(json.loads((self.emulated / "emulator.json").read_text())["pid"], signal.SIGTERM)


def wait_for_batches(emulator: EmulatorServer, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many batches were created, or the process has ended."""
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        if len(emulator.record()["batches"]) >= count:
            return
        time.sleep(0.05)


@contextmanager
def stranger(url: str):
    """Serve what an emulator serves without saying that it is emulated: as real as a test can be."""

    class Handler(BaseHTTPRequestHandler):
        def forward(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            dropped = {"host", "content-length", "connection", "transfer-encoding"}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            body = self.rfile.read(length) if length else None
            request = urllib.request.Request(url + self.path, body, headers, method=self.command)
            try:
                response = _OPENER.open(request, timeout=30)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                content = response.read()
                self.send_response(response.status)
                for name, value in response.headers.items():
                    if name.lower() not in dropped | {"x-emulated", "date", "server"}:
                        self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = do_DELETE = forward  # noqa: N815 - so they are called

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
