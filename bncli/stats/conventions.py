"""Conventions of batch normalization: bn's defaults, those of the frameworks (presets), and what values are allowed.

Imports no NumPy: the command line shows the choices in its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from bncli.choices import INITS
from bncli.errors import UsageError

if TYPE_CHECKING:
    from bncli.numerics.arrays import Floats


@dataclass(frozen=True)
class Conventions:
    """Parameters of the arithmetic. Every field has bn's default.

    Attributes
    ----------
    momentum : float or None
        Weight of the old value when a batch is folded; None means that the running statistics are the population's.
    eps : float
        Added to the variance.
    ddof : int
        The variance that is folded is divided by n - ddof.
    init : str
        Where the recurrence starts, one of INITS.
    axis : int
        The feature axis.
    start : shape (2, C) or None
        Mean and variance that the recurrence starts from under init `like`.
    """

    momentum: float | None = 0.9
    eps: float = 1e-5
    ddof: int = 0
    init: str = "debias"
    axis: int = -1
    start: Floats | None = field(default=None, compare=False, repr=False)

    def plain(self) -> dict[str, Any]:
        """The five values by name, without `start`."""
        return {name: value for name, value in vars(self).items() if name != "start"}


def check_conventions(momentum: float | None, eps: float, ddof: int, init: str) -> None:
    """Raise UsageError for a momentum, eps, ddof or init that has no meaning."""
    if momentum is not None and not 0 <= momentum < 1:
        raise UsageError(
            f"momentum {momentum} is not in 0 <= m < 1; it is the weight of the old value (PyTorch's momentum is 1 - m)"
        )
    if not (math.isfinite(eps) and eps >= 0):
        raise UsageError(f"eps {eps} is not a finite number of 0 or more")
    if ddof not in (0, 1):
        raise UsageError(f"ddof {ddof} is neither 0 nor 1")
    if init not in INITS:
        raise UsageError(f"init {init!r} is not one of {', '.join(INITS)}")


def complement(momentum: float) -> float:
    """1 - m, the weight of the new value, computed in decimal.

    >>> complement(0.9), 1 - 0.9
    (0.1, 0.09999999999999998)
    """
    return float(1 - Decimal(repr(float(momentum))))


DEFAULTS = Conventions()
PRESETS = {
    "torch": Conventions(momentum=0.9, eps=1e-5, ddof=1, init="unit", axis=1),
    "keras": Conventions(momentum=0.99, eps=1e-3, ddof=0, init="unit", axis=-1),
    "flax": Conventions(momentum=0.99, eps=1e-5, ddof=0, init="unit", axis=-1),
    "onnx": Conventions(momentum=0.9, eps=1e-5, ddof=0, init="unit", axis=1),
    "cs231n": Conventions(momentum=0.9, eps=1e-5, ddof=0, init="zeros", axis=-1),
}
