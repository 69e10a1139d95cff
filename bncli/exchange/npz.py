"""NumPy archive: one float64 array of shape (C,) per field, and the conventions as single values. Without pickles."""

from __future__ import annotations

import io
import math
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from bncli.exchange import fields, names, state_dict
from bncli.exchange.common import KINDS, conventions
from bncli.exchange.contract import Content, Encoded, ExportOptions, Layer, Layers
from bncli.numerics.arrays import Array, DType
from bncli.stats import container
from bncli.stats.columns import COLUMNS, exported
from bncli.stats.record import Stats
from bncli.system import parsing

POPULATION = ("count", "population_mean", "population_var", "minimum", "maximum")
FIELDS = {*POPULATION, fields.NAMES, fields.NAMES + container.ENDS, *KINDS}
INFLATED, RATIO = 16 << 20, 4  # bytes of all fields, and a factor of the file's size; a real file has half its RATIO
DAMAGED = (  # what zipfile and NumPy's reader of headers raise over damaged or hostile bytes
    *(ValueError, LookupError, TypeError, SyntaxError, EOFError, OSError, RuntimeError, ArithmeticError, MemoryError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what NumPy writes; others raise errors of their own
HEADER = 16 << 10  # bytes of a member that its header is looked for in
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def encode(stats: Stats, options: ExportOptions) -> Encoded:
    """Write an archive that `numpy.load` opens; a momentum of none is NaN."""
    held = conventions(stats)
    single = held | {"momentum": math.nan if stats.momentum is None else stats.momentum}
    buffer = io.BytesIO()
    columns: dict[str, Array] = {}
    for name, values in exported(stats).items():
        if COLUMNS[name].npz:
            texts = values.dtype == object
            columns |= container.text_arrays(name, values.tolist(), "U") if texts else {name: values}
    np.savez(buffer, allow_pickle=False, **columns, **{k: np.array(v) for k, v in single.items()})
    return Encoded(buffer.getvalue(), held, fields.use_notes(options.use))


def decode(content: Content) -> Layers:
    """Layers of an archive with running_mean and running_var, under any of their `names`; other fields may be missing.

    Raises
    ------
    InputError
        When the file is missing, damaged, holds a name twice, or pickles.
    """
    data = content.data
    with content.reading(".npz archive", *DAMAGED):
        arrays = read_arrays(data, INFLATED + RATIO * len(data), _of_layers)
        shapes = _shapes(data) | {key: array.shape for key, array in arrays.items()}

    def layer(found: state_dict.Found) -> Layer:
        given = {name: arrays[key] for name, key in found.keys.items() if name in FIELDS and key in arrays}
        with content.reading(".npz archive", *DAMAGED):
            held = {name: _single(given[name], name) for name in KINDS if name in given}
            if math.isnan(held.get("momentum") or 0):
                held["momentum"] = None
            names = container.texts_of(fields.NAMES, given, found.columns["running_mean"].size)
        columns = {name: given[name] for name in POPULATION if name in given} | found.columns
        return Layer(columns, held, names, tracked=found.tracked)

    return state_dict.layers(shapes, arrays.__getitem__, content.name, layer)


def _single(array: Array, name: str) -> Any:
    """A convention as a plain value."""
    if array.dtype.kind not in "biufU" or array.size != 1:
        raise ValueError(f"{name} is of type {array.dtype} and shape {array.shape}, not one value")
    if array.dtype.kind == "U" and container.letters(array).max(initial=0) > sys.maxunicode:
        raise ValueError(f"{name} has a letter outside of Unicode")
    return array.item()


def _of_layers(keys: Iterable[str]) -> set[str]:
    """Keys of what can be a layer's, by their names."""
    groups = names.groups(keys)
    of_layers = {
        place for prefix, group in groups.items() if names.pair(group) for place in (prefix, names.parameters(prefix))
    }
    return {
        key
        for prefix in of_layers
        for name, key in groups.get(prefix, {}).items()
        if name in names.KNOWN or name in FIELDS
    }


def read_arrays(
    content: bytes, largest: int, choose: Callable[[Iterable[str]], Collection[str]] = set
) -> dict[str, Array]:
    """Arrays by name. Raises one of DAMAGED; every member of the archive is checked.

    Parameters
    ----------
    largest : int
        Bytes that the members to be read may have in all: zeros deflate to a thousandth.
    choose : function
        Which to read, of all names.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.namelist()
        keys = [member.removesuffix(".npy") for member in members]
        if len(set(keys)) < len(keys):
            raise ValueError("it holds the same name twice")
        if int.from_bytes(content[-12:-10], "little") != len(members):  # zipfile lists what it finds and does not count
            raise ValueError(f"it holds {len(members)} members, but its directory lists another number")
        if any(info.compress_type not in COMPRESSIONS for info in archive.infolist()):
            raise ValueError("a member is compressed in a way that NumPy does not use")
        if bad := archive.testzip():
            raise ValueError(f"its member {bad} does not match its checksum")
        chosen_keys = choose(keys)
        wanted = {name: m for m, name in zip(members, keys, strict=True) if name in chosen_keys}
        if sum(archive.getinfo(member).file_size for member in wanted.values()) > largest:
            raise ValueError(f"its arrays are larger than {largest} bytes, far more than the file")
        return {name: _array(archive.read(member), member) for name, member in wanted.items()}


def _shapes(content: bytes) -> dict[str, tuple[int, ...]]:
    """The shape of every member that is an array of numbers, by its header alone; () of all else."""
    shapes: dict[str, tuple[int, ...]] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.namelist():
            try:
                with archive.open(member) as file:
                    stream = io.BytesIO(file.read(HEADER))
                shape, _, dtype = _header(stream)
            except DAMAGED:
                shape, dtype = (), np.dtype(bool)
            shapes[member.removesuffix(".npy")] = shape if dtype.kind in "fiu" else ()
    return shapes


def _header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, DType]:
    """Shape, whether the first axis varies fastest, and type of the array that begins here."""
    read = HEADERS[np.lib.format.read_magic(stream)]
    with parsing.LOCK:
        return read(stream)


def _array(content: bytes, member: str) -> Array:
    """One array, a view of the content; the header is text, never a pickle."""
    stream = io.BytesIO(content)
    shape, by_column, dtype = _header(stream)
    start = stream.tell()
    if dtype.hasobject:
        raise ValueError(f"{member} holds Python objects (a pickle, which bn never opens)")
    if not dtype.itemsize:  # any number of them takes no bytes
        raise ValueError(f"{member} is of the type {dtype}, whose values have no size")
    if math.prod(shape) * dtype.itemsize != len(content) - start:
        raise ValueError(f"{member}: shape {shape} of {dtype} does not have {len(content) - start} bytes")
    return np.ndarray(shape, dtype, content, start, order="F" if by_column else "C")
