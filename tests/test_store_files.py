"""The store's file: where it may lie, who may read it, and what is said when it cannot be used."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest

import presort
from presort.errors import StoreError, StoreVersionError
from presort.store import Store, database, default_url, files
from presort.store.base import BatchKey, NewRequest

LINUX = """\
sysfs /sys sysfs rw,nosuid 0 0
/dev/vda / ext4 rw,relatime 0 0
tmpfs /run tmpfs rw 0 0
server:/export /home nfs4 rw,vers=4.2 0 0
/dev/vdb /home/me/local xfs rw 0 0
//nas/My\\040Share /mnt/My\\040Share cifs rw 0 0
user@host:/ /mnt/ssh fuse.sshfs rw 0 0
/dev/vdc /mnt/twice ext4 rw 0 0
server:/b /mnt/twice nfs rw 0 0
broken line
"""

MACOS = """\
/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled, nobrowse)
//me@nas._smb._tcp.local/My on Share on /Volumes/My on Share (smbfs, nodev, nosuid, mounted by me)
server:/export on /Volumes/nfs (nfs, nodev)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the path of a store that is not there yet."""
    return tmp_path / "state" / "presort.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """Give an open store on a file."""
    opened = Store.open(f"sqlite:///{path}")
    yield opened
    opened.close()


# -- where ---------------------------------------------------------------------------------------------------
def test_default_is_in_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a setting the store is `presort.db` in the user's state folder, whatever that is called."""
    folder = tmp_path / "a b%20c%s ü#"
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda name, appauthor: str(folder / name))

    store = Store.open(default_url())

    assert str(folder / "presort" / "presort.db") == store.location
    store.close()


@pytest.mark.parametrize(
    ("mounts", "path", "kind"),
    [
        (LINUX, "/var/lib/presort.db", "ext4"),
        (LINUX, "/home/me/presort.db", "nfs4"),
        (LINUX, "/home", "nfs4"),
        (LINUX, "/homework/presort.db", "ext4"),
        (LINUX, "/home/me/local/presort.db", "xfs"),
        (LINUX, "/mnt/My Share/presort.db", "cifs"),
        (LINUX, "/mnt/ssh/presort.db", "fuse.sshfs"),
        (LINUX, "/mnt/twice/presort.db", "nfs"),
        (MACOS, "/Users/me/presort.db", "apfs"),
        (MACOS, "/Volumes/My on Share/presort.db", "smbfs"),
        (MACOS, "/Volumes/nfs/presort.db", "nfs"),
        ("", "/presort.db", None),
    ],
)
def test_file_system(mounts: str, path: str, kind: str | None) -> None:
    """The innermost mount that holds the path tells the file system, the later one of two on one folder."""
    assert kind == files.file_system(mounts, path)


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        ("nfs", True),
        ("nfs4", True),
        ("cifs", True),
        ("smb3", True),
        ("smbfs", True),
        ("9p", True),
        ("ceph", True),
        ("fuse.ceph", True),
        ("lustre", True),
        ("fuse.sshfs", True),
        ("fuse.glusterfs", True),
        ("ext4", False),
        ("apfs", False),
        ("overlay", False),
        ("tmpfs", False),
        ("fuse.lxcfs", False),
        ("fuseblk", False),
    ],
)
def test_network_file_systems(kind: str, network: bool) -> None:
    """File systems that machines share are told from local ones."""
    assert network is files.is_network(kind)


def test_network_file_system_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system nothing is made, and the error names the file, the reason and the way out."""
    monkeypatch.setattr(files, "_file_system_of", lambda _: "nfs4")

    with pytest.raises(StoreError, match=r"presort\.db.*network file system \(nfs4\).*PostgreSQL"):
        Store.open(f"sqlite:///{path}")

    assert not path.parent.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege")
def test_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is where the file really lies, not the link that leads there."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    monkeypatch.setattr(files, "_mounts", lambda: f"/dev/vda / ext4 rw\nserver:/ {real.resolve()} nfs rw\n")

    with pytest.raises(StoreError, match="network file system"):
        Store.open(str(link / "presort.db"))


def test_path_is_a_url(path: Path) -> None:
    """A path without a scheme names an SQLite file."""
    store = Store.open(str(path))

    assert str(path) == store.location
    store.close()
    assert path.exists()


def test_odd_characters_in_a_path(tmp_path: Path) -> None:
    """A path may hold blanks, percent signs, question marks and letters of any script."""
    folder = tmp_path / "a b%20c%s ü#"
    Store.open(str(folder / "presort.db")).close()
    Store.open(str(folder / "presort.db")).close()

    assert [folder / "presort.db"] == list(folder.iterdir())


# -- who may read it -----------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX permissions")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_permissions(path: Path, umask: int) -> None:
    """Folder and files are the user's alone, whatever the umask."""
    program = (
        "import os, sys; os.umask(int(sys.argv[2]));"
        "from presort.store import Store; store = Store.open(sys.argv[1]); store.join('me', 'h', 1, 0, 9);"
        "print(*(f'{os.stat(name).st_mode & 0o777:o}' for name in"
        " (os.path.dirname(sys.argv[1]), *(sys.argv[1] + end for end in ('', '-wal', '-shm')))))"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(umask)],
        env={**os.environ, "PYTHONPATH": str(Path(presort.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )

    assert "700 600 600 600" == done.stdout.strip(), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX permissions")
def test_file_is_never_readable_by_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has its permissions before SQLite opens it for the first time."""
    seen: list[int] = []
    connect = sqlite3.connect

    def look(*arguments: object, **options: object) -> sqlite3.Connection:
        seen.append(stat.S_IMODE(path.stat().st_mode))
        return connect(*arguments, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(sqlite3, "connect", look)
    old = os.umask(0)
    try:
        files.prepare(path)
        database._check_sqlite_file(path)
    finally:
        os.umask(old)

    assert [0o600] == seen
    assert 0o700 == stat.S_IMODE(path.parent.stat().st_mode)


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX permissions")
def test_permissions_that_are_there_stay(tmp_path: Path) -> None:
    """A folder and a file that were there before keep the permissions their user gave them."""
    path = tmp_path / "presort.db"
    path.touch()
    path.chmod(0o640)
    tmp_path.chmod(0o755)

    Store.open(str(path)).close()

    assert (0o640, 0o755) == (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(tmp_path.stat().st_mode))


# -- how it is set up ----------------------------------------------------------------------------------------
def test_every_connection_is_durable(store: Store) -> None:
    """Each connection writes ahead, waits for the disk at each commit, and waits for other processes."""
    with store._db.read() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout", "auto_vacuum", "secure_delete")
        }

    full, incremental, on = 2, 2, 1
    assert {
        "journal_mode": "wal",
        "synchronous": full,
        "busy_timeout": 30_000,
        "auto_vacuum": incremental,
        "secure_delete": on,
    } == found


def test_pruning_gives_space_back(store: Store, path: Path) -> None:
    """After pruning, the file is smaller."""
    key = BatchKey("p", "u", "a", "/e", "m")
    items = [NewRequest(f"{n:032x}", key, f"{n}", os.urandom(10_000), 1) for n in range(300)]
    store.admit("dead", None, items, 1)
    before = pages(path)

    assert 300 == store.prune(100, 1, 1)

    assert pages(path) < before / 10


def pages(path: Path) -> int:
    """Count the pages of an SQLite file."""
    raw = sqlite3.connect(path)
    count = int(raw.execute("PRAGMA page_count").fetchone()[0])
    raw.close()
    return count


def test_prompts_are_gone_from_the_file(store: Store, path: Path) -> None:
    """Once withdrawn and checkpointed, a prompt is not in the file's bytes any more."""
    key = BatchKey("p", "u", "a", "/e", "m")
    body = b"a secret prompt " * 10
    store.admit("me", None, [NewRequest(f"{n:032x}", key, f"{n}", body, 1) for n in range(50)], 1)
    store.withdraw([f"{n:032x}" for n in range(50)])
    store.close()

    assert b"secret prompt" not in path.read_bytes()
    assert [path] == list(path.parent.iterdir())


# -- what cannot be used -------------------------------------------------------------------------------------
def refused(url: str) -> str:
    """Open a store that must be refused, and return the error's one line."""
    with pytest.raises(StoreError) as caught:
        Store.open(url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_memory_is_no_store(url: str) -> None:
    """A database that ends with the process is refused."""
    assert "must survive the process" in refused(url)


def test_other_databases_are_no_store() -> None:
    """A database that is neither SQLite nor PostgreSQL is refused by name, and nonsense without repeating it."""
    assert "cannot be in mysql" in refused("mysql://me:secret@host/db")
    assert "secret" not in refused("postgresql://me:secret@host:port/db")


def test_file_that_is_no_database(tmp_path: Path) -> None:
    """A file of another kind is refused and left as it is."""
    path = tmp_path / "notes.txt"
    path.write_text("dear diary, " * 1_000)

    message = refused(str(path))

    assert f"the store {path}: the file is not an SQLite database; choose another path" == message
    assert "dear diary, " * 1_000 == path.read_text()
    assert [path] == list(tmp_path.iterdir())


def test_another_programs_database(tmp_path: Path) -> None:
    """Another program's SQLite file is refused and left as it is, byte for byte."""
    path = tmp_path / "other.db"
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE alembic_version (version_num TEXT)")
    raw.close()
    before = path.read_bytes()

    assert "another program's database" in refused(str(path))

    assert before == path.read_bytes()
    assert [path] == list(tmp_path.iterdir())


def test_newer_store_is_left_alone(path: Path) -> None:
    """A newer presort's file is refused and left as it is, byte for byte."""
    Store.open(str(path)).close()
    raw = sqlite3.connect(path)
    raw.execute("UPDATE presort_version SET version_num = '9999'")
    raw.commit()
    raw.close()
    before = path.read_bytes()

    with pytest.raises(StoreVersionError, match="upgrade presort"):
        Store.open(str(path))

    assert before == path.read_bytes()


def test_damaged_file(path: Path) -> None:
    """A file whose pages were overwritten is reported as damaged, with its name."""
    store = Store.open(str(path))
    key = BatchKey("p", "u", "a", "/e", "m")
    items = [NewRequest(f"{n:032x}", key, f"{n}", b"x" * 500, 1) for n in range(500)]
    store.admit("me", None, items, 1)
    store.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))

    with pytest.raises(StoreError, match="is damaged; move it away"):
        Store.open(str(path)).queued(["1"])


def test_file_that_vanished(store: Store, path: Path) -> None:
    """A file that was deleted is missed, and does not come back empty."""
    store._db._engine.dispose()
    path.unlink()

    with pytest.raises(StoreError, match=r"cannot be opened; check the path"):
        store.owners(1)

    assert not path.exists()


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    """A path that is a folder, or leads through a file, is refused."""
    (tmp_path / "file").touch()

    assert "is a folder" in refused(str(tmp_path))
    assert "cannot be created" in refused(str(tmp_path / "file" / "presort.db"))


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX permissions")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_place_that_cannot_be_written(tmp_path: Path, path: Path) -> None:
    """A folder or file without permission to write is reported with its name and the way out."""
    Store.open(str(path)).close()
    path.chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        assert "choose another path" in refused(str(tmp_path / "other" / "presort.db"))
        with pytest.raises(StoreError, match="cannot be written"):
            Store.open(str(path)).leave("me")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="mounting needs root")
def test_full_disk(tmp_path: Path) -> None:
    """On a full disk what does not fit is refused as a whole, and what was stored is still there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store = Store.open(str(disk / "presort.db"))
        key = BatchKey("p", "u", "a", "/e", "m")
        store.admit("me", None, [NewRequest("0" * 32, key, "0", b"x", 1)], 1)
        items = [NewRequest(f"{n:032x}", key, f"{n}", os.urandom(10_000), 1) for n in range(1, 200)]

        with pytest.raises(StoreError, match="the disk is full; free some space"):
            store.admit("me", None, items, 1)

        assert ["0" * 32] == store.queued([f"{n:032x}" for n in range(200)])
        store.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_full_file(store: Store) -> None:
    """When the database cannot grow, what does not fit is refused as a whole and the store works on."""
    key = BatchKey("p", "u", "a", "/e", "m")
    with store._db._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 60")

    with pytest.raises(StoreError, match="the disk is full; free some space") as caught:
        store.admit("me", None, [NewRequest(f"{n:032x}", key, f"{n}", b"x" * 9_000, 1) for n in range(99)], 1)

    assert caught.value.__cause__ is not None
    assert [] == store.queued([f"{n:032x}" for n in range(99)])
    assert 1 == len(store.admit("me", None, [NewRequest("0" * 32, key, "0", b"x", 1)], 1))


def test_locked_for_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that another process does not give back is reported; before that, methods wait for it."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    store = Store.open(str(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreError, match="another process held its lock"):
        store.leave("me")
    assert [] == store.owners(1)
    other.execute("ROLLBACK")
    store.leave("me")

    other.close()
    store.close()


def test_database_that_does_not_answer() -> None:
    """A PostgreSQL server that is not there is reported without the password, wherever that was."""
    url = "postgresql://me:s3cret@127.0.0.1:1/db?connect_timeout=1&sslpassword=s3cret"

    with pytest.raises(StoreError, match=r"postgresql://me@127.0.0.1:1/db: the database does not answer") as caught:
        Store.open(url)

    assert "s3cret" not in "".join(traceback.format_exception(caught.value))
    assert "\n" not in str(caught.value)
