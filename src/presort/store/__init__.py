"""What must survive the process: in an SQLite file by default, in PostgreSQL for many machines."""

from __future__ import annotations

from presort.store.files import default_url
from presort.store.store import Store

__all__ = ["Store", "default_url"]
