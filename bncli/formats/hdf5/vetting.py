"""What is in an HDF5 file, and what of it bn reads: path, type and filters are vetted before any value is read."""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import h5py
from h5py import h5d, h5g, h5l, h5o, h5p, h5s, h5z

from bncli.errors import InputError, UsageError, printable
from bncli.formats.address import natural_key
from bncli.formats.hdf5.file import hdf5_errors, open_file
from bncli.formats.hdf5.filters import Filter
from bncli.formats.hdf5.matlab import mark_of_empty
from bncli.formats.hdf5.sparse import MAIN, is_sparse, parts_marked, refusal, sparse_groups
from bncli.formats.hdf5.types import COMPOUND, type_of
from bncli.formats.source import check_shape
from bncli.numerics.arrays import DType

UNREADABLE = "cannot be opened; the file is damaged or the disk failed to read it"
MOST_LINKS = 40  # as many soft links in a row as Linux follows
NO_SAMPLES, NO_FEATURES = "no samples", "no features"
EMPTY = "an empty array"
NO_VALUES, VIRTUAL, EXTERNAL = "without values", "virtual", "stored in an external file"
SHOWN = 20  # candidates in a message

# Third-party filters people meet: id -> (name, package that brings it). The ids are registered with The HDF Group
KNOWN_FILTERS = {
    h5z.FILTER_DEFLATE: ("gzip", "an h5py built with zlib"),
    h5z.FILTER_SHUFFLE: ("shuffle", ""),
    h5z.FILTER_FLETCHER32: ("fletcher32", ""),
    h5z.FILTER_SZIP: ("szip", "an h5py built with libaec"),
    h5z.FILTER_NBIT: ("nbit", ""),
    h5z.FILTER_SCALEOFFSET: ("scale-offset", ""),
    h5z.FILTER_LZF: ("lzf", "h5py"),
    307: ("bzip2", "hdf5plugin"),
    32001: ("blosc", "hdf5plugin"),
    32004: ("lz4", "hdf5plugin"),
    32008: ("bitshuffle", "hdf5plugin"),
    32013: ("zfp", "hdf5plugin"),
    32015: ("zstd", "hdf5plugin"),
    32017: ("sz", "hdf5plugin"),
    32018: ("fcidecomp", "hdf5plugin"),
    32024: ("sz3", "hdf5plugin"),
    32026: ("blosc2", "hdf5plugin"),
    32028: ("sperr", "hdf5plugin"),
}


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset of a file, for `bn ls` and for lists of candidates.

    Attributes
    ----------
    path : str
        Absolute, as "/x".
    shape : tuple of int
        Empty for a single value.
    dtype : str
        Readable: "float32", "big-endian int16", "string".
    chunks : tuple of int or None
    compression : str
        "" or, say, "gzip-4, shuffle, fletcher32".
    problem : str
        "" when bn can fit it, else the reason in a few words.
    numeric : bool
        Whether its type and shape are those of an array of real numbers, and it is no part of a sparse matrix.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...] | None
    compression: str
    problem: str
    numeric: bool = True


def is_hdf5(path: str) -> bool:
    """Tell whether a file carries HDF5's signature, also behind a user block."""
    # isfile first: looking into a FIFO would wait for a writer
    return os.path.isfile(path) and bool(h5py.is_hdf5(path))


def text_of(name: bytes) -> str:
    """Return a name from a file as text; what is not UTF-8 survives the way back."""
    return name.decode("utf-8", "surrogateescape")


def name_bytes(path: str) -> bytes:
    """Return a path or name as a file holds it; undoes `text_of`."""
    return path.encode("utf-8", "surrogateescape")


def hard_links(group: h5g.GroupID, where: str, *, natural_order: bool) -> list[bytes]:
    """Return the names of a group's hard links, in natural order or the file's; soft and external links are left out."""
    with hdf5_errors(where, "a group cannot be listed"):
        names = [bytes(n) for n in group]
        hard = [n for n in names if group.links.get_info(n).type == h5l.TYPE_HARD]
    return sorted(hard, key=lambda n: natural_key(text_of(n))) if natural_order else hard


def remembers_order(group: h5g.GroupID) -> bool:
    """Tell whether a group knows in which order its members were made; netCDF-4 writes such, and takes no others."""
    return bool(group.get_create_plist().get_link_creation_order() & h5p.CRT_ORDER_TRACKED)


def walk(
    root: h5g.GroupID, where: str, *, natural_order: bool = True, damaged: list[tuple[str, str]] | None = None
) -> Iterator[tuple[str, Any, str]]:
    """Yield (path, object, path seen first) of all that hangs under a group by hard links, groups before their members.

    An object met again under another path is yielded with the path it was seen under first, and not entered again,
    so that cycles end. An object that cannot be opened raises InputError; where there is a list `damaged`, its path and
    what is wrong are put there instead.
    """
    seen = {identity(root): "/"}
    todo = [("/", root, name) for name in reversed(hard_links(root, where, natural_order=natural_order))]
    while todo:
        prefix, group, name = todo.pop()
        path = prefix + text_of(name)
        try:
            with hdf5_errors(where, f"{printable(path)} {UNREADABLE}"):
                item = h5o.open(group, name)
                first = seen.setdefault(identity(item), path)
        except InputError as error:
            if damaged is None:
                raise
            damaged.append((path, str(error).partition(f"{printable(path)} ")[2]))
            continue
        yield path, item, first
        if first == path and isinstance(item, h5g.GroupID):
            names = hard_links(item, where, natural_order=natural_order)
            todo += [(f"{path}/", item, n) for n in reversed(names)]


def identity(item: Any) -> tuple[Any, Any]:
    """Return what identifies an object among all objects of the open files."""
    info = h5g.get_objinfo(item)  # h5o.get_info also walks the chunk index, and crashes over a damaged one
    return info.fileno, info.objno


def open_object(file: h5py.File, path: str, where: str) -> Any:
    """Open the object at a path, every component of which is a hard link or a soft link that stays in the file.

    Raises
    ------
    InputError
        At an external link, a soft link that leads nowhere or in a circle, or what cannot be read.
    LookupError
        When there is nothing of that name.
    """
    root = here = h5g.open(file.id, b"/")
    todo = name_bytes(path).split(b"/")[::-1]
    soft: list[str] = []
    while todo:
        name = todo.pop()
        if name in (b"", b"."):
            continue
        with hdf5_errors(where, f"{printable(text_of(name))} {UNREADABLE}"):
            kind = here.links.get_info(name).type if isinstance(here, h5g.GroupID) and here.links.exists(name) else None
            if kind == h5l.TYPE_HARD:
                here = h5o.open(here, name)
            elif kind == h5l.TYPE_SOFT:
                target = here.links.get_val(name)
                soft.append(f"{printable(text_of(name))} -> {printable(text_of(target))}")
                here = root if target.startswith(b"/") else here
                todo += target.split(b"/")[::-1]
        if kind is None and soft:
            raise InputError(f"{where}: the soft link {soft[-1]} leads nowhere")
        if kind is None:
            raise LookupError(path)
        if kind not in (h5l.TYPE_HARD, h5l.TYPE_SOFT):
            raise InputError(
                f"{where}: {printable(text_of(name))} is a link to another file, which bn does not follow; "
                "name that file itself"
            )
        if len(soft) > MOST_LINKS:
            raise InputError(f"{where}: the soft link {soft[0]} leads in a circle")
    return here


def open_dataset(file: h5py.File, path: str, dataset: str) -> h5d.DatasetID:
    """Open a dataset by its path, or say what there is instead.

    Raises
    ------
    InputError
        When there is none, or the way to it leaves the file.
    UsageError
        When the path is a group that holds numeric datasets.
    """
    where = f"{printable(path)}::{printable(dataset)}"
    try:
        item = open_object(file, dataset, where)
    except LookupError:
        raise InputError(_no_such_dataset(file, path, dataset)) from None
    if isinstance(item, h5d.DatasetID):
        return item
    if not isinstance(item, h5g.GroupID):
        raise InputError(f"{where}: is a named type, not a dataset")
    prefix = dataset.rstrip("/") + "/"
    members = [i for i in describe_all(file, path) if i.path.startswith(prefix)]
    inside = [i for i in members if i.numeric]
    sparse = [dataset] if is_sparse(item) else sorted(sparse_groups(members))
    if sparse and (not inside or is_sparse(item)):
        raise refusal(path, sparse[0])
    if not inside:
        raise InputError(f"{where}: is a group without numeric datasets; `bn ls {printable(path)}` lists what there is")
    raise UsageError(f"{where}: is a group; name one of its datasets:\n{listing(path, inside)}")


def _no_such_dataset(file: h5py.File, path: str, dataset: str) -> str:
    infos = describe_all(file, path)
    close = difflib.get_close_matches(dataset, [i.path for i in infos], n=1)
    near = [i for i in infos if close and i.path == close[0]]
    start = f"{printable(path)}: has no dataset {printable(dataset)}"
    if near:
        return f"{start}; did you mean {printable(path)}::{printable(near[0].path)}?"
    return f"{start}; it has:\n{listing(path, infos)}" if infos else f"{start}, nor any other"


def listing(path: str, infos: list[DatasetInfo]) -> str:
    """Return one line per dataset: the address to type, its shape, its type, and why it cannot be fitted."""
    addresses = [f"{printable(path)}::{printable(i.path)}" for i in infos[:SHOWN]]
    width = max(map(len, addresses))
    lines = [
        f"  {a:<{width}}  {i.shape}  {i.dtype}{f'  ({i.problem})' * (i.problem not in ('', i.dtype))}"
        for a, i in zip(addresses, infos, strict=False)
    ]
    lines += [f"  … and {len(infos) - SHOWN} more: `bn ls {printable(path)}`"] if len(infos) > SHOWN else []
    return "\n".join(lines)


def list_datasets(path: str) -> list[DatasetInfo]:
    """Return every dataset that hard links lead to, once each, in natural order of their paths; and what is damaged."""
    with hdf5_errors(printable(path), UNREADABLE), open_file(path) as (file, _):
        return describe_all(file, path, damaged=[])


def choose_dataset(path: str) -> tuple[str, int]:
    """Return the path of the only numeric dataset of two or more dimensions that has values, and the number of other arrays.

    Raises
    ------
    UsageError
        When there is none such or more than one, with the numeric datasets to choose from.
    InputError
        When nothing in the file is numeric, or its matrix is sparse.
    """
    with hdf5_errors(printable(path), UNREADABLE), open_file(path) as (file, _):
        everything = describe_all(file, path)
    numeric = [i for i in everything if i.numeric]
    infos = [i for i in numeric if i.problem not in (NO_SAMPLES, NO_FEATURES)]
    tables = [i for i in infos if len(i.shape) > 1]
    sparse = sparse_groups(everything)
    if MAIN in sparse or (sparse and not tables):
        rest = f"\nOr name a dense dataset:\n{listing(path, tables)}" if tables else ""
        raise refusal(path, MAIN if MAIN in sparse else min(sparse), rest)
    if len(tables) == 1:
        return tables[0].path, len(infos) - 1 + len(sparse)
    if not infos and len(numeric) == 1:  # its reader reports what it lacks
        return numeric[0].path, 0
    if not infos:
        raise InputError(f"{printable(path)}: {_nothing(everything)}; `bn ls {printable(path)}` lists what there is")
    found = f"{len(tables)} numeric datasets" if tables else "no numeric dataset"
    raise UsageError(
        f"{printable(path)}: holds {found} of two or more dimensions; name one, as in "
        f"{printable(path)}::{printable((tables or infos)[0].path)}\n{listing(path, sorted(infos, key=_few_axes))}"
    )


def _nothing(infos: list[DatasetInfo]) -> str:
    """Say that nothing is numeric, and what there is instead where that is a table of columns."""
    columns = [i for i in infos if i.dtype == COMPOUND]
    if not columns:
        return "holds no numeric dataset" if not any(i.numeric for i in infos) else "holds only empty datasets"
    return (
        f"holds no numeric dataset: {printable(columns[0].path)} is a table of columns (compound), which bn does not read; "
        "write the columns that count as one array"
    )


def _few_axes(info: DatasetInfo) -> bool:
    return len(info.shape) < 2


def describe_all(file: h5py.File, path: str, damaged: list[tuple[str, str]] | None = None) -> list[DatasetInfo]:
    """Return what `list_datasets` does, of an open file; see `walk` for what is damaged."""
    where = printable(path)
    found = walk(h5g.open(file.id, b"/"), where, damaged=damaged)
    infos = [describe(o, at, where) for at, o, first in found if first == at and isinstance(o, h5d.DatasetID)]
    infos += [DatasetInfo(at, (), "unknown", None, "", why, False) for at, why in damaged or ()]
    tables = {i.path for i in infos if i.dtype == COMPOUND}
    return sorted((_named_index(i, tables) for i in parts_marked(infos)), key=lambda i: natural_key(i.path))


def _named_index(info: DatasetInfo, tables: set[str]) -> DatasetInfo:
    """Describe an array of an index that PyTables keeps for /group/table in /group/_i_table as what it is: no data."""
    for match in re.finditer("/_i_([^/]+)/", info.path):
        owner = f"{info.path[: match.start()]}/{match[1]}"
        if owner in tables:
            return replace(info, problem=f"part of the index of the table {printable(owner)}", numeric=False)
    return info


def describe(item: h5d.DatasetID, at: str, where: str) -> DatasetInfo:
    """Describe one dataset without reading any of its values."""
    with hdf5_errors(where, f"{printable(at)} cannot be read; the file is damaged"):
        plist, kind = item.get_create_plist(), item.get_type()
        extent, shape = _extent(item, plist)
        chunks = tuple(plist.get_chunk()) if plist.get_layout() == h5d.CHUNKED else None
        filters = filters_of(item)
        dtype, words = type_of(kind)
        numeric = dtype is not None and extent == h5s.SIMPLE
        problem = "" if dtype is not None else words
        problem = problem or _extent_problem(extent, shape) or storage_problem(item) or missing_filter(filters)
        if mark := mark_of_empty(item):
            problem, numeric = f"{EMPTY} ({mark}): the numbers in it are its shape, not values", False
    return DatasetInfo(at, shape, words, chunks, _compression(filters), problem, numeric)


def _extent(item: h5d.DatasetID, plist: Any) -> tuple[int, tuple[int, ...]]:
    """Return the class of a dataset's dataspace, and its shape."""
    if plist.get_layout() == h5d.VIRTUAL and plist.get_virtual_count():  # HDF5 may open its sources to know its space
        return h5s.SIMPLE, tuple(plist.get_virtual_vspace(0).get_simple_extent_dims())
    space = item.get_space()
    extent = space.get_simple_extent_type()
    return extent, tuple(space.get_simple_extent_dims()) if extent == h5s.SIMPLE else ()


def vet(item: h5d.DatasetID, at: str, where: str, allow_virtual: bool = False) -> tuple[DatasetInfo, DType]:
    """Return what a dataset is and its type as stored, or refuse it; no value is read.

    Raises
    ------
    InputError
    """
    info = describe(item, at, where)
    stored = type_of(item.get_type())[0]
    if stored is None:
        raise InputError(
            f"{where}: values of type {info.dtype} are refused; bn takes bool, integers and float16, 32 and 64"
        )
    if info.problem == NO_VALUES:
        raise InputError(f"{where}: has a type but no values (a null dataspace); name another dataset")
    check_shape(info.shape, where)
    if info.problem == EXTERNAL:
        raise InputError(f"{where}: is {EXTERNAL}, where bn does not look; copy the values into one dataset")
    if info.problem == VIRTUAL and not allow_virtual:
        raise InputError(
            f"{where}: is {VIRTUAL}: its values are in other datasets, which bn does not open unasked; copy them "
            "into one dataset, or give --allow-virtual (whose sources must not be virtual themselves)"
        )
    if info.problem.startswith(EMPTY):
        raise InputError(f"{where}: is {info.problem}; name another dataset")
    if info.problem and info.problem != VIRTUAL:
        raise InputError(f"{where}: {info.problem}")
    return info, stored


def _extent_problem(extent: int, shape: tuple[int, ...]) -> str:
    if extent == h5s.NULL:
        return NO_VALUES
    if extent == h5s.SCALAR:
        return "a single number without axes"
    return "" if 0 not in shape else NO_SAMPLES if shape[0] == 0 else NO_FEATURES


def storage_problem(item: h5d.DatasetID) -> str:
    """Return why the values cannot be taken from this file itself, or ''."""
    plist = item.get_create_plist()
    if plist.get_layout() == h5d.VIRTUAL:
        return VIRTUAL
    if plist.get_external_count():
        return EXTERNAL
    return ""


def filters_of(item: h5d.DatasetID) -> list[Filter]:
    """Return the filter pipeline of a dataset, in the order in which filters are applied on writing."""
    plist = item.get_create_plist()
    found = []
    for position in range(plist.get_nfilters()):
        code, flags, values, name = plist.get_filter(position)
        known = KNOWN_FILTERS.get(code, (text_of(name), ""))[0]
        found.append(Filter(code, flags, tuple(values), printable(known) or "unnamed"))
    return found


def _compression(filters: list[Filter]) -> str:
    """Name compressors first, with gzip's level, then the helpers."""
    helpers = (h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32)
    ordered = sorted(filters, key=lambda f: f.code in helpers)
    return ", ".join(f"gzip-{f.values[0]}" if f.code == h5z.FILTER_DEFLATE and f.values else f.name for f in ordered)


def missing_filter(filters: list[Filter], *, writing: bool = False) -> str:
    """Return which filter is not available and how to get it, or ''."""
    need = h5z.FILTER_CONFIG_ENCODE_ENABLED if writing else h5z.FILTER_CONFIG_DECODE_ENABLED
    for f in filters:
        if available(f.code, need) or (_register_hdf5plugin() and available(f.code, need)):
            continue
        package = KNOWN_FILTERS.get(f.code, ("", ""))[1]
        remedy = (
            f"pip install {package}"
            if package == "hdf5plugin"
            else f"it comes with {package}"
            if package
            else ("a plugin on HDF5_PLUGIN_PATH may bring it, with --plugins")
        )
        return f"needs the HDF5 filter {f.name} (id {f.code}), which is not available; {remedy}"
    return ""


def available(code: int, need: int = h5z.FILTER_CONFIG_DECODE_ENABLED) -> bool:
    """Tell whether HDF5 has a filter."""
    return bool(h5z.filter_avail(code) and h5z.get_filter_info(code) & need)


def available_filters() -> dict[str, bool]:
    """Return which of the filters that people meet can be undone here, in the order of their numbers."""
    return {name: not missing_filter([Filter(code, 0, (), name)]) for code, (name, _) in sorted(KNOWN_FILTERS.items())}


def versions() -> dict[str, str]:
    """Return the versions of h5py and of HDF5 itself."""
    return {"h5py": h5py.version.version, "hdf5": h5py.version.hdf5_version}


def _register_hdf5plugin() -> bool:
    """Let the package hdf5plugin register its filters, where it is installed."""
    try:
        importlib.import_module("hdf5plugin")
    except ImportError:
        return False
    return True
