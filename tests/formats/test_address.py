"""What a person types, and what it means: files, datasets, globs, and names that look like either."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from cli_helpers import good, save, save_h5, table

import bncli
from bncli.errors import InputError, UsageError
from bncli.formats import format_of
from bncli.formats.address import expand, natural_key, open_source, split
from bncli.formats.reading import ReadOptions

BUDGET = 1 << 20


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("a.npy", ("a.npy", None)),
        ("a.h5::/x/y", ("a.h5", "/x/y")),
        ("a.h5::x", ("a.h5", "x")),
        ("a.h5::", ("a.h5", "")),
        ("dir:1/a.h5::/x", ("dir:1/a.h5", "/x")),
        ("a.h5::/x::y", ("a.h5", "/x::y")),
        ("*.h5::/x", ("*.h5", "/x")),
    ],
)
def test_split(address: str, expected: tuple[str, str | None]) -> None:
    assert split(address) == expected


def test_file_names_that_hold_the_separator(here: Path) -> None:
    save(here / "a::b.npy", table())
    save_h5(here / "run::1.h5", table(), "x::y")
    assert split("a::b.npy") == ("a::b.npy", None)
    assert split("run::1.h5") == ("run::1.h5", None)
    assert split("run::1.h5::/x::y") == ("run::1.h5", "/x::y")
    for address in ("a::b.npy", "run::1.h5", "run::1.h5::/x::y"):
        np.testing.assert_allclose(bncli.fit(address).population_mean, table().mean(axis=0), rtol=1e-12)
    good("fit", "run::1.h5", "-o", "s.bn.h5")
    good("apply", "s.bn.h5", "run::1.h5", "-o", "out.h5")


def test_globs_come_in_natural_order(here: Path) -> None:
    for name in ("part-10.npy", "part-9.npy", "part-2.npy", "part-02b.npy", "other.npy"):
        save(here / name, table(3))
    assert expand(["part-*.npy"]) == ["part-2.npy", "part-02b.npy", "part-9.npy", "part-10.npy"]
    assert expand(["other.npy", "part-[12]*.npy", "other.npy"]) == [
        "other.npy", "part-2.npy", "part-10.npy", "other.npy",
    ]  # fmt: skip
    assert expand(["part-?.npy"]) == ["part-2.npy", "part-9.npy"]


def test_globs_with_a_dataset(here: Path) -> None:
    for name in ("b2.h5", "b10.h5"):
        save_h5(here / name, table(3))
    assert expand(["b*.h5::/x"]) == ["b2.h5::/x", "b10.h5::/x"]


def test_literal_names_with_glob_characters(here: Path) -> None:
    save(here / "x[1].npy", table(3))
    save(here / "x1.npy", table(4))
    save_h5(here / "y*?.h5", table(5))
    assert expand(["x[1].npy", "y*?.h5", "y*?.h5::/x"]) == ["x[1].npy", "y*?.h5", "y*?.h5::/x"]
    assert bncli.fit("x[1].npy").num_samples == 3
    assert bncli.fit("y*?.h5::/x").num_samples == 5


def test_patterns_without_a_file() -> None:
    with pytest.raises(InputError, match=r"none-\*\.npy: no file matches"):
        expand(["none-*.npy"])
    assert expand(["none.npy"]) == ["none.npy"]  # told by the reader, with a suggestion


def test_natural_key_orders_anything() -> None:
    names = ["", "10", "9", "a10", "a9", "a", "9a", "²", "٣", "a1b2", "a1b10", "a01b2"]
    ordered = sorted(names, key=natural_key)
    assert ordered.index("9") < ordered.index("10")
    assert ordered.index("a9") < ordered.index("a10")
    assert ordered.index("a1b2") < ordered.index("a1b10")


def test_kinds_are_told_by_content(here: Path) -> None:
    (here / "array.dat").write_bytes(saved(here))
    save_h5(here / "data.bin", table())
    assert format_of("array.dat").name == ".npy"
    assert format_of("data.bin").name == "HDF5"
    (here / "x.npy").write_text("text")
    assert format_of("x.npy").name == ".npy"  # its own reader says what is wrong
    (here / "x.h5").write_text("text")
    with pytest.raises(InputError, match=r"x\.h5: not an HDF5 file"):
        format_of("x.h5")
    (here / "x.csv").write_text("text")
    with pytest.raises(InputError, match=r"x\.csv: of no format"):
        format_of("x.csv")


def saved(here: Path) -> bytes:
    return save(here / "tmp.npy", table()).read_bytes()


def test_user_block(here: Path) -> None:
    with h5py.File("u.h5", "w", userblock_size=512) as file:
        file["x"] = table()
    assert format_of("u.h5").name == "HDF5"
    assert bncli.fit("u.h5").num_features == 3


def test_which_dataset(here: Path) -> None:
    with h5py.File("d.h5", "w") as file:
        file["a"], file["g/b"], file["label"] = table(5), table(6), np.arange(5)
    with open_source("d.h5::a", ReadOptions(max_memory=BUDGET)) as source:
        assert (source.address, source.shape) == ("d.h5::/a", (5, 3))
    with open_source("d.h5", ReadOptions(dataset="g/b", max_memory=BUDGET)) as source:
        assert source.shape == (6, 3)
    with open_source("d.h5::/a", ReadOptions(dataset="g/b", max_memory=BUDGET)) as source:
        assert source.shape == (5, 3)  # the address wins
    with pytest.raises(UsageError, match=r"(?s)d\.h5::/a.*d\.h5::/g/b"):
        open_source("d.h5", ReadOptions(max_memory=BUDGET))
    with pytest.raises(UsageError, match="/g"):
        open_source("d.h5::/g", ReadOptions(max_memory=BUDGET))
    with pytest.raises(InputError, match="/c"):
        open_source("d.h5::/c", ReadOptions(max_memory=BUDGET))
    with pytest.raises((InputError, UsageError)):
        open_source("d.h5::", ReadOptions(max_memory=BUDGET))
    with open_source("d.h5::label", ReadOptions(max_memory=BUDGET)) as source:
        assert source.shape == (5, 1)


def test_npy_holds_one_array_without_a_name(here: Path) -> None:
    save(here / "x.npy", table())
    with pytest.raises(InputError, match="leave out ::/x"):
        open_source("x.npy::/x", ReadOptions(max_memory=BUDGET))
    with open_source(
        "x.npy", ReadOptions(dataset="x", max_memory=BUDGET)
    ) as source:  # -d is for the inputs that can name one
        assert source.shape == (600, 3)
