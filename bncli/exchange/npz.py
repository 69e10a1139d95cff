"""NumPy archive: one float64 array of shape (C,) per field, and the conventions as single values. Without pickles."""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli import files
from bncli.exchange import fields
from bncli.exchange.common import KINDS, Exported, Momentum, chosen, conventions, to_stats, unreadable
from bncli.stats import Stats

LARGEST = 4 << 30  # of the file
INFLATED, RATIO = 16 << 20, 4  # bytes of all fields, and beside them times the file's; a real file has half its RATIO
DAMAGED = (  # what zipfile and NumPy's reader of headers raise over damaged or hostile bytes
    *(ValueError, LookupError, TypeError, SyntaxError, EOFError, OSError, RuntimeError, ArithmeticError, MemoryError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what NumPy writes; others raise errors of their own
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def write(stats: Stats, path: str, *, use: str = "running", force: bool = True, inputs: Sequence[str] = ()) -> Exported:
    """Write an archive that `numpy.load` opens; a momentum of none is NaN."""
    stats = chosen(stats, use)
    held = conventions(stats)
    single = held | {"momentum": math.nan if stats.momentum is None else stats.momentum}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **fields.columns(stats), **{k: np.array(v) for k, v in single.items()})
    files.write_bytes(path, buffer.getvalue(), force=force, inputs=inputs)
    return Exported("npz", path, use, stats.num_features, held, fields.advice(use))


def read(path: str, *, eps: float | None = None, momentum: Momentum = None) -> Stats:
    """Read an archive with running_mean and running_var; every other field may be missing.

    Raises
    ------
    InputError
        When the file is missing, damaged, holds a name twice, pickles, or no statistics.
    """
    content = files.read_bytes(path, LARGEST)
    try:
        arrays = read_arrays(content, INFLATED + RATIO * len(content), (*fields.COLUMNS, fields.NAMES, *KINDS))
        held = {name: arrays[name].item() for name in KINDS if name in arrays}
        if math.isnan(held.get("momentum") or 0):
            held["momentum"] = None
        names = arrays[fields.NAMES].tolist() if fields.NAMES in arrays else None
    except DAMAGED as error:
        raise unreadable(path, ".npz archive", error) from None
    fields.check_there(arrays, path)
    columns = {name: arrays[name] for name in fields.COLUMNS if name in arrays}
    return to_stats(path, "npz", columns, held, names=names, eps=eps, momentum=momentum)


def read_arrays(content: bytes, largest: int, names: Collection[str] | None = None) -> dict[str, npt.NDArray[Any]]:
    """Arrays by name: all, or those of these names. Raises one of DAMAGED; every member of the archive is checked.

    Parameters
    ----------
    largest : int
        Bytes that the members to be read may have in all: zeros deflate to a thousandth.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.namelist()
        keys = [member.removesuffix(".npy") for member in members]
        if len(set(keys)) < len(keys):
            raise ValueError("it holds the same name twice")
        if int.from_bytes(content[-12:-10], "little") != len(members):  # zipfile lists what it finds and does not count
            raise ValueError(f"it holds {len(members)} members, and says otherwise at its end")
        if any(info.compress_type not in COMPRESSIONS for info in archive.infolist()):
            raise ValueError("a member is compressed in a way that NumPy does not use")
        if bad := archive.testzip():
            raise ValueError(f"its member {bad} does not match its checksum")
        wanted = {name: m for m, name in zip(members, keys, strict=True) if names is None or name in names}
        if sum(archive.getinfo(member).file_size for member in wanted.values()) > largest:
            raise ValueError(f"its arrays are larger than {largest} bytes, far more than the file")
        return {name: _array(archive.read(member), member) for name, member in wanted.items()}


def _array(content: bytes, member: str) -> npt.NDArray[Any]:
    """One array, which stays where it lies in the content; the header is text, never a pickle."""
    stream = io.BytesIO(content)
    shape, by_column, dtype = HEADERS[np.lib.format.read_magic(stream)](stream)
    start = stream.tell()
    if dtype.hasobject:
        raise ValueError(f"{member} holds Python objects (a pickle, which bn never opens)")
    if math.prod(shape) * dtype.itemsize != len(content) - start:
        raise ValueError(f"{member}: shape {shape} of {dtype} does not have {len(content) - start} bytes")
    return np.ndarray(shape, dtype, content, start, order="F" if by_column else "C")
