"""Where the process begins and ends: signals are seen to before bn itself is loaded, and no thread is waited for."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from bncli import interrupts


def main() -> NoReturn:
    """Run bn; see `bncli.cli.main`."""
    interrupts.watch()
    from bncli.cli import main as run

    try:
        run()
    except SystemExit as done:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()
        interrupts.hold_back()
        os._exit(done.code if isinstance(done.code, int) else 1)  # stdout is flushed; all files are closed or given up


if __name__ == "__main__":
    main()
