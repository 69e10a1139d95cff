"""Where the process begins and ends: signals are seen to before bn itself is loaded, and no thread is waited for."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from bncli.system import shutdown


def main() -> NoReturn:
    """Run bn; see `bncli.cli.main`."""
    shutdown.watch()
    # bn leaves BLAS alone; the threads that NumPy's would start cost a tenth of a short run, and spin at the begin of a long one
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from bncli.cli import main as run

    try:
        run()
    except SystemExit as done:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()
        shutdown.hold_back()
        os._exit(done.code if isinstance(done.code, int) else 1)  # stdout is flushed; all files are closed or given up


if __name__ == "__main__":
    main()
