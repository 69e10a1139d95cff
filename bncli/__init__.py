"""bn: batch-normalization statistics of arrays larger than memory.

>>> import bncli, numpy as np
>>> stats = bncli.fit(np.array([[1.0], [3.0], [5.0], [7.0]]))
>>> stats.running_mean.tolist(), stats.running_var.tolist()
([4.0], [5.0])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bncli.version import __version__

if TYPE_CHECKING:
    from bncli.engine.apply import apply as apply
    from bncli.engine.fit import fit as fit
    from bncli.engine.merge import merge as merge
    from bncli.numerics import batchnorm as batchnorm
    from bncli.stats.record import Stats as Stats
    from bncli.stats.record import load as load

__all__ = ["Stats", "__version__", "apply", "batchnorm", "fit", "load", "merge"]

_HOMES = {
    "apply": "bncli.engine.apply",
    "fit": "bncli.engine.fit",
    "merge": "bncli.engine.merge",
    "load": "bncli.stats.record",
    "Stats": "bncli.stats.record",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import bncli` costs nothing."""
    if name == "batchnorm":
        return importlib.import_module("bncli.numerics.batchnorm")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bncli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
