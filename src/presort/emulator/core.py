"""The parts that all routes share."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from presort.emulator.batches import Batches
from presort.emulator.billing import Meter
from presort.emulator.cache import PromptCache
from presort.emulator.clock import Clock
from presort.emulator.faults import Faults
from presort.emulator.settings import Settings
from presort.emulator.state import State

ORGANIZATION = "org_emulated"


class Emulator:
    """State, clock, settings and everything that works on them."""

    def __init__(self, state_path: Path | None = None, *, batch_seconds: float | None = None) -> None:
        self.state = State(state_path)
        self.clock = Clock(self.state)
        self.settings = Settings.load(self.state)
        if batch_seconds is not None:
            self.settings.change({"batch_seconds": batch_seconds}, self.state)
        self.meter = Meter(self.state)
        self.cache = PromptCache(self.state)
        self.faults = Faults(self.state)
        self.batches = Batches(self.state, self.clock, self.settings, self.meter)
        self.requests: Counter[str] = Counter()
        self.started_at = time.time()
        self.last_request = time.monotonic()
