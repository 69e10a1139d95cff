"""Sparse matrices in HDF5 files: groups of index arrays and of the values other than 0, which are none of them the matrix."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bncli.errors import InputError, literal, printable

if TYPE_CHECKING:
    from bncli.formats.hdf5.vetting import DatasetInfo

# CSR and CSC of .h5ad (also of the time before its encoding-type), of 10x Genomics and others; CSC of MATLAB
PARTS = ({"data", "indices", "indptr"}, {"data", "ir", "jc"})
MAIN = "/X"  # AnnData's matrix


def is_sparse(group: Any) -> bool:
    """Tell whether a group (h5py.h5g.GroupID) holds the parts of a sparse matrix."""
    return any(all(group.links.exists(name.encode()) for name in parts) for parts in PARTS)


def sparse_groups(infos: list[DatasetInfo]) -> dict[str, set[str]]:
    """Return the groups among the datasets of a file that are sparse matrices, with the paths of their parts."""
    members: dict[str, set[str]] = {}
    for info in infos:
        group, _, name = info.path.rpartition("/")
        members.setdefault(group, set()).add(name)
    found = {group: parts for group, names in members.items() for parts in PARTS if parts <= names}
    return {group or "/": {f"{group}/{name}" for name in parts} for group, parts in found.items()}


def parts_marked(infos: list[DatasetInfo]) -> list[DatasetInfo]:
    """Mark the parts of sparse matrices among the datasets of a file: they are no arrays in their own right."""
    parts = {path: part_of(path) for paths in sparse_groups(infos).values() for path in paths}
    return [replace(i, problem=parts[i.path], numeric=False) if i.path in parts else i for i in infos]


def note(dataset: str, group: Any) -> list[str]:
    """Warn where a dataset is a part of a sparse matrix, as its group shows."""
    part = any(dataset.rpartition("/")[2] in parts for parts in PARTS) and is_sparse(group)
    return [f"{printable(dataset)} holds {part_of(dataset)}: the statistics are not the matrix's"] * part


def part_of(path: str) -> str:
    """What a part of a sparse matrix is, in words."""
    group, _, name = path.rpartition("/")
    return f"{'only the values other than 0' if name == 'data' else 'indices'} of the sparse matrix {printable(group) or '/'}"


def refusal(path: str, group: str, more: str = "") -> InputError:
    """Refuse a sparse matrix, with a command that makes a dense one; `more` follows."""
    return InputError(
        f"{printable(path)}::{printable(group)}: is a sparse matrix, which bn does not read yet. {_dense(path, group)}{more}"
    )


def _dense(path: str, group: str) -> str:
    *folders, name = group.strip("/").replace("raw.X", "raw/X").split("/")
    target, raw = f"a.{name}", ""
    if folders == ["raw"] and name == "X":
        raw = "a = a.raw.to_adata(); "
    elif len(folders) == 1 and folders[0] in ("layers", "obsm", "varm", "obsp", "varp"):
        target = f"a.{folders[0]}[{literal(name)}]"
    elif folders or name != "X":
        return "Read it with scipy.sparse and store what its toarray() gives, with numpy.save"
    dense = os.path.splitext(os.path.basename(path))[0] + ".dense.h5ad"
    code = f"import anndata; a = anndata.read_h5ad({literal(path)}); {raw}{target} = {target}.toarray(); a.write_h5ad({literal(dense)})"
    return f"Where it fits memory, make it dense:\n  python -c {printable(shlex.quote(code))}"
