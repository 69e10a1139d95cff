"""Valid files to begin with, and seeded ways to damage them: blind ones, and ones that know the format."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from fuzz import kinds

import bncli

SIGNATURES = (b"\x89HDF", *b"OHDR TREE SNOD HEAP GCOL FRHP FHDB BTHD BTLF FADB EAHD".split())
EXTREMES = (*range(9), *((1 << bits) + off for bits in (7, 8, 15, 16, 31, 32, 62, 63) for off in (-1, 0)))
DESCRS = [
    "<f4",
    ">f4",
    "<f8",
    "<f2",
    "<i4",
    "|i1",
    "|b1",
    "|O",
    "<c8",
    "<U4",
    "|V4",
    "f",
    "<f16",
    "<M8[s]",
    "\x1b[31m",
    "<f4,<f4",
]
SHAPES = [
    "()",
    "(0,)",
    "(40,)",
    "(120,)",
    "(-4,3)",
    "(3,40)",
    "(2,20,3)",
    "(40.0,3)",
    "(10**12,64)",
    "(40,3,1)",
    "(True,120)",
    "40",
    "(40,3L)",
]
SHAPES += ["(1000000000000, 64)", "(4611686018427387904, 4)", f"({'1,' * 70})", "(" * 5000]


FIRST_KINDS = ("npy", "hdf5", "stats")  # whose numbered files stay what they were when kinds are added
ATTRIBUTE_KINDS = ("texts", "same-named", "netcdf")
KINDS = (*FIRST_KINDS, *ATTRIBUTE_KINDS, "exchange", "torch")
ATTRIBUTES = b"units columns labels gain class_ list_ utf8_ variable CLASS NAME DIMENSION_LIST REFERENCE_LIST _Netcdf4 _NCProp".split()


@dataclass(frozen=True)
class Original:
    """A valid file.

    Attributes
    ----------
    name : str
        Its suffix tells bn what it is.
    content : bytes
    kind : str
        One of KINDS.
    values : tuple of (int, int)
        Where the stored values begin and end, in bytes.
    checked : bool
        Whether the stored values are under a checksum.
    """

    name: str
    content: bytes
    kind: str
    values: tuple[int, int] = (0, 0)
    checked: bool = False


def originals(chosen: Collection[str] = FIRST_KINDS) -> list[Original]:
    """The files that are damaged, of these kinds, in an order that depends on the kinds alone."""
    x = np.random.default_rng(7).normal(3, 2, (40, 3))
    made = [*_npy(x), *_hdf5(x), _stats(x, "s.bn.h5", names=None), _stats(x, "n.bn.h5", names=("ä", "b", "longer"))]
    if "exchange" in chosen or "torch" in chosen:
        stats = bncli.fit(x, batch_size=16, names=("ä", "b", "longer"))
        files = {"exchange": kinds.exchange_files(stats, kinds.NAMES) if "exchange" in chosen else []}
        files["torch"] = kinds.exchange_files(stats, ["e.pt"]) if "torch" in chosen else []
        made += [Original(name, content, kind) for kind in files for name, content in files[kind]]
    for kind, files_of in (("texts", kinds.texts), ("same-named", kinds.same_named), ("netcdf", kinds.netcdf)):
        made += [Original(name, content, kind) for name, content in (files_of(x) if kind in chosen else [])]
    return [original for original in made if original.kind in chosen]


def _npy(x: npt.NDArray[np.float64]) -> list[Original]:
    arrays = {
        "f4.npy": x.astype("<f4"),
        "f8.npy": x.astype(">f8"),
        "fortran.npy": np.asfortranarray(x.astype("<f4")),
        "u2.npy": (x * 100).astype("<u2"),
        "f2.npy": x.astype("<f2").reshape(10, 3, 4)[:, :, 0].copy(),
    }
    made = []
    for name, array in arrays.items():
        out = io.BytesIO()
        np.lib.format.write_array(out, array, version=(2, 0) if name == "u2.npy" else (1, 0))
        content = out.getvalue()
        made.append(Original(name, content, "npy", (len(content) - array.nbytes, len(content))))
    return made


def _hdf5(x: npt.NDArray[np.float64]) -> list[Original]:
    f4 = x.astype("<f4")
    earliest: dict[str, Any] = {"libver": "earliest"}
    latest: dict[str, Any] = {"libver": "latest"}
    chunks = (16, 2)
    made = [
        _file("contiguous.h5", f4, earliest, {}),
        _file("contiguous2.h5", f4, latest, {}),
        _file("chunked.h5", x.astype(">f8"), earliest, {"chunks": chunks}),
        _file("gzip.h5", f4, earliest, {"chunks": chunks, "compression": "gzip"}),
        _file("sums.h5", f4, earliest, {"chunks": chunks, "shuffle": True, "fletcher32": True}),
        _file("all.h5", f4, latest, {"chunks": (8, 3), "compression": 4, "shuffle": True, "fletcher32": True}),
        _file("grows.h5", f4, latest, {"chunks": chunks, "maxshape": (None, 3), "compression": "gzip"}),
        _file("tree.h5", f4, latest, {"chunks": chunks, "maxshape": (None, None), "compression": "gzip"}),
        _file("lzf.h5", f4, earliest, {"chunks": chunks, "compression": "lzf", "fletcher32": True}),
        _file("block.h5", f4, {"userblock_size": 512}, {"chunks": chunks, "compression": "gzip"}),
    ]
    return made


def _file(name: str, x: npt.NDArray[Any], how: dict[str, Any], options: dict[str, Any]) -> Original:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        with h5py.File(path, "w", **how) as file:
            item = file.create_dataset("g/x", data=x, track_times=False, **options)
            item.attrs["feature_names"] = ["a", "bb", "ccc"]  # strings of variable length: in a heap
            item.attrs["scale_factor"] = 2.0
            file["g/names"] = ["a", "bb", "ccc"]
            file["alias"] = h5py.SoftLink("/g/x")
        with h5py.File(path, "r") as file:
            item = file["g/x"]
            if item.chunks:
                chunks = [item.id.get_chunk_info(i) for i in range(item.id.get_num_chunks())]
                places = [(c.byte_offset, c.byte_offset + c.size) for c in chunks]
                values = (min(a for a, _ in places), max(b for _, b in places))
                if values[1] - values[0] != sum(b - a for a, b in places):  # something lies between the chunks
                    values = max(places, key=lambda p: p[1] - p[0])
            else:
                values = (item.id.get_offset(), item.id.get_offset() + item.nbytes)
        checked = "compression" in options or "fletcher32" in options
        return Original(name, path.read_bytes(), "hdf5", values, checked and "userblock_size" not in how)


def _stats(x: npt.NDArray[np.float64], name: str, names: tuple[str, ...] | None) -> Original:
    return Original(name, bncli.fit(x, batch_size=16, names=names).to_bytes(), "stats")


def mutated(original: Original, others: list[Original], rng: np.random.Generator) -> tuple[bytes, bool]:
    """A damaged copy, and whether only stored values were changed, in place."""
    if original.kind in ("exchange", "torch") and rng.random() < 0.75:
        return kinds.lied(original.name, original.content, rng), False
    content = bytearray(original.content)
    if rng.random() < 0.1 and original.values[1]:
        for position in rng.integers(*original.values, int(rng.integers(1, 4))):
            content[position] ^= 1 << int(rng.integers(8))
        return bytes(content), True
    knowing = {"npy": [_npy_text, _npy_length, _flip_head], "hdf5": [_near_signature] * 3, "stats": [_near_signature]}
    knowing |= dict.fromkeys(ATTRIBUTE_KINDS, [_near_attribute] * 2 + [_near_signature])
    ways = BLIND + knowing.get(original.kind, []) * 2
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        ways[int(rng.integers(len(ways)))](content, rng, others)
    if original.kind in ("hdf5", *ATTRIBUTE_KINDS) and rng.random() < 0.7:
        _sum_again(content)
    if any(content == other.content for other in others):  # a whole other file in its place is no damage
        return original.content, False
    return bytes(content), False


def _at(content: bytearray, rng: np.random.Generator) -> int:
    return int(rng.integers(max(1, len(content))))


def _flip(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    for _ in range(int(rng.choice([1, 1, 2, 4, 16]))):
        if content:
            content[_at(content, rng)] ^= 1 << int(rng.integers(8))


def _extreme(content: bytearray, rng: np.random.Generator, others: list[Original], at: int | None = None) -> None:
    """A field of 1 to 8 bytes becomes a number at the edge of what fits."""
    size, at = int(rng.choice([1, 2, 4, 8])), _at(content, rng) if at is None else at
    value = EXTREMES[int(rng.integers(len(EXTREMES)))]
    content[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")


def _cut(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    del content[_at(content, rng) :]


def _insert(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    at = _at(content, rng)
    content[at:at] = rng.bytes(int(rng.choice([1, 2, 8, 100])))


def _remove(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    at = _at(content, rng)
    del content[at : at + int(rng.choice([1, 2, 8, 100]))]


def _overwrite(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    at, size = _at(content, rng), int(rng.choice([1, 4, 8, 64]))
    filling = (bytes(size), b"\xff" * size, rng.bytes(size))[int(rng.integers(3))]
    content[at : at + size] = filling


def _repeat(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    """A run of bytes over another place of the same file."""
    at, to, size = _at(content, rng), _at(content, rng), int(rng.choice([4, 8, 24, 96]))
    content[to : to + size] = content[at : at + size]


def _splice(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    """A run of bytes of another file over this one, or all from some place on."""
    other = others[int(rng.integers(len(others)))].content
    at = int(rng.integers(min(len(content), len(other)) or 1))
    size = int(rng.choice([8, 64, 512, 1 << 20]))
    content[at : at + size] = other[at : at + size]


def _near_signature(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    """A number at the edge, or a flipped bit, close behind the signature of a structure."""
    signature = SIGNATURES[int(rng.integers(len(SIGNATURES)))]
    found = [i for i in range(len(content)) if content.startswith(signature, i)] if signature in content else []
    start = found[int(rng.integers(len(found)))] if found else _at(content, rng)
    at = min(start + int(rng.integers(0, 96)), max(0, len(content) - 1))
    if rng.random() < 0.5:
        _extreme(content, rng, others, at)
    elif content:
        content[at] ^= 1 << int(rng.integers(8))


def _near_attribute(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    """A number at the edge, or a flipped bit, close before or behind the name of an attribute."""
    name = ATTRIBUTES[int(rng.integers(len(ATTRIBUTES)))]
    found = [match.start() for match in re.finditer(re.escape(name), content)]
    start = found[int(rng.integers(len(found)))] if found else _at(content, rng)
    at = min(max(0, start + int(rng.integers(-12, 64))), max(0, len(content) - 1))
    if rng.random() < 0.5:
        _extreme(content, rng, others, at)
    elif content:
        content[at] ^= 1 << int(rng.integers(8))


def _sum_again(content: bytearray) -> None:
    """Make the checksums of HDF5's newer superblock and object headers right, as one who means harm would."""
    ends = [44] if content[8:9] in (b"\x02", b"\x03") else []
    starts = [0] * len(ends)
    for match in re.finditer(rb"OHDR\x02(.)", content, re.DOTALL):
        flags, at = match[1][0], match.end() + 16 * bool(match[1][0] & 32) + 4 * bool(match[1][0] & 16)
        width = 1 << (flags & 3)
        starts.append(match.start())
        ends.append(at + width + int.from_bytes(content[at : at + width], "little"))
    for start, end in zip(starts, ends, strict=True):
        if end + 4 <= len(content):
            content[end : end + 4] = lookup3(bytes(content[start:end])).to_bytes(4, "little")


def lookup3(data: bytes) -> int:
    """Bob Jenkins' hash of bytes, with an initial value of 0, which HDF5 takes for checksums of its metadata."""

    def turned(x: int, k: int) -> int:
        return (x << k | x >> 32 - k) & mask

    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(data)) & mask
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    words += [0] * (-len(words) % 3)
    blocks = [words[i : i + 3] for i in range(0, len(words), 3)]
    for block in blocks[:-1]:
        a, b, c = (a + block[0]) & mask, (b + block[1]) & mask, (c + block[2]) & mask
        for k in (4, 6, 8, 16, 19, 4):
            a, c = ((a - c) & mask) ^ turned(c, k), (c + b) & mask
            a, b, c = b, c, a
    if not blocks:
        return c
    a, b, c = (a + blocks[-1][0]) & mask, (b + blocks[-1][1]) & mask, (c + blocks[-1][2]) & mask
    for k in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - turned(b, k)) & mask
        a, b, c = b, c, a
    return b


def _flip_head(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    for _ in range(int(rng.integers(1, 4))):
        if content:
            content[int(rng.integers(min(128, len(content))))] ^= 1 << int(rng.integers(8))


def _npy_length(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    _extreme(content, rng, others, int(rng.integers(6, 12)))


def _npy_text(content: bytearray, rng: np.random.Generator, others: list[Original]) -> None:
    """Another type, order or shape in the header; its length is made to fit, or not."""
    start = 10 if content[6:7] == b"\x01" else 12
    length = int.from_bytes(content[8:start], "little")
    descr = DESCRS[int(rng.integers(len(DESCRS)))] if rng.random() < 0.5 else "<f4"
    shape = SHAPES[int(rng.integers(len(SHAPES)))] if rng.random() < 0.7 else "(40, 3)"
    order = ("False", "True", "1", "None")[int(rng.choice([0, 0, 0, 1, 1, 2, 3]))]
    text = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}".encode("latin-1")
    text = text.ljust(min(length, 70_000) if rng.random() < 0.8 else 0)
    content[start : start + length] = text
    if rng.random() < 0.9:
        content[8:start] = min(len(text), (1 << 8 * (start - 8)) - 1).to_bytes(start - 8, "little")


BLIND: list[Callable[..., None]] = [_flip, _flip, _extreme, _extreme, _cut]
BLIND += [_insert, _remove, _overwrite, _repeat, _splice]
