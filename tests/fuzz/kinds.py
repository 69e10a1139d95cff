"""More kinds of files to damage: texts of every padding, attributes of one name, netCDF-4, and exchange files whose counts lie."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5a, h5s, h5t

import bncli
from bncli import exchange
from bncli.errors import UsageError

# attributes that speak of the stored numbers
OF_STORED = (
    "scale_factor",
    "add_offset",
    "_FillValue",
    "missing_value",
    "valid_range",
    "valid_min",
    "valid_max",
    "_Unsigned",
)

LIES = (
    0,
    1,
    2,
    4,
    255,
    65536,
    10**7,
    120 * 10**6,
    120 * 10**6,
    *(2**b - d for b in (31, 32, 53, 63, 64) for d in (0, 1)),
    10**30,
    -1,
    -3,
)
PADDINGS = {"nullterm": h5t.STR_NULLTERM, "nullpad": h5t.STR_NULLPAD, "spacepad": h5t.STR_SPACEPAD}
NAMES = [f"e.{suffix}" for suffix in ("json", "npz", "csv", "safetensors", "weights.h5", "onnx")]
GROWING = {"chunks": (1024,), "maxshape": (None,)}
HDF5_DEFAULTS = {"h5py": ("v108", "v108"), "old": "earliest", "new": "latest"}


@contextlib.contextmanager
def made(name: str, **options: Any) -> Iterator[tuple[h5py.File, list[bytes]]]:
    """Write an HDF5 file; its bytes are in the list afterwards."""
    content: list[bytes] = []
    with tempfile.TemporaryDirectory() as folder:
        with h5py.File(Path(folder) / name, "w", **options) as file:
            yield file, content
        content.append((Path(folder) / name).read_bytes())


def put(item: Any, name: str, texts: Any, padding: str, room: int = 0, utf8: bool = False) -> None:
    """Write texts of a fixed length, with `room` bytes to spare, as a C program does: with none a text fills its type."""
    values = np.array(texts, np.bytes_)
    kind = h5t.C_S1.copy()
    kind.set_size(max(1, values.dtype.itemsize) + room)
    kind.set_strpad(PADDINGS[padding])
    kind.set_cset(h5t.CSET_UTF8 if utf8 else h5t.CSET_ASCII)
    space = h5s.create_simple(values.shape) if values.shape else h5s.create(h5s.SCALAR)
    stored = np.char.ljust(values, kind.get_size(), b" ") if padding == "spacepad" else values
    h5a.create(item.id, name.encode(), kind, space).write(stored.astype(f"S{kind.get_size()}"), mtype=kind)


def texts(x: npt.NDArray[Any]) -> list[tuple[str, bytes]]:
    """Text attributes of all paddings, on the root, a group and datasets; few of them, and so many that HDF5 keeps them apart."""
    files = []
    for name, libver in HDF5_DEFAULTS.items():
        with made("t.h5", libver=libver) as (file, content):
            file.create_dataset("g/x", data=x.astype("<f4"), track_times=False)
            file["g/other"] = np.arange(5)
            file["g/names"] = ["a", "bb", "ccc"]
            file.create_dataset("g/filled", data=["u", "v"], dtype=h5py.string_dtype(), fillvalue="n/a")
            for item in (file, file["g"], file["g/x"], file["g/other"]):
                for padding in PADDINGS:
                    put(item, f"units_{padding}", b"K", padding)
                    put(item, f"class_{padding}", b"double", padding, room=3)
                    put(item, f"list_{padding}", [[b"u10", b"v"], [b"t2m", b""]], padding)
                    put(item, f"utf8_{padding}", "µm".encode(), padding, utf8=True)
                item.attrs["variable"] = "text"
                item.attrs["variables"] = ["text", "", "ä", "longer than the others"]
                item.attrs["nothing"] = h5py.Empty("S5")
            put(file["g/x"], "columns", [b"u10", b"v10", b"t2m"], "nullterm")
        files.append((f"texts-{name}.h5", content[0]))
    return files


def same_named(x: npt.NDArray[Any]) -> list[tuple[str, bytes]]:
    """Attributes of one name that differ in length and type from dataset to dataset."""
    files = []
    for name, libver in HDF5_DEFAULTS.items():
        with made("s.h5", libver=libver) as (file, content):
            file["g/before"], file["g/names"] = np.arange(5), ["a", "bb", "ccc"]
            file.create_dataset("g/x", data=x.astype("<f4"), track_times=False)
            file["g/zbehind"] = np.arange(5)
            before, here, behind = file["g/before"], file["g/x"], file["g/zbehind"]
            before.attrs["columns"], here.attrs["columns"] = ["a", "b"], ["a", "bb", "ccc"]
            behind.attrs["columns"] = [f"column {i}" for i in range(40)]
            put(before, "units", b"microseconds", "nullterm")
            here.attrs["units"], behind.attrs["units"] = "counts", 7.5
            before.attrs["labels"], here.attrs["labels"] = np.arange(1000.0) + 0.1, ["one"]
            put(behind, "labels", [b"x"] * 30, "spacepad")
            before.attrs["gain"], here.attrs["gain"] = "text", np.arange(100, dtype="u1")
        files.append((f"same-{name}.h5", content[0]))
    return files


def netcdf(x: npt.NDArray[Any]) -> list[tuple[str, bytes]]:
    """As netCDF-C writes them: dimensions as scales, its hidden attributes, texts with a fill value."""
    files = []
    packed = {"scale_factor": 0.01, "add_offset": 273.15, "_FillValue": np.array([-32767], "i2")}
    for name, dtype, options, attributes in (
        ("plain", "<f4", {}, {}),
        ("unlimited", "<f4", {"chunks": (16, 3), "maxshape": (None, 3), "compression": "gzip"}, {}),
        ("packed", "<i2", {"chunks": (40, 3), "shuffle": True, "compression": "gzip"}, packed),
        ("fill", ">f8", {}, {"_FillValue": np.array([1e20]), "missing_value": 1e20, "valid_min": np.array([-1e9])}),
    ):
        with made("n.nc", libver=("v108", "v108"), track_order=True) as (file, content):
            _netcdf(file, (x * 100).astype(dtype) if dtype == "<i2" else x.astype(dtype), options, attributes)
        files.append((f"{name}.nc", content[0]))
    return files


def _netcdf(file: h5py.File, x: npt.NDArray[Any], options: dict[str, Any], attributes: dict[str, Any]) -> None:
    put(file, "_NCProperties", b"version=2,netcdf=4.9.2,hdf5=1.14.0", "nullterm")
    put(file, "title", b"Test title", "nullterm")
    time = file.create_dataset(
        "time", data=np.arange(len(x), dtype="i4"), maxshape=options.get("maxshape", (None,))[:1]
    )
    nameless = file.create_dataset("c", data=np.zeros(x.shape[1], ">f4"))
    time.make_scale("time")
    nameless.make_scale(f"This is a netCDF dimension but not a netCDF variable.{x.shape[1]:>10}")
    variable = file.create_dataset("g/x", data=x, track_times=False, fillvalue=np.array(0, x.dtype), **options)
    names = file.create_dataset("g/names", data=["a", "bb", "ccc"], dtype=h5py.string_dtype(), fillvalue="n/a")
    put(variable, "units", b"K", "nullterm")
    put(time, "units", b"hours since 2000-01-01", "nullterm")
    for number, (scale, item, axis) in enumerate([(time, variable, 0), (nameless, variable, 1), (nameless, names, 0)]):
        item.dims[axis].attach_scale(scale)
        scale.attrs["_Netcdf4Dimid"] = np.int32(min(number, 1))
    variable.attrs["_Netcdf4Coordinates"] = np.array([0, 1], "i4")
    variable.attrs["_Netcdf4Dimid"] = np.int32(0)
    variable.attrs.update(attributes)


def exchange_files(stats: bncli.Stats, names: list[str]) -> list[tuple[str, bytes]]:
    """What `bn export` writes, in every format whose package is here."""
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with contextlib.suppress(UsageError):  # a missing package
                exchange.write(stats, str(Path(folder) / name))
                files.append((name, (Path(folder) / name).read_bytes()))
    return files


def lied(name: str, content: bytes, rng: np.random.Generator) -> bytes:
    """The same file with one count, shape or size that is not true; checksums of bn's own are made right, or left out."""
    return LIARS[name.partition(".")[2]](content, rng, LIES[int(rng.integers(len(LIES)))])


def _one(rng: np.random.Generator, options: list[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _json(content: bytes, rng: np.random.Generator, lie: int) -> bytes:
    record = json.loads(content)
    told = record.pop("sha256")
    key = _one(
        rng, ["num_features", "num_features", "index", "features", "num_parameters", "batch_size", "num_samples"]
    )
    if key == "index":
        _one(rng, record["features"])["index"] = lie
    elif key == "features":
        record["features"] = record["features"] * 2 if rng.random() < 0.5 else record["features"][:-1]
    else:
        record[key] = float(lie) if rng.random() < 0.2 else lie
    right = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps(record | _one(rng, [{}, {"sha256": right}, {"sha256": right}, {"sha256": told}])).encode()


def _csv(content: bytes, rng: np.random.Generator, lie: int) -> bytes:
    head, *rows = [line.split(",") for line in content.decode().splitlines()]
    places = [i for i, title in enumerate(head) if title in ("num_features", "index", "num_samples", "batch_size")]
    place = _one(rng, places)
    for row in rows if rng.random() < 0.7 else rows[:1]:
        row[place] = str(lie)
    if rng.random() < 0.2:
        rows = rows * 2
    return "".join(",".join(row) + "\n" for row in [head, *rows]).encode()


def _npz(content: bytes, rng: np.random.Generator, lie: int) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = _one(rng, [*members, "name.npy", "name.npy"])
    shape = _one(rng, [f"({lie},)", f"({lie}, 0)", f"(0, {lie})", f"({lie}, {lie})", "(3,)", "()"])
    descr = _one(rng, ["<f8", "<f8", "<U0", "<U1", "|S0", "|V0", "<U268435455"])
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    data = _one(rng, [b"", b"", b"\xff" * 12, bytes(24), members.get(name, b"")[-24:]])
    members[name] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", int(_one(rng, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        for member, held in members.items():
            archive.writestr(member, held)
    return out.getvalue()


def _safetensors(content: bytes, rng: np.random.Generator, lie: int) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    entry = header[_one(rng, [key for key in header if key != "__metadata__"])]
    key = _one(rng, ["shape", "shape", "data_offsets", "dtype", "length"])
    if key == "shape":
        entry["shape"] = _one(rng, [[lie], [lie, lie], [lie, 0], [0, lie], []])
    elif key == "data_offsets":
        entry["data_offsets"][int(rng.integers(2))] = lie
    elif key == "dtype":
        entry["dtype"] = _one(rng, [t for t in ("F32", "I64", "BOOL", "BF16", "F8_E4M3") if t != entry["dtype"]])
    text = json.dumps(header).encode()
    told = lie % (1 << 64) if key == "length" else len(text)
    return told.to_bytes(8, "little") + text + data


def _keras(content: bytes, rng: np.random.Generator, lie: int) -> bytes:
    """Shapes that claim more than is stored, in every layout that costs nothing."""
    claim = min(max(lie, 0), 2**58)
    with tempfile.NamedTemporaryFile(suffix=".h5") as place:
        Path(place.name).write_bytes(content)
        with h5py.File(place.name, "a") as file:
            found: list[str] = []
            file.visititems(lambda path, item: found.append(path) if isinstance(item, h5py.Dataset) else None)
            for path in found if rng.random() < 0.5 else [_one(rng, found)]:
                del file[path]
                options = _one(rng, [{}, GROWING, {**GROWING, "compression": "gzip"}])
                file.create_dataset(path, (claim,), _one(rng, ["f4", "f8", "i8", "S1"]), **options)
        return Path(place.name).read_bytes()


def _onnx(content: bytes, rng: np.random.Generator, lie: int) -> bytes:
    import onnx

    model = onnx.load_from_string(content)
    tensor = _one(rng, list(model.graph.initializer))
    way = _one(rng, ["dims", "dims", "rank", "raw", "type"])
    number = (lie + 2**63) % 2**64 - 2**63
    if way == "dims":
        tensor.dims[0] = number
    elif way == "rank":
        tensor.dims.extend([number, int(rng.integers(3))])
    elif way == "raw":
        tensor.raw_data = tensor.raw_data[: int(rng.integers(len(tensor.raw_data)))]
    else:
        tensor.data_type = abs(lie) % 30 or 2 if abs(lie) % 30 != tensor.data_type else 11
    return bytes(model.SerializeToString())


def _torch(content: bytes, rng: np.random.Generator, lie: int) -> bytes:
    """A view that repeats one value, and sizes in the pickle that its storages do not have."""
    import torch

    held = torch.load(io.BytesIO(content), weights_only=True)
    out, key = io.BytesIO(), _one(rng, [k for k, v in held.items() if v.ndim])
    if rng.random() < 0.5:
        held[key] = torch.zeros(1).expand(2**40 if lie == -3 else min(abs(lie), 2**40))
        torch.save(held, out)
        return out.getvalue()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as copy:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("data.pkl"):  # BININT1 3, the size of a storage or a tensor, becomes LONG1 or BININT
                places = [i for i in range(len(data) - 1) if data[i : i + 2] == b"K\x03"]
                at = _one(rng, places)
                data = data[:at] + b"\x8a\x09" + (lie % 2**63).to_bytes(9, "little") + data[at + 2 :]
            copy.writestr(name, data)
    return out.getvalue()


LIARS: dict[str, Callable[[bytes, np.random.Generator, int], bytes]] = {
    "json": _json,
    "csv": _csv,
    "npz": _npz,
    "safetensors": _safetensors,
    "weights.h5": _keras,
    "onnx": _onnx,
    "pt": _torch,
}


def altered(source: str, output: str, dataset: str, *, everything: bool) -> list[str]:
    """Which attributes of the dataset in `output`, or of all objects, are not those of `source`, byte for byte in their own type.

    Those of the stored numbers (`scale_factor` and the like) have to be missing, no others.
    """
    found, skip = [], OF_STORED
    with h5py.File(source, "r") as before, h5py.File(output, "r") as after:
        paths = ["/"]
        before.visit(paths.append)
        for path in paths if everything else [dataset]:
            if path not in after:
                found.append(f"{path} is missing")
                continue
            one, other = _attributes(before[path]), _attributes(after[path])
            found += [f"{path}@{name}" for name in one if name not in skip and other.get(name) != one[name]]
    return found


def _attributes(item: Any) -> dict[str, Any]:
    """Attributes but references, and what netCDF and the dimension scales of HDF5 say of other objects."""
    found: dict[str, Any] = {}
    for name in item.attrs:
        attribute = h5a.open(item.id, name.encode())
        kind = attribute.get_type()
        if kind.get_class() == h5t.STRING and not kind.is_variable_str():
            space = attribute.get_space()
            there = space.get_simple_extent_type() != h5s.NULL
            raw = np.empty(space.get_simple_extent_dims() if there else (0,), f"S{kind.get_size()}")
            if there:
                attribute.read(raw, mtype=kind)
            found[name] = (kind.encode(), raw.tobytes())
        elif kind.get_class() in (h5t.STRING, h5t.FLOAT, h5t.INTEGER):
            found[name] = repr(item.attrs[name])
    hidden = ("CLASS", "NAME", "_Netcdf4Dimid", "_Netcdf4Coordinates", "DIMENSION_LABELS")
    return {name: value for name, value in found.items() if name not in hidden}


def dangling(output: str) -> list[str]:
    """What a netCDF library would stumble over: references to nothing, dimensions that are not there, texts that cannot be read."""
    found: list[str] = []
    with h5py.File(output, "r") as file:
        items: dict[str, Any] = {}
        file.visititems(lambda path, item: items.setdefault(path, item) and None)
        scales = {
            int(i.attrs.get("_Netcdf4Dimid", -1)) for i in items.values() if i.attrs.get("CLASS") == b"DIMENSION_SCALE"
        }
        for path, item in items.items():
            for name in ("DIMENSION_LIST", "REFERENCE_LIST"):
                held = np.atleast_1d(item.attrs[name]).tolist() if name in item.attrs else []
                references = [r for part in held for r in (part if name == "DIMENSION_LIST" else [part[0]])]
                found += [f"{path}@{name} refers to nothing" for r in references if not _refers(file, r)]
            if set(np.atleast_1d(item.attrs.get("_Netcdf4Coordinates", []))) - scales:
                found.append(f"{path}@_Netcdf4Coordinates without dimensions")
            if "_Netcdf4Dimid" in item.attrs and item.attrs["_Netcdf4Dimid"] not in scales:
                found.append(f"{path}@_Netcdf4Dimid without dimension")
            if isinstance(item, h5py.Dataset) and item.dtype.kind == "O":
                item[()]
    return found


def _refers(file: h5py.File, reference: Any) -> bool:
    try:
        return bool(reference and file[reference])
    except (KeyError, ValueError, RuntimeError):
        return False
