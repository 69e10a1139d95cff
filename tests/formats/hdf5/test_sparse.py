"""Sparse matrices in HDF5 files, which are not read yet; and arrays that are passed over where one is taken unasked."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cli_helpers import bn, check_refused, good, untouched
from helpers import check_moments, exact_columns

import bncli

DENSE = np.random.default_rng(4).poisson(0.6, (300, 5)).astype("f4")
KINDS = ("csr_matrix", "csc_matrix", "csr by h5sparse_format", "csr without attributes", "csc of MATLAB")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sparse(file: h5py.File, path: str, kind: str = "csr_matrix") -> None:
    """Write a matrix as anndata and others do; layout of a compressed matrix: its long axis, and what is not 0."""
    x = DENSE.T if kind.startswith("csc") else DENSE
    long, short = np.nonzero(x)
    group = file.require_group(path)
    names = ("ir", "jc") if "MATLAB" in kind else ("indices", "indptr")
    group["data"] = x[long, short]
    group[names[0]] = short.astype("i4")
    group[names[1]] = np.concatenate([[0], np.count_nonzero(x, axis=1).cumsum()]).astype("i4")
    if kind.endswith("_matrix"):
        group.attrs.update({"encoding-type": kind, "encoding-version": "0.1.0", "shape": DENSE.shape})
    elif "h5sparse" in kind:
        group.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": DENSE.shape})
    elif "MATLAB" in kind:
        group.attrs["MATLAB_sparse"] = np.uint64(5)


def pca() -> Any:
    return np.random.default_rng(5).normal(size=(300, 3)).astype("f4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_matrix_is_refused(here: Path, kind: str) -> None:
    with h5py.File("a.h5ad", "w") as file:
        sparse(file, "X", kind)
        file["obsm/X_pca"] = pca()
        file["obs/n"] = np.arange(300)
    with untouched(here):
        said = check_refused(
            3, ["fit", "a.h5ad"], "a.h5ad::/X: is a sparse matrix, which bn does not read yet", lines=5
        )
        assert said.err.splitlines()[2:] == ["Or name a dense dataset:", "  a.h5ad::/obsm/X_pca  (300, 3)  float32"]
        for address in ("a.h5ad::/X", "a.h5ad::X/"):
            said = check_refused(3, ["fit", address], "is a sparse matrix", "anndata")
            assert "X/data" not in said.err
    good("fit", "a.h5ad::/obsm/X_pca", "-q")
    stats = bncli.load("a.bn.h5")
    check_moments(stats.population_mean, stats.population_var, exact_columns(pca()))
    check_refused(3, ["apply", "a.bn.h5", "a.h5ad", "-o", "o.h5"], "is a sparse matrix", lines=5)
    good("apply", "a.bn.h5", "a.h5ad::/obsm/X_pca", "-o", "o.h5")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("X", 'a.X = a.X.toarray(); a.write_h5ad("it\'s.dense.h5ad")'),
        ("layers/counts", 'a.layers["counts"] = a.layers["counts"].toarray();'),
        ("obsp/distances", 'a.obsp["distances"] = a.obsp["distances"].toarray();'),
        ("raw/X", "a = a.raw.to_adata(); a.X = a.X.toarray();"),
        ("raw.X", "a = a.raw.to_adata(); a.X = a.X.toarray();"),
    ],
)
def test_the_command_that_makes_a_dense_file(here: Path, path: str, code: str) -> None:
    with h5py.File("it's.h5ad", "w") as file:
        sparse(file, path)
    for address in (f"it's.h5ad::/{path}", "it's.h5ad"):
        said = check_refused(3, ["fit", address], "is a sparse matrix").err.splitlines()
        python, _, program = shlex.split(said[1])
        assert python == "python"
        compile(program, "command", "exec")
        assert program.startswith('import anndata; a = anndata.read_h5ad("it\'s.h5ad"); ')
        assert code in program


def test_a_name_in_the_command_is_the_files(here: Path) -> None:
    """Also one beyond 16 bits, of which JSON makes two halves that no file is called by."""
    name = "\N{SMILING FACE WITH SUNGLASSES}.h5ad"
    with h5py.File(name, "w") as file:
        sparse(file, "X")
    program = shlex.split(check_refused(3, ["fit", name], "is a sparse matrix").err.splitlines()[1])[2]
    assert {name, name.replace(".h5ad", ".dense.h5ad")} <= {
        node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)
    }


@pytest.mark.parametrize("path", ["matrix", "/", "a/b/c"])
def test_elsewhere(here: Path, path: str) -> None:
    with h5py.File("a.h5", "w") as file:
        sparse(file, path)
        file["alias"] = h5py.SoftLink(path) if path != "/" else file["/"]
    for address in ("a.h5", f"a.h5::/{path.strip('/')}", "a.h5::/alias"):
        check_refused(3, ["fit", address], "is a sparse matrix", "scipy.sparse", "toarray")


def test_a_group_that_holds_sparse_matrices(here: Path) -> None:
    with h5py.File("a.h5ad", "w") as file:
        sparse(file, "layers/counts")
        file["X"] = DENSE
    check_refused(3, ["fit", "a.h5ad::/layers"], "a.h5ad::/layers/counts: is a sparse matrix")
    with h5py.File("a.h5ad", "a") as file:
        file["layers/scaled"] = DENSE
    said = check_refused(2, ["fit", "a.h5ad::/layers"], "is a group; name one of its datasets", lines=2)
    assert said.err.splitlines()[1:] == ["  a.h5ad::/layers/scaled  (300, 5)  float32"]
    said = check_refused(2, ["fit", "a.h5ad"], "a.h5ad::/X  ", "a.h5ad::/layers/scaled", lines=9)
    assert "counts" not in said.err
    said = check_refused(3, ["fit", "a.h5ad::/none"], "it has", lines=9)
    assert "/layers/counts/data     (" in said.err
    assert "only the values other than 0 of the sparse matrix /layers/counts" in said.err


def test_ls_says_what_the_parts_are(here: Path) -> None:
    with h5py.File("a.h5ad", "w") as file:
        sparse(file, "X")
        file["y/data"] = pca()
    rows = {row[0]: row[5] for row in (line.split("\t") for line in good("ls", "a.h5ad").out.splitlines()[1:])}
    assert rows == {
        "a.h5ad::/X/data": "only the values other than 0 of the sparse matrix /X",
        "a.h5ad::/X/indices": "indices of the sparse matrix /X",
        "a.h5ad::/X/indptr": "indices of the sparse matrix /X",
        "a.h5ad::/y/data": "",
    }


def test_a_part_by_its_own_address(here: Path) -> None:
    with h5py.File("a.h5ad", "w") as file:
        sparse(file, "X")
        sparse(file, "/")
        file["y/data"] = pca()
    for name, group in (("/X/data", "/X"), ("/data", "/")):
        said = good("fit", f"a.h5ad::{name}", "-f").err
        assert f"{name} holds only the values other than 0 of the sparse matrix {group}: " in said
    assert "sparse" not in good("fit", "a.h5ad::/y/data", "-f").err


def passed_over(out: str) -> list[str]:
    return [line for line in out.splitlines() if "passed over" in line]


def test_what_was_taken_unasked_is_named(here: Path) -> None:
    with h5py.File("a.h5ad", "w") as file:
        file["X"] = DENSE
        sparse(file, "layers/counts")
        file["n"], file["names"] = np.arange(300), ["a", "b"]
    line = "dataset /X (2 other arrays passed over; bn ls a.h5ad lists them)"
    for command in (["fit", "a.h5ad"], ["fit", "a.h5ad", "-n"], ["apply", "a.bn.h5", "a.h5ad", "-o", "o.h5"]):
        assert passed_over(good(*command).out) == [line], command
    for command in (
        ["fit", "a.h5ad::/X", "-f"],
        ["fit", "a.h5ad", "-d", "X", "-f"],
        ["fit", "a.h5ad", "-d", "X", "-n"],
    ):
        assert passed_over(good(*command).out) == [], command
    assert passed_over(good("apply", "a.bn.h5", "a.h5ad::/X", "-o", "o.h5", "-f").out) == []
    with h5py.File("one.h5", "w") as file:
        file["x"], file["names"] = DENSE, ["a"]
    assert passed_over(good("fit", "one.h5").out) == []
    with h5py.File("one.h5", "a") as file:
        file["y"] = np.arange(300)
    assert passed_over(good("fit", "one.h5", "-f").out) == [
        "dataset /x (1 other array passed over; bn ls one.h5 lists it)"
    ]


def test_what_was_taken_of_many_files(here: Path) -> None:
    for i in range(5):
        with h5py.File(f"{i}.h5", "w") as file:
            file["x"], file["y"] = DENSE, np.arange(300)
    lines = good("fit", *(f"{i}.h5" for i in range(5))).out.splitlines()
    assert lines[1:5] == [
        *(f"dataset /x (1 other array passed over; bn ls {i}.h5 lists it)" for i in range(3)),
        "and 2 more files of which one array was taken",
    ]


def test_the_target_is_not_passed_over(here: Path) -> None:
    with h5py.File("a.h5", "w") as file:
        file["x"], file["y"] = DENSE, np.arange(300) % 2
    for more in (["-n"], []):
        assert passed_over(good("fit", "a.h5", "--target", "::/y", "--epochs", "1", *more).out) == []
    with h5py.File("a.h5", "a") as file:
        file["z"] = np.arange(300)
    for more in (["-n"], ["-f"]):
        (line,) = passed_over(good("fit", "a.h5", "--target", "::/y", "--epochs", "1", *more).out)
        assert line.startswith("dataset /x (1 other array passed over")


def test_json_and_resume_know_nothing_of_it(here: Path) -> None:
    with h5py.File("a.h5", "w") as file:
        file["x"], file["y"] = DENSE, np.arange(300)
    unasked = json.loads(good("fit", "a.h5", "--json").out)
    assert unasked == json.loads(good("fit", "a.h5::/x", "--json", "-f").out)
    assert unasked["sources"] == [
        {"name": "a.h5", "dataset": "/x", "shape": [300, 5], "dtype": "float32", "size": Path("a.h5").stat().st_size}
    ]
    assert "passed_over" not in json.loads(bn("apply", "a.bn.h5", "a.h5", "-o", "o.h5", "--json").out)
