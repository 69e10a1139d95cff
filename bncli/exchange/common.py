"""Shared by the formats: notes about an export, the choice of a model's layer, and Stats from what a file holds."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.errors import BnWarning, InputError, MismatchError, UsageError, printable
from bncli.exchange.contract import Layer, Momentum
from bncli.exchange.names import KNOWN
from bncli.numerics.arrays import Bools, Floats
from bncli.numerics.moments import Moments
from bncli.stats import container
from bncli.stats.columns import assumed as columns_assumed
from bncli.stats.conventions import DEFAULTS, PRESETS, check_conventions
from bncli.stats.provenance import provenance
from bncli.stats.record import Stats
from bncli.stats.warnings import momentum_advice

FLOAT32 = np.finfo(np.float32)
ROUNDED = "by at most 6e-8 of each (of what is between 1.2e-38 and 3.4e38)"  # 2^-24
LEARNED_OR_RUNNING = ("running_mean", "running_var", "gamma", "beta")
NAMED = 10  # channels in a message
LISTED = 100  # layers named in a message
COUNTS = ("batch_size", "num_samples", "num_batches")
KINDS: dict[str, type] = {"momentum": float, "eps": float, "ddof": int, "init": str, "axis": int}
KINDS |= dict.fromkeys(COUNTS, int)


def package(name: str, extra: str) -> ModuleType:
    """Import an optional package, or say how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"this format needs {name} ({printable(error)}); install it: pip install 'bncli[{extra}]'"
        ) from None


def chosen(stats: Stats, use: str) -> Stats:
    """The statistics with those to be used, running or population (whose ddof is 0), as the running ones."""
    stats.check_whole()
    mean, var = stats.statistics(use)
    return stats if use == "running" else replace(stats, running_mean=mean, running_var=var, running=None, ddof=0)


def notes(stats: Stats, preset: str, layout: str) -> list[str]:
    """What matters on the other side: the variance's ddof, the layout, and values that come out differently there."""
    ddof = PRESETS[preset].ddof
    differs = "" if stats.ddof == ddof else f" (where it trains on, {preset} folds with ddof {ddof})"
    texts = [f"the running variance was folded with ddof {stats.ddof}{differs}"]
    if stats.momentum is None:
        texts.append("momentum is none here: choose one where training goes on")
    if layout and stats.axis != 1 and (stats.axis + len(stats.sample_shape) + 1 != 1 or not stats.sample_shape):
        texts.append(f"the features were on axis {stats.axis}, the other side expects them on axis 1: {layout}")
    return texts + _exceptions(stats)


def _exceptions(stats: Stats) -> list[str]:
    """Features that a framework treats unlike bn."""
    conditions = {
        "no statistics: NaN in the file, and NaN comes out": np.isnan(stats.running_mean),
        "variance 0 and eps 0: bn scales by 1, the other side divides by 0": np.maximum(stats.running_var, stats.eps)
        == 0,
        "numbers, scale or shift beyond float32: a float32 layer gives infinity or NaN": beyond_float32(stats),
        "variance + eps below 1.2e-38: a float32 layer divides by 0, or by a number of few digits": below_float32(
            stats
        ),
        "scale, shift or variance + eps beyond float64: a float64 layer may give infinity, NaN or beta alone, unlike bn": (
            _beyond_float64(stats)
        ),
    }
    return [f"{_count(where)} {text}" for text, where in conditions.items() if where.any()]


def _count(where: Bools) -> str:
    found = np.flatnonzero(where)
    return f"feature {found[0]} has" if len(found) == 1 else f"{len(found):,} features (the first: {found[0]}) have"


def beyond_float32(stats: Stats) -> Bools:
    """Features, shape (C,), of which a number that inference needs is too large for float32."""
    arrays = np.stack([stats.running_mean, stats.running_var, stats.gamma, stats.beta, *stats.line()])  # (6, C)
    return np.asarray((np.abs(arrays) > FLOAT32.max).any(axis=0))


def _beyond_float64(stats: Stats) -> Bools:
    """Features, shape (C,), of which a number between those of the file and the result does not fit a float64."""
    scale, shift = stats.line()
    with np.errstate(over="ignore"):
        large = np.isinf([scale, shift, stats.running_var + stats.eps]).any(axis=0)
    return np.asarray(large | (scale == 0) & (stats.gamma != 0))


def below_float32(stats: Stats) -> Bools:
    """Features, shape (C,), whose variance + eps is not 0 and too small for float32 to hold it in full precision."""
    with np.errstate(over="ignore"):
        total = stats.running_var + stats.eps
    return np.asarray((total > 0) & (total < FLOAT32.tiny))


def conventions(stats: Stats, names: Iterable[str] = KINDS) -> dict[str, Any]:
    """One value per convention, of the type that it is read as; momentum is None where there is none."""
    values = {name: getattr(stats, name) for name in names}
    return {name: None if value is None else KINDS[name](value) for name, value in values.items()}


def checksum(columns: Mapping[str, Any], held: Mapping[str, Any], names: Sequence[Any] | None = None) -> str:
    """SHA-256 of every number, convention and name of a file, as `to_stats` takes them: `store.digest`, in hexadecimal.

    It is of the values, not of the bytes, and so holds where another tool writes the same values in its own way.
    """
    arrays = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    plain = {name: np.where(np.isnan(a), np.nan, a) for name, a in arrays.items()}  # every NaN has the same bits
    return container.digest(plain, {"held": json.dumps([held, names], sort_keys=True)})


def damaged(path: str) -> InputError:
    """The error for a file whose values are not those of its checksum."""
    return InputError(
        f"{printable(path)}: damaged: its values do not match its checksum; copy or export it again, or take the checksum "
        "out if you changed them yourself"
    )


def pick(
    layers: Mapping[str, int],
    layer: str | None,
    path: str,
    what: str,
    also: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> str:
    """The name of the chosen layer: the one asked for, by its whole name or its last parts, else the only one.

    A name may be followed by a dot or by one of the layer's keys ("bn1.weight"), as state_dict has it.

    Parameters
    ----------
    layers : name -> number of features
    layer : str or None
        As given with --layer.
    what : str
        What makes a layer, for the message when there is none.
    also : name -> other names
        By which a layer can be asked for too.

    Raises
    ------
    InputError
        When the file holds no layer at all.
    UsageError
        When the layer asked for is not there, or several match, which are listed.
    """
    where = printable(path)
    if not layers:
        raise InputError(f"{where}: holds no batch-normalization layer ({what}); give another file")
    chosen = list(layers) if layer is None else _matching(layers, layer, also)
    if len(chosen) == 1:
        return chosen[0]
    message = f"holds {len(layers)} layers"
    if layer is not None:
        message = f"{len(chosen)} layers match {printable(layer)!r}" if chosen else f"has no layer {printable(layer)!r}"
    layers = {name: layers[name] for name in chosen or layers}
    listed = [f"  --layer {printable(name) or repr(name)}: {c:,} features" for name, c in layers.items()]
    more = [f"  and {len(listed) - LISTED:,} more"] if len(listed) > LISTED else []
    raise UsageError("\n".join([f"{where}: {message}; choose one with --layer:", *listed[:LISTED], *more]))


def _matching(layers: Iterable[str], layer: str, also: Mapping[str, Collection[str]]) -> list[str]:
    """Layers of exactly this name, else of exactly this other name, else those whose name ends in it."""
    names = {name: (name, *also.get(name, ())) for name in layers}
    for asked in (layer, *_shortened(layer)):
        ends = (f".{asked}", f"/{asked}")
        exact = [name for name in names if name == asked]
        other = [name for name, by in names.items() if asked in by]
        if found := exact or other or [name for name, by in names.items() if any(n.endswith(ends) for n in by)]:
            return found
    return []


def _shortened(layer: str) -> list[str]:
    """A layer's name without a dot or a key at its end."""
    name, _, last = layer.rpartition(".")
    return [name] if last in KNOWN or not last else []


def to_stats(
    path: str, format: str, found: Layer, *, layer: str | None, eps: float | None, momentum: Momentum
) -> Stats:
    """Stats from what a file holds; conventions from the options, then the file, then the preset.

    Parameters
    ----------
    found : Layer
    layer : str or None
        The name under which the layer is recorded.
    eps, momentum
        Options; None is not given, a momentum of "none" is that there is none.

    Warns
    -----
    BnWarning
        When features have no statistics, or all have those of a layer that was never trained.

    Raises
    ------
    UsageError
        When an option has no meaning.
    InputError
        When the values in the file have none, or do not match its checksum.
    """
    columns, held, names = found.columns, found.held, found.names
    weight = None if momentum == "none" else momentum
    check_conventions(weight, DEFAULTS.eps if eps is None else eps, 0, "debias")
    given = (("eps", eps, eps), ("momentum", momentum, weight))
    options = {name: value for name, stated, value in given if stated is not None}
    if advice := momentum_advice(weight, format):
        warnings.warn(advice, BnWarning, stacklevel=4)
    known = {**held, **options}
    preset = PRESETS.get({"safetensors": "torch"}.get(format, format), DEFAULTS).plain()
    assumed = {name: value for name, value in preset.items() if name not in known}
    assumed |= columns_assumed(tuple(columns))
    where = f"{printable(path)}: {printable(layer)}" if layer else printable(path)
    record = provenance(list(found.sources) or [{"name": path, "dataset": layer, "format": format}])
    try:
        arrays = {name: vector(values, name) for name, values in columns.items()}
        if found.checksum is not None and found.checksum != checksum(arrays, held, names):
            raise damaged(path)
        _check_lengths(arrays)
        _check_values(arrays, names, where)
        count = len(arrays["running_mean"])
        gamma, beta = (arrays.get(name, np.full(count, float(assumed.get(name, 0)))) for name in ("gamma", "beta"))
        stats = Stats(
            arrays["running_mean"],
            arrays["running_var"],
            gamma,
            beta,
            _population(arrays, count),
            names=None if names is None else tuple(_name(name) for name in names),
            provenance=record | {"imported": {"format": format, "file": path, "layer": layer, "assumed": assumed}},
            **preset | {name: _convention(name, value) for name, value in known.items()},
        )
    except (MismatchError, UsageError, TypeError, ValueError) as error:
        raise InputError(f"{printable(path)}: {printable(error)}; it holds no statistics that bn can use") from None
    _warn(stats, found.tracked, where)
    return stats


def _check_lengths(arrays: Mapping[str, Floats]) -> None:
    """Raise MismatchError when the columns differ in length."""
    if len({len(a) for a in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} {len(a)}" for name, a in arrays.items())
        raise MismatchError(f"the numbers of values differ: {lengths}")


def _check_values(arrays: Mapping[str, Floats], names: Sequence[Any] | None, where: str) -> None:
    """Raise InputError for numbers that no layer can have, by channel; a channel without any statistics is one that is missing."""
    missing = np.isnan(arrays["running_mean"]) & np.isnan(arrays["running_var"])
    faults = []
    for column in [name for name in LEARNED_OR_RUNNING if name in arrays]:
        values = arrays[column]
        nan = np.isnan(values) & (~missing if column.startswith("running") else True)
        negative = values < 0 if column.endswith("var") else np.zeros(len(values), bool)
        for what, found in (("NaN", nan), ("infinite", np.isinf(values)), ("negative", negative & np.isfinite(values))):
            if found.any():
                faults.append(f"{column} is {what} in {channels(found, names)}")
    if faults:
        raise InputError(
            f"{where}: {'; '.join(faults)}. Take a checkpoint from before that, or compute the statistics again with 'bn fit'"
        )


def _warn(stats: Stats, tracked: int | None, where: str) -> None:
    """Warn about statistics that are present but implausible."""
    missing = np.isnan(stats.running_mean)
    if missing.any():
        warnings.warn(
            f"{where}: running_mean and running_var are NaN in {channels(missing, stats.names)}; 'bn apply' gives NaN there. "
            "If the layer was trained on them, take a checkpoint from before",
            BnWarning,
            stacklevel=4,
        )
    seen = stats.population.count.any()
    if not seen and (stats.running_mean == 0).all() and (stats.running_var == 1).all():
        saw = "" if tracked is None else f", num_batches_tracked {tracked}"
        found = f"are as a new layer has them (mean 0 and variance 1 in every channel{saw}): they were never trained, or not saved"
    elif tracked == 0:
        found = "are of a layer that saw no batch (num_batches_tracked is 0): make sure that they were set on purpose"
    else:
        return
    warnings.warn(f"{where}: the running statistics {found}", BnWarning, stacklevel=4)


def channels(where: Bools, names: Sequence[Any] | None = None) -> str:
    """How many channels, and which.

    >>> channels(np.array([False, True, True]), ["a", "b", "c"])
    '2 of 3 channels: 1 (b), 2 (c)'
    """
    found = np.flatnonzero(where)
    named = [
        f"{i} ({printable(names[i])})" if names is not None and len(names) > i else str(i)
        for i in found[:NAMED].tolist()
    ]
    more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return f"{len(found):,} of {len(where):,} channel{'s' if len(where) > 1 else ''}: {', '.join(named)}{more}"


def vector(values: Any, name: str) -> Floats:
    """One number per feature as float64, of shape (C,); raises MismatchError when they are no such numbers."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" or array.ndim != 1 or not len(array):
        raise MismatchError(f"{name} is of type {array.dtype} and shape {array.shape}, not one number per feature")
    return array.astype(np.float64, copy=False)


def bfloat16(upper: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Values of the type that NumPy has not: the upper halves of float32."""
    return (upper.astype("<u4") << 16).view("<f4")


def _convention(name: str, value: Any) -> Any:
    """A convention from a file, of the type that it must have."""
    kind = KINDS[name]
    if isinstance(value, int) and (
        abs(value) >= 2**62 or (name == "axis" and not value) or (name in COUNTS and value < 0)
    ):
        raise MismatchError(f"{name} cannot be {str(value)[:40]}")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind and not (name == "momentum" and value is None):
        raise MismatchError(f"{name} is {str(value)[:40]!r}, not of type {kind.__name__}")
    return value


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise MismatchError(f"the feature name {str(name)[:40]!r} is not text")
    name.encode()  # half a surrogate pair is a ValueError, and no file could hold it
    return name


def _population(arrays: Mapping[str, Floats], features: int) -> Moments:
    """Population statistics where the file has them, else empty ones (count 0)."""
    if not {"count", "population_mean", "population_var"} <= set(arrays):
        return Moments.empty(features)
    count = arrays["count"]
    if (count < 0).any() or (count != np.floor(count)).any() or (count > 2**53).any():
        raise MismatchError("count must contain non-negative integers")
    seen = count > 0
    mean, var = (np.where(seen, arrays[f"population_{name}"], 0.0) for name in ("mean", "var"))
    if not np.isfinite(mean + var).all():
        raise MismatchError("a feature has values, but no population mean or variance")
    found = Moments.without_extremes(count, mean, np.zeros(features), var * count, np.zeros(features))
    if {"minimum", "maximum"} <= set(arrays):
        found.minimum = np.where(seen, arrays["minimum"], np.inf)
        found.maximum = np.where(seen, arrays["maximum"], -np.inf)
    return found
