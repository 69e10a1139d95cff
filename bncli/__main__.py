"""Where the process begins and ends: signal handling starts before bn itself is loaded, and no thread is waited for."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from bncli.system import shutdown


def main() -> NoReturn:
    """Run bn; see `bncli.cli.main`."""
    shutdown.process.watch()
    # bn does not use BLAS; the threads that NumPy would start for it cost a tenth of a short run, and spin when a long one begins
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from bncli.cli import main as run

    try:
        run()
    except SystemExit as done:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()
        shutdown.process.block_if_stopping()
        if shutdown.process.orderly:
            raise
        os._exit(done.code if isinstance(done.code, int) else 1)  # stdout is flushed; all files are closed or given up


if __name__ == "__main__":
    main()
