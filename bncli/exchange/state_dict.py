"""The keys of nn.BatchNorm in a state_dict, which .pt and .safetensors files share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bncli.errors import BnNote, BnWarning, InputError, printable
from bncli.exchange import names, shards
from bncli.exchange.common import KINDS, ROUNDED, notes
from bncli.exchange.contract import Layer, Layers
from bncli.numerics.arrays import Array
from bncli.numerics.batchnorm import deviation
from bncli.stats.columns import COLUMNS
from bncli.stats.conventions import complement
from bncli.stats.record import Stats

KEYS = {"running_mean": "running_mean", "running_var": "running_var", "weight": "gamma", "bias": "beta"}
# per feature too, in files of statistics of data, and no gamma or beta
OTHER_NUMBERS = ("min", "max", "minimum", "maximum")
SAME = 1e-3  # relative: half precision
SHOWN = 6  # keys in a warning
LAYOUTS = {3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}
MODULES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


def arrays(stats: Stats) -> dict[str, Array]:
    """What nn.BatchNorm keeps: float64 arrays of shape (C,), and the number of batches as a single int64."""
    found: dict[str, Array] = {key: np.array(getattr(stats, name)) for key, name in KEYS.items()}
    return found | {names.TRACKED: np.array(stats.num_batches, np.int64)}


def settings(stats: Stats) -> dict[str, Any]:
    """Eps, and momentum on PyTorch's side: the weight of the NEW value (None: there is none)."""
    return {"eps": stats.eps, "momentum": None if stats.momentum is None else complement(stats.momentum)}


def load_notes(stats: Stats) -> list[str]:
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


class Found(NamedTuple):
    """One layer of a file.

    Attributes
    ----------
    columns : name -> array
        running_mean and running_var; gamma and beta where the file has them.
    tracked : int or None
        Number of batches that the layer counted; None where it has no count (PyTorch before 0.4.1, other frameworks).
    keys : name -> key
        Everything that the file holds under the layer's name, by the last part of its key.
    """

    columns: dict[str, Any]
    tracked: int | None
    keys: dict[str, str]


def layers(
    shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], Any], path: str, layer: Callable[[Found], Layer]
) -> Layers:
    """The layers among named arrays, under any of the names in `names`.

    Parameters
    ----------
    shapes : key -> shape
        Of every tensor in the file.
    get : function
        Reads the tensor of a key, as an array.
    layer : function
        Adds what else the file holds.
    """
    groups = names.groups(shapes)
    pairs = {prefix: pair for prefix, group in groups.items() if (pair := names.pair(group))}
    halves = _halves(groups, path)
    first = {prefix: groups[prefix][mean] for prefix, (mean, _) in pairs.items()} | {
        p: k for p, (k, _) in halves.items()
    }
    prefixes = {prefix[:-1]: prefix for prefix in first}
    what = "no running_mean and running_var" + ("" if first else shards.next_to(path).hint)
    proper = [prefix for prefix, pair in pairs.items() if pair[0] not in names.PLAIN or names.affine(prefix, groups)]
    # many models also store the mean and std of the data
    likely = proper[0][:-1] if len(proper) == 1 and not halves else None

    def read(name: str) -> Layer:
        prefix = prefixes[name]
        if prefix in halves:
            raise shards.refusal(path, name, halves[prefix][1])
        return layer(_found(prefix, groups, pairs[prefix], shapes, get, path))

    sizes = {prefix[:-1]: math.prod(shapes[key]) for prefix, key in first.items()}
    return Layers(sizes, read, what=what, likely=likely)


def _found(
    prefix: str,
    groups: Mapping[str, dict[str, str]],
    pair: tuple[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    get: Callable[[str], Any],
    path: str,
) -> Found:
    """The numbers of the layer under a prefix."""
    group, (mean, spread) = groups[prefix], pair
    shape = _flat(shapes[group[mean]])
    if shapes[group[mean]] != shapes[group[spread]] or len(shape) != 1:
        raise InputError(
            f"{printable(path)}: {printable(group[mean])} has the shape {shapes[group[mean]]}, {printable(spread)} "
            f"{shapes[group[spread]]}; they need one number per feature each"
        )
    keys = _affine(prefix, groups, {key: _flat(shapes[key]) for key in shapes}, shape, path)
    found = {column: _column(get, key, shapes) for column, key in keys.items()}
    variance = _variance(_column(get, group[spread], shapes), group[spread], path)
    if keys.get("gamma") == group.get("scale", "") and "beta" not in keys and _is_root(found["gamma"], variance):
        del found["gamma"]
    columns = {names.MEAN: _column(get, group[mean], shapes), names.VAR: variance} | found
    return Found(columns, _tracked(group.get(names.TRACKED), shapes, get, path), group)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (C,) for one number per feature among axes of length 1, as (1, C) or (1, C, 1, 1); any other as it is."""
    length = math.prod(shape)
    return (length,) if shape and max(shape) == length else shape


def _column(get: Callable[[str], Any], key: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The array of a key, without axes of length 1 other than the features."""
    array, shape = get(key), shapes[key]
    return array if len(shape) < 2 else np.reshape(array, _flat(shape))


def _halves(groups: Mapping[str, Mapping[str, str]], path: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Layers of which one statistic is here and the other in another file: prefix -> the key here, and those elsewhere."""
    found = {}
    for prefix, group in groups.items():
        open_pairs = [p for p in names.PAIRS if p[0] not in names.PLAIN and (p[0] in group) != (p[1] in group)]
        if open_pairs and not names.pair(group):
            here = next(name for name in open_pairs[0] if name in group)
            others = dict.fromkeys(prefix + name for pair in open_pairs for name in pair if name not in group)
            found[prefix] = (group[here], list(others))
    others_of = shards.next_to(path) if found else None
    known = {prefix: (key, others_of.missing(others)) for prefix, (key, others) in found.items() if others_of}
    return {prefix: half for prefix, half in known.items() if half[1]}


def _affine(
    prefix: str,
    groups: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    length: tuple[int, ...],
    path: str,
) -> dict[str, str]:
    """Keys of gamma and beta; raises InputError where they are in another file or go by two names, warns where by an unknown."""
    group, found = groups[prefix], names.affine(prefix, groups)
    for pair in names.RIVALS:
        if set(pair) <= set(group) and shapes[group[pair[0]]] == shapes[group[pair[1]]]:  # a quantizer's scale is one
            one, other = (printable(group[name]) for name in pair)
            raise InputError(f"{printable(path)}: holds both {one} and {other}; take out the one that does not count")
    absent = [column for column in names.AFFINE if column not in found]
    places = dict.fromkeys((prefix, names.parameters(prefix)))
    wanted = [place + name for column in absent for place in places for name in names.AFFINE[column]]
    if absent and (missing := shards.next_to(path).missing(wanted)):
        raise shards.refusal(path, prefix[:-1], missing)
    others = [
        printable(key)
        for name, key in group.items()
        if name not in {*names.KNOWN, *OTHER_NUMBERS, *COLUMNS, *KINDS} and shapes[key] == length
    ]
    if absent and others:
        warnings.warn(
            f"{printable(path)}: no name that bn knows for {' and '.join(absent)}, taken as "
            f"{' and '.join(str(COLUMNS[column].absent) for column in absent)}; not used: {', '.join(others[:SHOWN])}",
            BnWarning,
            stacklevel=4,
        )
    return found


def _variance(values: Any, key: str, path: str) -> Any:
    """The variance: a deviation is squared, one below 0 staying below 0, so that it is found."""
    if not names.is_deviation(key.removesuffix(":0")):
        return values
    given = np.asarray(values)
    if given.dtype.kind not in "fiu":
        return values
    warnings.warn(
        f"{printable(path)}: {printable(key)} is a standard deviation, and is squared to the variance",
        BnNote,
        stacklevel=4,
    )
    wide = given.astype(np.float64)
    with np.errstate(over="ignore"):
        return wide * np.abs(wide)


def _is_root(scale: Any, variance: Any) -> bool:
    """Whether what is called a scale is the deviation, as in scikit-learn's StandardScaler: no gamma, then."""
    scale, variance = np.asarray(scale), np.asarray(variance)
    if scale.shape != variance.shape or {scale.dtype.kind, variance.dtype.kind} - set("fiu"):
        return False
    with np.errstate(invalid="ignore"):
        return np.allclose(scale, deviation(variance.astype(np.float64), 0.0), rtol=SAME, atol=0, equal_nan=True)


def _tracked(
    key: str | None, shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], Any], path: str
) -> int | None:
    """Batches folded; None where the file does not say."""
    if key is None:
        return None
    value = np.asarray(get(key))
    if value.size != 1 or value.dtype.kind not in "iu":
        raise InputError(f"{printable(path)}: {printable(key)} is not a number of batches")
    return int(value.reshape(-1)[0])
