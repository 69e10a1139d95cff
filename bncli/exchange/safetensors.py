"""Safetensors: the keys of a PyTorch state_dict in float64, and bn's conventions in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bncli.errors import InputError, printable
from bncli.exchange import state_dict
from bncli.exchange.common import bfloat16, checksum, conventions, package
from bncli.exchange.contract import Content, Encoded, ExportOptions, Layer, Layers
from bncli.numerics.arrays import Array
from bncli.stats.record import Stats

TYPES = ("F16", "F32", "F64", "I64", "BF16")
HELD = ("momentum", "eps", "ddof", "init", "axis")
METADATA = "__metadata__"  # in the header
OURS = "bncli"  # the key of the metadata that holds bn's conventions, as JSON
CHECKSUM = "bncli_sha256"  # in that JSON
MARKS = (OURS, "pytorch_momentum")  # in three places of the metadata: damage to one does not hide the checksum


def encode(stats: Stats, options: ExportOptions) -> Encoded:
    """The state_dict of nn.BatchNorm; its metadata hold eps, momentum (both ways round), ddof, init, axis, names."""
    package("safetensors", "safetensors")
    from safetensors.numpy import save as serialize

    arrays, held = state_dict.arrays(stats), conventions(stats, HELD)
    columns = {column: arrays[key] for key, column in state_dict.KEYS.items()}
    ours = held | {"pytorch_momentum": state_dict.settings(stats)["momentum"], "names": stats.names}
    ours[CHECKSUM] = checksum(columns, held | {"num_batches": stats.num_batches}, stats.names)
    made = serialize(arrays, {"format": "pt", OURS: json.dumps(ours)})
    return Encoded(made, state_dict.settings(stats), state_dict.load_notes(stats))


def decode(content: Content) -> Layers:
    """Layers by the prefix of their keys. Only the tensors of a layer that is read are read.

    Raises
    ------
    UsageError
        When safetensors is missing.
    InputError
        When the file is damaged.
    """
    safetensors = package("safetensors", "safetensors")
    path = content.path
    errors = (safetensors.SafetensorError, OSError)
    with content.reading("safetensors file", *errors), safetensors.safe_open(path, framework="numpy") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
        metadata = file.metadata() or {}

    def get(key: str) -> Array:
        with content.reading("safetensors file", *errors), safetensors.safe_open(path, framework="numpy") as file:
            return _array(file, key, path)

    def layer(found: state_dict.Found) -> Layer:
        ours = _ours(metadata, path)
        held = {name: ours[name] for name in HELD if name in ours} | {"num_batches": found.tracked or 0}
        tracked = None if ours else found.tracked  # bn's own file has 0 for statistics that were not folded
        return Layer(found.columns, held, ours.get("names"), checksum=ours.get(CHECKSUM), tracked=tracked)

    return state_dict.layers(shapes, get, path, layer)


def _array(file: Any, key: str, path: str) -> Array:
    """One tensor of a type that bn reads."""
    kind = file.get_slice(key).get_dtype()
    if kind not in TYPES:
        raise InputError(f"{printable(path)}: {printable(key)} is of type {kind}; bn reads {', '.join(TYPES)}")
    array: Array = _bfloat16(path, key) if kind == "BF16" else file.get_tensor(key)
    return array


def header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, str], int]:
    """Entries of the tensors, the metadata, and where the tensors' bytes start.

    Format of github.com/huggingface/safetensors: the length of a JSON header, the header, the tensors' bytes.
    """
    length = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(length))
    return entries, entries.pop(METADATA, {}), 8 + length


def _bfloat16(path: str, key: str) -> npt.NDArray[np.float32]:
    """A tensor of a type that NumPy lacks. The package has checked its offset."""
    with open(path, "rb") as file:
        entries, _, origin = header(file)
        start, stop = entries[key]["data_offsets"]
        file.seek(origin + start)
        return bfloat16(np.frombuffer(file.read(stop - start), "<u2"))


def _ours(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """What bn wrote into the metadata; empty where another program wrote them."""
    if not any(mark in text for item in metadata.items() for text in item for mark in MARKS):
        return {}
    try:
        ours = json.loads(metadata.get(OURS, ""))
    except (ValueError, RecursionError):
        ours = None
    names = ours.get("names") if isinstance(ours, dict) else None
    if (
        not isinstance(ours, dict)
        or not isinstance(ours.get(CHECKSUM), str)
        or not (names is None or isinstance(names, list))
    ):
        raise InputError(f"{printable(path)}: its metadata {OURS!r} are damaged; take them out, or write it again")
    return ours
