"""The emulator as a neighbour: one background process per folder, always on the same port.

Its address is part of the batch keys in the store, so it must not change between two runs. It keeps its state in a
file and ends by itself when nobody has asked anything for a while; the next run starts it again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import platformdirs

from presort.errors import PresortError

IDLE_SECONDS = 120
_START_SECONDS = 20.0


def folder() -> Path:
    """Return where emulated work is kept, apart from real work."""
    return platformdirs.user_state_path("presort") / "emulated"


def ensure(where: Path, *, batch_seconds: float = 3.0) -> str:
    """Return the URL of the emulator that belongs to a folder, starting it if it does not run.

    Raises:
        PresortError: It could not be started; the message holds what it said.
    """
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    remembered = where / "emulator.json"
    state = where / "emulator.db"
    port = _remembered_port(remembered)
    if port is not None and _answers(port, state):
        return f"http://127.0.0.1:{port}"
    started = _start(state, port or 0, batch_seconds, where / "emulator.log")
    if started is None and port is not None:
        raise PresortError(
            f"port {port} is taken, and work in `{where}` is bound to it; free the port, or delete the folder to start "
            "anew (emulated work only)"
        )
    if started is None:
        raise PresortError(f"the emulator did not start; see `{where / 'emulator.log'}`")
    remembered.write_text(json.dumps({"port": started}), encoding="utf-8")
    return f"http://127.0.0.1:{started}"


def invoice(url: str) -> dict[str, Any]:
    """Return what the emulated vendors would bill, for everything they were ever asked."""
    answer = httpx2.get(f"{url}/_emulator/invoice", trust_env=False, timeout=60)
    answer.raise_for_status()
    bill: dict[str, Any] = answer.json()
    return bill


def _remembered_port(file: Path) -> int | None:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["port"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _answers(port: int, state: Path) -> bool:
    """Whether this folder's own emulator listens there."""
    try:
        health = httpx2.get(f"http://127.0.0.1:{port}/_emulator/health", trust_env=False, timeout=5).json()
        return bool(health["emulated"]) and Path(str(health["state"])).resolve() == state.resolve()
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return False


def _start(state: Path, port: int, batch_seconds: float, log: Path) -> int | None:
    """Start the process; return its port once it answers, `None` if it ended at once."""
    command = [sys.executable, "-m", "presort.emulator", "--state", str(state), "--port", str(port)]
    command += ["--idle-exit-seconds", str(IDLE_SECONDS), "--batch-seconds", str(batch_seconds)]
    detached: dict[str, Any] = (
        {"creationflags": getattr(subprocess, "DETACHED_PROCESS", 0) | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        if sys.platform == "win32"
        else {"start_new_session": True}
    )
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **detached
        )
    give_up_at = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        address = next((line.rpartition("http://")[2] for line in lines if line.startswith("EMULATED")), None)
        if address is not None:
            found = int(address.rpartition(":")[2])
            if _answers(found, state):
                return found
        time.sleep(0.05)
    return None
