"""The commands: parse, wire, start. `presort --help` tells what there is."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the `presort` command."""
    try:
        from presort.commands import app  # only here can a missing extra be told in one line
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in {"typer", "rich", "click"}:
            sys.exit('presort: the commands need an extra: pip install "presort[cli]"')
        raise
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    app(prog_name="presort")


if __name__ == "__main__":
    main()
