"""Safetensors: the keys of a PyTorch state_dict in float64, and bn's conventions in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bncli.errors import InputError, printable
from bncli.exchange import state_dict
from bncli.exchange.common import (
    Exported,
    Momentum,
    bfloat16,
    check_readable,
    checksum,
    chosen,
    conventions,
    package,
    to_stats,
    unreadable,
)
from bncli.stats.record import Stats
from bncli.system import atomic

TYPES = ("F16", "F32", "F64", "I64", "BF16")
HELD = ("momentum", "eps", "ddof", "init", "axis")
METADATA = "__metadata__"  # in the header
OURS = "bncli"  # the key of the metadata that holds bn's conventions, as JSON
CHECKSUM = "bncli_sha256"  # in that JSON
MARKS = (OURS, "pytorch_momentum")  # in three places of the metadata: damage to one does not hide the checksum


def write(stats: Stats, path: str, *, use: str = "running", force: bool = True, inputs: Sequence[str] = ()) -> Exported:
    """Write the state_dict of nn.BatchNorm; its metadata hold eps, momentum (both ways round), ddof, init, axis, names."""
    package("safetensors", "safetensors")
    from safetensors.numpy import save as serialize

    stats = chosen(stats, use)
    arrays, held = state_dict.arrays(stats), conventions(stats, HELD)
    columns = {column: arrays[key] for key, column in state_dict.KEYS.items()}
    told = held | {"pytorch_momentum": state_dict.settings(stats)["momentum"], "names": stats.names}
    told[CHECKSUM] = checksum(columns, held | {"num_batches": stats.num_batches}, stats.names)
    atomic.write_bytes(path, serialize(arrays, {"format": "pt", OURS: json.dumps(told)}), force=force, inputs=inputs)
    return Exported("safetensors", path, use, stats.num_features, state_dict.settings(stats), state_dict.advice(stats))


def read(path: str, *, layer: str | None = None, eps: float | None = None, momentum: Momentum = None) -> Stats:
    """Read one layer; `layer` is the prefix of its keys. Only its own tensors are read.

    Raises
    ------
    UsageError
        When several layers are there and none was named, or safetensors is missing.
    InputError
        When the file is damaged, or holds no such layer.
    """
    safetensors = package("safetensors", "safetensors")
    check_readable(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
            found = state_dict.read_layer(shapes, lambda key: _array(file, key, path), layer, path)
            told = _told(file.metadata() or {}, path)
    except (safetensors.SafetensorError, OSError) as error:
        raise unreadable(path, "safetensors file", error) from None
    held = {name: told[name] for name in HELD if name in told} | {"num_batches": found.tracked or 0}
    names, layer = told.get("names"), found.name or None
    return to_stats(
        path,
        "safetensors",
        found.columns,
        held,
        layer=layer,
        names=names,
        eps=eps,
        momentum=momentum,
        told=told.get(CHECKSUM),
        tracked=None if told else found.tracked,  # bn's own file says 0 of statistics that were not folded
    )


def _array(file: Any, key: str, path: str) -> npt.NDArray[Any]:
    """One tensor of a type that bn reads."""
    kind = file.get_slice(key).get_dtype()
    if kind not in TYPES:
        raise InputError(f"{printable(path)}: {printable(key)} is of type {kind}; bn reads {', '.join(TYPES)}")
    array: npt.NDArray[Any] = _bfloat16(path, key) if kind == "BF16" else file.get_tensor(key)
    return array


def header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, str], int]:
    """Entries of the tensors, the metadata, and where the tensors' bytes start.

    Format of github.com/huggingface/safetensors: the length of a JSON header, the header, the tensors' bytes.
    """
    length = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(length))
    return entries, entries.pop(METADATA, {}), 8 + length


def _bfloat16(path: str, key: str) -> npt.NDArray[np.float32]:
    """A tensor of the type that NumPy has not. The package has checked where it lies."""
    with open(path, "rb") as file:
        entries, _, origin = header(file)
        start, stop = entries[key]["data_offsets"]
        file.seek(origin + start)
        return bfloat16(np.frombuffer(file.read(stop - start), "<u2"))


def _told(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """What bn wrote into the metadata; empty where another program wrote them."""
    if not any(mark in text for item in metadata.items() for text in item for mark in MARKS):
        return {}
    try:
        told = json.loads(metadata.get(OURS, ""))
    except (ValueError, RecursionError):
        told = None
    names = told.get("names") if isinstance(told, dict) else None
    if (
        not isinstance(told, dict)
        or not isinstance(told.get(CHECKSUM), str)
        or not (names is None or isinstance(names, list))
    ):
        raise InputError(f"{printable(path)}: its metadata {OURS!r} are damaged; take them out, or write it again")
    return told
