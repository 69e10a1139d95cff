"""Gamma, beta and feature names of a fit: given as values, or read from files."""

from __future__ import annotations

import os
import warnings

import numpy as np

from bncli.engine.plan import FitSpec
from bncli.errors import BnWarning, MismatchError, UsageError, printable
from bncli.formats.values import read_names, read_vector
from bncli.numerics.arrays import Floats
from bncli.numerics.batchnorm import per_feature
from bncli.stats import container
from bncli.stats.record import check_storable, load


def affine_parameter(value: float | str | Floats, features: int, name: str, budget: int) -> Floats:
    """Read gamma or beta, of shape (C,).

    Parameters
    ----------
    value : float, array or str
        A number for all features, an array of shape (C,), the address of one, or a stats file.
    features : int
        C.
    name : "gamma" or "beta"
    budget : int
        Bytes of buffers.

    Raises
    ------
    UsageError
        When a value is not finite.
    MismatchError, InputError
        As `read_vector`, `load` and `per_feature`.
    """
    if not isinstance(value, str):
        read = per_feature(value, features, name)
    elif os.path.isfile(value) and container.is_packed(value):
        read = getattr(load(value), name)
        if len(read) != features:
            raise MismatchError(
                f"--{name} {printable(value)}: holds {len(read)} features, the data has {features} features"
            )
    else:
        read = read_vector(value, features, name, budget)
    if not np.isfinite(read).all():
        feature = int(np.flatnonzero(~np.isfinite(read))[0])
        raise UsageError(f"--{name} holds a value that is not finite (feature {feature})")
    return read


def affine_and_names(
    spec: FitSpec, features: int, names: tuple[str, ...] | None
) -> tuple[Floats, Floats, tuple[str, ...] | None]:
    """Read gamma and beta, each of shape (C,), and the feature names to store.

    Parameters
    ----------
    names : tuple of str or None
        Names stored with the data. They are used when the options give none, and there is one for each feature.

    Raises
    ------
    MismatchError
        When the number of names given differs from the number of features, or the names differ from those of `like`.
    UsageError, InputError
        As `affine_parameter`.
    """
    gamma, beta = (
        affine_parameter(
            getattr(spec.reference, name, default) if value is None else value, features, name, spec.max_memory
        )
        for name, value, default in (("gamma", spec.gamma, 1.0), ("beta", spec.beta, 0.0))
    )
    if spec.names is not None:
        names = read_names(spec.names) if isinstance(spec.names, str) else tuple(map(str, spec.names))
    if names is not None and len(names) != features:
        if spec.names is not None:
            where = f"{printable(spec.names)}: " if isinstance(spec.names, str) else ""
            raise MismatchError(f"{where}{len(names)} names for {features} features")
        warnings.warn(
            f"the dataset's {len(names)} feature names are not used: the data has {features} features",
            BnWarning,
            stacklevel=5,
        )
        names = None
    check_storable(names or ())
    if spec.reference:
        spec.reference.check_names(names, "the data")
    return gamma, beta, names
