"""Bad files, each put together here: what is wrong with it, and what bn must say. None is from elsewhere."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def raw(
    shape: object = (4, 3),
    descr: object = "<f4",
    fortran_order: object = False,
    *,
    data: bytes = bytes(48),
    version: tuple[int, int] = (1, 0),
    header: bytes | None = None,
    length: int | None = None,
) -> bytes:
    """A .npy file put together by hand, right or wrong."""
    text = header
    if text is None:
        text = repr({"descr": descr, "fortran_order": fortran_order, "shape": shape}).encode("latin-1") + b" \n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + text + data


# name -> (content, words of the message)
NPY: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["not a .npy file", "empty"]),
    "magic": (b"\x93NUMPX" + raw()[6:], ["not a .npy file"]),
    "text": (b"1,2,3\n4,5,6\n", ["not a .npy file"]),
    "pickle": (pickle.dumps([1, 2]), ["not a .npy file"]),
    "zip": (b"PK\x03\x04" + bytes(50), ["not a .npy file"]),
    "cut in magic": (raw()[:4], ["not a .npy file"]),
    "cut in version": (raw()[:7], ["not a .npy file"]),
    "cut in length": (raw()[:9], ["cut in the header"]),
    "cut in header": (raw()[:40], ["cut in the header", "30 found"]),
    "no header": (raw(length=0), ["cut in the header"]),
    "cut in data": (raw()[:-1], ["cut short"]),
    "after the data": (raw(data=bytes(49)), ["1 bytes follow the data"]),
    "version 4": (raw(version=(4, 0)), ["version 4.0"]),
    "version 1.1": (raw(version=(1, 1)), ["version 1.1"]),
    "huge header": (raw(version=(2, 0), length=0xFFFFFFFF), ["4294967295", "65536"]),
    "64 KiB and one": (raw(version=(2, 0), header=b" " * 65537), ["65537"]),
    "shape far too large": (raw((10**12, 64)), ["cut short", "256000000000"]),
    "shape that wraps round 64 bits": (raw((2**62, 4)), ["cut short", str(2**62)]),
    "shape that wraps round to the size": (raw((2**61 + 12, 8)), ["cut short"]),
    "negative": (raw((-4, 3)), ["shape"]),
    "float": (raw((4.0, 3)), ["shape"]),
    "bool": (raw((True, 12)), ["shape"]),
    "string": (raw(("4", 3)), ["shape"]),
    "list": (raw([4, 3]), ["shape"]),
    "number": (raw(12), ["shape"]),
    "65 dimensions": (raw((1,) * 65), ["shape", "64"]),
    "extra key": (
        raw(header=b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), 'x': 1}"),
        ["header must hold"],
    ),
    "missing key": (raw(header=b"{'descr': '<f4', 'shape': (4, 3)}"), ["header must hold"]),
    "list for a header": (raw(header=b"['descr', 'fortran_order', 'shape']"), ["header must hold"]),
    "fortran_order": (raw(fortran_order=1), ["fortran_order"]),
    "code": (raw(header=b"__import__('os').system('touch /tmp/bn-was-here')"), ["header is damaged"]),
    "code in shape": (
        raw(header=b"{'descr': '<f4', 'fortran_order': False, 'shape': (2*2, 3)}"),
        ["header is damaged"],
    ),
    "garbage": (raw(header=bytes(range(1, 120))), ["header is damaged"]),
    "zeros": (raw(header=bytes(100)), ["header is damaged"]),
    "not utf-8": (raw(version=(3, 0), header=b"{'descr': '\xff'}"), ["header is damaged"]),
    "parentheses": (raw(header=b"(" * 60000), ["header is damaged"]),
    "nested": (raw(header=b"[" * 5000 + b"]" * 5000), ["header"]),
    "minus": (raw(header=b"-" * 30000 + b"1"), ["header"]),
    "long number": (
        raw(header=b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 9000 + b",)}"),
        ["header"],
    ),
    "object": (raw(descr="|O"), ["pickle"]),
    "complex64": (raw(descr="<c8", data=bytes(96)), ["<c8", "refused"]),
    "complex128": (raw(descr="<c16", data=bytes(192)), ["<c16"]),
    "float128": (raw(descr="<f16", data=bytes(192)), ["<f16"]),
    "datetime": (raw(descr="<M8[s]", data=bytes(96)), ["<M8[s]"]),
    "timedelta": (raw(descr="<m8[s]", data=bytes(96)), ["<m8[s]"]),
    "unicode": (raw(descr="<U1"), ["<U1"]),
    "bytes": (raw(descr="|S4"), ["|S4"]),
    "void": (raw(descr="|V4"), ["|V4"]),
    "bfloat16": (raw(descr="|V2", data=bytes(24)), ["bfloat16"]),
    "float8": (raw(descr="|V1", data=bytes(12)), ["float8"]),
    "structured": (raw(descr=[("a", "<f4")]), ["refused"]),
    "unknown": (raw(descr="<q3"), ["<q3"]),
    "comma": (raw(descr="f4,f4"), ["f4,f4"]),
    "name": (raw(descr="float32"), ["float32"]),
    "number for a type": (raw(descr=4), ["refused"]),
    "controls in the type": (raw(descr="\x1b[31m"), ["refused"]),
    "scalar": (raw((), data=bytes(4)), ["without axes"]),
    "no samples": (raw((0, 3), data=b""), ["no samples"]),
    "no features": (raw((4, 0), data=b""), ["no features"]),
    "no samples but many features": (raw((0, 10**30), data=b""), ["no samples"]),
    "not a bool": (raw((3, 4), descr="|b1", data=bytes([0, 1] * 5 + [2, 1])), ["other than 0 and 1"]),
}


# --- HDF5

X = np.random.default_rng(5).normal(size=(16, 4)).astype("f4")
CHUNK = X[:8].nbytes


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def saved(**options: Any) -> Callable[[h5py.File], None]:
    """A file with one dataset /x of 16 samples, in two chunks where it has filters."""
    return lambda file: file.create_dataset("x", data=X, **({"chunks": (8, 4)} | options if options else {}))


def with_chunk(stored: bytes, mask: int = 0, **options: Any) -> Callable[[h5py.File], None]:
    """Chunk (8, 0) is stored as these bytes."""

    def build(file: h5py.File) -> None:
        item = file.create_dataset("x", data=X, chunks=(8, 4), **options)
        item.id.write_direct_chunk((8, 0), stored, mask)

    return build


def of_type(kind: Any) -> Callable[[h5py.File], None]:
    """A dataset /x of a type made by h5py's low-level part."""
    return lambda file: h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple((3, 2)))


def with_filter(code: int) -> Callable[[h5py.File], None]:
    """A dataset that claims an optional filter that is not there."""

    def build(file: h5py.File) -> None:
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk((4, 3))
        layout.set_filter(code, h5py.h5z.FLAG_OPTIONAL, (1, 2))
        item = h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4, 3)), layout)
        item.write_direct_chunk((0, 0), bytes(48))

    return build


def links(file: h5py.File) -> None:
    """Links of every kind; those that leave the file lead to `outside`."""
    file["g/x"] = X
    file["x"] = h5py.ExternalLink("outside.h5", "/x")
    file["up"] = h5py.ExternalLink("../outside.h5", "/x")
    file["out"] = h5py.ExternalLink("outside.h5", "/")
    file["soft"] = h5py.SoftLink("/out/x")
    file["dangling"] = h5py.SoftLink("/nowhere")
    file["circle"] = h5py.SoftLink("/circle")
    file["a"], file["b"] = h5py.SoftLink("b"), h5py.SoftLink("a")


def virtual(file: str, dataset: str, shape: tuple[int, ...] = (16, 4), taken: Any = ...) -> Callable[[h5py.File], None]:
    """A virtual dataset /x, all of it or `taken` of it mapped onto one source."""

    def build(target: h5py.File) -> None:
        layout = h5py.VirtualLayout(shape, "f4")
        layout[taken] = h5py.VirtualSource(file, dataset, shape=layout.shape)[taken]
        target.create_virtual_dataset("x", layout)

    return build


def grows(file: h5py.File) -> None:
    """A virtual dataset that grows with its sources: to tell its shape HDF5 has to open them."""
    layout = h5py.VirtualLayout((16, 4), "f4", maxshape=(None, 4))
    source = h5py.VirtualSource("outside.h5", "x", shape=(16, 4), maxshape=(None, 4))
    layout[: h5py.h5s.UNLIMITED, :] = source[: h5py.h5s.UNLIMITED, :]
    file.create_virtual_dataset("x", layout)


def external(file: h5py.File) -> None:
    file.create_dataset("x", (16, 4), "f4", external=[("outside.h5", 0, X.nbytes)])


def claims(*shape: int, **options: Any) -> Callable[[h5py.File], None]:
    """A dataset of this shape, nothing of which was ever written."""
    return lambda file: file.create_dataset("x", shape, "f4", **options)


def odd_types() -> dict[str, Any]:
    bfloat16 = h5py.h5t.IEEE_F32LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)
    bfloat16.set_size(2)
    int24 = h5py.h5t.STD_I32LE.copy()
    int24.set_precision(24)
    int24.set_size(3)
    short = h5py.h5t.STD_I32LE.copy()
    short.set_precision(24)
    enum = h5py.enum_dtype({"A": 0, "B": 1}, "i1")
    kinds = {
        "bfloat16": bfloat16,
        "integer of 24 bits": int24,
        "integer of 24 bits in 32": short,
        "time": h5py.h5t.UNIX_D32LE,
        "bit field": h5py.h5t.STD_B8LE,
        "complex": h5py.h5t.py_create(np.dtype("c8"), logical=True),
        "string": h5py.h5t.py_create(h5py.string_dtype(), logical=True),
        "compound": h5py.h5t.py_create(np.dtype([("a", "f4")]), logical=True),
        "opaque": h5py.h5t.py_create(np.dtype("V5"), logical=True),
        "reference": h5py.h5t.STD_REF_OBJ,
        "enum": h5py.h5t.py_create(enum, logical=True),
        "variable-length": h5py.h5t.py_create(h5py.vlen_dtype("f4"), logical=True),
        "array type": h5py.h5t.py_create(np.dtype(("f4", (2,))), logical=True),
        "float of 80 bits": h5py.h5t.py_create(np.dtype("longdouble")),
    }
    native = getattr(h5py.h5t, "COMPLEX_IEEE_F32LE", None)  # of HDF5 2.0
    return kinds | ({"complex of HDF5 2": native} if native is not None else {})


LZF = bytes([31, *range(32), 0xE0, 255, 31])  # 32 bytes as they are, then 264 that repeat them

# name -> (how to make /x, words of the message)
HDF5: dict[str, tuple[Callable[[h5py.File], Any], list[str]]] = {
    "gzip, inflates short": (with_chunk(zlib.compress(bytes(100)), compression="gzip"), ["(8, 0)", "only 100 of 128"]),
    "gzip, inflates long": (with_chunk(zlib.compress(bytes(129)), compression="gzip"), ["(8, 0)", "more than its 128"]),
    "gzip, a bomb": (with_chunk(zlib.compress(bytes(10**6)), compression="gzip"), ["(8, 0)", "more than its 128"]),
    "gzip, a large bomb": (with_chunk(zlib.compress(bytes(10**7)), compression="gzip"), ["bytes stored for the 128"]),
    "gzip, cut": (with_chunk(zlib.compress(bytes(128))[:-6], compression="gzip"), ["(8, 0)", "inflates to only"]),
    "gzip, rubbish": (with_chunk(b"rubbish", compression="gzip"), ["(8, 0)", "gzip data is damaged"]),
    "lzf, inflates short": (with_chunk(LZF[:33], compression="lzf"), ["(8, 0)", "only 32 of 128"]),
    "lzf, inflates long": (with_chunk(LZF, compression="lzf"), ["(8, 0)", "more than its 128"]),
    "lzf, cut": (with_chunk(LZF[:34], compression="lzf"), ["(8, 0)", "lzf data is damaged"]),
    "lzf, from before the beginning": (with_chunk(b"\x00\x01\x20\x09", compression="lzf"), ["lzf data is damaged"]),
    "szip, claims less": (with_chunk(bytes([64, 0, 0, 0, 9]), compression="szip"), ["(8, 0)", "claims 16 values instead of 32"]),
    "szip, claims more": (with_chunk(b"\xff\xff\xff\x7f9", compression="szip"), ["(8, 0)", "claims", "instead of 32"]),
    "raw chunk, short": (with_chunk(bytes(127), 1, compression="gzip"), ["(8, 0)", "127 bytes", "128"]),
    "raw chunk, long": (with_chunk(bytes(129), 1, compression="gzip"), ["(8, 0)", "129 bytes", "128"]),
    "unwritten": (claims(16, 4), ["never written", "--allow-unwritten"]),
    "unwritten chunks": (claims(16, 4, chunks=(8, 4)), ["(0, 0)", "never written", "2 of 2", "--allow-unwritten"]),
    "claims 10^12 rows": (claims(10**12, 64), ["never written"]),
    "claims 10^12 rows in chunks": (claims(10**12, 64, chunks=(100, 64), compression="gzip"), ["never written"]),
    "a chunk larger than the budget": (claims(2**14, 2**14, chunks=(2**14, 2**14)), ["1073741824", "--max-memory 1024M"]),
    "external link": (links, ["link to another file", "name that file itself"]),
    "external storage": (external, ["stored in an external file", "copy the values"]),
    "virtual": (virtual("outside.h5", "x"), ["virtual", "--allow-virtual"]),
    "virtual, of itself": (virtual(".", "x"), ["virtual", "--allow-virtual"]),
    "virtual, grows": (grows, ["virtual", "--allow-virtual"]),
    "missing filter": (with_filter(32015), ["zstd", "32015", "pip install hdf5plugin"]),
    "unknown filter": (with_filter(54321), ["54321", "HDF5_PLUGIN_PATH", "--plugins"]),
    "not a bool": (lambda f: f.create_dataset("x", data=X > 0, chunks=(16, 4)).id.write_direct_chunk((0, 0), bytes([2] * 64)),
                   ["other than 0 and 1"]),
    "single number": (lambda f: f.create_dataset("x", data=3.0), ["a single number without axes"]),
    "null": (lambda f: f.create_dataset("x", data=h5py.Empty("f4")), ["no values"]),
    "no samples": (claims(0, 3), ["no samples"]),
    "no features": (claims(3, 0, chunks=(1, 1), maxshape=(None, None)), ["no features"]),
    "group without datasets": (lambda f: f.create_group("x"), ["is a group", "bn ls"]),
    "named type": (lambda f: f.__setitem__("x", np.dtype("f4")), ["is a named type"]),
    **{
        name: (of_type(kind), [f"values of type {name.split(' of HDF5')[0]}", "bool, integers and float16, 32 and 64"])
        for name, kind in odd_types().items()
    },
}  # fmt: skip
