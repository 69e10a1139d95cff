"""NumPy archive: one float64 array of shape (C,) per field, and the conventions as single values. Without pickles."""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli import files
from bncli.exchange import fields
from bncli.exchange.common import KINDS, Exported, Momentum, chosen, conventions, save, to_stats, unreadable
from bncli.stats import Stats

LARGEST = 4 << 30  # of the file, and of a member
DAMAGED = (
    *(ValueError, LookupError, TypeError, SyntaxError, EOFError, OSError, RuntimeError, ArithmeticError, MemoryError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def write(stats: Stats, path: str, *, use: str = "running", force: bool = True, inputs: Sequence[str] = ()) -> Exported:
    """Write an archive that `numpy.load` opens; a momentum of none is NaN."""
    stats = chosen(stats, use)
    held = conventions(stats)
    single = held | {"momentum": math.nan if stats.momentum is None else stats.momentum}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **fields.columns(stats), **{k: np.array(v) for k, v in single.items()})
    save(buffer.getvalue(), path, force, inputs)
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
        arrays = _arrays(content)
        held = {name: arrays[name].item() for name in KINDS if name in arrays}
        if math.isnan(held.get("momentum") or 0):
            held["momentum"] = None
        names = arrays[fields.NAMES].tolist() if fields.NAMES in arrays else None
    except DAMAGED as error:
        raise unreadable(path, ".npz archive", error) from None
    fields.check_there(arrays, path)
    columns = {name: arrays[name] for name in fields.COLUMNS if name in arrays}
    return to_stats(path, "npz", columns, held, names=names, eps=eps, momentum=momentum)


def _arrays(content: bytes) -> dict[str, npt.NDArray[Any]]:
    """The fields that bn knows, by name; every member of the archive is checked."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.namelist()
        if len(set(members)) < len(members):
            raise ValueError("it holds the same name twice")
        if int.from_bytes(content[-12:-10], "little") != len(members):  # zipfile lists what it finds and does not count
            raise ValueError(f"it holds {len(members)} members, and says otherwise at its end")
        if bad := archive.testzip():
            raise ValueError(f"its member {bad} does not match its checksum")
        known = {f"{name}.npy": name for name in (*fields.COLUMNS, fields.NAMES, *KINDS)}
        return {known[m]: _array(archive, m) for m in members if m in known}


def _array(archive: zipfile.ZipFile, member: str) -> npt.NDArray[Any]:
    """One array; its size is known before anything is allocated, and its header is text, never a pickle."""
    if archive.getinfo(member).file_size > LARGEST:
        raise ValueError(f"{member} is larger than {LARGEST} bytes")
    stream = io.BytesIO(archive.read(member))
    shape, _, dtype = HEADERS[np.lib.format.read_magic(stream)](stream)
    rest = stream.read()
    if dtype.hasobject:
        raise ValueError(f"{member} holds Python objects (a pickle, which bn never opens)")
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise ValueError(f"{member}: shape {shape} of {dtype} does not have {len(rest)} bytes")
    return np.frombuffer(rest, dtype).reshape(shape)
