"""Fetch Django's documentation, real prose to index: ``fetch_django_docs.py FOLDER``.

The text comes out of Django's source package (BSD licence), keeps its folders,
and is never committed. A folder that is already there is left alone.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

REQUIREMENT = "django==5.2.*"
SMALLEST_BYTES = 1024  #: Shorter files are indexes and redirects, not documents.


def download(folder: Path) -> Path:
    """Return the source package, downloaded into `folder` from the index that pip is set up with."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    source_only = ["--no-deps", "--no-binary", "django"]
    done = subprocess.run(
        [*pip, *source_only, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False
    )
    packages = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not packages:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {done.returncode}"
        sys.exit(f"Could not download {REQUIREMENT}: {reason}")
    return packages[0]


def unpack(package: Path, folder: Path) -> int:
    """Write each document of `package` below `folder` and return how many there were.

    Only the bytes of regular files are taken, and none leaves `folder`: links,
    owners and modes in the archive are of no consequence.
    """
    count = 0
    with tarfile.open(package) as archive:
        for member in archive:
            _, *parts = PurePosixPath(member.name).parts or ("",)
            document = parts[:1] == ["docs"] and member.name.endswith(".txt") and ".." not in parts
            if not document or not member.isfile() or member.size <= SMALLEST_BYTES:
                continue
            if content := archive.extractfile(member):
                target = folder.joinpath(*parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
                count += 1
    return count


def main() -> None:
    """Fetch the documents unless they are there."""
    if len(sys.argv) != 2:
        sys.exit("usage: fetch_django_docs.py FOLDER")
    docs = Path(sys.argv[1])
    if docs.exists():
        print(f"{docs} is there already")
        return
    docs.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fetching Django's documentation into {docs} ...", flush=True)
    with tempfile.TemporaryDirectory(dir=docs.parent) as scratch:
        unpacked = Path(scratch, "docs")
        count = unpack(download(Path(scratch)), unpacked)
        if not count:
            sys.exit(f"{REQUIREMENT} holds no docs/**/*.txt larger than {SMALLEST_BYTES} bytes")
        unpacked.rename(docs)  # complete or not there at all
    print(f"{count} documents")


if __name__ == "__main__":
    main()
