"""What `apply` and `apply --copy-others` take over from an HDF5 file: attributes byte for byte, references, texts."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cli_helpers import bn, good, save, table
from h5py import h5a, h5s, h5t

import bncli

PADS = {"null-terminated": h5t.STR_NULLTERM, "null-padded": h5t.STR_NULLPAD, "space-padded": h5t.STR_SPACEPAD}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the statistics of four features without names, good.bn.h5."""
    monkeypatch.chdir(tmp_path)
    good("fit", save(tmp_path / "good.npy", table(20, 4)))
    return tmp_path


def both(path: str, *options: str) -> Iterator[h5py.File]:
    """The outputs of apply without and with the other objects, opened."""
    for others in ([], ["--copy-others"]):
        good("apply", "good.bn.h5", path, "-o", "y.h5", "-f", *options, *others)
        with h5py.File("y.h5") as file:
            yield file


def text_type(size: int, pad: int, charset: int = h5t.CSET_ASCII) -> Any:
    kind = h5t.C_S1.copy()
    kind.set_size(size)
    kind.set_strpad(pad)
    kind.set_cset(charset)
    return kind


def put(item: Any, name: str, kind: Any, content: bytes, shape: tuple[int, ...] = ()) -> None:
    """An attribute of these bytes, exactly."""
    space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
    h5a.create(item.id, name.encode(), kind, space).write(
        np.frombuffer(content, f"V{kind.get_size()}").reshape(shape), kind
    )


def stored(item: Any) -> dict[str, tuple[bytes, tuple[int, ...] | None, bytes]]:
    """Type as encoded, shape and bytes of every attribute."""
    found = {}
    for position in range(h5a.get_num_attrs(item.id)):
        attribute = h5a.open(item.id, index=position)
        kind = attribute.get_type()
        values = b""
        if attribute.get_space().get_simple_extent_type() != h5s.NULL:
            held = np.zeros(attribute.shape, f"V{kind.get_size()}")
            attribute.read(held, kind)
            values = held.tobytes()
        found[attribute.name.decode()] = (kind.encode(), attribute.shape, values)
    return found


def texts_of_all_kinds(item: Any) -> None:
    """Texts that fill their type and texts that do not, alone, in arrays, in compounds and in array types."""
    for (pad, code), charset in itertools.product(PADS.items(), (h5t.CSET_ASCII, h5t.CSET_UTF8)):
        name = f"{pad} {charset}"
        put(item, f"{name} letter", text_type(1, code, charset), b"K")
        put(item, f"{name} full", text_type(6, code, charset), b"double")
        put(item, f"{name} short", text_type(6, code, charset), b"ab    " if "space" in pad else b"ab\0\0\0\0")
        put(item, f"{name} behind", text_type(6, code, charset), b"ab\0cd\xff")  # what lies behind the end stays too
        put(item, f"{name} list", text_type(3, code, charset), b"u10v10t2m", (3,))
        kind = h5t.create(h5t.COMPOUND, 11)
        kind.insert(b"text", 0, text_type(3, code, charset))
        kind.insert(b"texts", 4, h5t.array_create(text_type(2, code, charset), (2,)))
        kind.insert(b"n", 9, h5t.STD_I16BE)
        put(item, f"{name} compound", kind, b"abc.ABCD.\1\2" * 2, (2,))
    put(item, "time", h5t.UNIX_D32LE, b"\1\2\3\4")
    put(item, "opaque", h5t.create(h5t.OPAQUE, 3), b"\0\1\2")
    put(item, "bits", h5t.STD_B16LE, b"\1\2")
    put(item, "odd", h5t.IEEE_F32BE, np.array([1.5, np.nan], ">f4").tobytes(), (2,))
    item.attrs["nothing"] = h5py.Empty("S3")


def test_attributes_are_copied_byte_for_byte(here: Path) -> None:
    everywhere = ("g/x", "/", "g", "g/other", "kind")
    with h5py.File("x.h5", "w") as file:
        file["g/x"], file["g/other"], file["kind"] = table(20, 4), np.arange(3), np.dtype("f4")
        for name in everywhere:
            texts_of_all_kinds(file[name])
        wanted = {name: stored(file[name]) for name in everywhere}
    assert len(wanted["g/x"]) == 41
    for file, names in zip(both("x.h5::/g/x"), (everywhere[:1], everywhere), strict=True):
        for name in names:
            assert stored(file[name]) == wanted[name], name
    # what bn wrote it reads, and copies, again
    good("apply", "good.bn.h5", "y.h5::/g/x", "-o", "z.h5", "--copy-others")
    with h5py.File("z.h5") as file:
        assert {name: stored(file[name]) for name in everywhere} == wanted


def test_texts_of_variable_length_in_attributes(here: Path) -> None:
    """Beside texts that fill their type, and lists of such."""
    word, free = text_type(3, h5t.STR_NULLTERM), h5py.string_dtype()
    kind, memory = h5t.create(h5t.COMPOUND, 19), h5t.create(h5t.COMPOUND, 16)
    for pairs, text, at in ((kind, h5t.py_create(free, logical=True), 3), (memory, h5t.py_create(free), 8)):
        pairs.insert(b"fixed", 0, word)
        pairs.insert(b"free", at, text)
    dtype = np.dtype({"names": ["fixed", "free"], "formats": ["S3", free], "offsets": [0, 8], "itemsize": 16})
    values = np.array([(b"abc", "free as air"), (b"de", "")], dtype)
    lists = np.empty(2, h5py.vlen_dtype("S3"))
    lists[0], lists[1] = np.array([b"abc", b"de"]), np.array([b"u10"])
    with h5py.File("x.h5", "w", libver="earliest") as file:
        file["x"], file["other"] = table(20, 4), np.arange(3)
        for name in ("x", "other"):
            h5a.create(file[name].id, b"pairs", kind, h5s.create_simple((2,))).write(values, memory)
            file[name].attrs.create("lists", lists, dtype=lists.dtype)
            file[name].attrs["words"] = ["a", "", "some words"]
    content, padded = (here / "x.h5").read_bytes(), b"\x13\1\0\0\3\0\0\0"  # a null-padded text of three, of the lists
    assert content.count(padded) == 2
    (here / "x.h5").write_bytes(content.replace(padded, b"\x13\0" + padded[2:]))
    for file, names in zip(both("x.h5::/x"), (["x"], ["x", "other"]), strict=True):
        for name in names:
            found = file[name].attrs
            assert [(bytes(a), b.decode()) for a, b in found["pairs"].tolist()] == [
                (b"abc", "free as air"),
                (b"de", ""),
            ]
            assert found.get_id("pairs").get_type().get_member_type(0).get_strpad() == h5t.STR_NULLTERM
            assert [part.tolist() for part in found["lists"]] == [[b"abc", b"de"], [b"u10"]]
            assert found.get_id("lists").get_type().get_super().get_strpad() == h5t.STR_NULLTERM
            assert found["words"].tolist() == ["a", "", "some words"]


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("name", ["columns", "feature_names"])
def test_names_that_fill_their_type(here: Path, pad: str, name: str) -> None:
    """Read from the attribute or from a dataset, and again from what bn wrote."""
    names = ["u10m", "v10", "t2mx", "q"]
    end = b" " if pad == "space-padded" else b"\0"
    content = b"".join(n.encode().ljust(4, end) for n in names)
    with h5py.File("x.h5", "w") as file:
        file["x"] = table(20, 4)
        put(file["x"], name, text_type(4, PADS[pad]), content, (4,))
        kind = text_type(4, PADS[pad])
        h5py.h5d.create(file.id, b"names", kind, h5s.create_simple((4,))).write(
            h5s.ALL, h5s.ALL, np.frombuffer(content, "V4"), kind
        )
    good("fit", "x.h5", "-o", "x.bn.h5")
    good("fit", "good.npy", "--names", "x.h5::/names", "-o", "n.bn.h5")
    good("apply", "x.bn.h5", "x.h5", "-o", "y.h5", "--copy-others")
    good("fit", "y.h5", "-o", "y.bn.h5")
    good("fit", "good.npy", "--names", "y.h5::/names", "-o", "m.bn.h5")
    for stats in ("x", "n", "y", "m"):
        assert list(bncli.load(f"{stats}.bn.h5").names or ()) == names, stats


# --- the guard against texts that claim gigabytes looks at the attribute that it means


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize(
    "values",
    [
        (["u", "v"], [f"c{i}" for i in range(40)]),
        (["x", "y", "z", "roll"], ["dx", "dy"]),
        (np.bytes_("microseconds"), "counts"),
        ("counts", np.bytes_("microseconds" * 20)),
        (["a", "b"], np.arange(40.0)),
        (["a", "b"], np.array([b"abcdefgh", b"ijklmnop"])),
        (np.full((3, 2), 1e300), ["a", "b", "c"]),
        ([["a", "b"], ["c", "d"]], ["a", "b"]),
    ],
)
def test_attributes_of_one_name_that_differ(here: Path, libver: str, values: tuple[Any, Any]) -> None:
    with h5py.File("x.h5", "w", libver=libver) as file:
        for name, value in zip(("a", "g/b"), values, strict=True):
            file[name] = table(20, 4)
            file[name].attrs["labels"] = value
            file[name].attrs["gain"] = np.arange(1000.0) + 0.1
        file["g"].attrs["labels"] = values[0]
    for name in ("a", "g/b"):
        good("fit", f"x.h5::/{name}", "-o", "n.bn.h5", "-f")
        for copy, names in zip(both(f"x.h5::/{name}"), ([name], ["a", "g/b", "g"]), strict=True):
            with h5py.File("x.h5") as file:
                for each in names:
                    np.testing.assert_array_equal(copy[each].attrs["labels"], file[each].attrs["labels"])


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_the_guard_still_sees_the_attribute_that_claims(here: Path, libver: str) -> None:
    """Of two of one name, whichever: HDF5 would make room for 2 GB."""
    columns = {"action": ["dx", "dy"], "state": ["x", "y", "z", "roll", "pitch"]}
    with h5py.File("x.h5", "w", libver=libver) as file:
        for name, texts in columns.items():
            file[name] = table(20, len(texts))
            file[name].attrs["columns"] = [f"column named {text:>5}" for text in texts]  # of 18 letters
    whole = (here / "x.h5").read_bytes()
    references = [m.start() for m in re.finditer(rb"\x12\0\0\0.{8}[\x01-\x08]\0\0\0", whole, re.DOTALL)]
    assert len(references) == 7
    for at in references:
        (here / "x.h5").write_bytes(whole[: at + 3] + b"\x7f" + whole[at + 4 :])
        codes = [bn("fit", f"x.h5::/{name}", "-o", "n.bn.h5", "-f").code for name in columns]
        # with checksums (latest) HDF5 finds the damage by itself
        assert sorted(codes) == [0, 3]


def test_columns_of_two_lengths_are_the_names(here: Path) -> None:
    with h5py.File("x.h5", "w") as file:
        for name, columns in (("action", ["dx", "dy"]), ("state", ["x", "y", "z", "roll", "pitch"])):
            file[name] = table(20, len(columns))
            file[name].attrs["columns"] = columns
    for name, columns in (("action", ("dx", "dy")), ("state", ("x", "y", "z", "roll", "pitch"))):
        good("fit", f"x.h5::/{name}", "-o", "n.bn.h5", "-f")
        assert tuple(bncli.load("n.bn.h5").names or ()) == columns


# --- references


def test_references_point_to_the_copies(here: Path) -> None:
    """Behind a user block too, as MATLAB writes its cells: in attributes, datasets and compounds, and lists in attributes."""
    pair = np.dtype([("what", h5py.ref_dtype), ("n", "i4")])
    with h5py.File("x.h5", "w", userblock_size=512) as file:
        file["first"], file["x"], file["#refs#/a"], file["#refs#/b"] = (
            np.ones(9),
            table(20, 4),
            np.arange(2),
            np.arange(3),
        )
        a, b, x = (file[name].ref for name in ("#refs#/a", "#refs#/b", "x"))
        file.create_dataset("cells", data=np.array([[a], [b], [x]], h5py.ref_dtype), chunks=(2, 1), compression="gzip")
        file.create_dataset("pairs", data=np.array([(b, 1), (a, 2)], pair))
        lists = np.empty(2, h5py.vlen_dtype(h5py.ref_dtype))
        lists[0], lists[1] = np.array([a, b, x], h5py.ref_dtype), np.array([b], h5py.ref_dtype)
        file["cells"].attrs.create("lists", lists, dtype=lists.dtype)
        file.create_dataset("lists", data=lists, dtype=lists.dtype)
        file.create_dataset("one", data=file["#refs#"].ref, dtype=h5py.ref_dtype)
        file.create_dataset("unset", (3,), h5py.ref_dtype)
        file["x"].attrs["see"], file["#refs#/a"].attrs["root"], file.attrs["x"] = b, file["/"].ref, x
        file["#refs#"].attrs.create("pairs", np.array([(x, 1)], pair))
    result = good("apply", "good.bn.h5", "x.h5::/x", "-o", "y.h5", "--copy-others")
    assert "not kept, since they refer to other objects or files: x.h5::/lists\n" in result.out
    with h5py.File("y.h5") as file:

        def names(refs: Any) -> list[str]:
            return [file[ref].name for ref in np.asarray(refs).flat]

        assert names(file["cells"][...]) == ["/#refs#/a", "/#refs#/b", "/x"]
        assert names(file["pairs"]["what"]) == ["/#refs#/b", "/#refs#/a"]
        assert file["pairs"]["n"].tolist() == [1, 2]
        assert [names(part) for part in file["cells"].attrs["lists"]] == [
            ["/#refs#/a", "/#refs#/b", "/x"],
            ["/#refs#/b"],
        ]
        assert names(file["one"][()]) == ["/#refs#"]
        assert not any(file["unset"][...])
        assert names(file["x"].attrs["see"]) == ["/#refs#/b"]
        assert names(file["#refs#/a"].attrs["root"]) == ["/"]
        assert names(file.attrs["x"]) == ["/x"]
        assert names(file["#refs#"].attrs["pairs"]["what"]) == ["/x"]


def test_what_refers_to_nothing_in_the_output_is_said(here: Path) -> None:
    with h5py.File("x.h5", "w") as file:
        file["x"], file["kept"] = table(20, 4), np.arange(3)
        file.create_dataset("outside", (2,), "f4", external=[("raw", 0, 8)])
        outside, kept = file["outside"].ref, file["kept"].ref
        file["cells"] = np.array([outside, kept], h5py.ref_dtype)
        file["x"].attrs["see"], file["kept"].attrs["see"] = outside, kept
        file["kept"].attrs["part"] = file["kept"].regionref[:2]
        file["regions"] = np.array([file["kept"].regionref[:2]], h5py.regionref_dtype)
        file["again"] = file["regions"]
    result = good("apply", "good.bn.h5", "x.h5::/x", "-o", "y.h5", "--copy-others", "--json")
    found = json.loads(result.out)
    assert found["left"] == ["x.h5::/outside"]
    gone = ["/again", "/cells (1 references)", "/kept@part", "/regions", "/x@see"]
    assert sorted(found["dropped"]) == [f"x.h5::{name}" for name in gone]
    with h5py.File("y.h5") as file:
        assert sorted(file) == ["cells", "kept", "x"]
        assert [bool(ref) for ref in file["cells"][...]] == [False, True]
        assert file[file["cells"][1]].name == file[file["kept"].attrs["see"]].name == "/kept"
        assert list(file["kept"].attrs) == ["see"]
        assert not file["x"].attrs
    good("apply", "good.bn.h5", "x.h5::/x", "-o", "y.h5", "-f")
    with h5py.File("y.h5") as file:
        assert list(file) == ["x"]
        assert not file["x"].attrs


def test_dimension_scales_are_attached_again(here: Path) -> None:
    with h5py.File("x.h5", "w") as file:
        file["x"], file["t"], file["other"] = table(20, 4), np.arange(20.0), np.arange(20)
        file["t"].make_scale("time")
        file["x"].dims[0].attach_scale(file["t"])
        file["other"].dims[0].attach_scale(file["t"])
        file["x"].dims[1].label = "channel"
    alone, whole = (
        {name: [[scale.name for scale in dim.values()] for dim in file[name].dims] for name in file}
        for file in both("x.h5::/x")
    )
    assert alone == {"x": [[], []]}
    assert whole == {"x": [["/t"], []], "other": [["/t"]], "t": [[]]}
    with h5py.File("y.h5") as file:
        assert h5py.h5ds.is_attached(file["x"].id, file["t"].id, 0)
        assert h5py.h5ds.is_attached(file["other"].id, file["t"].id, 0)
        assert file["x"].dims[1].label == "channel"
    # fewer rows than the scale has: it is not a scale of what was written
    result = good("apply", "good.bn.h5", "x.h5::/x", "-o", "y.h5", "-f", "--copy-others", "--rows", "0:8")
    assert "not kept, since they refer to other objects or files: x.h5::/x@DIMENSION_LIST" in result.out
    with h5py.File("y.h5") as file:
        assert "DIMENSION_LIST" not in file["x"].attrs
        assert h5py.h5ds.is_attached(file["other"].id, file["t"].id, 0)
        assert [file[ref].name for ref, _ in file["t"].attrs["REFERENCE_LIST"].tolist()] == ["/other"]


# --- values and order


@pytest.mark.parametrize(
    "options", [{}, {"chunks": (3,)}, {"chunks": (3,), "compression": "gzip", "maxshape": (None,)}]
)
def test_texts_with_a_fill_value_stay_readable(here: Path, options: dict[str, Any]) -> None:
    texts = ["u", "", "a longer text", "ü"]
    with h5py.File("x.h5", "w") as file:
        file["x"] = table(20, 4)
        names = file.create_dataset("names", data=texts, dtype=h5py.string_dtype(), fillvalue="n/a", **options)
        put(names, "units", text_type(1, h5t.STR_NULLTERM), b"K")
        file.create_dataset("none", (0,), h5py.string_dtype(), fillvalue="n/a", maxshape=(None,), chunks=(4,))
        file.create_dataset("one", data="text", dtype=h5py.string_dtype(), fillvalue="n/a")
        file.create_dataset("square", data=[["a", "b"], ["c", "d"]], dtype=h5py.string_dtype(), fillvalue="n/a")
    good("apply", "good.bn.h5", "x.h5::/x", "-o", "y.h5", "--copy-others")
    with h5py.File("y.h5", "a") as file:
        copy = file["names"]
        assert list(copy.asstr()) == texts
        assert (copy.fillvalue, copy.chunks, copy.compression) == (
            b"n/a",
            options.get("chunks"),
            options.get("compression"),
        )
        assert copy.attrs["units"] == b"K"
        assert file["one"].asstr()[()] == "text"
        assert file["square"].asstr()[...].tolist() == [["a", "b"], ["c", "d"]]
        file["none"].resize((2,))
        assert list(file["none"].asstr()) == ["n/a", "n/a"]


def test_the_order_of_members_and_attributes_is_kept(here: Path) -> None:
    """Where a file remembers it, as every netCDF-4 file does."""
    with h5py.File("x.h5", "w", track_order=True) as file:
        group = file.create_group("g", track_order=True)
        for name in ("z", "x", "a"):
            item = group.create_dataset(name, data=table(20, 4), track_order=True)
            item.attrs["z"], item.attrs["a"] = 1, 2
        file.create_group("b")
        file.attrs["z"], file.attrs["a"] = 1, 2
    _, whole = ([list(file), list(file["g"]), list(file["g/x"].attrs), list(file.attrs)] for file in both("x.h5::/g/x"))
    assert whole == [["g", "b"], ["z", "x", "a"], ["z", "a"], ["z", "a"]]


def test_attributes_larger_than_64_kb(here: Path) -> None:
    """As the format of HDF5 1.8 and later has them, beside the others of an object that has many."""
    names = np.array([f"feature {i:032}".encode() for i in range(2000)])
    with h5py.File("x.h5", "w", libver="latest") as file:
        for name in ("x", "other"):
            file[name] = table(20, 4)
            file[name].attrs["words"] = names
            for i in range(20):
                file[name].attrs[f"a{i}"] = ["u"] * i if i else "t"
        wanted = stored(file["x"])["words"]
    for file, copied in zip(both("x.h5::/x"), (["x"], ["x", "other"]), strict=True):
        for name in copied:
            assert stored(file[name])["words"] == wanted
            assert [len(file[name].attrs[f"a{i}"]) for i in range(20)] == [1, *range(1, 20)]


@pytest.mark.parametrize("options", [{}, {"track_order": True}, {"libver": "latest"}])
def test_the_same_content_gives_the_same_bytes(here: Path, options: dict[str, Any]) -> None:
    """No time of day is in it."""
    with h5py.File("x.h5", "w", **options) as file:
        file["g/x"], file["labels"] = table(20, 4), ["a", "b"]
        file.attrs["title"] = "t"
    images = []
    for pause in (0, 1.1):
        time.sleep(pause)
        good("apply", "good.bn.h5", "x.h5::/g/x", "-o", "y.h5", "-f")
        images.append((here / "y.h5").read_bytes())
    assert images[0] == images[1]


def test_a_dataset_that_is_named_through_a_soft_link(here: Path) -> None:
    with h5py.File("x.h5", "w") as file:
        file["x"], file["soft"] = table(20, 4), h5py.SoftLink("/x")
    good("apply", "good.bn.h5", "x.h5::/soft", "-o", "y.h5", "--copy-others")
    with h5py.File("y.h5") as file:
        assert file["soft"] == file["x"]
