"""Named arrays and attributes as one small HDF5 file with a digest. What they mean is not known here."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5i

from bncli.errors import InputError, printable, reason_of
from bncli.numerics.arrays import Array

Value = int | float | str | tuple[int, ...]
DIGEST = "digest"
ENDS = "_ends"
HEAD = 9  # bytes of an attribute message before its name, at most
SEAL = b"\nbn sha256 "
SEAL_BYTES = len(SEAL) + 64 + 1
INFLATED, RATIO = 64 << 20, 256  # a compressed dataset holds at most this many bytes, plus a factor of its size
LARGE = 64 << 20  # bytes; a smaller file is read before it is looked at
PADDING, SPARE = 4, 1 << 20  # texts are padded to one length up to this many times their bytes plus this many
SIGNATURE = b"\x89HDF\r\n\x1a\n"
NO_HDF5 = "it is not an HDF5 file; make one with 'bn fit' or 'bn import'"
HEAP = re.compile(rb"GCOL\x01\0\0\0")  # signature and version of a heap of texts
PLAIN = (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.STRING)
UNREADABLE = (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, AttributeError)  # from h5py


def pack(arrays: Mapping[str, Array], attributes: Mapping[str, Value], *, compressed: Collection[str] = ()) -> bytes:
    """Build an HDF5 file in memory and return its bytes.

    Parameters
    ----------
    arrays : name -> array
        Numbers, or UTF-8 byte strings (kind S). A name may hold folders: "population/mean".
    attributes : name -> int, float, str or tuple of int
        Kept on the root, with `digest`.
    compressed : names
        Of arrays of one axis that are stored compressed (gzip). `unpack` reads them by themselves.
    """
    with in_memory() as file:
        for name, array in arrays.items():
            is_text = array.dtype.kind == "S"
            values = array.astype(h5py.string_dtype("utf-8", array.dtype.itemsize)) if is_text else array
            filters = {"chunks": values.shape, "compression": "gzip"} if name in compressed else {}
            file.create_dataset(name, data=values, track_times=False, **filters)
        for name, value in attributes.items():
            file.attrs[name] = np.array(value, np.int64) if isinstance(value, tuple) else value
        file.attrs[DIGEST] = digest(arrays, attributes)
        file.flush()
        image: bytes = file.id.get_file_image()
    return sealed(image)


def in_memory() -> h5py.File:
    """A new HDF5 file in memory alone.

    HDF5 knows such a file by its name, and no second one of that name may be open: another thread may be making one.
    """
    return h5py.File(uuid.uuid4().hex, "w", driver="core", backing_store=False)


def unpack(image: bytes, where: str) -> tuple[dict[str, Array], dict[str, Value]]:
    """Read back what `pack` wrote: arrays and attributes, without the digest.

    Raises
    ------
    InputError
        When the bytes are not an HDF5 file written by `pack`, or do not match their digest. `where` names the file.
    """
    where = printable(where)
    image = unsealed(image, where)
    try:
        check_heaps(image)
        with h5py.File(h5py.h5f.open_file_image(image, flags=h5py.h5f.ACC_RDONLY)) as file:
            _check_digest_is_there(file, where)
            arrays = _arrays(file, len(image), where)
            for name in file.attrs:
                check_text(image, file.attrs.get_id(name))
            attributes = {printable(name): _attribute(file, name, where) for name in file.attrs}
    except UNREADABLE as error:
        reason = printable(reason_of(error))[:200] if SIGNATURE in image else NO_HDF5
        raise InputError(f"{where}: not a readable stats file: {reason}") from None
    found = attributes.pop(DIGEST)
    if found != digest(arrays, attributes):
        raise InputError(f"{where}: damaged: its content does not match its digest; use a copy, or fit again")
    return arrays, attributes


def is_packed(path: str) -> bool:
    """Whether a file is one that `pack` made, whole or damaged: by its seal, or by the digest in a copy of another tool."""
    try:
        if _is_sealed(path):
            return True
        with h5py.File(path, "r") as file:
            return DIGEST in file.attrs
    except UNREADABLE:
        return False


def check_file(path: str) -> None:
    """Raise InputError when a large file is not one that `pack` made, before it is read whole."""
    if _is_sealed(path) or os.path.getsize(path) < LARGE:
        return
    if not h5py.is_hdf5(path):
        raise InputError(f"{printable(path)}: not a readable stats file: {NO_HDF5}")
    try:
        with open(path, "rb"), h5py.File(path, "r") as file:
            _check_digest_is_there(file, printable(path))
    except UNREADABLE as error:
        raise InputError(f"{printable(path)}: not a readable stats file: {printable(error)[:200]}") from None


def digest(arrays: Mapping[str, Array], attributes: Mapping[str, Value]) -> str:
    """SHA-256 over name, shape, little-endian type and bytes of everything, in sorted order, in hexadecimal."""
    sha = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
        sha.update(json.dumps(["dataset", name, list(array.shape), little.dtype.str]).encode())
        sha.update(little.reshape(-1).view(np.uint8).data)
    for name, value in sorted(attributes.items()):
        # repr of a float names it exactly
        sha.update(json.dumps(["attribute", name, type(value).__name__, repr(value)]).encode())
    return sha.hexdigest()


def sealed(image: bytes) -> bytes:
    """An HDF5 file and a line behind it, which other tools pass over: the SHA-256 of its bytes.

    The digest is of the content, and survives a copy by another tool; but to check it HDF5 has to read the file, and
    over some damaged bytes it loops forever. The seal is checked first; a file without one is read all the same.
    """
    return image + (SEAL + hashlib.sha256(image).hexdigest().encode() + b"\n")


def _is_sealed(path: str) -> bool:
    """Whether a file ends in a seal, right or wrong."""
    with open(path, "rb") as content:
        content.seek(-min(os.path.getsize(path), SEAL_BYTES), os.SEEK_END)
        return SEAL in content.read()


def unsealed(content: bytes, where: str) -> bytes:
    """The HDF5 file without its seal; raises InputError where there is one, whole or damaged, that is not right."""
    image, seal, _ = content.rpartition(SEAL)
    if seal or resembles(content[-SEAL_BYTES:], SEAL):
        if content != sealed(image):
            raise InputError(f"{where}: damaged: its bytes do not match their checksum; use a copy, or make it again")
        return image
    return content


def resembles(found: bytes | str, mark: bytes | str) -> bool:
    """Whether most characters are those of a mark: a damaged checksum must not pass for a file without one.

    >>> resembles("bncli_sha2?6", "bncli_sha256"), resembles("population_mean", "bncli_sha256")
    (True, False)
    """
    return 2 * sum(one == other for one, other in zip(found, mark, strict=False)) > len(mark)


def check_heaps(content: bytes) -> None:
    """Raise ValueError when a file holds a damaged heap of texts."""
    for match in HEAP.finditer(content):
        size = int.from_bytes(content[match.end() : match.end() + 8], "little")
        check_heap(content[match.start() : match.start() + size])


def check_heap(heap: bytes) -> None:
    """Raise ValueError for a damaged heap of texts (GCOL), which makes libhdf5 2.0.0 loop forever.

    Layout: HDF5 file format specification, III.E: a header of 16 bytes with the size of the whole, then entries of
    index, count and size; index 0 is the space that is left, whose size counts its own header.
    """
    place = 16
    while place + 16 <= len(heap):
        index, size = struct.unpack_from("<H6xQ", heap, place)
        step = 16 + -(-size // 8) * 8 if index else size
        if step == 0 or place + step > len(heap):  # HDF5 adds in 64 bits, where a large size may come to nothing too
            raise ValueError("its heap of texts is damaged")
        place += step


def check_text(content: bytes, attribute: Any) -> None:
    """Raise ValueError when an attribute (h5py's AttrID) claims more bytes than the file has: HDF5 would make room first.

    Layout: HDF5 file format specification, IV.A.2.m (the attribute message: 8 or 9 bytes with the sizes of what follows,
    name, type, shape, values) and VI.B (a text among the values: the bytes that it claims, and its position).
    """
    kind, count = attribute.get_type(), math.prod(attribute.shape)
    claims = [count * kind.get_size()]
    if kind.get_class() == h5py.h5t.STRING and kind.is_variable_str():
        width = 8 + h5i.get_file_id(attribute).get_create_plist().get_sizes()[0]
        references = list(_values(content, bytes(attribute.name) + b"\0", count * width))
        claims = [sum(int.from_bytes(r[i : i + 4], "little") for i in range(0, len(r), width)) for r in references]
    if not claims or max(claims) > len(content):
        raise ValueError("an attribute claims more than the file holds")


def _values(content: bytes, name: bytes, size: int) -> Iterator[bytes]:
    """The values of every attribute message of this name, which ends in a NUL."""
    start = content.find(name, HEAD)
    while start >= 0:
        for head, versions in ((HEAD - 1, (1, 2)), (HEAD, (3,))):
            version, _, *sizes = struct.unpack_from("<BBHHH", content, start - head)
            if version in versions and sizes[0] == len(name):
                unit = 8 if version == 1 else 1  # each part is padded to it
                place = start + sum(-(-s // unit) * unit for s in sizes)
                yield content[place : place + size]
        start = content.find(name, start + 1)


def text_arrays(name: str, texts: Sequence[str], kind: str = "S") -> dict[str, Array]:
    """Texts as one array, padded to one length (kind S: UTF-8, U: NumPy's letters of 4 bytes).

    Where padding would take far more room than the texts, as one long name among thousands has it: their UTF-8 bytes, one
    text behind the other, as `name`, and where each ends as `name_ends`.
    """
    encoded = [text.encode() for text in texts]
    sizes = [len(text) for text in encoded]
    if len(sizes) * max(sizes, default=0) <= PADDING * sum(sizes) + SPARE:
        return {name: np.array(encoded if kind == "S" else list(texts))}
    return {name: np.frombuffer(b"".join(encoded), np.uint8), name + ENDS: np.cumsum(sizes)}


def texts_of(name: str, arrays: Mapping[str, Array], count: int) -> tuple[str, ...] | None:
    """Texts from the arrays of `text_arrays`; None where there are none.

    Raises
    ------
    ValueError
        When they are no such arrays, or not of `count` texts: found out before any text is made.
    """
    if name not in arrays:
        return None
    values, ends = arrays[name], arrays.get(name + ENDS)
    if (values if ends is None else ends).shape != (count,):
        raise ValueError(f"there are not {count} texts in {name}")
    if ends is None:
        if values.dtype.kind not in "SU":
            raise ValueError(f"{name} does not hold texts")
        if values.dtype.kind == "U" and values.size and letters(values).max() > sys.maxunicode:
            raise ValueError(f"{name} has a letter outside of Unicode")
        return tuple(text.decode() if isinstance(text, bytes) else text for text in values.tolist())
    starts = np.concatenate([[0], ends[:-1]])
    if values.dtype != np.uint8 or values.ndim != 1 or ends.dtype != np.int64 or (starts > ends).any():
        raise ValueError(f"{name} does not hold texts")
    content = values.tobytes()
    if count and ends[-1] != len(content):
        raise ValueError(f"the texts in {name} are not all there")
    return tuple(content[start:end].decode() for start, end in zip(starts.tolist(), ends.tolist(), strict=True))


def letters(texts: npt.NDArray[np.str_]) -> npt.NDArray[np.uint32]:
    """The numbers of the letters of an array of texts (kind U), in one dimension; NumPy does not look whether there are such."""
    whole = np.ascontiguousarray(texts).reshape(-1)
    return whole.view(np.dtype(np.uint32).newbyteorder(whole.dtype.byteorder))


def _check_digest_is_there(file: h5py.File, where: str) -> None:
    if DIGEST not in file.attrs:
        raise InputError(
            f"{where}: an HDF5 file, but not a stats file (it has no digest); make one with 'bn fit' or 'bn import'"
        )


def _arrays(file: h5py.File, size: int, where: str) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    left = size  # bytes of a file: several datasets may claim the same

    def visit(name: str | bytes, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(name, bytes):  # not UTF-8
            raise InputError(f"{where}: damaged: it holds {printable(name)}; use a copy, or fit again")
        nonlocal left
        if isinstance(item, h5py.Dataset):
            left -= item.id.get_storage_size()
            if not _fits(item) or left < 0:
                raise InputError(f"{where}: its dataset {printable(name)} is not stored as bn stores it; fit again")
            arrays[name] = item[...].astype(item.dtype, copy=False)

    file.visititems(visit)
    return arrays


def _fits(item: h5py.Dataset) -> bool:
    """Whether a dataset holds no more than its bytes can: pack writes plain ones, or one chunk of deflated bytes."""
    stored: int = item.id.get_storage_size()
    if item.is_virtual or item.external:
        return False
    if item.chunks is None:
        return bool(item.nbytes == stored)
    alone = item.chunks == item.shape and item.id.get_create_plist().get_nfilters() == 1
    return bool(alone and item.compression == "gzip" and item.nbytes <= INFLATED + RATIO * stored)


def _attribute(file: h5py.File, name: str, where: str) -> Value:
    if file.attrs.get_id(name).get_type().get_class() not in PLAIN:  # h5py crashes over a damaged type
        raise InputError(
            f"{where}: damaged, or not written by bn: its attribute {printable(name)} is no number or text"
        )
    value = file.attrs[name]
    if isinstance(value, np.ndarray):
        return tuple(int(n) for n in value)
    plain: Value = value.item() if isinstance(value, np.generic) else value
    return plain
