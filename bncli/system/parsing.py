"""One Python literal at a time: before 3.12 Python's parser counts its depth for all threads together.

Two threads that parse at once, as the headers of .npy files are, can then fail with "AST constructor recursion depth
mismatch" (CPython issue 106905).
"""

from __future__ import annotations

import threading

LOCK = threading.Lock()
