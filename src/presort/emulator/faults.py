"""Faults that can be ordered: which there are, when they strike, and how results are defaced.

A fault waits for its operation (and vendor, if it names one), lets the first `after`
matches pass, and strikes the next `times` (for ever if -1). They survive a
restart of the emulator.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from typing import Any, Final

from presort.emulator.state import State

OPERATIONS: Final = (
    "create_batch",
    "upload_file",
    "retrieve_batch",
    "list_batches",
    "results",
    "cancel_batch",
    "standard",
)
VENDORS: Final = ("anthropic", "openai")

HTTP_KINDS: Final = {
    "status": ("status", "message", "error_type", "code", "retry_after", "error_code"),
    "drop_before": (),
    "drop_after": (),
    "delay": ("seconds",),
    "truncate": ("fraction",),
    "garble": (),
    "slow": ("seconds",),
}
"""What can happen to one HTTP exchange, each with its parameters."""

ROW_PARAMETERS: Final = ("index", "every", "fraction")
ROW_KINDS: Final = {
    "row_error": ("status", "error_type", "code", "message", "param"),
    "row_expired": (),
    "row_null_response": (),
    "row_missing": (),
    "row_twice": (),
    "row_garbled": (),
    "row_foreign": (),
}
"""What can happen to rows of a batch created while the fault is armed. The
first three replace the request's execution, which is then not billed; the others only
spoil the results."""

BATCH_KINDS: Final = {
    "expire_half": ("fraction",),
    "fail_batch": ("code", "message", "line"),
    "never_ends": ("fraction",),
    "slow_batch": ("seconds",),
    "cancel_without_files": (),
    "late_list": ("seconds",),
    "late_create": ("seconds",),
    "foreign_batch": (),
}
"""What can happen to a whole batch created while the fault is armed."""

ONLY_OPENAI: Final = ("fail_batch", "cancel_without_files")
KINDS: Final = {
    **HTTP_KINDS,
    **{kind: names + ROW_PARAMETERS for kind, names in ROW_KINDS.items()},
    **BATCH_KINDS,
}
COMMON: Final = ("kind", "on", "times", "after", "vendor")

TYPES: Final[dict[str, tuple[type, ...]]] = {
    "times": (int,),
    "after": (int,),
    "status": (int,),
    "every": (int,),
    "line": (int,),
    "index": (int, list),
    "fraction": (int, float),
    "seconds": (int, float),
    "retry_after": (int, float),
}

Fault = dict[str, Any]


def check(spec: Any) -> Fault:
    """Complete an ordered fault with its defaults.

    Raises:
        ValueError: naming what is wrong and what would be right.
    """
    if not isinstance(spec, dict):
        raise ValueError(f"a fault is a JSON object, got {spec!r}")
    kind = _one_of(KINDS, spec.get("kind"), "kind")
    on_http = kind in HTTP_KINDS
    fault = {"on": None if on_http else "create_batch", "times": 1, "after": 0, "vendor": None, **spec}
    _one_of(OPERATIONS if on_http else ("create_batch",), fault["on"], "on")
    if kind in ONLY_OPENAI:
        fault["vendor"] = fault["vendor"] or "openai"
    _one_of(("openai",) if kind in ONLY_OPENAI else (*VENDORS, None), fault["vendor"], "vendor")
    for name, value in spec.items():
        _one_of(COMMON + KINDS[kind], name, f"parameter of `{kind}`")
        types = TYPES.get(name)
        if types and (isinstance(value, bool) or not isinstance(value, types)):
            raise ValueError(f"`{name}` must be {' or '.join(each.__name__ for each in types)}, got {value!r}")
    return fault


def _one_of(valid: Collection[str | None], value: Any, name: str) -> Any:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}, valid are {', '.join(map(str, valid))}")
    return value


class Faults:
    """The armed faults."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._armed = bool(state.faults())

    def add(self, spec: Any) -> int:
        """Arm a fault; see `check`."""
        self._armed = True
        return self._state.add_fault(check(spec))

    def all(self) -> list[Fault]:
        """The armed faults with their counters."""
        return self._state.faults()

    def clear(self) -> None:
        """Disarm all."""
        self._armed = False
        self._state.clear_faults()

    def strike(self, vendor: str, operation: str, kinds: Iterable[str]) -> list[Fault]:
        """Which faults of these kinds strike now; each match is counted."""
        if not self._armed:
            return []
        struck = []
        for fault in self._state.faults():
            if fault["kind"] not in kinds or fault["on"] != operation or fault["vendor"] not in (None, vendor):
                continue
            used = fault["seen"] >= fault["after"] and (fault["times"] == -1 or fault["used"] < fault["times"])
            self._state.count_fault(fault["id"], used=used)
            if used:
                struck.append(fault)
        return struck


def strikes_row(fault: Fault, n: int) -> bool:
    """Whether a row fault concerns request `n`; without any choice it concerns them all."""
    if "index" in fault:
        index = fault["index"]
        return bool(n in index if isinstance(index, list) else n == index)
    if "every" in fault:
        return (n + 1) % max(1, int(fault["every"])) == 0
    fraction = float(fault.get("fraction", 1))
    return math.floor((n + 1) * fraction + 1e-9) > math.floor(n * fraction + 1e-9)


def deface(line: str, defect: str | None) -> list[str]:
    """Turn a result line into the lines that the vendor hands out."""
    match defect:
        case "row_missing":
            return []
        case "row_twice":
            return [line, line]
        case "row_garbled":
            return [line[: len(line) // 2]]
        case "row_foreign":
            row = json.loads(line)
            return [line, json.dumps({**row, "custom_id": f"foreign-{row['custom_id']}"[:64]})]
        case _:
            return [line]


def garble(body: bytes) -> bytes:
    """Spoil a body: a line in the middle of JSONL, the end of anything else."""
    lines = body.splitlines(keepends=True)
    if len(lines) > 1:
        middle = len(lines) // 2
        lines[middle] = lines[middle][: len(lines[middle]) // 2].rstrip() + b"\n"
        return b"".join(lines)
    return body[: len(body) // 2] + b"\x00garbled"
