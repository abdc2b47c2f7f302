"""The engine on PostgreSQL: what holds on one file must hold on a server."""

from __future__ import annotations

import json
import signal
import uuid

import pytest
from sqlalchemy import create_engine, make_url, text

from emulator_server import EmulatorServer
from killing import COUNT, answers, finish, options_for, start


@pytest.fixture
def database(postgres_url):
    """Make an empty database."""
    name = f"presort_{uuid.uuid4().hex}"
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"create database {name}"))
    admin.dispose()
    return make_url(postgres_url).set(database=name).render_as_string(hide_password=False)


@pytest.mark.parametrize("point", ["submitter.creating", "submitter.created", "poller.collected"])
def test_kill(database, tmp_path, point):
    """Killed around the create or the download, the next process on the database loses and repeats nothing."""
    with EmulatorServer(batch_seconds=0.2) as emulator:
        options = {**options_for(emulator, tmp_path, "anthropic"), "store": database}
        first = start({**options, "kill_at": point}, tmp_path)
        first.communicate(timeout=60)
        assert -signal.SIGKILL == first.returncode

        finish(start(options, tmp_path))

        assert set(range(COUNT)) == {row[0] for row in answers(tmp_path)}
        assert COUNT == len(emulator.asked())


def test_a_survivor_takes_over(database, tmp_path):
    """What a dead process submitted is collected by one that lives on, without being asked again."""
    with EmulatorServer(batch_seconds=0.2) as emulator:
        options = {**options_for(emulator, tmp_path, "openai"), "store": database}
        first = start({**options, "kill_at": "submitter.submitted", "output": str(tmp_path / "first")}, tmp_path)
        second = start({**options, "count": 3, "output": str(tmp_path / "second")}, tmp_path)
        first.communicate(timeout=60)
        finish(second)
        finish(start(options, tmp_path))

        assert set(range(COUNT)) == {row[0] for row in answers(tmp_path)}
        assert COUNT == len(emulator.asked()), json.dumps(emulator.record()["batches"])
