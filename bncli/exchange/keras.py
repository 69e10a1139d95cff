"""Keras 3: the .weights.h5 of a model with one BatchNormalization, and one such layer of a whole model's file.

Layout: Keras keeps the variables of a layer under `.../<class>_<number>/vars/0, 1, …`, with the layer's own name as an
attribute of `vars`; BatchNormalization's are gamma, beta, moving_mean and moving_variance. Plain HDF5, so Keras itself
is not needed. Written in float64: `load_weights` copies into the layer's own type. Behind the HDF5 file stands the seal of
a stats file, which Keras passes over; HDF5 can crash or hang over damaged bytes, so it is checked before HDF5 reads any.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import h5py
import numpy as np

from bncli.errors import InputError, UsageError, printable
from bncli.exchange.common import ROUNDED, bfloat16, notes
from bncli.exchange.contract import Content, Encoded, ExportOptions, Layer, Layers
from bncli.numerics.arrays import Array
from bncli.stats import container
from bncli.stats.record import Stats

VARIABLES = {"0": "gamma", "1": "beta", "2": "running_mean", "3": "running_var"}
KIND = "HDF5 file of Keras weights"
LAYER = "batch_normalization"
ZIP = b"PK\x03\x04"  # what a .keras file is
SAVE_WEIGHTS = 'load it in Keras 3 and save the weights alone: model.save_weights("x.weights.h5")'


def encode(stats: Stats, options: ExportOptions) -> Encoded:
    """Write weights that `Model.load_weights` takes, for a model whose only weights are one BatchNormalization's."""
    with container.in_memory() as file:
        variables = file.create_group(f"layers/{LAYER}/vars")
        variables.attrs["name"] = LAYER
        for key, name in VARIABLES.items():
            variables.create_dataset(key, data=getattr(stats, name), track_times=False)
        file.create_group("vars")
        file.flush()
        made = container.sealed(file.id.get_file_image())
    settings = {"axis": stats.axis, "momentum": stats.momentum, "epsilon": stats.eps}
    return Encoded(made, settings, _notes(stats, settings))


def decode(content: Content) -> Layers:
    """Layers by their names as saved, alone or after those of the models around them, or by their paths.

    Raises
    ------
    InputError
        When the file is damaged.
    """
    path, data = content.name, container.unsealed(content.data, str(content))
    if data.startswith(ZIP):
        raise InputError(f"{content}: a whole Keras model; {SAVE_WEIGHTS}")
    with content.reading(KIND, *container.UNREADABLE):
        container.check_heaps(data)
        with h5py.File(io.BytesIO(data), "r") as file:
            _refuse_other_kinds(file, path)
            groups, also = _layers(file, VARIABLES, None, data)
            sizes = {name: group["0"].shape[0] for name, group in groups.items()}
            places = {name: group.name for name, group in groups.items()}

    def check(asked: str | None) -> None:
        with content.reading(KIND, *container.UNREADABLE), h5py.File(io.BytesIO(data), "r") as file:
            _refuse_incomplete(_layers(file, ("0", "1", "2"), asked, data)[0], asked, len(sizes), path)

    def read(name: str) -> Layer:
        with content.reading(KIND, *container.UNREADABLE), h5py.File(io.BytesIO(data), "r") as file:
            return Layer({c: _read(file[places[name]][key], data, path) for key, c in VARIABLES.items()})

    return Layers(sizes, read, also, "no vars 0, 1, 2, 3 of one length", check=check, keeps_asked=True)


def _notes(stats: Stats, settings: dict[str, Any]) -> list[str]:
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)
    return [
        f"load into a model whose only weights are those of one BatchNormalization({given}) at its top level: the file holds none "
        "of these settings",
        f"values are float64 and unrounded; a float32 layer rounds them as it loads them, {ROUNDED}",
        *notes(stats, "keras", ""),
    ]


def _refuse_other_kinds(file: h5py.File, path: str) -> None:
    """Say what to do with HDF5 files that people take for weights of Keras 3."""
    if "model_weights" in file or "layer_names" in file.attrs:
        raise InputError(f"{printable(path)}: a model or weights in the form before Keras 3; {SAVE_WEIGHTS}")
    if {"format", "format_version", container.DIGEST} <= set(file.attrs):
        raise InputError(f"{printable(path)}: a stats file already; look at it with 'bn inspect'")


def _layers(
    file: h5py.File, variables: Iterable[str], asked: str | None, content: bytes
) -> tuple[dict[str, h5py.Group], dict[str, set[str]]]:
    """Groups of these variables, all of one length, under the layer's own name; and its other names.

    Where that is not unique the names of the models around it stand before it ("block1/bn"), else it is the path. The one
    layer that goes by the name asked for, whichever of the three, is under that.
    """
    groups: dict[str, h5py.Group] = {}
    names: dict[str, str] = {}

    def visit(path: str, item: h5py.Dataset | h5py.Group) -> None:  # no link out of the file is followed
        at, _, last = path.rpartition("/")
        if last == "vars" and isinstance(item, h5py.Group):
            names[at] = str(_attribute(item, "name", content) or at)
            if _is_layer(item, set(variables)):
                groups[at] = item

    file.visititems(visit)
    own = {at: names[at] for at in groups}
    full = {at: "/".join(names[p] for p in _ancestors(at) if p in names) for at in groups}
    chosen = {at: next((n[at] for n in (own, full) if list(n.values()).count(n[at]) == 1), at) for at in groups}
    for ends in ((), (f"/{asked}",)) if asked else ():  # the whole name goes before the end of one
        matching = [at for at in groups if any(n == asked or n.endswith(ends) for n in (own[at], full[at], at))]
        if len(matching) == 1:
            chosen[matching[0]] = str(asked)
            break
    also = {chosen[at]: {own[at], full[at], at} for at in groups}
    return {chosen[at]: group for at, group in groups.items()}, also


def _attribute(item: h5py.Dataset | h5py.Group, name: str, content: bytes) -> Any:
    """An attribute, if it is there; raises ValueError where it claims more than the file holds."""
    if name not in item.attrs:
        return None
    container.check_text(content, item.attrs.get_id(name))
    return item.attrs[name]


def _ancestors(path: str) -> list[str]:
    """The path and its parents, outermost first, without the root."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _refuse_incomplete(layers: dict[str, h5py.Group], layer: str | None, others: int, path: str) -> None:
    """Refuse layers of three variables: one of gamma and beta is missing, and the file does not say which."""
    matching = [name for name in layers if layer is not None and (name == layer or name.endswith(f"/{layer}"))]
    if not layers or (layer is not None and not matching) or (layer is None and others > 1):  # then those are listed
        return
    named = ", ".join(printable(name) for name in (matching or layers))
    reason = "gamma or beta is not in the file (scale=False or center=False), and it does not say which"
    if matching or not others:
        raise InputError(f"{printable(path)}: {named}: {reason}; save the layer with both, as 1 or 0")
    raise UsageError(f"{printable(path)}: holds several layers; say which with --layer. Of {named} {reason}")


def _is_layer(group: h5py.Group, variables: set[str]) -> bool:
    if set(group) != variables or any(group.get(key, getlink=True).__class__ is not h5py.HardLink for key in variables):
        return False
    shapes = {item.shape if isinstance(item := group[key], h5py.Dataset) else None for key in variables}
    return len(shapes) == 1 and len(shapes.pop() or ()) == 1


def _read(dataset: h5py.Dataset, content: bytes, path: str) -> Array:
    """A small plain dataset; Keras writes no other, and another could claim more than the file has."""
    where = f"{printable(path)}: {printable(dataset.name)}"
    narrow = dataset.dtype == "V2" and _attribute(dataset, "dtype", content) == "bfloat16"
    plain = not (dataset.chunks or dataset.is_virtual or dataset.external) and (dataset.dtype.kind == "f" or narrow)
    offset = dataset.id.get_offset() if plain else None
    if offset is None or offset + dataset.nbytes > len(content):
        raise InputError(
            f"{where} is not stored as Keras stores it (float numbers in one piece); save the weights again"
        )
    values = np.asarray(dataset[...])
    return bfloat16(values.view("<u2")) if narrow else values
