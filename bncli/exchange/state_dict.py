"""The keys of nn.BatchNorm in a state_dict, which .pt and .safetensors files share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.errors import InputError, printable
from bncli.exchange.common import ROUNDED, complement, notes, pick
from bncli.stats import Stats

KEYS = {"running_mean": "running_mean", "running_var": "running_var", "weight": "gamma", "bias": "beta"}
TRACKED = "num_batches_tracked"
LAYOUTS = {3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}
MODULES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


def arrays(stats: Stats) -> dict[str, npt.NDArray[Any]]:
    """What nn.BatchNorm keeps: float64 arrays of shape (C,), and the number of batches as a single int64."""
    found: dict[str, npt.NDArray[Any]] = {key: np.array(getattr(stats, name)) for key, name in KEYS.items()}
    return found | {TRACKED: np.array(stats.num_batches, np.int64)}


def settings(stats: Stats) -> dict[str, Any]:
    """Eps, and momentum on PyTorch's side: the weight of the NEW value (None: there is none)."""
    return {"eps": stats.eps, "momentum": None if stats.momentum is None else complement(stats.momentum)}


def advice(stats: Stats) -> list[str]:
    """What to do on PyTorch's side."""
    rank = len(stats.sample_shape) + 1 if stats.sample_shape else 2
    given = ", ".join(f"{name}={value!r}" for name, value in settings(stats).items() if value is not None)
    module = f"nn.{MODULES.get(rank, 'BatchNorm1d')}({stats.num_features}, {given})"
    flat = (
        "" if rank in MODULES else f" and give it data of shape (N, C, L): PyTorch has no layer for {rank} dimensions"
    )
    return [
        f"load into {module}{flat}: a state_dict holds neither eps nor momentum, and PyTorch's momentum is the weight of the NEW value",
        f"values are float64 and unrounded; a float32 layer rounds them as it loads them, {ROUNDED}",
        *notes(stats, "torch", LAYOUTS.get(rank, "(N, C, L)") if rank > 2 else ""),
    ]


def columns(
    shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], Any], layer: str | None, path: str
) -> tuple[dict[str, Any], int, str]:
    """Arrays of one layer of a checkpoint, how many batches it saw, and its name.

    Parameters
    ----------
    shapes : key -> shape
        Of every tensor in the file.
    get : function
        Reads the tensor of a key, as an array.
    layer : str or None
        The prefix of the layer's keys.
    """
    keys = [key for key in shapes if _is_layer(key, shapes)]
    layers = {key.removesuffix("running_mean").removesuffix("."): math.prod(shapes[key]) for key in keys}
    name = pick(layers, layer, path, "no running_mean and running_var")
    prefix = f"{name}." if name else ""
    mean, var = (shapes[prefix + key] for key in ("running_mean", "running_var"))
    if mean != var or len(mean) != 1:
        raise InputError(
            f"{printable(path)}: {printable(prefix)}running_mean has the shape {mean}, running_var {var}; they need one number per "
            "feature each"
        )
    found = {column: get(prefix + key) for key, column in KEYS.items() if prefix + key in shapes}
    return found, _tracked(prefix + TRACKED, shapes, get, path), name


def _is_layer(key: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    name, dot, last = key.rpartition(".")
    named = bool(name) == bool(dot)  # a key that starts with its only dot belongs to no layer
    return named and last == "running_mean" and f"{name}{dot}running_var" in shapes


def _tracked(key: str, shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], Any], path: str) -> int:
    """Batches folded; 0 where the file does not say (PyTorch before 0.4.1)."""
    if key not in shapes:
        return 0
    value = np.asarray(get(key))
    if value.size != 1 or value.dtype.kind not in "iu":
        raise InputError(f"{printable(path)}: {printable(key)} is no number of batches")
    return int(value.reshape(-1)[0])
