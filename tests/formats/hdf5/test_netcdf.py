"""netCDF-4 files through `apply`: netCDF4, h5netcdf and xarray open what comes out, with and without the other variables."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cli_helpers import check_refused, good
from helpers import Array, peer

pytestmark = pytest.mark.peer


def imported(name: str) -> Any:
    """A peer; netCDF4 warns of NumPy's size where it was built with another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peer(name)


@pytest.fixture
def nc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    for name in ("h5netcdf", "xarray"):
        imported(name)
    return imported("netCDF4")


def values(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(5, 2, shape)


def climate(nc: Any) -> None:
    """An unlimited dimension, dimensions without a variable, packed and masked numbers, texts, bounds."""
    with nc.Dataset("in.nc", "w") as file:
        file.title, file.history, file.Conventions = "K", "made, then\nchanged", "CF-1.8"
        for name, length in (("time", None), ("lat", 5), ("alon", 4), ("nv", 2), ("letters", 3)):
            file.createDimension(name, length)
        time = file.createVariable("time", "f8", ("time",))
        time[:], time.units, time.bounds = np.arange(12), "days since 2000-01-01", "time_bnds"
        file.createVariable("time_bnds", "f8", ("time", "nv"))[:] = values(12, 2)
        file.createVariable("lat", "f4", ("lat",))[:] = np.arange(5)
        file.createVariable("alon", "f4", ("alon",))[:] = np.arange(4)
        names = file.createVariable("names", str, ("alon",), fill_value="none")
        names[:] = np.array(["u", "v wind", "", "q"], object)
        codes = file.createVariable("code", "S1", ("alon", "letters"))
        codes[:] = nc.stringtochar(np.array(["abc", "de", "f", "ghi"], "S3"))
        x = file.createVariable("x", "f4", ("time", "lat", "alon"), zlib=True, fill_value=1e20)
        x[:], x.units, x.standard_name, x.flags = values(12, 5, 4), "K", "t", np.array([1, 2], "i2")
        x.setncattr_string("words", ["a", "bc"])
        packed = file.createVariable("packed", "i2", ("time", "alon"), fill_value=-32767)
        packed.scale_factor, packed.add_offset, packed.missing_value = 0.01, 5.0, np.int16(-32767)
        packed[:] = values(12, 4)


def groups(nc: Any) -> None:
    """Dimensions of groups above, types of a person's own."""
    with nc.Dataset("in.nc", "w") as file:
        file.createDimension("time", 12)
        file.createDimension("c", 4)
        kind = file.createEnumType(np.uint8, "cloud", {"clear": 0, "cirrus": 1})
        file.createVariable("cover", kind, ("time",))[:] = np.ones(12, np.uint8)
        pair = file.createCompoundType(np.dtype([("a", "f4"), ("b", "i4")]), "pair")
        file.createVariable("both", pair, ("c",))[:] = np.zeros(4, [("a", "f4"), ("b", "i4")])
        group = file.createGroup("zone")
        group.createDimension("k", 3)
        group.note = "K"
        group.createVariable("q", "f4", ("time", "k"))[:] = values(12, 3)
        group.createGroup("inner").createVariable("x", "f8", ("time", "c"))[:] = values(12, 4)


def coordinates_of_two_axes(nc: Any) -> None:
    """And variables that are called as a dimension, but are no coordinate of it."""
    with nc.Dataset("in.nc", "w") as file:
        for name, length in (("time", 12), ("nv", 2), ("lon", 4)):
            file.createDimension(name, length)
        file.createVariable("time", "f8", ("time", "nv"))[:] = values(12, 2)
        file.createVariable("x", "f4", ("time", "lon"))[:] = values(12, 4)
        file.createVariable("lon", "f4", ("time", "lon"))[:] = values(12, 4)


def by_xarray(engine: str) -> Callable[[Any], None]:
    def write(nc: Any) -> None:
        xarray = imported("xarray")
        data = {"x": (("time", "chan"), values(12, 3), {"units": "K"}), "y": (("time",), values(12))}
        coordinates = {"time": np.arange(12.0), "chan": ["a", "bb", ""]}
        dataset = xarray.Dataset(data, coords=coordinates, attrs={"title": "t", "b": 1})
        dataset.to_netcdf("in.nc", engine=engine, unlimited_dims=["time"])

    return write


def described(group: Any) -> dict[str, Any]:
    """What netCDF4 says of a file: dimensions, variables in their order, attributes, values."""
    found: dict[str, Any] = {
        "dimensions": [(name, len(d), d.isunlimited()) for name, d in group.dimensions.items()],
        "attributes": [(name, group.getncattr(name)) for name in group.ncattrs()],
    }
    for name, variable in group.variables.items():
        variable.set_auto_maskandscale(False)
        attributes = [(n, repr(variable.getncattr(n))) for n in variable.ncattrs()]
        found[name] = [variable.dimensions, variable.shape, attributes, variable[...].tolist()]
    for name, inner in group.groups.items():
        found[name] = described(inner)
    return found


def opened_by_all(nc: Any, path: str) -> None:
    """Open and read a file with each peer; netCDF4 to write to it, too."""
    h5netcdf, xarray = imported("h5netcdf"), imported("xarray")
    with nc.Dataset(path, "a") as file:
        described(file)
    with h5netcdf.File(path, phony_dims="sort") as file:
        for variable in file.variables.values():
            variable[...]
    for engine, options in (("netcdf4", {}), ("h5netcdf", {"phony_dims": "sort"})):
        with xarray.open_dataset(path, engine=engine, decode_times=False, **options) as dataset:
            dataset.load()


CASES: dict[str, tuple[Callable[[Any], None], list[str]]] = {
    "climate": (climate, ["x", "time", "lat", "time_bnds", "packed"]),
    "groups": (groups, ["zone/inner/x", "zone/q"]),
    "coordinates of two axes": (coordinates_of_two_axes, ["x", "time", "_nc4_non_coord_lon"]),
    "xarray": (by_xarray("netcdf4"), ["x", "y", "time"]),
    "h5netcdf": (by_xarray("h5netcdf"), ["x", "y", "time"]),
}


@pytest.mark.parametrize(("make", "variable"), [(m, v) for m, names in CASES.values() for v in names])
def test_the_peers_open_both_outputs(nc: Any, make: Callable[[Any], None], variable: str) -> None:
    make(nc)
    address = f"in.nc::/{variable}"
    fit = ["fit", address, "-o", "s.bn.h5", "--axis", "-1", "-q"]
    good(*fit)
    told = good("apply", "s.bn.h5", address, "-o", "alone.nc").out
    assert "@DIMENSION_LIST" in told or "@REFERENCE_LIST" in told
    opened_by_all(nc, "alone.nc")
    with h5py.File("alone.nc") as file:
        left = set(file[variable].attrs)
        assert not left & {"_Netcdf4Dimid", "_Netcdf4Coordinates", "DIMENSION_LIST", "REFERENCE_LIST"}
    assert "not kept" not in good("apply", "s.bn.h5", address, "-o", "whole.nc", "--copy-others").out
    with nc.Dataset("in.nc") as before, nc.Dataset("whole.nc") as after:
        wanted, found = described(before), described(after)
    normalized(wanted, found, variable.removeprefix("_nc4_non_coord_"))
    assert found == wanted
    opened_by_all(nc, "whole.nc")


def test_a_dimension_is_not_shortened_under_other_variables(nc: Any) -> None:
    climate(nc)
    good("fit", "in.nc::/time", "-o", "s.bn.h5", "-q")
    args = ["apply", "s.bn.h5", "in.nc::/time", "--rows", "0:4", "--copy-others", "-o", "out.nc"]
    check_refused(2, args, "is a dimension scale", "leave out --rows or --copy-others")
    assert not Path("out.nc").exists()
    for left_out in (["--rows", "0:4"], ["--copy-others"]):
        good(*[a for a in args if a not in left_out])
        opened_by_all(nc, "out.nc")
        Path("out.nc").unlink()


def test_netcdf_masks_no_normalized_value(nc: Any) -> None:
    """What was valid or missing before says nothing of the values afterwards."""
    with nc.Dataset("in.nc", "w") as file:
        file.createDimension("n", 50)
        file.createDimension("c", 3)
        for name, attributes in (
            ("a", {"valid_range": np.array([200, 350], "f4")}),
            ("b", {"valid_min": np.float32(200), "missing_value": np.float32(0)}),
            ("d", {"valid_max": np.float32(350), "_Unsigned": "true"}),
        ):
            variable = file.createVariable(name, "f4", ("n", "c"))
            variable.setncatts(attributes | {"units": "K"})
            variable[:] = np.random.default_rng(1).normal(280, 10, (50, 3))
    for name in "abd":
        good("fit", f"in.nc::/{name}", "-o", f"{name}.bn.h5", "-q")
        good("apply", f"{name}.bn.h5", f"in.nc::/{name}", "-o", f"{name}.nc", "-q")
        with nc.Dataset(f"{name}.nc") as file, h5py.File(f"{name}.nc") as raw:
            assert not np.ma.is_masked(file[name][:])
            assert np.array_equal(np.ma.getdata(file[name][:]), raw[name][()])
            assert file[name].ncattrs() == ["units"]


def normalized(wanted: dict[str, Any], found: dict[str, Any], path: str) -> None:
    """Take out what is to differ: the values of a variable, and the attributes that speak of the stored ones."""
    *way, name = path.split("/")
    for group in way:
        wanted, found = wanted[group], found[group]
    stored = ("_FillValue", "scale_factor", "add_offset", "missing_value")
    wanted[name][2] = [(n, v) for n, v in wanted[name][2] if n not in stored]
    assert found[name][3] != wanted[name][3]
    found[name][3] = wanted[name][3]


@pytest.mark.parametrize(
    ("make", "variable"),
    # the dimensions themselves are refused, see below
    [(m, v) for m, names in CASES.values() for v in names if v not in ("lat", "time")],
)
def test_fewer_rows_than_the_dimension_has(nc: Any, make: Callable[[Any], None], variable: str) -> None:
    make(nc)
    address = f"in.nc::/{variable}"
    good("fit", address, "-o", "s.bn.h5", "--axis", "-1", "-q")
    told = good("apply", "s.bn.h5", address, "-o", "whole.nc", "--copy-others", "--rows", "0:3").out
    assert "not kept, since they refer to other objects" in told
    opened_by_all(nc, "whole.nc")
    with h5py.File("whole.nc") as file:
        assert file[variable].shape[0] == 3


def test_texts_with_a_fill_value(nc: Any) -> None:
    climate(nc)
    good("fit", "in.nc::/x", "-o", "s.bn.h5", "--axis", "-1", "-q")
    good("apply", "s.bn.h5", "in.nc::/x", "-o", "y.nc", "--copy-others")
    with nc.Dataset("y.nc") as file:
        assert file["names"][:].tolist() == ["u", "v wind", "", "q"]
        assert file["names"].getncattr("_FillValue") == "none"
    with imported("xarray").open_dataset("y.nc", engine="h5netcdf", decode_times=False) as dataset:
        assert dataset["names"].dims == ("alon",)
        assert dataset["code"].astype(str).values.tolist() == ["abc", "de", "f", "ghi"]
