"""Runs `worker_program.py`, the subject of the kill tests, and reads what it delivered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import presort
from emulator_server import EmulatorServer

PROGRAM = Path(__file__).parent / "scenarios" / "worker_program.py"
COUNT = 25


def start(options: dict[str, Any], config_home: Path) -> subprocess.Popen[str]:
    """Start the program with a configuration folder of its own."""
    source = str(Path(presort.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source, "XDG_CONFIG_HOME": str(config_home)}
    command = [sys.executable, str(PROGRAM), json.dumps(options)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], seconds: float = 60) -> dict[str, int]:
    """Wait for a process that must end well; return the points it passed."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return json.loads(out)


def options_for(emulator: EmulatorServer, tmp_path: Path, provider: str, **more: Any) -> dict[str, Any]:
    """Say what the program is to do."""
    return {
        "url": emulator.url,
        "store": str(tmp_path / "presort.db"),
        "output": str(tmp_path / "answers"),
        "provider": provider,
        "count": COUNT,
        **more,
    }


def answers(tmp_path: Path) -> list[tuple[int, str, str, str]]:
    """Read what was delivered, in order."""
    rows = [line.split() for line in (tmp_path / "answers").read_text().splitlines()]
    return [(int(position), digest, kind, route) for position, digest, kind, route in rows]
