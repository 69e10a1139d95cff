"""The fields that .npz and .csv files keep under their own names: an array or column for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.errors import InputError, printable
from bncli.stats.record import Stats

# what is read back; scale and shift, which follow from them, are for whoever reads the file
COLUMNS = ("running_mean", "running_var", "count", "population_mean", "population_var", "gamma", "beta")
NAMES = "name"


def columns(stats: Stats) -> dict[str, npt.NDArray[Any]]:
    """One array of shape (C,) per field; names only where there are some. Raises as `Stats.scale_shift` does."""
    scale, shift = stats.scale_shift()
    found: dict[str, npt.NDArray[Any]] = {} if stats.names is None else {NAMES: np.array(stats.names, object)}
    found |= {name: stats.population_count if name == "count" else getattr(stats, name) for name in COLUMNS}
    return found | {"scale": scale, "shift": shift}


def advice(use: str) -> list[str]:
    """What the fields do not say themselves."""
    return [] if use == "running" else ["running_mean and running_var hold the population statistics, as asked for"]


def check_there(found: Any, path: str) -> None:
    """Raise InputError when a field that cannot be done without is missing."""
    for name in ("running_mean", "running_var"):
        if name not in found:
            raise InputError(f"{printable(path)}: holds no {name}; it takes running_mean and running_var to import")
