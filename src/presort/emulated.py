"""The emulator as a neighbour: one background process per folder, always on the same port.

Its address is part of the batch keys in the store, so it must not change between two runs. It keeps its state in a
file and ends by itself when nobody has asked anything for a while; the next run starts it again.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from presort.errors import PresortError

if sys.platform != "win32":
    import fcntl

HEADER = "x-emulated"
"""Every answer of the emulator carries it, and no vendor's does."""

IDLE_SECONDS = 120
_START_SECONDS = 20.0


def folder() -> Path:
    """Return where emulated work is kept, apart from real work."""
    return platformdirs.user_state_path("presort") / "emulated"


def ensure(where: Path, *, batch_seconds: float | None = None) -> str:
    """Return the URL of the emulator that belongs to a folder, starting it if it does not run.

    Args:
        where: The folder.
        batch_seconds: How long its batches take, if it is started; by default what was set before, or its own.

    Raises:
        PresortError: It could not be started; the message says why and what to do.
    """
    remembered = where / "emulator.json"
    state = where / "emulator.db"
    log = where / "emulator.log"
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(where / "emulator.lock"):
            port = _remembered_port(remembered)
            if port is None or not _answers(port, state):
                started = _start(state, port or 0, batch_seconds, log)
                if started is None:
                    raise PresortError(_failure(where, port, log))
                remembered.write_text(json.dumps(started), encoding="utf-8")
                port = started["port"]
    except OSError as error:
        raise PresortError(f"the emulator cannot keep its files in `{where}`: {error.strerror or error}") from error
    return f"http://127.0.0.1:{port}"


def runs(where: Path) -> bool:
    """Whether the emulator that belongs to a folder answers."""
    port = _remembered_port(where / "emulator.json")
    return port is not None and _answers(port, where / "emulator.db")


def invoice(url: str) -> dict[str, Any]:
    """Return what the emulated vendors would bill, for everything they were ever asked.

    Raises:
        PresortError: The emulator does not answer.
    """
    try:
        return _ask(int(url.rpartition(":")[2]), "invoice", 60)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PresortError(f"the emulator at {url} does not answer: {error}") from error


def _ask(port: int, name: str, timeout_seconds: float) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_seconds)
    with contextlib.closing(connection):
        connection.request("GET", f"/_emulator/{name}")
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer


def _remembered_port(file: Path) -> int | None:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["port"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _answers(port: int, state: Path) -> bool:
    """Whether this folder's own emulator listens there."""
    try:
        health = _ask(port, "health", 5)
        return bool(health["emulated"]) and Path(str(health["state"])).resolve() == state.resolve()
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keep other processes from starting a second emulator on the same state, where the system can."""
    with lock.open("ab") as file:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(state: Path, port: int, batch_seconds: float | None, log: Path) -> dict[str, int] | None:
    """Start the process; return its port and pid once it answers, `None` if it did not come up."""
    command = [sys.executable, "-m", "presort.emulator", "--state", str(state), "--port", str(port)]
    command += ["--idle-exit-seconds", str(IDLE_SECONDS)]
    if batch_seconds is not None:
        command += ["--batch-seconds", str(batch_seconds)]
    detached: dict[str, Any] = (
        {
            "creationflags": getattr(subprocess, "DETACHED_PROCESS", 0)
            | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        }
        if sys.platform == "win32"
        else {"start_new_session": True}
    )
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **detached)
    give_up_at = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        address = next((line.rpartition("http://")[2] for line in lines if line.startswith("EMULATED")), None)
        if address is not None:
            found = int(address.rpartition(":")[2])
            if _answers(found, state):
                return {"port": found, "pid": process.pid}
        time.sleep(0.05)
    process.kill()
    process.wait()
    return None


def _failure(where: Path, port: int | None, log: Path) -> str:
    """Say why the emulator did not come up."""
    lines = log.read_text(encoding="utf-8", errors="replace").split(os.linesep)
    said = next((line for line in reversed(lines) if line.strip()), "it said nothing").strip()
    if port is not None and "cannot listen" in said:
        return (
            f"the emulator's port {port} is taken, and the work in `{where}` is bound to it: free the port, or delete "
            "that folder to start anew (it holds emulated work only)"
        )
    return f"the emulator did not start: {said[:300]} (see `{log}`)"
