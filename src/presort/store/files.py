"""Where the store's file lies, and where it must not.

SQLite needs working locks and shared memory among all who use one file. Network file systems promise them and
break them, and the file is damaged without a word; so they are refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import platformdirs
from sqlalchemy import URL

from presort.errors import StoreError

NETWORK_FILE_SYSTEMS = frozenset(
    "9p acfs afp afpfs afs beegfs ceph cifs coda davfs gfs2 glusterfs gpfs lustre ncpfs nfs nfs3 nfs4 ocfs2 "
    "orangefs prl_fs pvfs2 smb smb2 smb3 smbfs vboxsf webdav "
    "blobfuse blobfuse2 gcsfuse goofys juicefs mount-s3 mountpoint-s3 rclone s3fs seaweedfs sshfs".split()
)
"""File systems shared among machines, as `/proc/mounts` and macOS's `mount` name them, without `fuse.`."""


def default_url() -> str:
    """Return the SQLAlchemy URL of the store in the user's state folder."""
    path = Path(platformdirs.user_state_dir("presort", appauthor=False)) / "presort.db"
    return URL.create("sqlite", database=str(path)).render_as_string()


def file_system(mounts: str, path: str) -> str | None:
    """Return the type of the file system that holds a resolved POSIX path; `None` if it is not listed.

    `mounts` is the text of `/proc/mounts`, or what macOS's `mount` prints. Of two mounts on one folder the
    later one counts.
    """
    wanted = PurePosixPath(path)
    best: tuple[int, str] | None = None
    for line in mounts.splitlines():
        found = _mount_point(line)
        if found is None:
            continue
        folder, kind = PurePosixPath(found[0]), found[1]
        if wanted.is_relative_to(folder) and (best is None or len(folder.parts) >= best[0]):
            best = len(folder.parts), kind
    return best[1] if best else None


def is_network(kind: str) -> bool:
    """Whether a file system of this type is shared among machines."""
    return kind.lower().removeprefix("fuse.").removeprefix("macfuse.") in NETWORK_FILE_SYSTEMS


def prepare(path: Path) -> None:
    """Make sure that a store's file can be opened, and that only this user can read it from its first byte.

    The folder is created 0700 and the file 0600 if they are missing; what is there keeps its permissions.
    SQLite gives its `-wal` and `-shm` files those of the store's. An existing file is never opened here:
    closing it again would drop the locks that this process may hold on it.

    Raises `StoreError` for a network file system or a place that cannot be written.
    """
    kind = _file_system_of(path)
    if kind is not None and is_network(kind):
        msg = (
            f"the store {path} lies on a network file system ({kind}), where SQLite files get damaged; "
            "choose a local path, or a PostgreSQL URL to share it among machines"
        )
        raise StoreError(msg)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        if path.is_dir():
            msg = f"the store {path} is a folder; name a file in it"
            raise StoreError(msg) from None
        if not path.parent.is_dir():
            msg = f"the store {path} cannot be created: {path.parent} is not a folder"
            raise StoreError(msg) from None
    except OSError as error:
        hint = "free some space on that disk" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "choose another path"
        msg = f"the store {path} cannot be created ({error.strerror}); {hint}"
        raise StoreError(msg) from error


def _mount_point(line: str) -> tuple[str, str] | None:
    """Read (folder, type) from a line of `/proc/mounts` or of macOS's `mount`."""
    if mac := re.fullmatch(r".+? on (/.*) \(([^,()]+).*\)", line):
        return mac[1], mac[2].strip()
    fields = line.split()
    if len(fields) < 3:
        return None
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[1]), fields[2]


def _file_system_of(path: Path) -> str | None:
    """Return the type of the file system that holds a path, as far as this platform says."""
    resolved = str(path.resolve())
    kind: str | None = None
    if sys.platform == "win32":
        drive_is_remote = 4
        root = os.path.splitdrive(resolved)[0] + "\\"
        if ctypes.windll.kernel32.GetDriveTypeW(root) == drive_is_remote:  # drive letters and shares alike
            kind = "smb"
    else:
        kind = file_system(_mounts(), resolved)
    return kind


def _mounts() -> str:
    """Return the table of mounts; empty if this platform does not tell."""
    try:
        if sys.platform == "darwin":
            command = ["/sbin/mount"]
            table = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        else:
            table = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, subprocess.SubprocessError):
        return ""
    return table
