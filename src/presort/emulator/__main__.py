"""`python -m presort.emulator`: run the emulator without any other part of presort."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from presort.emulator.server import serve


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(
        prog="python -m presort.emulator",
        description="EMULATED Anthropic and OpenAI APIs on loopback: batches, prompt cache, prices, faults.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one (default: %(default)s)")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep everything here; in memory otherwise")
    parser.add_argument(
        "--batch-seconds",
        type=float,
        metavar="S",
        help="how long a batch takes (default: 2, or what was set before)",
    )
    parser.add_argument("--idle-exit-seconds", type=float, metavar="N", help="stop after N seconds without a request")
    options = parser.parse_args(arguments)
    return serve(
        options.host,
        options.port,
        state=options.state,
        batch_seconds=options.batch_seconds,
        idle_exit_seconds=options.idle_exit_seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
