"""The connection to the database: transactions, what differs between SQLite and PostgreSQL, errors, upgrades.

A writing transaction on SQLite begins with `BEGIN IMMEDIATE`, so that it waits for its turn before it reads
anything and can never find halfway that it must give up. On PostgreSQL it runs under READ COMMITTED, and
whoever reads before writing locks the rows, in the order of their ids.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from decimal import Context, Decimal
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ARRAY,
    URL,
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Numeric,
    QueuePool,
    Table,
    Text,
    Update,
    any_,
    cast,
    create_engine,
    event,
    func,
    inspect,
    literal,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from presort.errors import MissingExtraError, StoreError, StoreVersionError
from presort.store import files
from presort.store.schema import REVISION, VERSION_TABLE

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

BUSY_SECONDS = 30.0
"""How long a transaction waits for another process's."""

_MANY = 50
"""From so many rows on, compiling a statement anew costs less than what it saves."""

_SCHEMA_LOCK = 0x7072_6573_6F72_7401
"""PostgreSQL advisory lock held while the schema is made or changed: `presort` and 1."""

_opening = threading.Lock()
"""One thread opens a store at a time: Alembic keeps its context in module globals."""

_EXACT = Context(prec=400)
"""Sums of amounts never round: an amount has few digits on either side of the point."""

_SQLITE_TROUBLE = {
    sqlite3.SQLITE_BUSY: f"another process held its lock for {BUSY_SECONDS:.0f} seconds; end that, or wait",
    sqlite3.SQLITE_READONLY: "it cannot be written; change its permissions, or choose another path",
    sqlite3.SQLITE_IOERR: "reading or writing the disk failed; check the disk and its free space",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; move it away and restore a backup, or start with a new one",
    sqlite3.SQLITE_FULL: "the disk is full; free some space on it",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the path and its permissions",
    sqlite3.SQLITE_PERM: "it cannot be opened; check the path and its permissions",
    sqlite3.SQLITE_NOTADB: "the file is not an SQLite database; choose another path",
}


class Database:
    """One database: gives out transactions, and the little SQL that the two dialects say differently."""

    def __init__(self, engine: Engine, location: str) -> None:
        self.location = location
        """Path, or URL without the password, for people."""
        self.is_postgres = engine.dialect.name == "postgresql"
        self._engine = engine
        self._writer = engine.execution_options(presort_write=True)
        # SQLite has one writer at a time: threads of one process queue up here instead of polling the file
        self._turn: AbstractContextManager[Any] = nullcontext() if self.is_postgres else threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, url: str) -> Database:
        """Open the database and bring its tables up to date."""
        parsed = _parse(url)
        with _opening:
            if parsed.get_backend_name() == "sqlite":
                path = Path(str(parsed.database)).expanduser().absolute()
                files.prepare(path)
                with _translated(str(path)):
                    _check_sqlite_file(path)
                database = cls(_sqlite_engine(path), str(path))
            else:
                database = cls(_postgres_engine(parsed), _for_people(parsed))
            try:
                database._upgrade()
            except BaseException:
                database.close()
                raise
        return database

    def close(self) -> None:
        """Close every connection that is not in use."""
        self._closed = True
        self._engine.dispose()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One writing transaction: committed at the end, undone if block or process end in any other way."""
        self._check_open()
        with _translated(self.location), self._turn, self._writer.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One reading transaction."""
        self._check_open()
        with _translated(self.location), self._engine.begin() as connection:
            yield connection

    def shrink(self) -> None:
        """Give up to 100 MB of free pages back to the disk, if nobody is in the way; PostgreSQL does so by itself."""
        if self.is_postgres:
            return
        with suppress(sqlite3.Error, SQLAlchemyError), self._turn, self._engine.connect() as connection:
            raw = connection.connection.driver_connection
            if raw is not None:
                raw.executescript("PRAGMA incremental_vacuum(25600)")  # `execute` would free one page

    # -- where the dialects differ ---------------------------------------------------------------------------
    def insert(self, table: Table) -> postgresql.Insert | sqlite.Insert:
        """Return an INSERT that knows ON CONFLICT."""
        if self.is_postgres:
            from sqlalchemy.dialects import postgresql

            return postgresql.insert(table)
        from sqlalchemy.dialects import sqlite

        return sqlite.insert(table)

    def among(self, column: ColumnElement[Any], values: Sequence[str]) -> ColumnElement[bool]:
        """Return `column IN values` as one parameter, however many values there are."""
        if self.is_postgres:
            return column == any_(literal(list(values), ARRAY(Text)))
        each = func.json_each(json.dumps(list(values))).table_valued("value")
        return column.in_(select(each.c.value))

    def exact_sum(self, column: ColumnElement[Any]) -> ColumnElement[str]:
        """Return the exact sum of decimal texts, as text; NULL if there are none."""
        if self.is_postgres:
            return cast(func.sum(cast(column, Numeric)), Text)
        return func.exact_sum(column)

    def many(self, connection: Connection, statement: Insert | Update, rows: Sequence[dict[str, Any]]) -> None:
        """Run a statement once for each row.

        Many rows go past SQLAlchemy, which would look at each for as long as SQLite takes to store it: their
        values must be what the driver takes.
        """
        if len(rows) < _MANY:
            if rows:
                connection.execute(statement, list(rows))
            return
        compiled = statement.compile(connection, column_keys=list(rows[0]))
        fixed = {name: value for name, value in compiled.params.items() if name not in rows[0]}
        full = [fixed | row for row in rows] if fixed else list(rows)
        if compiled.positional:
            names = compiled.positiontup or []
            connection.exec_driver_sql(str(compiled), list(map(itemgetter(*names), full)))
        else:
            connection.exec_driver_sql(str(compiled), full)

    def lock_for(self, connection: Connection, number: int) -> None:
        """Wait until no other transaction holds this number, and hold it until the end of this one."""
        if self.is_postgres:
            connection.execute(select(func.pg_advisory_xact_lock(number)))

    # -- the schema ------------------------------------------------------------------------------------------
    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"the store {self.location} was closed")

    def _version(self, connection: Connection) -> str | None:
        """Return the schema's revision; `None` if there is no schema yet."""
        if not inspect(connection).has_table(VERSION_TABLE):
            return None
        version: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608
        return version or ""

    def _upgrade(self) -> None:
        """Create the tables or bring them up to date, in one transaction; others wait and find it done."""
        with self.read() as connection:
            version = self._version(connection)
        if version == REVISION:
            return
        from presort.store import migrations

        with self.write() as connection:
            self.lock_for(connection, _SCHEMA_LOCK)
            version = self._version(connection)
            if version is not None and not migrations.knows(version):
                raise _too_new(self.location, version)
            if version != REVISION:
                migrations.upgrade(connection)


def _parse(url: str) -> URL:
    """Read a URL, or a path; `StoreError` if it is neither SQLite's nor PostgreSQL's."""
    if "://" not in url:
        return URL.create("sqlite", database=url)
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise StoreError(
            "the store's URL cannot be read; write sqlite:///path or postgresql://user@host/name"
        ) from None
    backend = parsed.get_backend_name()
    if backend in {"postgresql", "postgres"}:
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise StoreError(f"the store cannot be in {backend}; use sqlite or postgresql")
    if parsed.database in {None, "", ":memory:"} or str(parsed.database).startswith("file:"):
        raise StoreError("the store must survive the process: name a file, as in sqlite:///path")
    return parsed


def _for_people(url: URL) -> str:
    """Write a URL without its password, wherever that is, and without its options."""
    where = {name: value for name, value in url.query.items() if name in {"host", "port"}}
    return url.set(drivername="postgresql", query=where)._replace(password=None).render_as_string()


def _connect_sqlite(path: Path) -> sqlite3.Connection:
    """Connect to a file that is there: one that vanished must not come back empty, and readable by all."""
    return sqlite3.connect(
        f"{path.as_uri()}?mode=rw",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,  # the driver begins nothing on its own; `_begin_sqlite` does
        check_same_thread=False,
    )


def _sqlite_engine(path: Path) -> Engine:
    engine = create_engine(
        "sqlite+pysqlite://", creator=lambda: _connect_sqlite(path), poolclass=QueuePool, hide_parameters=True
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(raw: sqlite3.Connection, _record: object) -> None:
    raw.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table; `prune` gives the pages back
    if raw.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        _when_free(lambda: raw.execute("PRAGMA journal_mode = WAL"))
    raw.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
    raw.execute("PRAGMA fullfsync = ON")  # on macOS too
    raw.execute("PRAGMA secure_delete = ON")  # prompts go: what is deleted is overwritten
    raw.execute("PRAGMA wal_autocheckpoint = 4000")
    raw.execute("PRAGMA journal_size_limit = 67108864")
    raw.execute("PRAGMA cache_size = -16384")
    raw.execute("PRAGMA temp_store = MEMORY")
    raw.create_aggregate("exact_sum", 1, _ExactSum)  # type: ignore[arg-type] # the sum is text


def _when_free(step: Callable[[], object]) -> None:
    """Repeat what SQLite refuses at once, without its usual wait, while another process does the same."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            step()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("presort_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


class _ExactSum:
    """SQLite aggregate: the exact sum of decimal texts."""

    def __init__(self) -> None:
        self._sum: Decimal | None = None

    def step(self, value: str | None) -> None:
        if value is not None:
            self._sum = _EXACT.add(self._sum or Decimal(0), Decimal(value))

    def finalize(self) -> str | None:
        return None if self._sum is None else str(self._sum)


def _check_sqlite_file(path: Path) -> None:
    """Refuse a file that is another program's or a newer presort's, before anything about it is changed."""
    raw = _connect_sqlite(path)
    try:
        tables = {name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return
        if VERSION_TABLE not in tables:
            raise StoreError(f"the store {path} is another program's database; choose another path")
        row = raw.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()  # noqa: S608
    finally:
        raw.close()
    version = row[0] if row else ""
    if version != REVISION:
        from presort.store import migrations

        if not migrations.knows(version):
            raise _too_new(str(path), version)


def _postgres_engine(url: URL) -> Engine:
    try:
        return create_engine(
            url, isolation_level="READ COMMITTED", pool_pre_ping=True, pool_size=10, hide_parameters=True
        )
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            'a PostgreSQL store needs psycopg: pip install "presort[postgres]"', name="psycopg"
        ) from error


def _too_new(location: str, version: str) -> StoreVersionError:
    return StoreVersionError(
        f"the store {location} was written by a newer presort (its schema is {version or 'unknown'}, "
        f"this presort knows up to {REVISION}); upgrade presort"
    )


@contextmanager
def _translated(location: str) -> Iterator[None]:
    """Turn the database's errors into `StoreError`: one line with the store and the way out; cause kept."""
    try:
        yield
    except DBAPIError as error:
        raise StoreError(f"the store {location}: {_trouble(error.orig)}") from error
    except sqlite3.Error as error:
        raise StoreError(f"the store {location}: {_trouble(error)}") from error
    except PoolTimeoutError as error:
        raise StoreError(f"the store {location}: too many threads use it at once; use fewer") from error
    except SQLAlchemyError as error:
        raise StoreError(f"the store {location} failed ({type(error).__name__})") from error


def _trouble(error: BaseException | None) -> str:
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _SQLITE_TROUBLE:
            return _SQLITE_TROUBLE[code]
        return f"SQLite failed ({error})"
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    if getattr(error, "sqlstate", None) is None:
        return f"the database does not answer ({first}); check that it runs and that the URL is right"
    return f"the database refused ({first})"
