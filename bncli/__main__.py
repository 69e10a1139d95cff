"""Where the process begins: Ctrl-C and SIGTERM while bn itself is being loaded leave no traceback."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run bn; see `bncli.cli.main`."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(143))
    try:
        from bncli.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
