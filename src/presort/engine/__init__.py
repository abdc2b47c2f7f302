"""The engine: accumulates requests, submits jobs, polls them, settles what they leave, one file per loop."""

from presort.engine.accumulator import Group, Run
from presort.engine.engine import Engine
from presort.engine.keyring import Link
from presort.engine.stream import Stream

__all__ = ["Engine", "Group", "Link", "Run", "Stream"]
