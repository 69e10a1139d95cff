"""Normalization as one `y = scale · x + shift`, by itself or folded into the layer before it. A format to write only.

Both containers are read and written here, byte for byte: what is not folded is copied as it is, for every type.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from bncli.errors import InputError, MismatchError, UsageError, printable
from bncli.exchange import npz, safetensors
from bncli.exchange.common import pick
from bncli.exchange.contract import Content, Encoded, ExportOptions
from bncli.numerics.arrays import Array
from bncli.numerics.batchnorm import Affine, overflowed, round_to
from bncli.stats.record import Stats

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}  # of safetensors; others are carried as bytes
BITS = (4, 6, 8, 16, 32, 64, 128)  # that a value may have
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError)  # a header


def encode(stats: Stats, options: ExportOptions) -> Encoded:
    """Write scale and shift of test mode, or a file of weights with the normalization folded into one of its layers.

    Without `into` the file holds `scale` and `shift`, each of shape (C,) in float64: y = scale · x + shift. With it, it
    is INTO with the weight and bias of one layer replaced, so that the layer gives what it gave with the normalization
    after it (which is then to be left out of the model; Jacob et al. 2018, section 3.2, and PyTorch's
    `fuse_conv_bn_weights`):

        weight = W · gamma / sqrt(var + eps)                       along the output channels
        bias   = (b - mean) · gamma / sqrt(var + eps) + beta       a missing b is 0 and is added

    Parameters
    ----------
    options : ExportOptions
        `output`, a .npz or .safetensors file. `into`: a file of the same kind, in PyTorch's layout: `LAYER.weight` of shape
        (C, ...) and `LAYER.bias` of shape (C,), that is linear and convolution layers, transposed ones too. `layer`: LAYER,
        which may be left out where the file has only one; "" for a file that holds a bare `weight`. `transposed`: whether
        LAYER is a transposed convolution, whose weight is (in, C / groups, ...) and not (C, in / groups, ...), which may be
        left out where the shape fits only one of them.

    Raises
    ------
    UsageError
        When the layer is not there (the message lists those that are), its shape fits both kinds of convolution and
        `transposed` is not given, or the suffix is neither of the two.
    InputError
        When INTO is missing, damaged or of another kind.
    MismatchError
        When the layer's shape or type does not take the statistics, or the result does not fit its type.
    """
    container, into, layer = _container(options.output), options.into, options.layer
    if into is None:
        if layer is not None or options.transposed is not None:
            option = "--transposed" if layer is None else "--layer"
            raise UsageError(f"{option} is about a layer of a file of weights; say which file with --into FILE")
        scale, shift = stats.scale_shift()
        weights = Weights({}, {}, {}, {})
        weights.put("scale", scale, "F64")
        weights.put("shift", shift, "F64")
        notes = [f"y = scale * x + shift, in float64, with the features on axis {stats.axis}"]
    else:
        if _container(into.name) is not container:
            raise UsageError(f"{printable(options.output)}: give the output the suffix of --into {into}")
        weights = container.read(into.data, into)
        layer = _choose(weights, layer, into.name)
        notes = _fold(weights, stats, options, layer, str(into))
    settings = {"eps": stats.eps, "into": into.name if into else None, "layer": layer}
    return Encoded(container.write(weights), settings, notes)


class Weights(NamedTuple):
    """Named arrays of a file.

    Attributes
    ----------
    arrays : name -> array
        Of types that are not folded into, the bytes in one dimension: some types have less than a byte per value.
    types : name -> str
        What the container calls the array's type.
    shapes : name -> tuple
        What the container calls the array's shape.
    metadata : dict
        Carried as it is.
    """

    arrays: dict[str, Array]
    types: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    def put(self, key: str, array: Array, kind: str) -> None:
        """Set one array of a type that NumPy has."""
        self.arrays[key], self.types[key], self.shapes[key] = array, kind, array.shape


class Container(NamedTuple):
    """A kind of file that holds named arrays: how its bytes are read and written."""

    read: Callable[[bytes, Content], Weights]
    write: Callable[[Weights], bytes]


def _container(path: str) -> Container:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in CONTAINERS:
        raise UsageError(f"{printable(path)}: fold reads and writes {' and '.join(CONTAINERS)} files")
    return CONTAINERS[suffix]


def _fold(weights: Weights, stats: Stats, options: ExportOptions, layer: str, where: str) -> list[str]:
    """Replace weight and bias of a layer by those that give the normalized values; returns notes about it."""
    weight_key, bias_key = (f"{layer}.{name}" if layer else name for name in ("weight", "bias"))
    shape, features = weights.shapes[weight_key], stats.num_features
    groups = _groups(f"{where}: {printable(weight_key)}", shape, features, options.transposed)
    notes = [f"{printable(layer) or 'the layer'} holds the normalization now: leave it out of the model"]
    if groups is not None:
        kind = "a transposed convolution" + (f" of {groups} groups" if groups > 1 else "")
        notes.append(f"{printable(weight_key)} {shape} was folded as {kind}, along its output channels on axis 1")
    if bias_key not in weights.arrays:
        zeros = np.zeros(features, weights.arrays[weight_key].dtype)
        weights.put(bias_key, zeros, weights.types[weight_key])
        notes.append("it had no bias and has one now: build it with bias=True")
    _check_layer(weights, weight_key, bias_key, features, where)
    mean, var = stats.statistics()
    if np.isnan(mean).any():
        raise MismatchError(
            f"feature {np.flatnonzero(np.isnan(mean))[0]} has no {options.use} statistics; nothing is folded"
        )
    weight, bias = (weights.arrays[key] for key in (weight_key, bias_key))
    affine, none = Affine.of(mean, var, stats.gamma, stats.beta, stats.eps), np.zeros(len(mean))
    scaling = replace(affine, minus=none, plus=-none)  # -0.0 stays
    folded = {weight_key: _scaled(weight, scaling, groups), bias_key: affine(bias)[0]}
    for key, values in folded.items():
        rounded = round_to(values, weights.arrays[key].dtype)
        if count := int(np.count_nonzero(overflowed(weights.arrays[key], rounded))):
            raise MismatchError(
                f"{where}: {printable(key)}, folded, does not fit {rounded.dtype} ({count:,} values); store it in a wider type"
            )
        weights.put(key, rounded, weights.types[key])
    return notes


def _scaled(weight: Array, scaling: Affine, groups: int | None) -> Array:
    """The weight times one factor per output channel: along axis 0, or in `groups` of a transposed convolution.

    There the weight is (in, out / groups, ...): the g-th run of inputs gives the g-th run of outputs.
    """
    channels, behind = np.arange(len(scaling.minus)), [1] * (weight.ndim - 2)
    if groups is None:
        return scaling[channels.reshape(-1, 1, *behind)](weight)[0]  # (C, in / groups, ...)
    inputs, outputs, *kernel = weight.shape
    by_group = weight.reshape(groups, inputs // groups, outputs, *kernel)
    return scaling[channels.reshape(groups, 1, outputs, *behind)](by_group)[0].reshape(weight.shape)


def _groups(where: str, shape: tuple[int, ...], features: int, transposed: bool | None) -> int | None:
    """Groups of the transposed convolution that a weight is of; None where its output channels are on axis 0.

    A transposed convolution has the shape (in, C / groups, ...), so that C gives the number of groups. Where there are
    C of them and C inputs, each has one input and one output, and both kinds come out the same.

    Raises
    ------
    MismatchError
        When the shape does not fit the features.
    UsageError
        When it fits both kinds of convolution and `transposed` is None, or `transposed` is true of a linear layer.
    """
    groups = features // shape[1] if len(shape) > 2 and shape[1] and features % shape[1] == 0 else 0
    fits = {False: shape[0] == features, True: bool(groups) and shape[0] % groups == 0}
    if transposed and len(shape) == 2:
        raise UsageError(
            f"{where} has shape {shape}, a linear layer's, which has no transposed form; leave --transposed out"
        )
    if transposed is None and fits[False] and fits[True] and shape[1] > 1:
        grouped = f" of {groups} groups" if groups > 1 else ""
        raise UsageError(
            f"{where} has shape {shape}, which fits a convolution and a transposed one{grouped}; say --no-transposed if it is "
            "of an nn.Conv, --transposed if it is of an nn.ConvTranspose"
        )
    chosen = not fits[False] and fits[True] if transposed is None else transposed
    if fits[chosen]:
        return groups if chosen else None
    if transposed:
        found = f"shape {shape}, which is not (in, {features} / groups, ...) of a transposed convolution"
        raise MismatchError(f"{where} has {found}; fold into the layer before the normalization")
    raise MismatchError(
        f"{where} has {shape[0]} output channels (shape {shape}, axis 0), the stats have {features} features; fold into the "
        "layer before the normalization"
    )


def _check_layer(weights: Weights, weight_key: str, bias_key: str, features: int, where: str) -> None:
    """Raise MismatchError where a layer's bias or types do not take the statistics."""
    if weights.shapes[bias_key] != (features,):
        raise MismatchError(f"{where}: {printable(bias_key)} has shape {weights.shapes[bias_key]}, not {(features,)}")
    for key in (weight_key, bias_key):
        if weights.arrays[key].dtype.kind != "f" or weights.arrays[key].itemsize > 8:
            raise MismatchError(
                f"{where}: {printable(key)} is of type {printable(weights.types[key])}; fold takes float16, float32 and "
                "float64: convert it first"
            )


def _choose(weights: Weights, layer: str | None, path: str) -> str:
    """The layer that was named, else the only one."""
    keys = [key for key, shape in weights.shapes.items() if key.split(".")[-1] == "weight" and len(shape) > 1]
    if not keys:
        raise InputError(
            f"{printable(path)}: holds no linear or convolution layer (NAME.weight of two or more dimensions)"
        )
    layers = {key.removesuffix("weight").removesuffix("."): weights.shapes[key][0] for key in keys}
    return pick(layers, layer, path, "")


def _read_npz(data: bytes, content: Content) -> Weights:
    with content.reading(".npz file", *npz.DAMAGED):
        arrays = npz.read_arrays(data, content.limit)
    weights = Weights({}, {}, {}, {})
    for key, array in arrays.items():
        weights.put(key, array, str(array.dtype))
    return weights


def _write_npz(weights: Weights) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # not np.savez, which takes no array named "file"
        for key, array in weights.arrays.items():
            with archive.open(key + ".npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return buffer.getvalue()


def _read_safetensors(data: bytes, content: Content) -> Weights:
    with content.reading(".safetensors file", *DAMAGED):
        entries, metadata, start = safetensors.header(io.BytesIO(data))
        weights, tensors, end = Weights({}, {}, {}, metadata), memoryview(data)[start:], 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, stop), kind, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
            whole = min(shape, default=1) >= 0 and (stop - begin) * 8 in (math.prod(shape) * bits for bits in BITS)
            if not end == begin <= stop <= len(tensors) or not whole:
                raise ValueError(f"tensor {key} is not at the offset that its shape and type need")
            found = np.frombuffer(tensors[begin:stop], FLOATS.get(kind, "u1"))
            found = found.reshape(shape) if kind in FLOATS else found
            weights.arrays[key], weights.types[key], weights.shapes[key], end = found, kind, shape, stop
        if end != len(tensors):
            raise ValueError(f"{len(tensors) - end} bytes belong to no tensor")
    return weights


def _write_safetensors(weights: Weights) -> bytes:
    header: dict[str, Any] = {safetensors.METADATA: weights.metadata} if weights.metadata else {}
    tensors, end = [], 0
    sizes = {key: array.nbytes / max(1, math.prod(weights.shapes[key])) for key, array in weights.arrays.items()}
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True):  # so that each is aligned
        array = weights.arrays[key]
        tensors.append(array.tobytes())
        header[key] = {
            "dtype": weights.types[key],
            "shape": weights.shapes[key],
            "data_offsets": (end, end + array.nbytes),
        }
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *tensors])


CONTAINERS = {
    ".npz": Container(_read_npz, _write_npz),
    ".safetensors": Container(_read_safetensors, _write_safetensors),
}
