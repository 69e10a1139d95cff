"""The HDF5 reader and writer: every layout and filter, every refusal, and files that lie."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from bad_files import odd_types, of_type
from hypothesis import given, settings
from hypothesis import strategies as st

from bncli.errors import InputError, UsageError
from bncli.formats.address import natural_key
from bncli.formats.hdf5 import chunks as hdf5_chunks
from bncli.formats.hdf5 import filters as hdf5_filters
from bncli.formats.hdf5 import vetting as hdf5_vetting
from bncli.formats.hdf5.format import other_datasets, read_strings
from bncli.formats.hdf5.sink import Hdf5Sink
from bncli.formats.hdf5.source import Hdf5Source
from bncli.formats.hdf5.vetting import DatasetInfo, choose_dataset, is_hdf5, list_datasets
from bncli.formats.reading import ReadOptions

BUDGET = 1 << 20
Array = npt.NDArray[Any]


def table(shape: tuple[int, ...] = (37, 11), dtype: str = "f4") -> Array:
    values = np.random.default_rng(1).normal(scale=90, size=shape)
    return np.asarray(values > 0 if dtype == "?" else values).astype(dtype)


def make(path: Path, values: Array, name: str = "x", **options: Any) -> str:
    file_options = {"userblock_size": options.pop("userblock_size")} if "userblock_size" in options else {}
    with h5py.File(path, "w", **file_options) as f:
        f.create_dataset(name, data=values, **options)
    return str(path)


def read_all(path: str, name: str = "x", step: int | None = None, **options: Any) -> Array:
    with Hdf5Source(path, name, ReadOptions(**{"max_memory": BUDGET, **options})) as source:
        count = source.shape[0] * source.sample_size
        out = np.empty(count, source.dtype)
        for first in range(0, count, step or count):
            source.read(first, out[first : first + (step or count)])
        source.check_unchanged()
        return out.reshape(source.shape)


def check_reads(path: str, expected: Array, **options: Any) -> None:
    for step in (None, 1, 7, 100):
        found = read_all(path, step=step, **options)
        assert found.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, expected)


def check_refused(
    path: str | Path, name: str, *words: str, error: type[Exception] = InputError, **options: Any
) -> None:
    with pytest.raises(error) as caught:
        read_all(str(path), name, **options)
    message = str(caught.value)
    assert type(caught.value) is error
    for word in words:
        assert word in message
    assert "\x1b" not in message
    assert error is UsageError or len(message.splitlines()) <= 2 or "it has:" in message


# --- reading


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "<i2", ">i2", ">u4", "<i8", ">f2", "<f2", ">f4", "<f4", ">f8"])
@pytest.mark.parametrize(
    "options", [{}, {"chunks": (8, 4)}, {"chunks": (8, 4), "compression": "gzip", "shuffle": True}]
)
def test_types_in_both_byte_orders(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    values = table(dtype=dtype)
    check_reads(make(tmp_path / "x.h5", values, **options), values)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("fletcher32", [False, True])
@pytest.mark.parametrize("compression", [None, "gzip", "lzf", "szip"])
def test_filters(tmp_path: Path, shuffle: bool, fletcher32: bool, compression: str | None) -> None:
    values = table((37, 16))
    path = make(
        tmp_path / "x.h5", values, chunks=(8, 16), compression=compression, shuffle=shuffle, fletcher32=fletcher32
    )
    check_reads(path, values)


def test_scale_offset_and_nbit_go_through_h5py(tmp_path: Path) -> None:
    values = table(dtype="i4")
    check_reads(make(tmp_path / "x.h5", values, chunks=(8, 4), scaleoffset=0), values)
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk((8, 4))
    layout.set_filter(h5py.h5z.FILTER_NBIT)
    with h5py.File(tmp_path / "n.h5", "w") as f:
        space = h5py.h5s.create_simple(values.shape)
        h5py.Dataset(h5py.h5d.create(f.id, b"x", h5py.h5t.STD_I32LE, space, layout))[...] = values
    check_reads(str(tmp_path / "n.h5"), values)


@pytest.mark.parametrize("order", [["fletcher", "gzip"], ["gzip", "shuffle"], ["fletcher", "shuffle", "gzip"]])
def test_filters_in_odd_order(tmp_path: Path, order: list[str]) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk((8, 4))
    for step in order:
        {"fletcher": layout.set_fletcher32, "gzip": layout.set_deflate, "shuffle": layout.set_shuffle}[step]()
    values = table(dtype="f8")
    with h5py.File(tmp_path / "x.h5", "w") as f:
        space = h5py.h5s.create_simple(values.shape)
        h5py.Dataset(h5py.h5d.create(f.id, b"x", h5py.h5t.IEEE_F64LE, space, layout))[...] = values
    check_reads(str(tmp_path / "x.h5"), values)


@pytest.mark.parametrize("shape", [(5,), (37, 11), (6, 5, 7), (3, 4, 5, 6)])
@pytest.mark.parametrize("chunked", [False, True])
def test_ranks_with_edge_chunks(tmp_path: Path, shape: tuple[int, ...], chunked: bool) -> None:
    values = table(shape)
    options = {"chunks": tuple(max(1, n // 2 - 1) for n in shape), "compression": "gzip"} if chunked else {}
    path = make(tmp_path / "x.h5", values, **options)
    check_reads(path, values.reshape(-1, 1) if len(shape) == 1 else values)


def test_chunks_larger_than_the_data(tmp_path: Path) -> None:
    values = table((5, 3))
    check_reads(make(tmp_path / "x.h5", values, chunks=(100, 10), maxshape=(None, None), compression="gzip"), values)


def test_compact_layout(tmp_path: Path) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.COMPACT)
    values = table()
    with h5py.File(tmp_path / "x.h5", "w") as f:
        space = h5py.h5s.create_simple(values.shape)
        h5py.Dataset(h5py.h5d.create(f.id, b"x", h5py.h5t.IEEE_F32BE, space, layout))[...] = values
    check_reads(str(tmp_path / "x.h5"), values)


@pytest.mark.parametrize(
    "options", [{}, {"chunks": (8, 4)}, {"chunks": (8, 4), "compression": "gzip", "shuffle": True, "fletcher32": True}]
)
def test_user_block(tmp_path: Path, options: dict[str, Any]) -> None:
    values = table()
    path = make(tmp_path / "x.h5", values, userblock_size=512, **options)
    Path(path).write_bytes(b"#!/bin/sh\n".ljust(512) + Path(path).read_bytes()[512:])
    assert is_hdf5(path)
    check_reads(path, values)


def test_unwritten_contiguous_behind_a_user_block_is_seen(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w", userblock_size=512) as f:
        f.create_dataset("x", (4, 4), "f4", fillvalue=7)
    check_refused(tmp_path / "x.h5", "x", "was never written", "--allow-unwritten")
    assert (read_all(str(tmp_path / "x.h5"), allow_unwritten=True) == 7).all()


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("maxshape", [None, (None, 11), (None, None)])
def test_every_kind_of_chunk_index(tmp_path: Path, libver: str, maxshape: Any) -> None:
    values = table()
    with h5py.File(tmp_path / "x.h5", "w", libver=libver) as f:
        f.create_dataset("x", data=values, chunks=(4, 3), maxshape=maxshape, compression="gzip")
    check_reads(str(tmp_path / "x.h5"), values)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_range_of_any_shape(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    chunks = tuple(data.draw(st.integers(1, n + 2)) for n in shape)
    values = np.arange(np.prod(shape), dtype="i4").reshape(shape)
    path = make(
        tmp_path_factory.mktemp("any") / "x.h5",
        values,
        chunks=chunks,
        maxshape=(None,) * len(shape),
        compression=data.draw(st.sampled_from([None, "gzip", "lzf"])),
    )
    chunk_bytes = int(np.prod(chunks)) * 4
    with Hdf5Source(path, "x", ReadOptions(max_memory=chunk_bytes * data.draw(st.integers(1, 5)) + 600)) as source:
        for _ in range(5):
            first = data.draw(st.integers(0, values.size - 1))
            out = np.empty(data.draw(st.integers(0, values.size - first)), "i4")
            source.read(first, out)
            np.testing.assert_array_equal(out, np.arange(first, first + out.size))


def test_filter_mask_of_single_chunks_is_honoured(tmp_path: Path) -> None:
    values = table((16, 4), "<i4")
    with h5py.File(tmp_path / "x.h5", "w") as f:
        d = f.create_dataset("x", (16, 4), "<i4", chunks=(8, 4), shuffle=True, compression="gzip", fletcher32=True)
        assert [d.id.get_create_plist().get_filter(i)[0] for i in range(3)] == [2, 1, 3]
        d.id.write_direct_chunk((0, 0), values[:8].tobytes(), 0b111)
        d.id.write_direct_chunk((8, 0), zlib.compress(values[8:].tobytes()), 0b101)
    check_reads(str(tmp_path / "x.h5"), values)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 719, 720, 721, 131072, 131073, 400001])
@pytest.mark.parametrize("kind", ["random", "ones", "zeros", "full"])
def test_fletcher32_is_that_of_hdf5(size: int, kind: str) -> None:
    fill = {"ones": 1, "zeros": 0, "full": 255}
    data = np.full(size, fill[kind], np.uint8) if kind in fill else table((size,), "u1")
    assert hdf5_filters.fletcher32(data) == reference_fletcher32(data.tobytes())


def reference_fletcher32(data: bytes) -> int:
    """H5_checksum_fletcher32 of HDF5's H5checksum.c, line by line."""
    sum1 = sum2 = 0
    words = [data[i] << 8 | data[i + 1] for i in range(0, len(data) - 1, 2)]
    for start in range(0, len(words), 360):
        for word in words[start : start + 360]:
            sum1 += word
            sum2 += sum1
        sum1, sum2 = (sum1 & 0xFFFF) + (sum1 >> 16), (sum2 & 0xFFFF) + (sum2 >> 16)
    if len(data) % 2:
        sum1 += data[-1] << 8
        sum2 += sum1
        sum1, sum2 = (sum1 & 0xFFFF) + (sum1 >> 16), (sum2 & 0xFFFF) + (sum2 >> 16)
    for _ in range(2):
        sum1, sum2 = (sum1 & 0xFFFF) + (sum1 >> 16), (sum2 & 0xFFFF) + (sum2 >> 16)
    return sum2 << 16 | sum1


def test_edge_chunks_stored_unfiltered(tmp_path: Path) -> None:
    """A dataset can be made so that partial chunks skip the filters, and no mask says so: h5py is asked for those."""
    import ctypes

    found = list((Path(h5py.__file__).parent.parent / "h5py.libs").glob("libhdf5-*"))
    if not found:
        pytest.skip("HDF5's C library is not beside h5py")
    values = table((10, 7))
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk((4, 4))
    layout.set_shuffle()
    set_chunk_opts = ctypes.CDLL(str(found[0])).H5Pset_chunk_opts
    set_chunk_opts.argtypes = [ctypes.c_int64, ctypes.c_uint]
    assert set_chunk_opts(layout.id, 2) == 0
    with h5py.File(tmp_path / "x.h5", "w", libver="latest") as f:
        space = h5py.h5s.create_simple(values.shape)
        h5py.Dataset(h5py.h5d.create(f.id, b"x", h5py.h5t.IEEE_F32LE, space, layout))[...] = values
    check_reads(str(tmp_path / "x.h5"), values)


def test_threads_with_their_own_sources(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    values = table((400, 11))
    path = make(tmp_path / "x.h5", values, chunks=(16, 4), compression="gzip", shuffle=True)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda step: read_all(path, step=step), [37, 100, 1000, 41]):
            np.testing.assert_array_equal(found, values)


# --- the cache of chunks


@pytest.fixture
def inflated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the chunks inflated so far."""
    sizes: list[int] = []
    inflate = hdf5_filters._inflate

    def count(data: Any, size: int) -> Any:
        sizes.append(size)
        return inflate(data, size)

    monkeypatch.setattr(hdf5_filters, "_inflate", count)
    return sizes


@pytest.mark.parametrize("step", [1, 3, 16, 50, 160, 163, 1000])
@pytest.mark.parametrize("chunks", [(10, 16), (10, 3), (1, 16), (100, 16), (7, 5)])
def test_reading_on_inflates_each_chunk_once(
    tmp_path: Path, inflated: list[int], step: int, chunks: tuple[int, int]
) -> None:
    values = table((100, 16))
    path = make(tmp_path / "x.h5", values, chunks=chunks, compression="gzip")
    per_row = -(-16 // chunks[1])
    band = per_row * (chunks[0] * chunks[1] * 4 + hdf5_chunks.ENTRY_BYTES)
    # a read may reach from one row of chunks into the next
    np.testing.assert_array_equal(read_all(path, step=step, max_memory=2 * band), values)
    assert len(inflated) == per_row * -(-100 // chunks[0])


def test_a_single_chunk_of_just_the_budget_is_inflated_once(tmp_path: Path, inflated: list[int]) -> None:
    path = make(tmp_path / "x.h5", table((64, 16)), chunks=(64, 16), compression="gzip")
    read_all(path, step=16, max_memory=64 * 16 * 4)
    assert len(inflated) == 1


def test_what_fits_stays_when_a_row_of_chunks_does_not(tmp_path: Path, inflated: list[int]) -> None:
    path = make(tmp_path / "x.h5", table((10, 40)), chunks=(10, 4), compression="gzip")
    read_all(path, step=40, max_memory=8 * (160 + hdf5_chunks.ENTRY_BYTES))
    assert len(inflated) == 8 + 2 * 10  # 8 of 10 stay; 2 are inflated for each of the 10 rows


def test_samples_larger_than_the_budget(tmp_path: Path, inflated: list[int]) -> None:
    values = table((3, 64, 64))
    path = make(tmp_path / "x.h5", values, chunks=(1, 8, 8), compression="gzip")
    budget = 8 * (256 + hdf5_chunks.ENTRY_BYTES)  # of a sample of 64 chunks
    np.testing.assert_array_equal(read_all(path, step=100, max_memory=2 * budget), values)
    assert len(inflated) == 3 * 64


def test_the_cache_keeps_to_its_budget(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5", table((200, 40)), chunks=(10, 7), compression="gzip")
    budget = 20_000
    with Hdf5Source(path, "x", ReadOptions(max_memory=budget)) as source:
        reader: Any = source._reader
        cache = reader._cache
        out = np.empty(333, "f4")
        for first in [*range(0, 7000, 333), *range(7000, 0, -333)]:
            source.read(first, out)
            kept = sum(v.nbytes + hdf5_chunks.ENTRY_BYTES for v in cache._kept.values())
            assert kept <= budget // 2  # the other half is for decoding
            assert cache._room == budget // 2 - kept


def test_a_chunk_larger_than_the_budget_is_refused_before_reading(tmp_path: Path, inflated: list[int]) -> None:
    path = make(tmp_path / "x.h5", table((64, 16)), chunks=(64, 16), compression="gzip")
    check_refused(path, "x", "(64, 16)", "4096 bytes", "--max-memory", max_memory=4095)
    assert inflated == []


def test_many_chunks_need_little_memory() -> None:
    class Index:
        def chunk_iter(self, note: Any) -> None:
            for i in range(20_000):
                note(h5py.h5d.StoreInfo((i, 0), 0, 4096 + 8 * i, 8))

    found = hdf5_chunks.ChunkTable(Index(), (20_000, 2), (1, 2))
    assert not found.missing
    kept = found.offset.nbytes + found.size.nbytes + found.mask.nbytes + found._numbers_stored.nbytes
    assert kept <= 32 * 20_000
    assert found.find(777) == 777
    assert found.start(777) == (777, 0)


# --- files that lie


def test_an_unaligned_read_keeps_the_last_row_of_chunks(tmp_path: Path, inflated: list[int]) -> None:
    """A budget of one row of chunks is enough, however the reads cut it."""
    values = table((60, 16))
    path = make(tmp_path / "x.h5", values, chunks=(10, 4), compression="gzip")
    budget = 4 * (160 + hdf5_chunks.ENTRY_BYTES)
    np.testing.assert_array_equal(read_all(path, step=15 * 16, max_memory=budget), values)
    assert len(inflated) == 24


def test_unwritten_chunks(tmp_path: Path) -> None:
    values = table((40, 8))
    with h5py.File(tmp_path / "x.h5", "w") as f:
        d = f.create_dataset("x", (40, 8), "f4", chunks=(10, 4), compression="gzip", fillvalue=-1.5)
        d[:10], d[20:] = values[:10], values[20:]
    check_refused(tmp_path / "x.h5", "x", "(10, 0)", "2 of 8", "--allow-unwritten", "-1.5")
    values[10:20] = -1.5
    check_reads(str(tmp_path / "x.h5"), values, allow_unwritten=True)


@pytest.mark.parametrize("options", [{}, {"chunks": (8, 11)}])
def test_truncated_after_opening(tmp_path: Path, options: dict[str, Any]) -> None:
    path = make(tmp_path / "x.h5", table(), **options)
    with Hdf5Source(path, "x", ReadOptions(max_memory=BUDGET)) as source:
        with open(path, "r+b") as f:
            f.truncate(2200)
        with pytest.raises(InputError, match="cut after it was opened"):
            source.read(0, np.empty(37 * 11, "f4"))
        with pytest.raises(InputError, match="changed while"):
            source.check_unchanged()


# --- vetting


def test_no_such_dataset(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5", table(), name="train/images")
    check_refused(path, "/train/image", "has no dataset /train/image", "did you mean", "x.h5::/train/images")
    check_refused(path, "/zzz", "has no dataset /zzz", "x.h5::/train/images", "(37, 11)")
    check_refused(path, "/train/images/more", "has no dataset")
    check_refused(path, "\x1b[31m", "has no dataset /\\x1b[31m")


def test_a_group_lists_its_datasets(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5", table(), name="train/images")
    for name in ("train", "/train/", "/"):
        check_refused(path, name, "is a group", "x.h5::/train/images", "float32", error=UsageError)
    with h5py.File(path, "a") as f:
        f.create_group("empty")
    check_refused(path, "empty", "is a group without numeric datasets")


def test_paths_are_normalised(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5", table(), name="a/b")
    for name in ("a/b", "/a/b", "//a//b", "/a/./b", "a/b/"):
        np.testing.assert_array_equal(read_all(path, name), table())


# --- choosing and describing


def test_soft_links_within_the_file_are_followed(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5", table(), name="g/x")
    with h5py.File(path, "a") as f:
        f["soft"] = h5py.SoftLink("/g/x")
        f["folder"] = h5py.SoftLink("g")
        f["g/relative"] = h5py.SoftLink("x")
    for name in ("soft", "folder/x", "folder/relative"):
        np.testing.assert_array_equal(read_all(path, name), table())
    assert [i.path for i in list_datasets(path)] == ["/g/x"]


@pytest.mark.parametrize("name", odd_types())
def test_other_types_are_listed_and_passed_over(tmp_path: Path, name: str) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as f:
        of_type(odd_types()[name])(f)
        f["good"] = table((4, 3))
    good, odd = list_datasets(str(tmp_path / "x.h5"))
    assert name.split(" of HDF5")[0] in odd.dtype
    assert odd.problem
    assert not good.problem
    assert choose_dataset(str(tmp_path / "x.h5")) == ("/good", 0)


def test_list_datasets(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as f:
        f.create_dataset("x10", data=table(dtype=">i2"))
        f.create_dataset("x2", data=table(), chunks=(8, 4), compression=4, shuffle=True, fletcher32=True)
        f["g/names"] = ["a", "b"]
        f["g/loop"] = f["/"]
        f["alias"] = f["x2"]
    infos = list_datasets(str(tmp_path / "x.h5"))
    assert [i.path for i in infos] == ["/alias", "/g/names", "/x10"]
    assert infos[0] == DatasetInfo("/alias", (37, 11), "float32", (8, 4), "gzip-4, shuffle, fletcher32", "")
    assert infos[1].dtype == "string"
    assert infos[1].problem == "string"
    assert (infos[2].dtype, infos[2].chunks, infos[2].compression) == ("big-endian int16", None, "")


def test_natural_order() -> None:
    names = ["/x10", "/x2", "/a/1", "/x²", "/x"]
    assert sorted(names, key=natural_key) == ["/a/1", "/x", "/x2", "/x10", "/x²"]


def test_choose_dataset(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5", table(), name="g/x")
    with h5py.File(path, "a") as f:
        f["labels"], f["names"] = np.arange(37), ["a"]
    assert choose_dataset(path) == ("/g/x", 1)
    with h5py.File(path, "a") as f:
        f["y"] = table((3, 4, 5))
    with pytest.raises(UsageError) as caught:
        choose_dataset(path)
    lines = str(caught.value).splitlines()
    assert "2 numeric datasets of two or more dimensions" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == [f"{path}::{n}" for n in ("/g/x", "/y", "/labels")]
    assert "(3, 4, 5)" in lines[2]
    assert "int64" in lines[3]


def test_choose_dataset_without_a_table(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5", np.arange(5))
    with pytest.raises(UsageError, match=r"no numeric dataset of two or more[^\n]*\n  \S*x.h5::/x  \(5,\)  int64$"):
        choose_dataset(path)
    with h5py.File(path, "w") as f:
        f["names"] = ["a"]
    with pytest.raises(InputError, match="no numeric dataset"):
        choose_dataset(path)


def test_names_and_notes(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5", table((4, 3)))
    with h5py.File(path, "a") as f:
        f["x"].attrs["columns"] = np.array([b"a", b"b", "é".encode()])
        f["x"].attrs["scale_factor"] = 0.1
        f["x"].attrs["_FillValue"] = np.float32(-1)
    with Hdf5Source(path, "x", ReadOptions(max_memory=BUDGET)) as source:
        assert source.names == ("a", "b", "é")
        assert source.notes == ["/x has scale_factor: the statistics are of the stored values"]
        assert source.address == f"{path}::/x"
    with h5py.File(path, "a") as f:
        f["x"].attrs["feature_names"] = ["u", "v", "w"]
    with Hdf5Source(path, "x", ReadOptions(max_memory=BUDGET)) as source:
        assert source.names == ("u", "v", "w")
    with h5py.File(path, "a") as f:
        f["x"].attrs["feature_names"] = np.arange(3)
    with Hdf5Source(path, "x", ReadOptions(max_memory=BUDGET)) as source:
        assert source.names == ("a", "b", "é")


def test_read_strings(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as f:
        f["variable"] = ["a", "ü", ""]
        f["fixed"] = np.array([b"a", "ü".encode(), b""])
        f["latin"] = np.array([b"\xfc"])
        f["numbers"] = np.arange(3)
        f["square"] = [["a"], ["b"]]
        f.create_dataset("claims", (10**12,), h5py.string_dtype(), chunks=(100,))
    path = str(tmp_path / "x.h5")
    assert read_strings(path, "/variable") == read_strings(path, "fixed") == ("a", "ü", "")
    for name, words in (
        ("latin", "UTF-8"),
        ("numbers", "int64"),
        ("square", "list of strings"),
        ("claims", "too many"),
    ):
        with pytest.raises(InputError, match=words):
            read_strings(path, name)


# --- writing


def write_like(source: str, out: Path, values: Array, lengths: list[int], budget: int = BUDGET) -> None:
    with Hdf5Source(source, "x", ReadOptions(max_memory=BUDGET)) as like:
        sink = Hdf5Sink(str(out), "x", values.shape, values.dtype, like=like, budget=budget)
        position, i = 0, 0
        flat = values.reshape(-1)
        while position < flat.size:
            sink.write(flat[position : position + lengths[i % len(lengths)]])
            position, i = position + lengths[i % len(lengths)], i + 1
        sink.finish()


@pytest.mark.parametrize("options", [
    {},
    {"chunks": (8, 4), "maxshape": (None, 20)},
    {"chunks": (8, 4), "compression": "gzip", "compression_opts": 7, "shuffle": True, "fletcher32": True},
    {"chunks": (8, 11), "compression": "lzf"},
    {"chunks": (100, 50), "maxshape": (None, None), "compression": "szip"},
])  # fmt: skip
@pytest.mark.parametrize("lengths", [[1000], [1], [11, 5, 90]])
def test_a_sink_keeps_the_layout(tmp_path: Path, options: dict[str, Any], lengths: list[int]) -> None:
    source = make(tmp_path / "x.h5", table(dtype="i2"), **options)
    values = table((30, 11))
    write_like(source, tmp_path / "out.h5", values, lengths)
    with h5py.File(source) as f, h5py.File(tmp_path / "out.h5") as g:
        old, new = f["x"], g["x"]
        np.testing.assert_array_equal(new[...], values)
        assert new.dtype == np.float32
        for name in ("compression", "compression_opts", "shuffle", "fletcher32"):
            assert getattr(new, name) == getattr(old, name), name
        assert new.chunks == (old.chunks and tuple(map(min, old.chunks, (30, 11))))
        growing = tuple(m if m is None else max(m, n) for m, n in zip(old.maxshape, (30, 11), strict=True))
        assert new.maxshape == (growing if old.chunks else (30, 11))
    np.testing.assert_array_equal(read_all(str(tmp_path / "out.h5"), step=50), values)


@pytest.mark.parametrize("shape", [(9,), (3, 4, 5)])
def test_a_sink_of_other_ranks_and_types(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for dtype in ("f2", "f8"):
        values = table(shape, dtype)
        source = make(tmp_path / "x.h5", table(shape, ">i4"), chunks=(2,) * len(shape))
        write_like(source, tmp_path / "out.h5", values, [4, 3])
        with h5py.File(tmp_path / "out.h5") as f:
            assert f["x"].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(f["x"][...], values)


def test_a_sink_without_a_model_is_contiguous(tmp_path: Path) -> None:
    sink = Hdf5Sink(str(tmp_path / "out.h5"), "/deep/data", (37, 11), np.dtype("f4"), like=None, budget=100)
    for row in table():
        sink.write(row)
    sink.finish()
    with h5py.File(tmp_path / "out.h5") as f:
        assert f["deep/data"].chunks is None
        np.testing.assert_array_equal(f["deep/data"][...], table())


@pytest.mark.parametrize("budget", [100, 400, 1100, 5000, BUDGET])
@pytest.mark.parametrize("shape", [(50, 23), (7, 12, 30)])
def test_a_sink_writes_each_chunk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, shape: tuple[int, ...]
) -> None:
    """Whole chunks only, in blocks that do not overlap, of at most the budget."""
    blocks: list[tuple[int, int]] = []
    store = Hdf5Sink._store

    def note(sink: Hdf5Sink, values: Array) -> None:
        blocks.append((sink._written, values.size))
        assert values.nbytes <= budget
        assert sink._buffer.nbytes <= budget
        store(sink, values)

    monkeypatch.setattr(Hdf5Sink, "_store", note)
    source = make(tmp_path / "x.h5", table(shape), chunks=(7, 6, 30)[: len(shape)], compression="gzip")
    values = table(shape, "f8")
    write_like(source, tmp_path / "out.h5", values, [17, 300, 5], budget)
    np.testing.assert_array_equal(read_all(str(tmp_path / "out.h5")), values)
    assert sum(size for _, size in blocks) == values.size
    with h5py.File(tmp_path / "out.h5") as f:
        chunks = f["x"].chunks
        if budget == BUDGET:
            assert chunks == (7, 6, 30)[: len(shape)]
        owner = np.full(values.size, -1)
        for i, (first, size) in enumerate(blocks):
            owner[first : first + size] = i
        for place in f["x"].iter_chunks():
            assert len(np.unique(owner.reshape(shape)[place])) == 1
        # nothing was stored, given up and stored again
        stored = sum(f["x"].id.get_chunk_info(i).size for i in range(f["x"].id.get_num_chunks()))
        assert stored == f["x"].id.get_storage_size()
        assert f.id.get_freespace() < 4096


def test_a_sink_keeps_attributes(tmp_path: Path) -> None:
    source = make(tmp_path / "x.h5", table((4, 3)))
    with h5py.File(source, "a") as f:
        x = f["x"]
        x.attrs["units"] = "mm"
        x.attrs["feature_names"] = ["a", "b", "ü"]
        x.attrs["fixed"] = np.array([b"ab", b"c"])
        x.attrs["matrix"] = np.arange(6, dtype=">i2").reshape(2, 3)
        x.attrs["empty"] = h5py.Empty("f4")
        x.attrs["on"] = True
        x.attrs["pointer"] = x.ref
        for name in ("scale_factor", "add_offset", "_FillValue"):
            x.attrs[name] = 1.0
    write_like(source, tmp_path / "out.h5", table((4, 3)), [12])
    with h5py.File(tmp_path / "out.h5") as f:
        a = f["x"].attrs
        assert set(a) == {"units", "feature_names", "fixed", "matrix", "empty", "on"}
        assert a["units"] == "mm"
        assert list(a["feature_names"]) == ["a", "b", "ü"]
        assert list(a["fixed"]) == [b"ab", b"c"]
        assert a["matrix"].dtype == ">i2"
        np.testing.assert_array_equal(a["matrix"], np.arange(6).reshape(2, 3))
        assert isinstance(a["empty"], h5py.Empty)
        assert a["on"].dtype == np.bool_


def test_lossy_filters_are_dropped(tmp_path: Path) -> None:
    source = make(tmp_path / "x.h5", table(), chunks=(8, 4), scaleoffset=1, compression="gzip")
    write_like(source, tmp_path / "out.h5", table(), [100])
    with h5py.File(tmp_path / "out.h5") as f:
        assert f["x"].scaleoffset is None
        assert f["x"].compression == "gzip"
        np.testing.assert_array_equal(f["x"][...], table())


def test_a_filter_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "x.h5", table(), chunks=(8, 4), compression="lzf")
    with Hdf5Source(source, "x", ReadOptions(max_memory=BUDGET)) as like:
        monkeypatch.setattr(hdf5_vetting.h5z, "get_filter_info", lambda _: h5py.h5z.FILTER_CONFIG_DECODE_ENABLED)
        with pytest.raises(InputError, match=r"lzf \(id 32000\)"):
            Hdf5Sink(str(tmp_path / "out.h5"), "x", (37, 11), np.dtype("f4"), like=like, budget=BUDGET)


def test_a_sink_counts_its_values(tmp_path: Path) -> None:
    sink = Hdf5Sink(str(tmp_path / "out.h5"), "x", (4, 3), np.dtype("f4"), like=None, budget=BUDGET)
    sink.write(np.zeros(11, "f4"))
    with pytest.raises(ValueError, match="only 11"):
        sink.finish()
    with pytest.raises(ValueError, match="more values"):
        sink.write(np.zeros(2, "f4"))
    sink.abandon()
    sink.abandon()


FULL_DISK = """
import resource, signal, sys
import numpy as np
from bncli.formats.hdf5.sink import Hdf5Sink
from bncli.formats.hdf5.source import Hdf5Source
from bncli.formats.reading import ReadOptions
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source, out, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
like = Hdf5Source(source, "x", ReadOptions(max_memory=1 << 20))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sink = None
try:
    sink = Hdf5Sink(out, "x", (37, 1100), np.dtype("f8"), like=like, budget=40000)
    sink.copy_others(like)
    for row in np.random.default_rng(0).normal(size=(37, 1100)):
        sink.write(row)
    sink.finish()
except OSError as error:
    print(error.strerror)
    if sink:
        sink.abandon()
print("end")
"""


@pytest.mark.parametrize("options", [{}, {"chunks": (8, 110), "compression": "gzip"}])
@pytest.mark.parametrize("limit", [0, 500, 20_000, 200_000])
def test_a_full_disk_does_not_crash_hdf5(tmp_path: Path, limit: int, options: dict[str, Any]) -> None:
    source = make(tmp_path / "x.h5", table((37, 1100)), **options)
    with h5py.File(source, "a") as f:
        f["g/other"] = table()
    command = [sys.executable, "-c", FULL_DISK, source, str(tmp_path / "out.h5"), str(limit)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "File too large\nend\n", "")


def test_copy_others(tmp_path: Path) -> None:
    source = make(tmp_path / "x.h5", table(dtype="i2"), name="g/x", chunks=(8, 4))
    with h5py.File(source, "a") as f:
        f.attrs["title"], f["g"].attrs["note"] = "root", "group"
        f.create_dataset("labels", data=np.arange(37), chunks=(5,), compression="gzip").attrs["unit"] = "class"
        f["g/names"] = ["a", "ü"]
        f.create_group("empty/inner")
        f["alias"], f["g/again"], f["loop"] = f["g/x"], f["labels"], f["/"]
        f["g/back"] = f["g"]
        f["kind"] = np.dtype([("a", "i2"), ("b", h5py.string_dtype())])
        f["kind"].attrs["note"] = "type"
        f["soft"], f["out"] = h5py.SoftLink("/labels"), h5py.ExternalLink("o.h5", "/")
        f["refers"] = np.array([f["labels"].ref], h5py.ref_dtype)
        f["labels"].attrs["refers"] = f["g"].ref
        f.create_dataset("outside", (2,), "f4", external=[(str(tmp_path / "raw"), 0, 8)])
    assert other_datasets(source, "/g/x") == ["/g/again", "/g/names", "/outside", "/refers"]
    assert other_datasets(source, "alias") == ["/g/again", "/g/names", "/outside", "/refers"]
    with Hdf5Source(source, "g/x", ReadOptions(max_memory=BUDGET)) as like:
        sink = Hdf5Sink(str(tmp_path / "out.h5"), "g/x", (37, 11), np.dtype("f4"), like=like, budget=BUDGET)
        assert sink.copy_others(like) == (["/outside"], ["/out"])
        sink.write(table().reshape(-1))
        sink.finish()
    with h5py.File(tmp_path / "out.h5") as f:
        assert (f.attrs["title"], f["g"].attrs["note"]) == ("root", "group")
        np.testing.assert_array_equal(f["labels"][...], np.arange(37))
        assert f["labels"].compression == "gzip"
        assert f["labels"].attrs["unit"] == "class"
        assert list(f["g/names"].asstr()) == ["a", "ü"]
        assert f["alias"] == f["g/x"]
        assert f["labels"] == f["g/again"]
        assert f["loop"] == f["/"]
        assert f["g/back"] == f["g"]
        assert "inner" in f["empty"]
        assert f["kind"].dtype == np.dtype([("a", "i2"), ("b", h5py.string_dtype())])
        assert f["kind"].attrs["note"] == "type"
        assert set(f) == {"g", "labels", "empty", "alias", "loop", "kind", "soft", "refers"}
        assert f[f["refers"][0]] == f["labels"]
        assert f[f["labels"].attrs["refers"]] == f["g"]
        assert f["soft"] == f["labels"]
        np.testing.assert_array_equal(f["alias"][...], table())


def chunked_raw(path: Path, x: Array, chunks: tuple[int, ...], filters: Any) -> h5py.h5d.DatasetID:
    """A dataset whose filters are set by hand, and its open file."""
    file = h5py.File(path, "w")
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk(chunks)
    filters(layout)
    item = h5py.h5d.create(file.id, b"x", h5py.h5t.py_create(x.dtype), h5py.h5s.create_simple(x.shape), layout)
    return file, item


def test_a_chunk_without_its_checksum_under_gzip(tmp_path: Path) -> None:
    """The filter mask leaves out fletcher32, so what gzip gives is 4 bytes shorter."""
    x = np.arange(56, dtype="i2").reshape(4, 14)
    file, item = chunked_raw(tmp_path / "x.h5", x, (1, 14), lambda p: (p.set_fletcher32(), p.set_deflate(4)))
    with file:
        for i in range(4):
            item.write_direct_chunk((i, 0), zlib.compress(x[i].tobytes()), 1)
    assert read_all(str(tmp_path / "x.h5")).reshape(x.shape).tolist() == x.tolist()


def test_two_compressors_one_after_the_other(tmp_path: Path) -> None:
    """Nobody knows what the outer one gives: h5py decodes these."""
    x = np.zeros((64, 8))
    x[::3] = 1
    file, item = chunked_raw(tmp_path / "x.h5", x, (64, 8), lambda p: (p.set_filter(32000, 1, ()), p.set_deflate(4)))
    with file:
        h5py.Dataset(item)[...] = x
    assert read_all(str(tmp_path / "x.h5")).reshape(x.shape).tolist() == x.tolist()


def test_references_are_told_or_follow(tmp_path: Path) -> None:
    x = np.ones((6, 2))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"], file["t"] = x, np.arange(6.0)
        file["t"].make_scale("time")
        file["x"].dims[0].attach_scale(file["t"])
        file["x"].attrs["unit"] = "m"
    with Hdf5Source(str(tmp_path / "x.h5"), "x", ReadOptions(max_memory=BUDGET)) as like:
        sink = Hdf5Sink(str(tmp_path / "y.h5"), "x", (6, 2), np.dtype("f8"), like=like, budget=BUDGET)
        assert sink.dropped == ["/x@DIMENSION_LIST"]
        sink.write(x.reshape(-1))
        assert sink.copy_others(like) == ([], [])
        sink.finish()
    with h5py.File(tmp_path / "y.h5") as file:
        assert file["x"].attrs["unit"] == "m"
        assert file["x"].dims[0]["time"] == file["t"]
