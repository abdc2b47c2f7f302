"""Fail if a package that ``pip install "presort[all]"`` brings has a licence nobody here agreed to.

The packages are found in the environment that runs this, from what each says it
requires. A licence is what the package's own metadata says; where that is not
a name listed below, a person reads it and puts the package into `REVIEWED`.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "presort[all]"

#: SPDX names that put no condition on the code that uses the package.
ACCEPTED = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "PSF-2.0",
    "Python-2.0",
    "Unlicense",
    "Zlib",
}

#: What packages without an SPDX name say in a ``License ::`` classifier.
ACCEPTED_CLASSIFIERS = {
    "Apache Software License",
    "BSD License",
    "ISC License (ISCL)",
    "MIT License",
    "MIT No Attribution License (MIT-0)",
    "Mozilla Public License 2.0 (MPL 2.0)",
    "Python Software Foundation License",
    "The Unlicense (Unlicense)",
}

#: Package -> (licence as its metadata has it, why it may be used). Another licence in a later version fails.
REVIEWED = {
    "psycopg": ("LGPL-3.0-only", "optional, imported unchanged, and replaceable: all that the LGPL asks for"),
    "psycopg-binary": ("LGPL-3.0-only", "as psycopg; its libpq has the PostgreSQL licence"),
}


def requirements(root: str) -> dict[str, Distribution | None]:
    """Return the installed package for every name that `root` needs here, itself included."""
    found: dict[str, Distribution | None] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(root)]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            package = found[name] = distribution(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            needed = [Requirement(line) for line in package.requires or []]
            waiting += [item for item in needed if not item.marker or item.marker.evaluate({"extra": extra})]
    return found


def licences(package: Distribution) -> tuple[str, list[str]]:
    """Return what `package` says of its licence in free text or SPDX, and its licence classifiers."""
    metadata = package.metadata.json
    expression = str(metadata.get("license_expression", ""))
    text = str(metadata.get("license", "")).strip().partition("\n")[0]
    lines = [line for line in metadata.get("classifier", []) if line.startswith("License :: ")]
    return expression or text, [] if expression else [line.rpartition(" :: ")[2] for line in lines]


def objection(name: str, package: Distribution | None) -> str | None:
    """Return why `name` may not be used, or None."""
    if package is None:
        return "is not installed: run `make install`"
    text, classifiers = licences(package)
    said = ", ".join(filter(None, [text, *classifiers]))
    if name in REVIEWED and REVIEWED[name][0] == said:
        return None
    if re.search(r"\bA?GPL|(?<!Lesser )General Public License", said, re.IGNORECASE):
        return f"is under {said}"
    names = set(re.split(r"[\s()]+|\bAND\b|\bOR\b", text)) - {""}
    if set(classifiers) <= ACCEPTED_CLASSIFIERS if classifiers else names and names <= ACCEPTED:
        return None
    return f"has a licence that nobody reviewed: {said or 'its metadata names none'}"


def main() -> None:
    """Print one line for each package that may not be used, and fail if there is one."""
    packages = requirements(ROOT)
    objections = {name: reason for name in sorted(packages) if (reason := objection(name, packages[name]))}
    for name, reason in objections.items():
        print(f"{name} {reason}")
    print(f"{len(packages)} packages in {ROOT}, {len(objections)} with a licence problem")
    sys.exit(bool(objections))


if __name__ == "__main__":
    main()
