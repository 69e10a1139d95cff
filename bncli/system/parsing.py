"""A lock for parsing Python literals: before Python 3.12 the recursion depth of the parser is shared by all threads.

Two threads that parse at the same time, such as headers of .npy files, can fail with "AST constructor recursion depth
mismatch" (CPython issue 106905).
"""

from __future__ import annotations

import threading

LOCK = threading.Lock()
